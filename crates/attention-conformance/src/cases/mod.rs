//! Generated cases: what is called, with which data, in which memory.
//!
//! A [`Case`] is plain data and says nothing of dtype and pass: every case runs in each. [`all`] lists the
//! fixed ones and a fixed number of random ones; [`case_from_seed`] makes a random one, which is also what
//! the [`strategy`] for proptest draws.

mod batch_invariant;
mod bits;
mod case;
mod choices;
mod contents;
mod data;
mod eight_bit;
mod families;
mod far;
mod laid_out;
mod layout;
mod layouts;
mod magnitudes;
mod numbers;
mod options;
mod packed;
mod paged;
mod problem;
mod random;
mod sequences;
mod shapes;
mod strategy;
mod tensors;

pub(crate) use case::dims;
pub use case::{Case, Saved};
pub use contents::{BiasContent, Content, MaskContent, Sizes, Values};
pub use far::{Far, Grid};
pub(crate) use laid_out::of_no_sequence;
pub use layout::{Layout, Layouts};
pub use numbers::Numbers;
pub use options::{AlibiShape, Broadcast, EightBit, Options, ScaleShape, Wanted};
pub use random::case_from_seed;
pub(crate) use random::{numbers_in_tensors, sequences as random_sequences};
pub use sequences::{KeyRows, Sequences};
pub use strategy::strategy;
pub use tensors::CaseData;

use crate::rng::Rng;

/// How many random cases [`all`] holds.
pub const RANDOM_CASES: u64 = 280;

/// All cases whose sequences are batch rows, in a fixed order with fixed names.
pub fn all() -> Vec<Case> {
    let mut cases = shapes::cases();
    cases.extend(layouts::cases());
    cases.extend(families::cases());
    cases.extend(magnitudes::cases());
    cases.extend(choices::cases());
    cases.extend(bits::cases());
    cases.extend((0..RANDOM_CASES).map(case_from_seed));
    cases
}

/// How many random cases [`of_sequences`] holds.
const RANDOM_SEQUENCES: u64 = 48;

/// All cases whose sequences are packed or in pages, in the same way. Those in pages have [no backward
/// pass](Case::passes).
pub fn of_sequences() -> Vec<Case> {
    let mut cases = packed::cases();
    cases.extend(paged::cases());
    cases.extend((0..RANDOM_SEQUENCES).map(|seed| {
        let mut case = case_from_seed(seed);
        random::sequences(&mut case, &mut Rng::named(seed, "sequences"));
        let family = if case.passes().len() == 2 { "packed" } else { "paged" };
        case.name = format!("{family}/random-{seed}");
        case
    }));
    cases
}

/// All cases whose keys and values have 8 bits, in the same way. They have [no backward pass](Case::passes).
pub fn of_eight_bits() -> Vec<Case> {
    eight_bit::cases()
}

/// Cases that are to be batch invariant, in the same way. Each is also compared, bit by bit, with its
/// sequences alone and in other layouts.
pub fn of_batch_invariance() -> Vec<Case> {
    batch_invariant::cases()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use attention_core::{DType, Feature, FeatureSet, Pass, Role};

    use super::*;
    use crate::tensor::HostTensor;

    fn every_case() -> Vec<Case> {
        let others = of_eight_bits().into_iter().chain(of_batch_invariance());
        all().into_iter().chain(of_sequences()).chain(others).collect()
    }

    #[test]
    fn names_are_unique_and_there_are_several_hundred() {
        let cases = every_case();
        let names: BTreeSet<&str> = cases.iter().map(|case| case.name.as_str()).collect();
        assert_eq!(names.len(), cases.len());
        assert!(cases.len() >= 600, "{}", cases.len());
    }

    #[test]
    fn every_case_makes_a_valid_problem_in_every_dtype_and_pass() {
        for case in every_case() {
            for dtype in DType::FLOATS {
                let data = case.data(dtype);
                for &pass in case.passes() {
                    case.problem(&data, pass, FeatureSet::all())
                        .unwrap_or_else(|error| panic!("{} {dtype} {pass}: {error}", case.name));
                }
            }
        }
    }

    #[test]
    fn every_feature_is_in_some_case() {
        // All memory here is the host's.
        let by_name = [Feature::EightBitKeys, Feature::BatchInvariant];
        let all = by_name.into_iter().fold(FeatureSet::all(), FeatureSet::with);
        let mut missing = all.without(Feature::DeviceData);
        for case in every_case() {
            let data = case.data(DType::F32);
            for &pass in case.passes() {
                let problem = case.problem(&data, pass, FeatureSet::all()).unwrap();
                missing = missing.difference(problem.features());
            }
        }
        let missing: Vec<Feature> = missing.iter().collect();
        assert!(missing.is_empty(), "{missing:?}");
    }

    #[test]
    fn numbers_have_every_dtype_and_are_those_of_the_case() {
        let mut counts = [[0; 3]; 8];
        for case in every_case() {
            // Of the padded call.
            let numbers = Numbers::of(&case);
            let lengths = case.options.key_value_lengths.clone();
            let lengths = lengths.map(|lengths| lengths.iter().map(|&x| x as i64).collect::<Vec<_>>());
            assert_eq!(
                numbers.key_value_lengths.as_ref().map(HostTensor::integers),
                lengths,
                "{}",
                case.name
            );
            let offsets = numbers.query_offsets.as_ref().map(HostTensor::integers);
            assert_eq!(offsets, case.options.query_offsets, "{}", case.name);
            if case.options.dropout_tensors {
                let seed = numbers.dropout_seed.as_ref().unwrap().integers()[0].cast_unsigned();
                assert_eq!(seed, case.options.dropout.unwrap().seed, "{}", case.name);
                assert_ne!(numbers.dropout.unwrap().seed, seed);
            }
            for (role, tensor) in case.data(DType::F32).numbers.tensors() {
                let dtype = tensor.map(|tensor| tensor.desc().dtype());
                let index = DType::INTEGERS.iter().position(|&integer| Some(integer) == dtype);
                let of_role = &mut counts[role as usize - Role::QueryLengths as usize];
                index.into_iter().for_each(|index| of_role[index] += 1);
            }
        }
        // Few seeds and few offsets are numbers of every dtype.
        assert!(counts.iter().flatten().all(|&count| count >= 8), "{counts:?}");
    }

    /// What is laid out is found again in the padded call, and nothing that belongs to no sequence.
    #[test]
    fn sequences_are_where_their_numbers_say() {
        use crate::oracle::Oracle;

        for case in of_sequences().into_iter().chain(of_eight_bits()) {
            let (padded, laid) = (case.padded_data(DType::F64), case.data(DType::F64));
            let without = Case { sequences: None, ..case.clone() };
            let problems = [(&without, &padded), (&case, &laid)].map(|(case, data)| {
                case.problem(data, Pass::Forward, FeatureSet::EMPTY)
                    .unwrap_or_else(|error| panic!("{}: {error}", case.name))
            });
            let [of_padded, of_laid] =
                [Oracle::new(&problems[0], &padded.inputs()), Oracle::new(&problems[1], &laid.inputs())];
            let bits = |values: Vec<f64>| values.into_iter().map(f64::to_bits).collect::<Vec<_>>();
            assert_eq!(bits(of_padded.lse()), bits(of_laid.lse()), "{}", case.name);
            assert_eq!(bits(of_padded.out()), bits(of_laid.out()), "{}", case.name);
            assert_eq!(of_padded.keep_mask(), of_laid.keep_mask(), "{}", case.name);
        }
    }

    #[test]
    fn cases_survive_storage() {
        for case in every_case() {
            let text = serde_json::to_string(&case).unwrap();
            let back: Case = serde_json::from_str(&text).unwrap();
            assert_eq!(back, case);
        }
    }
}
