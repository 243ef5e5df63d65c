//! The backend: capabilities, scratch, and the choice of the operand type.

use attention_core::{
    AttentionBackend, BackwardCall, Capabilities, DType, DeviceKind, Error, FeatureSet, ForwardCall,
    NumericsClass, Pass, PassCapabilities, Problem, Scratch, ScratchGrowth, Unavailable, Unsupported,
};
use half::{bf16, f16};

use crate::config::CpuConfig;
use crate::operand::Operand;
use crate::{backward, forward};

const NAME: &str = "cpu";

/// The plain CPU backend: every option, every dtype, forward and backward.
///
/// It materialises the logits of a block of query rows over all their keys, which makes it easy to check; matrix
/// products come from the `gemm` crate.
///
/// # Semantics
/// - Numerics classes: `F64` for f64, `F32` for f32, `HalfF32` for f16 and bf16 (operands are widened, so nothing is
///   rounded to a half before the results).
/// - Results are bitwise the same for any number of threads, any composition of the batch and any amount of padding.
/// - Scratch: packed keys and values and a block of logits a thread, see
///   [`scratch_bytes`](AttentionBackend::scratch_bytes).
///
/// # Examples
/// ```
/// use attention_core::{AttentionBackend, ForwardCall, ForwardOutputs, Inputs, ScratchBuffer, View, ViewMut};
/// use attention_cpu::CpuBackend;
///
/// let backend = CpuBackend::new();
/// let data = vec![0.5f32; 4 * 2 * 8];
/// let view = View::from_slice(&data, [1, 4, 2, 8])?;
/// let inputs = Inputs::new(view, view, view);
/// let problem = inputs.problem().causal(true).build()?;
///
/// let mut out = vec![0.0f32; 4 * 2 * 8];
/// let outputs = ForwardOutputs { out: ViewMut::from_slice(&mut out, [1, 4, 2, 8])?, lse: None };
/// let mut scratch = ScratchBuffer::new(backend.scratch_bytes(&problem)?);
/// backend.forward(ForwardCall::new(&problem, inputs, outputs)?, scratch.scratch())?;
/// assert!(out.iter().all(|&x| (x - 0.5).abs() < 1e-6));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug)]
pub struct CpuBackend {
    config: CpuConfig,
    capabilities: Capabilities,
}

impl Default for CpuBackend {
    fn default() -> Self {
        Self::new()
    }
}

impl CpuBackend {
    /// On all threads of the caller's rayon pool.
    pub fn new() -> Self {
        Self::with_config(CpuConfig::default())
    }

    /// With a configuration of its own.
    pub fn with_config(config: CpuConfig) -> Self {
        let pass = PassCapabilities::new(FeatureSet::all());
        let numerics = [
            (DType::F64, NumericsClass::F64),
            (DType::F32, NumericsClass::F32),
            (DType::F16, NumericsClass::HalfF32),
            (DType::Bf16, NumericsClass::HalfF32),
        ];
        let capabilities =
            Capabilities::new(DeviceKind::Cpu, numerics, pass.clone(), ScratchGrowth::RowBlock)
                .with_backward(pass);
        Self { config, capabilities }
    }

    /// Scratch a worker needs, and how many workers can be busy.
    fn scratch_of(&self, problem: &Problem) -> Option<(usize, usize)> {
        fn of<E: Operand>(problem: &Problem) -> Option<(usize, usize)> {
            Some(match problem.pass() {
                Pass::Forward => {
                    let sizes = forward::Sizes::of::<E>(problem)?;
                    (sizes.bytes_per_worker, sizes.tasks)
                }
                Pass::Backward => (backward::bytes_per_worker::<E>(problem)?, backward::task_count(problem)),
            })
        }
        match problem.dtype() {
            DType::F64 => of::<f64>(problem),
            DType::F32 => of::<f32>(problem),
            DType::F16 => of::<f16>(problem),
            _ => of::<bf16>(problem),
        }
    }

    /// Checks what is left to check of a call and gives its scratch as bytes.
    fn host_scratch<'a>(&self, problem: &Problem, scratch: Scratch<'a>) -> Result<&'a mut [u8], Error> {
        let needed = self.scratch_bytes(problem)?;
        scratch.check(problem.device(), needed)?;
        // Device and size were checked; a call without scratch may bring one from anywhere.
        Ok(scratch.into_host().unwrap_or_default())
    }
}

impl AttentionBackend for CpuBackend {
    fn name(&self) -> &str {
        NAME
    }

    fn version(&self) -> &str {
        env!("CARGO_PKG_VERSION")
    }

    fn capabilities(&self) -> &Capabilities {
        &self.capabilities
    }

    fn available(&self) -> Result<(), Unavailable> {
        Ok(())
    }

    fn supports(&self, problem: &Problem) -> Result<(), Unsupported> {
        self.scratch_bytes(problem).map(drop)
    }

    fn scratch_bytes(&self, problem: &Problem) -> Result<usize, Unsupported> {
        self.capabilities.check(NAME, problem)?;
        (self.scratch_of(problem))
            .and_then(|(bytes, tasks)| bytes.checked_mul(self.config.thread_count().min(tasks)))
            .ok_or_else(|| Unsupported::Limit {
                backend: NAME.to_owned(),
                what: "scratch".to_owned(),
                value: format!("{} keys a row", problem.dims().key_length),
                limit: "that fits an address space".to_owned(),
            })
    }

    fn forward(&self, call: ForwardCall<'_>, scratch: Scratch<'_>) -> Result<(), Error> {
        let problem = call.problem();
        let scratch = self.host_scratch(problem, scratch)?;
        self.config.install(|| match problem.dtype() {
            DType::F64 => forward::run::<f64>(call, &self.config, scratch),
            DType::F32 => forward::run::<f32>(call, &self.config, scratch),
            DType::F16 => forward::run::<f16>(call, &self.config, scratch),
            DType::Bf16 => forward::run::<bf16>(call, &self.config, scratch),
            dtype => unreachable!("{dtype} is not among the capabilities, which were checked"),
        });
        Ok(())
    }

    fn backward(&self, call: BackwardCall<'_>, scratch: Scratch<'_>) -> Result<(), Error> {
        let problem = call.problem();
        let scratch = self.host_scratch(problem, scratch)?;
        self.config.install(|| match problem.dtype() {
            DType::F64 => backward::run::<f64>(call, &self.config, scratch),
            DType::F32 => backward::run::<f32>(call, &self.config, scratch),
            DType::F16 => backward::run::<f16>(call, &self.config, scratch),
            DType::Bf16 => backward::run::<bf16>(call, &self.config, scratch),
            dtype => unreachable!("{dtype} is not among the capabilities, which were checked"),
        });
        Ok(())
    }
}
