//! Whether scratch memory is checked before anything is written.

use attention_core::{AttentionBackend, Error, InvalidCall, Scratch, ScratchBuffer};

use super::call::Invocation;
use super::{Results, Stop};

/// One byte less is refused with the right numbers, and so is a misaligned address.
pub(super) fn is_checked(backend: &dyn AttentionBackend, invocation: &Invocation<'_>) -> Result<(), Stop> {
    let bytes = invocation.scratch_bytes(backend)?;
    if invocation.scratch_bytes(backend)? != bytes {
        return Err(Stop::failed("scratch_bytes says something else when it is asked again"));
    }
    if bytes == 0 {
        return Ok(());
    }
    let mut buffer = ScratchBuffer::new(bytes + 1);

    let mut results = Results::poisoned(invocation.problem, invocation.layouts);
    let short = Scratch::host(&mut buffer.bytes_mut()[..bytes - 1]);
    match invocation.attempt(backend, &mut results, short)? {
        Err(Error::InvalidCall(InvalidCall::ScratchTooSmall { needed, given }))
            if (needed, given) == (bytes, bytes - 1) => {}
        other => {
            return Err(unexpected("one byte less scratch than scratch_bytes", "ScratchTooSmall", other));
        }
    }
    results.expect_untouched("a call refused for too little scratch")?;

    let misaligned = Scratch::host(&mut buffer.bytes_mut()[1..]);
    match invocation.attempt(backend, &mut results, misaligned)? {
        Err(Error::InvalidCall(InvalidCall::ScratchMisaligned { .. })) => {}
        other => return Err(unexpected("misaligned scratch", "ScratchMisaligned", other)),
    }
    results.expect_untouched("a call refused for misaligned scratch")
}

fn unexpected(given: &str, wanted: &str, outcome: Result<(), Error>) -> Stop {
    let outcome = outcome.map_or_else(|error| error.to_string(), |()| "success".to_owned());
    Stop::failed(format!("given {given}: expected the error {wanted}, got: {outcome}"))
}
