//! The builder.

use attention::{Dropout, NumericsClass, QueryOffset, Window};
use candle_core::Tensor;

use crate::{AxisOrder, Implementation, Numbers, Options, Registry};

/// A call of scaled dot-product attention on candle's tensors, apart from its query, key and value.
///
/// Outputs are part of candle's graph: [`Tensor::backward`] reaches query, key, value, bias and sinks.
///
/// # Shapes
/// | tensor | [`Attention::bnth`] | [`Attention::btnh`] | dtype |
/// |---|---|---|---|
/// | query | `[B, N, T, H]` | `[B, T, N, H]` | f64, f32, f16, bf16 |
/// | key | `[B, K, S, H]` | `[B, S, K, H]` | the query's |
/// | value | `[B, K, S, Hv]` | `[B, S, K, Hv]` | the query's |
/// | output | `[B, N, T, Hv]` | `[B, T, N, Hv]` | the query's |
/// | logsumexp | `[B, N, T]` | `[B, T, N]` | f32, f64 for f64 |
/// | mask | 1 to 4 axes, right-aligned to `[B, N, T, S]`, each 1 or full | the same | u8 |
/// | bias | as the mask | the same | any of the four, independent of the query's |
/// | ALiBi slopes | `[N]` or `[B, N]` | the same | any of the four |
/// | sinks | `[N]` | the same | any of the four |
/// | lengths, offsets by batch row | `[B]` | the same | u32, i32 or i64 |
///
/// Sequences that lie behind one another without padding, `[total, N, H]`: see [`packed`](Self::packed). Keys
/// and values in pages, `[pages, page_size, K, H]`: see [`paged`](Self::paged).
///
/// All without `B` where query, key and value are. `N` is a multiple of `K`: each group of `N / K` query
/// heads shares a key/value head, so `repeat_kv` is not needed. Every tensor may have any layout that candle
/// gives it: transposed, narrowed, broadcast; nothing is made contiguous. Results are contiguous.
///
/// # Semantics
/// Those of [`attention::Problem`]; `docs/semantics.md` has them beside those of other libraries. A mask's 1
/// takes part, and a row with nothing to attend to has output 0.
///
/// # Examples
/// ```
/// use attention_candle::Attention;
/// use candle_core::{DType, Device, Tensor, Var};
///
/// // 2 sentences of at most 6 tokens, 8 query heads on 2 key/value heads; the second sentence has 4 tokens.
/// let query = Var::randn(0f32, 1f32, (2, 8, 6, 16), &Device::Cpu)?;
/// let key = Var::randn(0f32, 1f32, (2, 2, 6, 16), &Device::Cpu)?;
/// let value = Var::randn(0f32, 1f32, (2, 2, 6, 16), &Device::Cpu)?;
/// let attention = Attention::bnth().causal(true).query_lengths([6, 4]).key_value_lengths([6, 4]);
/// let out = attention.forward(&query, &key, &value)?;
/// assert_eq!(out.dims(), [2, 8, 6, 16]);
///
/// let gradients = out.sqr()?.sum_all()?.backward()?;
/// assert_eq!(gradients.get(&key).unwrap().dims(), key.dims());
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Clone, Debug)]
#[must_use = "a call does nothing until `forward`"]
pub struct Attention {
    /// Options that are no tensors, the order of axes, and which implementation shall run.
    pub(crate) call: attention::Attention<'static>,
    pub(crate) mask: Option<Tensor>,
    pub(crate) bias: Option<Tensor>,
    pub(crate) alibi_slopes: Option<Tensor>,
    pub(crate) sinks: Option<Tensor>,
    pub(crate) numbers: NumberTensors,
    pub(crate) registry: Option<Registry>,
    pub(crate) recompute: bool,
}

/// Numbers of a call that were given as tensors; they take the place of those of the options.
#[derive(Clone, Debug, Default)]
pub(crate) struct NumberTensors {
    pub(crate) query_lengths: Option<Tensor>,
    pub(crate) key_value_lengths: Option<Tensor>,
    pub(crate) query_offsets: Option<Tensor>,
    pub(crate) dropout_seed: Option<Tensor>,
    pub(crate) dropout_offset: Option<Tensor>,
    pub(crate) query_starts: Option<Tensor>,
    pub(crate) key_value_starts: Option<Tensor>,
    /// Has no place in the options.
    pub(crate) block_table: Option<Tensor>,
}

impl Attention {
    /// A call on tensors with heads before the sequence, `[B, N, T, H]`, with every option at its default.
    pub fn bnth() -> Self {
        Self::new(AxisOrder::Bnth)
    }

    /// A call on tensors with the sequence before heads, `[B, T, N, H]`, with every option at its default.
    pub fn btnh() -> Self {
        Self::new(AxisOrder::Btnh)
    }

    /// A call on tensors with this order of axes, with every option at its default: scale `1 / sqrt(H)`,
    /// nothing masked.
    pub fn new(order: AxisOrder) -> Self {
        Self {
            call: attention::Attention::new().axis_order(order),
            mask: None,
            bias: None,
            alibi_slopes: None,
            sinks: None,
            numbers: NumberTensors::default(),
            registry: None,
            recompute: false,
        }
    }

    pub(crate) fn with(
        self,
        change: impl FnOnce(attention::Attention<'static>) -> attention::Attention<'static>,
    ) -> Self {
        Self { call: change(self.call), ..self }
    }

    /// Replaces all options that are no tensors. Lengths, offsets and the like that were given as tensors
    /// stay, and go before those of the options.
    pub fn options(self, options: Options) -> Self {
        self.with(|call| call.options(options))
    }

    /// What the products of query and key are multiplied by; `1 / sqrt(H)` by default or with `None`.
    pub fn scale(self, scale: impl Into<Option<f64>>) -> Self {
        self.with(|call| call.scale(scale))
    }

    /// Masks keys after the position of the query row, `j > t + offset`. With `T != S`, mind
    /// [`query_offset`](Self::query_offset): it is top-left by default.
    pub fn causal(self, causal: bool) -> Self {
        self.with(|call| call.causal(causal))
    }

    /// Where query row `t` stands among the keys, `pos = t + offset`: a [`QueryOffset`], or a number, of a
    /// decoder that of its cached keys.
    pub fn query_offset(mut self, offset: impl Into<QueryOffset>) -> Self {
        self.numbers.query_offsets = None;
        self.with(|call| call.query_offset(offset))
    }

    /// An offset for each batch row, in the place of [`query_offset`](Self::query_offset): a list of integers
    /// or a tensor.
    pub fn query_offsets(mut self, offsets: impl Into<Numbers>) -> Self {
        let (list, tensor) = offsets.into().apart();
        self.numbers.query_offsets = tensor;
        self.with(|call| call.query_offsets(list))
    }

    /// A sliding window: only keys `pos - left ..= pos + right` take part; no bounds by default.
    /// `Window::new(127, 0)` is the 128 keys up to the row's own.
    pub fn window(self, window: Window) -> Self {
        self.with(|call| call.window(window))
    }

    /// A mask of u8, as candle's comparisons give it: 0 is masked, anything else takes part. 1 to 4 axes,
    /// right-aligned to `[B, N, T, S]`, each 1 or full.
    pub fn mask(mut self, mask: &Tensor) -> Self {
        self.mask = Some(mask.clone());
        self
    }

    /// An additive bias, shapes as for the [mask](Self::mask), added to the scaled and capped logits; -inf
    /// masks. It gets a gradient where it is a variable or comes from one.
    pub fn bias(mut self, bias: &Tensor) -> Self {
        self.bias = Some(bias.clone());
        self
    }

    /// ALiBi slopes, `[N]` or `[B, N]`: `slope * |pos - j|` is taken off the logits. They have no gradient.
    pub fn alibi_slopes(mut self, slopes: &Tensor) -> Self {
        self.alibi_slopes = Some(slopes.clone());
        self
    }

    /// Attention sinks, `[N]`: one extra logit a head that joins the softmax's denominator only. They get a
    /// gradient as the [bias](Self::bias) does.
    pub fn sinks(mut self, sinks: &Tensor) -> Self {
        self.sinks = Some(sinks.clone());
        self
    }

    /// How many query rows of each batch row are real, from the first; the others are padding, with output 0.
    /// A list of integers, or a tensor of u32, i32 or i64 ([`Numbers`]).
    pub fn query_lengths(mut self, lengths: impl Into<Numbers>) -> Self {
        let (list, tensor) = lengths.into().apart();
        self.numbers.query_lengths = tensor;
        self.with(|call| call.query_lengths(list))
    }

    /// How many keys and values of each batch row are real, from the first: given as
    /// [`query_lengths`](Self::query_lengths) are. What the others hold, NaN included, reaches nothing.
    ///
    /// # Examples
    /// ```
    /// use attention_candle::Attention;
    /// use candle_core::{Device, Tensor};
    ///
    /// let query = Tensor::zeros((2, 4, 1, 8), candle_core::DType::F32, &Device::Cpu)?;
    /// let cache = Tensor::randn(0f32, 1f32, (2, 4, 32, 8), &Device::Cpu)?;
    /// let filled = Tensor::new(&[7u32, 12], &Device::Cpu)?;
    /// let out = Attention::bnth().key_value_lengths(&filled).forward(&query, &cache, &cache)?;
    /// // Equal logits: the mean of the keys that are real.
    /// let mean = cache.narrow(2, 0, 7)?.mean_keepdim(2)?;
    /// assert!((out - mean)?.get(0)?.abs()?.max_all()?.to_scalar::<f32>()? < 1e-6);
    /// # Ok::<(), candle_core::Error>(())
    /// ```
    pub fn key_value_lengths(mut self, lengths: impl Into<Numbers>) -> Self {
        let (list, tensor) = lengths.into().apart();
        self.numbers.key_value_lengths = tensor;
        self.with(|call| call.key_value_lengths(list))
    }

    /// Caps logits at `c` by `c * tanh(x / c)`, before the bias.
    pub fn softcap(self, softcap: impl Into<Option<f64>>) -> Self {
        self.with(|call| call.softcap(softcap))
    }

    /// Dropout of the probabilities, from the published stream: the same bits on every device. Give each
    /// layer and step another [offset](Dropout::with_offset) or seed.
    pub fn dropout(self, dropout: impl Into<Option<Dropout>>) -> Self {
        self.with(|call| call.dropout(dropout))
    }

    /// A tensor of one integer (u32, i32 or i64), `[1]` or a scalar, in the place of the seed of the
    /// [dropout](Self::dropout), which the call must have.
    pub fn dropout_seed(mut self, seed: &Tensor) -> Self {
        self.numbers.dropout_seed = Some(seed.clone());
        self
    }

    /// A tensor of one integer, as [`dropout_seed`](Self::dropout_seed), in the place of the offset of the
    /// [dropout](Self::dropout).
    pub fn dropout_offset(mut self, offset: &Tensor) -> Self {
        self.numbers.dropout_offset = Some(offset.clone());
        self
    }

    /// Asks for bitwise reproducible results: an implementation that cannot give them refuses.
    pub fn deterministic(self, deterministic: bool) -> Self {
        self.with(|call| call.deterministic(deterministic))
    }

    /// Asks for results of each sequence that have the same bits whatever else is in the call and however the
    /// sequence is laid out; see [`attention::Attention::batch_invariant`].
    pub fn batch_invariant(self, batch_invariant: bool) -> Self {
        self.with(|call| call.batch_invariant(batch_invariant))
    }

    /// Keeps no logsumexp for backward, which then runs forward again: `B T N` numbers less memory for the
    /// time of one more forward call.
    pub fn recompute(mut self, recompute: bool) -> Self {
        self.recompute = recompute;
        self
    }

    /// Which implementation shall run the call; the first that can by default. Takes a name, a list of names
    /// in order of preference, an `Arc` of a backend, or a numerics class.
    pub fn implementation(self, implementation: impl Into<Implementation>) -> Self {
        self.with(|call| call.implementation(implementation))
    }

    /// The implementations to choose from. By default those of this build; on CUDA, on the stream of the
    /// tensors' device.
    pub fn registry(mut self, registry: &Registry) -> Self {
        self.registry = Some(registry.clone());
        self
    }

    /// Refuses implementations that need more scratch memory than this.
    pub fn scratch_limit(self, bytes: impl Into<Option<usize>>) -> Self {
        self.with(|call| call.scratch_limit(bytes))
    }

    /// Refuses implementations that compute in another numerics class.
    pub fn numerics(self, class: impl Into<Option<NumericsClass>>) -> Self {
        self.with(|call| call.numerics(class))
    }
}
