//! Whether a plan refuses calls of other problems, and scratch memory that does not fit, before it writes.

use attention_core::{AttentionBackend, Error, InvalidCall, Plan, Scratch, ScratchBuffer};

use super::call::{Invocation, catch};
use super::{Results, Stop};

/// One byte less of scratch is refused with the right numbers, and so are a misaligned address and a call of
/// another problem.
pub(super) fn wrong_calls(
    backend: &dyn AttentionBackend,
    plan: &dyn Plan,
    invocation: &Invocation<'_>,
) -> Result<(), Stop> {
    let bytes = catch(|| plan.scratch_bytes())?;
    if invocation.scratch_bytes(backend)? != bytes {
        return Err(Stop::failed("scratch_bytes says something else when it is asked again"));
    }
    let mut buffer = ScratchBuffer::new(bytes + 1);
    if bytes > 0 {
        wrong_scratch(plan, invocation, &mut buffer, bytes)?;
    }

    // Another problem of the same tensors, so that nothing but the problem is wrong.
    let problem = invocation.problem;
    let other = (problem.to_builder().deterministic(!problem.deterministic()).build())
        .map_err(|error| Stop::failed(format!("the suite made an invalid problem: {error}")))?;
    let call = Invocation { problem: &other, ..*invocation };
    let mut results = Results::poisoned(&other, invocation.layouts);
    match call.attempt(plan, &mut results, Scratch::host(&mut buffer.bytes_mut()[..bytes]))? {
        Err(Error::InvalidCall(InvalidCall::OtherProblem { .. })) => {}
        outcome => return Err(unexpected("a call of another problem", "OtherProblem", outcome)),
    }
    results.expect_untouched("a call refused for its problem")
}

fn wrong_scratch(
    plan: &dyn Plan,
    invocation: &Invocation<'_>,
    buffer: &mut ScratchBuffer,
    bytes: usize,
) -> Result<(), Stop> {
    let mut results = Results::poisoned(invocation.problem, invocation.layouts);
    let short = Scratch::host(&mut buffer.bytes_mut()[..bytes - 1]);
    match invocation.attempt(plan, &mut results, short)? {
        Err(Error::InvalidCall(InvalidCall::ScratchTooSmall { needed, given }))
            if (needed, given) == (bytes, bytes - 1) => {}
        outcome => {
            return Err(unexpected("one byte less scratch than scratch_bytes", "ScratchTooSmall", outcome));
        }
    }
    results.expect_untouched("a call refused for too little scratch")?;

    let misaligned = Scratch::host(&mut buffer.bytes_mut()[1..]);
    match invocation.attempt(plan, &mut results, misaligned)? {
        Err(Error::InvalidCall(InvalidCall::ScratchMisaligned { .. })) => {}
        outcome => return Err(unexpected("misaligned scratch", "ScratchMisaligned", outcome)),
    }
    results.expect_untouched("a call refused for misaligned scratch")
}

fn unexpected(given: &str, wanted: &str, outcome: Result<(), Error>) -> Stop {
    let outcome = outcome.map_or_else(|error| error.to_string(), |()| "success".to_owned());
    Stop::failed(format!("given {given}: expected the error {wanted}, got: {outcome}"))
}
