//! Generated cases: what is called, with which data, in which memory.
//!
//! A [`Case`] is plain data and says nothing of dtype and pass: every case runs in each. [`all`] lists the fixed
//! ones and a fixed number of random ones; [`case_from_seed`] makes a random one, which is also what the
//! [`strategy`] for proptest draws.

mod bits;
mod case;
mod choices;
mod contents;
mod data;
mod families;
mod far;
mod layout;
mod layouts;
mod magnitudes;
mod numbers;
mod options;
mod problem;
mod random;
mod shapes;
mod strategy;
mod tensors;

pub(crate) use case::dims;
pub use case::{Case, Saved};
pub use contents::{BiasContent, Content, MaskContent, Sizes, Values};
pub use far::{Far, Grid};
pub use layout::{Layout, Layouts};
pub use numbers::Numbers;
pub use options::{AlibiShape, Broadcast, Options, Wanted};
pub use random::case_from_seed;
pub(crate) use random::numbers_in_tensors;
pub use strategy::strategy;
pub use tensors::CaseData;

/// How many random cases [`all`] holds.
pub const RANDOM_CASES: u64 = 280;

/// All cases of the suite, in a fixed order with fixed names.
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

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use attention_core::{DType, Feature, FeatureSet, Pass, Role};

    use super::*;
    use crate::tensor::HostTensor;

    #[test]
    fn names_are_unique_and_there_are_several_hundred() {
        let cases = all();
        let names: BTreeSet<&str> = cases.iter().map(|case| case.name.as_str()).collect();
        assert_eq!(names.len(), cases.len());
        assert!(cases.len() >= 600, "{}", cases.len());
    }

    #[test]
    fn every_case_makes_a_valid_problem_in_every_dtype_and_pass() {
        for case in all() {
            for dtype in DType::FLOATS {
                let data = case.data(dtype);
                for pass in [Pass::Forward, Pass::Backward] {
                    case.problem(&data, pass, FeatureSet::all())
                        .unwrap_or_else(|error| panic!("{} {dtype} {pass}: {error}", case.name));
                }
            }
        }
    }

    #[test]
    fn every_feature_is_in_some_case() {
        // All memory here is the host's, and all sequences are dense.
        let mut missing = FeatureSet::all().without(Feature::DeviceData).difference(FeatureSet::SEQUENCES);
        for case in all() {
            let data = case.data(DType::F32);
            for pass in [Pass::Forward, Pass::Backward] {
                let problem = case.problem(&data, pass, FeatureSet::all()).unwrap();
                missing = missing.difference(problem.features());
            }
        }
        let missing: Vec<Feature> = missing.iter().collect();
        assert!(missing.is_empty(), "{missing:?}");
    }

    #[test]
    fn numbers_have_every_dtype_and_are_those_of_the_case() {
        let mut counts = [[0; 3]; 5];
        for case in all() {
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
            for (role, tensor) in numbers.tensors() {
                let dtype = tensor.map(|tensor| tensor.desc().dtype());
                let index = DType::INTEGERS.iter().position(|&integer| Some(integer) == dtype);
                let of_role = &mut counts[role as usize - Role::QueryLengths as usize];
                index.into_iter().for_each(|index| of_role[index] += 1);
            }
        }
        // Few seeds and few offsets are numbers of every dtype.
        assert!(counts.iter().flatten().all(|&count| count >= 8), "{counts:?}");
    }

    #[test]
    fn cases_survive_storage() {
        for case in all() {
            let text = serde_json::to_string(&case).unwrap();
            let back: Case = serde_json::from_str(&text).unwrap();
            assert_eq!(back, case);
        }
    }
}
