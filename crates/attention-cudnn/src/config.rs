//! The configuration of the backend.

use std::path::PathBuf;

/// Configuration of [`CudnnBackend`](crate::CudnnBackend).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CudnnConfig {
    pub(crate) device: usize,
    pub(crate) library: Option<PathBuf>,
    pub(crate) wheel_roots: Vec<PathBuf>,
    pub(crate) workspace_limit: usize,
    pub(crate) kernel_folder: Option<PathBuf>,
    pub(crate) plan_folder: Option<PathBuf>,
    pub(crate) rounds_group_gradients: bool,
    pub(crate) finite_bias: bool,
    pub(crate) finite_operands: bool,
    pub(crate) own_dropout: bool,
}

impl Default for CudnnConfig {
    fn default() -> Self {
        Self {
            device: 0,
            library: None,
            wheel_roots: Vec::new(),
            // A bound that is small against a device's memory.
            workspace_limit: 1 << 30,
            kernel_folder: None,
            plan_folder: None,
            rounds_group_gradients: false,
            finite_bias: false,
            finite_operands: false,
            own_dropout: false,
        }
    }
}

impl CudnnConfig {
    /// The ordinal of the device to run on; 0 by default.
    #[must_use]
    pub fn device(self, ordinal: usize) -> Self {
        Self { device: ordinal, ..self }
    }

    /// The cuDNN library: its file, or the folder that it is in. By default it is the file or folder that the
    /// environment variable `ATTENTION_CUDNN` names. If one of the two is set, no other place is tried.
    /// Otherwise the backend tries what the loader finds as `libcudnn.so.9`, then `libcudnn.so`, then the
    /// folders of [`wheel_roots`](Self::wheel_roots).
    #[must_use]
    pub fn library(self, path: impl Into<PathBuf>) -> Self {
        Self { library: Some(path.into()), ..self }
    }

    /// `site-packages` folders whose `nvidia/*/lib` are searched last, for cuDNN and the libraries that it
    /// needs.
    #[must_use]
    pub fn wheel_roots(self, roots: impl IntoIterator<Item = PathBuf>) -> Self {
        Self { wheel_roots: roots.into_iter().collect(), ..self }
    }

    /// The maximum size in bytes of cuDNN's own workspace in a call, in addition to the caller's scratch, and
    /// the maximum size of the scratch that the backend lends to a call whose caller has none; 1 GiB by
    /// default. A call that needs more fails.
    #[must_use]
    pub fn workspace_limit(self, bytes: usize) -> Self {
        Self { workspace_limit: bytes, ..self }
    }

    /// Serves backward calls whose query heads share keys and values. cuDNN rounds the gradient of keys and
    /// values to the operands' dtype for each query head before it adds them up. The error is then up to a
    /// tenth larger than the numerics class of this library allows, so such calls are refused unless this is
    /// set.
    #[must_use]
    pub fn rounds_group_gradients(self, accepted: bool) -> Self {
        Self { rounds_group_gradients: accepted, ..self }
    }

    /// The caller promises that no bias has an infinite element, from which cuDNN would compute NaN. A bias
    /// that is not broadcast over rows or keys, in f32 or the operands' dtype, is then read without a copy.
    /// Without the promise every bias is copied to scratch first, with finite numbers in place of infinities.
    #[must_use]
    pub fn finite_bias(self, promised: bool) -> Self {
        Self { finite_bias: promised, ..self }
    }

    /// The caller promises that queries, keys, values and their gradients are finite at every position that a
    /// row may see. Without the promise, calls whose rows see different keys check the results once more,
    /// because cuDNN lets NaN and infinities from masked positions into rows that must not see them. On an
    /// H200 the check takes 2 to 7 % of a causal call of 512 to 1024 positions, and no measurable time of one
    /// of 4096.
    #[must_use]
    pub fn finite_operands(self, promised: bool) -> Self {
        Self { finite_operands: promised, ..self }
    }

    /// Drops probabilities by cuDNN's own generator instead of the published stream, which the other backends
    /// compute too. This is faster and needs no tensor of `B * N * T * S` elements in scratch. cuDNN does not
    /// say which probabilities it drops: they are the same in forward and backward for one shape, seed and
    /// offset on one device with one version of cuDNN, and nothing else can reproduce them.
    #[must_use]
    pub fn own_dropout(self, accepted: bool) -> Self {
        Self { own_dropout: accepted, ..self }
    }

    /// The folder where this library's compiled kernels are kept for the next process. By default it is the
    /// folder that the environment variable `ATTENTION_KERNEL_FOLDER` names; without it no kernel is kept.
    #[must_use]
    pub fn kernel_folder(self, folder: impl Into<PathBuf>) -> Self {
        Self { kernel_folder: Some(folder.into()), ..self }
    }

    /// The folder where execution plans are kept for the next process, about 100 kB each; by default no plan
    /// is kept. Loading a plan takes 2 ms, building it 60 ms. A file belongs to one plan of one version of
    /// cuDNN and of this crate on one kind of device. cuDNN does not verify what it loads, so use a folder
    /// that only you can write to.
    #[must_use]
    pub fn plan_folder(self, folder: impl Into<PathBuf>) -> Self {
        Self { plan_folder: Some(folder.into()), ..self }
    }
}
