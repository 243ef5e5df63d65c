//! Collects what a problem consists of.

use super::{Dimensions, Problem, Roles, Spec, validate};
use crate::float_bits::FloatBits;
use crate::{
    Alignment, CallData, DType, Device, Gradients, InvalidCall, OffsetRange, Pass, QueryOffset, Role,
    TensorDesc, Window,
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
            in_host_memory: Roles::default(),
            any_scale: false,
            causal: false,
            alignment: Alignment::default(),
            window: Window::default(),
            softcap: false,
            dropout_rate: None,
            longest_query: None,
            longest_key: None,
            lse: false,
            d_lse: false,
            gradients: Gradients::NONE,
            deterministic: false,
            batch_invariant: false,
        };
        Self { spec }
    }

    /// Where every tensor of the call is; host memory by default.
    #[inline]
    pub fn device(mut self, device: Device) -> Self {
        self.set_device(device);
        self
    }

    /// As [`device`](Self::device), in place: a builder has 1.9 KB, which methods that are chained may copy.
    #[inline]
    pub(crate) fn set_device(&mut self, device: Device) {
        self.spec.device = device;
    }

    /// Takes calls with numbers like these: announces which of them there are, their dtypes, places and
    /// bounds. What was announced before, by this or another method, is forgotten.
    #[inline]
    pub fn data(mut self, data: &CallData<'_>) -> Self {
        self.set_data(data);
        self
    }

    /// As [`data`](Self::data), in place.
    pub(crate) fn set_data(&mut self, data: &CallData<'_>) {
        let dtype = self.spec.tensors[Role::Query as usize].map_or(DType::F32, |query| query.dtype());
        let ordinary = Problem::ordinary_scales(dtype.accumulator());
        self.spec.any_scale = data.scale.is_some_and(|scale| !ordinary.contains(&scale));
        self.spec.softcap = data.softcap.is_some();
        self.spec.dropout_rate = data.dropout.map(|dropout| FloatBits::new(dropout.rate));
        self.spec.alignment = match data.query_offset {
            QueryOffset::BottomRight => Alignment::BottomRight,
            QueryOffset::TOP_LEFT => Alignment::TopLeft,
            QueryOffset::Fixed(offset) => Alignment::Offset(OffsetRange::of(offset)),
        };
        // A longest sequence is one of packed or paged ones.
        self.spec.longest_query = self.spec.longest_query.filter(|_| data.query_starts.is_some());
        let has_keys = data.key_value_starts.is_some() || data.block_table.is_some();
        self.spec.longest_key = self.spec.longest_key.filter(|_| has_keys);
        for (role, view) in data.views() {
            self.spec.tensors[role as usize] = view.map(|view| view.desc());
            self.spec.in_host_memory.set(role, view.is_some_and(|view| view.device() == Device::Cpu));
        }
        if let Some(view) = data.query_offsets {
            let offsets = crate::data::Integers::of(view);
            let near = |index: usize| {
                offsets.is_none_or(|offsets| OffsetRange::of(offsets.at(index)) == OffsetRange::Near)
            };
            let range =
                if (0..crate::data::distinct(view)).all(near) { OffsetRange::Near } else { OffsetRange::Any };
            self.spec.alignment = Alignment::Offsets(range);
        }
    }

    /// Whether calls may have scales outside of [`Problem::ordinary_scales`]; they may not by default.
    #[inline]
    pub fn any_scale(mut self, any: bool) -> Self {
        self.spec.any_scale = any;
        self
    }

    /// Masks keys after `pos`.
    #[inline]
    pub fn causal(mut self, causal: bool) -> Self {
        self.spec.causal = causal;
        self
    }

    /// What is known of where query rows stand among the keys. Of offsets by batch row, which are a tensor,
    /// the layout is that of [`query_offsets`](Self::query_offsets).
    #[inline]
    pub fn alignment(mut self, alignment: Alignment) -> Self {
        self.spec.alignment = alignment;
        self
    }

    /// The sliding window.
    #[inline]
    pub fn window(mut self, window: Window) -> Self {
        self.spec.window = window;
        self
    }

    /// Whether calls cap logits at `c` by `c * tanh(x / c)`, before the bias.
    #[inline]
    pub fn softcap(mut self, softcap: bool) -> Self {
        self.spec.softcap = softcap;
        self
    }

    /// A boolean mask, `true` takes part; rank 1 to 4, right-aligned to `[B, N, T, S]`, each axis 1 or full.
    #[inline]
    pub fn mask(self, mask: TensorDesc) -> Self {
        self.layout(Role::Mask, mask)
    }

    /// An additive bias of any float dtype; shapes as for the mask.
    #[inline]
    pub fn bias(self, bias: TensorDesc) -> Self {
        self.layout(Role::Bias, bias)
    }

    /// ALiBi slopes, `[N]` or `[B, N]`.
    #[inline]
    pub fn alibi_slopes(self, slopes: TensorDesc) -> Self {
        self.layout(Role::AlibiSlopes, slopes)
    }

    /// Attention sinks, `[N]`: one extra logit a head that joins the denominator only.
    #[inline]
    pub fn sinks(self, sinks: TensorDesc) -> Self {
        self.layout(Role::Sinks, sinks)
    }

    /// How many rows the longest packed sequence of any call may have, and how many keys the longest packed
    /// or paged one: the `T` and `S` of masks and biases, and what work and scratch memory are planned for.
    /// `None`, the default, is the axis of a mask or bias if there is one, and what the tensors have room for
    /// if not.
    #[inline]
    pub fn longest(mut self, queries: impl Into<Option<usize>>, keys: impl Into<Option<usize>>) -> Self {
        (self.spec.longest_query, self.spec.longest_key) = (queries.into(), keys.into());
        self
    }

    /// Calls give query lengths, of this dtype and without gaps, on the problem's device.
    #[inline]
    pub fn query_lengths(self, dtype: DType) -> Self {
        self.by_batch_row(Role::QueryLengths, dtype)
    }

    /// Calls give key/value lengths, of this dtype and without gaps, on the problem's device.
    #[inline]
    pub fn key_value_lengths(self, dtype: DType) -> Self {
        self.by_batch_row(Role::KeyValueLengths, dtype)
    }

    /// Calls give an offset for each batch row, of this dtype and without gaps, on the problem's device.
    #[inline]
    pub fn query_offsets(mut self, range: OffsetRange, dtype: DType) -> Self {
        self.spec.alignment = Alignment::Offsets(range);
        self.by_batch_row(Role::QueryOffsets, dtype)
    }

    #[inline]
    fn by_batch_row(self, role: Role, dtype: DType) -> Self {
        let batch = self.spec.batch();
        self.layout(role, TensorDesc::contiguous(dtype, [batch]))
    }

    /// Queries are packed: calls give the starts of this many sequences, of this dtype and without gaps, on
    /// the problem's device. To be called before [`key_value_lengths`](Self::key_value_lengths) and the like,
    /// which count sequences.
    #[inline]
    pub fn packed_queries(self, sequences: usize, dtype: DType) -> Self {
        self.layout(Role::QueryStarts, TensorDesc::contiguous(dtype, [sequences.saturating_add(1)]))
    }

    /// Keys and values are packed; as [`packed_queries`](Self::packed_queries).
    #[inline]
    pub fn packed_keys(self, sequences: usize, dtype: DType) -> Self {
        self.layout(Role::KeyValueStarts, TensorDesc::contiguous(dtype, [sequences.saturating_add(1)]))
    }

    /// Keys and values are in pages: calls give a block table of this many sequences with up to `most` pages
    /// each, and key/value lengths, of this dtype and without gaps, on the problem's device.
    #[inline]
    pub fn paged(self, sequences: usize, most: usize, dtype: DType) -> Self {
        self.layout(Role::BlockTable, TensorDesc::contiguous(dtype, [sequences, most]))
            .layout(Role::KeyValueLengths, TensorDesc::contiguous(dtype, [sequences]))
    }

    /// The scales of 8-bit keys: f32, `[1]` or a scalar, `[K]` or `[B, K]`.
    #[inline]
    pub fn key_scales(self, scales: TensorDesc) -> Self {
        self.layout(Role::KeyScales, scales)
    }

    /// The scales of 8-bit values; as [`key_scales`](Self::key_scales).
    #[inline]
    pub fn value_scales(self, scales: TensorDesc) -> Self {
        self.layout(Role::ValueScales, scales)
    }

    /// Whether [numbers of a call](Role::is_data) are in host memory, of a problem on a device. They are on
    /// the device by default.
    #[inline]
    pub fn in_host_memory(mut self, role: Role, in_host_memory: bool) -> Self {
        self.spec.in_host_memory.set(role, in_host_memory);
        self
    }

    /// The fraction of probabilities that calls drop.
    #[inline]
    pub fn dropout_rate(mut self, rate: impl Into<Option<f64>>) -> Self {
        self.spec.dropout_rate = rate.into().map(FloatBits::new);
        self
    }

    /// Asks for bitwise reproducible results: a backend that cannot give them refuses.
    #[inline]
    pub fn deterministic(mut self, deterministic: bool) -> Self {
        self.spec.deterministic = deterministic;
        self
    }

    /// Asks for results of each sequence (output, logsumexp, and the gradients of query, key and value) that
    /// have the same bits whatever else is in the call, whatever its sizes and bounds are, and however the
    /// sequence is laid out: dense, padded with lengths, packed or paged. A backend that cannot give them
    /// refuses. Gradients that are shared by sequences, those of bias and sinks, are exempt.
    #[inline]
    pub fn batch_invariant(mut self, batch_invariant: bool) -> Self {
        self.spec.batch_invariant = batch_invariant;
        self
    }

    /// Whether a forward problem writes the logsumexp. A backward problem always reads it.
    #[inline]
    pub fn lse(mut self, wanted: bool) -> Self {
        self.spec.lse = wanted;
        self
    }

    /// Makes this a backward problem with these gradients.
    #[inline]
    pub fn gradients(mut self, gradients: Gradients) -> Self {
        self.spec.pass = Pass::Backward;
        self.spec.gradients = gradients;
        self
    }

    /// Whether a backward problem has an incoming gradient of the logsumexp.
    #[inline]
    pub fn d_lse(mut self, given: bool) -> Self {
        self.spec.d_lse = given;
        self
    }

    /// The layout of one tensor: of outputs and incoming gradients, which are contiguous by default, or any
    /// other. For an optional input (mask, bias, slopes, sinks, lengths and the like) this adds the tensor.
    #[inline]
    pub fn layout(mut self, role: Role, desc: TensorDesc) -> Self {
        self.set_layout(role, desc);
        self
    }

    /// As [`layout`](Self::layout), in place.
    #[inline]
    pub(crate) fn set_layout(&mut self, role: Role, desc: TensorDesc) {
        self.spec.tensors[role as usize] = Some(desc);
    }

    /// Checks everything and makes the problem.
    ///
    /// # Errors
    /// [`InvalidCall`] names what is wrong, with the numbers: a rank, shape or dtype, heads that do not
    /// divide, a mask or bias that does not broadcast, lengths that are not `[B]`, a dropout rate outside
    /// `[0, 1)`, outputs that overlap themselves, sizes that overflow, gradients of keys in pages or of 8
    /// bits, scales of other keys than 8-bit ones.
    #[inline]
    pub fn build(mut self) -> Result<Problem, InvalidCall> {
        let (dims, dtype) = validate::check(&mut self.spec)?;
        Ok(Problem { spec: self.spec, dims, dtype })
    }
}

impl Problem {
    /// Starts a problem from the descriptions of query `[B, T, N, H]`, key `[B, S, K, H]` and value
    /// `[B, S, K, Hv]`, or of packed or paged ones.
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
    /// Starts a problem on contiguous tensors of these sizes, for a question without data: what would serve
    /// it?
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
