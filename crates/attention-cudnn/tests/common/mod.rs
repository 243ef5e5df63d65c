//! The device and the backends that the tests of calls share.

use std::sync::Arc;

use attention_chunked_cuda::{ChunkedCudaBackend, ChunkedCudaConfig};
use attention_core::{AttentionBackend, Scalar, philox4x32_10};
use attention_cuda::CudaDevice;
use attention_cudnn::{CudnnBackend, CudnnConfig};
use half::bf16;

pub(crate) type Result<T = ()> = std::result::Result<T, Box<dyn std::error::Error + Send + Sync>>;

/// The device on a stream of its own, without cudarc's events: every test orders its work by one stream.
pub(crate) fn device() -> Result<CudaDevice> {
    let device = CudaDevice::new("test", 0)?;
    // SAFETY: without events, cudarc does not order work of several streams on the same memory. These tests
    // use all memory of this device on one stream, the new one below, so there is nothing to order.
    unsafe { device.context().disable_event_tracking() };
    let stream = device.context().new_stream()?;
    Ok(device.with_stream(stream))
}

/// The backends for device memory, on the stream of this device.
pub(crate) fn backends(device: &CudaDevice) -> [Arc<dyn AttentionBackend>; 2] {
    [
        Arc::new(CudnnBackend::on(device.clone(), CudnnConfig::default())),
        Arc::new(ChunkedCudaBackend::on(device.clone(), ChunkedCudaConfig::default())),
    ]
}

/// Uniform in [-2, 2).
pub(crate) fn numbers(seed: u64, count: usize) -> Vec<bf16> {
    let word = |index: usize| philox4x32_10([index as u32, 0, 0, 0], [seed as u32, 0])[0];
    (0..count)
        .map(|index| <bf16 as Scalar>::from_f64(f64::from(word(index)) / f64::from(1u32 << 30) - 2.0))
        .collect()
}
