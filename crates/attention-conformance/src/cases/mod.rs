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
pub use options::{AlibiShape, Broadcast, Options, Wanted};
pub use random::case_from_seed;
pub use strategy::strategy;
pub use tensors::CaseData;

/// How many random cases [`all`] holds.
pub const RANDOM_CASES: u64 = 240;

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

    use attention_core::{DType, Feature, FeatureSet, Pass};

    use super::*;

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
        let mut missing = FeatureSet::all();
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
    fn cases_survive_storage() {
        for case in all() {
            let text = serde_json::to_string(&case).unwrap();
            let back: Case = serde_json::from_str(&text).unwrap();
            assert_eq!(back, case);
        }
    }
}
