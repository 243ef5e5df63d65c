//! The backend: which problems it serves and on which device, and the plans that it makes.

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

/// Fused attention on NVIDIA GPUs by cuDNN, which is loaded at run time.
///
/// A call enqueues its work on the stream of the backend's device ([`CudnnBackend::on`]) and returns before
/// the work is done. Tensors and scratch must be ready on that stream, and must live until the work is done.
///
/// For the first [plan](AttentionBackend::plan) of a kind, cuDNN builds an execution plan, which takes up to
/// a second. Later plans reuse it, also if they differ in the bounds of their windows or in where their
/// lengths are stored.
#[derive(Debug)]
pub struct CudnnBackend {
    config: CudnnConfig,
    given: Option<CudaDevice>,
    runtime: OnceLock<Result<Arc<Runtime>, Unavailable>>,
    /// The target that answers are for if there is no device.
    target: Target,
    capabilities: OnceLock<Capabilities>,
    variants: Variants,
}

impl Default for CudnnBackend {
    /// A backend on the first device, with the libraries that the loader finds.
    fn default() -> Self {
        Self::new(CudnnConfig::default())
    }
}

impl CudnnBackend {
    /// A backend with this configuration. Libraries are loaded when the backend is first asked something.
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

    /// A backend on this device and its stream.
    pub fn on(device: CudaDevice, config: CudnnConfig) -> Self {
        Self { given: Some(device), ..Self::new(config) }
    }

    /// Answers [`supports`](AttentionBackend::supports) for this target if there is no device. On a machine
    /// that has cuDNN and a device, the answers are for those.
    #[must_use]
    pub fn assuming(self, target: Target) -> Self {
        Self { target, ..self }
    }

    /// The target that answers are for: the machine's cuDNN and device or, without them, the assumed target.
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

    /// The layout of a problem's scratch, or why the backend refuses the problem.
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

    fn compute_capability(&self) -> Option<(u32, u32)> {
        Some(self.target().capability)
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
