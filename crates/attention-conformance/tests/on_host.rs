//! The suite through `OnHost`, without a GPU: on host memory that claims to be a GPU's, so that only the
//! backend that is made for it reads it.

mod support;

use std::error::Error as Cause;
use std::slice;
use std::sync::Arc;

use attention_conformance::report::Report;
use attention_conformance::suite::Suite;
use attention_conformance::{DeviceMemory, OnHost, TensorOnDevice};
use attention_core::{
    AttentionBackend, BackwardCall, BackwardInputs, BackwardOutputs, CallData, Capabilities, DType, Device,
    DeviceKind, Error, ForwardCall, ForwardOutputs, Inputs, InvalidCall, Plan, Problem, Role,
    SCRATCH_ALIGNMENT, Scratch, TensorDesc, Unavailable, Unsupported, View, ViewMut,
};
use support::{Flaw, Naive};

const DEVICE: Device = Device::Cuda(7);
const NAME: &str = "fake";

/// The memory of [`DEVICE`].
#[derive(Debug)]
struct FakeMemory;

/// A tensor in [`FakeMemory`].
#[derive(Debug)]
struct FakeTensor {
    /// The tensor's bytes, behind some others.
    memory: Vec<u8>,
    /// How many others, so that the first one of the tensor is aligned.
    start: usize,
    desc: TensorDesc,
}

impl FakeTensor {
    fn bytes_mut(&mut self) -> &mut [u8] {
        &mut self.memory[self.start..]
    }
}

/// Bytes of a tensor from its lowest to its highest element, and how many of them are before the element at
/// index 0.
fn placement(desc: &TensorDesc) -> (usize, usize) {
    let (low, high) = desc.span().unwrap();
    let size = desc.dtype().size();
    ((high - low + 1).unsigned_abs() * size, low.unsigned_abs() * size)
}

impl DeviceMemory for FakeMemory {
    type Tensor = FakeTensor;

    fn device(&self) -> Device {
        DEVICE
    }

    fn copy_of(&self, view: View<'_>) -> Result<FakeTensor, Box<dyn Cause + Send + Sync>> {
        assert_eq!(view.device(), Device::Cpu);
        let mut tensor = self.filled(view.desc(), 0)?;
        let (bytes, origin) = placement(&view.desc());
        if bytes > 0 {
            // SAFETY: the bytes from `origin` before the pointer on are those from the view's lowest to its
            // highest element, which the invariant of `View` says are initialised; the view is in host
            // memory, as asserted.
            let from = unsafe { slice::from_raw_parts(view.as_ptr().sub(origin), bytes) };
            tensor.bytes_mut().copy_from_slice(from);
        }
        Ok(tensor)
    }

    fn filled(&self, desc: TensorDesc, byte: u8) -> Result<FakeTensor, Box<dyn Cause + Send + Sync>> {
        let bytes = placement(&desc).0;
        let mut memory = Vec::<u8>::with_capacity(bytes + SCRATCH_ALIGNMENT);
        let start = memory.as_ptr().align_offset(SCRATCH_ALIGNMENT);
        memory.resize(start + bytes, byte);
        Ok(FakeTensor { memory, start, desc })
    }
}

impl TensorOnDevice for FakeTensor {
    fn desc(&self) -> TensorDesc {
        self.desc
    }

    fn view(&self) -> Result<View<'_>, InvalidCall> {
        let (_, origin) = placement(&self.desc);
        let first = self.memory[self.start..].as_ptr().wrapping_add(origin);
        // SAFETY: the tensor owns the bytes from its lowest to its highest element, and the view borrows it.
        unsafe { View::from_raw_parts(first, DEVICE, self.desc) }
    }

    fn view_mut(&mut self) -> Result<ViewMut<'_>, InvalidCall> {
        let (_, origin) = placement(&self.desc);
        let first = self.bytes_mut().as_mut_ptr().wrapping_add(origin);
        // SAFETY: the tensor owns the bytes from its lowest to its highest element, and the view borrows it
        // exclusively.
        unsafe { ViewMut::from_raw_parts(first, DEVICE, self.desc) }
    }

    fn scratch(&mut self, bytes: usize) -> Scratch<'_> {
        assert!(bytes <= self.bytes_mut().len());
        // SAFETY: the tensor has at least `bytes` bytes, as asserted, and the scratch borrows it exclusively.
        unsafe { Scratch::from_raw_parts(self.bytes_mut().as_mut_ptr(), bytes, DEVICE) }
    }

    fn bytes(&self) -> Result<Vec<u8>, Box<dyn Cause + Send + Sync>> {
        Ok(self.memory[self.start..].to_vec())
    }
}

/// What a backend for [`FakeMemory`] does wrong.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Fault {
    None,
    WritesBehindScratch,
    WritesBetweenElements,
    /// Reads the lengths of batch row 0 for all rows where they are on the device.
    ReadsOneLength,
    /// Reads lengths as if they were on the device, wherever they are.
    LengthsOnDeviceAlone,
}

/// The naive backend on [`FakeMemory`], which it reads and writes as the host memory that it is.
#[derive(Debug)]
struct Fake {
    naive: Naive,
    capabilities: Capabilities,
    fault: Fault,
}

impl Fake {
    fn new(fault: Fault) -> Self {
        let naive = Naive::new(Flaw::None);
        let mut capabilities = naive.capabilities.clone();
        capabilities.device = DeviceKind::Cuda;
        Self { naive, capabilities, fault }
    }
}

/// A tensor of one axis whose every element is the first one of this.
fn first_for_all(desc: TensorDesc) -> TensorDesc {
    TensorDesc::strided(desc.dtype(), desc.shape(), [0]).unwrap()
}

/// The same problem in host memory.
fn of_host(problem: &Problem) -> Problem {
    problem.to_builder().device(Device::Cpu).build().unwrap()
}

impl AttentionBackend for Fake {
    fn name(&self) -> &str {
        NAME
    }

    fn version(&self) -> &str {
        "0"
    }

    fn capabilities(&self) -> &Capabilities {
        &self.capabilities
    }

    fn available(&self) -> Result<(), Unavailable> {
        Ok(())
    }

    fn supports(&self, problem: &Problem) -> Result<(), Unsupported> {
        self.capabilities.check(NAME, problem)
    }

    fn scratch_bytes(&self, problem: &Problem) -> Result<usize, Unsupported> {
        self.supports(problem)?;
        self.naive.scratch_bytes(&of_host(problem))
    }

    fn plan(&self, problem: &Problem) -> Result<Arc<dyn Plan>, Error> {
        self.supports(problem)?;
        let mut of_naive = of_host(problem);
        if self.fault == Fault::ReadsOneLength {
            for role in Role::DATA.into_iter().filter(|&role| problem.device_of(role) == DEVICE) {
                let Some(&desc) = problem.tensor(role) else { continue };
                of_naive = of_naive.to_builder().layout(role, first_for_all(desc)).build().unwrap();
            }
        }
        let plan = self.naive.plan(&of_naive)?;
        Ok(Arc::new(FakePlan { problem: problem.clone(), plan, fault: self.fault }))
    }
}

#[derive(Debug)]
struct FakePlan {
    problem: Problem,
    /// Of the naive backend.
    plan: Arc<dyn Plan>,
    fault: Fault,
}

/// A tensor of [`FakeMemory`] as one of host memory.
fn on_host(view: View<'_>) -> View<'_> {
    assert_eq!(view.device(), DEVICE);
    // SAFETY: a `FakeTensor` made the view, so its memory is host memory; the pointer, the description and
    // the lifetime are those of the view.
    unsafe { View::from_raw_parts(view.as_ptr(), Device::Cpu, view.desc()) }.unwrap()
}

fn on_host_mut(mut view: ViewMut<'_>) -> ViewMut<'_> {
    assert_eq!(view.device(), DEVICE);
    // SAFETY: a `FakeTensor` made the view, so its memory is host memory, which `FakeMemory` initialised; the
    // pointer and the description are those of the view, which is taken by value, so the new view is the only
    // one.
    unsafe { ViewMut::from_raw_parts(view.as_mut_ptr(), Device::Cpu, view.desc()) }.unwrap()
}

impl FakePlan {
    /// One of the tensors among the numbers of a call, in host memory.
    fn number<'a>(&self, role: Role, view: Option<View<'a>>) -> Option<View<'a>> {
        let view = view?;
        assert_eq!(view.device(), self.problem.device_of(role));
        assert_eq!(view.device() == Device::Cpu, view.desc().dtype() == DType::I64, "{role} is elsewhere");
        if self.fault == Fault::LengthsOnDeviceAlone && view.device() == Device::Cpu {
            // What a GPU would do.
            panic!("an illegal memory access was encountered");
        }
        if view.device() == Device::Cpu {
            return Some(view);
        }
        let one = self.fault == Fault::ReadsOneLength;
        let desc = if one { first_for_all(view.desc()) } else { view.desc() };
        // SAFETY: a `FakeTensor` made the view, so its memory is host memory; the pointer and the lifetime
        // are those of the view, and `desc` is its description or one whose stride of 0 reaches the element
        // at index 0 only.
        Some(unsafe { View::from_raw_parts(view.as_ptr(), Device::Cpu, desc) }.unwrap())
    }

    fn inputs<'a>(&self, inputs: &Inputs<'a>) -> Inputs<'a> {
        let data = inputs.data;
        let mut moved = Inputs::new(on_host(inputs.query), on_host(inputs.key), on_host(inputs.value));
        (moved.mask, moved.bias) = (inputs.mask.map(on_host), inputs.bias.map(on_host));
        (moved.alibi_slopes, moved.sinks) = (inputs.alibi_slopes.map(on_host), inputs.sinks.map(on_host));
        moved.data = CallData {
            query_lengths: self.number(Role::QueryLengths, data.query_lengths),
            key_value_lengths: self.number(Role::KeyValueLengths, data.key_value_lengths),
            query_offsets: self.number(Role::QueryOffsets, data.query_offsets),
            dropout_seed: self.number(Role::DropoutSeed, data.dropout_seed),
            dropout_offset: self.number(Role::DropoutOffset, data.dropout_offset),
            query_starts: self.number(Role::QueryStarts, data.query_starts),
            key_value_starts: self.number(Role::KeyValueStarts, data.key_value_starts),
            block_table: self.number(Role::BlockTable, data.block_table),
            ..data
        };
        moved
    }

    /// The scratch in host memory.
    fn scratch<'a>(&self, mut scratch: Scratch<'a>) -> Scratch<'a> {
        let (first, bytes) = (scratch.as_mut_ptr(), scratch.len());
        if self.fault == Fault::WritesBehindScratch {
            // SAFETY: `OnHost` allocates guard bytes after the scratch, in the same allocation, which it
            // checks; this fault writes one of them on purpose.
            unsafe { first.add(bytes + 3).write(0) };
        }
        // SAFETY: a `FakeTensor` made the scratch of host memory, which `FakeMemory` initialised; it is taken
        // by value, so the new scratch is the only one.
        unsafe { Scratch::from_raw_parts(first, bytes, Device::Cpu) }
    }
}

impl Plan for FakePlan {
    fn backend(&self) -> &str {
        NAME
    }

    fn problem(&self) -> &Problem {
        &self.problem
    }

    fn scratch_bytes(&self) -> usize {
        self.plan.scratch_bytes()
    }

    fn forward(&self, call: ForwardCall<'_>, scratch: Scratch<'_>) -> Result<(), Error> {
        self.admit(call.problem(), &scratch)?;
        let (_, inputs, mut outputs) = call.into_parts();
        let desc = outputs.out.desc();
        if self.fault == Fault::WritesBetweenElements && desc.strides()[3] > 1 && desc.shape()[3] > 1 {
            // SAFETY: the byte is between the first two elements of `out`, so inside the memory that a
            // `FakeTensor` owns and that the view borrows exclusively.
            unsafe { outputs.out.as_mut_ptr().add(desc.dtype().size()).write(0) };
        }
        let outputs = ForwardOutputs { out: on_host_mut(outputs.out), lse: outputs.lse.map(on_host_mut) };
        let call = ForwardCall::new(self.plan.problem(), self.inputs(&inputs), outputs)?;
        self.plan.forward(call, self.scratch(scratch))
    }

    fn backward(&self, call: BackwardCall<'_>, scratch: Scratch<'_>) -> Result<(), Error> {
        self.admit(call.problem(), &scratch)?;
        let (_, inputs, saved, outputs) = call.into_parts();
        let saved = BackwardInputs {
            out: on_host(saved.out),
            lse: on_host(saved.lse),
            d_out: on_host(saved.d_out),
            d_lse: saved.d_lse.map(on_host),
        };
        let outputs = BackwardOutputs {
            dq: outputs.dq.map(on_host_mut),
            dk: outputs.dk.map(on_host_mut),
            dv: outputs.dv.map(on_host_mut),
            dbias: outputs.dbias.map(on_host_mut),
            dsinks: outputs.dsinks.map(on_host_mut),
        };
        let call = BackwardCall::new(self.plan.problem(), self.inputs(&inputs), saved, outputs)?;
        self.plan.backward(call, self.scratch(scratch))
    }
}

fn run(fault: Fault, filter: &str) -> Report {
    let suite = Suite::new().filter(filter).dtypes([DType::F32, DType::Bf16]);
    assert!(!suite.list().is_empty(), "{filter} names no case");
    suite.run(&OnHost::new(Fake::new(fault), FakeMemory), |_| {})
}

#[test]
fn a_right_backend_for_device_memory_passes() {
    for filter in
        ["groups/", "layout/", "lengths/", "offsets/near", "bias/rank", "mask/rank", "sinks/", "dropout/"]
    {
        let report = run(Fault::None, filter);
        let failures: Vec<String> = report.failures().map(ToString::to_string).collect();
        assert!(failures.is_empty(), "{}\n{}", report.totals(), failures.join("\n"));
        assert!(report.totals().passed > 0 && report.totals().skipped == 0, "{filter}: {}", report.totals());
    }
}

/// Some case of this part of the suite fails with `words`.
fn fails_with(fault: Fault, filter: &str, words: &str) {
    let failures: Vec<String> = run(fault, filter).failures().map(ToString::to_string).collect();
    let named = failures.iter().filter(|failure| failure.contains(words)).count();
    assert!(named > 0, "{fault:?}: no failure of {filter} says '{words}':\n{}", failures.join("\n"));
}

#[test]
fn writes_outside_scratch_and_outputs_on_the_device_are_seen() {
    fails_with(
        Fault::WritesBehindScratch,
        "groups/",
        "fake failed in checking scratch: wrote 3 bytes behind its",
    );
    fails_with(
        Fault::WritesBetweenElements,
        "layout/",
        "fake failed in checking an output: wrote between its elements",
    );
}

#[test]
fn lengths_are_read_on_the_device_and_on_the_host() {
    fails_with(Fault::ReadsOneLength, "lengths/", "out of bounds");
    fails_with(Fault::LengthsOnDeviceAlone, "lengths/", "panicked: an illegal memory access");
}

#[test]
fn problems_on_a_device_are_refused() {
    let on_host = OnHost::new(Fake::new(Fault::None), FakeMemory);
    assert_eq!(on_host.capabilities().device, DeviceKind::Cpu);
    assert_eq!((on_host.name(), on_host.backend().capabilities.device), (NAME, DeviceKind::Cuda));
    let x = TensorDesc::contiguous(DType::F32, [1, 2, 1, 8]);
    let problem = Problem::builder(x, x, x).device(DEVICE).build().unwrap();
    let refusal = on_host.supports(&problem).unwrap_err();
    assert!(matches!(refusal, Unsupported::Device { device: DEVICE, .. }), "{refusal}");
    // Scratch is on the device, and the caller gives none.
    assert_eq!(on_host.scratch_bytes(&of_host(&problem)), Ok(0));
}
