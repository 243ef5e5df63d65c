//! Memory that calls and libraries work in on a device: kept between calls, below a limit.

use std::sync::{Arc, Mutex, PoisonError};

use attention_core::{LentScratch, Scratch};
use cudarc::driver::{CudaSlice, CudaStream, DevicePtr, DriverError};

use crate::device::device_of;
use crate::tensor::scratch_on;

/// Memory that no call is using, with the stream whose calls may use it.
type Free = Arc<Mutex<Vec<(Arc<CudaStream>, CudaSlice<u8>)>>>;

/// Workspaces of a device, reused by calls on the same stream.
///
/// A call leases one, puts its work on the stream, and gives it back: the next call on the stream runs after it, so the
/// memory is its own by then. Calls on another stream get another workspace.
#[derive(Clone, Debug)]
pub struct Workspaces {
    limit: usize,
    free: Free,
}

/// A leased workspace; given back when dropped.
#[derive(Debug)]
pub struct Lease {
    stream: Arc<CudaStream>,
    memory: Option<CudaSlice<u8>>,
    free: Free,
}

impl Workspaces {
    /// Workspaces of at most `limit` bytes each.
    pub fn new(limit: usize) -> Self {
        Self { limit, free: Arc::default() }
    }

    /// The most bytes that a lease may have.
    pub fn limit(&self) -> usize {
        self.limit
    }

    /// At least `bytes` bytes for work on this stream, at an address that is a multiple of 256.
    ///
    /// # Errors
    /// By the driver, where the device has no more memory.
    pub fn lease(&self, stream: &Arc<CudaStream>, bytes: usize) -> Result<Lease, DriverError> {
        let mut free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
        // The smallest that fits: a call may hold two leases, its scratch and its library's workspace.
        let fits = (free.iter().enumerate())
            .filter(|(_, (of, memory))| Arc::ptr_eq(of, stream) && memory.len() >= bytes)
            .min_by_key(|(_, (_, memory))| memory.len());
        let memory = match fits.map(|(index, _)| index) {
            _ if bytes == 0 => None,
            Some(index) => Some(free.swap_remove(index).1),
            None => {
                // One that is too small is not worth keeping beside a larger one.
                free.retain(|(of, _)| !Arc::ptr_eq(of, stream));
                // SAFETY: workspaces hold nothing that is read before it is written: the libraries' contract.
                Some(unsafe { stream.alloc::<u8>(bytes) }?)
            }
        };
        Ok(Lease { stream: stream.clone(), memory, free: self.free.clone() })
    }

    /// Gives all memory back to the device that is not leased.
    pub fn clear(&self) {
        self.free.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }
}

impl Lease {
    /// The memory; null where none was asked for.
    pub fn pointer(&self) -> u64 {
        self.memory.as_ref().map_or(0, |memory| memory.device_ptr(&self.stream).0)
    }
}

impl LentScratch for Lease {
    fn scratch(&mut self) -> Scratch<'_> {
        match &mut self.memory {
            Some(memory) => scratch_on(&self.stream, memory, usize::MAX),
            None => Scratch::none(device_of(self.stream.context())),
        }
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        if let Some(memory) = self.memory.take() {
            self.free.lock().unwrap_or_else(PoisonError::into_inner).push((self.stream.clone(), memory));
        }
    }
}
