//! The backend: calls to plans.

use std::collections::HashMap;
use std::ffi::c_void;
use std::ops::Range;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use attention_core::{
    AttentionBackend, BackwardCall, Capabilities, Device, Error, ForwardCall, LentScratch, Pass, Problem,
    Role, Scratch, Unavailable, Unsupported, View,
};
use attention_cuda::cudarc::driver::{CudaSlice, DriverError};
use attention_cuda::{CudaDevice, failure};

use crate::key::{Key, Stats, right_bound};
use crate::library::CudnnError;
use crate::plan::{Plan, Slot};
use crate::rows::{self, Rows};
use crate::runtime::Runtime;
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
        let key = Key::of(problem, runtime.target);
        let plan = self.plan(runtime, &key)?;
        let array = |values: Vec<i32>| {
            runtime.array(&values).map_err(|error| failure(NAME, "sending lengths to the device", error))
        };
        let some = |wanted: bool, values: fn(&Problem) -> Vec<i32>| {
            wanted.then(|| array(values(problem))).transpose()
        };
        let cleaned = CLEANED.map(|role| key.cleans(role) && problem.has(role));
        let prepared = Arc::new(Prepared {
            stats: key.stats,
            cleaned,
            layout,
            plan,
            numbers: Numbers::of(problem),
            lengths: some(key.lengths, rows::lengths)?,
            rows: some(key.stats == Stats::Packed || key.clean_rows, rows::intervals)?,
            keys: some(key.clean_keys, rows::key_intervals)?,
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

    /// Runs a plan with these addresses.
    ///
    /// # Safety
    /// As for [`Plan::execute`], for the slots that are not lengths or numbers.
    unsafe fn execute(
        &self,
        runtime: &Runtime,
        problem: &Problem,
        prepared: &Prepared,
        memory: impl Fn(Slot) -> u64,
    ) -> Result<(), Error> {
        let run = || -> Result<(), Failure> {
            let lengths = prepared.lengths.as_ref().map_or(0, |lengths| runtime.address(lengths));
            let key_lengths = lengths + 4 * problem.dims().batch as u64;
            let workspace = runtime.workspaces.lease(runtime.device.stream(), prepared.plan.workspace)?;
            let address = |slot: Slot| match slot {
                Slot::QueryLengths => lengths as *mut c_void,
                Slot::KeyLengths => key_lengths as *mut c_void,
                slot => prepared.numbers.address(slot).unwrap_or_else(|| memory(slot) as *mut c_void),
            };
            runtime.with_handle(|handle| {
                // SAFETY: numbers and lengths are as the graph describes them and outlive the call, the workspace is as
                // large as the plan asks for and goes back to calls on the same stream alone, the rest is the caller's
                // word.
                unsafe { prepared.plan.execute(&runtime.cudnn, handle, workspace.pointer(), address) }
                    .map_err(Failure::from)
            })
        };
        run().map_err(|error| error.during("running a plan"))
    }
}

/// Everything about a problem that its calls share: looked up by the problem, so that a call does no more than fill in
/// addresses.
#[derive(Debug)]
struct Prepared {
    stats: Stats,
    cleaned: [bool; CLEANED.len()],
    layout: Layout,
    plan: Arc<Plan>,
    numbers: Numbers,
    lengths: Option<CudaSlice<i32>>,
    rows: Option<CudaSlice<i32>>,
    keys: Option<CudaSlice<i32>>,
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
        Self {
            scale: problem.scale() as f32,
            nothing: f32::NEG_INFINITY,
            one: 1.0,
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

/// Where things are in the scratch: each at a multiple of 256 bytes, empty where it is not needed.
#[derive(Debug, Default)]
struct Layout {
    stats: Range<usize>,
    delta: Range<usize>,
    dq_sum: Range<usize>,
    dq: Range<usize>,
    dk: Range<usize>,
    dv: Range<usize>,
    /// Copies of operands, in the order of [`CLEANED`].
    clean: [Range<usize>; CLEANED.len()],
    bytes: usize,
}

/// The operands that may be copied.
const CLEANED: [Role; 5] = [Role::Query, Role::Key, Role::Value, Role::Out, Role::DOut];

impl Layout {
    /// `None` on overflow.
    fn of(problem: &Problem, key: &Key) -> Option<Self> {
        let dims = problem.dims();
        let mut layout = Self::default();
        let mut end = 0usize;
        let mut take = |shape: &[usize], size: usize| -> Option<Range<usize>> {
            let bytes = shape.iter().try_fold(size, |bytes, &axis| bytes.checked_mul(axis))?;
            let start = end.checked_next_multiple_of(256)?;
            end = start.checked_add(bytes)?;
            Some(start..end)
        };
        let rows = [dims.batch, dims.query_heads, dims.query_length];
        if key.stats == Stats::Packed {
            layout.stats = take(&rows, 4)?;
        }
        if key.pass == Pass::Backward {
            let [b, n, t] = rows;
            layout.delta = take(&rows, 4)?;
            layout.dq_sum = take(&[b, n, t, dims.head_dim], 4)?;
            let keys = [b, dims.key_heads, dims.key_length];
            let size = problem.dtype().size();
            // Gradients that nobody wants: the graph writes all three.
            if !problem.has(Role::DQuery) {
                layout.dq = take(&[b, n, t, dims.head_dim], size)?;
            }
            if !problem.has(Role::DKey) {
                layout.dk = take(&[keys[0], keys[1], keys[2], dims.head_dim], size)?;
            }
            if !problem.has(Role::DValue) {
                layout.dv = take(&[keys[0], keys[1], keys[2], dims.value_head_dim], size)?;
            }
        }
        for (role, range) in CLEANED.into_iter().zip(&mut layout.clean) {
            if let Some(desc) = problem.tensor(role).filter(|_| key.cleans(role)) {
                *range = take(&desc.shape(), problem.dtype().size())?;
            }
        }
        layout.bytes = end;
        Some(layout)
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
        self.runtime()?.lend(problem.device(), bytes)
    }

    fn forward(&self, call: ForwardCall<'_>, mut scratch: Scratch<'_>) -> Result<(), Error> {
        let problem = call.problem();
        let (runtime, prepared) = self.prepared(problem)?;
        let layout = &prepared.layout;
        scratch.check(self.device(), layout.bytes)?;
        let (_, inputs, mut outputs) = call.into_parts();
        let base = scratch.as_mut_ptr() as u64;
        let out = outputs.out.as_mut_ptr() as u64;
        let lse = outputs.lse.as_mut().map_or(0, |lse| lse.as_mut_ptr() as u64);
        // The logsumexp is cuDNN's to write where it goes straight to the caller; 0 is a multiple of anything.
        let direct = if prepared.stats == Stats::Packed { 0 } else { lse };
        aligned(&[
            inputs.query.as_ptr(),
            inputs.key.as_ptr(),
            inputs.value.as_ptr(),
            out as *const u8,
            direct as *const u8,
        ])?;
        let stats = if prepared.stats == Stats::Packed { base + layout.stats.start as u64 } else { lse };
        let operands = self.cleaned(
            runtime,
            problem,
            &prepared,
            base,
            [Some(inputs.query), Some(inputs.key), Some(inputs.value), None, None],
        )?;
        let memory = |slot: Slot| match slot {
            Slot::Query => operands[0],
            Slot::Key => operands[1],
            Slot::Value => operands[2],
            Slot::Out => out,
            Slot::Stats => stats,
            slot => unreachable!("no {slot:?} in a forward graph"),
        };
        // SAFETY: a checked call: its tensors are what the problem, and so the graph, says; the scratch has the layout's
        // size.
        unsafe { self.execute(runtime, problem, &prepared, memory)? };
        if prepared.stats == Stats::Packed {
            self.with_rows(runtime, problem, &prepared, stats, |rows| {
                // SAFETY: the call's output and logsumexp.
                unsafe { rows.finish_forward(out, lse) }
            })?;
        }
        Ok(())
    }

    fn backward(&self, call: BackwardCall<'_>, mut scratch: Scratch<'_>) -> Result<(), Error> {
        let problem = call.problem();
        let (runtime, prepared) = self.prepared(problem)?;
        let layout = &prepared.layout;
        scratch.check(self.device(), layout.bytes)?;
        let (_, inputs, saved, mut outputs) = call.into_parts();
        let base = scratch.as_mut_ptr() as u64;
        let at = |range: &Range<usize>| base + range.start as u64;
        let gradient = |view: &mut Option<attention_core::ViewMut<'_>>, room: &Range<usize>| {
            view.as_mut().map_or(at(room), |view| view.as_mut_ptr() as u64)
        };
        let dq = gradient(&mut outputs.dq, &layout.dq);
        let dk = gradient(&mut outputs.dk, &layout.dk);
        let dv = gradient(&mut outputs.dv, &layout.dv);
        aligned(&[
            inputs.query.as_ptr(),
            inputs.key.as_ptr(),
            inputs.value.as_ptr(),
            saved.out.as_ptr(),
            saved.d_out.as_ptr(),
            dq as *const u8,
            dk as *const u8,
            dv as *const u8,
        ])?;
        let stats = at(&layout.stats);
        self.with_rows(runtime, problem, &prepared, stats, |rows| {
            // SAFETY: the call's logsumexp, and scratch of its size.
            unsafe { rows.prepare_backward(saved.lse.as_ptr() as u64) }
        })?;
        let operands = self.cleaned(
            runtime,
            problem,
            &prepared,
            base,
            [Some(inputs.query), Some(inputs.key), Some(inputs.value), Some(saved.out), Some(saved.d_out)],
        )?;
        let memory = |slot: Slot| match slot {
            Slot::Query => operands[0],
            Slot::Key => operands[1],
            Slot::Value => operands[2],
            Slot::Out => operands[3],
            Slot::DOut => operands[4],
            Slot::Stats => stats,
            Slot::Delta => at(&layout.delta),
            Slot::DQuerySum => at(&layout.dq_sum),
            Slot::DQuery => dq,
            Slot::DKey => dk,
            Slot::DValue => dv,
            slot => unreachable!("no {slot:?} in a backward graph"),
        };
        // SAFETY: as in `forward`.
        unsafe { self.execute(runtime, problem, &prepared, memory) }
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
        Layout::of(problem, &Key::of(problem, self.target())).ok_or_else(|| Unsupported::Limit {
            backend: NAME.to_owned(),
            what: "scratch".to_owned(),
            value: "more".to_owned(),
            limit: "within the address space".to_owned(),
        })
    }

    /// The addresses of the operands, in the order of [`CLEANED`]: of copies, where what they hold at masked positions
    /// must not be seen.
    fn cleaned(
        &self,
        runtime: &Runtime,
        problem: &Problem,
        prepared: &Prepared,
        base: u64,
        operands: [Option<View<'_>>; CLEANED.len()],
    ) -> Result<[u64; CLEANED.len()], Error> {
        let mut addresses = [0; CLEANED.len()];
        for (index, role) in CLEANED.into_iter().enumerate() {
            let Some(view) = operands[index] else { continue };
            addresses[index] = view.as_ptr() as u64;
            if !prepared.cleaned[index] {
                continue;
            }
            let to = base + prepared.layout.clean[index].start as u64;
            let intervals = match role {
                Role::Key | Role::Value => &prepared.keys,
                _ => &prepared.rows,
            };
            let rows = Self::rows(runtime, problem, intervals, 0);
            // SAFETY: an operand of the call, and scratch of its size.
            unsafe { rows.clean(&view.desc(), addresses[index], to) }
                .map_err(|error| failure(NAME, "running a kernel", error))?;
            addresses[index] = to;
        }
        Ok(addresses)
    }

    fn with_rows(
        &self,
        runtime: &Runtime,
        problem: &Problem,
        prepared: &Prepared,
        stats: u64,
        work: impl FnOnce(&Rows<'_>) -> Result<(), rows::LaunchError>,
    ) -> Result<(), Error> {
        let rows = Self::rows(runtime, problem, &prepared.rows, stats);
        work(&rows).map_err(|error| failure(NAME, "running a kernel", error))
    }

    fn rows<'a>(
        runtime: &'a Runtime,
        problem: &'a Problem,
        intervals: &Option<CudaSlice<i32>>,
        stats: u64,
    ) -> Rows<'a> {
        Rows {
            kernels: &runtime.kernels,
            stream: runtime.device.stream(),
            problem,
            intervals: intervals.as_ref().map_or(0, |intervals| runtime.address(intervals)),
            stats,
        }
    }
}

/// cuDNN reads 16 bytes at a time and does not say so where it may not.
fn aligned(pointers: &[*const u8]) -> Result<(), Unsupported> {
    match pointers.iter().find(|pointer| pointer.addr() % 16 != 0) {
        None => Ok(()),
        Some(pointer) => Err(Unsupported::Limit {
            backend: NAME.to_owned(),
            what: "addresses that are multiples of 16 bytes".to_owned(),
            value: format!("{:#x}", pointer.addr()),
            limit: "for all operands and gradients".to_owned(),
        }),
    }
}
