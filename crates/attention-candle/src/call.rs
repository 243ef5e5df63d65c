//! One call: candle's tensors in, candle's tensors out, without a graph.

use attention::core::Inputs;
use attention::{BackwardInputs, BackwardOutputs, CallData, DType, Role, View, ViewMut};
use candle_core::Tensor;

use crate::events::{Reads, Writes};
use crate::memory::{Locked, Output};
use crate::{Attention, Error, Explanation, Lengths};

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

/// What a backward call starts from, in addition to the operands.
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

/// The views of a call's inputs, with axes in the order of the caller's.
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
        let Self { mask, bias, alibi_slopes, sinks, numbers, .. } = self;
        for (role, tensor) in [
            (Role::Mask, mask),
            (Role::Bias, bias),
            (Role::AlibiSlopes, alibi_slopes),
            (Role::Sinks, sinks),
            (Role::QueryLengths, &numbers.query_lengths),
            (Role::KeyValueLengths, &numbers.key_value_lengths),
            (Role::QueryOffsets, &numbers.query_offsets),
            (Role::DropoutSeed, &numbers.dropout_seed),
            (Role::DropoutOffset, &numbers.dropout_offset),
            (Role::QueryStarts, &numbers.query_starts),
            (Role::KeyValueStarts, &numbers.key_value_starts),
            (Role::BlockTable, &numbers.block_table),
        ] {
            tensors.extend(tensor.as_ref().map(|tensor| (role, tensor)));
        }
        tensors
    }

    fn views<'g>(locked: &'g Locked<'_>, reads: &mut Reads<'g>) -> Result<Views<'g>, Error> {
        let mut view = |role| locked.view(role, reads);
        let mut operand =
            |role| Ok::<_, Error>(view(role)?.unwrap_or_else(|| unreachable!("every call has a {role}")));
        let inputs = Inputs::new(operand(Role::Query)?, operand(Role::Key)?, operand(Role::Value)?);
        let inputs = Inputs {
            mask: view(Role::Mask)?,
            bias: view(Role::Bias)?,
            alibi_slopes: view(Role::AlibiSlopes)?,
            sinks: view(Role::Sinks)?,
            // Only those that are tensors: the others are the facade's call's.
            data: CallData {
                query_lengths: view(Role::QueryLengths)?,
                key_value_lengths: view(Role::KeyValueLengths)?,
                query_offsets: view(Role::QueryOffsets)?,
                dropout_seed: view(Role::DropoutSeed)?,
                dropout_offset: view(Role::DropoutOffset)?,
                query_starts: view(Role::QueryStarts)?,
                key_value_starts: view(Role::KeyValueStarts)?,
                block_table: view(Role::BlockTable)?,
                ..CallData::default()
            },
            ..inputs
        };
        Ok(Views {
            inputs,
            out: view(Role::Out)?,
            lse: view(Role::Lse)?,
            d_out: view(Role::DOut)?,
            d_lse: view(Role::DLse)?,
        })
    }

    /// The facade's call, on the implementations of the query's device.
    fn facade<'g>(&'g self, query: &Tensor, inputs: &Inputs<'g>) -> Result<attention::Attention<'g>, Error> {
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
        if let Some(lengths) = inputs.data.query_lengths {
            facade = facade.query_lengths(lengths);
        }
        if let Some(lengths) = inputs.data.key_value_lengths {
            facade = facade.key_value_lengths(lengths);
        }
        if let Some(offsets) = inputs.data.query_offsets {
            facade = facade.query_offsets(offsets);
        }
        if let Some(seed) = inputs.data.dropout_seed {
            facade = facade.dropout_seed(seed);
        }
        if let Some(offset) = inputs.data.dropout_offset {
            facade = facade.dropout_offset(offset);
        }
        if let Some(starts) = inputs.data.query_starts {
            facade = facade.packed_queries(starts);
        }
        if let Some(starts) = inputs.data.key_value_starts {
            facade = facade.packed_keys(starts);
        }
        if let Some(table) = inputs.data.block_table {
            // The facade takes both at once: lengths that are a list are the call's.
            facade = match inputs.data.key_value_lengths.or(self.call.data().key_value_lengths) {
                Some(lengths) => facade.paged(table, lengths),
                None => facade.paged(table, Lengths::Full),
            };
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
        let Views { inputs, .. } = Self::views(&locked, &mut reads)?;
        let facade = self.facade(operands.query, &inputs)?;
        let (query, key, value) = (inputs.query, inputs.key, inputs.value);

        // Checks the shapes, so that those of the results can be taken from the inputs'.
        let problem = facade.problem(query, key, value)?;
        let mut rows = query.shape().to_vec();
        rows.pop();
        let out_shape = [&rows[..], &[problem.dims().value_head_dim]].concat();
        let memory = |dtype, shape: Vec<usize>| -> Result<(Output, Vec<usize>), Error> {
            Ok((Output::new(operands.query, dtype, &shape)?, shape))
        };
        let mut out = memory(problem.dtype(), out_shape)?;
        let mut lse = with_lse.then(|| memory(problem.dtype().accumulator(), rows)).transpose()?;

        {
            let mut writes = Writes::default();
            let out_view = out.0.view_mut(&out.1, &mut writes)?;
            let lse_view = match &mut lse {
                Some((lse, shape)) => Some(lse.view_mut(shape, &mut writes)?),
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
        let Views { inputs, out, lse, d_out, d_lse } = Self::views(&locked, &mut reads)?;
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
                dq: written(dq, &mut writes)?,
                dk: written(dk, &mut writes)?,
                dv: written(dv, &mut writes)?,
                dbias: written(dbias, &mut writes)?,
                dsinks: written(dsinks, &mut writes)?,
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
        let Views { inputs, .. } = Self::views(&locked, &mut reads)?;
        let facade = self.facade(operands.query, &inputs)?;
        Ok(facade.explain(inputs.query, inputs.key, inputs.value)?)
    }
}

/// Memory as a view that is written.
fn written<'a>(
    memory: &'a mut Option<(Output, Vec<usize>)>,
    writes: &mut Writes<'a>,
) -> Result<Option<ViewMut<'a>>, Error> {
    let Some((memory, shape)) = memory else { return Ok(None) };
    Ok(Some(memory.view_mut(shape, writes)?))
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
/// Lengths and the like may be in host memory.
fn on_one_device(tensors: &[(Role, &Tensor)]) -> Result<(), Error> {
    let Some((_, query)) = tensors.first() else { return Ok(()) };
    let is_there = |role: Role, tensor: &Tensor| {
        tensor.device().same_device(query.device()) || role.is_data() && tensor.device().is_cpu()
    };
    match tensors.iter().find(|&&(role, tensor)| !is_there(role, tensor)) {
        None => Ok(()),
        Some(&(role, tensor)) => {
            let (device, query) = (tensor.device().location(), query.device().location());
            Err(Error::OtherDevice { role, device, query })
        }
    }
}
