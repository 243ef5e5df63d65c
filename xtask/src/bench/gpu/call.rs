//! A call on a GPU with its memory.

use std::sync::Arc;
use std::time::Instant;

use attention_core::{
    AttentionBackend, BackwardCall, BackwardInputs, BackwardOutputs, CallData, DType, Dropout, ForwardCall,
    ForwardOutputs, Gradients, Inputs, Plan, Problem, ProblemBuilder, Role, TensorDesc, View,
};
use attention_cuda::cudarc::driver::sys::CUevent_flags;
use attention_cuda::{CudaDevice, DeviceScratch, DeviceTensor};

use super::case::{CallOption, Case};
use super::measured::Times;

/// The tensors of a case, shared by all backends.
pub(super) struct Data {
    device: CudaDevice,
    operands: [DeviceTensor; 3],
    mask: Option<DeviceTensor>,
    bias: Option<DeviceTensor>,
    dropout: Option<Dropout>,
    out: DeviceTensor,
    lse: DeviceTensor,
    /// The incoming gradient and the memory for those of query, key and value, in backward.
    gradients: Option<[DeviceTensor; 4]>,
    forward: Problem,
    problem: Problem,
}

/// Numbers between -1 and 1 in a tensor of this description.
fn random(device: &CudaDevice, desc: TensorDesc, seed: u32) -> crate::Result<DeviceTensor> {
    let count = desc.element_count().ok_or("too large")?;
    let mut state = seed;
    let numbers = (0..count).map(|_| {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / (1 << 23) as f32 - 1.0
    });
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
        _ => {
            let data: Vec<attention::bf16> = numbers.map(attention::bf16::from_f32).collect();
            DeviceTensor::from_host(device, View::from_slice(&data, shape)?)?
        }
    })
}

impl Data {
    pub(super) fn new(device: &CudaDevice, case: &Case) -> crate::Result<Self> {
        let Case { b, t, s, n, k, h, dtype, causal, backward, terms, .. } = *case;
        let desc = |length, heads| TensorDesc::contiguous(dtype, [b, length, heads, h]);
        let (query, key) = (desc(t, n), desc(s, k));
        let operands = [random(device, query, 1)?, random(device, key, 2)?, random(device, key, 3)?];
        let zeros = |desc: TensorDesc| DeviceTensor::filled(device, desc, 0);
        let of = |wanted: CallOption, dtype, shape: [usize; 4], seed| {
            let desc = TensorDesc::contiguous(dtype, shape);
            (terms == wanted).then(|| random(device, desc, seed)).transpose()
        };
        let bias = of(CallOption::Bias, dtype, [1, n, t, s], 5)?;
        let mask = of(CallOption::Mask, DType::Bool, [b, 1, t, s], 6)?;
        let mut builder: ProblemBuilder =
            Problem::builder(query, key, key).device(device.device()).causal(causal);
        if let Some(mask) = &mask {
            builder = builder.mask(mask.desc());
        }
        if let Some(bias) = &bias {
            builder = builder.bias(bias.desc());
        }
        let dropout = (terms == CallOption::Dropout).then(|| Dropout::new(0.125, 7));
        builder = builder.dropout_rate(dropout.map(|dropout| dropout.rate));
        let forward = builder.clone().build()?;
        let wanted = Gradients::QUERY | Gradients::KEY | Gradients::VALUE;
        let problem = if backward { builder.gradients(wanted).build()? } else { forward.clone() };
        let gradients = if backward {
            Some([random(device, query, 4)?, zeros(query)?, zeros(key)?, zeros(key)?])
        } else {
            None
        };
        Ok(Self {
            device: device.clone(),
            operands,
            mask,
            bias,
            dropout,
            out: zeros(query)?,
            lse: zeros(TensorDesc::contiguous(DType::F32, [b, t, n]))?,
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
        let inputs = inputs(&data.operands, &data.mask, &data.bias, data.dropout)?;
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
        let inputs = inputs(&data.operands, &data.mask, &data.bias, data.dropout)?;
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

fn inputs<'a>(
    [query, key, value]: &'a [DeviceTensor; 3],
    mask: &'a Option<DeviceTensor>,
    bias: &'a Option<DeviceTensor>,
    dropout: Option<Dropout>,
) -> crate::Result<Inputs<'a>> {
    Ok(Inputs {
        mask: mask.as_ref().map(DeviceTensor::view).transpose()?,
        bias: bias.as_ref().map(DeviceTensor::view).transpose()?,
        data: CallData { dropout, ..CallData::default() },
        ..Inputs::new(query.view()?, key.view()?, value.view()?)
    })
}
