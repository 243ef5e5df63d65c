//! Kernels of our own, compiled at run time for the device at hand and kept: in memory for the process, on
//! disk for the next one.

use std::collections::HashMap;
use std::ffi::OsString;
use std::fmt::Display;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use attention_kernels::{Source, Variant};
use cudarc::driver::{CudaContext, CudaFunction, CudaModule, DriverError};
use cudarc::nvrtc::Ptx;

use crate::disk::{DiskCache, DiskKey, Fnv};
use crate::error::KernelError;
use crate::nvrtc::{Nvrtc, options};

/// Functions by source, variant and context.
///
/// Looking one up again costs a read lock and a hash of its name and variant. Of threads that miss the same
/// function at once, one compiles and the others wait; those that find theirs do not.
#[derive(Debug, Default)]
pub struct KernelCache {
    disk: DiskCache,
    wheel_roots: Vec<PathBuf>,
    functions: RwLock<HashMap<InMemory, CudaFunction>>,
    loading: Mutex<Loading>,
}

/// What is needed on a miss.
#[derive(Debug, Default)]
struct Loading {
    nvrtc: Option<Nvrtc>,
    modules: HashMap<InMemory, Arc<CudaModule>>,
}

/// What a module or a function in memory is known by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct InMemory {
    /// The context's address. Its module keeps it alive, so no other context gets it.
    context: usize,
    /// Where the source's text lies, and its length. It is never freed, so no other text gets there.
    text: (usize, usize),
    variant: Variant,
    /// Of a function's name.
    name: u128,
}

impl InMemory {
    fn new(context: &CudaContext, source: &Source, variant: Variant, entry_point: Option<&str>) -> Self {
        let text = (source.text.as_ptr() as usize, source.text.len());
        let name = Fnv::new().field(entry_point.unwrap_or(""));
        Self { context: context.cu_ctx() as usize, text, variant, name: name.finish() }
    }
}

/// The environment variable that names the folder for compiled kernels where no configuration does.
pub const KERNEL_FOLDER: &str = "ATTENTION_KERNEL_FOLDER";

/// The folder that is given, else the one that is named, unless the name is empty.
fn folder(given: Option<PathBuf>, named: Option<OsString>) -> Option<PathBuf> {
    given.or_else(|| named.filter(|named| !named.is_empty()).map(PathBuf::from))
}

impl KernelCache {
    /// A cache in memory, and on disk in this folder, or in that which [`KERNEL_FOLDER`] names where none is
    /// given. Without either, the next process compiles again.
    ///
    /// A file there belongs to one text, architecture, set of compiler options and version of NVRTC. One that
    /// is damaged, or that the driver refuses, is compiled again and overwritten. Files are never removed.
    pub fn new(given: Option<PathBuf>) -> Self {
        let folder = folder(given, std::env::var_os(KERNEL_FOLDER));
        Self { disk: DiskCache::new(folder), ..Self::default() }
    }

    /// `site-packages` folders whose `nvidia/*/lib` are searched for NVRTC where the loader does not find it.
    #[must_use]
    pub fn wheel_roots(self, roots: Vec<PathBuf>) -> Self {
        Self { wheel_roots: roots, ..self }
    }

    /// The function `entry_point` of a source, compiled as this variant for the device of the context.
    ///
    /// `cargo xtask kernels` compiles a source's [`variants`](Source::variants); others are compiled here for
    /// the first time.
    ///
    /// # Errors
    /// [`KernelError`].
    pub fn function(
        &self,
        context: &Arc<CudaContext>,
        source: &Source,
        variant: Variant,
        entry_point: &str,
    ) -> Result<CudaFunction, KernelError> {
        let key = InMemory::new(context, source, variant, Some(entry_point));
        if let Some(function) = self.functions.read().unwrap_or_else(PoisonError::into_inner).get(&key) {
            return Ok(function.clone());
        }
        let module = self.module(context, source, variant)?;
        let function = module.load_function(entry_point).map_err(driver(entry_point))?;
        self.functions.write().unwrap_or_else(PoisonError::into_inner).insert(key, function.clone());
        Ok(function)
    }

    /// As [`function`](Self::function), of the source of this name in `attention-kernels`.
    ///
    /// # Errors
    /// As [`function`](Self::function).
    ///
    /// # Panics
    /// Where there is no source of this name.
    pub fn named(
        &self,
        context: &Arc<CudaContext>,
        source: &str,
        variant: Variant,
        entry_point: &str,
    ) -> Result<CudaFunction, KernelError> {
        let source =
            attention_kernels::source(source).unwrap_or_else(|| unreachable!("{source} is in the package"));
        self.function(context, source, variant, entry_point)
    }

    /// The module of a source, loaded or to be loaded.
    fn module(
        &self,
        context: &Arc<CudaContext>,
        source: &Source,
        variant: Variant,
    ) -> Result<Arc<CudaModule>, KernelError> {
        let mut loading = self.loading.lock().unwrap_or_else(PoisonError::into_inner);
        let Loading { nvrtc, modules } = &mut *loading;
        let key = InMemory::new(context, source, variant, None);
        if let Some(module) = modules.get(&key) {
            return Ok(module.clone());
        }
        let arch = architecture(context.compute_capability().map_err(driver(source.name))?);
        let nvrtc = match nvrtc {
            Some(nvrtc) => nvrtc,
            None => nvrtc.insert(Nvrtc::open(&self.wheel_roots).map_err(KernelError::NoCompiler)?),
        };
        let defines = variant.defines();
        let file = on_disk(source, &arch, &defines, nvrtc.version());
        let module = kept(
            &self.disk,
            &file,
            |ptx| context.load_module(Ptx::from_src(ptx)).map_err(driver(source.name)),
            || Ok(nvrtc.compile(source, &arch, &defines)?.ptx),
        )?;
        modules.insert(key, module.clone());
        Ok(module)
    }
}

/// What a source's PTX is known by on disk: the text that is compiled, the compiler and its options.
fn on_disk(source: &Source, arch: &str, defines: &[String], (major, minor): (i32, i32)) -> DiskKey {
    let (compiler, options) = (format!("nvrtc {major}.{minor}"), options(arch, defines));
    let fields = [source.text, &compiler].into_iter().chain(options.iter().map(|option| &**option));
    DiskKey::new(&format!("{}-{arch}", source.name), "ptx", fields)
}

/// Loads what is on disk; where there is nothing that loads, what is compiled, which is then kept.
fn kept<M, E: Display>(
    disk: &DiskCache,
    key: &DiskKey,
    load: impl Fn(&str) -> Result<M, E>,
    compile: impl FnOnce() -> Result<String, E>,
) -> Result<M, E> {
    if let Some(ptx) = disk.read(key) {
        match load(&ptx) {
            Ok(module) => return Ok(module),
            Err(error) => tracing::warn!(%error, "a kernel from disk was refused, and is compiled again"),
        }
    }
    let ptx = compile()?;
    let module = load(&ptx)?;
    disk.write(key, &ptx);
    Ok(module)
}

/// What to compile for on a device of this compute capability. The code runs on that device alone, so from
/// 9.0 on, where there are such, instructions are allowed that no other architecture has.
fn architecture((major, minor): (i32, i32)) -> String {
    format!("compute_{major}{minor}{}", if major >= 9 { "a" } else { "" })
}

fn driver(name: &str) -> impl Fn(DriverError) -> KernelError {
    move |source| KernelError::Driver { name: name.to_owned(), source }
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use super::*;

    #[test]
    fn instructions_of_one_architecture_are_allowed_where_there_are_such() {
        assert_eq!(
            [(8, 0), (8, 9), (9, 0), (10, 0), (12, 1)].map(architecture),
            ["compute_80", "compute_89", "compute_90a", "compute_100a", "compute_121a"]
        );
    }

    const SOURCE: Source = Source { name: "a.cu", text: "text", entry_points: &["a"], variants: &[] };

    fn key(defines: &[&str]) -> DiskKey {
        let defines: Vec<String> = defines.iter().copied().map(str::to_owned).collect();
        on_disk(&SOURCE, "compute_90a", &defines, (13, 0))
    }

    #[test]
    fn a_configuration_goes_before_the_environment() {
        let of = |given: Option<&str>, named: Option<&str>| {
            folder(given.map(PathBuf::from), named.map(OsString::from))
                .map(|folder| folder.display().to_string())
        };
        assert_eq!(of(Some("/mine"), Some("/named")).as_deref(), Some("/mine"));
        assert_eq!(of(None, Some("/named")).as_deref(), Some("/named"));
        assert_eq!([of(None, Some("")), of(None, None)], [None, None]);
    }

    #[test]
    fn a_file_belongs_to_all_that_ptx_depends_on() {
        let first = key(&[]);
        assert_eq!(first, key(&[]));
        let others = [
            key(&["HEAD_DIM=64"]),
            key(&["HEAD_DIM=128"]),
            key(&["HEAD_DIM=64", "CAUSAL"]),
            on_disk(&SOURCE, "compute_90", &[], (13, 0)),
            on_disk(&SOURCE, "compute_90a", &[], (13, 1)),
            on_disk(&SOURCE, "compute_90a", &[], (12, 8)),
            on_disk(&Source { text: "another text", ..SOURCE }, "compute_90a", &[], (13, 0)),
        ];
        for (index, other) in others.iter().enumerate() {
            assert_ne!(&first, other);
            assert!(!others[..index].contains(other), "{other:?}");
        }
        // Neither the entry points nor the list of variants change the text that is compiled.
        let variants = &[Variant::Helper(attention_kernels::Helper::LAUNCHED)];
        assert_eq!(first, on_disk(&Source { variants, ..SOURCE }, "compute_90a", &[], (13, 0)));
    }

    #[test]
    fn names_on_disk_are_stable() {
        // Computed apart from this code. A change makes every user compile anew.
        let defines = ["HEAD_DIM=64".to_owned()];
        let key = on_disk(&Source { text: "text of a", ..SOURCE }, "compute_90a", &defines, (13, 0));
        assert!(
            format!("{key:?}").contains("\"a.cu-compute_90a-1ecbd05ce4033827d728e6a3aaf7c566.ptx\""),
            "{key:?}"
        );
    }

    /// Loads through a disk with this in it, by a driver that refuses "bad"; what was compiled and loaded, in
    /// turn.
    fn through(
        test: &str,
        on_disk: Option<&str>,
        compiled: Result<&str, &str>,
    ) -> (Vec<String>, Option<String>) {
        let folder = std::env::temp_dir().join(format!("attention-cuda-kept-{test}-{}", std::process::id()));
        let disk = DiskCache::new(Some(folder.clone()));
        let key = key(&[]);
        if let Some(ptx) = on_disk {
            disk.write(&key, ptx);
        }
        let events = RefCell::new(Vec::new());
        let result = kept(
            &disk,
            &key,
            |ptx| {
                events.borrow_mut().push(format!("load {ptx}"));
                if ptx == "bad" { Err("refused".to_owned()) } else { Ok(ptx.to_owned()) }
            },
            || {
                events.borrow_mut().push("compile".to_owned());
                compiled.map(str::to_owned).map_err(str::to_owned)
            },
        );
        let left = disk.read(&key);
        let _ = std::fs::remove_dir_all(&folder);
        let mut events = events.into_inner();
        events.push(format!("{result:?}"));
        (events, left)
    }

    #[test]
    fn what_is_on_disk_is_not_compiled() {
        let (events, left) = through("hit", Some("good"), Err("not asked for"));
        assert_eq!(events, ["load good", "Ok(\"good\")"]);
        assert_eq!(left.as_deref(), Some("good"));
    }

    #[test]
    fn what_is_compiled_is_kept() {
        let (events, left) = through("miss", None, Ok("new"));
        assert_eq!(events, ["compile", "load new", "Ok(\"new\")"]);
        assert_eq!(left.as_deref(), Some("new"));
    }

    #[test]
    fn what_the_driver_refuses_is_compiled_again_and_overwritten() {
        let (events, left) = through("refused", Some("bad"), Ok("new"));
        assert_eq!(events, ["load bad", "compile", "load new", "Ok(\"new\")"]);
        assert_eq!(left.as_deref(), Some("new"));
    }

    #[test]
    fn what_the_driver_refuses_fresh_from_the_compiler_is_an_error_and_not_kept() {
        let (events, left) = through("never", None, Ok("bad"));
        assert_eq!(events, ["compile", "load bad", "Err(\"refused\")"]);
        assert_eq!(left, None);
        let (events, _) = through("error", None, Err("does not compile"));
        assert_eq!(events, ["compile", "Err(\"does not compile\")"]);
    }
}
