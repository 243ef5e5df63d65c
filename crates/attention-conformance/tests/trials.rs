//! Cases as tests of libtest-mimic.
#![cfg(feature = "libtest")]

#[path = "../examples/toy_backend.rs"]
#[allow(dead_code, missing_docs, unreachable_pub)]
mod toy_backend;

use std::sync::Arc;

use attention_conformance::suite::Suite;
use attention_conformance::{trial_where, trials};
use attention_core::AttentionBackend;

/// Runs trials without a word, since a summary of theirs among this program's output would be read as its
/// own.
fn run(
    name: &str,
    arguments: libtest_mimic::Arguments,
    trials: Vec<libtest_mimic::Trial>,
) -> libtest_mimic::Conclusion {
    let log = std::env::temp_dir().join(format!("attention-trials-{}-{name}", std::process::id()));
    let logfile = Some(log.to_str().expect("a path in UTF-8").to_owned());
    let conclusion =
        libtest_mimic::run(&libtest_mimic::Arguments { quiet: true, logfile, ..arguments }, trials);
    std::fs::remove_file(log).expect("the trials were logged");
    conclusion
}

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
    let arguments = libtest_mimic::Arguments { filter: Some("groups/n1".into()), ..Default::default() };
    assert!(!run("cases", arguments, trials).has_failed());
}

#[test]
fn what_cannot_run_is_ignored_with_its_reason() {
    let missing: Result<(), &str> = Err("the processor lacks it");
    let trials = || {
        vec![
            trial_where("there", Ok::<(), &str>(()), || ()),
            trial_where("missing", missing, || unreachable!()),
        ]
    };
    assert!(!trials()[0].has_ignored_flag() && trials()[1].has_ignored_flag());
    assert_eq!(trials()[1].kind(), "the processor lacks it");
    let conclusion = run("all", libtest_mimic::Arguments::default(), trials());
    assert_eq!((conclusion.num_passed, conclusion.num_ignored, conclusion.num_failed), (1, 1, 0));
    let ignored = libtest_mimic::Arguments { ignored: true, ..Default::default() };
    let forced = run("ignored", ignored, trials());
    assert_eq!((forced.num_passed, forced.num_failed), (0, 1));
}
