//! A call without its data, checked once.

mod builder;
#[cfg(feature = "serde")]
mod by_role;
mod eight_bit;
mod sequences;
mod validate;

pub use builder::ProblemBuilder;

use std::hash::{Hash, Hasher};

use crate::float_bits::FloatBits;
use crate::{
    Alignment, DType, Device, Dropout, Feature, FeatureSet, Gradients, Pass, Role, RowLayout, TensorDesc,
    Window,
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

/// A set of roles.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(from = "Vec<Role>", into = "Vec<Role>"))]
struct Roles(u32);

impl Roles {
    fn set(&mut self, role: Role, present: bool) {
        self.0 = self.0 & !(1 << role as u32) | u32::from(present) << role as u32;
    }

    fn contains(self, role: Role) -> bool {
        self.0 & 1 << role as u32 != 0
    }

    #[cfg(feature = "serde")]
    #[allow(clippy::trivially_copy_pass_by_ref, reason = "serde calls it by reference")]
    fn is_empty(&self) -> bool {
        self.0 == 0
    }
}

#[cfg(feature = "serde")]
impl From<Vec<Role>> for Roles {
    fn from(roles: Vec<Role>) -> Self {
        let mut set = Self::default();
        roles.into_iter().for_each(|role| set.set(role, true));
        set
    }
}

#[cfg(feature = "serde")]
impl From<Roles> for Vec<Role> {
    fn from(set: Roles) -> Self {
        Role::every().filter(|&role| set.contains(role)).collect()
    }
}

/// Everything of a problem that is given rather than derived. `Problem` holds a checked one.
#[derive(Clone, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
// An option that this version does not know is an error, not ignored.
#[cfg_attr(feature = "serde", serde(deny_unknown_fields))]
struct Spec {
    pass: Pass,
    device: Device,
    #[cfg_attr(feature = "serde", serde(with = "by_role"))]
    tensors: [Option<TensorDesc>; Role::COUNT],
    /// The numbers of the call ([`Role::is_data`]) that are in host memory, of a problem on a device.
    #[cfg_attr(feature = "serde", serde(default, skip_serializing_if = "Roles::is_empty"))]
    in_host_memory: Roles,
    any_scale: bool,
    causal: bool,
    alignment: Alignment,
    window: Window,
    softcap: bool,
    dropout_rate: Option<FloatBits>,
    /// How many rows and keys a packed or paged sequence may have, at most.
    #[cfg_attr(feature = "serde", serde(default, skip_serializing_if = "Option::is_none"))]
    longest_query: Option<usize>,
    #[cfg_attr(feature = "serde", serde(default, skip_serializing_if = "Option::is_none"))]
    longest_key: Option<usize>,
    lse: bool,
    d_lse: bool,
    gradients: Gradients,
    deterministic: bool,
    #[cfg_attr(feature = "serde", serde(default, skip_serializing_if = "std::ops::Not::not"))]
    batch_invariant: bool,
}

/// Hashes the tensors that a problem has and skips the other roles: a call of the facade looks up its plan by
/// this hash, and has four or five tensors as a rule.
impl Hash for Spec {
    fn hash<H: Hasher>(&self, state: &mut H) {
        // Taken apart by name, so that a new field cannot be forgotten here.
        let Self {
            pass,
            device,
            tensors,
            in_host_memory,
            any_scale,
            causal,
            alignment,
            window,
            softcap,
            dropout_rate,
            longest_query,
            longest_key,
            lse,
            d_lse,
            gradients,
            deterministic,
            batch_invariant,
        } = self;
        for (role, desc) in Role::every().zip(tensors) {
            if let Some(desc) = desc {
                (role, desc).hash(state);
            }
        }
        (pass, device, in_host_memory, alignment, window, dropout_rate, gradients).hash(state);
        (longest_query, longest_key).hash(state);
        (any_scale, causal, softcap, lse, d_lse, deterministic, batch_invariant).hash(state);
    }
}

/// A whole attention call without its data: dimensions, dtypes, layouts, device, masks and bias as shapes,
/// options, wanted outputs and pass. Of the numbers of a call (lengths, offsets, scale, softcap, seed) it
/// knows which there are, their dtype, where they are and their bounds; the call brings them as
/// [`CallData`](crate::CallData). Built and checked by [`ProblemBuilder::build`] only, so holding one means
/// that the call is valid; `Eq` and `Hash` (floats by bits) make it the key of plan caches; with feature
/// `serde` it can be stored, and loading one checks it again.
///
/// # Shapes
/// `B` batch, `T` query length, `S` key/value length, `N` query heads, `K` key/value heads (`N` is a multiple
/// of `K`), `H` head dimension of queries and keys, `Hv` of values. Every size but `H` and `Hv` may be zero.
///
/// | tensor | shape | dtype |
/// |---|---|---|
/// | query | `[B, T, N, H]` | f64, f32, f16 or bf16 |
/// | key | `[B, S, K, H]` | the query's, f8e4m3 or f8e5m2 |
/// | value | `[B, S, K, Hv]` | the key's |
/// | mask | rank 1 to 4, right-aligned to `[B, N, T, S]`, each axis 1 or full | bool |
/// | bias | as the mask | any float |
/// | ALiBi slopes | `[N]` or `[B, N]` | any float |
/// | sinks | `[N]` | any float |
/// | query lengths, key/value lengths, query offsets | `[B]` | i32, u32 or i64 |
/// | query starts, key/value starts | `[B + 1]` | i32, u32 or i64 |
/// | block table | `[B, most pages]` | i32, u32 or i64 |
/// | seed and offset of the dropout | `[1]` | i32, u32 or i64 |
/// | key scales, value scales, of 8-bit ones | `[1]` or a scalar, `[K]` or `[B, K]` | f32 |
/// | out, d_out | `[B, T, N, Hv]` | the query's |
/// | lse, d_lse | `[B, T, N]` | f32, f64 for f64 operands |
/// | dq, dk, dv, dbias, dsinks | that of what they are the gradient of | the same |
///
/// With query starts, queries are packed: `[total, N, H]`, out and d_out `[total, N, Hv]`, lse and d_lse
/// `[total, N]`. With key/value starts, keys are `[total, K, H]` and values `[total, K, Hv]`. With a block
/// table they are in pages, `[pages, page size, K, H]` and `[pages, page size, K, Hv]`. `B` is the number of
/// sequences then, `T` and `S` are the lengths that the longest may have ([`ProblemBuilder::longest`]), and
/// everything means what it means for each sequence alone. [`RowLayout`] has the combinations.
///
/// Numbers `x` of 8-bit keys and values stand for `scale * x`, with the scale of their head and sequence, 1
/// where none are given. Such calls are forward only.
///
/// # Semantics
/// For batch row `b`, query head `n` with key/value head `n / (N / K)`, query row `t`, key `j`:
/// 1. `pos = t + offset` ([`QueryOffset`](crate::QueryOffset)).
/// 2. `x = scale * <q, k>`; softcap `c`: `x = c * tanh(x / c)`; ALiBi: `x -= slope * |pos - j|`; bias: `x +=
///    bias`.
/// 3. `j` is allowed where `t < q_len`, `j < kv_len`, the mask is true, `j <= pos` if causal,
///    `pos - left <= j <= pos + right` in a window, and `x != -inf`.
/// 4. `LSE = ln(sum over allowed j of exp(x) + exp(sink))`, `p = exp(x - LSE)` on allowed `j` and 0
///    elsewhere.
/// 5. `out = sum over j of p' v` where dropout makes `p'` of `p`.
///
/// A row without allowed keys has output 0 and LSE -inf (with a sink: LSE = sink), a padded query row has
/// output 0 and LSE -inf; neither has gradients. `docs/semantics.md` has the rest.
///
/// Sources: the product, its scale and causal masking, Vaswani et al., arXiv 1706.03762, section 3.2; shared
/// heads, Shazeer, arXiv 1911.02150, and Ainslie et al., arXiv 2305.13245; softcap, Gemma 2, arXiv
/// 2408.00118, section 2; ALiBi, Press et al., arXiv 2108.12409, section 3; windows, Beltagy et al., arXiv
/// 2004.05150, section 3.1; a logit that joins the denominator alone, gpt-oss, arXiv 2508.10925; dropout
/// bits, Salmon et al., SC 2011.
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
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    spec: Spec,
    // These two follow from it.
    dims: Dimensions,
    dtype: DType,
}

impl Hash for Problem {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.spec.hash(state);
    }
}

impl Problem {
    /// Forward or backward.
    #[inline]
    pub fn pass(&self) -> Pass {
        self.spec.pass
    }

    /// Where every tensor of the call is.
    #[inline]
    pub fn device(&self) -> Device {
        self.spec.device
    }

    /// The sizes.
    #[inline]
    pub fn dims(&self) -> Dimensions {
        self.dims
    }

    /// The dtype of the query and the output, and what the numerics class is of.
    #[inline]
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// The dtype of a tensor, or `None` where the call has none of this role.
    pub fn dtype_of(&self, role: Role) -> Option<DType> {
        self.tensor(role).map(TensorDesc::dtype)
    }

    /// Where a tensor of this role is: on the problem's device, but for [numbers](Role::DATA) that the host
    /// keeps.
    #[inline]
    pub fn device_of(&self, role: Role) -> Device {
        if self.spec.in_host_memory.contains(role) { Device::Cpu } else { self.device() }
    }

    /// The description of a tensor, or `None` where the call has none of this role. Mask and bias always have
    /// four axes here, with size 1 along broadcast axes that the caller left out.
    #[inline]
    pub fn tensor(&self, role: Role) -> Option<&TensorDesc> {
        self.spec.tensors[role as usize].as_ref()
    }

    /// Whether the call has a tensor of this role.
    #[inline]
    pub fn has(&self, role: Role) -> bool {
        self.tensor(role).is_some()
    }

    /// What the products of query and key are multiplied by where a call says nothing else: `1 / sqrt(H)`.
    #[inline]
    pub fn default_scale(&self) -> f64 {
        1.0 / (self.dims.head_dim as f64).sqrt()
    }

    /// Whether calls may have scales outside of [`ordinary_scales`](Self::ordinary_scales).
    #[inline]
    pub fn any_scale(&self) -> bool {
        self.spec.any_scale
    }

    /// The scales that calls of a problem may have unless it says otherwise, in this dtype of accumulators:
    /// above 0, and a number also times log2(e), so that kernels may scale the largest product of a row
    /// instead of each.
    pub const fn ordinary_scales(accumulator: DType) -> std::ops::RangeInclusive<f64> {
        match accumulator {
            DType::F64 => 1e-300..=1e308,
            _ => 1e-37..=2e38,
        }
    }

    /// Whether keys after `pos` are masked.
    #[inline]
    pub fn causal(&self) -> bool {
        self.spec.causal
    }

    /// What is known of where query rows stand among the keys.
    #[inline]
    pub fn alignment(&self) -> Alignment {
        self.spec.alignment
    }

    /// The sliding window.
    #[inline]
    pub fn window(&self) -> Window {
        self.spec.window
    }

    /// Whether logits are capped; at what, a call says.
    #[inline]
    pub fn has_softcap(&self) -> bool {
        self.spec.softcap
    }

    /// The fraction of probabilities that is dropped.
    #[inline]
    pub fn dropout_rate(&self) -> Option<f64> {
        self.spec.dropout_rate.map(FloatBits::get)
    }

    /// The dropout of a call with this seed and offset.
    pub fn dropout_at(&self, seed: u64, offset: u32) -> Option<Dropout> {
        self.dropout_rate().map(|rate| Dropout { rate, seed, offset })
    }

    /// Of 65536 probabilities, how many are dropped.
    pub fn drop_threshold(&self) -> Option<u32> {
        // Checked by the builder, so a refusal cannot happen.
        self.dropout_at(0, 0)?.stream().ok().map(|stream| stream.threshold())
    }

    /// Whether calls have rows and keys that differ from those of
    /// [`CallProblem::at_bounds`](crate::CallProblem): where they do not, work can be cut before any call.
    pub fn rows_vary(&self) -> bool {
        self.query_layout() != RowLayout::Dense
            || self.key_layout() != RowLayout::Dense
            || self.has(Role::QueryLengths)
            || self.has(Role::KeyValueLengths)
            || matches!(self.alignment(), Alignment::Offset(_) | Alignment::Offsets(_))
    }

    /// Whether the result must be bitwise reproducible.
    pub fn deterministic(&self) -> bool {
        self.spec.deterministic
    }

    /// Whether the bits of a sequence's results must not depend on the other sequences of the call, on the
    /// bounds of the call's lengths or on the layout of the sequence; see
    /// [`ProblemBuilder::batch_invariant`].
    pub fn batch_invariant(&self) -> bool {
        self.spec.batch_invariant
    }

    /// The gradients a backward problem computes; empty for a forward one.
    pub fn gradients(&self) -> Gradients {
        self.spec.gradients
    }

    /// The features that a backend must have to serve this problem.
    pub fn features(&self) -> FeatureSet {
        // Broadcast axes of a mask or bias have stride 0 by nature, so only the operands count here.
        let inner_stride =
            |desc: &TensorDesc| desc.rank() == 4 && desc.shape()[3] > 1 && desc.strides()[3] != 1;
        let negative = |desc: &TensorDesc| {
            desc.shape().iter().zip(desc.strides().iter()).any(|(&size, &stride)| size > 1 && stride < 0)
        };
        let operand = |role: Role| !matches!(role, Role::Mask | Role::Bias | Role::DBias) && !role.is_data();
        let on_device = |role: Role| self.has(role) && self.device_of(role) != Device::Cpu;
        let operands =
            || Role::ALL.into_iter().filter(|&role| operand(role)).filter_map(|role| self.tensor(role));
        [
            (Feature::GroupedHeads, self.dims.key_heads != self.dims.query_heads),
            (Feature::ValueHeadDim, self.dims.value_head_dim != self.dims.head_dim),
            (Feature::Causal, self.causal()),
            (Feature::QueryOffset, matches!(self.alignment(), Alignment::Offset(_))),
            (Feature::QueryOffsets, matches!(self.alignment(), Alignment::Offsets(_))),
            (Feature::BottomRight, self.alignment() == Alignment::BottomRight),
            (Feature::WindowLeft, self.window().left.is_some()),
            (Feature::WindowRight, self.window().right.is_some()),
            (Feature::Mask, self.has(Role::Mask)),
            (Feature::Bias, self.has(Role::Bias)),
            (Feature::QueryLengths, self.has(Role::QueryLengths)),
            (Feature::KeyValueLengths, self.has(Role::KeyValueLengths)),
            (Feature::Softcap, self.has_softcap()),
            (Feature::Alibi, self.has(Role::AlibiSlopes)),
            (Feature::Sinks, self.has(Role::Sinks)),
            (Feature::Dropout, self.dropout_rate().is_some()),
            (Feature::Lse, self.pass() == Pass::Forward && self.has(Role::Lse)),
            (Feature::DLse, self.has(Role::DLse)),
            (Feature::DBias, self.has(Role::DBias)),
            (Feature::DSinks, self.has(Role::DSinks)),
            (Feature::Deterministic, self.deterministic()),
            (Feature::BatchInvariant, self.batch_invariant()),
            (Feature::InnerStride, operands().any(inner_stride)),
            (Feature::PackedQueries, self.query_layout() == RowLayout::Packed),
            (Feature::PackedKeys, self.key_layout() == RowLayout::Packed),
            (Feature::PagedKeys, matches!(self.key_layout(), RowLayout::Paged { .. })),
            (Feature::EightBitKeys, self.dtype_of(Role::Key).is_some_and(DType::is_eight_bit)),
            (
                Feature::DeviceData,
                Role::DATA.into_iter().chain(Role::SEQUENCES).chain(Role::SCALES).any(on_device),
            ),
            (
                Feature::NegativeStrides,
                self.spec.tensors[..Role::QueryLengths as usize].iter().flatten().any(negative),
            ),
        ]
        .into_iter()
        .filter_map(|(feature, present)| present.then_some(feature))
        .collect()
    }

    /// Useful floating-point operations of the call without masking: `2 B N T S (H + Hv)` forward, 2.5 times
    /// that backward. Benchmarks count this way. Of packed and paged sequences, those of a call in which each
    /// is as long as the longest may be.
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
        write!(f, "{} {}", self.pass(), self.dtype)?;
        if let Some(key) = self.dtype_of(Role::Key).filter(|&key| key != self.dtype) {
            write!(f, " ({key} keys)")?;
        }
        write!(f, " {} on {}", self.dims, self.device())?;
        for feature in self.features().iter() {
            write!(f, ", {feature}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
