//! A small decoder: RMS norms, rotary positions, grouped-query attention, SwiGLU.

use candle_core::{D, DType, Device, Result, Tensor};
use candle_nn::{ops, rotary_emb};

/// Sizes of the model.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sizes {
    pub(crate) vocabulary: usize,
    pub(crate) width: usize,
    pub(crate) heads: usize,
    pub(crate) key_heads: usize,
    pub(crate) head_dim: usize,
    pub(crate) hidden: usize,
    pub(crate) layers: usize,
    /// The most tokens of a sequence.
    pub(crate) longest: usize,
}

pub(crate) struct Model {
    pub(crate) sizes: Sizes,
    embedding: Tensor,
    layers: Vec<Layer>,
    norm: Tensor,
    head: Linear,
    /// Cosines and sines of each position, `[longest, head_dim / 2]`.
    rotary: [Tensor; 2],
}

struct Layer {
    norm: Tensor,
    query: Linear,
    key: Linear,
    value: Linear,
    output: Linear,
    wide_norm: Tensor,
    gate: Linear,
    up: Linear,
    down: Linear,
}

/// What computes the attention of a layer: its number, queries `[rows, N, H]`, keys and values `[rows, K,
/// H]`.
pub(crate) type Attend<'a> = &'a mut dyn FnMut(usize, &Tensor, &Tensor, &Tensor) -> Result<Tensor>;

impl Model {
    /// With the same random numbers for the same seed, whatever the device, rounded to a dtype.
    pub(crate) fn random(sizes: Sizes, seed: u64, dtype: DType, device: &Device) -> Result<Self> {
        let random = &mut Random { state: seed, dtype, device: device.clone() };
        let Sizes { vocabulary, width, heads, key_heads, head_dim, hidden, longest, .. } = sizes;
        let ones = || Tensor::ones(width, dtype, device);
        let layers = (0..sizes.layers).map(|_| {
            let mut linear = |from, to| Linear::random([from, to], random);
            Ok(Layer {
                norm: ones()?,
                query: linear(width, heads * head_dim)?,
                key: linear(width, key_heads * head_dim)?,
                value: linear(width, key_heads * head_dim)?,
                output: linear(heads * head_dim, width)?,
                wide_norm: ones()?,
                gate: linear(width, hidden)?,
                up: linear(width, hidden)?,
                down: linear(hidden, width)?,
            })
        });
        let layers = layers.collect::<Result<Vec<_>>>()?;
        let angle = |position: usize, pair: usize| {
            position as f64 * 10_000f64.powf(-2.0 * pair as f64 / head_dim as f64)
        };
        let rotary = [f64::cos, f64::sin].map(|of: fn(f64) -> f64| {
            let half = head_dim / 2;
            let numbers = (0..longest * half).map(|at| of(angle(at / half, at % half)) as f32).collect();
            Tensor::from_vec::<_, f32>(numbers, (longest, half), device)?.to_dtype(dtype)
        });
        let [cosines, sines] = rotary;
        Ok(Self {
            sizes,
            embedding: random.normal([vocabulary, width], 1.0)?,
            layers,
            norm: ones()?,
            head: Linear::random([width, vocabulary], random)?,
            rotary: [cosines?, sines?],
        })
    }

    pub(crate) fn device(&self) -> &Device {
        self.embedding.device()
    }

    pub(crate) fn dtype(&self) -> DType {
        self.embedding.dtype()
    }

    /// The likeliest token after each of `asked`, which are rows of `tokens`. Token `i` stands at position
    /// `positions[i]` of its sequence; which rows are of one sequence, `attend` knows alone.
    pub(crate) fn next(
        &self,
        tokens: &[u32],
        positions: &[u32],
        asked: &[u32],
        attend: Attend<'_>,
    ) -> Result<Vec<u32>> {
        let list = |numbers: &[u32]| Tensor::from_slice(numbers, numbers.len(), self.device());
        let positions = list(positions)?;
        let [cosines, sines] = &self.rotary;
        let rotary = [cosines.index_select(&positions, 0)?, sines.index_select(&positions, 0)?];
        let mut states = self.embedding.index_select(&list(tokens)?, 0)?;
        for (index, layer) in self.layers.iter().enumerate() {
            let normed = ops::rms_norm(&states, &layer.norm, EPSILON)?;
            let (query, key, value) = self.operands(layer, &normed, &rotary)?;
            let attended = attend(index, &query, &key, &value)?.flatten_from(1)?;
            states = (states + layer.output.forward(&attended)?)?;
            let normed = ops::rms_norm(&states, &layer.wide_norm, EPSILON)?;
            let gated = (ops::silu(&layer.gate.forward(&normed)?)? * layer.up.forward(&normed)?)?;
            states = (states + layer.down.forward(&gated)?)?;
        }
        let states = states.index_select(&list(asked)?, 0)?;
        let logits = self.head.forward(&ops::rms_norm(&states, &self.norm, EPSILON)?)?;
        logits.argmax(D::Minus1)?.to_vec1()
    }

    /// Queries, keys and values of a layer, the first two at their positions.
    fn operands(
        &self,
        layer: &Layer,
        normed: &Tensor,
        [cosines, sines]: &[Tensor; 2],
    ) -> Result<(Tensor, Tensor, Tensor)> {
        let Sizes { heads, key_heads, head_dim, .. } = self.sizes;
        let rows = normed.dim(0)?;
        let turned = |linear: &Linear, heads: usize| {
            let rows = linear.forward(normed)?.reshape((1, rows, heads, head_dim))?;
            rotary_emb::rope_thd(&rows, cosines, sines)?.squeeze(0)
        };
        let value = layer.value.forward(normed)?.reshape((rows, key_heads, head_dim))?;
        Ok((turned(&layer.query, heads)?, turned(&layer.key, key_heads)?, value))
    }
}

const EPSILON: f32 = 1e-5;

/// How many rows every product of a linear layer has.
const ROWS: usize = 4;

/// A linear layer without a bias.
struct Linear {
    /// `[from, to]`.
    weight: Tensor,
}

impl Linear {
    fn random([from, to]: [usize; 2], random: &mut Random) -> Result<Self> {
        Ok(Self { weight: random.normal([from, to], (from as f64).powf(-0.5))? })
    }

    /// `[rows, from]` to `[rows, to]`, in products of [`ROWS`] rows each, the last one filled up with zeros.
    ///
    /// Candle's `matmul` picks its kernel by the number of rows, and a row has the last bits of the kernel:
    /// with candle 0.11.1 on the CPU and the layout of `candle_nn::Linear`, most elements of a row alone are
    /// others than those of the same row among two. With one product for all rows, what a request gets would
    /// depend on who else is served. Products of one shape are of one kernel.
    fn forward(&self, states: &Tensor) -> Result<Tensor> {
        let rows = states.dim(0)?;
        let filled = states.pad_with_zeros(0, 0, rows.next_multiple_of(ROWS) - rows)?.contiguous()?;
        let blocks = (0..filled.dim(0)? / ROWS)
            .map(|block| filled.narrow(0, block * ROWS, ROWS)?.matmul(&self.weight))
            .collect::<Result<Vec<_>>>()?;
        Tensor::cat(&blocks, 0)?.narrow(0, 0, rows)?.contiguous()
    }
}

/// SplitMix64 (Steele, Lea and Flood 2014): candle's CPU device takes no seed.
struct Random {
    state: u64,
    /// Of the tensors.
    dtype: DType,
    device: Device,
}

impl Random {
    fn uniform(&mut self) -> f64 {
        self.state = self.state.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.state;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        ((z ^ (z >> 31)) >> 11) as f64 / (1u64 << 53) as f64
    }

    /// Nearly normal: sums of twelve uniform numbers.
    fn normal(&mut self, [rows, columns]: [usize; 2], deviation: f64) -> Result<Tensor> {
        let mut number = || ((0..12).map(|_| self.uniform()).sum::<f64>() - 6.0) * deviation;
        let numbers: Vec<f32> = (0..rows * columns).map(|_| number() as f32).collect();
        Tensor::from_vec(numbers, (rows, columns), &self.device)?.to_dtype(self.dtype)
    }
}
