//! The result of a case.

use std::time::Instant;

use attention_core::{DType, FeatureSet, Pass};

use super::{Judge, Stop};
use crate::report::{CaseResult, Outcome};

/// Runs the checks of a case, which note the features that it has, and says how they ended and how long they
/// took.
pub(crate) fn timed(
    case: &str,
    dtype: DType,
    pass: Pass,
    checks: impl FnOnce(&mut FeatureSet) -> Result<Judge, Stop>,
) -> CaseResult {
    let start = Instant::now();
    let mut features = FeatureSet::EMPTY;
    let outcome = match checks(&mut features) {
        Ok(judge) => judge.outcome(),
        Err(Stop::Failed(reason, differences)) => Outcome::Failed { reason, differences },
        Err(Stop::Skipped(reason)) => Outcome::Skipped { reason },
    };
    CaseResult {
        case: case.to_owned(),
        dtype,
        pass,
        features: features.iter().collect(),
        outcome,
        ms: start.elapsed().as_secs_f64() * 1e3,
    }
}
