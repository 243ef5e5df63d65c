//! The generator of random cases for proptest.

use proptest::prelude::*;

use super::{Case, case_from_seed};

/// Random cases, shrinking towards small seeds; a failure's seed is in the case's name and gives the same
/// case to [`case_from_seed`].
///
/// ```
/// use attention_conformance::cases;
/// use proptest::prelude::*;
///
/// proptest!(ProptestConfig::with_cases(4), |(case in cases::strategy())| {
///     prop_assert!(case.dims.query_heads % case.dims.key_heads == 0);
/// });
/// ```
pub fn strategy() -> impl Strategy<Value = Case> {
    any::<u64>().prop_map(case_from_seed)
}
