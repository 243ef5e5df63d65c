//! The options of a case, as data that needs no tensors.

use attention_core::{DType, Dimensions, Dropout, Feature, FeatureSet, Gradients, QueryOffset, Window};
use serde::{Deserialize, Serialize};

/// Which axes of `[B, N, T, S]` a mask or bias has in full; the others have size 1. Axes before the last
/// `rank` are left out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Broadcast {
    /// 1 to 4.
    pub rank: usize,
    /// For B, N, T and S.
    pub full: [bool; 4],
}

impl Broadcast {
    /// `[B, N, T, S]`.
    pub const FULL: Self = Self { rank: 4, full: [true; 4] };

    /// Every pattern of every rank.
    pub fn all() -> Vec<Self> {
        let mut patterns = Vec::new();
        for rank in 1..=4 {
            for bits in 0..1usize << rank {
                let mut full = [false; 4];
                for axis in 0..rank {
                    full[4 - rank + axis] = bits >> (rank - 1 - axis) & 1 == 1;
                }
                patterns.push(Self { rank, full });
            }
        }
        patterns
    }

    /// The shape for these sizes.
    pub fn shape(&self, dims: &Dimensions) -> Vec<usize> {
        let sizes = dims.logits();
        (4 - self.rank..4).map(|axis| if self.full[axis] { sizes[axis] } else { 1 }).collect()
    }

    /// The row-major index, in a tensor of this shape, of the element that a position `[b, n, t, s]` reads.
    pub(crate) fn index(&self, shape: &[usize], position: [usize; 4]) -> usize {
        (4 - self.rank..4)
            .zip(shape)
            .fold(0, |flat, (axis, &size)| flat * size + if self.full[axis] { position[axis] } else { 0 })
    }

    /// The pattern as in `B11S`: a letter for a full axis, 1 for a broadcast one.
    pub fn name(&self) -> String {
        (4 - self.rank..4).map(|axis| if self.full[axis] { b"BNTS"[axis] as char } else { '1' }).collect()
    }
}

/// The shape of ALiBi slopes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AlibiShape {
    /// `[N]`.
    Heads,
    /// `[B, N]`.
    BatchHeads,
}

/// The shape of the scales of 8-bit keys or values.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ScaleShape {
    /// `[1]`.
    One,
    /// `[K]`.
    Heads,
    /// `[B, K]`.
    SequencesHeads,
}

/// Keys and values of 8 bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct EightBit {
    /// Of both.
    pub dtype: DType,
    /// The scales of keys, if there are any.
    pub key_scales: Option<ScaleShape>,
    /// The scales of values, if there are any.
    pub value_scales: Option<ScaleShape>,
}

/// Whether a case asks for an output that backends may lack.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Wanted {
    /// Never.
    Never,
    /// Where the backend declares that it has it, so that a backend without it runs the rest of the case.
    #[default]
    IfDeclared,
    /// Always: a backend without it is skipped.
    Always,
}

impl Wanted {
    pub(super) fn holds(self, declared: FeatureSet, feature: Feature) -> bool {
        match self {
            Wanted::Never => false,
            Wanted::IfDeclared => declared.contains(feature),
            Wanted::Always => true,
        }
    }
}

/// The options of a case.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Options {
    /// As in a call.
    pub scale: Option<f64>,
    /// As in a problem.
    pub causal: bool,
    /// As in a call.
    pub query_offset: QueryOffset,
    /// Offsets, one a batch row, in the place of `query_offset`.
    #[serde(default)]
    pub query_offsets: Option<Vec<i64>>,
    /// As in a problem.
    pub window: Window,
    /// As in a call.
    pub softcap: Option<f64>,
    /// Query lengths, one a batch row.
    pub query_lengths: Option<Vec<usize>>,
    /// Key/value lengths, one a batch row.
    pub key_value_lengths: Option<Vec<usize>>,
    /// A boolean mask.
    pub mask: Option<Broadcast>,
    /// An additive bias.
    pub bias: Option<Broadcast>,
    /// The dtype of bias, slopes and sinks; the query's where `None`.
    pub bias_dtype: Option<DType>,
    /// ALiBi slopes.
    pub alibi: Option<AlibiShape>,
    /// Attention sinks.
    pub sinks: bool,
    /// As in a call.
    pub dropout: Option<Dropout>,
    /// Whether seed and offset of the dropout are tensors.
    #[serde(default)]
    pub dropout_tensors: bool,
    /// Whether forward writes the logsumexp.
    pub lse: Wanted,
    /// Whether backward has an incoming gradient of the logsumexp.
    pub d_lse: bool,
    /// Which of dq, dk and dv backward writes.
    pub gradients: Gradients,
    /// Whether backward writes dbias, if there is a bias.
    pub dbias: Wanted,
    /// Whether backward writes dsinks, if there are sinks.
    pub dsinks: Wanted,
    /// As in a problem.
    pub deterministic: bool,
    /// As in a problem.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub batch_invariant: bool,
    /// Keys and values of 8 bits; of the query's dtype where `None`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub eight_bit: Option<EightBit>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            scale: None,
            causal: false,
            query_offset: QueryOffset::TOP_LEFT,
            query_offsets: None,
            window: Window::UNBOUNDED,
            softcap: None,
            query_lengths: None,
            key_value_lengths: None,
            mask: None,
            bias: None,
            bias_dtype: None,
            alibi: None,
            sinks: false,
            dropout: None,
            dropout_tensors: false,
            lse: Wanted::default(),
            d_lse: false,
            gradients: Gradients::QKV,
            dbias: Wanted::default(),
            dsinks: Wanted::default(),
            deterministic: false,
            batch_invariant: false,
            eight_bit: None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn broadcasts_are_all_there_and_have_their_shapes() {
        let all = Broadcast::all();
        assert_eq!(all.len(), 2 + 4 + 8 + 16);
        let dims = crate::cases::dims([2, 3, 5, 4, 4, 8]);
        let padding = all.iter().find(|pattern| pattern.name() == "B11S").unwrap();
        assert_eq!(padding.shape(&dims), [2, 1, 1, 5]);
        let rows = all.iter().find(|pattern| pattern.name() == "T1").unwrap();
        assert_eq!(rows.shape(&dims), [3, 1]);
    }
}
