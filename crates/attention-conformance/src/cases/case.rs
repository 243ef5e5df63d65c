//! What a case is.

use attention_core::{Dimensions, Pass};
use serde::{Deserialize, Serialize};

use super::{Content, Layouts, Options, Sequences};

/// Where a backward call takes the forward's output and logsumexp from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Saved {
    /// From the oracle, rounded to their dtypes: the backward pass is judged alone.
    #[default]
    Oracle,
    /// From the backend's own forward pass: both are judged together.
    Backend,
    /// From the oracle, for rows that have more keys than the call: the call's are a part of each row's, as
    /// where keys are spread over devices. What the others weigh is the case's sinks, which the backward call
    /// has none of.
    MoreKeys,
}

/// One case.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Case {
    /// A stable name, `family/what`: filters match parts of it.
    pub name: String,
    /// The sizes.
    pub dims: Dimensions,
    /// The options of the call.
    pub options: Options,
    /// How the tensors lie in memory.
    pub layouts: Layouts,
    /// What the tensors hold.
    pub content: Content,
    /// How sequences are packed or lie in pages; `None` where they are batch rows. Sizes and lengths are
    /// those of the padded call that means the same.
    #[serde(default)]
    pub sequences: Option<Sequences>,
    /// What a backward call starts from.
    pub saved: Saved,
    /// Whether the results are also compared, bit by bit, with those of calls that must give the same ones:
    /// padded, with other strides, with other numbers in memory that does not matter, and with NaN in what
    /// other rows read.
    pub variations: bool,
}

impl Case {
    /// A case of these sizes without options, on contiguous tensors of normal random numbers.
    pub fn new(name: impl Into<String>, dims: Dimensions) -> Self {
        let name = name.into();
        let seed = name.bytes().fold(7u64, |hash, byte| hash.wrapping_mul(31).wrapping_add(u64::from(byte)));
        Self {
            name,
            dims,
            options: Options::default(),
            layouts: Layouts::default(),
            content: Content::new(seed),
            sequences: None,
            saved: Saved::Oracle,
            variations: false,
        }
    }
}

impl Case {
    /// The passes that calls of this case have: keys in pages and those of 8 bits have no gradients.
    pub fn passes(&self) -> &'static [Pass] {
        let both =
            self.options.eight_bit.is_none() && self.sequences.as_ref().is_none_or(Sequences::have_gradients);
        if both { &[Pass::Forward, Pass::Backward] } else { &[Pass::Forward] }
    }
}

/// An option, or whatever else a case differs by.
pub(super) type Edit = fn(&mut Case);

/// Short for [`Dimensions`]: B, T, S, N, K, H with `Hv = H`.
pub(crate) fn dims(
    [batch, query_length, key_length, query_heads, key_heads, head_dim]: [usize; 6],
) -> Dimensions {
    Dimensions { batch, query_length, key_length, query_heads, key_heads, head_dim, value_head_dim: head_dim }
}
