//! Conversions of what other libraries call differently: slopes, windows, lengths and additive masks.
//!
//! Every function is named after the convention that it reads, and refuses what that convention cannot mean.
//! The logsumexp of a part without keys is converted by [`merge::EmptyLse`](crate::merge::EmptyLse).

mod alibi;
mod lengths;
mod masks;

pub use alibi::{alibi_slopes, candle_alibi_slopes};
pub use lengths::{lengths_of_last_positions, window_of_sides, window_of_width};
pub use masks::{bool_where_above, bool_where_above_half_minimum};

/// What a conversion refuses: a number that the convention gives no meaning.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum ConventionError {
    /// An entry of an additive mask that neither keeps its key as it is nor masks it.
    #[error(
        "entry {index} of the additive mask is {value}, neither 0 nor at most {threshold}: pass such a mask as a bias"
    )]
    NotAMask {
        /// Which entry.
        index: usize,
        /// Its value.
        value: f64,
        /// Entries at most this large mask their key.
        threshold: f64,
    },
    /// A threshold that the entry 0, which keeps a key, would not lie above.
    #[error("the threshold of an additive mask is {threshold}, expected a number below 0")]
    Threshold {
        /// The threshold given.
        threshold: f64,
    },
    /// The position of a last key below -1, which stands for no key.
    #[error("the last key of batch row {batch} is {position}, expected -1 (no key) or more")]
    LastPosition {
        /// The batch row.
        batch: usize,
        /// The position given.
        position: i64,
    },
    /// The size of a window's side below -1, which stands for no bound.
    #[error("the {side} side of the window is {size}, expected -1 (no bound) or more")]
    WindowSide {
        /// `left` or `right`.
        side: &'static str,
        /// The size given.
        size: i64,
    },
    /// The width of a window that has no position of its own.
    #[error("the window is {width} keys wide, expected -1 (no bound) or at least 1, the row's own position")]
    WindowWidth {
        /// The width given.
        width: i64,
    },
}

#[cfg(test)]
mod tests;
