//! What the tensors of a case hold.

use serde::{Deserialize, Serialize};

use super::{Far, Grid};

/// The numbers in query, key and value.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Values {
    /// Normal random numbers, so that logits have a spread of about one.
    #[default]
    Normal,
    /// Normal random numbers with queries multiplied by this: logits with a spread of about this.
    Amplified(f64),
    /// Normal random numbers with keys multiplied by this and values by 1/16 of it: far from one, but with
    /// products that the dtypes can hold.
    Scaled(f64),
    /// Queries of zeros and values that are rows of the identity: with as many value dimensions as keys, the
    /// output *is* the row of probabilities, and shows which keys dropout kept.
    Identity,
    /// One query element of a real row is NaN: it reaches its row, and no other.
    NanInOneQuery,
    /// One element of a key in the middle is NaN: it reaches the rows that see it and what has a gradient
    /// through them, and nothing else.
    NanInOneKey,
    /// The same of a value.
    NanInOneValue,
    /// Whole numbers times powers of two in queries and keys, so that logits need no rounding.
    Whole(Grid),
}

/// The booleans of a mask.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MaskContent {
    /// True with probability 0.7.
    #[default]
    Random,
    /// True with probability 0.15: many rows are empty.
    Sparse,
    /// True throughout.
    AllTrue,
    /// False throughout: every row is empty.
    AllFalse,
    /// Random, with every third row of the mask (or every third key, where it has one row) false throughout.
    EmptyRows,
}

/// The numbers of a bias.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum BiasContent {
    /// Normal random numbers.
    #[default]
    Normal,
    /// Normal, with about a third of the entries -inf: an additive mask.
    NegativeInfinity,
    /// Normal, with every third row -inf throughout: rows with nothing to attend to.
    NegativeInfinityRows,
    /// Normal, with about a third of the entries -1e4: the additive mask of people who avoid infinities.
    LargeNegative,
    /// Some keys far below or above the others, each row with another magnitude, from the one of this index
    /// on. Where the bias has no dtype of its own, it has that of the logits.
    Far {
        /// Which keys.
        far: Far,
        /// The index of the first row's magnitude.
        start: usize,
    },
}

/// The numbers of sinks and slopes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Sizes {
    /// Normal random numbers, of slopes a quarter.
    #[default]
    Normal,
    /// Each head with another magnitude, from the one of this index on, in the dtype of the logits where they
    /// have none of their own.
    Far {
        /// The index of the first head's magnitude.
        start: usize,
    },
}

/// What the tensors of a case hold.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Content {
    /// The seed of every tensor.
    pub seed: u64,
    /// Query, key and value.
    pub values: Values,
    /// The mask, if there is one.
    pub mask: MaskContent,
    /// The bias, if there is one.
    pub bias: BiasContent,
    /// The sinks, if there are any.
    pub sinks: Sizes,
    /// The ALiBi slopes, if there are any.
    pub slopes: Sizes,
    /// Whether NaN and infinities lie wherever no result may depend on the memory: in masked and padded keys
    /// and values, in padded and empty query rows, and in biases, incoming gradients and saved results that
    /// belong to them.
    pub garbage: bool,
}

impl Content {
    /// Normal random numbers, with garbage where it must not matter.
    pub fn new(seed: u64) -> Self {
        Self {
            seed,
            values: Values::default(),
            mask: MaskContent::default(),
            bias: BiasContent::default(),
            sinks: Sizes::default(),
            slopes: Sizes::default(),
            garbage: true,
        }
    }
}
