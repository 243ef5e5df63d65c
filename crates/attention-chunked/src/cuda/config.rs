//! What a user can set about the chunked backend for device memory.

use std::path::PathBuf;

/// Configuration of [`ChunkedCudaBackend`](crate::ChunkedCudaBackend).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ChunkedCudaConfig {
    pub(crate) device: usize,
    pub(crate) kernel_folder: Option<PathBuf>,
}

impl ChunkedCudaConfig {
    /// The ordinal of the device to run on; 0 by default.
    #[must_use]
    pub fn device(self, ordinal: usize) -> Self {
        Self { device: ordinal, ..self }
    }

    /// Where compiled kernels are kept for the next process; nowhere by default.
    #[must_use]
    pub fn kernel_folder(self, folder: impl Into<PathBuf>) -> Self {
        Self { kernel_folder: Some(folder.into()), ..self }
    }
}
