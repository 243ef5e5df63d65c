//! The backend: calls to launches.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use attention_core::{
    AttentionBackend, BackwardCall, Capabilities, DType, Device, DeviceKind, Error, FeatureSet, ForwardCall,
    LentScratch, LongSums, NumericsClass, PassCapabilities, Problem, Role, Scratch, ScratchGrowth,
    Unavailable, Unsupported, VariantCounter, Variants, View, ViewMut,
};
use attention_cuda::cudarc::driver::sys::{CUdevice_attribute, CUfunction_attribute};
use attention_cuda::cudarc::driver::{CudaFunction, PushKernelArg};
use attention_cuda::parameters::ProblemParameters;
use attention_cuda::{CudaDevice, KernelCache, Workspaces, check_stream, failure};

use super::NAME;
use super::config::ChunkedCudaConfig;
use super::plan::{Plan, limit, variants};
use super::tiles::{MOST_DEPTH, MOST_HEAD, MOST_VALUE, Machine};

/// Measured on an H200 with values of one sign, 256 rows: f32 in tf32 parts, then halves with the keys cut in 132 parts, each a
/// sum of its own. Without parts halves drift as cuDNN does.
const LONG_SUMS: &[LongSums] = &[
    LongSums::new(DType::F32, 4096, -2.5e-6),
    LongSums::new(DType::F32, 65_536, -1.1e-5),
    LongSums::new(DType::F32, 1 << 20, -1.7e-4),
    LongSums::new(DType::F16, 1 << 20, -7e-5),
];

/// How many of them are f32's.
const SUMS_OF_F32: usize = 3;

/// Problems that are kept prepared.
const KEPT_PROBLEMS: usize = 1024;

/// The memory-efficient backend for NVIDIA GPUs from compute capability 8.0: every option, every dtype, forward and
/// backward, in kernels of this library's own. They are compiled at the first call of a kind, which takes some seconds, by
/// NVRTC, which is found at run time.
///
/// Work is put on the stream of the backend's device ([`ChunkedCudaBackend::on`]), and calls return before it is done.
/// Tensors and scratch must be ready on that stream, and stay until the work is done.
///
/// # Semantics
/// - Numerics classes: `F64` for f64, `F32` for f32, `HalfF32` for f16 and bf16, whose products run on tensor cores.
/// - Every call gives the same bits each time: no sum depends on the order in which blocks run.
#[derive(Debug)]
pub struct ChunkedCudaBackend {
    config: ChunkedCudaConfig,
    given: Option<CudaDevice>,
    runtime: OnceLock<Result<Runtime, Unavailable>>,
    capabilities: Capabilities,
    /// Listed when the device is known.
    variants: Variants,
    prepared: Mutex<HashMap<Problem, Arc<Prepared>>>,
}

#[derive(Debug)]
struct Runtime {
    device: CudaDevice,
    kernels: KernelCache,
    /// What is lent to calls without scratch of their own.
    workspaces: Workspaces,
    machine: Machine,
}

/// What the calls of a problem share.
#[derive(Debug)]
struct Prepared {
    plan: Plan,
    parameters: ProblemParameters,
    functions: Vec<CudaFunction>,
    /// Of the kernels, in order.
    runs: Vec<VariantCounter>,
}

impl Default for ChunkedCudaBackend {
    /// On the first device.
    fn default() -> Self {
        Self::new(ChunkedCudaConfig::default())
    }
}

impl ChunkedCudaBackend {
    /// With this configuration. Nothing is loaded before the backend is asked for something.
    pub fn new(config: ChunkedCudaConfig) -> Self {
        let pass = |head, value| PassCapabilities::new(FeatureSet::all()).with_max_head_dims(head, value);
        let numerics = [
            (DType::F64, NumericsClass::F64),
            (DType::F32, NumericsClass::F32),
            (DType::F16, NumericsClass::HalfF32),
            (DType::Bf16, NumericsClass::HalfF32),
        ];
        let forward = pass(MOST_HEAD, MOST_VALUE);
        let capabilities = Capabilities::new(DeviceKind::Cuda, numerics, forward, ScratchGrowth::Linear)
            .with_backward(pass(MOST_DEPTH, MOST_DEPTH))
            .with_long_sums(if config.split_f32 { LONG_SUMS } else { &LONG_SUMS[SUMS_OF_F32..] });
        Self {
            config,
            given: None,
            runtime: OnceLock::new(),
            capabilities,
            variants: Variants::default(),
            prepared: Mutex::default(),
        }
    }

    /// On this device and its stream.
    pub fn on(device: CudaDevice, config: ChunkedCudaConfig) -> Self {
        Self { given: Some(device), ..Self::new(config) }
    }

    fn runtime(&self) -> Result<&Runtime, Unavailable> {
        let start = || {
            let runtime = Runtime::new(&self.config, self.given.clone())?;
            self.variants.list(variants(runtime.machine));
            Ok(runtime)
        };
        self.runtime.get_or_init(start).as_ref().map_err(Clone::clone)
    }

    /// The device that calls must be on.
    fn device(&self) -> Device {
        let ordinal = u32::try_from(self.config.device).unwrap_or(u32::MAX);
        self.given.as_ref().map_or(Device::Cuda(ordinal), CudaDevice::device)
    }

    /// Checks a problem, and plans it for such a device.
    fn plan(&self, problem: &Problem, machine: Machine) -> Result<Plan, Unsupported> {
        self.capabilities.check(NAME, problem)?;
        if problem.device() != self.device() {
            return Err(limit("memory of its device", problem.device(), self.device().to_string()));
        }
        Plan::of(problem, machine)
    }

    fn prepared(&self, problem: &Problem) -> Result<(&Runtime, Arc<Prepared>), Error> {
        let kept = || self.prepared.lock().unwrap_or_else(PoisonError::into_inner);
        if let (Ok(runtime), Some(prepared)) = (self.runtime(), kept().get(problem)) {
            return Ok((runtime, prepared.clone()));
        }
        // What is not supported anywhere is refused without a device.
        self.plan(problem, Machine::ANY)?;
        let runtime = self.runtime()?;
        let plan = self.plan(problem, runtime.machine)?;
        let functions = (plan.kernels.iter())
            .map(|kernel| {
                if kernel.shared_bytes > runtime.machine.shared_bytes {
                    return Err(limit(
                        "shared memory of a block",
                        kernel.shared_bytes,
                        format!("at most {} on this device", runtime.machine.shared_bytes),
                    )
                    .into());
                }
                let source = attention_kernels::source(kernel.source)
                    .unwrap_or_else(|| unreachable!("{} is in the package", kernel.source));
                let defines = plan.defines(problem, kernel);
                let defines: Vec<&str> = defines.iter().map(String::as_str).collect();
                let function = runtime
                    .kernels
                    .function(runtime.device.context(), source, &defines, kernel.entry_point)
                    .map_err(|error| failure(NAME, "compiling a kernel", error))?;
                let most = CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
                // At most what the device says that a block may have, an int.
                function
                    .set_attribute(most, kernel.shared_bytes as i32)
                    .map_err(|error| failure(NAME, "reserving shared memory", error))?;
                Ok(function)
            })
            .collect::<Result<Vec<_>, Error>>()?;
        let mut parameters = ProblemParameters::new(problem, runtime.device.stream())
            .map_err(|error| failure(NAME, "sending lengths to the device", error))?;
        let of_calls = parameters.of_calls();
        // Both fit: parts are as many as keep a device busy, and a group has at most as many heads as there are.
        (of_calls.pack, of_calls.parts) = (plan.pack as i32, plan.parts as i32);
        if plan.kernels.iter().any(|kernel| kernel.tiles.split) {
            // Parts of an infinity are NaN.
            of_calls.check_results();
        }
        let runs = plan.kernels.iter().map(|kernel| self.variants.counter(&kernel.variant(&plan))).collect();
        let prepared = Arc::new(Prepared { plan, parameters, functions, runs });
        let mut kept = kept();
        if kept.len() >= KEPT_PROBLEMS {
            kept.clear();
        }
        kept.insert(problem.clone(), prepared.clone());
        Ok((runtime, prepared))
    }

    /// Launches the kernels of a problem on these tensors.
    ///
    /// # Safety
    /// The addresses are those of the problem's tensors, on the backend's device.
    unsafe fn launch(
        &self,
        problem: &Problem,
        tensors: &[(Role, u64)],
        mut scratch: Scratch<'_>,
    ) -> Result<(), Error> {
        let (runtime, prepared) = self.prepared(problem)?;
        let plan = &prepared.plan;
        scratch.check(self.device(), plan.scratch_bytes())?;
        let base = scratch.as_mut_ptr() as u64;
        let stream = runtime.device.stream();
        check_stream(NAME, stream, "the scratch", base)?;
        for &(role, address) in tensors {
            check_stream(NAME, stream, role, address)?;
        }
        let mut parameters = prepared.parameters.of_call();
        parameters.first = base + plan.first.start as u64;
        parameters.second = base + plan.second.start as u64;
        for &(role, address) in tensors {
            parameters.set(role, address);
        }
        for ((kernel, function), runs) in plan.kernels.iter().zip(&prepared.functions).zip(&prepared.runs) {
            let mut launch = stream.launch_builder(function);
            launch.arg(&parameters);
            // SAFETY: every kernel takes this one struct. Its tensors are the problem's (the caller's word), the scratch was
            // checked to have the plan's size, and kernels stay inside the shapes that the struct gives.
            unsafe { launch.launch(kernel.launch_config()) }
                .map_err(|error| failure(NAME, "running a kernel", error))?;
            runs.count();
        }
        Ok(())
    }
}

impl Runtime {
    fn new(config: &ChunkedCudaConfig, device: Option<CudaDevice>) -> Result<Self, Unavailable> {
        let device = device.map_or_else(|| CudaDevice::new(NAME, config.device), Ok)?;
        let unavailable = |what: String| Unavailable {
            backend: NAME.to_owned(),
            what,
            looked_for: vec![device.device().to_string()],
        };
        let silent = |error| unavailable(format!("the device does not answer: {error}"));
        let (major, minor) = device.compute_capability().map_err(silent)?;
        if major < 8 {
            return Err(unavailable(format!("compute capability {major}.{minor}, where 8.0 is needed")));
        }
        let most = CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN;
        let shared_bytes = device.context().attribute(most).map_err(silent)?;
        Ok(Self {
            machine: Machine {
                shared_bytes: usize::try_from(shared_bytes).unwrap_or(0),
                warpgroups: (major, minor) == (9, 0) && config.warpgroups,
                splits: config.split_f32,
            },
            device,
            kernels: KernelCache::new(config.kernel_folder.clone()).wheel_roots(config.wheel_roots.clone()),
            workspaces: Workspaces::new(config.lent_limit),
        })
    }
}

fn of_view(view: View<'_>) -> u64 {
    view.as_ptr() as u64
}

fn of_output(view: &mut ViewMut<'_>) -> u64 {
    view.as_mut_ptr() as u64
}

impl AttentionBackend for ChunkedCudaBackend {
    fn name(&self) -> &str {
        NAME
    }

    fn version(&self) -> &str {
        env!("CARGO_PKG_VERSION")
    }

    fn capabilities(&self) -> &Capabilities {
        &self.capabilities
    }

    fn available(&self) -> Result<(), Unavailable> {
        self.runtime().map(|_| ())
    }

    /// Those of the device at hand; none where there is no device.
    fn variants(&self) -> Option<&Variants> {
        let _ = self.runtime();
        Some(&self.variants)
    }

    fn supports(&self, problem: &Problem) -> Result<(), Unsupported> {
        self.plan(problem, Machine::ANY).map(|_| ())
    }

    fn scratch_bytes(&self, problem: &Problem) -> Result<usize, Unsupported> {
        Ok(self.plan(problem, Machine::ANY)?.scratch_bytes())
    }

    /// Compiles the kernels of the problem.
    fn prepare(&self, problem: &Problem) -> Result<(), Error> {
        self.prepared(problem).map(|_| ())
    }

    fn lend_scratch(&self, problem: &Problem, bytes: usize) -> Result<Box<dyn LentScratch + '_>, Error> {
        let runtime = self.runtime()?;
        runtime.workspaces.lend(NAME, &runtime.device, problem.device(), bytes)
    }

    fn forward(&self, call: ForwardCall<'_>, scratch: Scratch<'_>) -> Result<(), Error> {
        let (problem, inputs, mut outputs) = call.into_parts();
        let mut tensors = inputs_of(&inputs);
        tensors.push((Role::Out, of_output(&mut outputs.out)));
        tensors.extend(outputs.lse.as_mut().map(|lse| (Role::Lse, of_output(lse))));
        // SAFETY: a checked call holds the tensors that its problem describes; `launch` refuses those of another device.
        unsafe { self.launch(problem, &tensors, scratch) }
    }

    fn backward(&self, call: BackwardCall<'_>, scratch: Scratch<'_>) -> Result<(), Error> {
        let (problem, inputs, saved, mut outputs) = call.into_parts();
        let mut tensors = inputs_of(&inputs);
        tensors.extend([
            (Role::Out, of_view(saved.out)),
            (Role::Lse, of_view(saved.lse)),
            (Role::DOut, of_view(saved.d_out)),
        ]);
        tensors.extend(saved.d_lse.map(|d_lse| (Role::DLse, of_view(d_lse))));
        let gradients = [
            (Role::DQuery, &mut outputs.dq),
            (Role::DKey, &mut outputs.dk),
            (Role::DValue, &mut outputs.dv),
            (Role::DBias, &mut outputs.dbias),
            (Role::DSinks, &mut outputs.dsinks),
        ];
        tensors.extend(
            (gradients.into_iter()).filter_map(|(role, view)| Some((role, of_output(view.as_mut()?)))),
        );
        // SAFETY: as in `forward`.
        unsafe { self.launch(problem, &tensors, scratch) }
    }
}

fn inputs_of(inputs: &attention_core::Inputs<'_>) -> Vec<(Role, u64)> {
    let optional = [
        (Role::Mask, inputs.mask),
        (Role::Bias, inputs.bias),
        (Role::AlibiSlopes, inputs.alibi_slopes),
        (Role::Sinks, inputs.sinks),
    ];
    let mut tensors = vec![
        (Role::Query, of_view(inputs.query)),
        (Role::Key, of_view(inputs.key)),
        (Role::Value, of_view(inputs.value)),
    ];
    tensors.extend(optional.into_iter().filter_map(|(role, view)| Some((role, of_view(view?)))));
    tensors
}
