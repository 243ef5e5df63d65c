//! The backend: what it serves, and where.

use std::sync::{Arc, OnceLock};

use attention_core::{
    AttentionBackend, Capabilities, DType, Device, DeviceKind, Error, Feature, FeatureSet, LongSums,
    NumericsClass, PassCapabilities, Plan, Problem, Role, ScratchGrowth, Unavailable, Unsupported, Variants,
};
use attention_cuda::CudaDevice;

use super::NAME;
use super::config::ChunkedCudaConfig;
use super::launches::Launches;
use super::limits::limit;
use super::plan::ChunkedCudaPlan;
use super::runtime::Runtime;
use super::tiles::{MOST_DEPTH, MOST_HEAD, MOST_VALUE, Machine};
use super::variants::variants;

/// Measured on an H200 with values of one sign, 256 rows: f32 in tf32 parts, then halves with the keys cut in
/// 132 parts, each a sum of its own. Without parts halves drift as cuDNN does.
const LONG_SUMS: &[LongSums] = &[
    LongSums::new(DType::F32, 4096, -2.5e-6),
    LongSums::new(DType::F32, 65_536, -1.1e-5),
    LongSums::new(DType::F32, 1 << 20, -1.7e-4),
    LongSums::new(DType::F16, 1 << 20, -7e-5),
];

/// How many of them are f32's.
const SUMS_OF_F32: usize = 3;

/// The memory-efficient backend for NVIDIA GPUs from compute capability 8.0: every option, every dtype,
/// forward and backward, in kernels of this library's own. They are compiled at the first call of a kind,
/// which takes some seconds, by NVRTC, which is found at run time.
///
/// Work is put on the stream of the backend's device ([`ChunkedCudaBackend::on`]), and calls return before it
/// is done. Tensors and scratch must be ready on that stream, and stay until the work is done.
///
/// # Semantics
/// - Numerics classes: `F64` for f64, `F32` for f32, `HalfF32` for f16 and bf16, whose products run on tensor
///   cores.
/// - Keys and values of 8 bits are widened to the query's dtype as they are loaded, which is exact, and
///   forward only. Their scales round no key and no value: the key's multiplies products, the value's
///   multiplies rows of the output.
/// - Every call gives the same bits each time: no sum depends on the order in which blocks run.
/// - A batch-invariant call ([`Problem::batch_invariant`]), whose keys are not of 8 bits, gives each sequence
///   the bits that it has alone: one choice of tiles serves all lengths, and sums are cut at multiples of
///   2048 keys. Where few rows have more keys than that, each part has blocks of its own. Else one block goes
///   over all of them, and needs scratch of one partial output per row.
#[derive(Debug)]
pub struct ChunkedCudaBackend {
    config: ChunkedCudaConfig,
    given: Option<CudaDevice>,
    runtime: OnceLock<Result<Arc<Runtime>, Unavailable>>,
    capabilities: Capabilities,
    /// Listed when the device is known.
    variants: Variants,
}

impl Default for ChunkedCudaBackend {
    /// On the first device.
    fn default() -> Self {
        Self::new(ChunkedCudaConfig::default())
    }
}

impl ChunkedCudaBackend {
    /// With this configuration. Nothing is loaded before the backend is asked for something.
    pub fn new(config: ChunkedCudaConfig) -> Self {
        let pass = |features: FeatureSet, head, value| {
            PassCapabilities::new(features).with_max_head_dims(head, value)
        };
        let features = FeatureSet::all().with(Feature::BatchInvariant);
        let forward = pass(features.with(Feature::EightBitKeys), MOST_HEAD, MOST_VALUE);
        // Keys in pages have no gradients, of any backend, and neither have those of 8 bits.
        let with_gradients = features.without(Feature::PagedKeys);
        let capabilities =
            Capabilities::new(DeviceKind::Cuda, NumericsClass::STANDARD, forward, ScratchGrowth::Linear)
                .with_backward(pass(with_gradients, MOST_DEPTH, MOST_DEPTH))
                .with_long_sums(if config.split_f32 { LONG_SUMS } else { &LONG_SUMS[SUMS_OF_F32..] });
        Self { config, given: None, runtime: OnceLock::new(), capabilities, variants: Variants::default() }
    }

    /// On this device and its stream.
    pub fn on(device: CudaDevice, config: ChunkedCudaConfig) -> Self {
        Self { given: Some(device), ..Self::new(config) }
    }

    fn runtime(&self) -> Result<&Arc<Runtime>, Unavailable> {
        let start = || {
            let runtime = Runtime::new(&self.config, self.given.clone())?;
            self.variants.list(variants(runtime.machine));
            Ok(Arc::new(runtime))
        };
        self.runtime.get_or_init(start).as_ref().map_err(Clone::clone)
    }

    /// The device that calls must be on.
    fn device(&self) -> Device {
        let ordinal = u32::try_from(self.config.device).unwrap_or(u32::MAX);
        self.given.as_ref().map_or(Device::Cuda(ordinal), CudaDevice::device)
    }

    /// Checks a problem; gives what it takes on such a device.
    fn launches(&self, problem: &Problem, machine: Machine) -> Result<Launches, Unsupported> {
        self.capabilities.check(NAME, problem)?;
        if problem.device() != self.device() {
            return Err(limit("memory of", problem.device(), format!("it works on {}", self.device())));
        }
        // The kernels that widen bytes go over the keys of several splits without a cut between them.
        if let Some(dtype) =
            problem.dtype_of(Role::Key).filter(|dtype| dtype.is_eight_bit() && problem.batch_invariant())
        {
            let why = "it keeps the promise for keys of the query's dtype";
            return Err(limit("batch invariance with keys of", dtype, why));
        }
        Launches::of(problem, machine)
    }
}

impl AttentionBackend for ChunkedCudaBackend {
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
        self.runtime().map(|_| ())
    }

    fn compute_capability(&self) -> Option<(u32, u32)> {
        self.runtime().ok().and_then(|runtime| runtime.device.compute_capability().ok())
    }

    /// Those of the device at hand; none where there is no device.
    fn variants(&self) -> Option<&Variants> {
        let _ = self.runtime();
        Some(&self.variants)
    }

    fn supports(&self, problem: &Problem) -> Result<(), Unsupported> {
        self.launches(problem, Machine::ANY).map(|_| ())
    }

    fn scratch_bytes(&self, problem: &Problem) -> Result<usize, Unsupported> {
        Ok(self.launches(problem, Machine::ANY)?.scratch_bytes())
    }

    /// Compiles the kernels of the problem, or takes those that another plan uses.
    fn plan(&self, problem: &Problem) -> Result<Arc<dyn Plan>, Error> {
        // What is not supported anywhere is refused without a device.
        self.launches(problem, Machine::ANY)?;
        let runtime = self.runtime()?;
        runtime.device.check_plannable(NAME)?;
        let launches = self.launches(problem, runtime.machine)?;
        Ok(Arc::new(ChunkedCudaPlan::new(problem, runtime, launches, &self.variants)?))
    }
}
