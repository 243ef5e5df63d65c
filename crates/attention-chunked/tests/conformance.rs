//! The conformance suite and the golden sets, at every level of the machine, on one and on several threads
//! and with chunks of several sizes: results must agree with the oracle, and with each other to the bit.
//!
//! A level that the machine lacks is ignored, with what it lacks.

use std::sync::Arc;

use attention_chunked::{ChunkedBackend, ChunkedConfig, Level};
use attention_conformance::golden::{GoldenSet, Limits, own_sets};
use attention_conformance::suite::Subject;
use attention_conformance::{assert_conforms, trial_where};
use attention_core::{AttentionBackend, DType, Error, Inputs, View};

fn main() {
    let conforms = |name: &str, level: Level| trial_where(name, level.check(), move || conforms_at(level));
    let missing = Level::ALL.into_iter().find(|level| level.check().is_err());
    let trials = vec![
        conforms("conforms_without_special_instructions", Level::Scalar),
        conforms("conforms_with_avx2", Level::Avx2),
        conforms("conforms_with_avx512", Level::Avx512),
        conforms("conforms_with_amx", Level::Amx),
        trial_where("conforms_with_f32_split_for_amx", Level::Amx.check(), conforms_with_f32_split_for_amx),
        trial_where(
            "is_as_exact_as_the_golden_sets_ask",
            Ok::<(), &str>(()),
            is_as_exact_as_the_golden_sets_ask,
        ),
        trial_where(
            "a_level_that_is_missing_is_an_error_that_names_it",
            missing.map(|_| ()).ok_or("this machine has every level"),
            move || a_missing_level_is_an_error_that_names_it(missing.expect("there is one")),
        ),
    ];
    libtest_mimic::run(&libtest_mimic::Arguments::from_args(), trials).exit();
}

/// Runs the suite at a level.
fn conforms_at(level: Level) {
    // A pool of its own: more threads than most problems have tasks, whatever the machine has.
    let pool = rayon::ThreadPoolBuilder::new().num_threads(5).build().expect("a pool of five threads");
    let config = || ChunkedConfig::default().level(level);
    let five = ChunkedBackend::with_config(config().pool(Arc::new(pool)));
    let one = ChunkedBackend::with_config(config().threads(1));
    let small_chunks = ChunkedBackend::with_config(config().query_chunk(1).budget(1));
    let default = ChunkedBackend::with_config(config());
    assert_conforms(
        Subject::new(&default)
            .same_as("one thread", &one)
            .same_as("five threads", &five)
            .same_as("the smallest chunks", &small_chunks),
    );
}

/// f32 operands as sums of bf16 parts stay inside the bounds of f32.
fn conforms_with_f32_split_for_amx() {
    let split = ChunkedBackend::with_config(ChunkedConfig::default().level(Level::Amx).split_f32(true));
    let suite = attention_conformance::suite::Suite::new().dtypes([DType::F32]);
    let report = suite.run(&split, |_| {});
    let failures: Vec<String> = report.failures().map(ToString::to_string).collect();
    assert!(failures.is_empty(), "{}", failures.join("\n"));
    assert!(report.totals().passed > 1000);
}

/// Not only inside the derived bounds: f64 to 1e-12, and f32 no further from the truth than twice JAX's own
/// f32.
fn is_as_exact_as_the_golden_sets_ask() {
    for level in Level::available() {
        let backend = ChunkedBackend::with_config(ChunkedConfig::default().level(level));
        for directory in own_sets() {
            let set =
                GoldenSet::open(&directory).expect("the sets of the suite can be read").limits(Limits::Jax);
            let report = set.run(&backend, &[DType::F64, DType::F32], None, |_| {});
            let failures: Vec<String> = report.failures().map(ToString::to_string).collect();
            assert!(failures.is_empty(), "at {level}: {}", failures.join("\n"));
            // Every pass of each case in both dtypes.
            assert_eq!(report.totals().passed, 2 * set.passes());
        }
    }
}

fn a_missing_level_is_an_error_that_names_it(level: Level) {
    let reason = level.check().expect_err("it is missing");
    let backend = ChunkedBackend::with_config(ChunkedConfig::default().level(level));
    assert_eq!(backend.level(), None);
    let error = backend.available().unwrap_err().to_string();
    assert!(error.contains(level.name()) && error.contains(&reason), "{error}");

    let data = [1.0f32; 8];
    let view = View::from_slice(&data, [1, 1, 1, 8]).unwrap();
    let problem = Inputs::new(view, view, view).problem().build().unwrap();
    // Questions are answered all the same; there is no plan, and so no call.
    assert!(backend.supports(&problem).is_ok() && backend.scratch_bytes(&problem).is_ok());
    let refused = backend.plan(&problem);
    assert!(matches!(refused, Err(Error::Unavailable(_))), "{refused:?}");
}
