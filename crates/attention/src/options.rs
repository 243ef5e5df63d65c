//! The options of a call that are no tensors.

use attention_core::{Dropout, Lengths, ProblemBuilder, QueryOffset, Window};

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
    /// The sliding window.
    pub window: Window,
    /// Caps logits at `c` by `c * tanh(x / c)`, before the bias.
    pub softcap: Option<f64>,
    /// How many query rows of each batch row are real.
    pub query_lengths: Lengths,
    /// How many keys of each batch row are real.
    pub key_value_lengths: Lengths,
    /// Dropout of the probabilities.
    pub dropout: Option<Dropout>,
    /// Asks for bitwise reproducible results.
    pub deterministic: bool,
}

#[cfg(feature = "serde")]
attention_core::fields_by_name!(Options {
    scale,
    causal,
    query_offset,
    window,
    softcap,
    query_lengths,
    key_value_lengths,
    dropout,
    deterministic,
});

impl Options {
    /// Gives a problem these options.
    pub fn apply(&self, builder: ProblemBuilder) -> ProblemBuilder {
        // Taken apart by name, so that a new option cannot be forgotten here.
        let Self {
            scale,
            causal,
            query_offset,
            window,
            softcap,
            query_lengths,
            key_value_lengths,
            dropout,
            deterministic,
        } = self;
        builder
            .scale(*scale)
            .causal(*causal)
            .query_offset(*query_offset)
            .window(*window)
            .softcap(*softcap)
            .query_lengths(query_lengths.clone())
            .key_value_lengths(key_value_lengths.clone())
            .dropout(*dropout)
            .deterministic(*deterministic)
    }
}
