//! A device with cuDNN on it: the handles, execution plans, kernels and workspaces that all problems share.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use attention_core::Unavailable;
use attention_cuda::cudarc::driver::{CudaFunction, DriverError};
use attention_cuda::{CudaDevice, DiskCache, DiskKey, KernelCache, KernelError, Workspaces};
use attention_kernels::{Helper, Variant};

use crate::arguments::HelperKernel;
use crate::execution_plan::{ExecutionPlan, Handle, Site};
use crate::key::Key;
use crate::library::{Cudnn, CudnnError};
use crate::{CudnnConfig, NAME, Target, pattern};

/// The number of cached execution plans from which on the cache drops those that no planned problem uses. Far
/// more than the kinds of problems of most processes.
const KEPT_PLANS: usize = 1024;

/// What all problems of a backend on a device share.
#[derive(Debug)]
pub(crate) struct Runtime {
    pub(crate) device: CudaDevice,
    pub(crate) cudnn: Cudnn,
    pub(crate) target: Target,
    pub(crate) kernels: KernelCache,
    pub(crate) workspaces: Workspaces,
    /// The version of cuDNN and the capability and name of the device, which plans on disk belong to.
    device_kind: String,
    saved_plans: DiskCache,
    /// The helper kernels that calls have asked for.
    helpers: [OnceLock<CudaFunction>; HelperKernel::COUNT],
    /// The handles that no thread is using.
    handles: Mutex<Vec<Handle>>,
    /// The execution plans that cuDNN has built, by key; `None` if it has no engine.
    plans: Mutex<HashMap<Key, Option<Arc<ExecutionPlan>>>>,
}

/// Locks a mutex, also after another thread has panicked: the values behind these locks are valid at any
/// time.
fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Runtime {
    /// Loads cuDNN, for this device or else for the one that the configuration names.
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
            helpers: Default::default(),
            handles: Mutex::default(),
            plans: Mutex::default(),
        })
    }

    /// Runs `work` with a handle that no other thread uses, whose stream is the device's.
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

    /// The execution plan of this key; `None` if cuDNN has no engine for it. It is loaded or built the first
    /// time that it is asked for.
    pub(crate) fn execution_plan(
        &self,
        key: &Key,
        handle: &Handle,
    ) -> Result<Option<Arc<ExecutionPlan>>, CudnnError> {
        if let Some(plan) = lock(&self.plans).get(key) {
            return Ok(plan.clone());
        }
        // The lock is free meanwhile: building takes up to a second, and if two threads build the same plan,
        // one of the two is dropped.
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

    /// The key of a plan on disk.
    fn file(&self, key: &Key) -> DiskKey {
        // A plan belongs to a graph, which is what the source of the builder makes of a key.
        let fields = [&*self.device_kind, env!("CARGO_PKG_VERSION"), pattern::SOURCE, &format!("{key:?}")];
        DiskKey::new(&format!("cudnn-{}", key.pass), "json", fields)
    }

    /// Loads a plan from disk, if it is there and cuDNN accepts it.
    fn load(&self, key: &Key, handle: &Handle, file: &DiskKey) -> Option<ExecutionPlan> {
        let saved = self.saved_plans.read(file)?;
        let plan = pattern::of(&self.cudnn, key)
            .and_then(|graph| ExecutionPlan::load(&self.cudnn, handle, graph, &saved));
        plan.inspect_err(|error| tracing::warn!(%error, "a plan from disk was refused, and is built again"))
            .ok()
    }

    /// Writes a plan to disk. A failure is logged only, since the plan can be built again.
    fn save(&self, plan: &ExecutionPlan, file: &DiskKey) {
        match plan.saved() {
            Ok(bytes) => match String::from_utf8(bytes) {
                Ok(text) => self.saved_plans.write(file, &text),
                Err(error) => tracing::debug!(%error, "a plan was not kept"),
            },
            Err(error) => tracing::debug!(%error, "a plan was not kept"),
        }
    }

    /// A helper kernel, compiled for the first call that asks for it.
    pub(crate) fn helper(&self, kernel: HelperKernel) -> Result<&CudaFunction, KernelError> {
        let kept = &self.helpers[kernel as usize];
        if let Some(function) = kept.get() {
            return Ok(function);
        }
        let (source, entry_point) = kernel.place();
        let function = self.function(source, Variant::Helper(Helper::LAUNCHED), entry_point)?;
        Ok(kept.get_or_init(|| function))
    }

    /// The kernel `name` of a source file of `attention-kernels`, compiled as this variant.
    pub(crate) fn function(
        &self,
        file: &str,
        variant: Variant,
        name: &str,
    ) -> Result<CudaFunction, KernelError> {
        self.kernels.named(self.device.context(), file, variant, name)
    }
}
