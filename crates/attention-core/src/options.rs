//! The options of a call that are more than a number or a flag.

use std::sync::Arc;

use crate::View;

/// Where query row `t` stands among the keys: `pos = t + offset`. Causal masking, windows and ALiBi all count
/// from `pos`, whether or not the call is causal.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(rename_all = "snake_case"))]
pub enum QueryOffset {
    /// The same offset for every batch row. 0 is [`QueryOffset::TOP_LEFT`]; a decoder that appends `T`
    /// queries to `c` cached keys uses `c`.
    Fixed(i64),
    /// The last query row is aligned with the last key: the offset is `kv_len[b] - q_len[b]` for each batch
    /// row, negative where there are more queries than keys (FlashAttention's alignment).
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

/// A number is [`QueryOffset::Fixed`].
macro_rules! fixed {
    ($($integer:ty),*) => {$(
        impl From<$integer> for QueryOffset {
            fn from(offset: $integer) -> Self {
                // No cache has more keys than an i64 counts.
                Self::Fixed(i64::try_from(offset).unwrap_or(i64::MAX))
            }
        }
    )*};
}
fixed!(i32, i64, usize);

/// How far from key 0 the offsets of a problem's calls may be, either way.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(rename_all = "snake_case"))]
pub enum OffsetRange {
    /// Up to [`OffsetRange::NEAR`]: where distances between rows and keys are exact in f32, which kernels may
    /// count on.
    #[default]
    Near,
    /// Any number of 64 bits.
    Any,
}

impl OffsetRange {
    /// The largest offset of [`OffsetRange::Near`], either way: 2^22.
    pub const NEAR: i64 = 1 << 22;

    /// The smaller range that holds an offset.
    pub const fn of(offset: i64) -> Self {
        if offset.unsigned_abs() <= Self::NEAR.unsigned_abs() { Self::Near } else { Self::Any }
    }

    /// The largest offset, either way; `None` for no limit.
    pub const fn most(self) -> Option<i64> {
        match self {
            Self::Near => Some(Self::NEAR),
            Self::Any => None,
        }
    }
}

/// What a problem says of where query rows stand among the keys; the numbers are the call's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(rename_all = "snake_case"))]
pub enum Alignment {
    /// Query row 0 is at key 0: the offset is 0.
    #[default]
    TopLeft,
    /// Each call gives one offset.
    Offset(OffsetRange),
    /// Each call gives an offset for every batch row, as a tensor ([`Role::QueryOffsets`](crate::Role)).
    Offsets(OffsetRange),
    /// The last query row is at the last key: see [`QueryOffset::BottomRight`].
    BottomRight,
}

impl std::fmt::Display for Alignment {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::TopLeft => f.pad("top-left"),
            Self::Offset(OffsetRange::Near) => write!(f, "an offset of at most {}", OffsetRange::NEAR),
            Self::Offset(OffsetRange::Any) => f.pad("an offset"),
            Self::Offsets(OffsetRange::Near) => write!(f, "offsets of at most {}", OffsetRange::NEAR),
            Self::Offsets(OffsetRange::Any) => f.pad("offsets"),
            Self::BottomRight => f.pad("bottom-right"),
        }
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

/// A sliding window: row `t` may attend to keys `pos - left ..= pos + right`, both ends included. `None`
/// leaves a side unbounded.
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

/// How many of a dense tensor's positions are real in each batch row, in memory of their own; the rest is
/// suffix padding. A call is given them as a tensor, see [`view`](Self::view).
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

    /// The lengths as a tensor of a call, `[B]`; `None` where every row is full.
    pub fn view(&self) -> Option<View<'_>> {
        match self {
            Self::Full => None,
            // A slice has as many elements as its length says.
            Self::PerBatch(lengths) => View::from_slice(lengths, [lengths.len()]).ok(),
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
