//! The backend: calls to plans.

use std::collections::HashMap;
use std::ffi::c_void;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use attention_core::{
    AttentionBackend, BackwardCall, Capabilities, Device, Error, ForwardCall, Inputs, LentScratch, Pass,
    Problem, Role, Scratch, Unavailable, Unsupported, View, ViewMut,
};
use attention_cuda::cudarc::driver::DriverError;
use attention_cuda::{CudaDevice, failure};

use crate::key::{self, CLEANED, Key, Stats, right_bound};
use crate::launch::{Kernels, MadeTo, Terms};
use crate::layout::Layout;
use crate::library::CudnnError;
use crate::lists::Lists;
use crate::plan::{Plan, Slot};
use crate::runtime::{Array, Runtime};
use crate::{CudnnConfig, Target, support};

/// The name of the backend.
pub(crate) const NAME: &str = "cudnn";

/// Fused attention on NVIDIA GPUs by cuDNN, which is found at run time.
///
/// Work is put on the stream of the backend's device ([`CudnnBackend::on`]), and calls return before it is done. Tensors
/// and scratch must be ready on that stream, and stay until the work is done.
///
/// The first call of a kind builds a plan, which takes up to a second ([`prepare`](AttentionBackend::prepare) does it ahead); later ones,
/// with other lengths, scale or windows too, reuse it.
#[derive(Debug)]
pub struct CudnnBackend {
    config: CudnnConfig,
    given: Option<CudaDevice>,
    runtime: OnceLock<Result<Runtime, Unavailable>>,
    /// What is assumed where there is no device.
    target: Target,
    capabilities: OnceLock<Capabilities>,
    prepared: Mutex<HashMap<Problem, Arc<Prepared>>>,
}

/// Problems that are kept prepared.
const KEPT_PROBLEMS: usize = 1024;

impl Default for CudnnBackend {
    /// On the first device, with what the loader finds.
    fn default() -> Self {
        Self::new(CudnnConfig::default())
    }
}

impl CudnnBackend {
    /// With this configuration. Nothing is loaded before the backend is asked for something.
    pub fn new(config: CudnnConfig) -> Self {
        Self {
            config,
            given: None,
            runtime: OnceLock::new(),
            target: Target::default(),
            capabilities: OnceLock::new(),
            prepared: Mutex::default(),
        }
    }

    /// On this device and its stream.
    pub fn on(device: CudaDevice, config: CudnnConfig) -> Self {
        Self { given: Some(device), ..Self::new(config) }
    }

    /// Answers [`supports`](AttentionBackend::supports) as for this target where there is no device. On a machine with
    /// one, what is there counts.
    #[must_use]
    pub fn assuming(self, target: Target) -> Self {
        Self { target, ..self }
    }

    /// What the answers are for: the machine's cuDNN and device, or what is assumed.
    pub fn target(&self) -> Target {
        self.runtime().map_or(self.target, |runtime| runtime.target)
    }

    /// What the calls of a problem share, made at the first one.
    fn prepared(&self, problem: &Problem) -> Result<(&Runtime, Arc<Prepared>), Error> {
        let kept = || self.prepared.lock().unwrap_or_else(PoisonError::into_inner);
        if let (Ok(runtime), Some(prepared)) = (self.runtime(), kept().get(problem)) {
            return Ok((runtime, prepared.clone()));
        }
        let layout = self.layout(problem)?;
        let runtime = self.runtime()?;
        let key = Key::of(problem, runtime.target, &self.config);
        let plan = self.plan(runtime, &key)?;
        let array = |values: Vec<i32>| {
            runtime.array(&values).map_err(|error| failure(NAME, "sending lengths to the device", error))
        };
        let some = |wanted: bool, values: fn(&Problem) -> Vec<i32>| {
            wanted.then(|| array(values(problem))).transpose()
        };
        let cleaned = CLEANED.into_iter().filter(|&role| key.cleans(role) && problem.has(role)).collect();
        let prepared = Arc::new(Prepared {
            cleaned,
            layout,
            plan,
            numbers: Numbers::of(problem),
            lengths: some(key.lengths, key::lengths)?,
            rows: some(key.stats == Stats::Packed, key::row_intervals)?,
            keys: some(key.clean_keys, key::key_intervals)?,
            positions: some(key.makes_bias(), key::positions)?,
            key,
            lists: Lists::default(),
        });
        let mut kept = kept();
        if kept.len() >= KEPT_PROBLEMS {
            kept.clear();
        }
        kept.insert(problem.clone(), prepared.clone());
        Ok((runtime, prepared))
    }

    fn runtime(&self) -> Result<&Runtime, Unavailable> {
        let runtime = self.runtime.get_or_init(|| Runtime::new(&self.config, self.given.clone()));
        runtime.as_ref().map_err(Clone::clone)
    }

    /// The device that calls must be on.
    fn device(&self) -> Device {
        let ordinal = u32::try_from(self.config.device).unwrap_or(u32::MAX);
        self.given.as_ref().map_or(Device::Cuda(ordinal), CudaDevice::device)
    }

    fn plan(&self, runtime: &Runtime, key: &Key) -> Result<Arc<Plan>, Error> {
        let plan = runtime.with_handle(|handle| runtime.plan(key, handle).map_err(Failure::from));
        let plan = plan.map_err(|error| error.during("building a plan"))?;
        let plan = plan.ok_or_else(|| {
            failure(NAME, "building a plan", format!("{} has no engine for {key:?}", runtime.target))
        })?;
        let limit = runtime.workspaces.limit();
        if plan.workspace > limit {
            return Err(Unsupported::ScratchLimit {
                backend: NAME.to_owned(),
                needed: plan.workspace,
                limit,
            }
            .into());
        }
        Ok(plan)
    }
}

/// Everything about a problem that its calls share: looked up by the problem, so that a call does no more than fill in
/// addresses.
#[derive(Debug)]
struct Prepared {
    key: Key,
    /// The operands that are copied first.
    cleaned: Vec<Role>,
    layout: Layout,
    plan: Arc<Plan>,
    numbers: Numbers,
    lengths: Option<Array>,
    rows: Option<Array>,
    keys: Option<Array>,
    positions: Option<Array>,
    lists: Lists,
}

/// What cuDNN or the driver said.
enum Failure {
    Cudnn(CudnnError),
    Driver(DriverError),
}

impl From<CudnnError> for Failure {
    fn from(error: CudnnError) -> Self {
        Self::Cudnn(error)
    }
}

impl From<DriverError> for Failure {
    fn from(error: DriverError) -> Self {
        Self::Driver(error)
    }
}

impl Failure {
    fn during(self, operation: &str) -> Error {
        match self {
            Self::Cudnn(error) => failure(NAME, operation, error),
            Self::Driver(error) => failure(NAME, operation, error),
        }
    }
}

/// The numbers of a call, where cuDNN can read them.
#[derive(Debug)]
struct Numbers {
    scale: f32,
    nothing: f32,
    one: f32,
    keep_scale: f32,
    left: f32,
    left_integer: i32,
    right: i32,
    row_shift: i32,
    query_length: i32,
    key_length: i32,
}

impl Numbers {
    fn of(problem: &Problem) -> Self {
        let dims = problem.dims();
        // The same for every batch row, where there are no lengths or the offset is fixed; nobody reads it elsewhere.
        let shift = if dims.batch > 0 { problem.offset(0) } else { 0 };
        let left = problem.window().left.map_or(0, |left| left as i64 + 1);
        let keep_scale = problem.dropout_stream().map_or(1.0, |stream| stream.keep_scale());
        Self {
            scale: problem.scale() as f32,
            nothing: f32::NEG_INFINITY,
            one: 1.0,
            keep_scale: keep_scale as f32,
            // A key that is `left` behind is still seen, and cuDNN asks for more.
            left: (left - shift) as f32,
            left_integer: left as i32,
            right: right_bound(problem).map_or(0, |right| right as i32),
            row_shift: shift as i32,
            query_length: dims.query_length as i32,
            key_length: dims.key_length as i32,
        }
    }

    fn address(&self, slot: Slot) -> Option<*mut c_void> {
        let float = |number: &f32| std::ptr::from_ref(number).cast_mut().cast();
        let integer = |number: &i32| std::ptr::from_ref(number).cast_mut().cast();
        Some(match slot {
            Slot::Scale => float(&self.scale),
            Slot::Nothing => float(&self.nothing),
            Slot::One => float(&self.one),
            Slot::KeepScale => float(&self.keep_scale),
            Slot::Left => float(&self.left),
            Slot::LeftInteger => integer(&self.left_integer),
            Slot::Right => integer(&self.right),
            Slot::RowShift => integer(&self.row_shift),
            Slot::QueryLength => integer(&self.query_length),
            Slot::KeyLength => integer(&self.key_length),
            _ => return None,
        })
    }
}

/// The addresses of a call's tensors; 0 for those that it has not.
#[derive(Clone, Copy, Debug, Default)]
struct Memory {
    query: u64,
    key: u64,
    value: u64,
    mask: u64,
    bias: u64,
    slopes: u64,
    sinks: u64,
    out: u64,
    lse: u64,
    d_out: u64,
    dq: u64,
    dk: u64,
    dv: u64,
    dsinks: u64,
}

fn read(view: Option<View<'_>>) -> u64 {
    view.map_or(0, |view| view.as_ptr().addr() as u64)
}

fn written(view: &mut Option<ViewMut<'_>>) -> u64 {
    view.as_mut().map_or(0, |view| view.as_mut_ptr().addr() as u64)
}

impl Memory {
    fn of(inputs: &Inputs<'_>) -> Self {
        Self {
            query: read(Some(inputs.query)),
            key: read(Some(inputs.key)),
            value: read(Some(inputs.value)),
            mask: read(inputs.mask),
            bias: read(inputs.bias),
            slopes: read(inputs.alibi_slopes),
            sinks: read(inputs.sinks),
            ..Self::default()
        }
    }

    fn at(&self, role: Role) -> u64 {
        match role {
            Role::Query => self.query,
            Role::Key => self.key,
            Role::Value => self.value,
            Role::Mask => self.mask,
            Role::Bias => self.bias,
            Role::AlibiSlopes => self.slopes,
            Role::Sinks => self.sinks,
            Role::Out => self.out,
            Role::Lse => self.lse,
            Role::DOut => self.d_out,
            Role::DQuery => self.dq,
            Role::DKey => self.dk,
            Role::DValue => self.dv,
            Role::DSinks => self.dsinks,
            _ => 0,
        }
    }
}

/// A call on its way to the device.
struct Run<'a> {
    runtime: &'a Runtime,
    prepared: &'a Prepared,
    kernels: Kernels<'a>,
    memory: Memory,
    /// The address of the scratch.
    scratch: u64,
    lengths: u64,
}

impl<'a> Run<'a> {
    /// Checks the scratch and the addresses that cuDNN is given.
    fn new(
        backend: &CudnnBackend,
        runtime: &'a Runtime,
        prepared: &'a Prepared,
        problem: &'a Problem,
        memory: Memory,
        mut scratch: Scratch<'_>,
    ) -> Result<Self, Error> {
        scratch.check(backend.device(), prepared.layout.bytes)?;
        let address = |array: &Option<Array>| array.as_ref().map_or(0, |array| array.address);
        let lengths = address(&prepared.lengths);
        let run = Self {
            runtime,
            prepared,
            kernels: Kernels {
                runtime,
                problem,
                rows: address(&prepared.rows),
                keys: address(&prepared.keys),
                query_lengths: lengths,
                positions: address(&prepared.positions),
            },
            memory,
            scratch: scratch.as_mut_ptr().addr() as u64,
            lengths,
        };
        // cuDNN reads 16 bytes at a time and does not say so where it may not.
        for role in prepared.plan.slots().filter_map(Slot::role).chain(prepared.cleaned.iter().copied()) {
            let direct = run.scratch_at(Slot::Stats).is_none() || role != Role::Lse;
            let address = memory.at(role);
            if direct && !address.is_multiple_of(16) {
                return Err(Unsupported::Limit {
                    backend: NAME.to_owned(),
                    what: format!("the address of {role}"),
                    value: format!("{address:#x}"),
                    limit: "a multiple of 16 bytes".to_owned(),
                }
                .into());
            }
        }
        Ok(run)
    }

    fn scratch_at(&self, slot: Slot) -> Option<u64> {
        self.prepared.layout.at(slot).map(|start| self.scratch + start)
    }

    /// The rows that a mask or a bias leaves a key; 0 where neither is made one tensor.
    fn seen_rows(&self) -> u64 {
        self.scratch_at(Slot::SeenRows).unwrap_or(0)
    }

    /// The device memory behind a slot: in the scratch, or the caller's.
    fn at(&self, slot: Slot) -> u64 {
        let lengths = || match slot {
            Slot::QueryLengths => self.lengths,
            Slot::KeyLengths => self.lengths + 4 * self.kernels.problem.dims().batch as u64,
            slot => slot.role().map_or(0, |role| self.memory.at(role)),
        };
        self.scratch_at(slot).unwrap_or_else(lengths)
    }

    /// Brings what the plan reads to the scratch.
    ///
    /// # Safety
    /// The memory is that of a checked call of the prepared problem.
    unsafe fn bring(&self) -> Result<(), Error> {
        let (key, problem) = (&self.prepared.key, self.kernels.problem);
        // SAFETY: the call's tensors by the caller's word; room in the scratch by its layout, which was checked.
        unsafe {
            for (slot, role) in [(Slot::Slopes, Role::AlibiSlopes), (Slot::Sinks, Role::Sinks)] {
                if let Some(to) = self.scratch_at(slot) {
                    self.kernels.to_floats(role, self.memory.at(role), to)?;
                }
            }
            if let Some(made) = key.bias.filter(|bias| bias.made) {
                let slopes = if key.slopes { 0 } else { self.at(Slot::Slopes) };
                let Memory { mask, bias, .. } = self.memory;
                let to = MadeTo {
                    bias: self.at(Slot::Bias),
                    seen_rows: self.at(Slot::SeenRows),
                    seen_keys: self.at(Slot::SeenKeys),
                };
                self.kernels.make_bias(made, Terms { mask, bias, slopes }, to)?;
            }
            if problem.pass() == Pass::Backward {
                self.kernels.prepare_backward(self.memory.lse, self.at(Slot::Stats), self.seen_rows())?;
            }
            let seen_keys = self.scratch_at(Slot::SeenKeys).unwrap_or(0);
            let stats = if key.clean_rows { self.at(Slot::Stats) } else { 0 };
            for &role in &self.prepared.cleaned {
                let to = Slot::of(role).map_or(0, |slot| self.at(slot));
                self.kernels.clean(role, self.memory.at(role), to, seen_keys, stats)?;
            }
            if key.dropout {
                self.kernels.keep_mask(self.at(Slot::Kept))?;
            }
        }
        Ok(())
    }

    /// Puts the plan on the stream.
    ///
    /// # Safety
    /// As for [`Run::bring`].
    unsafe fn execute(&self) -> Result<(), Error> {
        let (runtime, prepared) = (self.runtime, self.prepared);
        let run = || -> Result<(), Failure> {
            let workspace = runtime.workspaces.lease(runtime.device.stream(), prepared.plan.workspace)?;
            let address = |slot: Slot| {
                let memory = || std::ptr::with_exposed_provenance_mut(self.at(slot) as usize);
                prepared.numbers.address(slot).unwrap_or_else(memory)
            };
            let addresses: Vec<*mut c_void> = prepared.plan.slots().map(address).collect();
            let list = prepared.lists.take(&addresses, workspace.pointer());
            // SAFETY: numbers and lengths are as the graph describes them and outlive the call; the workspace is as large
            // as the plan asks for and goes back to calls on the same stream alone; the rest is in the scratch, by its
            // layout, or the caller's word.
            let make = || unsafe { prepared.plan.memory(&runtime.cudnn, &addresses, workspace.pointer()) };
            let list = list.map_or_else(make, Ok)?;
            runtime.with_handle(|handle| {
                // SAFETY: a list of this plan.
                unsafe { prepared.plan.execute(&runtime.cudnn, handle, &list) }.map_err(Failure::from)
            })?;
            prepared.lists.put(&addresses, workspace.pointer(), list);
            Ok(())
        };
        run().map_err(|error| error.during("running a plan"))
    }
}

impl AttentionBackend for CudnnBackend {
    fn name(&self) -> &str {
        NAME
    }

    fn version(&self) -> &str {
        env!("CARGO_PKG_VERSION")
    }

    fn capabilities(&self) -> &Capabilities {
        self.capabilities.get_or_init(|| support::capabilities(self.target(), &self.config))
    }

    fn available(&self) -> Result<(), Unavailable> {
        self.runtime().map(|_| ())
    }

    fn supports(&self, problem: &Problem) -> Result<(), Unsupported> {
        self.layout(problem).map(|_| ())
    }

    fn scratch_bytes(&self, problem: &Problem) -> Result<usize, Unsupported> {
        Ok(self.layout(problem)?.bytes)
    }

    fn prepare(&self, problem: &Problem) -> Result<(), Error> {
        self.prepared(problem).map(|_| ())
    }

    fn lend_scratch(&self, problem: &Problem, bytes: usize) -> Result<Box<dyn LentScratch + '_>, Error> {
        let runtime = self.runtime()?;
        runtime.workspaces.lend(NAME, &runtime.device, problem.device(), bytes)
    }

    fn forward(&self, call: ForwardCall<'_>, scratch: Scratch<'_>) -> Result<(), Error> {
        let (problem, inputs, mut outputs) = call.into_parts();
        let (runtime, prepared) = self.prepared(problem)?;
        let memory = Memory {
            out: outputs.out.as_mut_ptr().addr() as u64,
            lse: written(&mut outputs.lse),
            ..Memory::of(&inputs)
        };
        let run = Run::new(self, runtime, &prepared, problem, memory, scratch)?;
        // SAFETY: a checked call: its tensors are what the problem, and so graph and kernels, say.
        unsafe {
            run.bring()?;
            run.execute()?;
            if prepared.key.stats == Stats::Packed {
                let sinks = if problem.has(Role::Sinks) { run.at(Slot::Sinks) } else { 0 };
                let (stats, seen_rows) = (run.at(Slot::Stats), run.seen_rows());
                run.kernels.finish_forward(memory.out, memory.lse, stats, seen_rows, sinks)?;
            }
        }
        Ok(())
    }

    fn backward(&self, call: BackwardCall<'_>, scratch: Scratch<'_>) -> Result<(), Error> {
        let (problem, inputs, saved, mut outputs) = call.into_parts();
        let (runtime, prepared) = self.prepared(problem)?;
        let memory = Memory {
            out: read(Some(saved.out)),
            lse: read(Some(saved.lse)),
            d_out: read(Some(saved.d_out)),
            dq: written(&mut outputs.dq),
            dk: written(&mut outputs.dk),
            dv: written(&mut outputs.dv),
            dsinks: written(&mut outputs.dsinks),
            ..Memory::of(&inputs)
        };
        let run = Run::new(self, runtime, &prepared, problem, memory, scratch)?;
        // SAFETY: as in `forward`.
        unsafe {
            run.bring()?;
            run.execute()?;
            if problem.has(Role::DSinks) {
                let (sinks, delta) = (run.at(Slot::Sinks), run.at(Slot::Delta));
                run.kernels.sink_gradient(memory.dsinks, sinks, delta, memory.lse)?;
            }
        }
        Ok(())
    }
}

impl CudnnBackend {
    /// The scratch of a problem that is served; the refusal of one that is not.
    fn layout(&self, problem: &Problem) -> Result<Layout, Unsupported> {
        support::check(self.capabilities(), self.target(), problem)?;
        if problem.device() != self.device() {
            return Err(Unsupported::Limit {
                backend: NAME.to_owned(),
                what: "memory of its device".to_owned(),
                value: problem.device().to_string(),
                limit: self.device().to_string(),
            });
        }
        Layout::of(problem, &Key::of(problem, self.target(), &self.config)).ok_or_else(|| {
            Unsupported::Limit {
                backend: NAME.to_owned(),
                what: "scratch".to_owned(),
                value: "more".to_owned(),
                limit: "within the address space".to_owned(),
            }
        })
    }
}
