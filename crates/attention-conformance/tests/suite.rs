//! The suite accepts a backend that is right.

mod support;

use attention_conformance::suite::Suite;
use support::{Flaw, Naive};

#[test]
fn a_right_backend_passes_everything() {
    let naive = Naive::new(Flaw::None);
    let suite = Suite::new();
    let report = suite.run(&naive, |_| {});
    for failure in report.failures().take(20) {
        println!("{failure}");
    }
    println!("{}", attention_conformance::report::table(&[report.clone()]));
    assert_eq!(report.totals().passed, suite.list().len(), "{}", report.totals());
}
