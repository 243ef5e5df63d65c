//! The backend: what it serves, and where.

use std::sync::{Arc, OnceLock};

use attention_core::{
    AttentionBackend, Capabilities, Device, Error, Plan, Problem, Unavailable, Unsupported, Variants,
};
use attention_cuda::CudaDevice;

use crate::key::Key;
use crate::layout::Layout;
use crate::plan::CudnnPlan;
use crate::planned::{Planned, variants};
use crate::runtime::Runtime;
use crate::{CudnnConfig, NAME, Target, support};

/// Fused attention on NVIDIA GPUs by cuDNN, which is found at run time.
///
/// Work is put on the stream of the backend's device ([`CudnnBackend::on`]), and calls return before it is done. Tensors
/// and scratch must be ready on that stream, and stay until the work is done.
///
/// The first [plan](AttentionBackend::plan) of a kind has cuDNN build one, which takes up to a second; later
/// ones, also with other windows or lengths elsewhere, reuse it.
#[derive(Debug)]
pub struct CudnnBackend {
    config: CudnnConfig,
    given: Option<CudaDevice>,
    runtime: OnceLock<Result<Arc<Runtime>, Unavailable>>,
    /// What is assumed where there is no device.
    target: Target,
    capabilities: OnceLock<Capabilities>,
    variants: Variants,
}

impl Default for CudnnBackend {
    /// On the first device, with what the loader finds.
    fn default() -> Self {
        Self::new(CudnnConfig::default())
    }
}

impl CudnnBackend {
    /// With this configuration. Nothing is loaded before the backend is asked for something.
    pub fn new(config: CudnnConfig) -> Self {
        Self {
            config,
            given: None,
            runtime: OnceLock::new(),
            target: Target::default(),
            capabilities: OnceLock::new(),
            variants: Variants::new(variants()),
        }
    }

    /// On this device and its stream.
    pub fn on(device: CudaDevice, config: CudnnConfig) -> Self {
        Self { given: Some(device), ..Self::new(config) }
    }

    /// Answers [`supports`](AttentionBackend::supports) as for this target where there is no device. On a machine with
    /// one, what is there counts.
    #[must_use]
    pub fn assuming(self, target: Target) -> Self {
        Self { target, ..self }
    }

    /// What the answers are for: the machine's cuDNN and device, or what is assumed.
    pub fn target(&self) -> Target {
        self.runtime().map_or(self.target, |runtime| runtime.target)
    }

    fn runtime(&self) -> Result<&Arc<Runtime>, Unavailable> {
        let start = || Runtime::new(&self.config, self.given.clone()).map(Arc::new);
        self.runtime.get_or_init(start).as_ref().map_err(Clone::clone)
    }

    /// The device that calls must be on.
    fn device(&self) -> Device {
        let ordinal = u32::try_from(self.config.device).unwrap_or(u32::MAX);
        self.given.as_ref().map_or(Device::Cuda(ordinal), CudaDevice::device)
    }

    /// The scratch of a problem that is served; the refusal of one that is not.
    fn layout(&self, problem: &Problem) -> Result<Layout, Unsupported> {
        support::check(self.capabilities(), self.target(), &self.config, problem)?;
        if problem.device() != self.device() {
            return Err(Unsupported::Limit {
                backend: NAME.to_owned(),
                what: "memory of".to_owned(),
                value: problem.device().to_string(),
                why: format!("it works on {}", self.device()),
            });
        }
        Layout::of(problem, &Key::of(problem, self.target(), &self.config), &self.config).ok_or_else(|| {
            Unsupported::Limit {
                backend: NAME.to_owned(),
                what: "the sizes".to_owned(),
                value: problem.dims().to_string(),
                why: "scratch for them does not fit an address space".to_owned(),
            }
        })
    }
}

impl AttentionBackend for CudnnBackend {
    fn name(&self) -> &str {
        NAME
    }

    fn version(&self) -> &str {
        env!("CARGO_PKG_VERSION")
    }

    fn capabilities(&self) -> &Capabilities {
        self.capabilities.get_or_init(|| support::capabilities(self.target(), &self.config))
    }

    fn available(&self) -> Result<(), Unavailable> {
        self.runtime().map(|_| ())
    }

    fn variants(&self) -> Option<&Variants> {
        Some(&self.variants)
    }

    fn supports(&self, problem: &Problem) -> Result<(), Unsupported> {
        self.layout(problem).map(|_| ())
    }

    fn scratch_bytes(&self, problem: &Problem) -> Result<usize, Unsupported> {
        Ok(self.layout(problem)?.bytes)
    }

    fn plan(&self, problem: &Problem) -> Result<Arc<dyn Plan>, Error> {
        let layout = self.layout(problem)?;
        let runtime = self.runtime()?;
        runtime.device.check_plannable(NAME)?;
        let planned = Planned::new(problem, layout, runtime, &self.config, &self.variants)?;
        Ok(Arc::new(CudnnPlan(planned)))
    }
}
