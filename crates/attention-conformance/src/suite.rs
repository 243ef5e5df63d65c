//! The generated cases, chosen and run.

use std::fmt;
use std::io::{self, Write};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use attention_core::{DType, Pass};
use serde::{Deserialize, Serialize};

use crate::cases::{self, Case};
use crate::report::{About, CaseResult, Counting, Outcome, Report};

pub use crate::subject::Subject;

/// One case in one dtype and pass. Displays as `name dtype pass`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RunId {
    /// The name of the case.
    pub case: String,
    /// The operands' dtype.
    pub dtype: DType,
    /// The pass.
    pub pass: Pass,
}

impl fmt::Display for RunId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {} {}", self.case, self.dtype, self.pass)
    }
}

/// How far a run has come.
#[derive(Clone, Copy, Debug)]
pub struct Progress<'a> {
    /// How many cases are done.
    pub done: usize,
    /// How many there are.
    pub total: usize,
    /// The one that has just ended.
    pub result: &'a CaseResult,
}

/// Says on standard error how far a run has come, every ten seconds: the whole suite takes minutes. Written
/// to the stream itself, so that a test runner which captures what tests print shows it meanwhile.
///
/// # Examples
/// ```no_run
/// use attention_conformance::suite::{Heartbeat, Suite};
///
/// # fn run(backend: &dyn attention_core::AttentionBackend) {
/// let mut heartbeat = Heartbeat::new(backend.name());
/// let report = Suite::new().run(backend, |progress| heartbeat.tell(progress));
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct Heartbeat {
    name: String,
    every: Duration,
    last: Instant,
    failed: usize,
}

impl Heartbeat {
    /// For a run of the backend of this name.
    pub fn new(name: impl Into<String>) -> Self {
        Self { name: name.into(), every: Duration::from_secs(10), last: Instant::now(), failed: 0 }
    }

    /// With another time between two lines.
    #[must_use]
    pub fn every(self, every: Duration) -> Self {
        Self { every, ..self }
    }

    /// To be called after each case.
    pub fn tell(&mut self, progress: Progress<'_>) {
        if let Some(line) = self.line(progress) {
            // Where it cannot be written, the report still says everything.
            let _ = writeln!(io::stderr().lock(), "{line}");
        }
    }

    /// The line that is due, if one is.
    fn line(&mut self, Progress { done, total, result }: Progress<'_>) -> Option<String> {
        self.failed += usize::from(matches!(result.outcome, Outcome::Failed { .. }));
        if self.last.elapsed() < self.every {
            return None;
        }
        self.last = Instant::now();
        let (name, failed) = (&self.name, self.failed);
        Some(format!(
            "{name}: {done} of {total} cases, {failed} failed; {} {} {}",
            result.case, result.dtype, result.pass
        ))
    }
}

/// The cases to run, in which dtypes and passes.
///
/// ```no_run
/// use attention_conformance::suite::Suite;
/// use attention_core::{DType, Pass};
///
/// # fn run(backend: &dyn attention_core::AttentionBackend) {
/// let suite = Suite::new().dtypes([DType::F32]).passes([Pass::Forward]).filter("causal");
/// let report = suite.run(backend, |progress| eprintln!("{}/{}", progress.done, progress.total));
/// println!("{}", report.totals());
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct Suite {
    cases: Vec<Case>,
    dtypes: Vec<DType>,
    passes: Vec<Pass>,
    /// What has left cases out.
    filters: Vec<String>,
}

impl Default for Suite {
    fn default() -> Self {
        Self::new()
    }
}

impl Suite {
    /// Every case, in every dtype and pass that it has.
    pub fn new() -> Self {
        let mut cases = cases::all();
        cases.extend(cases::of_sequences());
        cases.extend(cases::of_eight_bits());
        cases.extend(cases::of_batch_invariance());
        Self { filters: Vec::new(), ..Self::with_cases(cases) }
    }

    /// These cases, in every dtype and pass.
    pub fn with_cases(cases: Vec<Case>) -> Self {
        let filters = vec![format!("{} cases of the caller's choice", cases.len())];
        Self { cases, dtypes: DType::FLOATS.into(), passes: vec![Pass::Forward, Pass::Backward], filters }
    }

    /// Only these dtypes.
    #[must_use]
    pub fn dtypes(mut self, dtypes: impl IntoIterator<Item = DType>) -> Self {
        self.dtypes = dtypes.into_iter().collect();
        self
    }

    /// Only these passes.
    #[must_use]
    pub fn passes(mut self, passes: impl IntoIterator<Item = Pass>) -> Self {
        self.passes = passes.into_iter().collect();
        self
    }

    /// Only cases whose name contains this.
    #[must_use]
    pub fn filter(mut self, part_of_name: &str) -> Self {
        let all = self.cases.len();
        self.cases.retain(|case| case.name.contains(part_of_name));
        let left = self.cases.len();
        self.filters.push(format!("{left} of {all} cases, whose names contain '{part_of_name}'"));
        self
    }

    /// The cases.
    pub fn cases(&self) -> &[Case] {
        &self.cases
    }

    /// What [`run`](Self::run) will run, in order.
    pub fn list(&self) -> Vec<RunId> {
        self.runs().map(|(case, dtype, pass)| RunId { case: case.name.clone(), dtype, pass }).collect()
    }

    /// Runs everything on a backend, and tells `progress` after each case.
    ///
    /// Cases run side by side on some threads, since most of a case's time is the oracle's, which has one.
    /// They end in any order; the report has them in that of [`list`](Self::list). On a backend for device
    /// memory they run one after the other.
    pub fn run<'a>(&self, subject: impl Into<Subject<'a>>, mut progress: impl FnMut(Progress<'_>)) -> Report {
        let subject = subject.into();
        let about = About::here(subject.device.as_deref(), self.left_out());
        let counting = Counting::start(subject.backends());
        let runs: Vec<(&Case, DType, Pass)> = self.runs().collect();
        let total = runs.len();
        let mut results: Vec<Option<CaseResult>> = vec![None; total];
        let (ends, ended) = mpsc::channel();
        let next = AtomicUsize::new(0);
        let take_cases = |ends: mpsc::Sender<(usize, CaseResult)>| loop {
            let index = next.fetch_add(1, Ordering::Relaxed);
            let Some(&(case, dtype, pass)) = runs.get(index) else { return };
            let result = crate::run::run_case(&subject, case, dtype, pass);
            if ends.send((index, result)).is_err() {
                // `progress` has panicked, so the report is not made.
                return;
            }
        };
        std::thread::scope(|scope| {
            for _ in 0..workers(&subject).min(total) {
                let ends = ends.clone();
                scope.spawn(|| take_cases(ends));
            }
            drop(ends);
            // Ends with the last thread, whether it has run out of cases or has panicked.
            for (before, (index, result)) in ended.into_iter().enumerate() {
                progress(Progress { done: before + 1, total, result: &result });
                results[index] = Some(result);
            }
        });
        let (backend, version) = (subject.backend.name().to_owned(), subject.backend.version().to_owned());
        let results = results.into_iter().flatten().collect();
        Report { backend, version, about, variants: counting.finish(), results }
    }

    /// The report of a backend that cannot run here at all, such as one for an instruction set that the
    /// processor lacks: every case is skipped, for this reason.
    pub fn skipped(&self, backend: &str, version: &str, reason: &str) -> Report {
        let result = |run: RunId| CaseResult {
            case: run.case,
            dtype: run.dtype,
            pass: run.pass,
            features: Vec::new(),
            outcome: Outcome::Skipped { reason: reason.to_owned() },
            ms: 0.0,
        };
        Report {
            backend: backend.to_owned(),
            version: version.to_owned(),
            about: About::here(None, self.left_out()),
            variants: None,
            results: self.list().into_iter().map(result).collect(),
        }
    }

    /// By what this suite is not the whole one.
    fn left_out(&self) -> Vec<String> {
        let mut filters = self.filters.clone();
        let words = |names: Vec<String>| names.join(", ");
        if DType::FLOATS.iter().any(|dtype| !self.dtypes.contains(dtype)) {
            filters.push(format!("dtypes {}", words(self.dtypes.iter().map(ToString::to_string).collect())));
        }
        if [Pass::Forward, Pass::Backward].iter().any(|pass| !self.passes.contains(pass)) {
            filters.push(format!("passes {}", words(self.passes.iter().map(ToString::to_string).collect())));
        }
        filters
    }

    pub(crate) fn runs(&self) -> impl Iterator<Item = (&Case, DType, Pass)> {
        self.dtypes.iter().flat_map(move |&dtype| {
            self.passes.iter().flat_map(move |&pass| {
                let cases = self.cases.iter().filter(move |case| case.passes().contains(&pass));
                cases.map(move |case| (case, dtype, pass))
            })
        })
    }
}

/// How many threads take cases: not many, because the largest cases take some hundred megabytes.
fn workers(subject: &Subject<'_>) -> usize {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    if subject.reproducible { cores.min(8) } else { 1 }
}

/// Runs one case with all its checks: for property tests on [`cases::strategy`], and to look at one failure.
pub fn run_case<'a>(subject: impl Into<Subject<'a>>, case: &Case, dtype: DType, pass: Pass) -> CaseResult {
    crate::run::run_case(&subject.into(), case, dtype, pass)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn result(outcome: Outcome) -> CaseResult {
        CaseResult {
            case: "masks/1".to_owned(),
            dtype: DType::F32,
            pass: Pass::Forward,
            features: vec![],
            outcome,
            ms: 1.0,
        }
    }

    #[test]
    fn a_heartbeat_speaks_when_its_time_has_come_and_counts_failures_meanwhile() {
        let failed = result(Outcome::Failed { reason: "wrong".to_owned(), differences: vec![] });
        let skipped = result(Outcome::Skipped { reason: "not declared".to_owned() });
        let mut quiet = Heartbeat::new("toy").every(Duration::from_secs(3600));
        for done in 1..100 {
            assert_eq!(quiet.line(Progress { done, total: 100, result: &failed }), None);
        }
        let mut due = quiet.every(Duration::ZERO);
        assert_eq!(
            due.line(Progress { done: 100, total: 200, result: &skipped }).as_deref(),
            Some("toy: 100 of 200 cases, 99 failed; masks/1 f32 forward")
        );
    }
}
