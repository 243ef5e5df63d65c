//! The options of a call that are no tensors.

use std::sync::Arc;

use attention_core::{CallData, Dropout, Lengths, ProblemBuilder, QueryOffset, View, Window};

/// The options of a call that are no tensors, as data: what [`Attention`](crate::Attention)'s methods set.
///
/// With feature `serde`, options left out of a stored value have their defaults.
#[derive(Clone, Debug, PartialEq, Default)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(remote = "Self", default, deny_unknown_fields))]
pub struct Options {
    /// What the products of query and key are multiplied by; `None` for `1 / sqrt(H)`.
    pub scale: Option<f64>,
    /// Masks keys after `pos`.
    pub causal: bool,
    /// Where query rows stand among the keys.
    pub query_offset: QueryOffset,
    /// An offset for each batch row, in the place of `query_offset`.
    pub query_offsets: Option<Arc<[i64]>>,
    /// The sliding window.
    pub window: Window,
    /// Caps logits at `c` by `c * tanh(x / c)`, before the bias.
    pub softcap: Option<f64>,
    /// How many query rows of each batch row are real.
    pub query_lengths: Lengths,
    /// How many keys of each batch row are real.
    pub key_value_lengths: Lengths,
    /// Of packed queries, the row at which each sequence starts, and the one behind the last sequence.
    pub query_starts: Option<Arc<[i64]>>,
    /// The same of packed keys and values.
    pub key_value_starts: Option<Arc<[i64]>>,
    /// The most query rows of a packed sequence.
    pub longest_query: Option<usize>,
    /// The most keys of a packed or paged sequence.
    pub longest_key: Option<usize>,
    /// Dropout of the probabilities.
    pub dropout: Option<Dropout>,
    /// Asks for bitwise reproducible results.
    pub deterministic: bool,
    /// Asks for results of each sequence whose bits do not depend on what else is in the call.
    pub batch_invariant: bool,
}

#[cfg(feature = "serde")]
attention_core::fields_by_name!(Options {
    scale,
    causal,
    query_offset,
    query_offsets,
    window,
    softcap,
    query_lengths,
    key_value_lengths,
    query_starts,
    key_value_starts,
    longest_query,
    longest_key,
    dropout,
    deterministic,
    batch_invariant,
});

impl Options {
    /// The numbers that a call has by these options: what [`Inputs::data`](crate::core::Inputs::data) of a
    /// planned call takes.
    pub fn data(&self) -> CallData<'_> {
        fn list(list: Option<&[i64]>) -> Option<View<'_>> {
            // A slice has as many elements as its length says.
            list.and_then(|list| View::from_slice(list, [list.len()]).ok())
        }
        CallData {
            scale: self.scale,
            softcap: self.softcap,
            query_offset: self.query_offset,
            query_offsets: list(self.query_offsets.as_deref()),
            query_lengths: self.query_lengths.view(),
            key_value_lengths: self.key_value_lengths.view(),
            dropout: self.dropout,
            query_starts: list(self.query_starts.as_deref()),
            key_value_starts: list(self.key_value_starts.as_deref()),
            ..CallData::default()
        }
    }

    /// Gives a problem these options: whether its calls are causal and the like, and of their numbers, which
    /// there are. The numbers themselves are no part of a problem, see [`data`](Self::data).
    pub fn apply(&self, builder: ProblemBuilder) -> ProblemBuilder {
        self.apply_flags(builder.data(&self.data()))
    }

    /// As [`apply`](Self::apply), for a builder that was told of the numbers.
    pub(crate) fn apply_flags(&self, builder: ProblemBuilder) -> ProblemBuilder {
        // Taken apart by name, so that a new option cannot be forgotten here.
        let Self {
            causal,
            window,
            deterministic,
            batch_invariant,
            longest_query,
            longest_key,
            // In the data.
            scale: _,
            query_offset: _,
            query_offsets: _,
            softcap: _,
            query_lengths: _,
            key_value_lengths: _,
            query_starts: _,
            key_value_starts: _,
            dropout: _,
        } = self;
        let builder = builder.causal(*causal).window(*window);
        let builder = builder.deterministic(*deterministic).batch_invariant(*batch_invariant);
        // Mostly there is none, and a builder is large.
        if longest_query.is_none() && longest_key.is_none() {
            return builder;
        }
        builder.longest(*longest_query, *longest_key)
    }
}
