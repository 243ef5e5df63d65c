//! Which device memory of this crate's types belongs to which stream.
//!
//! A call returns before its kernels end, while the borrow of its tensors ends with the call. So memory that
//! safe code can free or write after the call must be freed and written on the stream that the kernels run
//! on, which runs one thing after the other. [`DeviceTensor`](crate::DeviceTensor),
//! [`DeviceScratch`](crate::DeviceScratch) and leased workspaces free and write on the stream that they were
//! made on, and are known here; backends ask before they launch, and refuse memory of another stream. What a
//! caller made a view of by `View::from_raw_parts` is not known here: that function's contract covers it.

use std::collections::BTreeMap;
use std::fmt::Display;
use std::sync::{PoisonError, RwLock};

use attention_core::{Role, Unsupported};
use cudarc::driver::{CudaSlice, CudaStream, DevicePtr};

/// A stream, by its context's address and its own.
type StreamKey = (usize, usize);

/// Memory from one address to before another.
#[derive(Clone, Copy, Debug)]
struct Owned {
    end: u64,
    stream: StreamKey,
}

/// By the first address.
static OWNED: RwLock<BTreeMap<u64, Owned>> = RwLock::new(BTreeMap::new());

fn key_of(stream: &CudaStream) -> StreamKey {
    (stream.context().cu_ctx() as usize, stream.cu_stream() as usize)
}

/// An allocation that is known by its stream for as long as this lives: to be dropped before the memory.
#[derive(Debug)]
pub(crate) struct Registered {
    start: u64,
}

impl Registered {
    /// Of an allocation, which is freed on the stream that it was made on.
    pub(crate) fn new(memory: &CudaSlice<u8>) -> Self {
        let stream = memory.stream();
        let start = memory.device_ptr(stream).0;
        Self::of(start, memory.len(), key_of(stream))
    }

    /// The address of the allocation's first byte. Unlike cudarc's `device_ptr` this asks for no event of
    /// earlier work and leaves none: work on the memory is on its stream, which runs one thing after the
    /// other, and during a capture events of work before it are refused.
    pub(crate) fn start(&self) -> u64 {
        self.start
    }

    fn of(start: u64, bytes: usize, stream: StreamKey) -> Self {
        let end = start.saturating_add(bytes as u64);
        OWNED.write().unwrap_or_else(PoisonError::into_inner).insert(start, Owned { end, stream });
        Self { start }
    }
}

impl Drop for Registered {
    fn drop(&mut self) {
        OWNED.write().unwrap_or_else(PoisonError::into_inner).remove(&self.start);
    }
}

/// Whether memory at this address may be used by work on this stream: false where it is known to belong to
/// another one.
fn may_use(owned: &BTreeMap<u64, Owned>, address: u64, stream: StreamKey) -> bool {
    let below = owned.range(..=address).next_back();
    below.is_none_or(|(_, memory)| address >= memory.end || memory.stream == stream)
}

/// Checks that scratch at this address, and each [`DeviceTensor`](crate::DeviceTensor) or its like at these
/// addresses, may be used by work on this stream: that it was made on the same. Memory of another owner
/// passes.
///
/// # Errors
/// [`Unsupported::Limit`], which names what is there.
pub(crate) fn check_streams(
    backend: &str,
    stream: &CudaStream,
    scratch: u64,
    tensors: impl Iterator<Item = (Role, u64)>,
) -> Result<(), Unsupported> {
    let (owned, stream) = (OWNED.read().unwrap_or_else(PoisonError::into_inner), key_of(stream));
    if !may_use(&owned, scratch, stream) {
        return Err(on_another_stream(backend, &"the scratch"));
    }
    for (role, address) in tensors {
        if !may_use(&owned, address, stream) {
            return Err(on_another_stream(backend, &role));
        }
    }
    Ok(())
}

#[cold]
fn on_another_stream(backend: &str, what: &dyn Display) -> Unsupported {
    Unsupported::Limit {
        backend: backend.to_owned(),
        what: format!("{what} on"),
        value: "another stream".to_owned(),
        why: "its work is on the stream of its own device: make the tensor with the same CudaDevice, or the backend on the \
              tensor's"
            .to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_belongs_to_its_stream_for_as_long_as_it_is_registered() {
        // Addresses that no allocation has.
        let (start, here, elsewhere) = (u64::MAX - 4096, (1, 1), (1, 2));
        let registered = Registered::of(start, 100, here);
        let may_use =
            |address, stream| may_use(&OWNED.read().unwrap_or_else(PoisonError::into_inner), address, stream);
        assert!(may_use(start, here) && may_use(start + 99, here));
        assert!(!may_use(start, elsewhere) && !may_use(start + 99, elsewhere));
        assert!(may_use(start - 1, elsewhere) && may_use(start + 100, elsewhere) && may_use(0, elsewhere));
        drop(registered);
        assert!(may_use(start, elsewhere));
    }
}
