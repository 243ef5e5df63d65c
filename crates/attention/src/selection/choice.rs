//! A choice that can be stored and loaded on another machine.

use attention_core::{AttentionBackend, DType, NumericsClass};

use super::ours::missing;
use crate::{Error, Implementation, Registry};

/// A choice of implementation in a form to store, with feature `serde`.
///
/// Loaded on another machine by [`Registry::resolve`], it gives the same numerics or fails with a clear
/// error.
///
/// # Examples
/// ```
/// use attention::{Choice, NumericsClass, Registry};
///
/// let anything_in_f32 = Choice::Numerics(NumericsClass::F32);
/// let error = Registry::empty().resolve(&anything_in_f32).unwrap_err();
/// assert_eq!(error.to_string(), "no implementation here computes in class F32; none is registered");
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(rename_all = "snake_case", deny_unknown_fields))]
pub enum Choice {
    /// One implementation, which must compute as it did where the choice was made.
    Implementation {
        /// Its name.
        name: String,
        /// Its version; any where there is none.
        #[cfg_attr(feature = "serde", serde(default, skip_serializing_if = "Option::is_none"))]
        version: Option<String>,
        /// The operand dtype that the choice was made for.
        dtype: DType,
        /// The class that it computed that dtype in.
        numerics: NumericsClass,
    },
    /// Any implementation of a numerics class.
    Numerics(NumericsClass),
}

impl Choice {
    /// This implementation, as it computes operands of this dtype.
    pub(crate) fn of(backend: &dyn AttentionBackend, dtype: DType, numerics: NumericsClass) -> Self {
        let (name, version) = (backend.name().to_owned(), Some(backend.version().to_owned()));
        Self::Implementation { name, version, dtype, numerics }
    }

    /// The same without a version, which takes any.
    #[must_use]
    pub fn any_version(mut self) -> Self {
        if let Self::Implementation { version, .. } = &mut self {
            *version = None;
        }
        self
    }

    /// The numerics class.
    pub fn numerics(&self) -> NumericsClass {
        match self {
            Self::Implementation { numerics, .. } | Self::Numerics(numerics) => *numerics,
        }
    }
}

impl Registry {
    /// The implementation that a stored choice stands for here.
    ///
    /// # Errors
    /// [`Error::UnknownImplementation`] or [`Error::NotBuilt`] where the choice names one that is missing
    /// here, [`Error::OtherVersion`], [`Error::OtherNumerics`]; [`Error::NoNumerics`] where the choice names
    /// a class that no implementation here computes in.
    pub fn resolve(&self, choice: &Choice) -> Result<Implementation, Error> {
        match choice {
            Choice::Implementation { name, version, dtype, numerics } => {
                let backend = self.get(name).ok_or_else(|| missing(name, self))?;
                let here = backend.capabilities().numerics_of(*dtype);
                if here != Some(*numerics) {
                    let (name, dtype, stored) = (name.clone(), *dtype, *numerics);
                    return Err(Error::OtherNumerics { name, dtype, stored, here });
                }
                match version {
                    Some(version) if version != backend.version() => Err(Error::OtherVersion {
                        name: name.clone(),
                        stored: version.clone(),
                        here: backend.version().to_owned(),
                    }),
                    _ => Ok(Implementation::Exactly(backend.clone())),
                }
            }
            Choice::Numerics(class) => {
                let has_class = self.backends().iter().any(|backend| {
                    backend.capabilities().numerics.iter().any(|(_, candidate)| candidate == class)
                });
                if !has_class {
                    return Err(Error::NoNumerics { class: *class, known: self.names() });
                }
                Ok(Implementation::Numerics(*class))
            }
        }
    }
}
