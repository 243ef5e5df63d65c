//! The backend: capabilities, scratch, and the choice of the engine.

use std::sync::Arc;

use attention_core::{
    AttentionBackend, BackwardCall, Capabilities, DType, DeviceKind, Error, FeatureSet, ForwardCall,
    NumericsClass, Pass, PassCapabilities, Problem, Scratch, ScratchGrowth, Unavailable, Unsupported,
    Variants,
};

use crate::config::ChunkedConfig;
use crate::engine::Engine;
#[cfg(target_arch = "x86_64")]
use crate::engine::amx::Tiles;
use crate::engine::vector::Fused;
use crate::paths::{Kind, Paths, Taken};
#[cfg(target_arch = "x86_64")]
use crate::simd::{Avx2, Avx512};
use crate::simd::{Scalar, Simd};
use crate::{Level, backward, forward, plan};

const NAME: &str = "chunked";

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
///   padding and any chunk sizes, on one [`Level`].
///
/// # Examples
/// ```
/// use attention_chunked::ChunkedBackend;
/// use attention_core::{AttentionBackend, ForwardCall, ForwardOutputs, Inputs, ScratchBuffer, View, ViewMut};
///
/// let backend = ChunkedBackend::new();
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
pub struct ChunkedBackend {
    config: ChunkedConfig,
    level: Result<Level, String>,
    capabilities: Capabilities,
    /// Shared by clones.
    paths: Arc<Paths>,
}

impl Default for ChunkedBackend {
    fn default() -> Self {
        Self::new()
    }
}

/// What is done with the engines of a dtype: the one for batch rows of any size, and one for small ones where
/// that is another.
trait WithEngines {
    type Output;

    fn run<E: Engine, Small: Engine>(self, engine: E, small: Option<Small>) -> Self::Output;
}

/// Runs `work` with the engines for a dtype at a level.
fn with_engines<W: WithEngines>(
    level: Option<Level>,
    config: &ChunkedConfig,
    dtype: DType,
    work: W,
) -> W::Output {
    let level = level.unwrap_or(Level::Scalar);
    fn fused<S: Simd<f32> + Simd<f64>, W: WithEngines>(simd: S, dtype: DType, work: W) -> W::Output {
        let (single, double) = (Fused::<f32, S>::new(simd), Fused::<f64, S>::new(simd));
        match dtype {
            DType::F64 => work.run(double, None::<Fused<f64, S>>),
            DType::F32 => work.run(single, Some(double)),
            // The type of `Small` says nothing without one: this way f32 and halves share their code.
            _ => work.run(single, None::<Fused<f64, S>>),
        }
    }
    #[cfg(target_arch = "x86_64")]
    {
        match dtype {
            DType::Bf16 if level >= Level::Amx => {
                if let Some(engine) = Tiles::<1>::detect() {
                    return work.run(engine, None::<Tiles<1>>);
                }
            }
            DType::F16 if level >= Level::Amx => {
                if let Some(engine) = Tiles::<2>::detect() {
                    return work.run(engine, None::<Tiles<2>>);
                }
            }
            DType::F32 if level >= Level::Amx && config.splits_f32() => {
                if let Some((engine, simd)) = Tiles::<3>::detect().zip(Avx512::<false>::detect()) {
                    return work.run(engine, Some(Fused::<f64, _>::new(simd)));
                }
            }
            _ => {}
        }
        if level >= Level::Avx512
            && let Some(simd) = Avx512::<false>::detect()
        {
            return fused(simd, dtype, work);
        }
        if level >= Level::Avx2
            && let Some(simd) = Avx2::detect()
        {
            return fused(simd, dtype, work);
        }
    }
    let _ = (level, config);
    fused(Scalar::new(), dtype, work)
}

/// What a dtype's engines are.
struct KindOf;

impl WithEngines for KindOf {
    type Output = Kind;

    fn run<E: Engine, Small: Engine>(self, _: E, small: Option<Small>) -> Kind {
        Kind { packs_gradients: E::PACKS_GRADIENTS, has_small: small.is_some() }
    }
}

impl ChunkedBackend {
    /// At the fastest level of the machine, on all threads of the caller's rayon pool.
    pub fn new() -> Self {
        Self::with_config(ChunkedConfig::default())
    }

    /// With a configuration of its own.
    pub fn with_config(config: ChunkedConfig) -> Self {
        let pass = PassCapabilities::new(FeatureSet::all());
        let numerics = [
            (DType::F64, NumericsClass::F64),
            (DType::F32, NumericsClass::F32),
            (DType::F16, NumericsClass::HalfF32),
            (DType::Bf16, NumericsClass::HalfF32),
        ];
        let capabilities =
            Capabilities::new(DeviceKind::Cpu, numerics, pass.clone(), ScratchGrowth::Constant)
                .with_backward(pass);
        let level = config.chosen_level();
        let paths = Paths::new(config.planned_threads(), |dtype| {
            with_engines(level.as_ref().ok().copied(), &config, dtype, KindOf)
        });
        Self { level, config, capabilities, paths: Arc::new(paths) }
    }

    /// The instruction set it uses; `None` where the machine lacks the one that was asked for.
    pub fn level(&self) -> Option<Level> {
        self.level.as_ref().ok().copied()
    }

    /// Runs `work` with the engines for a dtype.
    fn with_engines<W: WithEngines>(&self, dtype: DType, work: W) -> W::Output {
        with_engines(self.level(), &self.config, dtype, work)
    }

    /// Bytes of scratch of a call; `None` on overflow.
    fn needs(&self, problem: &Problem) -> Option<usize> {
        struct Needs<'p> {
            problem: &'p Problem,
            config: &'p ChunkedConfig,
        }

        impl WithEngines for Needs<'_> {
            type Output = Option<usize>;

            fn run<E: Engine, Small: Engine>(self, _: E, small: Option<Small>) -> Option<usize> {
                let Self { problem, config } = self;
                let bytes = match problem.pass() {
                    Pass::Forward => forward::needs::<E, Small>(problem, small.is_some(), config),
                    Pass::Backward => backward::needs::<E, Small>(problem, small.is_some(), config),
                };
                bytes.filter(|&bytes| bytes <= isize::MAX as usize)
            }
        }

        if !plan::sizes_fit(problem) {
            return None;
        }
        self.with_engines(problem.dtype(), Needs { problem, config: &self.config })
    }

    /// Checks what is left to check of a call and gives its scratch as bytes.
    fn host_scratch<'a>(&self, problem: &Problem, scratch: Scratch<'a>) -> Result<&'a mut [u8], Error> {
        let needed = self.scratch_bytes(problem)?;
        self.available()?;
        scratch.check(problem.device(), needed)?;
        // Device and size were checked; a call without scratch may bring one from anywhere.
        Ok(scratch.into_host().unwrap_or_default())
    }

    /// Runs a call of this problem.
    fn run(&self, problem: &Problem, call: Call<'_>, scratch: Scratch<'_>) -> Result<(), Error> {
        struct Run<'c, 'd> {
            call: Call<'c>,
            config: &'d ChunkedConfig,
            scratch: &'d mut [u8],
            taken: [&'d Taken; 2],
        }

        impl WithEngines for Run<'_, '_> {
            type Output = ();

            fn run<E: Engine, Small: Engine>(self, engine: E, small: Option<Small>) {
                let Self { call, config, scratch, taken } = self;
                match call {
                    Call::Forward(call) => forward::run(engine, small, call, config, scratch, taken),
                    Call::Backward(call) => backward::run(engine, small, call, config, scratch, taken),
                }
            }
        }

        let scratch = self.host_scratch(problem, scratch)?;
        let taken = [Taken::default(), Taken::default()];
        let run = Run { call, config: &self.config, scratch, taken: taken.each_ref() };
        self.with_engines(problem.dtype(), run);
        self.paths.count(problem.dtype(), taken);
        Ok(())
    }
}

/// A call of either pass.
#[allow(clippy::large_enum_variant, reason = "one is made a call, and no box is worth an allocation")]
enum Call<'c> {
    Forward(ForwardCall<'c>),
    Backward(BackwardCall<'c>),
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
        self.capabilities.check(NAME, problem)?;
        self.needs(problem).ok_or_else(|| Unsupported::Limit {
            backend: NAME.to_owned(),
            what: "scratch".to_owned(),
            value: problem.dims().to_string(),
            limit: "that fits an address space".to_owned(),
        })
    }

    fn forward(&self, call: ForwardCall<'_>, scratch: Scratch<'_>) -> Result<(), Error> {
        self.run(call.problem(), Call::Forward(call), scratch)
    }

    fn backward(&self, call: BackwardCall<'_>, scratch: Scratch<'_>) -> Result<(), Error> {
        self.run(call.problem(), Call::Backward(call), scratch)
    }
}
