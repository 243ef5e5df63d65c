//! Devices that a call is explained for: those of this machine, and those that are assumed.

use std::str::FromStr;
use std::sync::Arc;

use attention::Registry;
use attention_chunked_cuda::{ChunkedCudaBackend, ChunkedCudaConfig};
use attention_core::{AttentionBackend, Device};
use attention_cudnn::{CudnnBackend, CudnnConfig, Target};

use crate::backends::Assumed;

/// GPUs by name, with their compute capabilities (NVIDIA, "CUDA GPU Compute Capability").
const GPUS: &[(&str, (u32, u32))] = &[
    ("a100", (8, 0)),
    ("a10", (8, 6)),
    ("a40", (8, 6)),
    ("rtx3090", (8, 6)),
    ("l4", (8, 9)),
    ("l40s", (8, 9)),
    ("rtx4090", (8, 9)),
    ("h100", (9, 0)),
    ("h200", (9, 0)),
    ("gh200", (9, 0)),
    ("b200", (10, 0)),
    ("gb200", (10, 0)),
    ("b300", (10, 3)),
    ("rtx5090", (12, 0)),
];

/// Where the tensors of a call are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Where {
    /// A device of this machine.
    Here(Device),
    /// A GPU that need not be there, with a version of cuDNN.
    Assumed(Target),
}

impl Where {
    pub(super) fn device(self) -> Device {
        match self {
            Self::Here(device) => device,
            Self::Assumed(_) => Device::Cuda(0),
        }
    }

    /// What is assumed, if anything is.
    pub(super) fn assumed(self) -> Option<Target> {
        match self {
            Self::Here(_) => None,
            Self::Assumed(target) => Some(target),
        }
    }

    /// The backends of a registry and those for GPUs: on this device, or answering as if it were there.
    pub(super) fn registry(self, registry: Registry) -> Registry {
        match self {
            Self::Here(Device::Cuda(ordinal)) => {
                let ordinal = ordinal as usize;
                let cudnn = CudnnBackend::new(CudnnConfig::default().device(ordinal));
                let chunked = ChunkedCudaBackend::new(ChunkedCudaConfig::default().device(ordinal));
                registry.with(Arc::new(cudnn)).with(Arc::new(chunked))
            }
            // They refuse it, and say that it is host memory.
            Self::Here(_) => {
                registry.with(Arc::new(CudnnBackend::default())).with(Arc::new(ChunkedCudaBackend::default()))
            }
            Self::Assumed(target) => {
                // Without a library, so that what is assumed counts where there is a GPU too.
                let cudnn = CudnnBackend::new(CudnnConfig::default().library("none")).assuming(target);
                let backends: [Arc<dyn AttentionBackend>; 2] =
                    [Arc::new(cudnn), Arc::new(ChunkedCudaBackend::default())];
                backends
                    .into_iter()
                    .fold(registry, |registry, backend| registry.with(Arc::new(Assumed { backend })))
            }
        }
    }
}

impl FromStr for Where {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = |what: &str| {
            let names: Vec<&str> = GPUS.iter().map(|&(name, _)| name).collect();
            format!(
                "'{text}' is no device: {what}; expected cpu, cuda:0, or GPU@VERSION of cuDNN such as h200@9.19, with a GPU \
                 of {} or a compute capability such as sm_90",
                names.join(", ")
            )
        };
        if text == "cpu" {
            return Ok(Self::Here(Device::Cpu));
        }
        if let Some(ordinal) = text.strip_prefix("cuda:") {
            let ordinal = ordinal.parse().map_err(|_| wrong(&format!("'{ordinal}' is no number")))?;
            return Ok(Self::Here(Device::Cuda(ordinal)));
        }
        let (gpu, version) = text.split_once('@').ok_or_else(|| wrong("it names no version of cuDNN"))?;
        let named =
            GPUS.iter().find(|(name, _)| name.eq_ignore_ascii_case(gpu)).map(|&(_, capability)| capability);
        let capability =
            named.or_else(|| capability(gpu)).ok_or_else(|| wrong(&format!("no GPU is called '{gpu}'")))?;
        let parts = version.split('.').map(|part| part.parse().ok()).collect::<Option<Vec<u32>>>();
        let version = match parts.as_deref() {
            Some(&[major, minor]) => [major, minor, 0],
            Some(&[major, minor, patch]) => [major, minor, patch],
            _ => return Err(wrong(&format!("'{version}' is no version such as 9.19 or 9.19.0"))),
        };
        Ok(Self::Assumed(Target { version, capability }))
    }
}

/// `sm_90` as (9, 0): the last digit is the minor one.
fn capability(text: &str) -> Option<(u32, u32)> {
    let number: u32 = text.strip_prefix("sm_")?.parse().ok()?;
    (number >= 10).then_some((number / 10, number % 10))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_are_read() {
        let read = |text: &str| text.parse::<Where>();
        assert_eq!(read("cpu"), Ok(Where::Here(Device::Cpu)));
        assert_eq!(read("cuda:3"), Ok(Where::Here(Device::Cuda(3))));
        let assumed = |version, capability| Ok(Where::Assumed(Target { version, capability }));
        assert_eq!(read("h200@9.19"), assumed([9, 19, 0], (9, 0)));
        assert_eq!(read("sm_120@9.12.1"), assumed([9, 12, 1], (12, 0)));
        for (text, what) in [
            ("cuda:x", "'x' is no number"),
            ("h200", "no version of cuDNN"),
            ("abacus@9.19", "no GPU is called 'abacus'"),
            ("sm_9@9.19", "no GPU is called 'sm_9'"),
            ("h200@9", "'9' is no version"),
        ] {
            let error = read(text).unwrap_err();
            assert!(error.contains(what), "{text}: {error}");
        }
    }
}
