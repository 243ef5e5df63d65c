//! Memory that calls and libraries work in on a device: kept between calls, below a limit.

use std::sync::{Arc, Mutex, PoisonError};

use attention_core::{Error, LentScratch, Scratch, Unsupported};
use cudarc::driver::sys::{CUresult, CUstreamCaptureStatus};
use cudarc::driver::{CudaSlice, CudaStream, DriverError};

use crate::CudaDevice;
use crate::device::device_of;
use crate::failure;
use crate::owned::Registered;
use crate::tensor::scratch_of;

/// Memory that no call is using.
type Free = Arc<Mutex<Vec<Workspace>>>;

/// Memory for calls on one stream.
#[derive(Debug)]
struct Workspace {
    stream: Arc<CudaStream>,
    /// Dropped before the memory.
    registered: Registered,
    memory: CudaSlice<u8>,
    /// Whether a call that used it was captured: the graph uses it as often as it is launched.
    captured: bool,
}

/// Workspaces of a device, reused by calls on the same stream.
///
/// A call leases one, puts its work on the stream, and gives it back: the next call on the stream runs after
/// it, so the memory is its own by then. Calls on another stream get another workspace.
///
/// A graph that a call was captured into uses the call's workspace whenever it is launched. That stays
/// allocated until [`clear`](Self::clear), and is used by later calls on the stream as well: launch such a
/// graph on the stream that it was captured on. Make one call before the capture, since memory cannot be
/// allocated during it.
#[derive(Clone, Debug)]
pub struct Workspaces {
    limit: usize,
    free: Free,
}

/// A leased workspace; given back when dropped.
#[derive(Debug)]
pub struct Lease {
    stream: Arc<CudaStream>,
    workspace: Option<Workspace>,
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
    /// By the driver, where the device has no more memory; and where the stream is being captured, and no
    /// call before the capture has left a workspace of this size.
    pub fn lease(&self, stream: &Arc<CudaStream>, bytes: usize) -> Result<Lease, DriverError> {
        let lease = |workspace| Lease { stream: stream.clone(), workspace, free: self.free.clone() };
        if bytes == 0 {
            return Ok(lease(None));
        }
        let captured = stream.capture_status()? != CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE;
        let mut free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
        // The smallest that fits: a call may hold two leases, its scratch and its library's workspace.
        let fits = (free.iter().enumerate())
            .filter(|(_, free)| Arc::ptr_eq(&free.stream, stream) && free.memory.len() >= bytes)
            .min_by_key(|(_, free)| free.memory.len());
        let mut workspace = match fits.map(|(index, _)| index) {
            Some(index) => free.swap_remove(index),
            // What the driver allocates now would be the graph's, and this keeps it for calls behind it.
            None if captured => return Err(DriverError(CUresult::CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED)),
            None => {
                // A larger one takes the place of the largest that is too small, and of that alone: once each
                // of some calls was made, all of them find what they need, in any order.
                let too_small = (free.iter().enumerate())
                    .filter(|(_, free)| !free.captured && Arc::ptr_eq(&free.stream, stream))
                    .max_by_key(|(_, free)| free.memory.len());
                if let Some(index) = too_small.map(|(index, _)| index) {
                    free.swap_remove(index);
                }
                // SAFETY: the memory is not initialised. It is given out as a library's workspace or as
                // scratch only, which libraries and backends write before they read it.
                let memory = unsafe { stream.alloc::<u8>(bytes) }?;
                Workspace { stream: stream.clone(), registered: Registered::new(&memory), memory, captured }
            }
        };
        workspace.captured |= captured;
        Ok(lease(Some(workspace)))
    }

    /// A lease as scratch that `backend` lends for a call on the stream of `device`.
    ///
    /// # Errors
    /// [`Unsupported::ScratchLimit`] above the limit, and [`Error::Backend`] by the driver.
    pub fn lend(
        &self,
        backend: &str,
        device: &CudaDevice,
        bytes: usize,
    ) -> Result<Box<dyn LentScratch>, Error> {
        if bytes > self.limit {
            let (backend, limit) = (backend.to_owned(), self.limit);
            return Err(Unsupported::ScratchLimit { backend, needed: bytes, limit }.into());
        }
        let lease = self.lease(device.stream(), bytes);
        Ok(Box::new(lease.map_err(|error| failure(backend, "allocating scratch on the device", error))?))
    }

    /// Gives all memory back to the device that is not leased.
    pub fn clear(&self) {
        self.free.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }
}

impl Lease {
    /// The memory; null where none was asked for.
    pub fn pointer(&self) -> u64 {
        self.workspace.as_ref().map_or(0, |workspace| workspace.registered.start())
    }
}

impl LentScratch for Lease {
    fn scratch(&mut self) -> Scratch<'_> {
        match &mut self.workspace {
            Some(workspace) => scratch_of(&mut workspace.memory, &workspace.registered, usize::MAX),
            None => Scratch::none(device_of(self.stream.context())),
        }
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        if let Some(workspace) = self.workspace.take() {
            self.free.lock().unwrap_or_else(PoisonError::into_inner).push(workspace);
        }
    }
}
