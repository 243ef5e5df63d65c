//! A device with what the plans on it share.

use attention_core::Unavailable;
use attention_cuda::cudarc::driver::sys::CUdevice_attribute;
use attention_cuda::{CudaDevice, KernelCache, Workspaces};

use super::NAME;
use super::config::ChunkedCudaConfig;
use super::tiles::Machine;

#[derive(Debug)]
pub(crate) struct Runtime {
    pub(crate) device: CudaDevice,
    pub(crate) kernels: KernelCache,
    /// What is lent to calls without scratch of their own.
    pub(crate) workspaces: Workspaces,
    pub(crate) machine: Machine,
    /// Whether kernels that wait for those before may be launched early.
    pub(crate) launches_early: bool,
}

impl Runtime {
    pub(crate) fn new(config: &ChunkedCudaConfig, device: Option<CudaDevice>) -> Result<Self, Unavailable> {
        let device = device.map_or_else(|| CudaDevice::new(NAME, config.device), Ok)?;
        let unavailable = |what: String| Unavailable {
            backend: NAME.to_owned(),
            what,
            looked_for: vec![device.device().to_string()],
        };
        let silent = |error| unavailable(format!("the device does not answer: {error}"));
        let (major, minor) = device.compute_capability().map_err(silent)?;
        if major < 8 {
            return Err(unavailable(format!("compute capability {major}.{minor}, where 8.0 is needed")));
        }
        let launches_early = device.has_programmatic_launches().map_err(silent)?;
        let most = CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN;
        let shared_bytes = device.context().attribute(most).map_err(silent)?;
        let count = CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT;
        let multiprocessors =
            usize::try_from(device.context().attribute(count).map_err(silent)?).unwrap_or(0);
        Ok(Self {
            machine: Machine {
                multiprocessors: multiprocessors.saturating_sub(config.sm_margin).max(1),
                all_multiprocessors: multiprocessors.max(1),
                shared_bytes: usize::try_from(shared_bytes).unwrap_or(0),
                warpgroups: (major, minor) == (9, 0) && config.warpgroups,
                tf32_split: config.split_f32,
            },
            launches_early,
            device,
            kernels: KernelCache::new(config.kernel_folder.clone()).wheel_roots(config.wheel_roots.clone()),
            workspaces: Workspaces::new(config.lent_limit),
        })
    }
}
