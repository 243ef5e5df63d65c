//! A call without its data, checked once.

mod builder;
#[cfg(feature = "serde")]
mod by_role;
mod geometry;
mod validate;

pub use builder::ProblemBuilder;

use crate::float_bits::FloatBits;
use crate::{
    DType, Device, Dropout, DropoutStream, Feature, FeatureSet, Gradients, Pass, QueryOffset, Role,
    Sequences, TensorDesc, Window,
};

/// The sizes of a problem.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(deny_unknown_fields))]
pub struct Dimensions {
    /// `B`.
    pub batch: usize,
    /// `T`.
    pub query_length: usize,
    /// `S`.
    pub key_length: usize,
    /// `N`.
    pub query_heads: usize,
    /// `K`: heads of keys and values.
    pub key_heads: usize,
    /// `H`: head dimension of queries and keys.
    pub head_dim: usize,
    /// `Hv`: head dimension of values and outputs.
    pub value_head_dim: usize,
}

impl Dimensions {
    /// `G = N / K`: how many query heads share a key/value head. 1 where there are no key/value heads.
    pub fn group_size(&self) -> usize {
        self.query_heads.checked_div(self.key_heads).unwrap_or(1)
    }

    /// The shape of the logits, `[B, N, T, S]`, to which masks and biases broadcast.
    pub fn logits(&self) -> [usize; 4] {
        [self.batch, self.query_heads, self.query_length, self.key_length]
    }
}

impl std::fmt::Display for Dimensions {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "B{} T{} S{} N{} K{} H{}",
            self.batch, self.query_length, self.key_length, self.query_heads, self.key_heads, self.head_dim
        )?;
        if self.value_head_dim == self.head_dim { Ok(()) } else { write!(f, " Hv{}", self.value_head_dim) }
    }
}

/// Everything of a problem that is given rather than derived. `Problem` holds a checked one.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
// An option that this version does not know is an error, not ignored.
#[cfg_attr(feature = "serde", serde(deny_unknown_fields))]
struct Spec {
    pass: Pass,
    device: Device,
    #[cfg_attr(feature = "serde", serde(with = "by_role"))]
    tensors: [Option<TensorDesc>; Role::COUNT],
    scale: Option<FloatBits>,
    causal: bool,
    query_offset: QueryOffset,
    window: Window,
    softcap: Option<FloatBits>,
    sequences: Sequences,
    dropout: Option<Dropout>,
    lse: bool,
    d_lse: bool,
    gradients: Gradients,
    deterministic: bool,
}

/// A whole attention call without its data: dimensions, dtype, layouts, device, masks and bias as shapes, options,
/// wanted outputs and pass. Built and checked by [`ProblemBuilder::build`] only, so holding one means that the call
/// is valid; `Eq` and `Hash` (floats by bits) make it the key of plan caches; with feature `serde` it can be
/// stored, and loading one checks it again.
///
/// # Shapes
/// `B` batch, `T` query length, `S` key/value length, `N` query heads, `K` key/value heads (`N` is a multiple of
/// `K`), `H` head dimension of queries and keys, `Hv` of values. Every size but `H` and `Hv` may be zero.
///
/// | tensor | shape | dtype |
/// |---|---|---|
/// | query | `[B, T, N, H]` | f64, f32, f16 or bf16 |
/// | key | `[B, S, K, H]` | the query's |
/// | value | `[B, S, K, Hv]` | the query's |
/// | mask | rank 1 to 4, right-aligned to `[B, N, T, S]`, each axis 1 or full | bool |
/// | bias | as the mask | any float |
/// | ALiBi slopes | `[N]` or `[B, N]` | any float |
/// | sinks | `[N]` | any float |
/// | out, d_out | `[B, T, N, Hv]` | the query's |
/// | lse, d_lse | `[B, T, N]` | f32, f64 for f64 operands |
/// | dq, dk, dv, dbias, dsinks | that of what they are the gradient of | the same |
///
/// # Semantics
/// For batch row `b`, query head `n` with key/value head `n / (N / K)`, query row `t`, key `j`:
/// 1. `pos = t + offset` ([`QueryOffset`]).
/// 2. `x = scale * <q, k>`; softcap `c`: `x = c * tanh(x / c)`; ALiBi: `x -= slope * |pos - j|`; bias: `x += bias`.
/// 3. `j` is allowed where `t < q_len`, `j < kv_len`, the mask is true, `j <= pos` if causal,
///    `pos - left <= j <= pos + right` in a window, and `x != -inf`.
/// 4. `LSE = ln(sum over allowed j of exp(x) + exp(sink))`, `p = exp(x - LSE)` on allowed `j` and 0 elsewhere.
/// 5. `out = sum over j of p' v` where dropout makes `p'` of `p`.
///
/// A row without allowed keys has output 0 and LSE -inf (with a sink: LSE = sink), a padded query row has output 0
/// and LSE -inf; neither has gradients. `docs/semantics.md` has the rest.
///
/// Sources: the product, its scale and causal masking, Vaswani et al., arXiv 1706.03762, section 3.2; shared heads, Shazeer,
/// arXiv 1911.02150, and Ainslie et al., arXiv 2305.13245; softcap, Gemma 2, arXiv 2408.00118, section 2; ALiBi, Press et al.,
/// arXiv 2108.12409, section 3; windows, Beltagy et al., arXiv 2004.05150, section 3.1; a logit that joins the denominator
/// alone, gpt-oss, arXiv 2508.10925; dropout bits, Salmon et al., SC 2011.
///
/// # Examples
/// ```
/// use attention_core::{DType, Problem, TensorDesc}; // or of `attention`, which are the same
///
/// let query = TensorDesc::contiguous(DType::F32, [2, 128, 8, 64]);
/// let key = TensorDesc::contiguous(DType::F32, [2, 256, 2, 64]);
/// let problem = Problem::builder(query, key, key).causal(true).lse(true).build()?;
/// assert_eq!(problem.dims().group_size(), 4);
/// # Ok::<(), attention_core::InvalidCall>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Problem {
    spec: Spec,
    dims: Dimensions,
    dtype: DType,
    scale: FloatBits,
}

impl Problem {
    /// Forward or backward.
    pub fn pass(&self) -> Pass {
        self.spec.pass
    }

    /// Where every tensor of the call is.
    pub fn device(&self) -> Device {
        self.spec.device
    }

    /// The sizes.
    pub fn dims(&self) -> Dimensions {
        self.dims
    }

    /// The dtype of query, key, value and output.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// The description of a tensor, or `None` where the call has none of this role. Mask and bias always have four
    /// axes here, with size 1 along broadcast axes that the caller left out.
    pub fn tensor(&self, role: Role) -> Option<&TensorDesc> {
        self.spec.tensors[role as usize].as_ref()
    }

    /// Whether the call has a tensor of this role.
    pub fn has(&self, role: Role) -> bool {
        self.tensor(role).is_some()
    }

    /// What the products of query and key are multiplied by: as given, or `1 / sqrt(H)`.
    pub fn scale(&self) -> f64 {
        self.scale.get()
    }

    /// Whether keys after `pos` are masked.
    pub fn causal(&self) -> bool {
        self.spec.causal
    }

    /// Where query rows stand among the keys.
    pub fn query_offset(&self) -> QueryOffset {
        self.spec.query_offset
    }

    /// The sliding window.
    pub fn window(&self) -> Window {
        self.spec.window
    }

    /// The softcap `c` of `c * tanh(x / c)`.
    pub fn softcap(&self) -> Option<f64> {
        self.spec.softcap.map(FloatBits::get)
    }

    /// How the tensors hold sequences.
    pub fn sequences(&self) -> &Sequences {
        &self.spec.sequences
    }

    /// Dropout as given.
    pub fn dropout(&self) -> Option<Dropout> {
        self.spec.dropout
    }

    /// The keep bits of the dropout.
    pub fn dropout_stream(&self) -> Option<DropoutStream> {
        // Checked by the builder, so a refusal cannot happen.
        self.spec.dropout.and_then(|dropout| dropout.stream().ok())
    }

    /// Whether the result must be bitwise reproducible.
    pub fn deterministic(&self) -> bool {
        self.spec.deterministic
    }

    /// The gradients a backward problem computes; empty for a forward one.
    pub fn gradients(&self) -> Gradients {
        self.spec.gradients
    }

    /// The features that a backend must have to serve this problem.
    pub fn features(&self) -> FeatureSet {
        let Sequences::Dense { query, key_value } = &self.spec.sequences;
        // Broadcast axes of a mask or bias have stride 0 by nature, so only the operands count here.
        let inner_stride =
            |desc: &TensorDesc| desc.rank() == 4 && desc.shape()[3] > 1 && desc.strides()[3] != 1;
        let negative = |desc: &TensorDesc| {
            desc.shape().iter().zip(desc.strides().iter()).any(|(&size, &stride)| size > 1 && stride < 0)
        };
        let operand = |role: Role| !matches!(role, Role::Mask | Role::Bias | Role::DBias);
        let operands =
            || Role::ALL.into_iter().filter(|&role| operand(role)).filter_map(|role| self.tensor(role));
        [
            (Feature::GroupedHeads, self.dims.key_heads != self.dims.query_heads),
            (Feature::ValueHeadDim, self.dims.value_head_dim != self.dims.head_dim),
            (Feature::Causal, self.causal()),
            (Feature::QueryOffset, matches!(self.query_offset(), QueryOffset::Fixed(offset) if offset != 0)),
            (Feature::BottomRight, self.query_offset() == QueryOffset::BottomRight),
            (Feature::WindowLeft, self.window().left.is_some()),
            (Feature::WindowRight, self.window().right.is_some()),
            (Feature::Mask, self.has(Role::Mask)),
            (Feature::Bias, self.has(Role::Bias)),
            (Feature::QueryLengths, !query.is_full()),
            (Feature::KeyValueLengths, !key_value.is_full()),
            (Feature::Softcap, self.softcap().is_some()),
            (Feature::Alibi, self.has(Role::AlibiSlopes)),
            (Feature::Sinks, self.has(Role::Sinks)),
            (Feature::Dropout, self.dropout().is_some()),
            (Feature::Lse, self.pass() == Pass::Forward && self.has(Role::Lse)),
            (Feature::DLse, self.has(Role::DLse)),
            (Feature::DBias, self.has(Role::DBias)),
            (Feature::DSinks, self.has(Role::DSinks)),
            (Feature::Deterministic, self.deterministic()),
            (Feature::InnerStride, operands().any(inner_stride)),
            (Feature::NegativeStrides, self.spec.tensors.iter().flatten().any(negative)),
        ]
        .into_iter()
        .filter_map(|(feature, present)| present.then_some(feature))
        .collect()
    }

    /// Useful floating-point operations of the call without masking: `2 B N T S (H + Hv)` forward, 2.5 times that
    /// backward. Benchmarks count this way.
    pub fn flops(&self) -> f64 {
        let d = self.dims;
        let [b, n, t, s] = d.logits().map(|size| size as f64);
        let forward = 2.0 * b * n * t * s * (d.head_dim + d.value_head_dim) as f64;
        match self.pass() {
            Pass::Forward => forward,
            Pass::Backward => 2.5 * forward,
        }
    }
}

impl std::fmt::Display for Problem {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} {} {} on {}", self.pass(), self.dtype, self.dims, self.device())?;
        for feature in self.features().iter() {
            write!(f, ", {feature}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
