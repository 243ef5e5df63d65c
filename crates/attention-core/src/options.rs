//! The options of a call that are more than a number or a flag.

use std::sync::Arc;

/// Where query row `t` stands among the keys: `pos = t + offset`. Causal masking, windows and ALiBi all count from
/// `pos`, whether or not the call is causal.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(rename_all = "snake_case"))]
pub enum QueryOffset {
    /// The same offset for every batch row. 0 is [`QueryOffset::TOP_LEFT`]; a decoder that appends `T` queries to
    /// `c` cached keys uses `c`.
    Fixed(i64),
    /// The last query row is aligned with the last key: the offset is `kv_len[b] - q_len[b]` for each batch row,
    /// negative where there are more queries than keys (FlashAttention's alignment).
    BottomRight,
}

impl QueryOffset {
    /// Query row 0 is aligned with key 0 (the alignment of JAX and torch).
    pub const TOP_LEFT: Self = Self::Fixed(0);
}

impl Default for QueryOffset {
    fn default() -> Self {
        Self::TOP_LEFT
    }
}

impl std::fmt::Display for QueryOffset {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Fixed(0) => f.pad("top-left"),
            Self::Fixed(offset) => f.pad(&offset.to_string()),
            Self::BottomRight => f.pad("bottom-right"),
        }
    }
}

/// A sliding window: row `t` may attend to keys `pos - left ..= pos + right`, both ends included. `None` leaves a
/// side unbounded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(remote = "Self", deny_unknown_fields))]
pub struct Window {
    /// How many keys before `pos` take part.
    pub left: Option<usize>,
    /// How many keys after `pos` take part.
    pub right: Option<usize>,
}

#[cfg(feature = "serde")]
crate::fields_by_name!(Window { left, right });

impl Window {
    /// No bound on either side.
    pub const UNBOUNDED: Self = Self { left: None, right: None };

    /// A window with both bounds.
    pub const fn new(left: usize, right: usize) -> Self {
        Self { left: Some(left), right: Some(right) }
    }

    /// Whether neither side is bounded.
    pub const fn is_unbounded(&self) -> bool {
        self.left.is_none() && self.right.is_none()
    }
}

impl std::fmt::Display for Window {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let side = |side: Option<usize>| side.map_or_else(|| "unbounded".to_owned(), |size| size.to_string());
        write!(f, "({}, {})", side(self.left), side(self.right))
    }
}

/// How many of a dense tensor's positions are real in each batch row; the rest is suffix padding.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Default)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(rename_all = "snake_case"))]
#[non_exhaustive]
pub enum Lengths {
    /// Every position of every batch row.
    #[default]
    Full,
    /// One length for each batch row, each at most the tensor's length.
    PerBatch(Arc<[usize]>),
}

impl Lengths {
    /// The length of batch row `batch` where a full row has `full` positions.
    ///
    /// # Panics
    /// Where lengths were given and none of them is for this batch row.
    pub fn of(&self, batch: usize, full: usize) -> usize {
        match self {
            Self::Full => full,
            Self::PerBatch(lengths) => lengths[batch],
        }
    }

    /// Whether every position is real by construction.
    pub const fn is_full(&self) -> bool {
        matches!(self, Self::Full)
    }
}

impl<T: AsRef<[usize]>> From<T> for Lengths {
    fn from(lengths: T) -> Self {
        Self::PerBatch(lengths.as_ref().into())
    }
}

/// How the tensors of a call hold sequences. Packed sequences and paged keys and values will be further variants.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(rename_all = "snake_case", deny_unknown_fields))]
#[non_exhaustive]
pub enum Sequences {
    /// One sequence a batch row, padded at its end where lengths are given.
    Dense {
        /// Lengths of the queries, each at most `T`.
        query: Lengths,
        /// Lengths of the keys and values, each at most `S`.
        key_value: Lengths,
    },
}

impl Default for Sequences {
    fn default() -> Self {
        Self::Dense { query: Lengths::Full, key_value: Lengths::Full }
    }
}
