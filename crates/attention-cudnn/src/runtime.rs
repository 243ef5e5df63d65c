//! A device with cuDNN on it: handles, plans, and what calls share.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use attention_core::Unavailable;
use attention_cuda::cudarc::driver::{CudaFunction, DriverError};
use attention_cuda::{CudaDevice, DiskCache, DiskKey, KernelCache, KernelError, Workspaces};
use attention_kernels::Variant;

use crate::execution_plan::{ExecutionPlan, Handle, Site};
use crate::key::Key;
use crate::library::{Cudnn, CudnnError};
use crate::{CudnnConfig, NAME, Target, pattern};

/// From how many execution plans on those that no planned problem uses are given back.
const KEPT_PLANS: usize = 1024;

#[derive(Debug)]
pub(crate) struct Runtime {
    pub(crate) device: CudaDevice,
    pub(crate) cudnn: Cudnn,
    pub(crate) target: Target,
    pub(crate) kernels: KernelCache,
    pub(crate) workspaces: Workspaces,
    /// What plans on disk belong to: the device, as its name and capability say.
    device_kind: String,
    saved_plans: DiskCache,
    /// Handles that nobody is using.
    handles: Mutex<Vec<Handle>>,
    /// Compiled by cuDNN, for problems that differ in what each call may change; `None` where it has no engine.
    plans: Mutex<HashMap<Key, Option<Arc<ExecutionPlan>>>>,
}

/// Locks, also after another thread has panicked: what is kept is whole at any time.
fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Runtime {
    pub(crate) fn new(config: &CudnnConfig, device: Option<CudaDevice>) -> Result<Self, Unavailable> {
        let device = device.map_or_else(|| CudaDevice::new(NAME, config.device), Ok)?;
        let cudnn = Cudnn::open(config)?;
        let capability = device.compute_capability().map_err(|error| Unavailable {
            backend: NAME.to_owned(),
            what: format!("the device does not tell its compute capability: {error}"),
            looked_for: vec![device.device().to_string()],
        })?;
        let target = Target::of(cudnn.version, capability);
        Ok(Self {
            device_kind: format!("{target}, {}", device.context().name().unwrap_or_default()),
            saved_plans: DiskCache::new(config.plan_folder.clone()),
            target,
            device,
            cudnn,
            kernels: KernelCache::new(config.kernel_folder.clone()).wheel_roots(config.wheel_roots.clone()),
            workspaces: Workspaces::new(config.workspace_limit),
            handles: Mutex::default(),
            plans: Mutex::default(),
        })
    }

    /// Runs `work` with a handle that nobody else uses, on the device's stream.
    pub(crate) fn with_handle<R, E: From<CudnnError> + From<DriverError>>(
        &self,
        work: impl FnOnce(&Handle) -> Result<R, E>,
    ) -> Result<R, E> {
        self.device.context().bind_to_thread()?;
        let free = lock(&self.handles).pop();
        let stream = || self.device.stream().cu_stream().cast();
        let handle = free.map_or_else(|| Handle::new(&self.cudnn, stream()), Ok)?;
        let result = work(&handle);
        lock(&self.handles).push(handle);
        result
    }

    /// The execution plan of a problem; `None` where cuDNN has no engine for it. Built for the first problem
    /// of its kind.
    pub(crate) fn execution_plan(
        &self,
        key: &Key,
        handle: &Handle,
    ) -> Result<Option<Arc<ExecutionPlan>>, CudnnError> {
        if let Some(plan) = lock(&self.plans).get(key) {
            return Ok(plan.clone());
        }
        // Not under the lock: building takes up to a second, and two threads that build the same do no harm.
        let started = std::time::Instant::now();
        let file = self.saved_plans.is_kept().then(|| self.file(key));
        let (plan, how) = match file.as_ref().and_then(|file| self.load(key, handle, file)) {
            Some(plan) => (Some(plan), "loaded a cuDNN plan"),
            None => {
                let graph = pattern::of(&self.cudnn, key)?;
                let plan = ExecutionPlan::build(&self.cudnn, Site::Device(handle), graph)?;
                if let (Some(plan), Some(file)) = (&plan, &file) {
                    self.save(plan, file);
                }
                (plan, "built a cuDNN plan")
            }
        };
        tracing::info!(
            pass = %key.pass,
            found = plan.is_some(),
            workspace = plan.as_ref().map_or(0, |plan| plan.workspace),
            ms = started.elapsed().as_secs_f64() * 1e3,
            "{how}"
        );
        let plan = plan.map(Arc::new);
        let mut plans = lock(&self.plans);
        if plans.len() >= KEPT_PLANS {
            let in_use = |plan: &Arc<ExecutionPlan>| Arc::strong_count(plan) > 1;
            plans.retain(|_, plan| plan.as_ref().is_some_and(in_use));
        }
        Ok(plans.entry(key.clone()).or_insert(plan).clone())
    }

    /// What a plan is known by on disk.
    fn file(&self, key: &Key) -> DiskKey {
        // A plan is of a graph, whose operations and numbers are what this source makes of a key.
        let fields = [&*self.device_kind, env!("CARGO_PKG_VERSION"), pattern::SOURCE, &format!("{key:?}")];
        DiskKey::new(&format!("cudnn-{}", key.pass), "json", fields)
    }

    /// A plan that was kept, if cuDNN still takes it.
    fn load(&self, key: &Key, handle: &Handle, file: &DiskKey) -> Option<ExecutionPlan> {
        let saved = self.saved_plans.read(file)?;
        let plan = pattern::of(&self.cudnn, key)
            .and_then(|graph| ExecutionPlan::load(&self.cudnn, handle, graph, &saved));
        plan.inspect_err(|error| tracing::warn!(%error, "a plan from disk was refused, and is built again"))
            .ok()
    }

    fn save(&self, plan: &ExecutionPlan, file: &DiskKey) {
        match plan.saved() {
            Ok(bytes) => match String::from_utf8(bytes) {
                Ok(text) => self.saved_plans.write(file, &text),
                Err(error) => tracing::debug!(%error, "a plan was not kept"),
            },
            Err(error) => tracing::debug!(%error, "a plan was not kept"),
        }
    }

    /// A kernel of a source of `attention-kernels`, compiled as this variant.
    pub(crate) fn function(
        &self,
        file: &str,
        variant: Variant,
        name: &str,
    ) -> Result<CudaFunction, KernelError> {
        let source =
            attention_kernels::source(file).unwrap_or_else(|| unreachable!("the source is in the package"));
        self.kernels.function(self.device.context(), source, variant, name)
    }
}
