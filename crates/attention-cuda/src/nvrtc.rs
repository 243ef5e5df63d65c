//! NVRTC, which compiles CUDA sources at run time, without a device if need be.
//!
//! Its functions are loaded here and not through cudarc, which panics where the library or a symbol is
//! missing, looks for names of its own choice, and takes statuses for a closed enumeration that a newer
//! library may leave.

use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use attention_kernels::Source;
use libloading::Library;

use crate::error::KernelError;
use crate::library::{Found, NotFound, Search};

/// The loader's names of NVRTC, newest first.
const NAMES: [&str; 5] =
    ["libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so", "nvrtc64_130_0.dll", "nvrtc64_120_0.dll"];

type Status = c_int;
type Handle = *mut c_void;
type SizeOf = unsafe extern "C" fn(Handle, *mut usize) -> Status;
type TextOf = unsafe extern "C" fn(Handle, *mut c_char) -> Status;
type Create = unsafe extern "C" fn(
    *mut Handle,
    *const c_char,
    *const c_char,
    c_int,
    *const *const c_char,
    *const *const c_char,
) -> Status;

/// NVRTC, opened.
#[derive(Clone, Debug)]
pub struct Nvrtc {
    functions: Functions,
    version: (i32, i32),
    place: String,
}

/// A source, compiled.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Compiled {
    /// The PTX.
    pub ptx: String,
    /// What the compiler remarked; empty where it had nothing to say.
    pub log: String,
    /// How long it took.
    pub time: Duration,
}

impl Nvrtc {
    /// Opens NVRTC: what the loader finds under its versioned names, newest first, else under the plain one,
    /// else what lies in `nvidia/*/lib` under these roots, each a `site-packages` folder.
    ///
    /// # Errors
    /// [`NotFound`] with everything that was tried; also where a library is there and lacks what is called.
    pub fn open(wheel_roots: &[PathBuf]) -> Result<Self, NotFound> {
        let Found { library, place } = Search::new(NAMES).wheel_roots(wheel_roots.to_vec()).open()?;
        open_builtins_beside(Path::new(&place));
        let unfit = |what: String| NotFound { what, looked_for: vec![place.clone()] };
        let functions = Functions::load(library).map_err(unfit)?;
        let (mut major, mut minor) = (0, 0);
        // SAFETY: writes two integers, which live here.
        let status = unsafe { (functions.version)(&mut major, &mut minor) };
        if status != 0 {
            return Err(unfit(format!("nvrtcVersion: {}", functions.describe(status))));
        }
        tracing::debug!(major, minor, place, "opened NVRTC");
        Ok(Self { functions, version: (major, minor), place })
    }

    /// Its version, `(13, 0)` for CUDA 13.0.
    pub fn version(&self) -> (i32, i32) {
        self.version
    }

    /// The path or name that opened it.
    pub fn place(&self) -> &str {
        &self.place
    }

    /// Compiles a source for an architecture.
    ///
    /// `arch` is as NVRTC takes it: `compute_90a` stops at PTX, `sm_90a` also assembles that, which finds
    /// mistakes in inline assembly. `defines` are macros, `NAME` or `NAME=VALUE`.
    ///
    /// ```no_run
    /// use attention_cuda::Nvrtc;
    ///
    /// let nvrtc = Nvrtc::open(&[]).map_err(|missing| missing.what)?;
    /// for source in attention_kernels::SOURCES {
    ///     for variant in source.variants {
    ///         nvrtc.compile(source, "sm_90a", &variant.defines()).map_err(|error| error.to_string())?;
    ///     }
    /// }
    /// # Ok::<(), String>(())
    /// ```
    ///
    /// # Errors
    /// [`KernelError::Compile`] with what the compiler said.
    pub fn compile(&self, source: &Source, arch: &str, defines: &[String]) -> Result<Compiled, KernelError> {
        let started = Instant::now();
        let (ptx, log) = self.run(source, &options(arch, defines)).map_err(|message| {
            KernelError::Compile { name: source.name.to_owned(), arch: arch.to_owned(), message }
        })?;
        let time = started.elapsed();
        tracing::debug!(
            name = source.name,
            arch,
            ?defines,
            ms = time.as_secs_f64() * 1e3,
            log,
            "compiled a source"
        );
        Ok(Compiled { ptx, log, time })
    }

    fn run(&self, source: &Source, options: &[String]) -> Result<(String, String), String> {
        let c_string = |text: &str| {
            CString::new(text).map_err(|_| format!("a zero byte in {:?}", &text[..text.len().min(80)]))
        };
        let (name, text) = (c_string(source.name)?, c_string(source.text)?);
        let options = options.iter().map(|option| c_string(option)).collect::<Result<Vec<_>, _>>()?;
        let pointers: Vec<*const c_char> = options.iter().map(|option| option.as_ptr()).collect();
        let count = c_int::try_from(pointers.len()).map_err(|_| "too many options".to_owned())?;

        let program = Program::new(&self.functions, &text, &name)?;
        // SAFETY: `program` is alive, and `pointers` has `count` pointers to strings of `options` that end in
        // zero and outlive the call.
        let status = unsafe { (self.functions.compile)(program.handle, count, pointers.as_ptr()) };
        let log = program.text(self.functions.log_size, self.functions.log).unwrap_or_default();
        if status != 0 {
            return Err(format!("{}\n{log}", self.functions.describe(status)).trim_end().to_owned());
        }
        Ok((program.text(self.functions.ptx_size, self.functions.ptx)?, log))
    }
}

/// Opens the library that NVRTC asks the loader for when it compiles, where both lie in a folder that the
/// loader does not search: it then finds the one that is open.
fn open_builtins_beside(nvrtc: &Path) {
    let folder = nvrtc.parent().filter(|folder| !folder.as_os_str().is_empty());
    let Some(files) = folder.and_then(|folder| std::fs::read_dir(folder).ok()) else { return };
    for file in files.flatten() {
        let name = file.file_name();
        let name = name.to_string_lossy();
        if ["libnvrtc-builtins.so", "nvrtc-builtins64"].iter().any(|start| name.starts_with(start)) {
            // Where it does not open, NVRTC says so itself.
            let _ = Search::default().path(Some(file.path())).open();
        }
    }
}

/// What NVRTC is told, all of which a cache must know a compiled source by.
pub(crate) fn options(arch: &str, defines: &[String]) -> Vec<String> {
    let fixed = [format!("--gpu-architecture={arch}"), "--std=c++17".to_owned()];
    fixed.into_iter().chain(defines.iter().map(|define| format!("--define-macro={define}"))).collect()
}

/// The functions that we use.
#[derive(Clone, Copy, Debug)]
struct Functions {
    version: unsafe extern "C" fn(*mut c_int, *mut c_int) -> Status,
    error_string: unsafe extern "C" fn(Status) -> *const c_char,
    create: Create,
    compile: unsafe extern "C" fn(Handle, c_int, *const *const c_char) -> Status,
    destroy: unsafe extern "C" fn(*mut Handle) -> Status,
    log_size: SizeOf,
    log: TextOf,
    ptx_size: SizeOf,
    ptx: TextOf,
}

impl Functions {
    fn load(library: &'static Library) -> Result<Self, String> {
        // SAFETY: the symbols are NVRTC's, and the types of the fields are those of its declarations, which
        // have been the same since CUDA 7.0.
        unsafe {
            Ok(Self {
                version: symbol(library, "nvrtcVersion")?,
                error_string: symbol(library, "nvrtcGetErrorString")?,
                create: symbol(library, "nvrtcCreateProgram")?,
                compile: symbol(library, "nvrtcCompileProgram")?,
                destroy: symbol(library, "nvrtcDestroyProgram")?,
                log_size: symbol(library, "nvrtcGetProgramLogSize")?,
                log: symbol(library, "nvrtcGetProgramLog")?,
                ptx_size: symbol(library, "nvrtcGetPTXSize")?,
                ptx: symbol(library, "nvrtcGetPTX")?,
            })
        }
    }

    /// A status in NVRTC's words.
    fn describe(&self, status: Status) -> String {
        // SAFETY: the function takes any number and returns null or a constant string.
        let text = unsafe { (self.error_string)(status) };
        if text.is_null() {
            return format!("status {status}");
        }
        // SAFETY: the pointer is not null, as checked above; NVRTC's constant strings end in zero and are
        // never freed.
        unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned()
    }
}

/// A function of the library.
///
/// # Safety
/// `F` is the type of the function with this name.
unsafe fn symbol<F: Copy>(library: &'static Library, name: &str) -> Result<F, String> {
    // SAFETY: the caller guarantees that `F` is the type of the function with this name.
    let symbol = unsafe { library.get::<F>(name.as_bytes()) };
    symbol.map(|symbol| *symbol).map_err(|error| format!("no symbol {name}: {error}"))
}

/// A program of NVRTC.
struct Program<'a> {
    functions: &'a Functions,
    handle: Handle,
}

impl<'a> Program<'a> {
    /// NVRTC may refer to the text and the name for as long as the program lives.
    fn new(functions: &'a Functions, text: &'a CStr, name: &'a CStr) -> Result<Self, String> {
        let mut handle = std::ptr::null_mut();
        // SAFETY: both strings end in zero and live as long as the program; with 0 headers, NVRTC reads
        // nothing from the two last arguments. It writes one handle, to `handle`, which lives here.
        let status = unsafe {
            (functions.create)(
                &mut handle,
                text.as_ptr(),
                name.as_ptr(),
                0,
                std::ptr::null(),
                std::ptr::null(),
            )
        };
        if status == 0 { Ok(Self { functions, handle }) } else { Err(functions.describe(status)) }
    }

    /// A text of the program: the log or the PTX.
    fn text(&self, size_of: SizeOf, text_of: TextOf) -> Result<String, String> {
        let mut size = 0;
        // SAFETY: `self` is a live program, and NVRTC writes one size, to `size`, which lives here.
        let status = unsafe { size_of(self.handle, &mut size) };
        if status != 0 {
            return Err(self.functions.describe(status));
        }
        let mut bytes = vec![0u8; size];
        if size == 0 {
            return Ok(String::new());
        }
        // SAFETY: `self` is a live program, and `bytes` has the size that NVRTC gave for this text.
        let status = unsafe { text_of(self.handle, bytes.as_mut_ptr().cast()) };
        if status != 0 {
            return Err(self.functions.describe(status));
        }
        // The size counts the zero at the end.
        let end = bytes.iter().position(|&byte| byte == 0).unwrap_or(size);
        Ok(String::from_utf8_lossy(&bytes[..end]).trim_end().to_owned())
    }
}

impl Drop for Program<'_> {
    fn drop(&mut self) {
        // SAFETY: the program was made by this library and is destroyed once. There is nothing to do if that
        // fails.
        let _ = unsafe { (self.functions.destroy)(&mut self.handle) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn defines_are_options() {
        assert_eq!(
            options("compute_90a", &["HEAD_DIM=64", "CAUSAL"].map(str::to_owned)),
            [
                "--gpu-architecture=compute_90a",
                "--std=c++17",
                "--define-macro=HEAD_DIM=64",
                "--define-macro=CAUSAL"
            ]
        );
    }

    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    #[test]
    fn a_library_without_the_functions_is_an_error() {
        let found = Search::new(["libc.so.6"]).open().expect("the C library is there");
        let error = Functions::load(found.library).expect_err("it is not NVRTC");
        assert!(error.starts_with("no symbol nvrtcVersion"), "{error}");
    }

    #[test]
    fn a_missing_library_names_every_place() {
        let root = PathBuf::from("/nowhere/site-packages");
        if let Err(missing) = Nvrtc::open(&[root]) {
            assert_eq!(missing.looked_for[..NAMES.len()], NAMES);
            assert_eq!(missing.looked_for[NAMES.len()], "/nowhere/site-packages/nvidia/*/lib");
        }
    }
}
