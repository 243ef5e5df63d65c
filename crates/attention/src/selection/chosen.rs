//! What is asked of a choice, and what was chosen.

use std::sync::Arc;

use attention_core::{AttentionBackend, NumericsClass, Plan};

use super::Implementation;
use crate::Refusal;

/// What a caller asks of the choice.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub(crate) struct Wanted {
    pub(crate) implementation: Implementation,
    pub(crate) scratch_limit: Option<usize>,
    pub(crate) numerics: Option<NumericsClass>,
}

/// The implementation that runs a problem, with its plan.
#[derive(Debug)]
pub(crate) struct Chosen {
    pub(crate) backend: Arc<dyn AttentionBackend>,
    pub(crate) plan: Arc<dyn Plan>,
    pub(crate) reason: Reason,
    pub(crate) numerics: NumericsClass,
    pub(crate) passed_over: Vec<Refusal>,
}

/// Why an implementation was chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(rename_all = "snake_case"))]
#[non_exhaustive]
pub enum Reason {
    /// It was asked for by name.
    Named,
    /// The caller gave its value.
    Given,
    /// The first in order of preference that serves the problem.
    FirstInOrder,
    /// The first in order of preference that serves the problem, of the numerics class that was asked for.
    FirstOfClass,
    /// The first in the caller's list that serves the problem: its place, counted from 1.
    Preferred(usize),
}

impl std::fmt::Display for Reason {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Named => f.write_str("asked for by name"),
            Self::Given => f.write_str("given by the caller"),
            Self::FirstInOrder => f.write_str("the first in order of preference that serves the problem"),
            Self::FirstOfClass => {
                f.write_str("the first in order of preference that serves the problem in the class asked for")
            }
            Self::Preferred(place) => {
                write!(f, "number {place} of the caller's list, the first that serves the problem")
            }
        }
    }
}
