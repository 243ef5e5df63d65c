//! Questions to cuDNN on a machine without a GPU: whether it supports the graphs of problems.

use attention_core::{Device, Error, Problem, Unavailable, Unsupported};
use attention_cuda::failure;

use crate::descriptor::Descriptor;
use crate::execution_plan::{ExecutionPlan, Site};
use crate::key::Key;
use crate::library::{Cudnn, name_of};
use crate::{CudnnConfig, NAME, Target, pattern, support};

/// cuDNN for a device that is described by its properties and that the machine need not have. It says whether
/// cuDNN supports the graph of a problem there, and how large a workspace the plan needs.
///
/// It needs cuDNN (9.8 or later can do this; this crate requires 9.12), cuBLASLt, NVRTC, and a library that
/// the loader accepts as the CUDA driver: an empty library called `libcuda.so.1` is enough.
#[derive(Debug)]
pub struct Offline {
    cudnn: Cudnn,
    config: CudnnConfig,
    device: Descriptor,
    target: Target,
}

/// The answer of cuDNN to a problem.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Answer {
    /// cuDNN has an engine for the graph, and compiled it.
    Accepted {
        /// The bytes of workspace that the plan needs in addition to the caller's scratch.
        workspace: usize,
    },
    /// cuDNN has no engine for the graph.
    Refused,
}

impl Offline {
    /// Loads cuDNN for a device of this compute capability with these properties, which are JSON in the form
    /// that cuDNN writes.
    ///
    /// # Errors
    /// [`Unavailable`] if a library is missing or too old, or if cuDNN does not accept the properties.
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

    /// The version of the library and the compute capability of the device.
    pub fn target(&self) -> Target {
        self.target
    }

    /// Whether the backend serves this problem on this target, as
    /// [`supports`](attention_core::AttentionBackend::supports) answers, whatever device the problem is on.
    ///
    /// # Errors
    /// [`Unsupported`] with the reason if it does not.
    pub fn serves(&self, problem: &Problem) -> Result<(), Unsupported> {
        let capabilities = support::capabilities(self.target, &self.config);
        support::check(&capabilities, self.target, &self.config, &on_device(problem))
    }

    /// Asks cuDNN about a problem that the backend serves on this target.
    ///
    /// # Errors
    /// [`Error::Unsupported`] if the backend itself refuses the problem, [`Error::Backend`] if cuDNN fails.
    pub fn ask(&self, problem: &Problem) -> Result<Answer, Error> {
        self.serves(problem)?;
        let key = Key::of(&on_device(problem), self.target, &self.config);
        let plan = pattern::of(&self.cudnn, &key)
            .and_then(|graph| ExecutionPlan::build(&self.cudnn, Site::Described(&self.device), graph))
            .map_err(|error| failure(NAME, "building a plan", error))?;
        Ok(plan.map_or(Answer::Refused, |plan| Answer::Accepted { workspace: plan.workspace }))
    }
}

/// The same problem on a CUDA device.
fn on_device(problem: &Problem) -> Problem {
    let moved = problem.to_builder().device(Device::Cuda(0)).build();
    moved.unwrap_or_else(|error| unreachable!("a valid problem is valid on any device: {error}"))
}
