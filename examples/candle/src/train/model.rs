//! A small transformer over characters, with attention of this library's or of candle's own operations.

use attention::core::{CallData, CallProblem, DType as Float, Problem, TensorDesc};
use attention_candle::{Attention, Dropout};
use candle_core::{D, DType, Device, Result, Tensor};
use candle_nn::{Embedding, Init, Linear, Module, VarBuilder, VarMap, embedding, linear, loss, ops};

/// Who computes attention.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum By {
    /// `attention-candle`.
    Us,
    /// candle: products, a mask of -inf, a softmax, the same dropout bits as a tensor.
    Candle,
}

/// Sizes of the model.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sizes {
    pub(crate) characters: usize,
    pub(crate) context: usize,
    pub(crate) width: usize,
    pub(crate) heads: usize,
    pub(crate) layers: usize,
}

pub(crate) struct Model {
    pub(crate) variables: VarMap,
    characters: Embedding,
    positions: Embedding,
    layers: Vec<Layer>,
    norm: Norm,
    head: Linear,
    by: By,
}

struct Layer {
    norm: Norm,
    qkv: Linear,
    output: Linear,
    wide_norm: Norm,
    up: Linear,
    down: Linear,
    heads: usize,
}

/// Layer normalisation. Not candle's own layer, which has no gradients where its input is contiguous.
struct Norm {
    weight: Tensor,
    bias: Tensor,
}

impl Norm {
    fn new(width: usize, builder: VarBuilder<'_>) -> Result<Self> {
        Ok(Self {
            weight: builder.get_with_hints(width, "weight", Init::Const(1.0))?,
            bias: builder.get_with_hints(width, "bias", Init::Const(0.0))?,
        })
    }

    fn forward(&self, states: &Tensor) -> Result<Tensor> {
        ops::layer_norm_slow(states, &self.weight, &self.bias, 1e-5)
    }
}

impl Model {
    /// With the same numbers for the same seed, whatever the device and whoever computes attention.
    pub(crate) fn new(sizes: Sizes, by: By, seed: u64, device: &Device) -> Result<Self> {
        let variables = VarMap::new();
        let builder = VarBuilder::from_varmap(&variables, DType::F32, device);
        let Sizes { characters, context, width, heads, layers } = sizes;
        let layer = |index: usize| -> Result<Layer> {
            let builder = builder.pp("layer").pp(index);
            Ok(Layer {
                norm: Norm::new(width, builder.pp("norm"))?,
                qkv: linear(width, 3 * width, builder.pp("qkv"))?,
                output: linear(width, width, builder.pp("output"))?,
                wide_norm: Norm::new(width, builder.pp("wide_norm"))?,
                up: linear(width, 4 * width, builder.pp("up"))?,
                down: linear(4 * width, width, builder.pp("down"))?,
                heads,
            })
        };
        let model = Self {
            characters: embedding(characters, width, builder.pp("characters"))?,
            positions: embedding(context, width, builder.pp("positions"))?,
            layers: (0..layers).map(layer).collect::<Result<_>>()?,
            norm: Norm::new(width, builder.pp("norm"))?,
            head: linear(width, characters, builder.pp("head"))?,
            variables,
            by,
        };
        model.initialise(seed)?;
        Ok(model)
    }

    /// Numbers around 0 for matrices, 0 for biases; what norms have stays.
    fn initialise(&self, seed: u64) -> Result<()> {
        let variables = self.variables.data().lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let mut names: Vec<&String> = variables.keys().collect();
        names.sort();
        let mut random = Random::new(seed);
        for name in names.into_iter().filter(|name| !name.contains("norm")) {
            let variable = &variables[name];
            let spread = if variable.rank() == 1 { 0.0 } else { 0.1 };
            let numbers: Vec<f32> =
                (0..variable.elem_count()).map(|_| spread * (2.0 * random.uniform() - 1.0) as f32).collect();
            variable.set(&Tensor::from_vec(numbers, variable.dims(), variable.device())?)?;
        }
        Ok(())
    }

    /// The mean cross-entropy of the characters after those of `text`, `[B, T]`; `dropout` is of the first
    /// layer.
    pub(crate) fn loss(&self, text: &Tensor, next: &Tensor, dropout: Option<Dropout>) -> Result<Tensor> {
        let positions = Tensor::arange(0, u32::try_from(text.dim(1)?)?, text.device())?;
        let characters = self.characters.forward(text)?;
        let mut states = characters.broadcast_add(&self.positions.forward(&positions)?)?;
        for (layer, index) in self.layers.iter().zip(0..) {
            let dropout = dropout.map(|dropout| dropout.with_offset(dropout.offset + index));
            states = layer.forward(&states, dropout, self.by)?;
        }
        let logits = self.head.forward(&self.norm.forward(&states)?)?;
        loss::cross_entropy(&logits.flatten_to(1)?, &next.flatten_all()?)
    }

    /// How many layers.
    pub(crate) fn depth(&self) -> u32 {
        self.layers.len() as u32
    }
}

impl Layer {
    fn forward(&self, states: &Tensor, dropout: Option<Dropout>, by: By) -> Result<Tensor> {
        let (rows, characters, width) = states.dims3()?;
        let qkv = self.qkv.forward(&self.norm.forward(states)?)?;
        let qkv = qkv.reshape((rows, characters, 3, self.heads, width / self.heads))?;
        // Views of the projection's result.
        let part = |index| qkv.narrow(2, index, 1)?.squeeze(2);
        let (query, key, value) = (part(0)?, part(1)?, part(2)?);
        let mixed = match by {
            By::Us => Attention::btnh().causal(true).dropout(dropout).forward(&query, &key, &value)?,
            By::Candle => by_candle(&query, &key, &value, dropout)?,
        };
        let states = (states + self.output.forward(&mixed.reshape((rows, characters, width))?)?)?;
        let wide = self.up.forward(&self.wide_norm.forward(&states)?)?.gelu_erf()?;
        states + self.down.forward(&wide)?
    }
}

/// Causal attention with dropout of candle's own operations, on `[B, T, N, H]`.
fn by_candle(query: &Tensor, key: &Tensor, value: &Tensor, dropout: Option<Dropout>) -> Result<Tensor> {
    let (rows, characters, heads, width) = query.dims4()?;
    let device = query.device();
    let in_heads = |tensor: &Tensor| tensor.transpose(1, 2)?.contiguous();
    let (query, key, value) = (in_heads(query)?, in_heads(key)?, in_heads(value)?);
    let logits = (query.matmul(&key.t()?)? / (width as f64).sqrt())?;
    let allowed: Vec<u8> =
        (0..characters * characters).map(|at| u8::from(at % characters <= at / characters)).collect();
    let allowed =
        Tensor::from_vec(allowed, (characters, characters), device)?.broadcast_as(logits.shape())?;
    let masked = Tensor::new(f32::NEG_INFINITY, device)?.broadcast_as(logits.shape())?;
    let mut probabilities = ops::softmax(&allowed.where_cond(&logits, &masked)?, D::Minus1)?;
    if let Some(dropout) = dropout {
        let desc = TensorDesc::contiguous(Float::F32, [rows, characters, heads, width]);
        let data = CallData { dropout: Some(dropout), ..CallData::default() };
        let problem = Problem::builder(desc, desc, desc).data(&data).build();
        let problem = problem.map_err(candle_core::Error::wrap)?;
        let call = CallProblem::new(&problem, &data).map_err(candle_core::Error::wrap)?;
        let scale = call.dropout_stream().map_or(1.0, |stream| stream.keep_scale()) as f32;
        let keep = attention::dropout_mask(&call).map_err(candle_core::Error::wrap)?.unwrap_or_default();
        let keep: Vec<f32> = keep.into_iter().map(|keep| if keep { scale } else { 0.0 }).collect();
        probabilities = (probabilities * Tensor::from_vec(keep, logits.dims(), device)?)?;
    }
    probabilities.matmul(&value)?.transpose(1, 2)?.contiguous()
}

/// SplitMix64 (Steele, Lea and Flood, "Fast Splittable Pseudorandom Number Generators", 2014).
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// In [0, 1).
    pub(crate) fn uniform(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1u64 << 53) as f64
    }
}
