//! The suite on a device: runs a backend for device memory on tensors in host memory, by copies both ways.

use std::error::Error as Cause;
use std::fmt;
use std::sync::Arc;

use attention_core::{
    AttentionBackend, BackendFailure, BackwardCall, BackwardInputs, BackwardOutputs, CallData, Capabilities,
    DType, Device, DeviceKind, Error, ForwardCall, ForwardOutputs, Inputs, InvalidCall, Plan, Problem, Role,
    Scalar, Scratch, TensorDesc, Unavailable, Unsupported, Variants, View, ViewMut,
};
use half::{bf16, f16};

/// What device memory holds before a call: as floats of any width, NaN.
const POISON: u8 = 0xff;
/// Bytes behind the scratch that a call must leave alone.
const GUARD: usize = 256;

/// Memory of a device, as [`OnHost`] needs it. A crate that the CUDA, ROCm or Metal backends share implements
/// it once for all of them.
///
/// [`OnHost`] makes a [`BackendFailure`] with the backend's name of every error of the driver.
pub trait DeviceMemory: fmt::Debug + Send + Sync {
    /// A tensor in this memory, with whatever lies between its elements.
    type Tensor: TensorOnDevice;

    /// The device.
    fn device(&self) -> Device;

    /// A copy of a tensor in host memory with its strides: every byte from its lowest to its highest element.
    ///
    /// # Errors
    /// By the driver.
    fn copy_of(&self, view: View<'_>) -> Result<Self::Tensor, Box<dyn Cause + Send + Sync>>;

    /// A tensor whose every byte is `byte`, also between its elements.
    ///
    /// # Errors
    /// By the driver.
    fn filled(&self, desc: TensorDesc, byte: u8) -> Result<Self::Tensor, Box<dyn Cause + Send + Sync>>;
}

/// A tensor in memory of a device.
pub trait TensorOnDevice {
    /// Dtype, shape and strides.
    fn desc(&self) -> TensorDesc;

    /// The tensor as an input.
    ///
    /// # Errors
    /// As [`View::from_raw_parts`].
    fn view(&self) -> Result<View<'_>, InvalidCall>;

    /// The tensor as an output.
    ///
    /// # Errors
    /// As [`ViewMut::from_raw_parts`].
    fn view_mut(&mut self) -> Result<ViewMut<'_>, InvalidCall>;

    /// The first `bytes` bytes of a tensor that has at least these, as scratch, aligned to
    /// [`SCRATCH_ALIGNMENT`](attention_core::SCRATCH_ALIGNMENT).
    fn scratch(&mut self, bytes: usize) -> Scratch<'_>;

    /// Every byte from the lowest to the highest element, after all work that was put on the device.
    ///
    /// # Errors
    /// By the driver, also what that work ended with.
    fn bytes(&self) -> Result<Vec<u8>, Box<dyn Cause + Send + Sync>>;
}

/// Runs a backend for device memory on tensors in host memory, for the suite: every call copies its tensors
/// both ways.
///
/// It also checks what the suite cannot see: a call that writes behind its scratch or between the elements of
/// an output on the device fails.
///
/// The numbers of a call ([`Role::is_data`]: lengths, starts, block tables and the like) stay in host memory
/// where they are i64, and are copied to the device where they have 32 bits; scales of 8-bit keys and values
/// stay where there is one of them. The suite's cases have both, so a backend has to read both.
#[derive(Debug)]
pub struct OnHost<B, M> {
    backend: B,
    memory: Arc<M>,
    capabilities: Capabilities,
}

impl<B: AttentionBackend, M: DeviceMemory + 'static> OnHost<B, M> {
    /// A backend that works on this memory.
    pub fn new(backend: B, memory: M) -> Self {
        let mut capabilities = backend.capabilities().clone();
        capabilities.device = DeviceKind::Cpu;
        Self { backend, memory: Arc::new(memory), capabilities }
    }

    /// The backend.
    pub fn backend(&self) -> &B {
        &self.backend
    }

    /// The same problem on the device.
    fn on_device(&self, problem: &Problem) -> Result<Problem, Unsupported> {
        if problem.device() != Device::Cpu {
            return Err(Unsupported::Device {
                backend: self.backend.name().to_owned(),
                device: problem.device(),
                expected: DeviceKind::Cpu,
            });
        }
        let builder = problem.to_builder().device(self.memory.device());
        let numbers = Role::ALL.into_iter().filter(|role| role.is_data());
        let builder = numbers.fold(builder, |builder, role| {
            builder.in_host_memory(role, problem.dtype_of(role) == Some(DType::I64))
        });
        let builder = Role::SCALES.into_iter().fold(builder, |builder, role| {
            let is_one = problem.tensor(role).is_some_and(|scales| scales.shape()[..] == [1]);
            builder.in_host_memory(role, is_one)
        });
        let moved = builder.build();
        Ok(moved.unwrap_or_else(|error| unreachable!("a valid problem is valid on any device: {error}")))
    }
}

impl<B: AttentionBackend, M: DeviceMemory + 'static> AttentionBackend for OnHost<B, M> {
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
        // The caller gives none: scratch on the device is allocated for each call.
        self.backend.scratch_bytes(&self.on_device(problem)?).map(|_| 0)
    }

    fn plan(&self, problem: &Problem) -> Result<Arc<dyn Plan>, Error> {
        let plan = self.backend.plan(&self.on_device(problem)?)?;
        Ok(Arc::new(OnHostPlan { problem: problem.clone(), plan, memory: Arc::clone(&self.memory) }))
    }
}

/// A plan of the backend on the device, for calls on host memory.
#[derive(Debug)]
struct OnHostPlan<M> {
    /// On the host.
    problem: Problem,
    /// Of the same problem on the device.
    plan: Arc<dyn Plan>,
    memory: Arc<M>,
}

impl<M: DeviceMemory> OnHostPlan<M> {
    fn failure(&self, operation: &str, source: impl Into<Box<dyn Cause + Send + Sync>>) -> Error {
        let (backend, operation) = (self.plan.backend().to_owned(), operation.to_owned());
        BackendFailure { backend, operation, source: source.into() }.into()
    }

    fn copy_of(&self, view: View<'_>) -> Result<M::Tensor, Error> {
        self.memory.copy_of(view).map_err(|error| self.failure("copying to the device", error))
    }

    fn copy_of_optional(&self, view: Option<View<'_>>) -> Result<Option<M::Tensor>, Error> {
        view.map(|view| self.copy_of(view)).transpose()
    }

    /// Memory on the device that holds the poison.
    fn poisoned(&self, desc: TensorDesc) -> Result<M::Tensor, Error> {
        self.memory.filled(desc, POISON).map_err(|error| self.failure("allocating on the device", error))
    }

    /// Memory on the device for an output, which holds the poison.
    fn poisoned_optional(&self, view: Option<&ViewMut<'_>>) -> Result<Option<M::Tensor>, Error> {
        view.map(|view| self.poisoned(view.desc())).transpose()
    }

    /// Runs `work` with scratch on the device, of exactly as many bytes as the plan asks for.
    fn with_scratch(&self, work: impl FnOnce(Scratch<'_>) -> Result<(), Error>) -> Result<(), Error> {
        let bytes = self.plan.scratch_bytes();
        // Booleans, which are bytes.
        let mut memory = self.poisoned(TensorDesc::contiguous(DType::Bool, [bytes + GUARD]))?;
        work(memory.scratch(bytes))?;
        let after = memory.bytes().map_err(|error| self.failure("running on the device", error))?;
        match after[bytes..].iter().position(|&byte| byte != POISON) {
            None => Ok(()),
            Some(at) => {
                let what = format!("wrote {at} bytes behind its {bytes} bytes");
                Err(self.failure("checking scratch", what))
            }
        }
    }

    /// Copies an output back, and checks that nothing between its elements was written.
    fn fetch(&self, from: Option<&M::Tensor>, to: Option<ViewMut<'_>>) -> Result<(), Error> {
        let (Some(from), Some(to)) = (from, to) else { return Ok(()) };
        let desc = from.desc();
        let mut bytes = from.bytes().map_err(|error| self.failure("copying from the device", error))?;
        let elements = match desc.dtype() {
            DType::F64 => take_elements::<f64>(&desc, &mut bytes, to),
            DType::F32 => take_elements::<f32>(&desc, &mut bytes, to),
            DType::F16 => take_elements::<f16>(&desc, &mut bytes, to),
            _ => take_elements::<bf16>(&desc, &mut bytes, to),
        };
        if elements.is_none() {
            return Err(self.failure("copying from the device", format!("{desc:?} is no output")));
        }
        if bytes.iter().any(|&byte| byte != POISON) {
            return Err(self.failure("checking an output", "wrote between its elements"));
        }
        Ok(())
    }
}

/// Copies the elements from a tensor's bytes to a view in host memory, and leaves poison in their places, so
/// that what is no poison afterwards was written between the elements. `None` where the view has another
/// dtype.
fn take_elements<T: Scalar>(desc: &TensorDesc, bytes: &mut [u8], to: ViewMut<'_>) -> Option<()> {
    let mut to = to.host_mut::<T>()?;
    let (lowest, _) = desc.span()?;
    let (shape, strides) = (desc.shape(), desc.strides());
    for number in 0..desc.element_count()? {
        let index = crate::tensor::unravel(number, &shape);
        let steps = index.iter().zip(strides.iter()).map(|(&index, &stride)| index as isize * stride);
        let at = (steps.sum::<isize>() - lowest).unsigned_abs() * size_of::<T>();
        let element = bytes.get_mut(at..at + size_of::<T>())?;
        to.set(&index, bytemuck::pod_read_unaligned(element));
        element.fill(POISON);
    }
    Some(())
}

/// The inputs of a call on the device.
struct Copies<'c, T> {
    operands: [T; 3],
    mask: Option<T>,
    bias: Option<T>,
    alibi_slopes: Option<T>,
    sinks: Option<T>,
    /// In the order of [`Role::DATA`] and then [`Role::SEQUENCES`].
    numbers: [Number<'c, T>; Role::DATA.len() + Role::SEQUENCES.len()],
    /// Of keys and of values.
    scales: [Number<'c, T>; 2],
    /// What is no tensor among the numbers.
    data: CallData<'c>,
}

/// A tensor among the numbers of a call, in the memory that the problem of the device says.
enum Number<'c, T> {
    Host(Option<View<'c>>),
    Device(T),
}

impl<'c, T: TensorOnDevice> Number<'c, T> {
    fn of<M: DeviceMemory<Tensor = T>>(
        plan: &OnHostPlan<M>,
        role: Role,
        view: Option<View<'c>>,
    ) -> Result<Self, Error> {
        match view {
            Some(view) if plan.plan.problem().device_of(role) != Device::Cpu => {
                plan.copy_of(view).map(Self::Device)
            }
            view => Ok(Self::Host(view)),
        }
    }

    fn view(&self) -> Result<Option<View<'_>>, InvalidCall> {
        match self {
            Self::Host(view) => Ok(*view),
            Self::Device(tensor) => tensor.view().map(Some),
        }
    }
}

impl<'c, T: TensorOnDevice> Copies<'c, T> {
    fn of<M: DeviceMemory<Tensor = T>>(plan: &OnHostPlan<M>, inputs: &Inputs<'c>) -> Result<Self, Error> {
        let data = inputs.data;
        let number = |role: Role, view: Option<View<'c>>| Number::of(plan, role, view);
        Ok(Self {
            operands: [plan.copy_of(inputs.query)?, plan.copy_of(inputs.key)?, plan.copy_of(inputs.value)?],
            mask: plan.copy_of_optional(inputs.mask)?,
            bias: plan.copy_of_optional(inputs.bias)?,
            alibi_slopes: plan.copy_of_optional(inputs.alibi_slopes)?,
            sinks: plan.copy_of_optional(inputs.sinks)?,
            numbers: [
                number(Role::QueryLengths, data.query_lengths)?,
                number(Role::KeyValueLengths, data.key_value_lengths)?,
                number(Role::QueryOffsets, data.query_offsets)?,
                number(Role::DropoutSeed, data.dropout_seed)?,
                number(Role::DropoutOffset, data.dropout_offset)?,
                number(Role::QueryStarts, data.query_starts)?,
                number(Role::KeyValueStarts, data.key_value_starts)?,
                number(Role::BlockTable, data.block_table)?,
            ],
            scales: [
                number(Role::KeyScales, data.key_scales)?,
                number(Role::ValueScales, data.value_scales)?,
            ],
            data,
        })
    }

    fn inputs(&self) -> Result<Inputs<'_>, InvalidCall> {
        let [query, key, value] = &self.operands;
        let mut inputs = Inputs::new(query.view()?, key.view()?, value.view()?);
        (inputs.mask, inputs.bias) = (view_of(&self.mask)?, view_of(&self.bias)?);
        (inputs.alibi_slopes, inputs.sinks) = (view_of(&self.alibi_slopes)?, view_of(&self.sinks)?);
        let [query_lengths, key_value_lengths, query_offsets, dropout_seed, dropout_offset, sequences @ ..] =
            &self.numbers;
        let [query_starts, key_value_starts, block_table] = sequences;
        inputs.data = CallData {
            query_lengths: query_lengths.view()?,
            key_value_lengths: key_value_lengths.view()?,
            query_offsets: query_offsets.view()?,
            dropout_seed: dropout_seed.view()?,
            dropout_offset: dropout_offset.view()?,
            query_starts: query_starts.view()?,
            key_value_starts: key_value_starts.view()?,
            block_table: block_table.view()?,
            key_scales: self.scales[0].view()?,
            value_scales: self.scales[1].view()?,
            ..self.data
        };
        Ok(inputs)
    }
}

fn view_of<T: TensorOnDevice>(tensor: &Option<T>) -> Result<Option<View<'_>>, InvalidCall> {
    tensor.as_ref().map(T::view).transpose()
}

fn view_mut_of<T: TensorOnDevice>(tensor: &mut Option<T>) -> Result<Option<ViewMut<'_>>, InvalidCall> {
    tensor.as_mut().map(T::view_mut).transpose()
}

impl<M: DeviceMemory> Plan for OnHostPlan<M> {
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
        let (_, inputs, outputs) = call.into_parts();
        let copies = Copies::of(self, &inputs)?;
        let mut out = self.poisoned(outputs.out.desc())?;
        let mut lse = self.poisoned_optional(outputs.lse.as_ref())?;
        self.with_scratch(|scratch| {
            let outputs = ForwardOutputs { out: out.view_mut()?, lse: view_mut_of(&mut lse)? };
            let call = ForwardCall::new(self.plan.problem(), copies.inputs()?, outputs)?;
            self.plan.forward(call, scratch)
        })?;
        self.fetch(Some(&out), Some(outputs.out))?;
        self.fetch(lse.as_ref(), outputs.lse)
    }

    fn backward(&self, call: BackwardCall<'_>, scratch: Scratch<'_>) -> Result<(), Error> {
        self.admit(call.problem(), &scratch)?;
        let (_, inputs, saved, outputs) = call.into_parts();
        let copies = Copies::of(self, &inputs)?;
        let (out, lse, d_out) =
            (self.copy_of(saved.out)?, self.copy_of(saved.lse)?, self.copy_of(saved.d_out)?);
        let d_lse = self.copy_of_optional(saved.d_lse)?;
        let BackwardOutputs { dq, dk, dv, dbias, dsinks } = outputs;
        let targets = [dq, dk, dv, dbias, dsinks];
        let [dq, dk, dv, dbias, dsinks] =
            targets.each_ref().map(|target| self.poisoned_optional(target.as_ref()));
        let (mut dq, mut dk, mut dv, mut dbias, mut dsinks) = (dq?, dk?, dv?, dbias?, dsinks?);
        self.with_scratch(|scratch| {
            let saved = BackwardInputs {
                out: out.view()?,
                lse: lse.view()?,
                d_out: d_out.view()?,
                d_lse: view_of(&d_lse)?,
            };
            let outputs = BackwardOutputs {
                dq: view_mut_of(&mut dq)?,
                dk: view_mut_of(&mut dk)?,
                dv: view_mut_of(&mut dv)?,
                dbias: view_mut_of(&mut dbias)?,
                dsinks: view_mut_of(&mut dsinks)?,
            };
            let call = BackwardCall::new(self.plan.problem(), copies.inputs()?, saved, outputs)?;
            self.plan.backward(call, scratch)
        })?;
        let gradients = [dq, dk, dv, dbias, dsinks];
        (gradients.iter().zip(targets)).try_for_each(|(from, to)| self.fetch(from.as_ref(), to))
    }
}
