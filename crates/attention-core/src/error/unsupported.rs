//! What a backend refuses, though the call is right.

use crate::{DType, Device, DeviceKind, Feature, NumericsClass, Pass};

/// What a backend cannot do: which limit, and which value of the problem meets it.
#[derive(Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum Unsupported {
    /// The memory is where this backend cannot reach it.
    #[error("{backend} works on {expected} memory, the call is on {device}")]
    Device {
        /// The backend.
        backend: String,
        /// Where the call is.
        device: Device,
        /// What the backend works on.
        expected: DeviceKind,
    },
    /// The operand dtype.
    #[error("{backend} does not take {dtype} operands, only {}", names(.supported))]
    DType {
        /// The backend.
        backend: String,
        /// The problem's dtype.
        dtype: DType,
        /// What the backend takes.
        supported: Vec<DType>,
    },
    /// An option, for this pass.
    #[error("{backend} does not support {feature} in its {pass} pass")]
    Feature {
        /// The backend.
        backend: String,
        /// The option.
        feature: Feature,
        /// The pass.
        pass: Pass,
    },
    /// A pass that the backend does not have.
    #[error("{backend} has no {pass} pass")]
    Pass {
        /// The backend.
        backend: String,
        /// The pass.
        pass: Pass,
    },
    /// A limit of this backend's own.
    #[error("{backend} does not support {what} {value}: {why}")]
    Limit {
        /// The backend.
        backend: String,
        /// What is limited, worded to be followed by the value: "head dimension".
        what: String,
        /// The value of the call.
        value: String,
        /// What is supported and, where it is not plain, for what reason: a whole clause.
        why: String,
    },
    /// The scratch memory would exceed the limit that the caller set.
    #[error("{backend} needs {needed} bytes of scratch, the limit is {limit}")]
    ScratchLimit {
        /// The backend.
        backend: String,
        /// Bytes needed.
        needed: usize,
        /// Bytes allowed.
        limit: usize,
    },
    /// The backend has no scratch memory to lend, so the caller must bring it.
    #[error("{backend} lends no scratch, and a call of it needs {needed} bytes on {device}")]
    LentScratch {
        /// The backend.
        backend: String,
        /// Where the call is.
        device: Device,
        /// Bytes needed.
        needed: usize,
    },
    /// The numerics class differs from the one asked for.
    #[error("{backend} computes {dtype} in class {class}, class {wanted} was asked for")]
    Numerics {
        /// The backend.
        backend: String,
        /// The problem's dtype.
        dtype: DType,
        /// The backend's class for it.
        class: NumericsClass,
        /// The class asked for.
        wanted: NumericsClass,
    },
    /// The call's sums are longer than those for which the backend's numerics class holds, and a class was
    /// asked for. By its name alone the backend serves the call.
    #[error(
        "{backend} does not compute {dtype} in class {class} over {length} {what}: its long sums drift, and \
         the class holds for up to {limit}; asked for by name it serves the call"
    )]
    LongSums {
        /// The backend.
        backend: String,
        /// The problem's dtype.
        dtype: DType,
        /// The backend's class for shorter sums, which was asked for.
        class: NumericsClass,
        /// What the sums are over: "keys" or "query rows".
        what: &'static str,
        /// How many of them, at most.
        length: usize,
        /// The most for which the class holds.
        limit: usize,
    },
}

impl Unsupported {
    /// The refusal in words, without the value of the call that meets it: what calls of different sizes have
    /// in common.
    pub fn rule(&self) -> String {
        match self {
            Self::Limit { backend, what, why, .. } => {
                format!("{backend}, {what}: {why}")
            }
            other => other.to_string(),
        }
    }
}

fn names(dtypes: &[DType]) -> String {
    dtypes.iter().map(|dtype| dtype.name()).collect::<Vec<_>>().join(", ")
}
