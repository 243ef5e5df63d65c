//! Calls on device memory: lent scratch, planning, and tensors that are not where the call is.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use attention::core::{
    BackwardCall, BackwardInputs, BackwardOutputs, Capabilities, Delegate, DelegatePlan, Error as CoreError,
    ForwardCall, ForwardOutputs, Inputs, LentScratch, Plan, Scratch, ScratchBuffer,
};
use attention::{
    Attention, AttentionBackend, CallData, Cause, Device, DeviceKind, Dropout, Error, Gradients,
    Implementation, Problem, Reason, Refusal, Registry, Tensor, Unsupported, Verdict, View, ViewMut,
};

use crate::support::{Planning, Toy, numbers};

const DEVICE: Device = Device::Cuda(0);

/// A backend for memory of `cuda:0`, which is host memory in truth.
#[derive(Debug)]
struct OnDevice {
    toy: Toy,
    capabilities: Capabilities,
    lends: bool,
    /// Bytes lent, and memory lent that was not given back.
    lent: Arc<[AtomicUsize; 2]>,
}

impl OnDevice {
    fn new(toy: Toy) -> Self {
        let mut capabilities = toy.capabilities.clone();
        capabilities.device = DeviceKind::Cuda;
        Self { toy, capabilities, lends: true, lent: Arc::default() }
    }

    fn lent(&self) -> [usize; 2] {
        [0, 1].map(|index| self.lent[index].load(Ordering::Relaxed))
    }
}

/// Host memory that says it is on the device.
#[derive(Debug)]
struct Lent {
    memory: ScratchBuffer,
    lent: Arc<[AtomicUsize; 2]>,
}

impl LentScratch for Lent {
    fn scratch(&mut self) -> Scratch<'_> {
        let bytes = self.memory.bytes_mut();
        // SAFETY: the bytes of a slice that is borrowed exclusively for as long as the scratch lives. Nobody
        // but `OnDevice` takes them, which knows where they are.
        unsafe { Scratch::from_raw_parts(bytes.as_mut_ptr(), bytes.len(), DEVICE) }
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        self.lent[1].fetch_sub(1, Ordering::Relaxed);
    }
}

/// The same memory under another device.
fn moved(view: View<'_>, device: Device) -> View<'_> {
    // SAFETY: pointer, lifetime and description are those of a live view of host memory. As memory of the
    // device it reaches `OnDevice` alone, which calls it host memory again before it looks.
    unsafe { View::from_raw_parts(view.as_ptr(), device, view.desc()) }.unwrap()
}

/// As `moved`, for memory that is written.
fn moved_mut(mut view: ViewMut<'_>, device: Device) -> ViewMut<'_> {
    let (pointer, desc) = (view.as_mut_ptr(), view.desc());
    // SAFETY: pointer and description are those of a live view of host memory, which is taken by value, so
    // the new one is the only one for its lifetime. As memory of the device it reaches `OnDevice` alone,
    // which makes it host memory again before it uses it.
    unsafe { ViewMut::from_raw_parts(pointer, device, desc) }.unwrap()
}

fn host_problem(problem: &Problem) -> Problem {
    problem.to_builder().device(Device::Cpu).build().unwrap()
}

fn host_inputs<'a>(inputs: &Inputs<'a>) -> Inputs<'a> {
    let host = |view| moved(view, Device::Cpu);
    Inputs {
        mask: inputs.mask.map(host),
        bias: inputs.bias.map(host),
        alibi_slopes: inputs.alibi_slopes.map(host),
        sinks: inputs.sinks.map(host),
        data: host_data(&inputs.data),
        ..Inputs::new(host(inputs.query), host(inputs.key), host(inputs.value))
    }
}

fn host_data<'a>(data: &CallData<'a>) -> CallData<'a> {
    let host = |view| moved(view, Device::Cpu);
    CallData {
        query_offsets: data.query_offsets.map(host),
        query_lengths: data.query_lengths.map(host),
        key_value_lengths: data.key_value_lengths.map(host),
        dropout_seed: data.dropout_seed.map(host),
        dropout_offset: data.dropout_offset.map(host),
        ..*data
    }
}

fn host_scratch(mut scratch: Scratch<'_>) -> Scratch<'_> {
    // SAFETY: `Lent` made the scratch of host memory that it borrows exclusively; it is taken by value, so
    // the new one is the only one.
    unsafe { Scratch::from_raw_parts(scratch.as_mut_ptr(), scratch.len(), Device::Cpu) }
}

impl Delegate for OnDevice {
    fn inner(&self) -> &dyn AttentionBackend {
        &self.toy
    }

    fn capabilities(&self) -> &Capabilities {
        &self.capabilities
    }

    fn supports(&self, problem: &Problem) -> Result<(), Unsupported> {
        self.capabilities.check(self.toy.name(), problem)
    }

    fn scratch_bytes(&self, problem: &Problem) -> Result<usize, Unsupported> {
        Delegate::supports(self, problem)?;
        self.toy.scratch_bytes(&host_problem(problem))
    }

    fn plan(&self, problem: &Problem) -> Result<Arc<dyn Plan>, CoreError> {
        Delegate::supports(self, problem)?;
        let (problem, plan) = (problem.clone(), self.toy.plan(&host_problem(problem))?);
        Ok(Arc::new(OnDevicePlan { problem, plan, lends: self.lends, lent: self.lent.clone() }))
    }
}

/// A plan of the toy in host memory, for calls on the device.
#[derive(Debug)]
struct OnDevicePlan {
    problem: Problem,
    plan: Arc<dyn Plan>,
    lends: bool,
    lent: Arc<[AtomicUsize; 2]>,
}

impl DelegatePlan for OnDevicePlan {
    fn inner(&self) -> &dyn Plan {
        &*self.plan
    }

    fn problem(&self) -> &Problem {
        &self.problem
    }

    fn lend_scratch(&self) -> Result<Box<dyn LentScratch + '_>, CoreError> {
        let (backend, bytes) = (Plan::backend(self).to_owned(), self.plan.scratch_bytes());
        if !self.lends {
            return Err(Unsupported::LentScratch { backend, device: DEVICE, needed: bytes }.into());
        }
        self.lent[0].fetch_add(bytes, Ordering::Relaxed);
        self.lent[1].fetch_add(1, Ordering::Relaxed);
        Ok(Box::new(Lent { memory: ScratchBuffer::new(bytes), lent: self.lent.clone() }))
    }

    fn forward(&self, call: ForwardCall<'_>, scratch: Scratch<'_>) -> Result<(), CoreError> {
        self.admit(call.problem(), &scratch)?;
        let (_, inputs, outputs) = call.into_parts();
        let outputs = ForwardOutputs {
            out: moved_mut(outputs.out, Device::Cpu),
            lse: outputs.lse.map(|lse| moved_mut(lse, Device::Cpu)),
        };
        let call = ForwardCall::new(self.plan.problem(), host_inputs(&inputs), outputs)?;
        self.plan.forward(call, host_scratch(scratch))
    }

    fn backward(&self, call: BackwardCall<'_>, scratch: Scratch<'_>) -> Result<(), CoreError> {
        self.admit(call.problem(), &scratch)?;
        let (_, inputs, saved, outputs) = call.into_parts();
        let host = |view| moved(view, Device::Cpu);
        let saved = BackwardInputs {
            out: host(saved.out),
            lse: host(saved.lse),
            d_out: host(saved.d_out),
            d_lse: saved.d_lse.map(host),
        };
        let host = |view: Option<_>| view.map(|view| moved_mut(view, Device::Cpu));
        let outputs = BackwardOutputs {
            dq: host(outputs.dq),
            dk: host(outputs.dk),
            dv: host(outputs.dv),
            dbias: host(outputs.dbias),
            dsinks: host(outputs.dsinks),
        };
        let call = BackwardCall::new(self.plan.problem(), host_inputs(&inputs), saved, outputs)?;
        self.plan.backward(call, host_scratch(scratch))
    }
}

fn registry<const N: usize>(backends: [&Arc<OnDevice>; N]) -> Registry {
    backends.into_iter().fold(Registry::empty(), |registry, backend| registry.with(backend.clone()))
}

/// Query, key and value, B1 T3 S3 N2 H4, and the gradient of their output.
fn data() -> [Tensor; 4] {
    [1, 2, 3, 4].map(|seed| Tensor::from_vec(numbers(24, seed), [1, 3, 2, 4]).unwrap())
}

fn zeros() -> Tensor {
    Tensor::zeros::<f32>([1, 3, 2, 4]).unwrap()
}

/// The result of a forward call on the device.
fn forward(call: &Attention<'_>) -> Result<Tensor, Error> {
    let [q, k, v, _] = data();
    let [q, k, v] = [&q, &k, &v].map(|tensor| moved(tensor.view(), DEVICE));
    let mut out = zeros();
    call.forward_into(q, k, v, moved_mut(out.view_mut(), DEVICE), None)?;
    Ok(out)
}

fn problem() -> Problem {
    let [q, k, v, _] = data();
    let [q, k, v] = [&q, &k, &v].map(|tensor| moved(tensor.view(), DEVICE));
    Attention::new().problem(q, k, v).unwrap()
}

#[test]
fn scratch_is_lent_and_both_passes_run_on_device_memory() {
    let [q, k, v, d_out] = data();
    let bias = numbers(18, 5);
    let bias = View::from_slice(&bias, [2, 3, 3]).unwrap();
    let host = Attention::new().implementation(Toy::new("toy").arc()).causal(true);
    let want = host.clone().bias(bias).forward_with_lse(&q, &k, &v).unwrap();
    let want_gradients = host.bias(bias).backward(&q, &k, &v, &want, &d_out).unwrap();

    let device = Arc::new(OnDevice::new(Toy::new("device").scratch(1000)));
    let registry = registry([&device]);
    let call = Attention::new().registry(&registry).causal(true).bias(moved(bias, DEVICE));
    let [q, k, v, d_out] = [&q, &k, &v, &d_out].map(|tensor| moved(tensor.view(), DEVICE));
    let (mut out, mut lse) = (zeros(), Tensor::zeros::<f32>([1, 3, 2]).unwrap());
    let memory = (moved_mut(out.view_mut(), DEVICE), moved_mut(lse.view_mut(), DEVICE));
    call.forward_into(q, k, v, memory.0, Some(memory.1)).unwrap();
    assert_eq!((&out, &lse), (&want.out, &want.lse));
    assert_eq!(device.lent(), [1000, 0]);

    let [mut dq, mut dk, mut dv] = [(); 3].map(|()| zeros());
    let mut dbias = Tensor::zeros::<f32>([1, 2, 3, 3]).unwrap();
    let (lse, out) = (moved(lse.view(), DEVICE), moved(out.view(), DEVICE));
    let saved = BackwardInputs { out, lse, d_out, d_lse: None };
    let outputs = BackwardOutputs {
        dq: Some(moved_mut(dq.view_mut(), DEVICE)),
        dk: Some(moved_mut(dk.view_mut(), DEVICE)),
        dv: Some(moved_mut(dv.view_mut(), DEVICE)),
        dbias: Some(moved_mut(dbias.view_mut(), DEVICE)),
        dsinks: None,
    };
    call.backward_into(q, k, v, saved, outputs).unwrap();
    assert_eq!(device.lent(), [2000, 0]);
    assert_eq!(dbias.as_slice::<f32>(), want_gradients.dbias.as_ref().unwrap().as_slice::<f32>());
    assert_eq!((dq, dk, dv), want_gradients.into_qkv().unwrap());
    assert_eq!(device.toy.runs(), 2);
}

/// Lengths and the like are in the memory of the call or in that of the host, and nowhere else.
#[test]
fn numbers_of_a_call_are_there_or_on_the_host() {
    let device = Arc::new(OnDevice::new(Toy::new("device")));
    let registry = registry([&device]);
    let (lengths, offsets, seed) = ([2i32], [1i64], [9u32]);
    let views =
        [View::from_slice(&lengths, [1]), View::from_slice(&offsets, [1]), View::from_slice(&seed, [1])];
    let [lengths, offsets, seed] = views.map(Result::unwrap);
    let call = || Attention::new().causal(true).dropout(Dropout::new(0.5, 1));
    let want = {
        let [q, k, v, _] = data();
        let call = call().key_value_lengths([2]).query_offset(1).dropout(Dropout::new(0.5, 9));
        call.implementation(Toy::new("toy").arc()).forward(&q, &k, &v).unwrap()
    };
    let with = |place: Device| {
        let [lengths, offsets, seed] = [lengths, offsets, seed].map(|view| moved(view, place));
        call().registry(&registry).key_value_lengths(lengths).query_offsets(offsets).dropout_seed(seed)
    };
    for place in [DEVICE, Device::Cpu] {
        assert_eq!(forward(&with(place)).unwrap(), want);
        assert_eq!(device.toy.plans(), if place == DEVICE { 1 } else { 2 });
    }
    // A list is on the host.
    let list =
        call().registry(&registry).key_value_lengths([2]).query_offset(1).dropout(Dropout::new(0.5, 9));
    assert_eq!(forward(&list).unwrap(), want);
    let (plans, runs) = (device.toy.plans(), device.toy.runs());
    let error = forward(&with(Device::Cuda(1))).unwrap_err();
    assert_eq!(error.to_string(), "invalid call: key/value lengths is on cuda:1, the call is on cuda:0");
    assert_eq!((device.toy.plans(), device.toy.runs()), (plans, runs));
    let [q, k, v, _] = data();
    let error = with(DEVICE).forward(&q, &k, &v).unwrap_err();
    assert_eq!(error.to_string(), "invalid call: key/value lengths is on cuda:0, the call is on cpu");
}

#[test]
fn scratch_that_nobody_lends_is_an_error_and_none_needs_no_lender() {
    let none =
        |scratch| Arc::new(OnDevice { lends: false, ..OnDevice::new(Toy::new("device").scratch(scratch)) });
    let device = none(64);
    let error = forward(&Attention::new().implementation(device.clone())).unwrap_err();
    assert_eq!(error.to_string(), "device lends no scratch, and a call of it needs 64 bytes on cuda:0");
    assert!(matches!(error, Error::Core(CoreError::Unsupported(Unsupported::LentScratch { .. }))));
    assert_eq!(device.toy.runs(), 0);
    assert!(forward(&Attention::new().implementation(none(0))).is_ok());
}

#[test]
fn an_automatic_choice_goes_past_what_cannot_plan_and_says_so() {
    let failing = Arc::new(OnDevice::new(Toy::new("failing").planning(Planning::Fails)));
    let limited = Arc::new(OnDevice::new(Toy::new("limited").planning(Planning::ShowsALimit)));
    let last = Arc::new(OnDevice::new(Toy::new("last")));
    let registry = registry([&failing, &limited, &last]);
    let call = Attention::new().registry(&registry);
    assert!(forward(&call).is_ok());
    assert_eq!([&failing, &limited, &last].map(|device| device.toy.runs()), [0, 0, 1]);

    let selection = call.plan(&problem()).unwrap();
    assert_eq!((selection.backend().name(), selection.reason()), ("last", Reason::FirstInOrder));
    let reasons: Vec<_> = selection.passed_over().iter().map(Refusal::to_string).collect();
    assert_eq!(
        reasons,
        [
            "while planning: failing failed in building a plan: no engine",
            "while planning: limited needs 2048 bytes of scratch, the limit is 1024",
        ]
    );
    assert!(matches!(&selection.passed_over()[0], Refusal::Planning { name, .. } if name == "failing"));

    // An explanation plans only where it is asked to.
    let explanation = call.explain_problem(&problem());
    assert_eq!(explanation.chosen().unwrap().name, "failing");
    let explanation = call.explain_planned(&problem());
    assert_eq!(explanation.chosen().unwrap().name, "last");
    assert_eq!(explanation.choice, Some(selection.choice()));
    for (name, reason) in [("failing", &reasons[0]), ("limited", &reasons[1])] {
        let candidate = explanation.candidate(name).unwrap();
        assert_eq!((candidate.verdict, &candidate.reason), (Verdict::Refused(Cause::Planning), reason));
    }

    // A list goes on inside the list.
    let list = call.clone().implementation(["failing", "last"]);
    assert_eq!(list.plan(&problem()).unwrap().reason(), Reason::Preferred(2));
    let list = call.implementation(["failing", "limited"]);
    let error = forward(&list).unwrap_err();
    assert!(matches!(&error, Error::NoImplementation { refusals, .. } if refusals.len() == 2), "{error}");
    assert!(error.to_string().ends_with(&format!("\n  {}\n  {}", reasons[0], reasons[1])), "{error}");
}

#[test]
fn a_named_one_that_cannot_plan_fails_with_its_own_error() {
    let failing = Arc::new(OnDevice::new(Toy::new("failing").planning(Planning::Fails)));
    let limited = Arc::new(OnDevice::new(Toy::new("limited").planning(Planning::ShowsALimit)));
    let last = Arc::new(OnDevice::new(Toy::new("last")));
    let registry = registry([&failing, &limited, &last]);
    for implementation in [Implementation::from("failing"), Implementation::from(failing.clone())] {
        let call = Attention::new().registry(&registry).implementation(implementation);
        let error = forward(&call).unwrap_err();
        assert_eq!(error.to_string(), "failing failed in building a plan: no engine");
        assert!(matches!(error, Error::Core(CoreError::Backend(_))));
    }
    let error = forward(&Attention::new().registry(&registry).implementation("limited")).unwrap_err();
    assert!(matches!(error, Error::Core(CoreError::Unsupported(Unsupported::ScratchLimit { .. }))));
    assert_eq!([&failing, &limited, &last].map(|device| device.toy.runs()), [0, 0, 0]);
}

/// The default of the trait.
#[test]
fn a_plan_on_host_memory_lends_no_scratch() {
    let plan = Toy::new("plain").scratch(8).plan(&host_problem(&problem())).unwrap();
    let error = plan.lend_scratch().unwrap_err();
    assert_eq!(error.to_string(), "plain lends no scratch, and a call of it needs 8 bytes on cpu");
}

#[test]
fn a_tensor_that_is_elsewhere_is_named_with_its_place() {
    let device = Arc::new(OnDevice::new(Toy::new("device")));
    let registry = registry([&device]);
    let call = Attention::new().registry(&registry);
    let [q, k, v, d_out] = data();
    let on = |tensor: &'static str, name: &str| if tensor == name { Device::Cpu } else { DEVICE };
    let forward = |elsewhere: &'static str| {
        let (mut out, mut lse) = (zeros(), Tensor::zeros::<f32>([1, 3, 2]).unwrap());
        let call = call.forward_into(
            moved(q.view(), on(elsewhere, "query")),
            moved(k.view(), on(elsewhere, "key")),
            moved(v.view(), on(elsewhere, "value")),
            moved_mut(out.view_mut(), on(elsewhere, "out")),
            Some(moved_mut(lse.view_mut(), on(elsewhere, "lse"))),
        );
        call.unwrap_err().to_string()
    };
    for tensor in ["key", "value", "out", "lse"] {
        assert_eq!(forward(tensor), format!("invalid call: {tensor} is on cpu, the call is on cuda:0"));
    }
    // The query says where the call is.
    assert_eq!(forward("query"), "invalid call: key is on cuda:0, the call is on cpu");

    let host = Attention::new().implementation(Toy::new("toy").arc()).forward_with_lse(&q, &k, &v).unwrap();
    let backward = |elsewhere: &'static str| {
        let mut dq = zeros();
        let saved = BackwardInputs {
            out: moved(host.out.view(), on(elsewhere, "out")),
            lse: moved(host.lse.view(), on(elsewhere, "lse")),
            d_out: moved(d_out.view(), on(elsewhere, "d_out")),
            d_lse: None,
        };
        let dq = Some(moved_mut(dq.view_mut(), on(elsewhere, "dq")));
        let outputs = BackwardOutputs { dq, ..Default::default() };
        let [q, k, v] = [&q, &k, &v].map(|tensor| moved(tensor.view(), DEVICE));
        let call = call.clone().gradients(Gradients::QUERY).backward_into(q, k, v, saved, outputs);
        call.unwrap_err().to_string()
    };
    for tensor in ["out", "lse", "d_out", "dq"] {
        assert_eq!(backward(tensor), format!("invalid call: {tensor} is on cpu, the call is on cuda:0"));
    }
    assert_eq!(device.toy.runs(), 0);
}
