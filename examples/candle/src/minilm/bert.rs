//! BERT, with attention of candle's own operations or of this library's.

use attention_candle::Attention;
use candle_core::{D, DType, Module, Result, Tensor};
use candle_nn::{Embedding, LayerNorm, Linear, VarBuilder, embedding, layer_norm, linear, ops};
use candle_transformers::models::bert::Config;

/// Who computes attention.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum By {
    /// `attention-candle`.
    Us,
    /// candle: products, an added mask and a softmax, as in its BERT.
    Candle,
}

/// A batch of token ids, padded at the end.
pub(crate) struct Batch {
    /// `[B, T]`.
    pub(crate) ids: Tensor,
    /// Tokens of each sentence.
    pub(crate) lengths: Vec<usize>,
}

impl Batch {
    /// 1 at tokens, 0 at padding: `[B, T]`.
    pub(crate) fn mask(&self) -> Result<Tensor> {
        let (batch, width) = self.ids.dims2()?;
        let mask: Vec<u8> = (self.lengths.iter())
            .flat_map(|&length| (0..width).map(move |token| u8::from(token < length)))
            .collect();
        Tensor::from_vec(mask, (batch, width), self.ids.device())
    }

    /// The mean over the tokens of each sentence, of length 1: what the model calls its embedding.
    pub(crate) fn embeddings(&self, states: &Tensor) -> Result<Tensor> {
        let mask = self.mask()?.to_dtype(states.dtype())?.unsqueeze(2)?;
        let sums = states.broadcast_mul(&mask)?.sum(1)?;
        let means = sums.broadcast_div(&mask.sum(1)?)?;
        means.broadcast_div(&means.sqr()?.sum_keepdim(D::Minus1)?.sqrt()?)
    }
}

pub(crate) struct Bert {
    words: Embedding,
    positions: Embedding,
    types: Embedding,
    norm: LayerNorm,
    layers: Vec<Layer>,
}

struct Layer {
    heads: usize,
    query: Linear,
    key: Linear,
    value: Linear,
    output: Linear,
    output_norm: LayerNorm,
    up: Linear,
    down: Linear,
    down_norm: LayerNorm,
}

impl Bert {
    pub(crate) fn load(weights: VarBuilder<'_>, config: &Config) -> Result<Self> {
        let width = config.hidden_size;
        let embeddings = weights.pp("embeddings");
        let norm = |weights| layer_norm(width, config.layer_norm_eps, weights);
        let layer = |index: usize| -> Result<Layer> {
            let layer = weights.pp("encoder.layer").pp(index);
            let attention = layer.pp("attention");
            let (of_self, output) = (attention.pp("self"), attention.pp("output"));
            Ok(Layer {
                heads: config.num_attention_heads,
                query: linear(width, width, of_self.pp("query"))?,
                key: linear(width, width, of_self.pp("key"))?,
                value: linear(width, width, of_self.pp("value"))?,
                output: linear(width, width, output.pp("dense"))?,
                output_norm: norm(output.pp("LayerNorm"))?,
                up: linear(width, config.intermediate_size, layer.pp("intermediate.dense"))?,
                down: linear(config.intermediate_size, width, layer.pp("output.dense"))?,
                down_norm: norm(layer.pp("output.LayerNorm"))?,
            })
        };
        Ok(Self {
            words: embedding(config.vocab_size, width, embeddings.pp("word_embeddings"))?,
            positions: embedding(
                config.max_position_embeddings,
                width,
                embeddings.pp("position_embeddings"),
            )?,
            types: embedding(config.type_vocab_size, width, embeddings.pp("token_type_embeddings"))?,
            norm: norm(embeddings.pp("LayerNorm"))?,
            layers: (0..config.num_hidden_layers).map(layer).collect::<Result<_>>()?,
        })
    }

    /// `[B, T, width]`.
    pub(crate) fn forward(&self, batch: &Batch, by: By) -> Result<Tensor> {
        let (ids, device) = (&batch.ids, batch.ids.device());
        let positions = Tensor::arange(0, u32::try_from(ids.dim(1)?)?, device)?;
        let types = self.types.forward(&ids.zeros_like()?)?;
        let words = (self.words.forward(ids)? + types)?;
        let mut states = self.norm.forward(&words.broadcast_add(&self.positions.forward(&positions)?)?)?;
        for layer in &self.layers {
            states = layer.forward(&states, batch, by)?;
        }
        Ok(states)
    }
}

impl Layer {
    fn forward(&self, states: &Tensor, batch: &Batch, by: By) -> Result<Tensor> {
        let (rows, tokens, width) = states.dims3()?;
        let heads =
            |linear: &Linear| linear.forward(states)?.reshape((rows, tokens, self.heads, width / self.heads));
        let (query, key, value) = (heads(&self.query)?, heads(&self.key)?, heads(&self.value)?);
        let mixed = match by {
            By::Us => Attention::btnh()
                .query_lengths(&batch.lengths)
                .key_value_lengths(&batch.lengths)
                .forward(&query, &key, &value)?,
            By::Candle => by_candle(&query, &key, &value, &batch.mask()?)?,
        };
        let mixed = self.output.forward(&mixed.reshape((rows, tokens, width))?)?;
        let states = self.output_norm.forward(&(mixed + states)?)?;
        let wide = self.down.forward(&self.up.forward(&states)?.gelu_erf()?)?;
        self.down_norm.forward(&(wide + states)?)
    }
}

/// What candle's BERT does, operation by operation, on `[B, T, N, H]`; `mask` is `[B, T]`.
pub(crate) fn by_candle(query: &Tensor, key: &Tensor, value: &Tensor, mask: &Tensor) -> Result<Tensor> {
    let heads = |tensor: &Tensor| tensor.transpose(1, 2)?.contiguous();
    let (query, key, value) = (heads(query)?, heads(key)?, heads(value)?);
    let mask = mask.unsqueeze(1)?.unsqueeze(2)?.to_dtype(DType::F32)?;
    let mask = ((1.0 - mask)? * f64::from(f32::MIN))?;
    let logits = (query.matmul(&key.t()?)? / (query.dim(3)? as f64).sqrt())?;
    let probabilities = ops::softmax(&logits.broadcast_add(&mask)?, D::Minus1)?;
    probabilities.matmul(&value)?.transpose(1, 2)?.contiguous()
}
