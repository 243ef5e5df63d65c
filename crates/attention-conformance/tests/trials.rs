//! Cases as tests of libtest-mimic.
#![cfg(feature = "libtest")]

#[path = "../examples/toy_backend.rs"]
#[allow(dead_code, missing_docs, unreachable_pub)]
mod toy_backend;

use std::sync::Arc;

use attention_conformance::suite::Suite;
use attention_conformance::trials;
use attention_core::AttentionBackend;

#[test]
fn every_case_is_a_trial_and_refused_ones_are_ignored() {
    let toy: Arc<dyn AttentionBackend> = Arc::new(toy_backend::Toy::default());
    let trials = trials(&toy);
    assert_eq!(trials.len(), Suite::new().list().len());
    assert!(trials.iter().all(|trial| trial.name().starts_with("toy/")));
    let runs =
        |part: &str| trials.iter().filter(|t| t.name().contains(part) && !t.has_ignored_flag()).count();
    assert!(runs("head-dim") > 20);
    assert_eq!(runs("softcap/") + runs("backward") + runs(" f64 "), 0);
    let arguments =
        libtest_mimic::Arguments { quiet: true, filter: Some("groups/n1".into()), ..Default::default() };
    assert!(!libtest_mimic::run(&arguments, trials).has_failed());
}
