//! The suite accepts a backend that is right, dtype by dtype so that the tests share the processors.

mod support;

use std::sync::Arc;

use attention_conformance::cases;
use attention_conformance::report::{Outcome, uncovered};
use attention_conformance::suite::{Subject, Suite, run_case};
use attention_core::{DType, Pass, Variants};
use proptest::prelude::*;
use support::{Flaw, Naive};

fn passes(dtype: DType, suite: &Suite) {
    let naive = Naive::new(Flaw::None);
    let suite = suite.clone().dtypes([dtype]);
    let mut seen = 0;
    let report = suite.run(&naive, |progress| {
        seen += 1;
        assert_eq!((progress.done, progress.total), (seen, suite.list().len()));
    });
    let failures: Vec<String> = report.failures().map(ToString::to_string).collect();
    assert!(failures.is_empty(), "{}\n{}", report.totals(), failures.join("\n"));
    assert_eq!(report.totals().passed, suite.list().len(), "nothing was skipped");
    // A bound that nothing comes near would be no bound.
    assert!(report.worst() > 0.2, "{dtype}: {}", report.worst());
}

/// Every third case: the dtype decides about rounding alone, and the naive backend is slow.
fn thinned() -> Suite {
    Suite::with_cases(Suite::new().cases().iter().step_by(3).cloned().collect())
}

#[test]
fn a_right_backend_passes_in_f64() {
    passes(DType::F64, &thinned());
}

#[test]
fn a_right_backend_passes_in_f32() {
    passes(DType::F32, &Suite::new());
}

#[test]
fn a_right_backend_passes_in_f16() {
    passes(DType::F16, &thinned());
}

#[test]
fn a_right_backend_passes_in_bf16() {
    passes(DType::Bf16, &thinned());
}

/// Cases run side by side, and end in any order.
#[test]
fn results_are_in_the_order_of_the_list() {
    let suite = Suite::new().filter("small/");
    let report = suite.run(&Naive::new(Flaw::None), |_| {});
    let ran: Vec<String> = report
        .results
        .iter()
        .map(|result| format!("{} {} {}", result.case, result.dtype, result.pass))
        .collect();
    assert_eq!(ran, suite.list().iter().map(ToString::to_string).collect::<Vec<_>>());
}

#[test]
#[should_panic(expected = "after the first")]
fn a_panic_of_what_shows_the_progress_ends_the_run() {
    Suite::new().dtypes([DType::F32]).run(&Naive::new(Flaw::None), |_| panic!("after the first"));
}

#[test]
fn a_right_backend_has_the_bits_of_another_value() {
    let (naive, other) = (Naive::new(Flaw::None), Naive::new(Flaw::None));
    let suite = Suite::new().filter("small/").dtypes([DType::F32]);
    let report = suite.run(Subject::new(&naive).same_as("another value", &other), |_| {});
    assert_eq!(report.totals().passed, suite.list().len());
}

#[test]
fn filters_choose_by_name_dtype_and_pass() {
    let suite = Suite::new().filter("fused-qkv").dtypes([DType::F16]).passes([Pass::Backward]);
    let list = suite.list();
    assert_eq!(list.len(), suite.cases().len());
    assert!(!list.is_empty() && list.len() < 20);
    assert_eq!(list[0].to_string(), format!("{} f16 backward", list[0].case));
}

/// What a run has reached is told from what other runs have, and from what was skipped.
#[test]
fn variants_that_were_not_run_are_named() {
    let naive =
        Naive { variants: Some(Arc::new(Variants::new(["forward", "backward"]))), ..Naive::new(Flaw::None) };
    let suite = Suite::new().filter("small/one-of-each").dtypes([DType::F32]);
    let whole = suite.run(&naive, |_| {});
    assert_eq!((uncovered(std::slice::from_ref(&whole)), whole.variants.unwrap().len()), (None, 2));
    let forward = suite.clone().passes([Pass::Forward]).run(&naive, |_| {});
    assert_eq!(uncovered(&[forward]).unwrap(), "1 of its variants were not run: backward");
    let skipped = suite.skipped("naive", "0", "the processor lacks it");
    assert_eq!((skipped.totals().skipped, uncovered(&[skipped])), (suite.list().len(), None));
    assert_eq!(suite.run(&Naive::new(Flaw::None), |_| {}).variants, None);
}

#[test]
fn a_report_says_by_what_its_run_was_filtered() {
    let naive = Naive::new(Flaw::None);
    let suite = Suite::new().filter("small/one-of").passes([Pass::Forward]);
    let filters = suite.run(&naive, |_| {}).about.filters;
    let others = cases::of_eight_bits().len() + cases::of_batch_invariance().len();
    let all = cases::all().len() + cases::of_sequences().len() + others;
    assert_eq!(
        filters,
        [format!("3 of {all} cases, whose names contain 'small/one-of'"), "passes forward".to_owned()]
    );
    let chosen = Suite::with_cases(suite.cases().to_vec()).run(&naive, |_| {}).about;
    assert_eq!(chosen.filters, ["3 cases of the caller's choice"]);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    #[test]
    fn random_cases_pass(case in cases::strategy(), dtype in 0..4usize) {
        let naive = Naive::new(Flaw::None);
        for pass in [Pass::Forward, Pass::Backward] {
            let result = run_case(&naive, &case, DType::FLOATS[dtype], pass);
            let passed = matches!(result.outcome, Outcome::Passed { .. });
            prop_assert!(passed, "{}", result);
        }
    }
}
