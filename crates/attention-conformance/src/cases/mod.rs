//! Generated cases: what is called, with which data, in which memory.
//!
//! A [`Case`] is plain data and says nothing of dtype and pass: every case runs in each. [`all`] lists the fixed
//! ones and a fixed number of random ones; [`case_from_seed`] makes a random one, which is also what the
//! [`strategy`] for proptest draws.

mod bits;
mod choices;
mod contents;
mod data;
mod families;
mod far;
mod layout;
mod layouts;
mod magnitudes;
mod options;
mod random;
mod shapes;
mod strategy;

pub use contents::{BiasContent, Content, MaskContent, Sizes, Values};
pub use data::CaseData;
pub use far::{Far, Grid};
pub use layout::{Layout, Layouts};
pub use options::{AlibiShape, Broadcast, Options, Wanted};
pub use random::case_from_seed;
pub use strategy::strategy;

use attention_core::Dimensions;
use serde::{Deserialize, Serialize};

/// Where a backward call takes the forward's output and logsumexp from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Saved {
    /// From the oracle, rounded to their dtypes: the backward pass is judged alone.
    #[default]
    Oracle,
    /// From the backend's own forward pass: both are judged together.
    Backend,
    /// From the oracle, for rows that have more keys than the call: the call's are a part of each row's, as where keys are
    /// spread over devices. What the others weigh is the case's sinks, which the backward call has none of.
    MoreKeys,
}

/// One case.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Case {
    /// A stable name, `family/what`: filters match parts of it.
    pub name: String,
    /// The sizes.
    pub dims: Dimensions,
    /// The options of the call.
    pub options: Options,
    /// How the tensors lie in memory.
    pub layouts: Layouts,
    /// What the tensors hold.
    pub content: Content,
    /// What a backward call starts from.
    pub saved: Saved,
    /// Whether the results are also compared, bit by bit, with those of calls that must give the same ones: padded, with
    /// other strides, with other numbers in memory that does not matter, and with NaN in what other rows read.
    pub variations: bool,
}

impl Case {
    /// A case of these sizes without options, on contiguous tensors of normal random numbers.
    pub fn new(name: impl Into<String>, dims: Dimensions) -> Self {
        let name = name.into();
        let seed = name.bytes().fold(7u64, |hash, byte| hash.wrapping_mul(31).wrapping_add(u64::from(byte)));
        Self {
            name,
            dims,
            options: Options::default(),
            layouts: Layouts::default(),
            content: Content::new(seed),
            saved: Saved::Oracle,
            variations: false,
        }
    }
}

/// An option, or whatever else a case differs by.
type Edit = fn(&mut Case);

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

/// Short for [`Dimensions`]: B, T, S, N, K, H with `Hv = H`.
pub(crate) fn dims(
    [batch, query_length, key_length, query_heads, key_heads, head_dim]: [usize; 6],
) -> Dimensions {
    Dimensions { batch, query_length, key_length, query_heads, key_heads, head_dim, value_head_dim: head_dim }
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
