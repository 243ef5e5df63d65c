//! Options of a call and properties of its tensors, by name, and sets of them.

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
    /// A query offset that each call gives.
    QueryOffset => "query offset",
    /// Query offsets that each call gives, one for each batch row.
    QueryOffsets => "query offsets by batch row",
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
    /// On request, results of a sequence whose bits do not depend on what else is in the call.
    BatchInvariant => "batch invariant",
    /// Tensors whose last axis has a stride other than 1.
    InnerStride => "inner stride != 1",
    /// Lengths, offsets, or a dropout's seed and offset in device memory.
    DeviceData => "numbers in device memory",
    /// Negative strides.
    NegativeStrides => "negative strides",
    /// Packed queries: sequences one behind the other, without padding.
    PackedQueries => "packed queries",
    /// Packed keys and values.
    PackedKeys => "packed keys and values",
    /// Keys and values in pages.
    PagedKeys => "paged keys and values",
    /// Keys and values of 8 bits beside a query of another dtype, with and without scales.
    EightBitKeys => "8-bit keys and values",
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

    /// Packed and paged sequences.
    pub const SEQUENCES: Self =
        Self::EMPTY.with(Feature::PackedQueries).with(Feature::PackedKeys).with(Feature::PagedKeys);

    /// Every feature of this version but [`Feature::EightBitKeys`] and [`Feature::BatchInvariant`]. A backend
    /// that serves those adds them by name: code that reads keys in the query's dtype would take bytes of
    /// 8-bit keys for something else, and code that was not written for it does not keep the promise of the
    /// other.
    pub fn all() -> Self {
        let every: Self = Feature::ALL.iter().copied().collect();
        every.without(Feature::EightBitKeys).without(Feature::BatchInvariant)
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
