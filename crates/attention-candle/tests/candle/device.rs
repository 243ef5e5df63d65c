//! Where the tests' tensors are.

use std::sync::OnceLock;

use candle_core::Device;

/// The CPU; or, with feature `cuda` and where `ATTENTION_CANDLE_CUDA` is set, the first GPU. Another value of
/// candle's for the same GPU would be another device to it.
pub(crate) fn device() -> &'static Device {
    static DEVICE: OnceLock<Device> = OnceLock::new();
    DEVICE.get_or_init(|| {
        if cfg!(feature = "cuda") && std::env::var_os("ATTENTION_CANDLE_CUDA").is_some() {
            Device::new_cuda(0).expect("a GPU")
        } else {
            Device::Cpu
        }
    })
}
