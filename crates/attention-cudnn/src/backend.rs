//! The backend: calls to plans.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use attention_core::{
    AttentionBackend, BackwardCall, Capabilities, DType, Device, Error, ForwardCall, LentScratch, Pass,
    Problem, Role, Scratch, Unavailable, Unsupported, Variants,
};
use attention_cuda::{CudaDevice, failure};

use crate::call::{Failure, Prepared, Run};
use crate::contain::Containment;
use crate::far::FarRows;
use crate::key::{self, CLEANED, Key, Stats};
use crate::layout::Layout;
use crate::lists::Lists;
use crate::memory::{Memory, read, written};
use crate::numbers::Numbers;
use crate::plan::Plan;
use crate::runtime::Runtime;
use crate::slot::Slot;
use crate::{CudnnConfig, NAME, Target, support};

/// Fused attention on NVIDIA GPUs by cuDNN, which is found at run time.
///
/// Work is put on the stream of the backend's device ([`CudnnBackend::on`]), and calls return before it is done. Tensors
/// and scratch must be ready on that stream, and stay until the work is done.
///
/// The first call of a kind builds a plan, which takes up to a second ([`prepare`](AttentionBackend::prepare) does it
/// ahead); later ones, with other lengths, scale or windows too, reuse it.
#[derive(Debug)]
pub struct CudnnBackend {
    config: CudnnConfig,
    given: Option<CudaDevice>,
    runtime: OnceLock<Result<Runtime, Unavailable>>,
    /// What is assumed where there is no device.
    target: Target,
    capabilities: OnceLock<Capabilities>,
    variants: Variants,
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
            variants: Variants::new(variants()),
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
            containment: Containment::of(runtime, problem, &key, &self.config)?,
            far: FarRows::of(runtime, problem, &key, &self.config)?,
            runs: self.variants.counter(&variant(&key, problem)),
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

    fn variants(&self) -> Option<&Variants> {
        Some(&self.variants)
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
        let run = Run::new(self.device(), runtime, &prepared, problem, memory, scratch)?;
        // SAFETY: a checked call: its tensors are what the problem, and so graph and kernels, say.
        unsafe {
            run.bring()?;
            run.execute()?;
            if prepared.key.stats == Stats::Packed {
                let sinks = if problem.has(Role::Sinks) { run.at(Slot::Sinks) } else { 0 };
                run.kernels.finish_forward(memory.out, memory.lse, run.at(Slot::Stats), sinks)?;
            }
            run.contain()?;
        }
        prepared.runs.count();
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
        let run = Run::new(self.device(), runtime, &prepared, problem, memory, scratch)?;
        // SAFETY: as in `forward`.
        unsafe {
            run.bring()?;
            run.execute()?;
            if problem.has(Role::DSinks) {
                let (sinks, delta, states) = (run.at(Slot::Sinks), run.at(Slot::Delta), run.at(Slot::States));
                run.kernels.sink_gradient(memory.dsinks, sinks, delta, memory.lse, states)?;
            }
            run.contain()?;
        }
        prepared.runs.count();
        Ok(())
    }
}

/// What a plan is called among the variants: by the pass, what is added to logits and by whom, and how keys are masked, which are what
/// cuDNN has other kernels for, and this backend other kernels beside them.
fn variant(key: &Key, problem: &Problem) -> String {
    let added = match key.bias {
        None if key.slopes => ADDED[3],
        None => ADDED[0],
        Some(bias) if bias.made => ADDED[2],
        Some(_) => ADDED[1],
    };
    let seen = match (key.lengths, key.right.is_some() || key.left) {
        (false, false) => SEEN[0],
        (true, false) => SEEN[1],
        (false, true) => SEEN[2],
        (true, true) => SEEN[3],
    };
    format!("{} {}, {added}, {seen}", problem.pass(), problem.dtype())
}

/// What may be added to logits. A bias is used as it lies only where it is promised to be finite, which is off by default.
const ADDED: [&str; 4] = ["nothing added", "a bias as it lies", "a bias that is made", "ALiBi"];

/// Which keys rows may see.
const SEEN: [&str; 4] = ["all keys", "lengths", "a diagonal", "lengths and a diagonal"];

/// Every variant but those of a bias as it lies.
fn variants() -> impl Iterator<Item = String> {
    let passes = [Pass::Forward, Pass::Backward].into_iter();
    passes.flat_map(|pass| {
        [DType::F16, DType::Bf16].into_iter().flat_map(move |dtype| {
            [ADDED[0], ADDED[2], ADDED[3]].into_iter().flat_map(move |added| {
                let seen = SEEN.into_iter();
                // ALiBi is in the graph only where every key is behind its row.
                let served =
                    seen.filter(move |&seen| added != ADDED[3] || seen == SEEN[2] || seen == SEEN[3]);
                served.map(move |seen| format!("{pass} {dtype}, {added}, {seen}"))
            })
        })
    })
}

impl CudnnBackend {
    /// The scratch of a problem that is served; the refusal of one that is not.
    fn layout(&self, problem: &Problem) -> Result<Layout, Unsupported> {
        support::check(self.capabilities(), self.target(), &self.config, problem)?;
        if problem.device() != self.device() {
            return Err(Unsupported::Limit {
                backend: NAME.to_owned(),
                what: "memory of its device".to_owned(),
                value: problem.device().to_string(),
                limit: self.device().to_string(),
            });
        }
        Layout::of(problem, &Key::of(problem, self.target(), &self.config), &self.config).ok_or_else(|| {
            Unsupported::Limit {
                backend: NAME.to_owned(),
                what: "scratch".to_owned(),
                value: "more".to_owned(),
                limit: "within the address space".to_owned(),
            }
        })
    }
}
