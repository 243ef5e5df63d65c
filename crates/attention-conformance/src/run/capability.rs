//! Whether what a backend declares and what it does agree.

use attention_core::{AttentionBackend, Error, Pass, Problem, ScratchBuffer, Unsupported};

use super::call::{Invocation, catch};
use super::{Results, SavedTensors, Stop};
use crate::cases::{Case, CaseData};
use crate::oracle::Oracle;

/// Goes on where capabilities and `supports` both accept the problem, skips where both refuse, fails elsewhere.
pub(super) fn agrees(
    backend: &dyn AttentionBackend,
    problem: &Problem,
    data: &CaseData,
    case: &Case,
) -> Result<(), Stop> {
    let declared = backend.capabilities().check(backend.name(), problem);
    let supported = catch(|| backend.supports(problem))?;
    match (declared, supported) {
        (Ok(()), Ok(())) => Ok(()),
        (Err(limit), Ok(())) => {
            Err(Stop::failed(format!("supports accepts what the capabilities do not declare ({limit})")))
        }
        (Ok(()), Err(refusal)) if !is_limit(&refusal) => {
            Err(Stop::failed(format!("supports refuses what the capabilities declare: {refusal}")))
        }
        (_, Err(refusal)) => {
            refuses_to_run(backend, problem, data, case)?;
            Err(Stop::Skipped(refusal.to_string()))
        }
    }
}

/// Limits that capabilities cannot express as data.
fn is_limit(refusal: &Unsupported) -> bool {
    matches!(refusal, Unsupported::Limit { .. } | Unsupported::ScratchLimit { .. })
}

/// A problem that is not supported must not run: everything else would be an option ignored.
fn refuses_to_run(
    backend: &dyn AttentionBackend,
    problem: &Problem,
    data: &CaseData,
    case: &Case,
) -> Result<(), Stop> {
    if catch(|| backend.scratch_bytes(problem))?.is_ok() {
        return Err(Stop::failed("scratch_bytes accepts what supports refuses"));
    }
    match catch(|| backend.prepare(problem))? {
        Err(Error::Unsupported(_)) => {}
        Err(error) => {
            return Err(Stop::failed(format!("refused in supports, and prepare says instead: {error}")));
        }
        Ok(()) => return Err(Stop::failed("prepare accepts what supports refuses")),
    }
    let saved = (problem.pass() == Pass::Backward)
        .then(|| SavedTensors::of_oracle(&Oracle::new(problem, &data.inputs()), problem, &case.layouts));
    let invocation = Invocation {
        problem,
        inputs: data.inputs(),
        saved: saved.as_ref().map(|saved| saved.inputs(data)),
        layouts: Some(&case.layouts),
    };
    let mut results = Results::poisoned(problem, Some(&case.layouts));
    // Plenty, so that a backend that would run is not stopped by its scratch.
    let mut scratch = ScratchBuffer::new(1 << 20);
    let outcome = invocation.attempt(backend, &mut results, scratch.scratch())?;
    match outcome {
        Err(Error::Unsupported(_)) => results.expect_untouched("a refused call"),
        Err(error) => Err(Stop::failed(format!("refused in supports, and the call says instead: {error}"))),
        Ok(()) => Err(Stop::failed("runs a call that supports refuses")),
    }
}
