//! One call: candle's tensors in, candle's tensors out, without a graph.

use attention::core::Inputs;
use attention::{BackwardInputs, BackwardOutputs, DType, Role, View, ViewMut};
use candle_core::Tensor;

use crate::memory::{Locked, Output, Reads, Writes};
use crate::order::Kind;
use crate::{Attention, Error, Explanation};

/// What a forward call leaves: memory with its shape in the caller's order.
pub(crate) struct Forward {
    pub(crate) out: (Output, Vec<usize>),
    pub(crate) lse: Option<(Output, Vec<usize>)>,
}

/// The operands of a call.
#[derive(Clone, Copy)]
pub(crate) struct Operands<'t> {
    pub(crate) query: &'t Tensor,
    pub(crate) key: &'t Tensor,
    pub(crate) value: &'t Tensor,
}

/// What a backward call starts from, beside the operands.
#[derive(Clone, Copy)]
pub(crate) struct Incoming<'t> {
    pub(crate) out: &'t Tensor,
    pub(crate) lse: &'t Tensor,
    pub(crate) d_out: &'t Tensor,
    pub(crate) d_lse: Option<&'t Tensor>,
}

/// One thing for each input that can have a gradient.
#[derive(Clone, Debug, Default)]
pub(crate) struct PerInput<T> {
    pub(crate) query: T,
    pub(crate) key: T,
    pub(crate) value: T,
    pub(crate) bias: T,
    pub(crate) sinks: T,
}

/// The views of a call's inputs, as the library has them.
struct Views<'g> {
    inputs: Inputs<'g>,
    out: Option<View<'g>>,
    lse: Option<View<'g>>,
    d_out: Option<View<'g>>,
    d_lse: Option<View<'g>>,
}

impl Attention {
    /// The tensors of a call with their roles.
    fn tensors<'t>(&'t self, operands: Operands<'t>) -> Vec<(Role, &'t Tensor)> {
        let mut tensors =
            vec![(Role::Query, operands.query), (Role::Key, operands.key), (Role::Value, operands.value)];
        let Self { mask, bias, alibi_slopes, sinks, .. } = self;
        for (role, tensor) in
            [(Role::Mask, mask), (Role::Bias, bias), (Role::AlibiSlopes, alibi_slopes), (Role::Sinks, sinks)]
        {
            tensors.extend(tensor.as_ref().map(|tensor| (role, tensor)));
        }
        tensors
    }

    fn views<'g>(&self, locked: &'g Locked<'_>, reads: &mut Reads<'g>) -> Result<Views<'g>, Error> {
        let mut view = |role, kind: Option<Kind>| -> Result<Option<View<'g>>, Error> {
            let Some(view) = locked.view(role, reads)? else { return Ok(None) };
            Ok(Some(match kind {
                Some(kind) => self.order.read(kind, view)?,
                None => view,
            }))
        };
        let mut operand = |role| {
            Ok::<_, Error>(
                view(role, Some(Kind::Operand))?.unwrap_or_else(|| unreachable!("every call has a {role}")),
            )
        };
        let inputs = Inputs::new(operand(Role::Query)?, operand(Role::Key)?, operand(Role::Value)?);
        let inputs = Inputs {
            mask: view(Role::Mask, None)?,
            bias: view(Role::Bias, None)?,
            alibi_slopes: view(Role::AlibiSlopes, None)?,
            sinks: view(Role::Sinks, None)?,
            ..inputs
        };
        Ok(Views {
            inputs,
            out: view(Role::Out, Some(Kind::Operand))?,
            lse: view(Role::Lse, Some(Kind::Rows))?,
            d_out: view(Role::DOut, Some(Kind::Operand))?,
            d_lse: view(Role::DLse, Some(Kind::Rows))?,
        })
    }

    /// The facade's call, on the implementations of the query's device.
    fn facade<'g>(&self, query: &Tensor, inputs: &Inputs<'g>) -> Result<attention::Attention<'g>, Error> {
        let mut facade: attention::Attention<'g> = self.call.clone();
        if let Some(mask) = inputs.mask {
            facade = facade.mask(mask);
        }
        if let Some(bias) = inputs.bias {
            facade = facade.bias(bias);
        }
        if let Some(slopes) = inputs.alibi_slopes {
            facade = facade.alibi_slopes(slopes);
        }
        if let Some(sinks) = inputs.sinks {
            facade = facade.sinks(sinks);
        }
        match (&self.registry, query.device()) {
            (Some(registry), _) => Ok(facade.registry(registry)),
            #[cfg(feature = "cuda")]
            (None, candle_core::Device::Cuda(device)) => Ok(facade.registry(&crate::cuda::registry(device))),
            (None, _) => Ok(facade),
        }
    }

    /// Runs forward.
    pub(crate) fn run_forward(&self, operands: Operands<'_>, with_lse: bool) -> Result<Forward, Error> {
        let tensors = self.tensors(operands);
        on_one_device(&tensors)?;
        let locked = Locked::new(tensors);
        let mut reads = Reads::default();
        let Views { inputs, .. } = self.views(&locked, &mut reads)?;
        let facade = self.facade(operands.query, &inputs)?;
        let (query, key, value) = (inputs.query, inputs.key, inputs.value);

        let problem = facade.problem(query, key, value)?;
        let dims = problem.dims();
        // Without the batch axis where the operands have none.
        let skipped = 4 - query.shape().rank();
        let memory = |kind, dtype, shape: &[usize]| -> Result<(Output, Vec<usize>), Error> {
            let shape = self.order.returned(kind, &shape[skipped..]);
            Ok((Output::new(operands.query, dtype, &shape)?, shape))
        };
        let rows = [dims.batch, dims.query_length, dims.query_heads];
        let out_shape = [rows[0], rows[1], rows[2], dims.value_head_dim];
        let mut out = memory(Kind::Operand, problem.dtype(), &out_shape)?;
        let mut lse =
            with_lse.then(|| memory(Kind::Rows, problem.dtype().accumulator(), &rows)).transpose()?;

        {
            let mut writes = Writes::default();
            let out_view = self.order.written(Kind::Operand, out.0.view_mut(&out.1, &mut writes)?)?;
            let lse_view = match &mut lse {
                Some((lse, shape)) => {
                    Some(self.order.written(Kind::Rows, lse.view_mut(shape, &mut writes)?)?)
                }
                None => None,
            };
            facade.forward_into(query, key, value, out_view, lse_view)?;
        }
        Ok(Forward { out, lse })
    }

    /// Runs backward for the gradients that are wanted.
    pub(crate) fn run_backward(
        &self,
        operands: Operands<'_>,
        incoming: Incoming<'_>,
        wanted: &PerInput<bool>,
    ) -> Result<PerInput<Option<Tensor>>, Error> {
        let mut tensors = self.tensors(operands);
        tensors.extend([(Role::Out, incoming.out), (Role::Lse, incoming.lse), (Role::DOut, incoming.d_out)]);
        tensors.extend(incoming.d_lse.map(|d_lse| (Role::DLse, d_lse)));
        on_one_device(&tensors)?;
        let locked = Locked::new(tensors);
        let mut reads = Reads::default();
        let Views { inputs, out, lse, d_out, d_lse } = self.views(&locked, &mut reads)?;
        let facade = self.facade(operands.query, &inputs)?;

        // Each like the tensor that it belongs to.
        let like = |wanted: bool, tensor: Option<&Tensor>| -> Result<Option<(Output, Vec<usize>)>, Error> {
            let Some(tensor) = tensor.filter(|_| wanted) else { return Ok(None) };
            let shape = tensor.dims().to_vec();
            Ok(Some((Output::new(operands.query, dtype(tensor), &shape)?, shape)))
        };
        let mut memory = PerInput {
            query: like(wanted.query, Some(operands.query))?,
            key: like(wanted.key, Some(operands.key))?,
            value: like(wanted.value, Some(operands.value))?,
            bias: like(wanted.bias, self.bias.as_ref())?,
            sinks: like(wanted.sinks, self.sinks.as_ref())?,
        };
        {
            let mut writes = Writes::default();
            let PerInput { query: dq, key: dk, value: dv, bias: dbias, sinks: dsinks } = &mut memory;
            let outputs = BackwardOutputs {
                dq: written(self, dq, Some(Kind::Operand), &mut writes)?,
                dk: written(self, dk, Some(Kind::Operand), &mut writes)?,
                dv: written(self, dv, Some(Kind::Operand), &mut writes)?,
                dbias: written(self, dbias, None, &mut writes)?,
                dsinks: written(self, dsinks, None, &mut writes)?,
            };
            let (Some(out), Some(lse), Some(d_out)) = (out, lse, d_out) else {
                unreachable!("they were among the tensors")
            };
            let saved = BackwardInputs { out, lse, d_out, d_lse };
            facade.backward_into(inputs.query, inputs.key, inputs.value, saved, outputs)?;
        }
        let tensor =
            |memory: Option<(Output, Vec<usize>)>| memory.map(|(memory, shape)| memory.into_tensor(shape));
        Ok(PerInput {
            query: tensor(memory.query),
            key: tensor(memory.key),
            value: tensor(memory.value),
            bias: tensor(memory.bias),
            sinks: tensor(memory.sinks),
        })
    }

    /// What would run forward.
    pub(crate) fn run_explain(&self, operands: Operands<'_>) -> Result<Explanation, Error> {
        let tensors = self.tensors(operands);
        on_one_device(&tensors)?;
        let locked = Locked::new(tensors);
        let mut reads = Reads::default();
        let Views { inputs, .. } = self.views(&locked, &mut reads)?;
        let facade = self.facade(operands.query, &inputs)?;
        Ok(facade.explain(inputs.query, inputs.key, inputs.value)?)
    }
}

/// Memory as the library has it; operands have an order of axes.
fn written<'a>(
    call: &Attention,
    memory: &'a mut Option<(Output, Vec<usize>)>,
    kind: Option<Kind>,
    writes: &mut Writes<'a>,
) -> Result<Option<ViewMut<'a>>, Error> {
    let Some((memory, shape)) = memory else { return Ok(None) };
    let view = memory.view_mut(shape, writes)?;
    Ok(Some(match kind {
        Some(kind) => call.order.written(kind, view)?,
        None => view,
    }))
}

/// The dtype of a tensor of a call that ran.
fn dtype(tensor: &Tensor) -> DType {
    match tensor.dtype() {
        candle_core::DType::F64 => DType::F64,
        candle_core::DType::F16 => DType::F16,
        candle_core::DType::BF16 => DType::Bf16,
        _ => DType::F32,
    }
}

/// Checks that every tensor is where the query is, which comes first: one device, and on it one stream.
fn on_one_device(tensors: &[(Role, &Tensor)]) -> Result<(), Error> {
    let Some((_, query)) = tensors.first() else { return Ok(()) };
    match tensors.iter().find(|(_, tensor)| !tensor.device().same_device(query.device())) {
        None => Ok(()),
        Some(&(role, tensor)) => {
            let (device, query) = (tensor.device().location(), query.device().location());
            Err(Error::OtherDevice { role, device, query })
        }
    }
}
