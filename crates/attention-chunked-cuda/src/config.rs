//! What a user can set about the chunked backend for device memory.

use std::path::PathBuf;

/// Configuration of [`ChunkedCudaBackend`](crate::ChunkedCudaBackend).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ChunkedCudaConfig {
    pub(crate) device: usize,
    pub(crate) kernel_folder: Option<PathBuf>,
    pub(crate) wheel_roots: Vec<PathBuf>,
    pub(crate) lent_limit: usize,
    pub(crate) warpgroups: bool,
    pub(crate) split_f32: bool,
    pub(crate) sm_margin: usize,
}

impl Default for ChunkedCudaConfig {
    fn default() -> Self {
        Self {
            device: 0,
            kernel_folder: None,
            wheel_roots: Vec::new(),
            lent_limit: 1 << 30,
            warpgroups: true,
            split_f32: true,
            sm_margin: 0,
        }
    }
}

impl ChunkedCudaConfig {
    /// The ordinal of the device to run on; 0 by default.
    #[must_use]
    pub fn device(self, ordinal: usize) -> Self {
        Self { device: ordinal, ..self }
    }

    /// Where compiled kernels are kept for the next process; by default in the folder that the
    /// environment variable `ATTENTION_KERNEL_FOLDER` names, and nowhere without it.
    #[must_use]
    pub fn kernel_folder(self, folder: impl Into<PathBuf>) -> Self {
        Self { kernel_folder: Some(folder.into()), ..self }
    }

    /// `site-packages` folders whose `nvidia/*/lib` are searched for NVRTC where the loader does not find it.
    #[must_use]
    pub fn wheel_roots(self, roots: impl IntoIterator<Item = PathBuf>) -> Self {
        Self { wheel_roots: roots.into_iter().collect(), ..self }
    }

    /// The most bytes of scratch that the backend lends to a call without its own; 1 GiB by default.
    #[must_use]
    pub fn lent_limit(self, bytes: usize) -> Self {
        Self { lent_limit: bytes, ..self }
    }

    /// Whether f16 and bf16 use the products of warpgroups where a device has them (compute capability 9.0);
    /// true by default. Without them, such a device runs the kernels of all others, which is slower.
    #[must_use]
    pub fn warpgroups(self, wanted: bool) -> Self {
        Self { warpgroups: wanted, ..self }
    }

    /// Whether f32 is multiplied as sums of two tf32 parts on tensor cores, which stays in class `F32`; true
    /// by default. It is for head dimensions from 64 to 128 and more than 128 queries and 128 keys.
    /// Elsewhere, and without it, products are fused multiply-adds.
    #[must_use]
    pub fn split_f32(self, wanted: bool) -> Self {
        Self { split_f32: wanted, ..self }
    }

    /// Multiprocessors that the forward kernel on warpgroups leaves to other work on the device, as that of a
    /// collective beside it; 0 by default. It runs on the others, one block to each and on one at least, and
    /// its blocks go over the tiles of a call: the results have the same bits.
    #[must_use]
    pub fn sm_margin(self, multiprocessors: usize) -> Self {
        Self { sm_margin: multiprocessors, ..self }
    }
}
