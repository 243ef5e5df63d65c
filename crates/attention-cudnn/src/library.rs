//! cuDNN's functions, loaded at run time. All enumerations are plain integers, since a newer library may
//! return values that a closed Rust enum does not have.

use std::ffi::{c_char, c_void};

use attention_core::Unavailable;
use attention_cuda::Nvrtc;
use attention_cuda::library::{NotFound, Search};

use crate::{CudnnConfig, NAME};

/// A descriptor or handle of cuDNN.
pub(crate) type Opaque = *mut c_void;

/// The oldest version that the backend accepts, 9.12.0: the oldest that the graphs were tried with.
pub(crate) const OLDEST: usize = 91200;

macro_rules! functions {
    ($($field:ident = $symbol:literal: fn($($arg:ty),*) -> $result:ty;)*) => {
        /// The functions of cuDNN that this crate calls.
        #[derive(Clone, Copy, Debug)]
        pub(crate) struct Functions {
            $(pub(crate) $field: unsafe extern "C" fn($($arg),*) -> $result,)*
        }

        impl Functions {
            fn load(library: &'static libloading::Library) -> Result<Self, String> {
                // SAFETY: `Cudnn::open` found this library under cuDNN's names or at the path that the
                // configuration gives. The types are those of cuDNN 9's header, and `Cudnn::open` refuses a
                // library that is older than 9.12.0 before it calls any function but `cudnnGetVersion`, whose
                // type has not changed. The library is never unloaded (`'static`).
                unsafe {
                    Ok(Self {
                        $($field: *library
                            .get::<unsafe extern "C" fn($($arg),*) -> $result>($symbol.as_bytes())
                            .map_err(|error| format!("no symbol {}: {error}", $symbol))?,)*
                    })
                }
            }
        }
    };
}

functions! {
    version = "cudnnGetVersion": fn() -> usize;
    create = "cudnnCreate": fn(*mut Opaque) -> i32;
    set_stream = "cudnnSetStream": fn(Opaque, Opaque) -> i32;
    create_descriptor = "cudnnBackendCreateDescriptor": fn(i32, *mut Opaque) -> i32;
    destroy_descriptor = "cudnnBackendDestroyDescriptor": fn(Opaque) -> i32;
    finalize = "cudnnBackendFinalize": fn(Opaque) -> i32;
    set_attribute = "cudnnBackendSetAttribute": fn(Opaque, i32, i32, i64, *const c_void) -> i32;
    get_attribute = "cudnnBackendGetAttribute": fn(Opaque, i32, i32, i64, *mut i64, *mut c_void) -> i32;
    execute = "cudnnBackendExecute": fn(Opaque, Opaque, Opaque) -> i32;
    last_error = "cudnnGetLastErrorString": fn(*mut c_char, usize) -> ();
}

/// The loaded library.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Cudnn {
    pub(crate) functions: Functions,
    /// `90190` for 9.19.0.
    pub(crate) version: usize,
}

impl Cudnn {
    /// Loads cuDNN, after cuBLASLt and NVRTC: cuDNN ends the process if it needs one of them and cannot find
    /// it.
    pub(crate) fn open(config: &CudnnConfig) -> Result<Self, Unavailable> {
        let roots = || config.wheel_roots.clone();
        let missing = |what: &str| {
            let what = what.to_owned();
            move |missing: NotFound| Unavailable {
                backend: NAME.to_owned(),
                what: format!("{what} was not found ({})", missing.what),
                looked_for: missing.looked_for,
            }
        };
        Search::new(["libcublasLt.so.13", "libcublasLt.so.12"])
            .wheel_roots(roots())
            .open()
            .map_err(missing("cuBLASLt, which cuDNN needs,"))?;
        Nvrtc::open(&config.wheel_roots).map_err(missing("NVRTC, which cuDNN needs,"))?;
        let found = Search::new(["libcudnn.so.9", "libcudnn.so"])
            .path(config.library.clone())
            .variable("ATTENTION_CUDNN")
            .wheel_roots(roots())
            .open()
            .map_err(missing("cuDNN"))?;
        let unfit = |what: String| Unavailable {
            backend: NAME.to_owned(),
            what,
            looked_for: vec![found.place.clone()],
        };
        let functions = Functions::load(found.library).map_err(unfit)?;
        // SAFETY: `cudnnGetVersion` takes no arguments and returns a `size_t`, in every version.
        let version = unsafe { (functions.version)() };
        if version < OLDEST {
            return Err(unfit(format!("cuDNN {} is older than 9.12.0", name_of(version))));
        }
        tracing::debug!(version = %name_of(version), place = %found.place, "opened cuDNN");
        Ok(Self { functions, version })
    }

    /// Converts a status to a result, with cuDNN's message about its last error.
    pub(crate) fn check(&self, what: &'static str, status: i32) -> Result<(), CudnnError> {
        if status == 0 {
            return Ok(());
        }
        let mut text = [0u8; 512];
        // SAFETY: cuDNN writes at most `text.len()` bytes to `text`, a terminating zero included.
        unsafe { (self.functions.last_error)(text.as_mut_ptr().cast(), text.len()) };
        let end = text.iter().position(|&byte| byte == 0).unwrap_or(text.len());
        Err(CudnnError { what, status, message: String::from_utf8_lossy(&text[..end]).trim().to_owned() })
    }
}

/// `9.19.0` of `91900`.
pub(crate) fn name_of(version: usize) -> String {
    format!("{}.{}.{}", version / 10000, version / 100 % 100, version % 100)
}

/// An error of cuDNN, with the operation that failed.
#[derive(Clone, Debug)]
pub(crate) struct CudnnError {
    what: &'static str,
    pub(crate) status: i32,
    message: String,
}

impl std::fmt::Display for CudnnError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} ended with status {}", self.what, self.status)?;
        if self.message.is_empty() { Ok(()) } else { write!(f, " ({})", self.message) }
    }
}

impl std::error::Error for CudnnError {}
