//! The backend and its plans: capabilities, scratch, and the choice of the operand type.

use std::sync::Arc;

use attention_core::{
    AttentionBackend, BackendFailure, BackwardCall, Capabilities, DType, DeviceKind, Error, F8E4M3, F8E5M2,
    Feature, FeatureSet, ForwardCall, NumericsClass, Pass, PassCapabilities, Plan, Problem, Role, Scratch,
    ScratchGrowth, Unavailable, Unsupported, Variants,
};
use half::{bf16, f16};

use crate::cache::{EightBits, SameDType};
use crate::config::CpuConfig;
use crate::gemm::where_products_run;
use crate::operand::Operand;
use crate::variants::Runs;
use crate::{backward, forward};

const NAME: &str = "cpu";

/// The plain CPU backend: every option, every dtype, forward and backward.
///
/// It materialises the logits of a block of query rows over all their keys, which makes it easy to check;
/// matrix products come from the `gemm` crate.
///
/// # Semantics
/// - Numerics classes: `F64` for f64, `F32` for f32, `HalfF32` for f16 and bf16 (operands are widened, so
///   nothing is rounded to a half before the results).
/// - Keys and values of 8 bits are widened as they are read, which is exact, and forward only. Their scales
///   cost no rounding of a key or value: those of keys go into the scale of the products, those of values
///   multiply rows of the output.
/// - Results are bitwise the same for any number of threads, any composition of the batch and any amount of
///   padding. A packed sequence, and one whose keys are in pages, has the bits that it has alone in a dense
///   call.
/// - [`variants`](AttentionBackend::variants): packed and unpacked keys in both passes, where rows take their
///   sums from, and how biases, masks and gradients of biases and sinks are read and written, by dtype.
/// - Scratch: packed keys and values and a block of logits a thread, see
///   [`scratch_bytes`](AttentionBackend::scratch_bytes).
///
/// # Examples
/// ```
/// use attention_core::{
///     AttentionBackend, ForwardCall, ForwardOutputs, Inputs, ScratchBuffer, View, ViewMut,
/// };
/// use attention_cpu::CpuBackend;
///
/// let backend = CpuBackend::new();
/// let data = vec![0.5f32; 4 * 2 * 8];
/// let view = View::from_slice(&data, [1, 4, 2, 8])?;
/// let inputs = Inputs::new(view, view, view);
/// // Planned once, and run as often as there are tensors of these shapes.
/// let plan = backend.plan(&inputs.problem().causal(true).build()?)?;
/// let mut scratch = ScratchBuffer::new(plan.scratch_bytes());
///
/// let mut out = vec![0.0f32; 4 * 2 * 8];
/// let outputs = ForwardOutputs { out: ViewMut::from_slice(&mut out, [1, 4, 2, 8])?, lse: None };
/// plan.forward(ForwardCall::new(plan.problem(), inputs, outputs)?, scratch.scratch())?;
/// assert!(out.iter().all(|&x| (x - 0.5).abs() < 1e-6));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug)]
pub struct CpuBackend {
    config: CpuConfig,
    capabilities: Capabilities,
    /// Clones count together.
    runs: Arc<Runs>,
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
        // Work is cut by the lengths of the sequence at hand and by nothing else (`cut`).
        let features = FeatureSet::all().with(Feature::BatchInvariant);
        let capabilities = Capabilities::new(
            DeviceKind::Cpu,
            NumericsClass::STANDARD,
            PassCapabilities::new(features.with(Feature::EightBitKeys)),
            ScratchGrowth::RowBlock,
        )
        .with_backward(PassCapabilities::new(features));
        Self { config, capabilities, runs: Arc::new(Runs::new()) }
    }

    /// What a call takes at most; `None` on overflow.
    fn sizes(&self, problem: &Problem) -> Option<Sizes> {
        fn of<E: Operand>(problem: &Problem, threads: usize) -> Option<Sizes> {
            Some(match problem.pass() {
                Pass::Forward => Sizes::Forward(forward::Sizes::of::<E>(problem, threads)?),
                Pass::Backward => Sizes::Backward(backward::Sizes::of::<E>(problem, threads)?),
            })
        }
        let threads = self.config.planned_threads();
        match problem.dtype() {
            DType::F64 => of::<f64>(problem, threads),
            DType::F32 => of::<f32>(problem, threads),
            DType::F16 => of::<f16>(problem, threads),
            _ => of::<bf16>(problem, threads),
        }
    }

    /// What a call takes at most, if this backend serves the problem.
    fn needs(&self, problem: &Problem) -> Result<(Sizes, usize), Unsupported> {
        self.capabilities.check(NAME, problem)?;
        let sizes = self.sizes(problem);
        let needs = sizes.and_then(|sizes| {
            let bytes = sizes.bytes_per_worker().checked_mul(sizes.workers())?;
            (bytes <= isize::MAX as usize).then_some((sizes, bytes))
        });
        needs.ok_or_else(|| Unsupported::Limit {
            backend: NAME.to_owned(),
            what: "the sizes".to_owned(),
            value: problem.dims().to_string(),
            why: "scratch for them does not fit an address space".to_owned(),
        })
    }
}

/// What a call of either pass takes at most.
#[derive(Debug)]
enum Sizes {
    Forward(forward::Sizes),
    Backward(backward::Sizes),
}

impl Sizes {
    fn bytes_per_worker(&self) -> usize {
        match self {
            Self::Forward(sizes) => sizes.bytes_per_worker,
            Self::Backward(sizes) => sizes.bytes_per_worker,
        }
    }

    fn workers(&self) -> usize {
        match self {
            Self::Forward(sizes) => sizes.workers,
            Self::Backward(sizes) => sizes.workers,
        }
    }
}

fn failure(operation: &str, source: std::io::Error) -> BackendFailure {
    BackendFailure { backend: NAME.to_owned(), operation: operation.to_owned(), source: source.into() }
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

    fn variants(&self) -> Option<&Variants> {
        Some(self.runs.variants())
    }

    fn scratch_bytes(&self, problem: &Problem) -> Result<usize, Unsupported> {
        self.needs(problem).map(|(_, bytes)| bytes)
    }

    fn plan(&self, problem: &Problem) -> Result<Arc<dyn Plan>, Error> {
        let (sizes, scratch_bytes) = self.needs(problem)?;
        Ok(Arc::new(CpuPlan {
            problem: problem.clone(),
            sizes,
            scratch_bytes,
            config: self.config.clone(),
            runs: self.runs.clone(),
        }))
    }
}

/// Runs a call by the dtype of its keys and values.
fn run_forward<E: Operand>(
    call: ForwardCall<'_>,
    sizes: &forward::Sizes,
    config: &CpuConfig,
    scratch: &mut [u8],
    runs: &Runs,
) {
    match call.problem().dtype_of(Role::Key) {
        Some(DType::F8E4M3) => forward::run::<E, EightBits<F8E4M3>>(call, sizes, config, scratch, runs),
        Some(DType::F8E5M2) => forward::run::<E, EightBits<F8E5M2>>(call, sizes, config, scratch, runs),
        _ => forward::run::<E, SameDType>(call, sizes, config, scratch, runs),
    }
}

/// A problem with what its calls take at most.
#[derive(Debug)]
struct CpuPlan {
    problem: Problem,
    sizes: Sizes,
    scratch_bytes: usize,
    config: CpuConfig,
    runs: Arc<Runs>,
}

impl CpuPlan {
    /// Checks what is left to check of a call; gives its scratch as bytes.
    fn begin<'a>(&self, problem: &Problem, scratch: Scratch<'a>) -> Result<&'a mut [u8], Error> {
        self.admit(problem, &scratch)?;
        // Device and size were checked; a call without scratch may bring one from anywhere.
        Ok(scratch.into_host().unwrap_or_default())
    }
}

impl Plan for CpuPlan {
    fn backend(&self) -> &str {
        NAME
    }

    fn problem(&self) -> &Problem {
        &self.problem
    }

    fn scratch_bytes(&self) -> usize {
        self.scratch_bytes
    }

    fn forward(&self, call: ForwardCall<'_>, scratch: Scratch<'_>) -> Result<(), Error> {
        let scratch = self.begin(call.problem(), scratch)?;
        let Sizes::Forward(sizes) = &self.sizes else {
            unreachable!("a forward call is of a forward problem")
        };
        let (config, runs) = (&self.config, &*self.runs);
        where_products_run(|| match self.problem.dtype() {
            DType::F64 => run_forward::<f64>(call, sizes, config, scratch, runs),
            DType::F32 => run_forward::<f32>(call, sizes, config, scratch, runs),
            DType::F16 => run_forward::<f16>(call, sizes, config, scratch, runs),
            DType::Bf16 => run_forward::<bf16>(call, sizes, config, scratch, runs),
            dtype => unreachable!("{dtype} is not among the capabilities, which were checked"),
        })
        .map_err(|source| failure("forward", source))?;
        Ok(())
    }

    fn backward(&self, call: BackwardCall<'_>, scratch: Scratch<'_>) -> Result<(), Error> {
        let scratch = self.begin(call.problem(), scratch)?;
        let Sizes::Backward(sizes) = &self.sizes else {
            unreachable!("a backward call is of a backward problem")
        };
        let (config, runs) = (&self.config, &*self.runs);
        where_products_run(|| match self.problem.dtype() {
            DType::F64 => backward::run::<f64>(call, sizes, config, scratch, runs),
            DType::F32 => backward::run::<f32>(call, sizes, config, scratch, runs),
            DType::F16 => backward::run::<f16>(call, sizes, config, scratch, runs),
            DType::Bf16 => backward::run::<bf16>(call, sizes, config, scratch, runs),
            dtype => unreachable!("{dtype} is not among the capabilities, which were checked"),
        })
        .map_err(|source| failure("backward", source))?;
        Ok(())
    }
}
