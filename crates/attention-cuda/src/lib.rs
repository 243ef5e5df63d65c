#![doc = include_str!("../README.md")]

mod addresses;
#[cfg(feature = "conformance")]
mod conformance;
mod device;
mod disk;
mod error;
mod kernels;
mod launch;
#[cfg(test)]
mod layout;
pub mod library;
mod number_writes;
mod numbers;
mod nvrtc;
mod owned;
pub mod parameters;
mod row_copies;
mod sequences;
mod tensor;
mod workspace;

pub use addresses::Addresses;
pub use cudarc;
pub use device::{CudaDevice, device_count};
pub use disk::{DiskCache, DiskKey};
pub use error::KernelError;
pub use kernels::{KERNEL_FOLDER, KernelCache};
pub use launch::{launch, launch_programmatic};
pub use number_writes::{NumberWriteError, NumberWriter};
pub use numbers::{NumberStore, StoredNumbers};
pub use nvrtc::{Compiled, Nvrtc};
pub use row_copies::{RowCopier, RowCopyError, RowRun};
pub use tensor::{DeviceScratch, DeviceTensor};
pub use workspace::{Lease, Workspaces};

use attention_core::{BackendFailure, Error};

/// A failure of the machine or of a library while `backend` was doing `operation`.
pub fn failure(
    backend: &str,
    operation: impl Into<String>,
    source: impl Into<Box<dyn std::error::Error + Send + Sync>>,
) -> Error {
    BackendFailure { backend: backend.to_owned(), operation: operation.into(), source: source.into() }.into()
}
