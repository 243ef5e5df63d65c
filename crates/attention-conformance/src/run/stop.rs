//! Why a case ends early.

use crate::report::Difference;

/// Why a case ends before all checks are done.
pub(crate) enum Stop {
    /// The backend is wrong.
    Failed(String, Vec<Difference>),
    /// The backend does not claim to serve the case.
    Skipped(String),
}

impl Stop {
    pub(crate) fn failed(reason: impl Into<String>) -> Self {
        Stop::Failed(reason.into(), Vec::new())
    }
}
