//! The conformance suite and the golden sets, at every level of the machine, on one and on several threads and with
//! chunks of several sizes: results must agree with the oracle, and with each other to the bit.
//!
//! A level that the machine lacks is named and not run.

use std::sync::Arc;

use attention_chunked::{ChunkedBackend, ChunkedConfig, Level};
use attention_conformance::assert_conforms;
use attention_conformance::golden::{GoldenSet, Limits, own_sets};
use attention_conformance::suite::Subject;
use attention_core::DType;

/// Runs the suite at a level, or says that the machine lacks it.
fn conforms_at(level: Level) {
    if let Err(reason) = level.check() {
        println!("level {level} skipped: {reason}");
        return;
    }
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

#[test]
fn conforms_without_special_instructions() {
    conforms_at(Level::Scalar);
}

#[test]
fn conforms_with_avx2() {
    conforms_at(Level::Avx2);
}

#[test]
fn conforms_with_avx512() {
    conforms_at(Level::Avx512);
}

#[test]
fn conforms_with_amx() {
    conforms_at(Level::Amx);
}

/// f32 operands as sums of bf16 parts stay inside the bounds of f32.
#[test]
fn conforms_with_f32_split_for_amx() {
    if let Err(reason) = Level::Amx.check() {
        println!("level {} skipped: {reason}", Level::Amx);
        return;
    }
    let split = ChunkedBackend::with_config(ChunkedConfig::default().level(Level::Amx).split_f32(true));
    let suite = attention_conformance::suite::Suite::new().dtypes([DType::F32]);
    let report = suite.run(&split, |_| {});
    let failures: Vec<String> = report.failures().map(ToString::to_string).collect();
    assert!(failures.is_empty(), "{}", failures.join("\n"));
    assert!(report.totals().passed > 1000);
}

/// Not only inside the derived bounds: f64 to 1e-12, and f32 no further from the truth than twice JAX's own f32.
#[test]
fn is_as_exact_as_the_golden_sets_ask() {
    for level in Level::available() {
        let backend = ChunkedBackend::with_config(ChunkedConfig::default().level(level));
        for directory in own_sets() {
            let set =
                GoldenSet::open(&directory).expect("the sets of the suite can be read").limits(Limits::Jax);
            let report = set.run(&backend, &[DType::F64, DType::F32], None, |_| {});
            let failures: Vec<String> = report.failures().map(ToString::to_string).collect();
            assert!(failures.is_empty(), "at {level}: {}", failures.join("\n"));
            // Forward and backward of each case in both dtypes.
            assert_eq!(report.totals().passed, 4 * set.len());
        }
    }
}
