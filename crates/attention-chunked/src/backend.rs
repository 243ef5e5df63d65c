//! The backend: capabilities, and what problems take.

use std::sync::Arc;

use attention_core::{
    AttentionBackend, Capabilities, DeviceKind, Error, Feature, FeatureSet, NumericsClass, PassCapabilities,
    Plan, Problem, ScratchGrowth, Unavailable, Unsupported, Variants,
};

use crate::config::ChunkedConfig;
use crate::engines::{KindOf, with_engines};
use crate::paths::Paths;
use crate::plan::{ChunkedPlan, Needs};
use crate::{Level, NAME};

/// The memory-efficient CPU backend: every option, every dtype, forward and backward, in memory that does not
/// grow with the sequences.
///
/// The algorithm is that of Rabe and Staats (arXiv 2112.05682): an outer loop over chunks of queries, an
/// inner one over chunks of keys and values, carrying a shift near the maximum, the sum and the value of each
/// row; backward recomputes the logits of a chunk from the logsumexp.
///
/// # Semantics
/// - Numerics classes: `F64` for f64, `F32` for f32, `HalfF32` for f16 and bf16.
/// - Results are bitwise the same for any number of threads, any composition of the batch, any amount of
///   padding and any chunk sizes, on one [`Level`]. Dropout bits alone depend on a sequence's place in the
///   batch.
/// - Keys and values of 8 bits are widened as they are read, which is exact, and forward only. Their scales
///   multiply queries and logits, and rows of the output once they are normalised.
/// - Packed sequences are served in both passes, keys and values in pages in the forward pass. A sequence has
///   the bits that it has alone in a dense call.
///
/// # Examples
/// ```
/// use attention_chunked::ChunkedBackend;
/// use attention_core::{
///     AttentionBackend, ForwardCall, ForwardOutputs, Inputs, ScratchBuffer, View, ViewMut,
/// };
///
/// let backend = ChunkedBackend::new();
/// let data = vec![0.5f32; 4 * 2 * 8];
/// let view = View::from_slice(&data, [1, 4, 2, 8])?;
/// let inputs = Inputs::new(view, view, view);
/// // Planned once, and run as often as there are tensors of these shapes, with any numbers.
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
pub struct ChunkedBackend {
    config: ChunkedConfig,
    level: Result<Level, String>,
    capabilities: Capabilities,
    /// Shared by clones and plans.
    paths: Arc<Paths>,
}

impl Default for ChunkedBackend {
    fn default() -> Self {
        Self::new()
    }
}

impl ChunkedBackend {
    /// At the fastest level of the machine, on all threads of the caller's rayon pool.
    pub fn new() -> Self {
        Self::with_config(ChunkedConfig::default())
    }

    /// With a configuration of its own.
    pub fn with_config(config: ChunkedConfig) -> Self {
        // On the host no number is in device memory. Blocks of keys begin at fixed keys of a sequence, and
        // how else work is cut changes no bit (`cut`).
        let features = FeatureSet::all().without(Feature::DeviceData).with(Feature::BatchInvariant);
        let forward = features.with(Feature::EightBitKeys);
        let capabilities = Capabilities::new(
            DeviceKind::Cpu,
            NumericsClass::STANDARD,
            PassCapabilities::new(forward),
            ScratchGrowth::Constant,
        )
        .with_backward(PassCapabilities::new(features.without(Feature::PagedKeys)));
        let level = config.chosen_level();
        let of_paths = level.as_ref().map_or(Level::Scalar, |&level| level);
        let paths =
            Paths::new(config.planned_threads(), |dtype| with_engines(of_paths, &config, dtype, KindOf));
        Self { level, config, capabilities, paths: Arc::new(paths) }
    }

    /// The instruction set it uses; `None` where the machine lacks the one that was asked for.
    pub fn level(&self) -> Option<Level> {
        self.level.as_ref().ok().copied()
    }

    /// What calls of a problem take, if this backend serves it.
    fn needs(&self, problem: &Problem) -> Result<(Needs, usize), Unsupported> {
        self.capabilities.check(NAME, problem)?;
        // At a level that the machine lacks, questions are answered as at the least one.
        let level = self.level().unwrap_or(Level::Scalar);
        Needs::of(problem, &self.config, level).ok_or_else(|| Unsupported::Limit {
            backend: NAME.to_owned(),
            what: "the sizes".to_owned(),
            value: problem.dims().to_string(),
            why: "scratch for them does not fit an address space".to_owned(),
        })
    }
}

impl AttentionBackend for ChunkedBackend {
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
        match &self.level {
            Ok(_) => Ok(()),
            Err(reason) => Err(Unavailable {
                backend: NAME.to_owned(),
                what: reason.clone(),
                looked_for: Level::available().map(|level| format!("level {level}: there")).collect(),
            }),
        }
    }

    fn supports(&self, problem: &Problem) -> Result<(), Unsupported> {
        self.scratch_bytes(problem).map(drop)
    }

    fn variants(&self) -> Option<&Variants> {
        Some(self.paths.variants())
    }

    fn scratch_bytes(&self, problem: &Problem) -> Result<usize, Unsupported> {
        Ok(self.needs(problem)?.1)
    }

    fn plan(&self, problem: &Problem) -> Result<Arc<dyn Plan>, Error> {
        let (needs, scratch_bytes) = self.needs(problem)?;
        self.available()?;
        Ok(Arc::new(ChunkedPlan {
            problem: problem.clone(),
            needs,
            scratch_bytes,
            level: self.level().unwrap_or(Level::Scalar),
            config: self.config.clone(),
            paths: self.paths.clone(),
        }))
    }
}
