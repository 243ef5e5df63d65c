//! The error of compiling and loading kernels.

use cudarc::driver::DriverError;

use crate::library::NotFound;

/// Why a kernel is not there. `Debug` is the text.
#[derive(thiserror::Error)]
#[non_exhaustive]
pub enum KernelError {
    /// NVRTC is missing.
    #[error("NVRTC was not found ({}); looked for {}", .0.what, .0.looked_for.join(", "))]
    NoCompiler(NotFound),
    /// The source does not compile: a mistake of this library, or an architecture that this NVRTC does not
    /// know.
    #[error("{name} does not compile for {arch}: {message}")]
    Compile {
        /// The source's name.
        name: String,
        /// The architecture, `compute_90a`.
        arch: String,
        /// What NVRTC said.
        message: String,
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

impl std::fmt::Debug for KernelError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        std::fmt::Display::fmt(self, f)
    }
}
