//! What came of a run, as data; as a table, as JSON, and as a page with plots.

mod about;
mod float;
mod html;
mod plot;
mod table;
mod variants;

pub use about::About;
pub use html::html;
pub use table::{Table, table};
pub(crate) use variants::Counting;
pub use variants::{coverage, uncovered};

use std::fmt;

use attention_core::{DType, Feature, Pass, Role, VariantRuns};
use serde::{Deserialize, Serialize};

/// One element that is out of bounds.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Difference {
    /// The output.
    pub tensor: Role,
    /// The element.
    pub index: Vec<usize>,
    /// What the backend wrote.
    #[serde(with = "float")]
    pub got: f64,
    /// What the oracle, or the golden file, has.
    #[serde(with = "float")]
    pub want: f64,
    /// How far they may be apart.
    #[serde(with = "float")]
    pub bound: f64,
}

/// How a case ended.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "outcome", rename_all = "snake_case")]
pub enum Outcome {
    /// Every check held.
    Passed {
        /// The largest error, as a fraction of its bound.
        #[serde(with = "float")]
        worst: f64,
        /// The output that has it; `None` where nothing was compared.
        tensor: Option<Role>,
    },
    /// A check did not hold.
    Failed {
        /// Which, and how.
        reason: String,
        /// The first five elements that are out of bounds, if that is the reason.
        differences: Vec<Difference>,
    },
    /// The backend does not claim to serve the case.
    Skipped {
        /// The backend's own words.
        reason: String,
    },
}

/// One case in one dtype and pass.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct CaseResult {
    /// The name of the case.
    pub case: String,
    /// The operands' dtype.
    pub dtype: DType,
    /// The pass.
    pub pass: Pass,
    /// The features that the call needs.
    pub features: Vec<Feature>,
    /// How it ended.
    #[serde(flatten)]
    pub outcome: Outcome,
    /// How long all checks took together, in milliseconds.
    pub ms: f64,
}

/// Everything that came of running a backend.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// The backend's name.
    pub backend: String,
    /// The backend's version.
    pub version: String,
    /// Where, when and how it was run.
    pub about: About,
    /// The code paths that the backend lists or has run, and how often this run has run each; `None` where it
    /// lists none.
    pub variants: Option<Vec<VariantRuns>>,
    /// One result a case, dtype and pass.
    pub results: Vec<CaseResult>,
}

/// Counts of outcomes. Displays as `N passed, N failed, N skipped`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Totals {
    /// Cases in which every check held.
    pub passed: usize,
    /// Cases in which one did not.
    pub failed: usize,
    /// Cases that the backend does not claim to serve.
    pub skipped: usize,
}

impl Report {
    /// Counts the outcomes.
    pub fn totals(&self) -> Totals {
        self.results.iter().map(CaseResult::count).sum()
    }

    /// The results that failed.
    pub fn failures(&self) -> impl Iterator<Item = &CaseResult> {
        self.results.iter().filter(|result| matches!(result.outcome, Outcome::Failed { .. }))
    }

    /// The largest error as a fraction of its bound among the cases that passed.
    pub fn worst(&self) -> f64 {
        self.results.iter().filter_map(CaseResult::worst).fold(0.0, f64::max)
    }
}

impl CaseResult {
    /// The largest error as a fraction of its bound; `None` unless the case passed.
    pub fn worst(&self) -> Option<f64> {
        match self.outcome {
            Outcome::Passed { worst, .. } => Some(worst),
            _ => None,
        }
    }

    fn count(&self) -> Totals {
        let mut totals = Totals::default();
        match self.outcome {
            Outcome::Passed { .. } => totals.passed = 1,
            Outcome::Failed { .. } => totals.failed = 1,
            Outcome::Skipped { .. } => totals.skipped = 1,
        }
        totals
    }
}

impl std::ops::Add for Totals {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self {
            passed: self.passed + other.passed,
            failed: self.failed + other.failed,
            skipped: self.skipped + other.skipped,
        }
    }
}

impl std::iter::Sum for Totals {
    fn sum<I: Iterator<Item = Self>>(totals: I) -> Self {
        totals.fold(Self::default(), std::ops::Add::add)
    }
}

impl fmt::Display for Totals {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} passed, {} failed, {} skipped", self.passed, self.failed, self.skipped)
    }
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { tensor, index, got, want, bound } = self;
        write!(f, "{tensor}{index:?}: got {got:e}, want {want:e} within {bound:.3e}")
    }
}

impl fmt::Display for CaseResult {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {} {}: ", self.case, self.dtype, self.pass)?;
        match &self.outcome {
            Outcome::Passed { worst, tensor } => {
                write!(f, "passed, error {worst:.3} of its bound")?;
                tensor.map_or(Ok(()), |tensor| write!(f, " in {tensor}"))
            }
            Outcome::Skipped { reason } => write!(f, "skipped, {reason}"),
            Outcome::Failed { reason, differences } => {
                write!(f, "FAILED, {reason}")?;
                differences.iter().try_for_each(|difference| write!(f, "\n    {difference}"))
            }
        }
    }
}

/// Reports as JSON: an array with one object a backend.
///
/// # Panics
/// Never: reports hold nothing that JSON cannot express.
pub fn json(reports: &[Report]) -> String {
    serde_json::to_string_pretty(reports).expect("reports hold strings, numbers and lists")
}

#[cfg(test)]
mod tests;
