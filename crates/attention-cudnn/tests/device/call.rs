//! Calls of attention whose tensors are in host memory, and their reference results.

use attention_core::{
    AttentionBackend, BackwardCall, BackwardInputs, BackwardOutputs, DType, Device, ForwardCall,
    ForwardOutputs, Gradients, Inputs, Scratch,
};

use crate::Result;
use crate::data::{Data, numbers};

/// Sizes of a call: batch, queries, keys, query heads, key/value heads, head dimension.
pub(crate) type Sizes = [usize; 6];

/// A call on host memory.
pub(crate) struct Call {
    pub(crate) sizes: Sizes,
    pub(crate) dtype: DType,
    pub(crate) causal: bool,
    /// [1, 1, T, S], or [1, 1, 1, S].
    pub(crate) bias: Option<(Data, [usize; 4])>,
    pub(crate) operands: [Data; 4],
}

/// Output, logsumexp, and gradients of queries, keys and values.
pub(crate) struct Results {
    pub(crate) out: Data,
    pub(crate) lse: Data,
    pub(crate) gradients: Option<[Data; 3]>,
}

impl Call {
    pub(crate) fn new(dtype: DType, sizes: Sizes, causal: bool, seed: u32) -> Self {
        let [b, t, s, n, k, h] = sizes;
        let of = |index: u32, count: usize| Data::repeating(dtype, &numbers(seed + index, count), count);
        let operands =
            [of(0, b * t * n * h), of(1, b * s * k * h), of(2, b * s * k * h), of(3, b * t * n * h)];
        Self { sizes, dtype, causal, bias: None, operands }
    }

    pub(crate) fn run(&self, backend: &dyn AttentionBackend, backward: bool) -> Result<Results> {
        let [b, t, s, n, k, h] = self.sizes;
        let (rows, keys, statistics) = ([b, t, n, h], [b, s, k, h], [b, t, n]);
        let [query, key, value, d_out] = &self.operands;
        let mut inputs = Inputs::new(query.view(rows)?, key.view(keys)?, value.view(keys)?);
        inputs.bias = self.bias.as_ref().map(|(bias, shape)| bias.view(*shape)).transpose()?;
        let problem = inputs.problem().causal(self.causal).lse(true).build()?;
        let accumulator = if self.dtype == DType::F64 { DType::F64 } else { DType::F32 };
        let mut out = Data::zeros(self.dtype, b * t * n * h);
        let mut lse = Data::zeros(accumulator, b * t * n);
        let none = || Scratch::none(Device::Cpu);
        let outputs = ForwardOutputs { out: out.view_mut(rows)?, lse: Some(lse.view_mut(statistics)?) };
        backend.plan(&problem)?.forward(ForwardCall::new(&problem, inputs, outputs)?, none())?;
        if !backward {
            return Ok(Results { out, lse, gradients: None });
        }
        let problem = inputs.problem().causal(self.causal).gradients(Gradients::QKV).build()?;
        let mut dq = Data::zeros(self.dtype, b * t * n * h);
        let [mut dk, mut dv] = [(); 2].map(|()| Data::zeros(self.dtype, b * s * k * h));
        let saved = BackwardInputs {
            out: out.view(rows)?,
            lse: lse.view(statistics)?,
            d_out: d_out.view(rows)?,
            d_lse: None,
        };
        let outputs = BackwardOutputs {
            dq: Some(dq.view_mut(rows)?),
            dk: Some(dk.view_mut(keys)?),
            dv: Some(dv.view_mut(keys)?),
            ..BackwardOutputs::default()
        };
        backend.plan(&problem)?.backward(BackwardCall::new(&problem, inputs, saved, outputs)?, none())?;
        Ok(Results { out, lse, gradients: Some([dq, dk, dv]) })
    }

    /// The logits of a row for the keys that it may see, rounded as the backend rounds them.
    pub(crate) fn logits(&self, [b, t, n]: [usize; 3]) -> Vec<f64> {
        let [_, queries, keys, heads, key_heads, width] = self.sizes;
        let at = ((b * queries + t) * heads + n) * width;
        let q = self.operands[0].part(at..at + width);
        let visible = if self.causal { keys.min(t + 1) } else { keys };
        let bias = self.bias.as_ref().map(|(bias, shape)| {
            let start = if shape[2] == 1 { 0 } else { t * keys };
            bias.part(start..start + keys)
        });
        let logit = |j: usize| {
            let k = self.key_row(1, [b, j, n / (heads / key_heads)]);
            let product: f64 = q.iter().zip(k).map(|(q, k)| q * k).sum();
            let x = product / (width as f64).sqrt() + bias.as_ref().map_or(0.0, |bias| bias[j]);
            if self.dtype == DType::F64 { x } else { f64::from(x as f32) }
        };
        (0..visible).map(logit).collect()
    }

    /// A row of the keys (operand 1) or of the values.
    pub(crate) fn key_row(&self, operand: usize, [b, j, head]: [usize; 3]) -> Vec<f64> {
        let [_, _, keys, _, key_heads, width] = self.sizes;
        let at = ((b * keys + j) * key_heads + head) * width;
        self.operands[operand].part(at..at + width)
    }

    /// The output of a row and its logsumexp.
    pub(crate) fn row(&self, [b, t, n]: [usize; 3]) -> (Vec<f64>, f64) {
        let [_, _, _, heads, key_heads, width] = self.sizes;
        let logits = self.logits([b, t, n]);
        let largest = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let (mut total, mut out) = (0.0, vec![0.0; width]);
        for (j, x) in logits.into_iter().enumerate() {
            let weight = (x - largest).exp();
            total += weight;
            let v = self.key_row(2, [b, j, n / (heads / key_heads)]);
            out.iter_mut().zip(v).for_each(|(out, v)| *out += weight * v);
        }
        out.iter_mut().for_each(|out| *out /= total);
        (out, largest + total.ln())
    }
}
