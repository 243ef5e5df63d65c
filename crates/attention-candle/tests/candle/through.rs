//! A backend of the suite whose calls go through candle: tensors of candle's, this crate, candle's backward.

use std::sync::Arc;

use attention::core::{
    BackendFailure, BackwardCall, CallProblem, Capabilities, DeviceKind, Error, FeatureSet, ForwardCall,
    Inputs, PassCapabilities, Plan, Problem, Scratch, ScratchGrowth, Unavailable, Unsupported, View, ViewMut,
};
use attention::{AttentionBackend, DType, NumericsClass, bf16, f16};
use attention_candle::{Attention, AxisOrder, Options};
use candle_core::{Result, Tensor, Var};

use crate::device::device;
use crate::placed::{Placed, write};

#[derive(Clone, Debug)]
pub(crate) struct ThroughCandle {
    order: AxisOrder,
    recompute: bool,
    capabilities: Capabilities,
}

/// Query, key, value, bias and sinks of a call, as variables where they shall have gradients.
struct Operands {
    placed: [Option<Placed>; 5],
    variables: [Option<Var>; 5],
}

impl ThroughCandle {
    pub(crate) fn new(order: AxisOrder, recompute: bool) -> Self {
        let pass = || PassCapabilities::new(FeatureSet::all());
        // Of kernels on a GPU.
        let backward = if device().is_cuda() { pass().with_max_head_dims(256, 256) } else { pass() };
        let capabilities =
            Capabilities::new(DeviceKind::Cpu, NumericsClass::STANDARD, pass(), ScratchGrowth::Constant)
                .with_backward(backward);
        Self { order, recompute, capabilities }
    }

    pub(crate) fn label(&self) -> String {
        format!("{}{}", self.order, if self.recompute { ", recomputed" } else { "" })
    }

    /// A tensor of four axes in the order of the call, or from it.
    fn swap(&self, tensor: Tensor) -> Result<Tensor> {
        match self.order {
            AxisOrder::Bnth => tensor.transpose(1, 2),
            AxisOrder::Btnh => Ok(tensor),
        }
    }

    fn attention(
        &self,
        problem: &CallProblem<'_>,
        inputs: &Inputs<'_>,
        operands: &Operands,
    ) -> Result<Attention> {
        let data = &inputs.data;
        let options = Options {
            scale: Some(problem.scale()),
            causal: problem.causal(),
            query_offset: data.query_offset,
            window: problem.window(),
            softcap: problem.softcap(),
            dropout: data.dropout,
            deterministic: problem.deterministic(),
            batch_invariant: problem.batch_invariant(),
            ..Options::default()
        };
        let mut attention = Attention::new(self.order).options(options).recompute(self.recompute);
        if let Some(lengths) = &data.query_lengths {
            attention = attention.query_lengths(integers(lengths)?);
        }
        if let Some(lengths) = &data.key_value_lengths {
            attention = attention.key_value_lengths(integers(lengths)?);
        }
        if let Some(offsets) = &data.query_offsets {
            attention = attention.query_offsets(integers(offsets)?);
        }
        if let Some(seed) = &data.dropout_seed {
            attention = attention.dropout_seed(&integers(seed)?);
        }
        if let Some(offset) = &data.dropout_offset {
            attention = attention.dropout_offset(&integers(offset)?);
        }
        let dims = problem.dims();
        let mut longest = (None, None);
        if let Some(starts) = &data.query_starts {
            attention = attention.packed_queries(integers(starts)?);
            longest.0 = Some(dims.query_length);
        }
        if let Some(starts) = &data.key_value_starts {
            attention = attention.packed_keys(integers(starts)?);
            longest.1 = Some(dims.key_length);
        }
        if let (Some(table), Some(lengths)) = (&data.block_table, &data.key_value_lengths) {
            attention = attention.paged(&integers(table)?, integers(lengths)?);
            longest.1 = Some(dims.key_length);
        }
        attention = attention.longest(longest.0, longest.1);
        if let Some(mask) = &inputs.mask {
            let host = mask.host_mask().expect("a mask in host memory");
            attention = attention.mask(&Placed::new(mask, |index| host.at(index), 0)?.tensor()?);
        }
        if let Some(slopes) = &inputs.alibi_slopes {
            attention = attention.alibi_slopes(&floats(slopes)?.tensor()?);
        }
        let [.., bias, sinks] = &operands.placed;
        if let Some(bias) = bias {
            attention = attention.bias(&bias.tensor()?);
        }
        if let Some(sinks) = sinks {
            attention = attention.sinks(&sinks.tensor()?);
        }
        Ok(attention)
    }

    fn qkv(&self, operands: &Operands) -> Result<[Tensor; 3]> {
        let [Some(query), Some(key), Some(value), ..] = &operands.placed else {
            candle_core::bail!("a call without operands")
        };
        Ok([self.swap(query.tensor()?)?, self.swap(key.tensor()?)?, self.swap(value.tensor()?)?])
    }

    fn run_forward(&self, call: ForwardCall<'_>) -> Result<()> {
        let (problem, inputs, outputs) = call.into_parts();
        let operands = Operands::new(&inputs, [false; 5])?;
        let [query, key, value] = self.qkv(&operands)?;
        let attention = self.attention(&problem, &inputs, &operands)?;
        let out = match outputs.lse {
            None => attention.forward(&query, &key, &value)?,
            Some(to) => {
                let (out, lse) = attention.forward_with_lse(&query, &key, &value)?;
                put(&self.swap(lse)?, to)?;
                out
            }
        };
        put(&self.swap(out)?, outputs.out)
    }

    fn run_backward(&self, call: BackwardCall<'_>) -> Result<()> {
        let (problem, inputs, saved, outputs) = call.into_parts();
        let outputs = [outputs.dq, outputs.dk, outputs.dv, outputs.dbias, outputs.dsinks];
        let operands = Operands::new(&inputs, outputs.each_ref().map(Option::is_some))?;
        let [query, key, value] = self.qkv(&operands)?;
        let attention = self.attention(&problem, &inputs, &operands)?;
        let d_out = self.swap(floats(&saved.d_out)?.tensor()?)?;
        let (out, lse) = match saved.d_lse {
            None => (attention.forward(&query, &key, &value)?, None),
            Some(d_lse) => {
                let (out, lse) = attention.forward_with_lse(&query, &key, &value)?;
                (out, Some((lse, self.swap(floats(&d_lse)?.tensor()?)?)))
            }
        };
        // What comes in for the output is exactly `d_out`: the products and their sum are not looked at.
        let mut loss = (out * d_out)?.sum_all()?;
        if let Some((lse, d_lse)) = lse {
            let of_lse = (lse * d_lse)?.sum_all()?;
            loss = (loss.to_dtype(of_lse.dtype())? + of_lse)?;
        }
        let gradients = loss.backward()?;
        for ((placed, variable), to) in operands.placed.iter().zip(&operands.variables).zip(outputs) {
            let (Some(placed), Some(variable), Some(to)) = (placed, variable, to) else { continue };
            let Some(gradient) = gradients.get(variable) else {
                candle_core::bail!("a variable without a gradient")
            };
            put(&placed.of(gradient)?, to)?;
        }
        Ok(())
    }
}

impl Operands {
    fn new(inputs: &Inputs<'_>, wanted: [bool; 5]) -> Result<Self> {
        let views = [Some(inputs.query), Some(inputs.key), Some(inputs.value), inputs.bias, inputs.sinks];
        let mut operands = Self { placed: Default::default(), variables: Default::default() };
        for (index, view) in views.into_iter().enumerate() {
            let Some(view) = view else { continue };
            let mut placed = floats(&view)?;
            if wanted[index] {
                let (variable_placed, variable) = placed.variable()?;
                placed = variable_placed;
                operands.variables[index] = Some(variable);
            }
            operands.placed[index] = Some(placed);
        }
        Ok(operands)
    }
}

/// Lengths and the like, with -1 in their gaps.
fn integers(view: &View<'_>) -> Result<Tensor> {
    macro_rules! placed {
        ($type:ty, $gap:expr) => {{
            let host = view.host::<$type>().expect("host memory of this dtype");
            Placed::new(view, |index| host.at(index), $gap)?.tensor()
        }};
    }
    match view.desc().dtype() {
        DType::I32 => placed!(i32, -1),
        DType::U32 => placed!(u32, u32::MAX),
        _ => placed!(i64, -1),
    }
}

/// A float tensor with NaN in its gaps.
fn floats(view: &View<'_>) -> Result<Placed> {
    macro_rules! placed {
        ($type:ty, $nan:expr) => {{
            let host = view.host::<$type>().expect("host memory of this dtype");
            Placed::new(view, |index| host.at(index), $nan)
        }};
    }
    match view.desc().dtype() {
        DType::F64 => placed!(f64, f64::NAN),
        DType::F32 => placed!(f32, f32::NAN),
        DType::F16 => placed!(f16, f16::NAN),
        _ => placed!(bf16, bf16::NAN),
    }
}

fn put(tensor: &Tensor, to: ViewMut<'_>) -> Result<()> {
    match to.desc().dtype() {
        DType::F64 => write::<f64>(tensor, to),
        DType::F32 => write::<f32>(tensor, to),
        DType::F16 => write::<f16>(tensor, to),
        _ => write::<bf16>(tensor, to),
    }
}

impl AttentionBackend for ThroughCandle {
    fn name(&self) -> &str {
        "candle"
    }

    fn version(&self) -> &str {
        "0"
    }

    fn capabilities(&self) -> &Capabilities {
        &self.capabilities
    }

    fn available(&self) -> std::result::Result<(), Unavailable> {
        Ok(())
    }

    fn supports(&self, problem: &Problem) -> std::result::Result<(), Unsupported> {
        self.capabilities.check(self.name(), problem)
    }

    fn scratch_bytes(&self, problem: &Problem) -> std::result::Result<usize, Unsupported> {
        self.supports(problem).map(|()| 0)
    }

    fn plan(&self, problem: &Problem) -> std::result::Result<Arc<dyn Plan>, Error> {
        self.supports(problem)?;
        Ok(Arc::new(ThroughCandlePlan { backend: self.clone(), problem: problem.clone() }))
    }
}

#[derive(Debug)]
struct ThroughCandlePlan {
    backend: ThroughCandle,
    problem: Problem,
}

impl Plan for ThroughCandlePlan {
    fn backend(&self) -> &str {
        self.backend.name()
    }

    fn problem(&self) -> &Problem {
        &self.problem
    }

    fn scratch_bytes(&self) -> usize {
        0
    }

    fn forward(&self, call: ForwardCall<'_>, scratch: Scratch<'_>) -> std::result::Result<(), Error> {
        self.admit(call.problem(), &scratch)?;
        self.backend.run_forward(call).map_err(failed)
    }

    fn backward(&self, call: BackwardCall<'_>, scratch: Scratch<'_>) -> std::result::Result<(), Error> {
        self.admit(call.problem(), &scratch)?;
        self.backend.run_backward(call).map_err(failed)
    }
}

fn failed(error: candle_core::Error) -> Error {
    let source = error.to_string().into();
    BackendFailure { backend: "candle".to_owned(), operation: "a call".to_owned(), source }.into()
}
