//! Why a call through the facade did not run.

use attention_core::{
    BackendFailure, DType, Device, Dims, InvalidCall, NumericsClass, OutOfMemory, Role, Unavailable,
    Unsupported,
};

use crate::kv_cache::CacheError;
use crate::{AxisOrder, OtherTensor};

/// Why a call through the facade did not run. Each variant names a culprit.
///
/// [`invalid_call`](Self::invalid_call), [`unsupported`](Self::unsupported),
/// [`unavailable`](Self::unavailable) and [`backend_failure`](Self::backend_failure) look through
/// [`Error::Core`]. `Debug` is the text, so that a program whose `main` returns this error ends with a
/// sentence.
///
/// # Examples
/// ```
/// # #[cfg(feature = "cpu")] {
/// use attention::{Attention, Unsupported};
///
/// let x = vec![0.5f32; 4096 * 64];
/// let x = (&x, [4096, 1, 64]);
/// let error = Attention::new().implementation("cpu").scratch_limit(0).forward(x, x, x).unwrap_err();
/// match error.unsupported() {
///     Some(Unsupported::ScratchLimit { needed, .. }) => println!("needs {needed} bytes of scratch"),
///     _ => panic!("{error}"),
/// }
/// # }
/// ```
#[derive(thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// What the core says: an invalid call, or the refusal or failure of the implementation that was asked
    /// for.
    #[error(transparent)]
    Core(#[from] attention_core::Error),
    /// Something given as a tensor is none: a slice that does not fit its shape.
    #[error("invalid call: {role}: {source}")]
    Input {
        /// Which tensor.
        role: Role,
        /// What is wrong with it.
        source: InvalidCall,
    },
    /// Some of query, key and value have a batch axis and others have none.
    #[error(
        "invalid call: query {query}, key {key} and value {value} have different ranks; all must have 4 ({order}) or all 3 ({})",
        .order.without_batch()
    )]
    MixedRanks {
        /// The query's shape.
        query: Dims,
        /// The key's shape.
        key: Dims,
        /// The value's shape.
        value: Dims,
        /// The order of axes of the call.
        order: AxisOrder,
    },
    /// The shapes do not fit each other in the order of axes of the call, and do in the other one.
    #[error(
        "invalid call: {source}; query {}, key {} and value {} were read as {order}: if they are {}, which would \
         fit, say so with `Attention::{}()`",
        .shapes[0],
        .shapes[1],
        .shapes[2],
        .order.other(),
        .order.other().method()
    )]
    OtherOrder {
        /// What is wrong in the order of the call.
        source: Box<InvalidCall>,
        /// The shapes of query, key and value.
        shapes: Box<[Dims; 3]>,
        /// The order of axes of the call.
        order: AxisOrder,
    },
    /// Backward was called with other options or inputs than the forward whose result it was given.
    #[error(
        "invalid call: backward has {what} {backward}, its forward had {forward}: give backward what forward had"
    )]
    OtherForward {
        /// Which option or input.
        what: &'static str,
        /// What the forward had.
        forward: String,
        /// What backward was called with.
        backward: String,
    },
    /// No candidate serves the problem.
    #[error("no implementation serves: {problem}{}", list(.refusals))]
    NoImplementation {
        /// The problem, in words.
        problem: String,
        /// Each candidate's reason, in the order in which they were asked.
        refusals: Vec<Refusal>,
    },
    /// A name that no registered implementation has.
    #[error("no implementation is named '{name}'; {}", there_are(.known))]
    UnknownImplementation {
        /// The name asked for.
        name: String,
        /// The names that there are.
        known: Vec<String>,
    },
    /// An implementation of this library that this build does not have.
    #[error("implementation '{name}' is not in this build: feature `{feature}` of the crate `attention` adds it; {}", there_are(.known))]
    NotBuilt {
        /// The name asked for.
        name: String,
        /// The feature that adds it.
        feature: &'static str,
        /// The names that there are.
        known: Vec<String>,
    },
    /// A list of implementations to prefer that names none.
    #[error("the list of implementations is empty; {}", there_are(.known))]
    EmptyList {
        /// The names that there are.
        known: Vec<String>,
    },
    /// A stored choice names an implementation that computes in another class here.
    #[error(
        "the stored choice has {name} computing {dtype} in class {stored}, here {}",
        .here.map_or_else(|| format!("{name} does not take {dtype}"), |class| format!("it computes in class {class}"))
    )]
    OtherNumerics {
        /// The implementation.
        name: String,
        /// The dtype of the stored choice.
        dtype: DType,
        /// The class of the stored choice.
        stored: NumericsClass,
        /// The implementation's class here, if it takes the dtype.
        here: Option<NumericsClass>,
    },
    /// A stored choice names another version of an implementation.
    #[error(
        "the stored choice is for {name} {stored}, here is version {here} (a choice without a version takes any)"
    )]
    OtherVersion {
        /// The implementation.
        name: String,
        /// The version of the stored choice.
        stored: String,
        /// The version here.
        here: String,
    },
    /// A stored choice names a numerics class that no implementation here has.
    #[error("no implementation here computes in class {class}; {}", there_are(.known))]
    NoNumerics {
        /// The class of the stored choice.
        class: NumericsClass,
        /// The names of the implementations that there are.
        known: Vec<String>,
    },
    /// Outputs are allocated in host memory only.
    #[error(
        "the call is on {device}, and outputs are allocated in host memory only: give it memory there with `{method}`"
    )]
    DeviceOutput {
        /// Where the inputs are.
        device: Device,
        /// The method that takes the caller's memory.
        method: &'static str,
    },
    /// A cache of keys and values refused.
    #[error(transparent)]
    Cache(#[from] CacheError),
    /// A tensor is not what it was to be turned into.
    #[error(transparent)]
    OtherTensor(#[from] OtherTensor),
    /// The allocator refused.
    #[error("no memory for {what} of {bytes} bytes")]
    OutOfMemory {
        /// What the memory was for.
        what: &'static str,
        /// Bytes asked for.
        bytes: usize,
    },
}

/// Why one candidate was refused.
#[derive(Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum Refusal {
    /// It cannot serve the problem, or not within the caller's limits.
    #[error(transparent)]
    Unsupported(#[from] Unsupported),
    /// Its library or device is not there.
    #[error(transparent)]
    Unavailable(#[from] Unavailable),
    /// It would serve the problem, and failed to plan it: a limit that only the plan shows, a library, or the
    /// machine.
    #[error("while planning: {reason}")]
    Planning {
        /// The implementation.
        name: String,
        /// What it said, in words.
        reason: String,
    },
    /// It is not in the registry.
    #[error("no implementation is named '{name}'; {}", there_are(.known))]
    NotRegistered {
        /// The name asked for.
        name: String,
        /// The names that there are.
        known: Vec<String>,
    },
    /// It is one of this library's, and not in this build.
    #[error("'{name}' is not in this build: feature `{feature}` of the crate `attention` adds it")]
    NotBuilt {
        /// The name asked for.
        name: String,
        /// The feature that adds it.
        feature: &'static str,
        /// The names that there are.
        known: Vec<String>,
    },
}

impl std::fmt::Debug for Error {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        std::fmt::Display::fmt(self, f)
    }
}

impl std::fmt::Debug for Refusal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        std::fmt::Display::fmt(self, f)
    }
}

impl Error {
    /// What is wrong with the call, where no implementation would accept it.
    pub fn invalid_call(&self) -> Option<&InvalidCall> {
        match self {
            Self::Core(attention_core::Error::InvalidCall(reason)) => Some(reason),
            Self::Input { source, .. } => Some(source),
            Self::OtherOrder { source, .. } => Some(source),
            _ => None,
        }
    }

    /// What the implementation that was asked for cannot do.
    pub fn unsupported(&self) -> Option<&Unsupported> {
        match self {
            Self::Core(attention_core::Error::Unsupported(reason)) => Some(reason),
            _ => None,
        }
    }

    /// Which library or device the implementation that was asked for lacks.
    pub fn unavailable(&self) -> Option<&Unavailable> {
        match self {
            Self::Core(attention_core::Error::Unavailable(reason)) => Some(reason),
            _ => None,
        }
    }

    /// In what the implementation failed.
    pub fn backend_failure(&self) -> Option<&BackendFailure> {
        match self {
            Self::Core(attention_core::Error::Backend(failure)) => Some(failure),
            _ => None,
        }
    }
}

impl From<Refusal> for Error {
    fn from(refusal: Refusal) -> Self {
        match refusal {
            Refusal::Unsupported(reason) => reason.into(),
            Refusal::Unavailable(reason) => reason.into(),
            Refusal::Planning { name, reason } => {
                BackendFailure { backend: name, operation: "planning".to_owned(), source: reason.into() }
                    .into()
            }
            Refusal::NotRegistered { name, known } => Self::UnknownImplementation { name, known },
            Refusal::NotBuilt { name, feature, known } => Self::NotBuilt { name, feature, known },
        }
    }
}

macro_rules! through_core {
    ($($source:ty),*) => {$(
        impl From<$source> for Error {
            fn from(error: $source) -> Self {
                Self::Core(error.into())
            }
        }
    )*};
}
through_core!(InvalidCall, Unsupported, Unavailable, BackendFailure);

impl From<OutOfMemory> for Error {
    fn from(OutOfMemory { what, bytes }: OutOfMemory) -> Self {
        Self::OutOfMemory { what, bytes }
    }
}

fn there_are(names: &[String]) -> String {
    if names.is_empty() {
        "none is registered".to_owned()
    } else {
        format!("there are: {}", names.join(", "))
    }
}

fn list(refusals: &[Refusal]) -> String {
    if refusals.is_empty() {
        return " (none is registered)".to_owned();
    }
    refusals.iter().map(|refusal| format!("\n  {refusal}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages() {
        let none = Error::NoImplementation { problem: "forward f32".to_owned(), refusals: vec![] };
        assert_eq!(none.to_string(), "no implementation serves: forward f32 (none is registered)");
        let missing = |name: &str| Unavailable {
            backend: name.to_owned(),
            what: "libcudnn is missing".to_owned(),
            looked_for: vec!["libcudnn.so.9".to_owned(), "libcudnn.so".to_owned()],
        };
        let both = Error::NoImplementation {
            problem: "forward f32".to_owned(),
            refusals: vec![
                missing("cudnn").into(),
                Refusal::NotRegistered { name: "other".to_owned(), known: vec!["cpu".to_owned()] },
            ],
        };
        assert_eq!(
            both.to_string(),
            "no implementation serves: forward f32\n  cudnn is not available: libcudnn is missing; looked for \
             libcudnn.so.9, libcudnn.so\n  no implementation is named 'other'; there are: cpu"
        );
        let planning = Refusal::Planning { name: "cudnn".to_owned(), reason: "no engine".to_owned() };
        assert_eq!(planning.to_string(), "while planning: no engine");
        assert_eq!(Error::from(planning).to_string(), "cudnn failed in planning: no engine");
        let unavailable = Error::from(Refusal::from(missing("cudnn")));
        assert!(matches!(unavailable, Error::Core(attention_core::Error::Unavailable(_))));
        let mixed = Error::MixedRanks {
            query: [2, 3, 4].into(),
            key: [1, 2, 3, 4].into(),
            value: [1, 2, 3, 4].into(),
            order: AxisOrder::Btnh,
        };
        assert_eq!(
            mixed.to_string(),
            "invalid call: query [2, 3, 4], key [1, 2, 3, 4] and value [1, 2, 3, 4] have different ranks; all must \
             have 4 ([B, T, N, H]) or all 3 ([T, N, H])"
        );
        let failure = Error::from(BackendFailure {
            backend: "cudnn".to_owned(),
            operation: "forward".to_owned(),
            source: "out of luck".into(),
        });
        assert_eq!(failure.to_string(), "cudnn failed in forward: out of luck");
    }
}
