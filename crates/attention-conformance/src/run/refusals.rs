//! Whether a plan refuses calls of other problems, and scratch memory that does not fit, before it writes.

use attention_core::{
    AttentionBackend, CallProblem, Error, InvalidCall, Plan, Problem, Role, Scratch, ScratchBuffer,
};

use super::call::{Invocation, catch};
use super::{Results, Stop};
use crate::cases::Numbers;

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

/// An entry of a block table that a key needs and that is no page is refused before a backend sees the call.
pub(super) fn wrong_pages(problem: &Problem, numbers: &Numbers) -> Result<(), Stop> {
    let (Some(table), Some(lengths)) = (&numbers.block_table, &numbers.key_value_lengths) else {
        return Ok(());
    };
    let Some(sequence) = lengths.integers().into_iter().position(|length| length > 0) else { return Ok(()) };
    let pages = problem.tensor(Role::Key).map_or(0, |pages| pages.shape()[0]) as i64;
    let first = sequence * table.desc().shape()[1];
    let mut wrong = numbers.clone();
    let mut index = 0;
    wrong.block_table.iter_mut().for_each(|table| {
        table.map_integers(|entry| {
            index += 1;
            if index == first + 1 { pages } else { entry }
        });
    });
    match CallProblem::new(problem, &wrong.data()) {
        Err(InvalidCall::NoSuchPage { batch, index: 0, page, .. }) if (batch, page) == (sequence, pages) => {
            Ok(())
        }
        other => {
            let got = other.map_or_else(|error| error.to_string(), |_| "success".to_owned());
            Err(Stop::failed(format!(
                "given page {pages} of {pages}: expected the error NoSuchPage, got: {got}"
            )))
        }
    }
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
