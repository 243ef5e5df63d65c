//! The engines for a dtype at a level.

use attention_core::DType;

use crate::Level;
use crate::config::ChunkedConfig;
use crate::engine::Engine;
#[cfg(target_arch = "x86_64")]
use crate::engine::amx::Tiles;
use crate::engine::vector::Fused;
use crate::paths::Kind;
#[cfg(target_arch = "x86_64")]
use crate::simd::{Avx2, Avx512};
use crate::simd::{Scalar, Simd};

/// What is done with the engines of a dtype: the one for batch rows of any size, and one for small ones where
/// that is another.
pub(crate) trait WithEngines {
    type Output;

    fn run<E: Engine, Small: Engine>(self, engine: E, small: Option<Small>) -> Self::Output;
}

/// Runs `work` with the engines for a dtype at a level.
pub(crate) fn with_engines<W: WithEngines>(
    level: Level,
    config: &ChunkedConfig,
    dtype: DType,
    work: W,
) -> W::Output {
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
pub(crate) struct KindOf;

impl WithEngines for KindOf {
    type Output = Kind;

    fn run<E: Engine, Small: Engine>(self, _: E, small: Option<Small>) -> Kind {
        Kind { packs_gradients: E::PACKS_GRADIENTS, has_small: small.is_some() }
    }
}
