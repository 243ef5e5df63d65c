//! What a caller can ask for.

use std::borrow::Cow;
use std::sync::Arc;

use attention_core::{AttentionBackend, NumericsClass};

/// Which implementation shall run a call.
///
/// Nothing falls back silently: [`Named`](Self::Named) and [`Exactly`](Self::Exactly) run there or fail at
/// once with the reason, and [`Prefer`](Self::Prefer) goes no further than its own list.
///
/// A name that neither the registry nor this library has is an error wherever it stands, also in a list:
/// [`Error::UnknownImplementation`](crate::Error::UnknownImplementation) with the names there are. A name of
/// this library's whose feature is off is an error alone ([`Error::NotBuilt`](crate::Error::NotBuilt), with
/// the feature), and counts as a refusal in a list, so that one list serves builds with and without CUDA. An
/// empty list is an error.
///
/// Configuration belongs to the implementation's value: `Implementation::from(Arc::new(backend))` with a
/// backend that was made with chunk sizes, threads or a stream.
///
/// # Examples
/// ```
/// use attention::Implementation;
///
/// let named = Implementation::from("cpu");
/// let in_order = Implementation::from(["cudnn", "cpu"]);
/// assert_eq!(named.to_string(), "cpu");
/// assert_eq!(in_order.to_string(), "the first of cudnn, cpu");
/// ```
#[derive(Clone, Debug, Default)]
#[non_exhaustive]
pub enum Implementation {
    /// The first in order of preference that is on the memory's device, available, of the standard numerics
    /// class of the dtype, inside the scratch limit, and supports and plans the problem.
    #[default]
    Auto,
    /// The registered implementation of this name, and nothing else.
    Named(Cow<'static, str>),
    /// This value, registered or not, and nothing else.
    Exactly(Arc<dyn AttentionBackend>),
    /// The first of these that serves the problem. Falls to an automatic choice only where
    /// [`Auto`](Self::Auto) is in the list.
    Prefer(Vec<Implementation>),
    /// As [`Auto`](Self::Auto), among the implementations of this numerics class.
    Numerics(NumericsClass),
}

impl Implementation {
    /// Whether it is a list that names nothing, however deep.
    pub(crate) fn is_empty_list(&self) -> bool {
        matches!(self, Self::Prefer(list) if list.iter().all(Self::is_empty_list))
    }
}

/// An implementation that was given by value is the same where it is the same `Arc`.
impl PartialEq for Implementation {
    fn eq(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Auto, Self::Auto) => true,
            (Self::Named(one), Self::Named(other)) => one == other,
            (Self::Exactly(one), Self::Exactly(other)) => address(one) == address(other),
            (Self::Prefer(one), Self::Prefer(other)) => one == other,
            (Self::Numerics(one), Self::Numerics(other)) => one == other,
            _ => false,
        }
    }
}

impl Eq for Implementation {}

impl std::hash::Hash for Implementation {
    fn hash<H: std::hash::Hasher>(&self, state: &mut H) {
        std::mem::discriminant(self).hash(state);
        match self {
            Self::Auto => {}
            Self::Named(name) => name.hash(state),
            Self::Exactly(backend) => address(backend).hash(state),
            Self::Prefer(list) => list.hash(state),
            Self::Numerics(class) => class.hash(state),
        }
    }
}

/// Where a value is: each `Arc` has its own memory, also for values without a size.
fn address(backend: &Arc<dyn AttentionBackend>) -> *const () {
    Arc::as_ptr(backend).cast()
}

impl std::fmt::Display for Implementation {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Auto => f.write_str("auto"),
            Self::Named(name) => f.write_str(name),
            Self::Exactly(backend) => write!(f, "exactly {} {}", backend.name(), backend.version()),
            Self::Prefer(list) if list.is_empty() => f.write_str("an empty list"),
            Self::Prefer(list) => {
                let names: Vec<_> = list.iter().map(ToString::to_string).collect();
                write!(f, "the first of {}", names.join(", "))
            }
            Self::Numerics(class) => write!(f, "any of class {class}"),
        }
    }
}

impl From<&'static str> for Implementation {
    fn from(name: &'static str) -> Self {
        Self::Named(name.into())
    }
}

impl From<String> for Implementation {
    fn from(name: String) -> Self {
        Self::Named(name.into())
    }
}

impl From<NumericsClass> for Implementation {
    fn from(class: NumericsClass) -> Self {
        Self::Numerics(class)
    }
}

impl From<Arc<dyn AttentionBackend>> for Implementation {
    fn from(backend: Arc<dyn AttentionBackend>) -> Self {
        Self::Exactly(backend)
    }
}

impl<B: AttentionBackend + 'static> From<Arc<B>> for Implementation {
    fn from(backend: Arc<B>) -> Self {
        Self::Exactly(backend)
    }
}

impl<I: Into<Implementation>> From<Vec<I>> for Implementation {
    fn from(list: Vec<I>) -> Self {
        Self::Prefer(list.into_iter().map(Into::into).collect())
    }
}

impl<I: Into<Implementation>, const N: usize> From<[I; N]> for Implementation {
    fn from(list: [I; N]) -> Self {
        Self::Prefer(list.into_iter().map(Into::into).collect())
    }
}
