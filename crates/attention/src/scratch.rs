//! Scratch memory: of host calls, kept between calls; of calls on a device, lent by the implementation.

use std::cell::Cell;

use attention_core::{Device, Plan, Scratch, ScratchBuffer};

use crate::Error;

/// What a thread keeps at most. Large enough that the calls of a model's layers find their memory mapped; a
/// backend that materialises long sequences gives its memory back.
pub(crate) const KEPT_BYTES: usize = 64 << 20;

thread_local! {
    static KEPT: Cell<ScratchBuffer> = Cell::default();
}

/// Runs `call` with the scratch memory of a plan's call, where its problem is: the facade's own in host
/// memory, the backend's on a device.
#[inline]
pub(crate) fn with_scratch<R>(
    plan: &dyn Plan,
    call: impl FnOnce(Scratch<'_>) -> Result<R, Error>,
) -> Result<R, Error> {
    match (plan.scratch_bytes(), plan.problem().device()) {
        (0, device) => call(Scratch::none(device)),
        (bytes, Device::Cpu) => with_host_scratch(bytes, call),
        _ => call(plan.lend_scratch()?.scratch()),
    }
}

/// Runs `call` with at least `bytes` of host memory.
///
/// The buffer is taken out of its place for the call, so a call made inside another one on the same thread (a
/// thread pool that steals work) gets a buffer of its own.
#[inline]
fn with_host_scratch<R>(
    bytes: usize,
    call: impl FnOnce(Scratch<'_>) -> Result<R, Error>,
) -> Result<R, Error> {
    // In the destructor of a thread-local the kept buffer may be gone: then the call has one of its own.
    let mut buffer = KEPT.try_with(Cell::take).unwrap_or_default();
    if !buffer.try_reserve(bytes) {
        return Err(Error::OutOfMemory { what: "scratch", bytes });
    }
    let result = call(buffer.scratch());
    if buffer.len() <= KEPT_BYTES {
        let _ = KEPT.try_with(|kept| kept.set(buffer));
    }
    result
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kept() -> usize {
        let buffer = KEPT.take();
        let len = buffer.len();
        KEPT.set(buffer);
        len
    }

    #[test]
    fn buffers_are_kept_up_to_a_bound() {
        let run = |bytes| {
            with_host_scratch(bytes, |mut scratch| Ok((scratch.as_mut_ptr() as usize, scratch.len())))
        };
        let (first, len) = run(1000).unwrap();
        assert!(len >= 1000);
        assert_eq!(run(500).unwrap(), (first, len));
        run(KEPT_BYTES).unwrap();
        assert_eq!(kept(), KEPT_BYTES);
        run(KEPT_BYTES + 1).unwrap();
        assert_eq!(kept(), 0);
    }

    #[test]
    fn a_call_inside_a_call_has_its_own_memory() {
        with_host_scratch(100, |mut outer| {
            with_host_scratch(100, |mut inner| {
                assert_ne!(outer.as_mut_ptr(), inner.as_mut_ptr());
                Ok(())
            })
        })
        .unwrap();
    }

    #[test]
    fn what_cannot_be_had_is_an_error() {
        let error = with_host_scratch(1 << 62, |_| Ok(())).unwrap_err();
        assert_eq!(error.to_string(), "no memory for scratch of 4611686018427387904 bytes");
    }
}
