//! What belongs to this backend alone.

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

    /// The cuDNN library: its file, or a folder that it is in. Binding: nothing else is tried. By default what
    /// `ATTENTION_CUDNN` names, else what the loader finds as `libcudnn.so.9` or `libcudnn.so`, in this order, else what
    /// lies in [`wheel_roots`](Self::wheel_roots).
    #[must_use]
    pub fn library(self, path: impl Into<PathBuf>) -> Self {
        Self { library: Some(path.into()), ..self }
    }

    /// `site-packages` folders whose `nvidia/*/lib` are searched at last, for cuDNN and the libraries that it needs.
    #[must_use]
    pub fn wheel_roots(self, roots: impl IntoIterator<Item = PathBuf>) -> Self {
        Self { wheel_roots: roots.into_iter().collect(), ..self }
    }

    /// The most bytes that cuDNN may use for itself in a call, beside the caller's scratch, and the most scratch that the
    /// backend lends a call whose caller has none; 1 GiB by default. A call that needs more fails.
    #[must_use]
    pub fn workspace_limit(self, bytes: usize) -> Self {
        Self { workspace_limit: bytes, ..self }
    }

    /// Serves backward calls whose query heads share keys and values. cuDNN rounds the gradient of keys and values to the
    /// operands' dtype for each query head and only then adds them up, which is up to a tenth more error than the
    /// numerics class of this library allows; so such calls are refused unless this is set.
    #[must_use]
    pub fn rounds_group_gradients(self, accepted: bool) -> Self {
        Self { rounds_group_gradients: accepted, ..self }
    }

    /// The caller's word that no bias holds an infinity, for which cuDNN would compute NaN. A bias of whole rows and keys, in
    /// f32 or the operands' dtype, is then used as it lies; otherwise every bias is copied to scratch first, with finite
    /// numbers in the place of infinities.
    #[must_use]
    pub fn finite_bias(self, promised: bool) -> Self {
        Self { finite_bias: promised, ..self }
    }

    /// The caller's word that queries, keys, values and their gradients are finite wherever a row may see them. Otherwise, where
    /// rows see different keys, results are looked at once more, since cuDNN lets NaN and infinities of what a row must not see into
    /// it: 2 to 7 % of a causal call of 512 to 1024 positions on an H200, nothing to be seen of one of 4096.
    #[must_use]
    pub fn finite_operands(self, promised: bool) -> Self {
        Self { finite_operands: promised, ..self }
    }

    /// Drops by cuDNN's own generator instead of the published stream, which other backends compute as well: faster, and
    /// without a tensor of `B * N * T * S` elements in scratch. Which probabilities are dropped is then a secret of cuDNN:
    /// the same in forward and backward of one shape, seed and offset on one device with one version of it, and not to be
    /// had elsewhere.
    #[must_use]
    pub fn own_dropout(self, accepted: bool) -> Self {
        Self { own_dropout: accepted, ..self }
    }

    /// Where compiled kernels of our own are kept for the next process; by default in the folder that the
    /// environment variable `ATTENTION_KERNEL_FOLDER` names, and nowhere without it.
    #[must_use]
    pub fn kernel_folder(self, folder: impl Into<PathBuf>) -> Self {
        Self { kernel_folder: Some(folder.into()), ..self }
    }

    /// Where plans are kept for the next process, about 100 kB each; nowhere by default. One that is there is loaded in 2 ms
    /// where building it takes 60 ms. A file belongs to one plan of one version of cuDNN and of this crate on one kind of
    /// device. cuDNN trusts what it loads, and so must you: use a folder that only you can write to.
    #[must_use]
    pub fn plan_folder(self, folder: impl Into<PathBuf>) -> Self {
        Self { plan_folder: Some(folder.into()), ..self }
    }
}
