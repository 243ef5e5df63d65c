//! Whether what a backend declares and what it does agree.

use attention_core::{AttentionBackend, Error, Problem, Unsupported};

use super::Stop;
use super::call::catch;

/// Goes on where capabilities and `supports` both accept the problem, skips where both refuse, fails
/// elsewhere.
pub(super) fn agrees(backend: &dyn AttentionBackend, problem: &Problem) -> Result<(), Stop> {
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
            refuses_to_plan(backend, problem)?;
            Err(Stop::Skipped(refusal.to_string()))
        }
    }
}

/// Limits that capabilities cannot express as data.
fn is_limit(refusal: &Unsupported) -> bool {
    matches!(refusal, Unsupported::Limit { .. } | Unsupported::ScratchLimit { .. })
}

/// A problem that is not supported must have no plan, and so no call: everything else would be an option
/// ignored.
fn refuses_to_plan(backend: &dyn AttentionBackend, problem: &Problem) -> Result<(), Stop> {
    if catch(|| backend.scratch_bytes(problem))?.is_ok() {
        return Err(Stop::failed("scratch_bytes accepts what supports refuses"));
    }
    match catch(|| backend.plan(problem))? {
        Err(Error::Unsupported(_)) => Ok(()),
        Err(error) => Err(Stop::failed(format!("refused in supports, and plan says instead: {error}"))),
        Ok(_) => Err(Stop::failed("plan accepts what supports refuses")),
    }
}
