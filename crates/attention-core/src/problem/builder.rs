//! Collects what a problem consists of.

use super::{Dimensions, Problem, Spec, validate};
use crate::float_bits::FloatBits;
use crate::{
    DType, Device, Dropout, Gradients, InvalidCall, Lengths, Pass, QueryOffset, Role, Sequences, TensorDesc,
    Window,
};

/// Collects what a [`Problem`] consists of; [`build`](Self::build) checks it.
///
/// Layouts of outputs and incoming gradients default to contiguous tensors of the right shape;
/// [`layout`](Self::layout) sets others.
#[derive(Clone, Debug)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(transparent))]
#[must_use = "a builder does nothing until `build`"]
pub struct ProblemBuilder {
    spec: Spec,
}

impl ProblemBuilder {
    fn new(query: TensorDesc, key: TensorDesc, value: TensorDesc) -> Self {
        let mut tensors = [None; Role::COUNT];
        tensors[Role::Query as usize] = Some(query);
        tensors[Role::Key as usize] = Some(key);
        tensors[Role::Value as usize] = Some(value);
        let spec = Spec {
            pass: Pass::Forward,
            device: Device::Cpu,
            tensors,
            scale: None,
            causal: false,
            query_offset: QueryOffset::default(),
            window: Window::default(),
            softcap: None,
            sequences: Sequences::default(),
            dropout: None,
            lse: false,
            d_lse: false,
            gradients: Gradients::NONE,
            deterministic: false,
        };
        Self { spec }
    }

    /// Where every tensor of the call is; host memory by default.
    pub fn device(mut self, device: Device) -> Self {
        self.spec.device = device;
        self
    }

    /// What the products of query and key are multiplied by; `None` for `1 / sqrt(H)`.
    pub fn scale(mut self, scale: impl Into<Option<f64>>) -> Self {
        self.spec.scale = scale.into().map(FloatBits::new);
        self
    }

    /// Masks keys after `pos`.
    pub fn causal(mut self, causal: bool) -> Self {
        self.spec.causal = causal;
        self
    }

    /// Where query rows stand among the keys.
    pub fn query_offset(mut self, offset: QueryOffset) -> Self {
        self.spec.query_offset = offset;
        self
    }

    /// The sliding window.
    pub fn window(mut self, window: Window) -> Self {
        self.spec.window = window;
        self
    }

    /// Caps logits at `c` by `c * tanh(x / c)`, before the bias.
    pub fn softcap(mut self, softcap: impl Into<Option<f64>>) -> Self {
        self.spec.softcap = softcap.into().map(FloatBits::new);
        self
    }

    /// A boolean mask, `true` takes part; rank 1 to 4, right-aligned to `[B, N, T, S]`, each axis 1 or full.
    pub fn mask(self, mask: TensorDesc) -> Self {
        self.layout(Role::Mask, mask)
    }

    /// An additive bias of any float dtype; shapes as for the mask.
    pub fn bias(self, bias: TensorDesc) -> Self {
        self.layout(Role::Bias, bias)
    }

    /// ALiBi slopes, `[N]` or `[B, N]`.
    pub fn alibi_slopes(self, slopes: TensorDesc) -> Self {
        self.layout(Role::AlibiSlopes, slopes)
    }

    /// Attention sinks, `[N]`: one extra logit a head that joins the denominator only.
    pub fn sinks(self, sinks: TensorDesc) -> Self {
        self.layout(Role::Sinks, sinks)
    }

    /// How the tensors hold sequences.
    pub fn sequences(mut self, sequences: Sequences) -> Self {
        self.spec.sequences = sequences;
        self
    }

    /// Query lengths of dense sequences.
    pub fn query_lengths(mut self, lengths: impl Into<Lengths>) -> Self {
        let Sequences::Dense { query, .. } = &mut self.spec.sequences;
        *query = lengths.into();
        self
    }

    /// Key/value lengths of dense sequences.
    pub fn key_value_lengths(mut self, lengths: impl Into<Lengths>) -> Self {
        let Sequences::Dense { key_value, .. } = &mut self.spec.sequences;
        *key_value = lengths.into();
        self
    }

    /// Dropout of the probabilities.
    pub fn dropout(mut self, dropout: impl Into<Option<Dropout>>) -> Self {
        self.spec.dropout = dropout.into();
        self
    }

    /// Asks for bitwise reproducible results: a backend that cannot give them refuses.
    pub fn deterministic(mut self, deterministic: bool) -> Self {
        self.spec.deterministic = deterministic;
        self
    }

    /// Whether a forward problem writes the logsumexp. A backward problem always reads it.
    pub fn lse(mut self, wanted: bool) -> Self {
        self.spec.lse = wanted;
        self
    }

    /// Makes this a backward problem with these gradients.
    pub fn gradients(mut self, gradients: Gradients) -> Self {
        self.spec.pass = Pass::Backward;
        self.spec.gradients = gradients;
        self
    }

    /// Whether a backward problem has an incoming gradient of the logsumexp.
    pub fn d_lse(mut self, given: bool) -> Self {
        self.spec.d_lse = given;
        self
    }

    /// The layout of one tensor: of outputs and incoming gradients, which are contiguous by default, or any other.
    /// For an optional input (mask, bias, slopes, sinks) this adds the tensor.
    pub fn layout(mut self, role: Role, desc: TensorDesc) -> Self {
        self.spec.tensors[role as usize] = Some(desc);
        self
    }

    /// Checks everything and makes the problem.
    ///
    /// # Errors
    /// [`InvalidCall`] names what is wrong, with the numbers: a rank, shape or dtype, heads that do not divide,
    /// a mask or bias that does not broadcast, lengths out of range, a scale that is not finite, a dropout rate
    /// outside `[0, 1)`, outputs that overlap themselves, sizes that overflow.
    pub fn build(self) -> Result<Problem, InvalidCall> {
        validate::problem(self.spec)
    }
}

impl Problem {
    /// Starts a problem from the descriptions of query `[B, T, N, H]`, key `[B, S, K, H]` and value `[B, S, K, Hv]`.
    pub fn builder(query: TensorDesc, key: TensorDesc, value: TensorDesc) -> ProblemBuilder {
        ProblemBuilder::new(query, key, value)
    }

    /// A builder that holds everything of this problem, to make a variant of it: the backward problem of a
    /// forward one, or the same for another device.
    pub fn to_builder(&self) -> ProblemBuilder {
        ProblemBuilder { spec: self.spec.clone() }
    }
}

impl From<Problem> for ProblemBuilder {
    fn from(problem: Problem) -> Self {
        Self { spec: problem.spec }
    }
}

impl TryFrom<ProblemBuilder> for Problem {
    type Error = InvalidCall;

    fn try_from(builder: ProblemBuilder) -> Result<Self, InvalidCall> {
        builder.build()
    }
}

#[cfg(feature = "serde")]
impl serde::Serialize for Problem {
    /// As its builder.
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        self.to_builder().serialize(serializer)
    }
}

#[cfg(feature = "serde")]
impl<'de> serde::Deserialize<'de> for Problem {
    /// A stored builder, checked again.
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        ProblemBuilder::deserialize(deserializer)?.build().map_err(serde::de::Error::custom)
    }
}

impl Dimensions {
    /// Starts a problem on contiguous tensors of these sizes, for a question without data: what would serve it?
    pub fn problem(&self, dtype: DType) -> ProblemBuilder {
        let Dimensions { batch, query_length, key_length, query_heads, key_heads, head_dim, value_head_dim } =
            *self;
        Problem::builder(
            TensorDesc::contiguous(dtype, [batch, query_length, query_heads, head_dim]),
            TensorDesc::contiguous(dtype, [batch, key_length, key_heads, head_dim]),
            TensorDesc::contiguous(dtype, [batch, key_length, key_heads, value_head_dim]),
        )
    }
}
