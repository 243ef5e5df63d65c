//! Launches of kernels that take one struct.

use std::ffi::c_void;

use cudarc::driver::result::launch_kernel;
use cudarc::driver::{CudaFunction, CudaStream, DeviceRepr, DriverError, LaunchConfig};

/// Puts a kernel on a stream whose one argument is a struct. As cudarc's builder of launches does it, without
/// its list of arguments, which is allocated for each launch.
///
/// # Errors
/// The driver's.
///
/// # Safety
/// The function takes this struct by value, is of the stream's context, and may be launched like this: what
/// the struct refers to is memory on the stream's device with room for what the kernel does to it.
#[inline]
pub unsafe fn launch<A: DeviceRepr>(
    stream: &CudaStream,
    function: &CudaFunction,
    arguments: &A,
    config: LaunchConfig,
) -> Result<(), DriverError> {
    stream.context().bind_to_thread()?;
    let LaunchConfig { grid_dim, block_dim, shared_mem_bytes } = config;
    let mut pointers: [*mut c_void; 1] = [std::ptr::from_ref(arguments).cast_mut().cast()];
    // SAFETY: function and stream are alive and of the context that is now current. The driver reads one
    // argument, of the size that the function says, before it returns, and writes none; that the struct is
    // that argument, and what it refers to, the caller promised.
    unsafe {
        let (function, stream) = (function.cu_function(), stream.cu_stream());
        launch_kernel(function, grid_dim, block_dim, shared_mem_bytes, stream, &mut pointers)
    }
}
