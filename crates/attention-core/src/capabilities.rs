//! What a backend can do, as data.

use crate::{DType, DeviceKind, NumericsClass, Pass, Problem, Unsupported};

macro_rules! features {
    ($($(#[$doc:meta])* $variant:ident => $name:literal,)*) => {
        /// An option of a call, or a property of its tensors, that a backend supports or not.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        #[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
        #[cfg_attr(feature = "serde", serde(rename_all = "snake_case"))]
        #[non_exhaustive]
        pub enum Feature {
            $($(#[$doc])* $variant,)*
        }

        impl Feature {
            /// Every feature, in the order in which tables list them.
            pub const ALL: &[Feature] = &[$(Feature::$variant,)*];

            /// The name used in messages and tables.
            pub const fn name(self) -> &'static str {
                match self { $(Feature::$variant => $name,)* }
            }
        }
    };
}

features! {
    /// `K < N`: grouped-query or multi-query attention.
    GroupedHeads => "grouped heads",
    /// `Hv != H`.
    ValueHeadDim => "value head dim != head dim",
    /// Causal masking.
    Causal => "causal",
    /// A query offset other than top-left, fixed.
    QueryOffset => "query offset",
    /// The bottom-right query offset.
    BottomRight => "bottom-right offset",
    /// A window's left bound.
    WindowLeft => "window left",
    /// A window's right bound.
    WindowRight => "window right",
    /// A boolean mask.
    Mask => "mask",
    /// An additive bias.
    Bias => "bias",
    /// Query lengths.
    QueryLengths => "query lengths",
    /// Key/value lengths.
    KeyValueLengths => "key/value lengths",
    /// Softcap.
    Softcap => "softcap",
    /// ALiBi slopes.
    Alibi => "ALiBi",
    /// Attention sinks.
    Sinks => "sinks",
    /// Dropout from the published stream.
    Dropout => "dropout",
    /// The logsumexp as an output.
    Lse => "lse output",
    /// An incoming gradient of the logsumexp.
    DLse => "d_lse",
    /// The gradient of the bias.
    DBias => "dbias",
    /// The gradient of the sinks.
    DSinks => "dsinks",
    /// Bitwise reproducible results on request.
    Deterministic => "deterministic",
    /// Tensors whose last axis has a stride other than 1.
    InnerStride => "inner stride != 1",
    /// Negative strides.
    NegativeStrides => "negative strides",
}

impl std::fmt::Display for Feature {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(self.name())
    }
}

/// A set of features.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(from = "Vec<Feature>", into = "Vec<Feature>"))]
pub struct FeatureSet(u32);

impl FeatureSet {
    /// No feature.
    pub const EMPTY: Self = Self(0);

    /// Every feature of this version.
    pub fn all() -> Self {
        Feature::ALL.iter().copied().collect()
    }

    /// This set with `feature`.
    pub const fn with(self, feature: Feature) -> Self {
        Self(self.0 | 1 << feature as u32)
    }

    /// This set without `feature`.
    pub const fn without(self, feature: Feature) -> Self {
        Self(self.0 & !(1 << feature as u32))
    }

    /// Whether `feature` is in the set.
    pub const fn contains(self, feature: Feature) -> bool {
        self.0 & (1 << feature as u32) != 0
    }

    /// Whether the set is empty.
    pub const fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// The features of this set that `other` lacks.
    pub const fn difference(self, other: Self) -> Self {
        Self(self.0 & !other.0)
    }

    /// The features, in table order.
    pub fn iter(self) -> impl Iterator<Item = Feature> {
        Feature::ALL.iter().copied().filter(move |&feature| self.contains(feature))
    }
}

impl FromIterator<Feature> for FeatureSet {
    fn from_iter<I: IntoIterator<Item = Feature>>(features: I) -> Self {
        features.into_iter().fold(Self::EMPTY, Self::with)
    }
}

impl From<Vec<Feature>> for FeatureSet {
    fn from(features: Vec<Feature>) -> Self {
        features.into_iter().collect()
    }
}

impl From<FeatureSet> for Vec<Feature> {
    fn from(set: FeatureSet) -> Self {
        set.iter().collect()
    }
}

impl std::fmt::Debug for FeatureSet {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_set().entries(self.iter()).finish()
    }
}

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

/// What is known of the outputs of long rows where a backend sums in a way that drifts: its numerics class is then for rows that are
/// shorter.
///
/// A sum that drifts loses something at every step, always in the same direction, so that its error grows with its length and does not
/// average out. Tensor cores do that: they cut a sum towards zero where other arithmetic rounds it (docs/numerics.md, "Long sums").
/// Sums over fewer keys than the first figure of a dtype are as the class says.
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

/// What a backend can do, as data: printed in docs and tables, read by the conformance suite, and the first thing
/// that [`supports`](crate::AttentionBackend::supports) looks at.
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

    /// Checks a problem against these capabilities: device, dtype, pass, features and head dimensions. A backend's
    /// `supports` starts with this and adds what data cannot say.
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
                    limit: format!("at most {max}"),
                });
            }
        }
        Ok(())
    }
}
