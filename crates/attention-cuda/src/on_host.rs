//! A CUDA backend for calls on host memory: copies to the device, runs there, copies back.

use std::sync::Arc;

use attention_core::{
    AttentionBackend, BackwardCall, BackwardInputs, BackwardOutputs, CallData, Capabilities, DType, Device,
    DeviceKind, Error, ForwardCall, ForwardOutputs, Inputs, Plan, Problem, Role, Scratch, Unavailable,
    Unsupported, Variants, View, ViewMut,
};
use cudarc::driver::DriverError;

use crate::tensor::scratch_of;
use crate::{CudaDevice, DeviceTensor, failure};

/// What device memory holds before a call: as floats of any width, NaN.
const POISON: u8 = 0xff;
/// Bytes behind the scratch that a call must leave alone.
const GUARD: usize = 256;

/// Runs a backend for device memory on tensors in host memory.
///
/// For tests, and to try a GPU from host data: every call copies all of its tensors both ways. It also watches the
/// backend: a call that writes behind its scratch or between the elements of an output fails.
///
/// Of the numbers of a call ([`Role::DATA`]), those of 32 bits are copied to the device too, and those of 64
/// bits stay in host memory: a backend has to serve both.
#[derive(Debug)]
pub struct OnHost<B> {
    backend: B,
    device: CudaDevice,
    capabilities: Capabilities,
}

impl<B: AttentionBackend> OnHost<B> {
    /// Of a backend that works on memory of this device.
    pub fn new(backend: B, device: CudaDevice) -> Self {
        let mut capabilities = backend.capabilities().clone();
        capabilities.device = DeviceKind::Cpu;
        Self { backend, device, capabilities }
    }

    /// The backend.
    pub fn backend(&self) -> &B {
        &self.backend
    }

    /// The same problem on the device.
    fn on_device(&self, problem: &Problem) -> Result<Problem, Unsupported> {
        if problem.device() != Device::Cpu {
            return Err(Unsupported::Device {
                backend: self.name().to_owned(),
                device: problem.device(),
                expected: DeviceKind::Cpu,
            });
        }
        let moved = (Role::DATA.into_iter())
            .fold(problem.to_builder().device(self.device.device()), |builder, role| {
                builder.in_host_memory(role, problem.dtype_of(role).is_some_and(stays_on_host))
            })
            .build();
        Ok(moved.unwrap_or_else(|error| unreachable!("a valid problem is valid on any device: {error}")))
    }
}

/// Whether numbers of this dtype are not copied to the device.
fn stays_on_host(dtype: DType) -> bool {
    dtype == DType::I64
}

/// A plan of the backend on the device, for calls on host memory.
#[derive(Debug)]
struct OnHostPlan {
    /// On the host.
    problem: Problem,
    /// Of the same problem on the device.
    plan: Arc<dyn Plan>,
    device: CudaDevice,
}

impl OnHostPlan {
    fn driver(&self, operation: &'static str) -> impl Fn(DriverError) -> Error {
        let name = self.backend().to_owned();
        move |error| failure(&name, operation, error)
    }

    fn send(&self, view: View<'_>) -> Result<DeviceTensor, Error> {
        DeviceTensor::from_host(&self.device, view).map_err(self.driver("copying to the device"))
    }

    fn room(&self, view: &ViewMut<'_>) -> Result<DeviceTensor, Error> {
        DeviceTensor::filled(&self.device, view.desc(), POISON)
            .map_err(self.driver("allocating on the device"))
    }

    /// Runs `work` with device scratch of exactly as many bytes as the plan asks for.
    fn with_scratch(&self, work: impl FnOnce(Scratch<'_>) -> Result<(), Error>) -> Result<(), Error> {
        let bytes = self.plan.scratch_bytes();
        let stream = self.device.stream();
        let mut memory = stream
            .clone_htod(&vec![POISON; bytes + GUARD])
            .map_err(self.driver("allocating scratch on the device"))?;
        work(scratch_of(&self.device, &mut memory, bytes))?;
        let after = stream.clone_dtoh(&memory).map_err(self.driver("running on the device"))?;
        stream.synchronize().map_err(self.driver("running on the device"))?;
        match after[bytes..].iter().position(|&byte| byte != POISON) {
            None => Ok(()),
            Some(at) => Err(failure(
                self.backend(),
                "checking scratch",
                format!("wrote {at} bytes behind its {bytes} bytes"),
            )),
        }
    }

    /// Copies an output back, and checks that nothing between its elements was written.
    fn fetch(&self, from: &DeviceTensor, to: &mut ViewMut<'_>) -> Result<(), Error> {
        let bytes = from.bytes().map_err(self.driver("copying from the device"))?;
        if !from.desc().is_empty() && !from.gaps_are(POISON, bytes.clone()) {
            return Err(failure(self.backend(), "checking an output", "wrote between its elements"));
        }
        from.put_elements(&bytes, to);
        Ok(())
    }
}

/// The inputs of a call on the device.
struct Sent {
    query: DeviceTensor,
    key: DeviceTensor,
    value: DeviceTensor,
    mask: Option<DeviceTensor>,
    bias: Option<DeviceTensor>,
    alibi_slopes: Option<DeviceTensor>,
    sinks: Option<DeviceTensor>,
    /// In the order of [`Role::DATA`].
    numbers: [Option<DeviceTensor>; Role::DATA.len()],
}

/// The tensors among the numbers of a call, in the order of [`Role::DATA`].
fn numbers<'v, 'a>(data: &'v mut CallData<'a>) -> [&'v mut Option<View<'a>>; Role::DATA.len()] {
    [
        &mut data.query_lengths,
        &mut data.key_value_lengths,
        &mut data.query_offsets,
        &mut data.dropout_seed,
        &mut data.dropout_offset,
    ]
}

impl Sent {
    fn of(plan: &OnHostPlan, inputs: &Inputs<'_>) -> Result<Self, Error> {
        let send = |view: Option<View<'_>>| view.map(|view| plan.send(view)).transpose();
        let (mut data, mut sent) = (inputs.data, <[Option<DeviceTensor>; Role::DATA.len()]>::default());
        for (view, sent) in numbers(&mut data).into_iter().zip(&mut sent) {
            *sent = send(view.filter(|view| !stays_on_host(view.desc().dtype())))?;
        }
        Ok(Self {
            numbers: sent,
            query: plan.send(inputs.query)?,
            key: plan.send(inputs.key)?,
            value: plan.send(inputs.value)?,
            mask: send(inputs.mask)?,
            bias: send(inputs.bias)?,
            alibi_slopes: send(inputs.alibi_slopes)?,
            sinks: send(inputs.sinks)?,
        })
    }

    /// The inputs of the call on the device, whose numbers were these on the host.
    fn inputs<'a>(&'a self, mut data: CallData<'a>) -> Result<Inputs<'a>, Error> {
        for (view, sent) in numbers(&mut data).into_iter().zip(&self.numbers) {
            if let Some(sent) = sent {
                *view = Some(sent.view()?);
            }
        }
        let mut inputs = Inputs::new(self.query.view()?, self.key.view()?, self.value.view()?);
        inputs.data = data;
        inputs.mask = self.mask.as_ref().map(DeviceTensor::view).transpose()?;
        inputs.bias = self.bias.as_ref().map(DeviceTensor::view).transpose()?;
        inputs.alibi_slopes = self.alibi_slopes.as_ref().map(DeviceTensor::view).transpose()?;
        inputs.sinks = self.sinks.as_ref().map(DeviceTensor::view).transpose()?;
        Ok(inputs)
    }
}

impl<B: AttentionBackend> AttentionBackend for OnHost<B> {
    fn name(&self) -> &str {
        self.backend.name()
    }

    fn version(&self) -> &str {
        self.backend.version()
    }

    fn capabilities(&self) -> &Capabilities {
        &self.capabilities
    }

    fn variants(&self) -> Option<&Variants> {
        self.backend.variants()
    }

    fn available(&self) -> Result<(), Unavailable> {
        self.backend.available()
    }

    fn supports(&self, problem: &Problem) -> Result<(), Unsupported> {
        self.backend.supports(&self.on_device(problem)?)
    }

    fn scratch_bytes(&self, problem: &Problem) -> Result<usize, Unsupported> {
        // The device's scratch is our own affair: the caller gives none.
        self.backend.scratch_bytes(&self.on_device(problem)?).map(|_| 0)
    }

    fn plan(&self, problem: &Problem) -> Result<Arc<dyn Plan>, Error> {
        let plan = self.backend.plan(&self.on_device(problem)?)?;
        Ok(Arc::new(OnHostPlan { problem: problem.clone(), plan, device: self.device.clone() }))
    }
}

impl Plan for OnHostPlan {
    fn backend(&self) -> &str {
        self.plan.backend()
    }

    fn problem(&self) -> &Problem {
        &self.problem
    }

    fn scratch_bytes(&self) -> usize {
        0
    }

    fn forward(&self, call: ForwardCall<'_>, scratch: Scratch<'_>) -> Result<(), Error> {
        self.admit(call.problem(), &scratch)?;
        let (_, inputs, mut outputs) = call.into_parts();
        let problem = self.plan.problem();
        let sent = Sent::of(self, &inputs)?;
        let mut out = self.room(&outputs.out)?;
        let mut lse = outputs.lse.as_ref().map(|lse| self.room(lse)).transpose()?;
        self.with_scratch(|scratch| {
            let outputs = ForwardOutputs {
                out: out.view_mut()?,
                lse: lse.as_mut().map(DeviceTensor::view_mut).transpose()?,
            };
            self.plan.forward(ForwardCall::new(problem, sent.inputs(inputs.data)?, outputs)?, scratch)
        })?;
        self.fetch(&out, &mut outputs.out)?;
        if let (Some(from), Some(to)) = (&lse, &mut outputs.lse) {
            self.fetch(from, to)?;
        }
        Ok(())
    }

    fn backward(&self, call: BackwardCall<'_>, scratch: Scratch<'_>) -> Result<(), Error> {
        self.admit(call.problem(), &scratch)?;
        let (_, inputs, saved, mut outputs) = call.into_parts();
        let problem = self.plan.problem();
        let sent = Sent::of(self, &inputs)?;
        let (out, lse, d_out) = (self.send(saved.out)?, self.send(saved.lse)?, self.send(saved.d_out)?);
        let d_lse = saved.d_lse.map(|view| self.send(view)).transpose()?;
        let room = |view: &Option<ViewMut<'_>>| view.as_ref().map(|view| self.room(view)).transpose();
        let mut rooms = [
            room(&outputs.dq)?,
            room(&outputs.dk)?,
            room(&outputs.dv)?,
            room(&outputs.dbias)?,
            room(&outputs.dsinks)?,
        ];
        self.with_scratch(|scratch| {
            let [dq, dk, dv, dbias, dsinks] = &mut rooms;
            let outputs = BackwardOutputs {
                dq: dq.as_mut().map(DeviceTensor::view_mut).transpose()?,
                dk: dk.as_mut().map(DeviceTensor::view_mut).transpose()?,
                dv: dv.as_mut().map(DeviceTensor::view_mut).transpose()?,
                dbias: dbias.as_mut().map(DeviceTensor::view_mut).transpose()?,
                dsinks: dsinks.as_mut().map(DeviceTensor::view_mut).transpose()?,
            };
            let saved = BackwardInputs {
                out: out.view()?,
                lse: lse.view()?,
                d_out: d_out.view()?,
                d_lse: d_lse.as_ref().map(DeviceTensor::view).transpose()?,
            };
            let inputs = sent.inputs(inputs.data)?;
            self.plan.backward(BackwardCall::new(problem, inputs, saved, outputs)?, scratch)
        })?;
        let targets =
            [&mut outputs.dq, &mut outputs.dk, &mut outputs.dv, &mut outputs.dbias, &mut outputs.dsinks];
        for (room, target) in rooms.iter().zip(targets) {
            if let (Some(from), Some(to)) = (room, target) {
                self.fetch(from, to)?;
            }
        }
        Ok(())
    }
}
