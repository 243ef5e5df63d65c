//! The builder: what a call is, apart from query, key and value.

use attention_core::{
    CallData, Dropout, Gradients, Inputs, InvalidCall, NumericsClass, Problem, QueryOffset, Role, View,
    Window,
};

use crate::hidden_keys::hidden_keys;
use crate::operands::{Operands, OptionalInputs, input};
use crate::selection::Policy;
use crate::{
    AttentionPlan, AxisOrder, Error, Explanation, Implementation, IntoNumbers, IntoView, Options, Registry,
    Tensor,
};

/// A call of scaled dot-product attention, apart from its query, key and value: options, mask and bias, and
/// which implementation shall run it.
///
/// # Shapes
/// | tensor | [`Attention::new`], [`btnh`](Attention::btnh) | [`Attention::bnth`] |
/// |---|---|---|
/// | query | `[B, T, N, H]` | `[B, N, T, H]` |
/// | key | `[B, S, K, H]` | `[B, K, S, H]` |
/// | value | `[B, S, K, Hv]` | `[B, K, S, Hv]` |
/// | output and its gradient | `[B, T, N, Hv]` | `[B, N, T, Hv]` |
/// | logsumexp and its gradient | `[B, T, N]` | `[B, N, T]` |
/// | mask, bias | 1 to 4 axes, right-aligned to `[B, N, T, S]`, each 1 or full | the same |
/// | ALiBi slopes | `[N]` or `[B, N]` | the same |
/// | sinks | `[N]` | the same |
/// | lengths, offsets by batch row | `[B]` | the same |
/// | scales of 8-bit keys, of 8-bit values | `[1]` or a scalar, `[K]` or `[B, K]` | the same |
///
/// All but the last five without `B` where query, key and value are without it; masks, biases, slopes and
/// lengths count on `B = 1` then. Query heads are a multiple of the key/value heads (`N % K == 0`), and each
/// group of `N / K` shares one.
///
/// Sequences that lie behind one another without padding, `[total, N, H]`: see [`packed`](Self::packed). Keys
/// and values in pages, `[pages, page_size, K, H]`: see [`paged`](Self::paged).
///
/// # Semantics
/// Those of [`Problem`].
///
/// # Examples
/// ```
/// # #[cfg(feature = "cpu")] {
/// use attention::{Attention, QueryOffset, Window};
///
/// // Decoding: 2 new queries behind 6 cached keys, 4 query heads on 2 key/value heads, a window of 4 keys.
/// let query = vec![0.5f32; 2 * 4 * 8];
/// let cache = vec![0.25f32; 8 * 2 * 8];
/// let out = Attention::new()
///     .causal(true)
///     .query_offset(QueryOffset::BottomRight)
///     .window(Window { left: Some(3), right: None })
///     .forward((&query, [1, 2, 4, 8]), (&cache, [1, 8, 2, 8]), (&cache, [1, 8, 2, 8]))?;
/// assert_eq!(out.shape(), [1, 2, 4, 8].into());
/// # }
/// # Ok::<(), attention::Error>(())
/// ```
#[derive(Clone, Debug, Default)]
#[must_use = "a call does nothing until `forward` or `backward`"]
pub struct Attention<'a> {
    pub(crate) options: Options,
    pub(crate) order: AxisOrder,
    pub(crate) optional: OptionalInputs<'a>,
    pub(crate) d_lse: Option<View<'a>>,
    pub(crate) gradients: Option<Gradients>,
    pub(crate) policy: Policy,
    /// The first tensor given to the builder that was none; the call reports it.
    pub(crate) broken: Option<(Role, InvalidCall)>,
}

/// Attention with every option at its default: scale `1 / sqrt(H)`, nothing masked.
///
/// Shapes as for [`Attention`].
///
/// # Errors
/// As [`Attention::forward`].
///
/// # Examples
/// ```
/// # #[cfg(feature = "cpu")] {
/// // One batch row, one query, two keys, one head: equal logits, so the mean of the two values.
/// let out = attention::dot_product_attention(
///     (&[1.0f32, 2.0], [1, 1, 1, 2]),
///     (&[0.0f32; 4], [1, 2, 1, 2]),
///     (&[1.0f32, 2.0, 3.0, 4.0], [1, 2, 1, 2]),
/// )?;
/// assert_eq!(out.as_slice::<f32>(), Some(&[2.0, 3.0][..]));
/// # }
/// # Ok::<(), attention::Error>(())
/// ```
pub fn dot_product_attention<'a>(
    query: impl IntoView<'a>,
    key: impl IntoView<'a>,
    value: impl IntoView<'a>,
) -> Result<Tensor, Error> {
    Attention::new().forward(query, key, value)
}

impl<'a> Attention<'a> {
    /// A call with every option at its default, on tensors with the sequence before heads, `[B, T, N, H]`.
    pub fn new() -> Self {
        Self::default()
    }

    /// The same as [`new`](Self::new), by the name of its order of axes.
    pub fn btnh() -> Self {
        Self::new()
    }

    /// A call on tensors with heads before the sequence, `[B, N, T, H]`, with every option at its default.
    /// Query, key, value, output, logsumexp and their gradients all have that order; masks and biases are
    /// `[B, N, T, S]` in any.
    pub fn bnth() -> Self {
        Self::new().axis_order(AxisOrder::Bnth)
    }

    /// The order of the axes of query, key, value, output, logsumexp, and their gradients; `[B, T, N, H]` by
    /// default.
    pub fn axis_order(mut self, order: AxisOrder) -> Self {
        self.order = order;
        self
    }

    /// Replaces all options that are no tensors. Lengths, offsets and the like that were given as tensors
    /// stay, and go before those of the options.
    pub fn options(mut self, options: Options) -> Self {
        self.options = options;
        self
    }

    /// What the products of query and key are multiplied by; `1 / sqrt(H)` by default or with `None`. 0 and
    /// negative numbers are honoured; NaN and infinities are an error of the call.
    pub fn scale(mut self, scale: impl Into<Option<f64>>) -> Self {
        self.options.scale = scale.into();
        self
    }

    /// Masks keys after the position of the query row, `j > t + offset`. With `T != S`, mind
    /// [`query_offset`](Self::query_offset): it is top-left (JAX's and torch's alignment) by default.
    pub fn causal(mut self, causal: bool) -> Self {
        self.options.causal = causal;
        self
    }

    /// Where query row `t` stands among the keys, `pos = t + offset`: causal masking, windows and ALiBi count
    /// from it. A [`QueryOffset`], or a number: how many keys are cached before the first query row.
    pub fn query_offset(mut self, offset: impl Into<QueryOffset>) -> Self {
        self.options.query_offset = offset.into();
        self.options.query_offsets = None;
        self.optional.query_offsets = None;
        self
    }

    /// An offset for each batch row, in the place of [`query_offset`](Self::query_offset): a list of integers
    /// or an integer tensor, `[B]` ([`IntoNumbers`]).
    pub fn query_offsets(mut self, offsets: impl IntoNumbers<'a>) -> Self {
        if let Some(offsets) = self.unbroken(Role::QueryOffsets, offsets.into_numbers()) {
            (self.options.query_offsets, self.optional.query_offsets) = offsets.into_offsets();
        }
        self
    }

    /// A sliding window: only keys `pos - left ..= pos + right` take part; no bounds by default.
    /// `Window::new(127, 0)` is the 128 keys up to the row's own. With [`causal`](Self::causal) both hold.
    pub fn window(mut self, window: Window) -> Self {
        self.options.window = window;
        self
    }

    /// A boolean mask, `true` takes part; 1 to 4 axes, right-aligned to `[B, N, T, S]`, each 1 or full. It is
    /// combined with causal masking, window and lengths: a key takes part where all allow it.
    ///
    /// # Examples
    /// ```
    /// # #[cfg(feature = "cpu")] {
    /// use attention::Attention;
    ///
    /// // Two batch rows of 3 keys; the second may not see its last one. Equal logits, so the mean of the values.
    /// let (query, key) = ([0.0f32; 2], [0.0f32; 6]);
    /// let value = [1.0f32, 2.0, 6.0, 1.0, 2.0, 6.0];
    /// let out = Attention::new()
    ///     .mask((&[true, true, true, true, true, false], [2, 1, 1, 3]))
    ///     .forward((&query, [2, 1, 1, 1]), (&key, [2, 3, 1, 1]), (&value, [2, 3, 1, 1]))?;
    /// assert_eq!(out.as_slice::<f32>(), Some(&[3.0, 1.5][..]));
    /// # }
    /// # Ok::<(), attention::Error>(())
    /// ```
    pub fn mask(mut self, mask: impl IntoView<'a>) -> Self {
        self.optional.mask = self.tensor(Role::Mask, mask);
        self
    }

    /// An additive bias of any float dtype, shapes as for the [mask](Self::mask). It is added to the scaled
    /// and soft-capped logits; -inf masks. Its gradient has its shape: it is summed over the axes along which
    /// it was broadcast.
    pub fn bias(mut self, bias: impl IntoView<'a>) -> Self {
        self.optional.bias = self.tensor(Role::Bias, bias);
        self
    }

    /// ALiBi slopes, `[N]` or `[B, N]`, of any float dtype: `slope * |pos - j|` is taken off the logits
    /// (arXiv 2108.12409). They have no gradient.
    pub fn alibi_slopes(mut self, slopes: impl IntoView<'a>) -> Self {
        self.optional.alibi_slopes = self.tensor(Role::AlibiSlopes, slopes);
        self
    }

    /// Attention sinks, `[N]`, of any float dtype: one extra logit a head that joins the softmax's
    /// denominator only (as in gpt-oss, arXiv 2508.10925). They have a gradient.
    pub fn sinks(mut self, sinks: impl IntoView<'a>) -> Self {
        self.optional.sinks = self.tensor(Role::Sinks, sinks);
        self
    }

    /// How many query rows of each batch row are real, from the first; the others are padding, with output 0.
    /// One number a batch row, each at most `T`: a list of integers, or a tensor of i32, u32 or i64, in host
    /// memory or on the device of the call ([`IntoNumbers`]).
    pub fn query_lengths(mut self, lengths: impl IntoNumbers<'a>) -> Self {
        if let Some(lengths) = self.unbroken(Role::QueryLengths, lengths.into_numbers()) {
            (self.options.query_lengths, self.optional.query_lengths) = lengths.into_lengths();
        }
        self
    }

    /// How many keys and values of each batch row are real, from the first. One number a batch row, each at
    /// most `S`: given as [`query_lengths`](Self::query_lengths) are. What the others hold, NaN included,
    /// reaches nothing.
    ///
    /// Calls whose lengths differ have one [plan](Self::plan): a cache of keys that is filled step by step is
    /// planned once.
    pub fn key_value_lengths(mut self, lengths: impl IntoNumbers<'a>) -> Self {
        if let Some(lengths) = self.unbroken(Role::KeyValueLengths, lengths.into_numbers()) {
            (self.options.key_value_lengths, self.optional.key_value_lengths) = lengths.into_lengths();
        }
        self
    }

    /// Caps logits at `c` by `c * tanh(x / c)` (Gemma 2, arXiv 2408.00118), before the bias; no cap by
    /// default or with `None`.
    pub fn softcap(mut self, softcap: impl Into<Option<f64>>) -> Self {
        self.options.softcap = softcap.into();
        self
    }

    /// Dropout of the probabilities, from the published stream: which ones are kept is a function of seed,
    /// offset and position, the same on every implementation, and [`dropout_mask`](crate::dropout_mask) shows
    /// it. Give each layer and step another [offset](Dropout::with_offset) or seed, and backward those of its
    /// forward.
    pub fn dropout(mut self, dropout: impl Into<Option<Dropout>>) -> Self {
        self.options.dropout = dropout.into();
        self
    }

    /// A tensor of one integer, `[1]` or a scalar, in the place of the seed of the [dropout](Self::dropout),
    /// which the call must have: on a device, a graph that was captured once draws another mask after each
    /// change of it.
    pub fn dropout_seed(mut self, seed: impl IntoView<'a>) -> Self {
        self.optional.dropout_seed = self.one_number(Role::DropoutSeed, seed);
        self
    }

    /// A tensor of one integer, `[1]` or a scalar, in the place of the offset of the
    /// [dropout](Self::dropout), which the call must have.
    pub fn dropout_offset(mut self, offset: impl IntoView<'a>) -> Self {
        self.optional.dropout_offset = self.one_number(Role::DropoutOffset, offset);
        self
    }

    /// The scales of 8-bit keys: a number `x` of a key stands for `scale * x` (`k_scale` or `k_descale` of
    /// other libraries). f32, one for all (`[1]` or a scalar), one for each key/value head, `[K]`, or one for
    /// each head of each sequence, `[B, K]`; in host memory, where NaN and infinities are an error, or on the
    /// device of the call. 1 where none are given.
    ///
    /// Keys and values are of 8 bits where their elements are: both [`F8E4M3`](crate::F8E4M3) or both
    /// [`F8E5M2`](crate::F8E5M2), beside a query of any other float, whose dtype the output has. Such calls
    /// are forward only.
    ///
    /// # Examples
    /// ```
    /// # #[cfg(feature = "cpu")] {
    /// use attention::{Attention, F8E4M3, Float8, Overflow};
    ///
    /// // A cache of 4 tokens, 2 heads of 8, whose numbers spend the range of e4m3.
    /// let cached = vec![0.25f32; 4 * 2 * 8];
    /// let scale = 0.25 / F8E4M3::LARGEST;
    /// let mut bytes = vec![F8E4M3::default(); cached.len()];
    /// let scaled: Vec<f32> = cached.iter().map(|x| x / scale).collect();
    /// F8E4M3::narrow(&scaled, &mut bytes, Overflow::Saturate);
    ///
    /// let (query, cache, scale) = (vec![0.5f32; 4 * 8], (&bytes, [1, 4, 2, 8]), [scale]);
    /// let attention = Attention::new().key_scales((&scale, [1])).value_scales((&scale, [1]));
    /// let out = attention.forward((&query, [1, 1, 4, 8]), cache, cache)?;
    /// assert!(out.as_slice::<f32>().unwrap().iter().all(|x| (x - 0.25).abs() < 1e-6));
    /// # }
    /// # Ok::<(), attention::Error>(())
    /// ```
    #[doc(alias = "k_scale")]
    #[doc(alias = "k_descale")]
    pub fn key_scales(mut self, scales: impl IntoView<'a>) -> Self {
        self.optional.key_scales = self.tensor(Role::KeyScales, scales);
        self
    }

    /// The scales of 8-bit values, as [`key_scales`](Self::key_scales).
    #[doc(alias = "v_scale")]
    #[doc(alias = "v_descale")]
    pub fn value_scales(mut self, scales: impl IntoView<'a>) -> Self {
        self.optional.value_scales = self.tensor(Role::ValueScales, scales);
        self
    }

    /// Asks for bitwise reproducible results: an implementation that cannot give them refuses.
    pub fn deterministic(mut self, deterministic: bool) -> Self {
        self.options.deterministic = deterministic;
        self
    }

    /// Asks for results of each sequence that have the same bits whatever else is in the call and however the
    /// sequence is laid out: dense alone, in a batch, padded with lengths, packed or paged. An implementation
    /// that cannot give them refuses. The gradients of bias and sinks are exempt.
    ///
    /// A server that batches requests as they come gives each request the tokens that it would get alone.
    ///
    /// ```
    /// # #[cfg(feature = "cpu")] {
    /// use attention::{Attention, Tensor};
    ///
    /// let numbers = |count: usize| (0..count).map(|i| (i as f32 * 0.37).sin()).collect::<Vec<_>>();
    /// let [query, key, value] = [2 * 3 * 8, 2 * 5 * 8, 2 * 5 * 8].map(numbers);
    /// let tensor = |data: &[f32], shape: [usize; 4]| Tensor::from_vec(data.to_vec(), shape).unwrap();
    /// let call = Attention::new().batch_invariant(true);
    /// let batch = [tensor(&query, [2, 3, 1, 8]), tensor(&key, [2, 5, 1, 8]), tensor(&value, [2, 5, 1, 8])];
    /// let alone = [
    ///     tensor(&query[..24], [1, 3, 1, 8]),
    ///     tensor(&key[..40], [1, 5, 1, 8]),
    ///     tensor(&value[..40], [1, 5, 1, 8]),
    /// ];
    /// let out = |[query, key, value]: &[Tensor; 3]| call.forward(query, key, value);
    /// let (batch, alone) = (out(&batch)?, out(&alone)?);
    /// assert_eq!(batch.as_slice::<f32>().unwrap()[..24], *alone.as_slice::<f32>().unwrap());
    /// # }
    /// # Ok::<(), attention::Error>(())
    /// ```
    pub fn batch_invariant(mut self, batch_invariant: bool) -> Self {
        self.options.batch_invariant = batch_invariant;
        self
    }

    /// Which gradients backward computes. By default those of query, key and value, and of the bias and the
    /// sinks where the call has them; leave the bias out where it is a constant, its gradient can be large.
    pub fn gradients(mut self, gradients: Gradients) -> Self {
        self.gradients = Some(gradients);
        self
    }

    /// The incoming gradient of the logsumexp, `[B, T, N]`, for backward; forward has no use for it.
    pub fn d_lse(mut self, d_lse: impl IntoView<'a>) -> Self {
        self.d_lse = self.tensor(Role::DLse, d_lse);
        self
    }

    /// Which implementation shall run the call; [`Implementation::Auto`] by default. Takes a name, a list of
    /// names in order of preference, an `Arc` of a backend, a numerics class, or what a stored
    /// [`Choice`](crate::Choice) stands for, from [`Registry::resolve`].
    pub fn implementation(mut self, implementation: impl Into<Implementation>) -> Self {
        self.policy.wanted.implementation = implementation.into();
        self
    }

    /// The implementations to choose from; [`Registry::shared`] by default.
    pub fn registry(mut self, registry: &Registry) -> Self {
        self.policy.registry = Some(registry.clone());
        self
    }

    /// Refuses implementations that need more scratch memory than this: an automatic choice goes past them, a
    /// named one is an error.
    pub fn scratch_limit(mut self, bytes: impl Into<Option<usize>>) -> Self {
        self.policy.wanted.scratch_limit = bytes.into();
        self
    }

    /// Refuses implementations that compute in another numerics class, whichever way they were asked for.
    /// Without it, an automatic choice keeps to the standard class of the dtype (F64, F32, HalfF32), and a
    /// named one may compute in any.
    pub fn numerics(mut self, class: impl Into<Option<NumericsClass>>) -> Self {
        self.policy.wanted.numerics = class.into();
        self
    }

    /// The numbers of this call: scale, softcap, lengths, offsets, dropout, and where the rows of packed and
    /// paged sequences are. A [planned](Self::plan) call takes them as
    /// [`Inputs::data`](crate::core::Inputs::data), since its plan knows only which there are.
    pub fn data(&self) -> CallData<'_> {
        // Taken apart by name, so that a new tensor cannot be forgotten here.
        let OptionalInputs {
            mask: _,
            bias: _,
            alibi_slopes: _,
            sinks: _,
            query_lengths,
            key_value_lengths,
            query_offsets,
            dropout_seed,
            dropout_offset,
            query_starts,
            key_value_starts,
            block_table,
            key_scales,
            value_scales,
        } = self.optional;
        let data = self.options.data();
        CallData {
            query_lengths: query_lengths.or(data.query_lengths),
            key_value_lengths: key_value_lengths.or(data.key_value_lengths),
            query_offsets: query_offsets.or(data.query_offsets),
            dropout_seed,
            dropout_offset,
            query_starts: query_starts.or(data.query_starts),
            key_value_starts: key_value_starts.or(data.key_value_starts),
            block_table,
            key_scales,
            value_scales,
            ..data
        }
    }

    /// The forward problem of these inputs, checked, without the logsumexp. Whatever the order of axes of the
    /// call, the problem's shapes are in that of the core, `[B, T, N, H]`, with the strides of the call's
    /// memory.
    ///
    /// It says which [numbers](Self::data) the call has, and not which they are: calls that differ in them
    /// alone have one problem.
    ///
    /// # Errors
    /// [`Error::Core`] with the [`InvalidCall`], [`Error::Input`], [`Error::MixedRanks`],
    /// [`Error::OtherOrder`].
    pub fn problem<'b>(
        &self,
        query: impl IntoView<'b>,
        key: impl IntoView<'b>,
        value: impl IntoView<'b>,
    ) -> Result<Problem, Error> {
        let operands = self.operands(query, key, value)?;
        operands.with_numbers(self.forward_problem(&operands, false)?)
    }

    /// As [`problem`](Self::problem), with the logsumexp: the problem of
    /// [`forward_with_lse`](Self::forward_with_lse).
    ///
    /// # Errors
    /// As [`problem`](Self::problem).
    pub fn problem_with_lse<'b>(
        &self,
        query: impl IntoView<'b>,
        key: impl IntoView<'b>,
        value: impl IntoView<'b>,
    ) -> Result<Problem, Error> {
        let operands = self.operands(query, key, value)?;
        operands.with_numbers(self.forward_problem(&operands, true)?)
    }

    /// The backward problem of these inputs, checked, with the [gradients](Self::gradients) that backward
    /// would compute.
    ///
    /// # Errors
    /// As [`problem`](Self::problem).
    pub fn backward_problem<'b>(
        &self,
        query: impl IntoView<'b>,
        key: impl IntoView<'b>,
        value: impl IntoView<'b>,
    ) -> Result<Problem, Error> {
        let operands = self.operands(query, key, value)?;
        let builder = operands.problem(&self.options).gradients(self.wanted());
        operands.with_numbers(operands.build(builder.d_lse(self.d_lse.is_some()), &self.options)?)
    }

    /// What would run forward on these inputs, and why: every implementation with its verdict. Plans nothing
    /// ([`explain_planned`](Self::explain_planned) does).
    ///
    /// # Errors
    /// As [`problem`](Self::problem). A problem that nothing serves is no error here.
    pub fn explain<'b>(
        &self,
        query: impl IntoView<'b>,
        key: impl IntoView<'b>,
        value: impl IntoView<'b>,
    ) -> Result<Explanation, Error> {
        let operands = self.operands(query, key, value)?;
        let problem = self.forward_problem(&operands, false)?;
        let notes = hidden_keys(&operands.call(&problem)?);
        Ok(Explanation { notes: notes.into_iter().collect(), ..self.explain_problem(&problem) })
    }

    /// What would run a problem, and why. Of this call, only what concerns the choice counts: implementation,
    /// registry, scratch limit and numerics class.
    pub fn explain_problem(&self, problem: &Problem) -> Explanation {
        self.policy.explain(problem, false)
    }

    /// As [`explain_problem`](Self::explain_problem), with the problem planned as a call plans it: a
    /// candidate that would serve it and fails to plan it is refused, with
    /// [`Cause::Planning`](crate::Cause::Planning) and the reason. Where the implementation works on a
    /// device, it needs the device, and may take as long as the first call.
    pub fn explain_planned(&self, problem: &Problem) -> Explanation {
        self.policy.explain(problem, true)
    }

    /// Plans a problem: chooses the implementation that runs it, and has it do all that calls share. Whoever
    /// holds the plan runs it without a look-up. Of this call, the order of axes counts, and what counts in
    /// [`explain_problem`](Self::explain_problem).
    ///
    /// The plan holds no numbers of this call: no scale, softcap, lengths, offsets or seed. Its calls bring
    /// theirs as [`Inputs::data`](crate::core::Inputs::data), for which there is [`data`](Self::data).
    ///
    /// Every call begins with it, and finds the plan of an earlier one among those that the
    /// [registry](Registry) keeps. An automatic choice goes past an implementation that fails to plan, and a
    /// list to the next of the list; [`AttentionPlan::passed_over`] and a `tracing` event at warn level say
    /// why. What fails once the call runs is the call's error: nothing else is tried then.
    ///
    /// # Errors
    /// [`Error::NoImplementation`], [`Error::UnknownImplementation`], [`Error::NotBuilt`],
    /// [`Error::EmptyList`], or what the one asked for says inside [`Error::Core`]: its refusal, or why it
    /// failed to plan.
    pub fn plan(&self, problem: &Problem) -> Result<AttentionPlan, Error> {
        Ok(AttentionPlan { chosen: self.policy.chosen(problem, || Ok(()))?, order: self.order })
    }

    /// The inputs of a call.
    pub(crate) fn operands<'s, 'b: 's>(
        &'s self,
        query: impl IntoView<'b>,
        key: impl IntoView<'b>,
        value: impl IntoView<'b>,
    ) -> Result<Operands<'s>, Error> {
        if let Some((role, source)) = self.broken.clone() {
            return Err(Error::Input { role, source });
        }
        let OptionalInputs { mask, bias, alibi_slopes, sinks, .. } = self.optional;
        let inputs = Inputs {
            query: input(Role::Query, query)?,
            key: input(Role::Key, key)?,
            value: input(Role::Value, value)?,
            mask,
            bias,
            alibi_slopes,
            sinks,
            data: self.data(),
        };
        Operands::new(self.order, inputs)
    }

    /// The forward problem of these inputs, whose outputs are contiguous in the caller's order.
    pub(crate) fn forward_problem(&self, operands: &Operands<'_>, lse: bool) -> Result<Problem, Error> {
        operands.build(operands.problem(&self.options).lse(lse), &self.options)
    }

    /// The gradients that backward computes where nobody says otherwise.
    pub(crate) fn wanted(&self) -> Gradients {
        let given = |present: bool, gradient| if present { gradient } else { Gradients::NONE };
        self.gradients.unwrap_or(
            Gradients::QKV
                | given(self.optional.bias.is_some(), Gradients::BIAS)
                | given(self.optional.sinks.is_some(), Gradients::SINKS),
        )
    }

    fn tensor(&mut self, role: Role, tensor: impl IntoView<'a>) -> Option<View<'a>> {
        self.unbroken(role, tensor.into_view())
    }

    /// A tensor of one number, of which a scalar is one.
    fn one_number(&mut self, role: Role, tensor: impl IntoView<'a>) -> Option<View<'a>> {
        let view = tensor.into_view();
        let view = view.and_then(|view| if view.shape().rank() == 0 { view.unsqueeze() } else { Ok(view) });
        self.unbroken(role, view)
    }

    /// What was given, or `None` with the error kept for the call.
    pub(crate) fn unbroken<T>(&mut self, role: Role, given: Result<T, InvalidCall>) -> Option<T> {
        match given {
            Ok(given) => Some(given),
            Err(error) => {
                self.broken.get_or_insert((role, error));
                None
            }
        }
    }
}
