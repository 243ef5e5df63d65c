//! cuDNN asked about problems on a machine that has no GPU.

use attention_core::{Device, Error, Problem, Unavailable, Unsupported};
use attention_cuda::failure;

use crate::descriptor::Descriptor;
use crate::execution_plan::{ExecutionPlan, Site};
use crate::key::Key;
use crate::library::{Cudnn, name_of};
use crate::{CudnnConfig, NAME, Target, pattern, support};

/// cuDNN, for a device that is described and need not be there: whether it takes the graphs of problems, and how much
/// memory it asks for.
///
/// Needs the library (9.8 or later of it can do this; this crate takes 9.12), cuBLASLt, NVRTC, and anything that the
/// loader takes for a CUDA driver: a library called `libcuda.so.1` without a function in it is enough.
#[derive(Debug)]
pub struct Offline {
    cudnn: Cudnn,
    config: CudnnConfig,
    device: Descriptor,
    target: Target,
}

/// What cuDNN says to a problem.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Answer {
    /// It has an engine, and compiled it.
    Accepted {
        /// Bytes that it asks for beside the caller's scratch.
        workspace: usize,
    },
    /// It has none.
    Refused,
}

impl Offline {
    /// Opens cuDNN for a device with these properties, which are JSON as cuDNN writes it, and this compute capability.
    ///
    /// # Errors
    /// [`Unavailable`] where a library is missing or too old, or does not take the properties.
    pub fn new(config: CudnnConfig, properties: &str, capability: (u32, u32)) -> Result<Self, Unavailable> {
        let cudnn = Cudnn::open(&config)?;
        let describe = || {
            let mut device = Descriptor::new(&cudnn, 38)?;
            device.text(2702, properties)?;
            device.finalize("describing a device")?;
            Ok(device)
        };
        let device = describe().map_err(|error: crate::library::CudnnError| Unavailable {
            backend: NAME.to_owned(),
            what: format!("no device can be described: {error}"),
            looked_for: vec![format!("cuDNN {}", name_of(cudnn.version))],
        })?;
        Ok(Self { target: Target::of(cudnn.version, capability), cudnn, config, device })
    }

    /// The version of the library, and the device.
    pub fn target(&self) -> Target {
        self.target
    }

    /// Whether the backend would give cuDNN this problem at all: as [`supports`](attention_core::AttentionBackend::supports)
    /// of a backend on this target, for a problem on any device.
    ///
    /// # Errors
    /// [`Unsupported`].
    pub fn serves(&self, problem: &Problem) -> Result<(), Unsupported> {
        let capabilities = support::capabilities(self.target, &self.config);
        support::check(&capabilities, self.target, &self.config, &on_device(problem))
    }

    /// Asks cuDNN about a problem that the backend serves on this target.
    ///
    /// # Errors
    /// [`Error::Unsupported`] where the backend refuses the problem itself, [`Error::Backend`] where cuDNN fails.
    pub fn ask(&self, problem: &Problem) -> Result<Answer, Error> {
        self.serves(problem)?;
        let key = Key::of(&on_device(problem), self.target, &self.config);
        let plan = pattern::of(&self.cudnn, &key)
            .and_then(|graph| ExecutionPlan::build(&self.cudnn, Site::Described(&self.device), graph))
            .map_err(|error| failure(NAME, "building a plan", error))?;
        Ok(plan.map_or(Answer::Refused, |plan| Answer::Accepted { workspace: plan.workspace }))
    }
}

/// A problem as if it were on a device.
fn on_device(problem: &Problem) -> Problem {
    let moved = problem.to_builder().device(Device::Cuda(0)).build();
    moved.unwrap_or_else(|error| unreachable!("a valid problem is valid on any device: {error}"))
}
