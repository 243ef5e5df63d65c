//! A call on a GPU with its memory.

use std::sync::Arc;
use std::time::Instant;

use attention_benches::{Layout, Sequences};
use attention_core::{
    AttentionBackend, BackwardCall, BackwardInputs, BackwardOutputs, CallData, DType, Dropout, F8E4M3,
    F8E5M2, Float8, ForwardCall, ForwardOutputs, Gradients, Inputs, Overflow, Plan, Problem, ProblemBuilder,
    Role, TensorDesc, View,
};
use attention_cuda::cudarc::driver::sys::CUevent_flags;
use attention_cuda::{CudaDevice, DeviceScratch, DeviceTensor};

use super::case::{CallOption, Case};
use super::measured::Times;

/// The tensors of a call, shared by all backends.
pub(super) struct Data {
    device: CudaDevice,
    /// Those of the operands, options and numbers, by role.
    inputs: Vec<(Role, DeviceTensor)>,
    dropout: Option<Dropout>,
    out: DeviceTensor,
    lse: DeviceTensor,
    /// The incoming gradient and the memory for those of query, key and value, in backward.
    gradients: Option<[DeviceTensor; 4]>,
    forward: Problem,
    problem: Problem,
}

/// Words without an order, the same ones for a seed; the upper bits are the better ones.
fn random_words(seed: u32) -> impl Iterator<Item = u32> {
    let next = |word: &u32| Some(word.wrapping_mul(1_664_525).wrapping_add(1_013_904_223));
    std::iter::successors(Some(seed), next).skip(1)
}

/// Numbers between -1 and 1 in a tensor of this description.
fn random(device: &CudaDevice, desc: TensorDesc, seed: u32) -> crate::Result<DeviceTensor> {
    let count = desc.element_count().ok_or("too large")?;
    let numbers = random_words(seed).take(count).map(|word| (word >> 8) as f32 / (1 << 23) as f32 - 1.0);
    let shape = desc.shape();
    Ok(match desc.dtype() {
        DType::Bool => {
            let data: Vec<bool> = numbers.map(|number| number > -0.8).collect();
            DeviceTensor::from_host(device, View::from_slice(&data, shape)?)?
        }
        DType::F32 => {
            let data: Vec<f32> = numbers.collect();
            DeviceTensor::from_host(device, View::from_slice(&data, shape)?)?
        }
        DType::F8E4M3 => random_of_8_bits::<F8E4M3>(device, desc, seed)?,
        DType::F8E5M2 => random_of_8_bits::<F8E5M2>(device, desc, seed)?,
        _ => {
            let data: Vec<attention::bf16> = numbers.map(attention::bf16::from_f32).collect();
            DeviceTensor::from_host(device, View::from_slice(&data, shape)?)?
        }
    })
}

/// The same of 256 numbers, which are rounded once.
fn random_of_8_bits<T: Float8>(
    device: &CudaDevice,
    desc: TensorDesc,
    seed: u32,
) -> crate::Result<DeviceTensor> {
    let count = desc.element_count().ok_or("too large")?;
    let rounded: Vec<T> =
        (0u8..=255).map(|step| T::from_f32(f32::from(step) / 128.0 - 1.0, Overflow::Saturate)).collect();
    let data: Vec<T> = random_words(seed).take(count).map(|word| rounded[(word >> 24) as usize]).collect();
    Ok(DeviceTensor::from_host(device, View::from_slice(&data, desc.shape())?)?)
}

impl Data {
    pub(super) fn new(device: &CudaDevice, case: &Case) -> crate::Result<Self> {
        let Case { b, t, s, n, k, h, dtype, causal, backward, terms, .. } = *case;
        let desc = |length, heads| TensorDesc::contiguous(dtype, [b, length, heads, h]);
        let (query, key) = (desc(t, n), desc(s, k));
        let builder: ProblemBuilder =
            Problem::builder(query, key, key).device(device.device()).causal(causal);
        let builder = match terms {
            CallOption::Bias => builder.bias(TensorDesc::contiguous(dtype, [1, n, t, s])),
            CallOption::Mask => builder.mask(TensorDesc::contiguous(DType::Bool, [b, 1, t, s])),
            CallOption::Plain | CallOption::Dropout => builder,
        };
        let dropout = (terms == CallOption::Dropout).then(|| Dropout::new(0.125, 7));
        Self::of(device, builder, backward, dropout, Vec::new())
    }

    /// Of sequences whose rows lie in this way, with keys and values of this dtype; those of 8 bits have a
    /// scale for each head. Starts, lengths and pages are in device memory.
    pub(super) fn of_sequences(
        device: &CudaDevice,
        sequences: &Sequences,
        layout: Layout,
        [dtype, key_dtype]: [DType; 2],
        causal: bool,
        backward: bool,
    ) -> crate::Result<Self> {
        let (builder, places) = sequences.problem(layout, dtype, key_dtype)?;
        let mut builder = builder.device(device.device()).causal(causal);
        let mut numbers = Vec::new();
        for (role, view) in places.views()? {
            numbers.push((role, DeviceTensor::from_host(device, view)?));
        }
        if dtype != key_dtype {
            let scales = vec![0.5f32; sequences.key_heads];
            let scales = View::from_slice(&scales, [sequences.key_heads])?;
            builder = builder.key_scales(scales.desc()).value_scales(scales.desc());
            for role in Role::SCALES {
                numbers.push((role, DeviceTensor::from_host(device, scales)?));
            }
        }
        Self::of(device, builder, backward, None, numbers)
    }

    /// Of a problem on the device, with the numbers of its calls.
    fn of(
        device: &CudaDevice,
        builder: ProblemBuilder,
        backward: bool,
        dropout: Option<Dropout>,
        mut inputs: Vec<(Role, DeviceTensor)>,
    ) -> crate::Result<Self> {
        let builder = builder.dropout_rate(dropout.map(|dropout| dropout.rate));
        let forward = builder.clone().build()?;
        let problem =
            if backward { builder.clone().gradients(Gradients::QKV).build()? } else { forward.clone() };
        for (seed, role) in (1..).zip([Role::Query, Role::Key, Role::Value, Role::Bias, Role::Mask]) {
            if let Some(&desc) = forward.tensor(role) {
                inputs.push((role, random(device, desc, seed)?));
            }
        }
        let output = |problem: &Problem, role: Role| -> crate::Result<DeviceTensor> {
            let desc = problem.tensor(role).ok_or_else(|| format!("a problem without {role}"))?;
            Ok(DeviceTensor::filled(device, *desc, 0)?)
        };
        let gradients = if backward {
            let d_out = problem.tensor(Role::DOut).ok_or("a backward pass without d_out")?;
            let [dq, dk, dv] = [Role::DQuery, Role::DKey, Role::DValue].map(|role| output(&problem, role));
            Some([random(device, *d_out, 6)?, dq?, dk?, dv?])
        } else {
            None
        };
        Ok(Self {
            device: device.clone(),
            inputs,
            dropout,
            out: output(&forward, Role::Out)?,
            lse: output(&builder.lse(true).build()?, Role::Lse)?,
            gradients,
            forward,
            problem,
        })
    }

    /// The problem that is timed.
    pub(super) fn problem(&self) -> &Problem {
        &self.problem
    }
}

/// A case on a backend.
pub(super) struct Call<'a> {
    data: &'a mut Data,
    /// What is timed.
    plan: Arc<dyn Plan>,
    scratch: DeviceScratch,
    scratch_bytes: usize,
}

impl<'a> Call<'a> {
    pub(super) fn new(data: &'a mut Data, backend: &'a dyn AttentionBackend) -> crate::Result<Self> {
        let plan = backend.plan(&data.problem)?;
        // A real output and logsumexp to go back from.
        let with_lse = data.forward.to_builder().lse(true).build()?;
        let with_lse = data.gradients.is_some().then(|| backend.plan(&with_lse)).transpose()?;
        let scratch_bytes =
            plan.scratch_bytes().max(with_lse.as_ref().map_or(0, |plan| plan.scratch_bytes()));
        let scratch = DeviceScratch::new(&data.device, scratch_bytes)?;
        let mut call = Self { data, plan, scratch, scratch_bytes };
        if let Some(with_lse) = with_lse {
            call.forward(&*with_lse)?;
        }
        Ok(call)
    }

    fn forward(&mut self, plan: &dyn Plan) -> crate::Result<()> {
        let (data, problem) = (&mut *self.data, plan.problem());
        let lse = problem.has(Role::Lse).then(|| data.lse.view_mut()).transpose()?;
        let outputs = ForwardOutputs { out: data.out.view_mut()?, lse };
        let inputs = inputs(&data.inputs, data.dropout)?;
        let scratch = self.scratch.scratch(self.scratch_bytes);
        Ok(plan.forward(ForwardCall::new(problem, inputs, outputs)?, scratch)?)
    }

    fn once(&mut self) -> crate::Result<()> {
        if self.data.gradients.is_none() {
            let plan = self.plan.clone();
            return self.forward(&*plan);
        }
        let data = &mut *self.data;
        let Some([d_out, dq, dk, dv]) = &mut data.gradients else { return Ok(()) };
        let saved = BackwardInputs {
            out: data.out.view()?,
            lse: data.lse.view()?,
            d_out: d_out.view()?,
            d_lse: None,
        };
        let outputs = BackwardOutputs {
            dq: Some(dq.view_mut()?),
            dk: Some(dk.view_mut()?),
            dv: Some(dv.view_mut()?),
            ..BackwardOutputs::default()
        };
        let inputs = inputs(&data.inputs, data.dropout)?;
        let call = BackwardCall::new(self.plan.problem(), inputs, saved, outputs)?;
        let scratch = self.scratch.scratch(self.scratch_bytes);
        Ok(self.plan.backward(call, scratch)?)
    }

    /// Device and host time of a call: of many on the stream, and of a few that wait for nothing.
    pub(super) fn time(&mut self, calls: usize) -> crate::Result<Times> {
        let device = self.data.device.clone();
        let stream = device.stream();
        self.once()?;
        stream.synchronize()?;
        let event = || device.context().new_event(Some(CUevent_flags::CU_EVENT_DEFAULT));
        let (start, end) = (event()?, event()?);
        start.record(stream)?;
        for _ in 0..calls {
            self.once()?;
        }
        end.record(stream)?;
        end.synchronize()?;
        let device_us = f64::from(start.elapsed_ms(&end)?) * 1e3 / calls as f64;
        let begin = Instant::now();
        for _ in 0..20 {
            self.once()?;
        }
        let host_us = begin.elapsed().as_secs_f64() * 1e6 / 20.0;
        stream.synchronize()?;
        Ok(Times { device_us, host_us })
    }
}

/// The tensors of a call as its inputs.
fn inputs(tensors: &[(Role, DeviceTensor)], dropout: Option<Dropout>) -> crate::Result<Inputs<'_>> {
    let of = |role: Role| -> crate::Result<Option<View<'_>>> {
        let found = tensors.iter().find(|(of, _)| *of == role);
        Ok(found.map(|(_, tensor)| tensor.view()).transpose()?)
    };
    let operand =
        |role: Role| -> crate::Result<View<'_>> { Ok(of(role)?.ok_or_else(|| format!("no {role}"))?) };
    Ok(Inputs {
        mask: of(Role::Mask)?,
        bias: of(Role::Bias)?,
        data: CallData {
            dropout,
            query_lengths: of(Role::QueryLengths)?,
            key_value_lengths: of(Role::KeyValueLengths)?,
            query_starts: of(Role::QueryStarts)?,
            key_value_starts: of(Role::KeyValueStarts)?,
            block_table: of(Role::BlockTable)?,
            key_scales: of(Role::KeyScales)?,
            value_scales: of(Role::ValueScales)?,
            ..CallData::default()
        },
        ..Inputs::new(operand(Role::Query)?, operand(Role::Key)?, operand(Role::Value)?)
    })
}
