//! Each case as a test of its own.

use std::fmt;
use std::sync::Arc;

use attention_core::AttentionBackend;
use libtest_mimic::{Failed, Trial};

use crate::report::Outcome;
use crate::suite::{Suite, run_case};

/// A test that is run where that is possible, and elsewhere listed as ignored, never as passed, with the
/// reason in front of its name. Asked to run all the same (`--ignored`), it fails with the reason.
///
/// ```no_run
/// # fn processor_has_amx() -> Result<(), String> { Ok(()) }
/// use attention_conformance::trial_where;
///
/// fn main() {
///     let trial = trial_where("conforms_with_amx", processor_has_amx(), || { /* which panics where something is wrong */ });
///     libtest_mimic::run(&libtest_mimic::Arguments::from_args(), vec![trial]).exit();
/// }
/// ```
pub fn trial_where(
    name: impl Into<String>,
    possible: Result<(), impl fmt::Display>,
    run: impl FnOnce() + Send + 'static,
) -> Trial {
    match possible {
        Ok(()) => Trial::test(name, move || {
            run();
            Ok(())
        }),
        Err(reason) => {
            let reason = reason.to_string();
            let failure = Failed::from(&reason);
            Trial::test(name, move || Err(failure)).with_kind(reason).with_ignored_flag(true)
        }
    }
}

/// The cases of the suite as tests named `backend/case dtype pass`, for a `harness = false` test of a backend
/// crate:
///
/// ```no_run
/// # use std::sync::Arc;
/// # fn backend() -> Arc<dyn attention_core::AttentionBackend> { unimplemented!() }
/// fn main() {
///     let arguments = libtest_mimic::Arguments::from_args();
///     libtest_mimic::run(&arguments, attention_conformance::trials(&backend())).exit();
/// }
/// ```
///
/// A case that the backend refuses is listed as ignored, never as passed: whether it does is asked here, so
/// that listing needs no run.
pub fn trials(backend: &Arc<dyn AttentionBackend>) -> Vec<Trial> {
    let suite = Suite::new();
    let mut trials = Vec::new();
    for (run, (case, ..)) in suite.list().into_iter().zip(suite.runs()) {
        let case = case.clone();
        let name = format!("{}/{run}", backend.name());
        let ignored = crate::run::is_refused(backend.as_ref(), &case, run.dtype, run.pass);
        let backend = Arc::clone(backend);
        let trial = Trial::test(name, move || {
            let result = run_case(backend.as_ref(), &case, run.dtype, run.pass);
            match result.outcome {
                Outcome::Failed { .. } => Err(Failed::from(result.to_string())),
                _ => Ok(()),
            }
        });
        trials.push(trial.with_ignored_flag(ignored));
    }
    trials
}
