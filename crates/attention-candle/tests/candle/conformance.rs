//! Every case of the suite, forward and backward, in every dtype, through candle's tensors and graph.

use attention::core::{DType, Pass};
use attention_candle::AxisOrder;
use attention_conformance::cases::{self, Case, Saved};
use attention_conformance::report::Outcome;
use attention_conformance::suite::{Subject, Suite};

use crate::device::device;
use crate::through::ThroughCandle;

/// Runs the cases in every dtype, or those whose names contain `ATTENTION_CANDLE_CASES` where that is set. A
/// logsumexp with a gradient has backward calls of its own, whose results are rounded and then added by
/// candle: once more than the bounds have room for in a half, so those cases are f64 and f32 there.
fn run(cases: Vec<Case>, backend: &ThroughCandle) {
    // What candle goes backward from is what it computed.
    let part = std::env::var("ATTENTION_CANDLE_CASES").unwrap_or_default();
    let cases = cases.into_iter().filter(|case| case.name.contains(&part));
    let cases = cases.map(|case| Case { saved: Saved::Backend, ..case });
    let (with_d_lse, without): (Vec<Case>, Vec<Case>) = cases.partition(|case| case.options.d_lse);
    let (mut wide, mut narrow) = (with_d_lse.clone(), with_d_lse);
    wide.iter_mut().for_each(|case| case.options.bias_dtype = None);
    narrow.iter_mut().for_each(|case| case.options.d_lse = false);
    narrow.extend(without);
    for suite in [
        Suite::with_cases(wide).dtypes([DType::F64, DType::F32]).passes([Pass::Backward]),
        Suite::with_cases(narrow),
    ] {
        // Part of them may have no `d_lse`.
        assert!(!suite.cases().is_empty() || !part.is_empty());
        let mut subject = Subject::new(backend);
        if device().is_cuda() {
            // Which implementation is chosen there may depend on the batch.
            subject = subject.computes_on_a_device();
        }
        let report = suite.run(subject, |_| ());
        let failures: Vec<String> = report.failures().take(10).map(ToString::to_string).collect();
        assert!(failures.is_empty(), "{}\n{}", report.totals(), failures.join("\n"));
        let skipped = report.results.iter().find(|result| matches!(result.outcome, Outcome::Skipped { .. }));
        // Heads that are too large for kernels on a GPU.
        assert!(skipped.is_none() || device().is_cuda(), "{}", skipped.unwrap());
        println!("{}: {}, at most {:.2?} of a bound", backend.label(), report.totals(), report.worst());
    }
}

/// Every third case: in the other order of axes the same calls are made, on transposed views.
fn thinned(cases: Vec<Case>) -> Vec<Case> {
    cases.into_iter().step_by(3).collect()
}

#[test]
fn heads_before_the_sequence() {
    run(cases::all(), &ThroughCandle::new(AxisOrder::Bnth, false));
}

#[test]
fn the_sequence_before_heads() {
    run(thinned(cases::all()), &ThroughCandle::new(AxisOrder::Btnh, false));
}

#[test]
fn packed_and_paged_sequences_with_heads_before_the_sequence() {
    run(thinned(cases::of_sequences()), &ThroughCandle::new(AxisOrder::Bnth, false));
}

#[test]
fn packed_and_paged_sequences_before_heads() {
    run(cases::of_sequences(), &ThroughCandle::new(AxisOrder::Btnh, false));
}

#[test]
fn with_the_forward_pass_recomputed() {
    let cases = cases::all().into_iter().filter(|case| case.name.starts_with("random")).collect();
    run(cases, &ThroughCandle::new(AxisOrder::Bnth, true));
}
