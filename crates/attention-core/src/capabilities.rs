//! What a backend can do, as data.

use crate::{DType, DeviceKind, FeatureSet, NumericsClass, Pass, Problem, Unsupported};

/// What a backend can do in one pass.
#[derive(Clone, Debug, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(deny_unknown_fields))]
#[non_exhaustive]
pub struct PassCapabilities {
    /// The features it serves.
    pub features: FeatureSet,
    /// The largest head dimension of queries and keys, if there is a limit.
    pub max_head_dim: Option<usize>,
    /// The largest head dimension of values, if there is a limit.
    pub max_value_head_dim: Option<usize>,
}

impl PassCapabilities {
    /// These features, without limits.
    pub const fn new(features: FeatureSet) -> Self {
        Self { features, max_head_dim: None, max_value_head_dim: None }
    }

    /// With the largest head dimensions: of queries and keys, and of values.
    #[must_use]
    pub const fn with_max_head_dims(self, query: usize, value: usize) -> Self {
        Self { max_head_dim: Some(query), max_value_head_dim: Some(value), ..self }
    }
}

/// How a backend's scratch memory grows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(rename_all = "snake_case"))]
#[non_exhaustive]
pub enum ScratchGrowth {
    /// With the logits of a block of rows: rows of the block x `S`.
    RowBlock,
    /// With the whole matrix of logits: `T x S`.
    Logits,
    /// With the sequence length.
    Linear,
    /// Not at all.
    Constant,
}

impl std::fmt::Display for ScratchGrowth {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(match self {
            ScratchGrowth::RowBlock => "O(S) a thread",
            ScratchGrowth::Logits => "O(T*S)",
            ScratchGrowth::Linear => "O(T)",
            ScratchGrowth::Constant => "constant",
        })
    }
}

/// What is known of the outputs of long rows where a backend sums in a way that drifts: its numerics class is
/// then for rows that are shorter.
///
/// A sum that drifts loses something at every step, always in the same direction, so that its error grows
/// with its length and does not average out. Tensor cores do that: they cut a sum towards zero where other
/// arithmetic rounds it (docs/numerics.md, "Long sums"). Sums over fewer keys than the first figure of a
/// dtype are as the class says.
#[derive(Clone, Copy, Debug, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[non_exhaustive]
pub struct LongSums {
    /// The operands' dtype.
    pub dtype: DType,
    /// Keys that a row attends to.
    pub keys: usize,
    /// The mean relative error of its outputs, as measured: negative towards zero.
    pub mean_error: f64,
}

impl LongSums {
    /// What was measured of rows that attend to this many keys.
    pub const fn new(dtype: DType, keys: usize, mean_error: f64) -> Self {
        Self { dtype, keys, mean_error }
    }
}

/// What a backend can do, as data: printed in docs and tables, read by the conformance suite, and the first
/// thing that [`supports`](crate::AttentionBackend::supports) looks at.
#[derive(Clone, Debug, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(deny_unknown_fields))]
#[non_exhaustive]
pub struct Capabilities {
    /// The memory it works on.
    pub device: DeviceKind,
    /// The operand dtypes it takes, with the numerics class of each.
    pub numerics: Vec<(DType, NumericsClass)>,
    /// The forward pass.
    pub forward: PassCapabilities,
    /// The backward pass, if there is one.
    pub backward: Option<PassCapabilities>,
    /// How its scratch memory grows.
    pub scratch: ScratchGrowth,
    /// How far long sums drift, by dtype and from fewer keys to more; empty where none do.
    #[cfg_attr(feature = "serde", serde(default))]
    pub long_sums: Vec<LongSums>,
}

impl Capabilities {
    /// A backend on this memory, for these operands, with a forward pass only.
    pub fn new(
        device: DeviceKind,
        numerics: impl Into<Vec<(DType, NumericsClass)>>,
        forward: PassCapabilities,
        scratch: ScratchGrowth,
    ) -> Self {
        Self { device, numerics: numerics.into(), forward, backward: None, scratch, long_sums: Vec::new() }
    }

    /// With a backward pass.
    #[must_use]
    pub fn with_backward(self, backward: PassCapabilities) -> Self {
        Self { backward: Some(backward), ..self }
    }

    /// With what was measured of long sums.
    #[must_use]
    pub fn with_long_sums(self, long_sums: impl Into<Vec<LongSums>>) -> Self {
        Self { long_sums: long_sums.into(), ..self }
    }

    /// The numerics class for operands of `dtype`, or `None` where the backend does not take them.
    pub fn numerics_of(&self, dtype: DType) -> Option<NumericsClass> {
        self.numerics.iter().find(|(candidate, _)| *candidate == dtype).map(|&(_, class)| class)
    }

    /// What the backend can do in `pass`.
    pub fn pass(&self, pass: Pass) -> Option<&PassCapabilities> {
        match pass {
            Pass::Forward => Some(&self.forward),
            Pass::Backward => self.backward.as_ref(),
        }
    }

    /// Checks a problem against these capabilities: device, dtype, pass, features and head dimensions. A
    /// backend's `supports` starts with this and adds what data cannot say.
    ///
    /// # Errors
    /// The first limit that the problem meets.
    pub fn check(&self, backend: &str, problem: &Problem) -> Result<(), Unsupported> {
        let backend = || backend.to_owned();
        if problem.device().kind() != self.device {
            return Err(Unsupported::Device {
                backend: backend(),
                device: problem.device(),
                expected: self.device,
            });
        }
        if self.numerics_of(problem.dtype()).is_none() {
            return Err(Unsupported::DType {
                backend: backend(),
                dtype: problem.dtype(),
                supported: self.numerics.iter().map(|&(dtype, _)| dtype).collect(),
            });
        }
        let pass = problem.pass();
        let Some(capabilities) = self.pass(pass) else {
            return Err(Unsupported::Pass { backend: backend(), pass });
        };
        if let Some(feature) = problem.features().difference(capabilities.features).iter().next() {
            return Err(Unsupported::Feature { backend: backend(), feature, pass });
        }
        let dims = problem.dims();
        for (what, value, max) in [
            ("head dimension", dims.head_dim, capabilities.max_head_dim),
            ("value head dimension", dims.value_head_dim, capabilities.max_value_head_dim),
        ] {
            if let Some(max) = max.filter(|&max| value > max) {
                return Err(Unsupported::Limit {
                    backend: backend(),
                    what: what.to_owned(),
                    value: value.to_string(),
                    why: format!("it takes at most {max}"),
                });
            }
        }
        Ok(())
    }
}
