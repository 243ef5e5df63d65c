//! A CUDA device with the stream that work is put on.

use std::sync::Arc;

use attention_core::{Device, Error, Unavailable, Unsupported};
use cudarc::driver::sys::CUstreamCaptureStatus;
use cudarc::driver::sys::cuDriverGetVersion;
use cudarc::driver::{CudaContext, CudaStream, DriverError};

use crate::failure;
use crate::library::Search;

/// A device and a stream. Cheap to clone: both are shared.
#[derive(Clone, Debug)]
pub struct CudaDevice {
    context: Arc<CudaContext>,
    stream: Arc<CudaStream>,
}

impl CudaDevice {
    /// The device with this ordinal, on its default stream.
    ///
    /// # Errors
    /// [`Unavailable`], for `backend`, where there is no driver, none that works, or no such device.
    pub fn new(backend: &str, ordinal: usize) -> Result<Self, Unavailable> {
        let count = device_count(backend)?;
        if ordinal >= count {
            let what = format!("device {ordinal} was asked for, and there are {count}");
            return Err(unavailable(backend, what, vec![format!("cuda:{ordinal}")]));
        }
        let context = CudaContext::new(ordinal).map_err(|error| failed(backend, ordinal, error))?;
        let stream = context.default_stream();
        Ok(Self { context, stream })
    }

    /// The device of a stream, with work on that stream: of the caller's or of another library's.
    pub fn of_stream(stream: Arc<CudaStream>) -> Self {
        Self { context: stream.context().clone(), stream }
    }

    /// The same device with work on another stream of it: of its own ([`CudaContext::new_stream`]) or the
    /// caller's ([`CudaContext::wrap_borrowed_stream`]).
    #[must_use]
    pub fn with_stream(&self, stream: Arc<CudaStream>) -> Self {
        Self::of_stream(stream)
    }

    /// The context.
    pub fn context(&self) -> &Arc<CudaContext> {
        &self.context
    }

    /// The stream.
    pub fn stream(&self) -> &Arc<CudaStream> {
        &self.stream
    }

    /// The device's name for views of its memory.
    pub fn device(&self) -> Device {
        device_of(&self.context)
    }

    /// Checks that the stream is not being captured: planning loads kernels and may send to the device, which
    /// a capture forbids or makes a part of the graph.
    ///
    /// # Errors
    /// [`Unsupported::Limit`] of `backend` during a capture, [`Error::Backend`] by the driver.
    pub fn check_plannable(&self, backend: &str) -> Result<(), Error> {
        let status = self.stream.capture_status();
        let status = status.map_err(|error| failure(backend, "asking for the state of a stream", error))?;
        if status == CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE {
            return Ok(());
        }
        let (backend, what) = (backend.to_owned(), "planning on".to_owned());
        let value = "a stream that is being captured".to_owned();
        let why = "kernels cannot be loaded during a capture, so plan before it and hold the plan";
        Err(Unsupported::Limit { backend, what, value, why: why.to_owned() }.into())
    }

    /// The compute capability, `(9, 0)` for Hopper.
    ///
    /// # Errors
    /// By the driver.
    pub fn compute_capability(&self) -> Result<(u32, u32), DriverError> {
        let (major, minor) = self.context.compute_capability()?;
        Ok((major.unsigned_abs(), minor.unsigned_abs()))
    }

    /// Whether kernels can be launched by programmatic dependent launch: from compute capability 9.0 on, with
    /// a driver that can capture such launches in a graph (12.3).
    ///
    /// # Errors
    /// By the driver.
    pub fn has_programmatic_launches(&self) -> Result<bool, DriverError> {
        let mut version = 0;
        // SAFETY: the driver writes one int, to a place for one that is alive.
        unsafe { cuDriverGetVersion(&raw mut version) }.result()?;
        Ok(self.compute_capability()? >= (9, 0) && version >= FIRST_PROGRAMMATIC)
    }
}

/// The first driver that captures programmatic launches, as `cuDriverGetVersion` says it.
const FIRST_PROGRAMMATIC: i32 = 12_030;

/// The name of a context's device for views of its memory.
pub(crate) fn device_of(context: &CudaContext) -> Device {
    Device::Cuda(u32::try_from(context.ordinal()).unwrap_or(u32::MAX))
}

/// How many devices the driver sees.
///
/// # Errors
/// [`Unavailable`] where there is no driver, or it does not start.
pub fn device_count(backend: &str) -> Result<usize, Unavailable> {
    // cudarc panics where the library is missing, so it is looked for first.
    let driver = Search::new(["libcuda.so.1", "libcuda.so", "nvcuda.dll"]).open().map_err(|missing| {
        unavailable(backend, format!("no CUDA driver ({})", missing.what), missing.looked_for)
    })?;
    cudarc::driver::result::init().map_err(|error| {
        unavailable(backend, format!("the CUDA driver does not start: {error}"), vec![driver.place.clone()])
    })?;
    let count = CudaContext::device_count().map_err(|error| {
        unavailable(backend, format!("the CUDA driver lists no devices: {error}"), vec![driver.place])
    })?;
    Ok(usize::try_from(count).unwrap_or(0))
}

fn unavailable(backend: &str, what: String, looked_for: Vec<String>) -> Unavailable {
    Unavailable { backend: backend.to_owned(), what, looked_for }
}

fn failed(backend: &str, ordinal: usize, error: DriverError) -> Unavailable {
    unavailable(backend, format!("device {ordinal} does not start: {error}"), vec![format!("cuda:{ordinal}")])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_without_a_device_gets_an_error_and_no_panic() {
        match CudaDevice::new("test", 4096) {
            Err(error) => assert!(!error.looked_for.is_empty(), "{error}"),
            Ok(_) => panic!("no machine has 4097 devices"),
        }
    }
}
