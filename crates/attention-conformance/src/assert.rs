//! The suite as one line of a test.

use attention_core::DType;

use crate::golden::{GoldenSet, Limits, own_sets};
use crate::report::{Report, uncovered};
use crate::suite::{Heartbeat, Subject, Suite};

/// Failures that a panic lists in full; the rest is counted.
const LISTED: usize = 20;

/// Runs the whole suite and the golden sets of this crate on a backend: every case that it declares to serve
/// must pass. Returns the reports, the suite's first. Says on standard error every ten seconds how far it has
/// come.
///
/// ```
/// # use attention_core::AttentionBackend;
/// # fn test(backend: &dyn AttentionBackend, four_threads: &dyn AttentionBackend) {
/// use attention_conformance::{assert_conforms, suite::Subject};
///
/// assert_conforms(backend);
/// // With a second value of the backend that must give the same bits:
/// assert_conforms(Subject::new(backend).same_as("four threads", four_threads));
/// # }
/// ```
///
/// # Panics
/// Where a case fails, listing the first failures; where no case passes at all, which would prove nothing;
/// where the backend lists [variants](attention_core::AttentionBackend::variants) and no case has run one of
/// them, or has run one that it does not list; where a golden set of this crate cannot be read.
pub fn assert_conforms<'a>(subject: impl Into<Subject<'a>>) -> Vec<Report> {
    let subject = subject.into();
    let mut heartbeat = Heartbeat::new(subject.backend.name());
    let mut reports = vec![Suite::new().run(subject.clone(), |progress| heartbeat.tell(progress))];
    for directory in own_sets() {
        let set = GoldenSet::open(&directory).unwrap_or_else(|error| panic!("{error}"));
        reports.push(set.limits(Limits::Derived).run(subject.clone(), &DType::FLOATS, None, |_| {}));
    }
    let totals: crate::report::Totals = reports.iter().map(Report::totals).sum();
    let failures: Vec<String> = reports.iter().flat_map(Report::failures).map(ToString::to_string).collect();
    let listed = failures[..failures.len().min(LISTED)].join("\n");
    let name = subject.backend.name();
    assert!(failures.is_empty(), "{name} does not conform: {totals}\n{listed}");
    assert!(totals.passed > 0, "{name} was not tested: {totals}");
    if let Some(fault) = uncovered(&reports) {
        panic!("the suite does not reach what {name} may choose: {fault}");
    }
    reports
}
