//! Launches of kernels that take one struct.

use std::ffi::{c_char, c_void};

use cudarc::driver::result::launch_kernel;
use cudarc::driver::sys::{
    CUlaunchAttribute_st, CUlaunchAttributeID, CUlaunchAttributeValue, CUlaunchConfig, cuLaunchKernelEx,
};
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

/// As [`launch`], by programmatic dependent launch: the kernel's blocks may start before earlier kernels of
/// the stream are done. Captured in a graph, it depends on them in the same way.
///
/// # Errors
/// The driver's.
///
/// # Safety
/// As for [`launch`]. And the device has programmatic launches
/// ([`CudaDevice::has_programmatic_launches`](crate::CudaDevice::has_programmatic_launches)), and every
/// thread of the kernel runs `griddepcontrol.wait` before it reads or writes memory that other kernels of the
/// stream use, so that none of them, nor kernels behind this one, can tell it from one that started later.
#[inline]
pub unsafe fn launch_programmatic<A: DeviceRepr>(
    stream: &CudaStream,
    function: &CudaFunction,
    arguments: &A,
    config: LaunchConfig,
) -> Result<(), DriverError> {
    stream.context().bind_to_thread()?;
    let mut attribute = CUlaunchAttribute_st {
        id: CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
        pad: [0 as c_char; 4],
        value: CUlaunchAttributeValue { pad: [0 as c_char; 64] },
    };
    attribute.value.programmaticStreamSerializationAllowed = 1;
    let LaunchConfig { grid_dim, block_dim, shared_mem_bytes } = config;
    let config = CUlaunchConfig {
        gridDimX: grid_dim.0,
        gridDimY: grid_dim.1,
        gridDimZ: grid_dim.2,
        blockDimX: block_dim.0,
        blockDimY: block_dim.1,
        blockDimZ: block_dim.2,
        sharedMemBytes: shared_mem_bytes,
        hStream: stream.cu_stream(),
        attrs: &raw mut attribute,
        numAttrs: 1,
    };
    let mut pointers: [*mut c_void; 1] = [std::ptr::from_ref(arguments).cast_mut().cast()];
    // SAFETY: function and stream are alive and of the context that is now current. The driver reads the
    // configuration with its one attribute, and one argument, of the size that the function says, before it
    // returns, and writes none of them; that the struct is that argument, what it refers to, and that the
    // kernel waits, the caller promised. The driver has this function, since it has such launches.
    unsafe {
        cuLaunchKernelEx(
            &raw const config,
            function.cu_function(),
            pointers.as_mut_ptr(),
            std::ptr::null_mut(),
        )
    }
    .result()
}
