//! Kernels of our own, compiled at run time for the device at hand and kept: in memory for the process, on disk for the
//! next one.

use std::collections::HashMap;
use std::collections::hash_map::DefaultHasher;
use std::hash::{Hash, Hasher};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use cudarc::driver::{CudaContext, CudaFunction, CudaModule, DriverError};
use cudarc::nvrtc::{CompileError, CompileOptions, Ptx};

use crate::library::{NotFound, Search};

/// Why a kernel is not there.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum KernelError {
    /// NVRTC is missing.
    #[error("NVRTC was not found ({}); looked for {}", .0.what, .0.looked_for.join(", "))]
    NoCompiler(NotFound),
    /// The source does not compile: a mistake of this library.
    #[error("{name} does not compile for {arch}: {source}")]
    Compile {
        /// The source's name.
        name: String,
        /// The architecture, `sm_90`.
        arch: String,
        /// What NVRTC said.
        source: CompileError,
    },
    /// The driver refused the module or has no such function.
    #[error("{name}: {source}")]
    Driver {
        /// The source's or function's name.
        name: String,
        /// What it said.
        source: DriverError,
    },
}

/// Modules by source and device.
#[derive(Debug, Default)]
pub struct KernelCache {
    folder: Option<PathBuf>,
    modules: Mutex<HashMap<(usize, u64), Arc<CudaModule>>>,
}

impl KernelCache {
    /// A cache in memory, and on disk in this folder where one is given.
    pub fn new(folder: Option<PathBuf>) -> Self {
        Self { folder, modules: Mutex::default() }
    }

    /// The function `entry_point` of a source, compiled for the device of the context.
    ///
    /// # Errors
    /// [`KernelError`].
    pub fn function(
        &self,
        context: &Arc<CudaContext>,
        name: &str,
        text: &str,
        entry_point: &str,
    ) -> Result<CudaFunction, KernelError> {
        let driver = |name: &str| {
            let name = name.to_owned();
            move |source| KernelError::Driver { name, source }
        };
        let key = (context.ordinal(), hash(text));
        let mut modules = self.modules.lock().unwrap_or_else(PoisonError::into_inner);
        let module = match modules.get(&key) {
            Some(module) => module.clone(),
            None => {
                let (major, minor) = context.compute_capability().map_err(driver(name))?;
                let ptx = self.ptx(name, text, &format!("compute_{major}{minor}"))?;
                let module = context.load_module(Ptx::from_src(ptx)).map_err(driver(name))?;
                modules.insert(key, module.clone());
                module
            }
        };
        module.load_function(entry_point).map_err(driver(entry_point))
    }

    /// The source as PTX, from the folder or from NVRTC.
    fn ptx(&self, name: &str, text: &str, arch: &str) -> Result<String, KernelError> {
        let found = nvrtc().map_err(KernelError::NoCompiler)?;
        let file = self.folder.as_ref().map(|folder| {
            // The library's place stands for its version: another one may compile differently.
            folder
                .join(format!("{name}-{arch}-{:016x}.ptx", hash(&(text, &found, env!("CARGO_PKG_VERSION")))))
        });
        if let Some(ptx) = file.as_ref().and_then(|file| std::fs::read_to_string(file).ok()) {
            return Ok(ptx);
        }
        let started = std::time::Instant::now();
        let options = CompileOptions {
            options: vec![format!("--gpu-architecture={arch}"), "--std=c++17".to_owned()],
            ..CompileOptions::default()
        };
        let ptx = cudarc::nvrtc::compile_ptx_with_opts(text, options).map_err(|source| {
            KernelError::Compile { name: name.to_owned(), arch: arch.to_owned(), source }
        })?;
        tracing::debug!(name, arch, ms = started.elapsed().as_secs_f64() * 1e3, "compiled a kernel");
        let ptx = ptx.to_src();
        if let Some(file) = file {
            // Whole or not at all: written beside it, then renamed. A cache that cannot be written is no error.
            let unfinished = file.with_extension(format!("{}.tmp", std::process::id()));
            let written = file.parent().map(std::fs::create_dir_all).transpose();
            if written.is_ok() && std::fs::write(&unfinished, &ptx).is_ok() {
                let _ = std::fs::rename(&unfinished, &file);
            }
        }
        Ok(ptx)
    }
}

/// Where NVRTC is. cudarc panics where it is missing, so it is looked for first.
fn nvrtc() -> Result<String, NotFound> {
    Search::new(["libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so", "nvrtc64_130_0.dll", "nvrtc64_120_0.dll"])
        .open()
        .map(|found| found.place)
}

fn hash(of: &(impl Hash + ?Sized)) -> u64 {
    let mut hasher = DefaultHasher::new();
    of.hash(&mut hasher);
    hasher.finish()
}
