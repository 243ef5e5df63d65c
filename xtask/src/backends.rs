//! Backends by name, and on pools of a certain size.

use std::sync::Arc;

use attention::Registry;
use attention_chunked::{ChunkedBackend, ChunkedConfig, Level};
use attention_chunked_cuda::{ChunkedCudaBackend, ChunkedCudaConfig};
use attention_conformance::OnHost;
use attention_core::{
    AttentionBackend, BackwardCall, DType, Delegate, DelegatePlan, Error, ForwardCall, Pass, Plan, Problem,
    Scratch, Unavailable, Unsupported,
};
use attention_cuda::{CudaDevice, KERNEL_FOLDER};
use attention_cudnn::{CudnnBackend, CudnnConfig};
use rayon::{ThreadPool, ThreadPoolBuilder};

use crate::auto::{self, Auto};

/// The name here of the chunked backend that multiplies f32 as sums of bf16 parts, which is off by default.
const SPLIT: &str = "chunked-split-f32";

/// The names of the backends for device memory, which run here on copies of host memory.
const CUDNN: &str = "cudnn";
const CHUNKED_CUDA: &str = "chunked-cuda";

/// The same with gradients of grouped heads, which cuDNN rounds once more than the numerics class allows: off
/// by default.
const ROUNDING: &str = "cudnn-rounded-groups";

/// Our own kernels as they are for devices other than Hopper: off by default there.
const WITHOUT_WARPGROUPS: &str = "chunked-cuda-without-warpgroups";

/// Our own kernels with f32 multiplied as it is, as for short sequences and large heads.
const WITHOUT_SPLIT: &str = "chunked-cuda-without-split-f32";

/// Our own kernels with one block of the forward kernel on warpgroups, which goes over all tiles of a call:
/// few calls of the suite have more tiles than a device has multiprocessors.
const IN_ONE_BLOCK: &str = "chunked-cuda-in-one-block";

/// All of them.
const ON_A_DEVICE: [&str; 7] =
    [CUDNN, ROUNDING, CHUNKED_CUDA, WITHOUT_WARPGROUPS, WITHOUT_SPLIT, IN_ONE_BLOCK, auto::NAME];

/// The backends of these names, or all that are available here if there are none.
pub(crate) fn named(names: &[String]) -> crate::Result<Vec<Arc<dyn AttentionBackend>>> {
    let registry = Registry::default();
    if names.is_empty() {
        let (there, missing): (Vec<_>, Vec<_>) =
            registry.backends().iter().cloned().partition(|backend| backend.available().is_ok());
        for backend in missing {
            if let Err(reason) = backend.available() {
                eprintln!("backend {} left out: {reason}", backend.name());
            }
        }
        return Ok(there);
    }
    let mut backends: Vec<Arc<dyn AttentionBackend>> = Vec::new();
    for name in names {
        if name == SPLIT {
            let split = ChunkedBackend::with_config(ChunkedConfig::default().split_f32(true));
            backends.push(Arc::new(Labelled { label: name.clone(), backend: Arc::new(split) }));
            continue;
        }
        if ON_A_DEVICE.contains(&name.as_str()) {
            let backend = on_a_device(name)?;
            backend.available()?;
            backends.push(Arc::new(Labelled { label: name.clone(), backend }));
            continue;
        }
        let Some(backend) = registry.get(name) else {
            let known = format!("{}, {SPLIT}, {}", registry.names().join(", "), ON_A_DEVICE.join(", "));
            return Err(format!("unknown backend '{name}'; this build has {known}").into());
        };
        backend.available()?;
        if backends.iter().all(|other| other.name() != name) {
            backends.push(backend.clone());
        }
    }
    Ok(backends)
}

/// One of [`ON_A_DEVICE`], on copies of host memory. Prints which cuDNN it has.
fn on_a_device(name: &str) -> crate::Result<Arc<dyn AttentionBackend>> {
    let device = CudaDevice::new(name, 0)?;
    Ok(match name {
        CUDNN | ROUNDING => {
            let config = CudnnConfig::default().rounds_group_gradients(name == ROUNDING);
            let backend = CudnnBackend::on(device.clone(), config);
            backend.available()?;
            println!("{name}: {}", backend.target());
            Arc::new(OnHost::new(backend, device))
        }
        auto::NAME => {
            let own = Arc::new(chunked_cuda(&device, CHUNKED_CUDA));
            let cudnn = Arc::new(CudnnBackend::on(device.clone(), CudnnConfig::default()));
            match cudnn.available() {
                Ok(()) => println!("{name}: {}", cudnn.target()),
                Err(reason) => println!("{name}: {reason}"),
            }
            let registry = Registry::empty().with(cudnn).with(own.clone());
            Arc::new(OnHost::new(Auto::new(registry, &*own), device))
        }
        _ => Arc::new(OnHost::new(chunked_cuda(&device, name), device)),
    })
}

/// The backend of our own kernels by one of its names. Kernels are kept for other processes of this machine,
/// where the environment says or with temporary files: the suite needs some hundred.
fn chunked_cuda(device: &CudaDevice, name: &str) -> ChunkedCudaBackend {
    let mut config =
        ChunkedCudaConfig::default().warpgroups(name != WITHOUT_WARPGROUPS).split_f32(name != WITHOUT_SPLIT);
    if name == IN_ONE_BLOCK {
        config = config.sm_margin(usize::MAX);
    }
    if !is_set(KERNEL_FOLDER) {
        config = config.kernel_folder(std::env::temp_dir().join("attention-kernels"));
    }
    ChunkedCudaBackend::on(device.clone(), config)
}

/// Whether a backend copies host memory to a device and computes there.
pub(crate) fn computes_on_a_device(backend: &Arc<dyn AttentionBackend>) -> bool {
    ON_A_DEVICE.contains(&backend.name())
}

/// Whether a variable of the environment has a value: an empty one is none.
fn is_set(variable: &str) -> bool {
    std::env::var_os(variable).is_some_and(|value| !value.is_empty())
}

/// The same backends, with one for each instruction set of this machine in the place of one that chooses
/// among them. Prints the sets that the machine lacks. Where the environment names one, there is no choice,
/// and nothing changes.
pub(crate) fn at_every_level(backends: Vec<Arc<dyn AttentionBackend>>) -> Vec<Arc<dyn AttentionBackend>> {
    if is_set(Level::VARIABLE) {
        return backends;
    }
    let mut expanded: Vec<Arc<dyn AttentionBackend>> = Vec::new();
    for backend in backends {
        if backend.name() != "chunked" {
            expanded.push(backend);
            continue;
        }
        for level in Level::ALL {
            match level.check() {
                Ok(()) => {
                    let backend = ChunkedBackend::with_config(ChunkedConfig::default().level(level));
                    let label = format!("chunked at {level}");
                    expanded.push(Arc::new(Labelled { label, backend: Arc::new(backend) }));
                }
                Err(reason) => println!("chunked at {level}: skipped, {reason}"),
            }
        }
    }
    expanded
}

/// The levels that [`at_every_level`] leaves out because the processor lacks them: what they are called, the
/// version, and what is missing.
pub(crate) fn missing_levels(backends: &[Arc<dyn AttentionBackend>]) -> Vec<(String, String, String)> {
    let chunked = backends.iter().find(|backend| backend.name() == "chunked");
    let Some(chunked) = chunked.filter(|_| std::env::var_os(Level::VARIABLE).is_none()) else {
        return Vec::new();
    };
    let missing = Level::ALL.into_iter().filter_map(|level| Some((level, level.check().err()?)));
    missing
        .map(|(level, reason)| {
            (format!("chunked at {level}"), chunked.version().to_owned(), reason.to_string())
        })
        .collect()
}

/// A backend under another name, to tell configurations apart in reports.
#[derive(Debug)]
pub(crate) struct Labelled {
    pub(crate) label: String,
    pub(crate) backend: Arc<dyn AttentionBackend>,
}

impl Delegate for Labelled {
    fn inner(&self) -> &dyn AttentionBackend {
        &*self.backend
    }

    fn name(&self) -> &str {
        &self.label
    }
}

/// A backend for a device that need not be there: asked about problems, it answers as if its library and
/// device were.
#[derive(Debug)]
pub(crate) struct Assumed {
    pub(crate) backend: Arc<dyn AttentionBackend>,
}

impl Delegate for Assumed {
    fn inner(&self) -> &dyn AttentionBackend {
        &*self.backend
    }

    fn available(&self) -> Result<(), Unavailable> {
        Ok(())
    }
}

/// A pool of this many threads.
pub(crate) fn pool(threads: usize) -> crate::Result<Arc<ThreadPool>> {
    Ok(Arc::new(ThreadPoolBuilder::new().num_threads(threads).build()?))
}

/// A backend whose every call is made from inside a pool, so that it has that pool's threads. Results must
/// not depend on how many those are.
#[derive(Debug)]
pub(crate) struct InPool {
    backend: Arc<dyn AttentionBackend>,
    pool: Arc<ThreadPool>,
}

impl InPool {
    /// A backend in a pool of this many threads.
    pub(crate) fn new(backend: Arc<dyn AttentionBackend>, threads: usize) -> crate::Result<Self> {
        Ok(Self { backend, pool: pool(threads)? })
    }
}

impl Delegate for InPool {
    fn inner(&self) -> &dyn AttentionBackend {
        &*self.backend
    }

    fn supports(&self, problem: &Problem) -> Result<(), Unsupported> {
        self.pool.install(|| self.backend.supports(problem))
    }

    fn scratch_bytes(&self, problem: &Problem) -> Result<usize, Unsupported> {
        self.pool.install(|| self.backend.scratch_bytes(problem))
    }

    fn plan(&self, problem: &Problem) -> Result<Arc<dyn Plan>, Error> {
        let plan = self.pool.install(|| self.backend.plan(problem))?;
        Ok(Arc::new(PlanInPool { plan, pool: self.pool.clone() }))
    }
}

/// A plan of an [`InPool`].
#[derive(Debug)]
struct PlanInPool {
    plan: Arc<dyn Plan>,
    pool: Arc<ThreadPool>,
}

impl DelegatePlan for PlanInPool {
    fn inner(&self) -> &dyn Plan {
        &*self.plan
    }

    fn forward(&self, call: ForwardCall<'_>, scratch: Scratch<'_>) -> Result<(), Error> {
        self.pool.install(|| self.plan.forward(call, scratch))
    }

    fn backward(&self, call: BackwardCall<'_>, scratch: Scratch<'_>) -> Result<(), Error> {
        self.pool.install(|| self.plan.backward(call, scratch))
    }
}

/// Reads a dtype that operands can have.
pub(crate) fn parse_dtype(text: &str) -> Result<DType, String> {
    let possible = DType::FLOATS.map(DType::name).join(", ");
    match text.parse::<DType>() {
        Ok(dtype) if dtype.is_supported_float() => Ok(dtype),
        Ok(dtype) => Err(format!("no call has operands of {dtype}; possible are {possible}")),
        Err(_) => Err(format!("unknown dtype '{text}'; possible are {possible}")),
    }
}

/// Reads a number of bytes: plain, or in binary units.
pub(crate) fn parse_bytes(text: &str) -> Result<usize, String> {
    let digits = text.find(|character: char| !character.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let shift = match unit.trim() {
        "" | "B" => Some(0),
        "K" | "KiB" => Some(10),
        "M" | "MiB" => Some(20),
        "G" | "GiB" => Some(30),
        "T" | "TiB" => Some(40),
        _ => None,
    };
    let bytes = shift.and_then(|shift| number.parse::<usize>().ok()?.checked_mul(1 << shift));
    bytes.ok_or_else(|| {
        format!("'{text}' is no number of bytes; expected one such as 4096, 512K, 64MiB or 2G (K, M, G and T are binary)")
    })
}

/// Reads a pass.
pub(crate) fn parse_pass(text: &str) -> Result<Pass, String> {
    [Pass::Forward, Pass::Backward]
        .into_iter()
        .find(|pass| pass.to_string() == text)
        .ok_or_else(|| format!("unknown pass '{text}'; known are forward, backward"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unknown_name_is_answered_with_the_known_ones() {
        let error = named(&["nosuch".to_owned()]).unwrap_err().to_string();
        assert_eq!(
            error,
            "unknown backend 'nosuch'; this build has chunked, cpu, chunked-split-f32, cudnn, cudnn-rounded-groups, chunked-cuda, \
             chunked-cuda-without-warpgroups, chunked-cuda-without-split-f32, chunked-cuda-in-one-block, auto-cuda"
        );
    }

    #[test]
    fn numbers_of_bytes_have_binary_units() {
        for (text, bytes) in [
            ("0", 0),
            ("1000", 1000),
            ("7B", 7),
            ("1K", 1 << 10),
            ("1KiB", 1 << 10),
            ("64 MiB", 64 << 20),
            ("3G", 3 << 30),
            ("1TiB", 1 << 40),
        ] {
            assert_eq!(parse_bytes(text), Ok(bytes), "{text}");
        }
        for text in ["", "K", "1.5G", "-1", "1KB", "1k", "1P", "99999999999999999999", "99999999T"] {
            let error = parse_bytes(text).unwrap_err();
            assert!(
                error.starts_with(&format!("'{text}' is no number of bytes; expected one such as")),
                "{error}"
            );
        }
    }

    #[test]
    fn unknown_dtypes_are_answered_with_those_of_operands() {
        let possible = "possible are f64, f32, f16, bf16";
        assert_eq!(parse_dtype("f33").unwrap_err(), format!("unknown dtype 'f33'; {possible}"));
        assert_eq!(parse_dtype("bool").unwrap_err(), format!("no call has operands of bool; {possible}"));
    }

    #[test]
    fn a_name_given_twice_counts_once() {
        let backends = named(&["cpu".to_owned(), "cpu".to_owned()]).unwrap();
        assert_eq!(backends.len(), 1);
    }
}
