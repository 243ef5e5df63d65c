//! The suite refuses backends that are wrong in one thing.

mod support;

use attention_conformance::report::{Outcome, Report};
use attention_conformance::suite::{Subject, Suite};
use attention_core::{DType, Feature, FeatureSet, Pass, PassCapabilities};
use support::{Flaw, Naive};

fn run(flaw: Flaw, filter: &str, dtypes: &[DType], passes: &[Pass]) -> Report {
    let suite = Suite::new().filter(filter).dtypes(dtypes.iter().copied()).passes(passes.iter().copied());
    assert!(!suite.list().is_empty(), "{filter} names no case");
    suite.run(&Naive::new(flaw), |_| {})
}

/// The reasons of all failures.
fn reasons(report: &Report) -> Vec<&str> {
    (report.results.iter())
        .filter_map(|result| match &result.outcome {
            Outcome::Failed { reason, .. } => Some(reason.as_str()),
            _ => None,
        })
        .collect()
}

/// A flaw of the contract fails with a reason that names it.
fn fails_with(flaw: Flaw, filter: &str, passes: &[Pass], words: &str) {
    fails_in(flaw, filter, &[DType::F32], passes, words);
}

fn fails_in(flaw: Flaw, filter: &str, dtypes: &[DType], passes: &[Pass], words: &str) {
    let report = run(flaw, filter, dtypes, passes);
    let reasons = reasons(&report);
    let named = reasons.iter().filter(|reason| reason.contains(words)).count();
    assert!(named > 0, "{flaw:?}: no failure says '{words}': {reasons:?}");
}

const BOTH: [Pass; 2] = [Pass::Forward, Pass::Backward];

#[test]
fn breaches_of_the_contract_are_named() {
    fails_with(Flaw::PoisonLeft, "groups/", &BOTH, "never written");
    fails_with(Flaw::WritesOutside, "layout/padded", &[Pass::Forward], "wrote outside the elements of out");
    fails_with(Flaw::Panic, "scale/", &BOTH, "panicked: on purpose");
    fails_with(Flaw::ScratchUnchecked, "scale/", &BOTH, "one byte less scratch");
    fails_with(
        Flaw::AcceptsEverything,
        "scale/1-causal",
        &BOTH,
        "capabilities do not declare (naive does not support causal",
    );
    fails_with(
        Flaw::RefusesWhatItDeclares,
        "scale/1-causal",
        &BOTH,
        "supports refuses what the capabilities declare",
    );
    fails_with(Flaw::PlansWhatItRefuses, "scale/1-causal", &BOTH, "plan accepts what supports refuses");
    fails_with(Flaw::PlanFails, "scale/", &BOTH, "plan fails on what supports accepts");
    fails_with(Flaw::PlanPanics, "scale/", &BOTH, "panicked: on purpose");
    fails_with(Flaw::PlanIsOfAnotherProblem, "scale/", &BOTH, "not the one that was to be planned");
    fails_with(Flaw::PlanAsksForMoreScratch, "scale/", &BOTH, "the plan asks for");
    fails_with(Flaw::RunsCallsOfOtherProblems, "scale/", &BOTH, "given a call of another problem");
    fails_with(Flaw::ChangesFromCallToCall, "groups/", &[Pass::Forward], "differs when the call is repeated");
    fails_with(
        Flaw::ChangesFromPlanToPlan,
        "groups/",
        &[Pass::Forward],
        "differs when the call is planned again",
    );
    fails_with(Flaw::DependsOnTheBatch, "groups/", &[Pass::Forward], "alone");
    fails_with(Flaw::DependsOnPadding, "bits/plain-small", &[Pass::Forward], "when it is padded");
    fails_with(Flaw::DependsOnStrides, "bits/bias-small", &[Pass::Forward], "with a stride of 2");
    fails_with(Flaw::DependsOnMaskedMemory, "bits/padding-mask-small", &[Pass::Forward], "does not matter");
    fails_with(Flaw::DependsOnOtherRows, "bits/plain-small", &[Pass::Forward], "that it does not read");
    for (flaw, filter) in [
        (Flaw::KeepsLengths, "lengths/keys"),
        (Flaw::KeepsLengths, "lengths/queries"),
        (Flaw::KeepsOffsets, "position/3-causal-t9"),
        (Flaw::KeepsOffsets, "offsets/near-causal"),
        (Flaw::KeepsScale, "groups/"),
        (Flaw::KeepsScale, "scale/"),
        (Flaw::KeepsSoftcap, "softcap/"),
        (Flaw::KeepsSeed, "dropout/0.5"),
        (Flaw::KeepsSeed, "dropout/tensors"),
    ] {
        for pass in BOTH {
            // Each case makes these calls in one dtype of each pass.
            fails_in(flaw, filter, &DType::FLOATS, &[pass], "made after one with other numbers");
        }
    }
    fails_with(Flaw::MaskedByMultiplication, "lengths/keys", &[Pass::Forward], "out of bounds");
    fails_with(Flaw::DropoutOtherSeed, "dropout/bits", &[Pass::Forward], "dropout: the stream has key");
}

/// A flaw of the numbers is out of bounds in at least this share of the cases that it touches, in every
/// dtype.
fn is_out_of_bounds(flaw: Flaw, filter: &str, pass: Pass, share: f64) {
    for dtype in DType::FLOATS {
        let report = run(flaw, filter, &[dtype], &[pass]);
        let totals = report.totals();
        let found = totals.failed as f64 / (totals.failed + totals.passed) as f64;
        println!("{flaw:?} {filter} {dtype} {pass}: {totals}");
        assert!(found >= share, "{flaw:?} in {filter} {dtype} {pass}: {totals}");
    }
}

#[test]
fn wrong_numbers_are_out_of_bounds_forward() {
    let forward = Pass::Forward;
    for (flaw, filter, share) in [
        (Flaw::ScaleOff(1.01), "groups/", 0.9),
        (Flaw::ScaleOff(0.99), "values/queries", 0.9),
        (Flaw::LastKeyMissing, "groups/", 0.9),
        (Flaw::GroupsInterleaved, "groups/n6-k2", 0.9),
        (Flaw::Ignores(Feature::Causal), "pair/causal-", 0.9),
        (Flaw::Ignores(Feature::QueryOffset), "position/3-causal", 0.9),
        (Flaw::Ignores(Feature::QueryOffsets), "offsets/near-causal", 0.9),
        (Flaw::Ignores(Feature::BottomRight), "position/bottom-right-causal", 0.9),
        (Flaw::Ignores(Feature::WindowLeft), "pair/window-left-mask", 0.9),
        (Flaw::Ignores(Feature::WindowRight), "position/top-left-right", 0.5),
        (Flaw::Ignores(Feature::Mask), "mask/rank4-BNTS", 0.9),
        (Flaw::Ignores(Feature::Bias), "bias/rank", 0.7),
        (Flaw::Ignores(Feature::QueryLengths), "lengths/queries", 0.9),
        (Flaw::Ignores(Feature::KeyValueLengths), "lengths/keys", 0.7),
        (Flaw::Ignores(Feature::Softcap), "softcap/2-", 0.9),
        (Flaw::Ignores(Feature::Alibi), "alibi/", 0.9),
        (Flaw::Ignores(Feature::Sinks), "sinks/", 0.7),
        (Flaw::Ignores(Feature::Dropout), "dropout/0.5", 0.9),
        (Flaw::WindowOffByOne, "position/top-left-both", 0.9),
        (Flaw::OffsetOffByOne, "position/3-causal-t9", 0.9),
        (Flaw::MaskInverted, "mask/rank", 0.9),
        (Flaw::DropoutOtherSeed, "dropout/0.5", 0.9),
        (Flaw::DropoutUnscaled, "dropout/0.5", 0.9),
        (Flaw::SoftcapAfterBias, "softcap/2-bias", 0.9),
        (Flaw::EmptyRowsAreMeans, "mask/all-false", 0.9),
        (Flaw::LseInBaseTwo, "groups/", 0.9),
        (Flaw::BaseTwoBeforeTheShift, "magnitude/rows-small", 1.0),
        (Flaw::FarBelowIsMasked, "magnitude/rows-part", 1.0),
        (Flaw::FarBelowIsMasked, "magnitude/mask-small-b", 1.0),
    ] {
        is_out_of_bounds(flaw, filter, forward, share);
    }
}

#[test]
fn wrong_numbers_are_out_of_bounds_backward() {
    for (flaw, filter, share) in [
        (Flaw::ScaleOff(1.1), "groups/", 0.9),
        (Flaw::LastKeyMissing, "groups/", 0.9),
        (Flaw::GroupsInterleaved, "groups/n6-k2", 0.9),
        (Flaw::Ignores(Feature::Causal), "position/top-left-causal", 0.9),
        (Flaw::Ignores(Feature::Bias), "bias/rank4-B", 0.9),
        (Flaw::Ignores(Feature::Softcap), "softcap/2-", 0.9),
        (Flaw::Ignores(Feature::Alibi), "alibi/", 0.9),
        (Flaw::Ignores(Feature::Sinks), "sinks/", 0.7),
        (Flaw::Ignores(Feature::Dropout), "dropout/0.5", 0.9),
        (Flaw::Ignores(Feature::DLse), "results/d-lse", 0.9),
        (Flaw::WindowOffByOne, "position/top-left-both", 0.9),
        (Flaw::MaskInverted, "mask/rank4-BNTS", 0.9),
        (Flaw::DropoutUnscaled, "dropout/0.5", 0.9),
        (Flaw::BiasGradientNotSummed, "bias/rank2-TS", 0.9),
        (Flaw::CapSlopeMissing, "softcap/2-", 0.9),
        (Flaw::GradientOff(1.03), "groups/", 0.9),
        (Flaw::StoredLseWhateverItsDigits, "magnitude/rows-part", 1.0),
        (Flaw::FarBelowIsMasked, "magnitude/rows-part", 1.0),
    ] {
        is_out_of_bounds(flaw, filter, Pass::Backward, share);
    }
}

/// What is wrong with rows of packed and paged sequences alone is found in every dtype.
#[test]
fn wrong_sequences_are_found() {
    for (flaw, filter, share) in [
        (Flaw::ReadsTheNextSequence, "packed/plain", 1.0),
        (Flaw::ReadsTheNextSequence, "paged/decode-16", 1.0),
        (Flaw::IgnoresStarts, "packed/plain", 1.0),
        // One of them has no keys.
        (Flaw::IgnoresStarts, "packed/used-", 0.8),
        (Flaw::IgnoresUsedKeys, "packed/used-bias", 1.0),
        (Flaw::PositionsOfTheTensor, "packed/causal", 1.0),
        (Flaw::PositionsOfTheTensor, "packed/window", 0.8),
        (Flaw::DropoutOfTheTensor, "packed/dropout", 0.9),
        (Flaw::IgnoresTheTable, "paged/prefill-1", 0.9),
        (Flaw::IgnoresTheTable, "paged/shared-", 0.9),
        (Flaw::Ignores(Feature::KeyValueLengths), "paged/softcap", 0.8),
        (Flaw::Ignores(Feature::Alibi), "packed/alibi", 0.8),
        (Flaw::Ignores(Feature::Sinks), "packed/sinks-", 0.8),
    ] {
        is_out_of_bounds(flaw, filter, Pass::Forward, share);
    }
    for (flaw, filter, share) in [
        (Flaw::ReadsTheNextSequence, "packed/plain", 1.0),
        (Flaw::IgnoresStarts, "packed/plain", 1.0),
        (Flaw::IgnoresUsedKeys, "packed/used-bias", 1.0),
        (Flaw::PositionsOfTheTensor, "packed/causal", 1.0),
        (Flaw::DropoutOfTheTensor, "packed/dropout", 0.9),
        (Flaw::BiasGradientNotSummed, "packed/bias-all", 0.9),
    ] {
        is_out_of_bounds(flaw, filter, Pass::Backward, share);
    }
    for pass in BOTH {
        fails_with(
            Flaw::LeavesRowsOfNoSequence,
            "packed/plain",
            &[pass],
            "never written, in a row of no sequence",
        );
    }
    fails_with(
        Flaw::DropoutOfTheTensor,
        "packed/dropout-bits",
        &[Pass::Forward],
        "dropout: the stream has key",
    );
    fails_with(Flaw::DependsOnTheBatch, "packed/plain", &[Pass::Forward], "among other sequences");
    fails_with(Flaw::DependsOnTheBatch, "paged/decode-16", &[Pass::Forward], "among other sequences");
    fails_with(Flaw::DependsOnPadding, "packed/bits-plain", &[Pass::Forward], "when it is padded");
    fails_in(
        Flaw::KeepsLengths,
        "packed/",
        &DType::FLOATS,
        &[Pass::Forward],
        "made after one with other numbers",
    );
    fails_in(
        Flaw::KeepsLengths,
        "paged/",
        &DType::FLOATS,
        &[Pass::Forward],
        "made after one with other numbers",
    );
}

/// Sums that are cut by what else is in the call, or by the layout, are told by their bits.
#[test]
fn sequences_that_are_not_batch_invariant_are_found() {
    let wide = [DType::F64, DType::F32];
    for (flaw, filter, pass, words) in [
        (Flaw::DependsOnTheBatch, "batch_invariant/causal", Pass::Forward, "alone"),
        (Flaw::CutsKeysByTheirBound, "batch_invariant/bottom-right", Pass::Forward, "alone and dense"),
        (Flaw::CutsKeysByTheirBound, "batch_invariant/width-8-paged", Pass::Forward, "alone and dense"),
        (Flaw::OrdersRowsByTheirBound, "batch_invariant/width-8-packed", Pass::Backward, "alone and dense"),
        (Flaw::DependsOnTheLayout, "batch_invariant/width-8-padded", Pass::Forward, "with its sequences as"),
    ] {
        fails_in(flaw, filter, &wide, &[pass], words);
    }
    // The bits are what is wrong with it, and it is asked for them where the problem asks.
    let suite = Suite::new().filter("long-width-32-padded").dtypes(wide).passes([Pass::Forward]);
    let naive = Naive::new(Flaw::CutsKeysByTheirBound);
    let outcome = |subject: Subject<'_>| suite.run(subject, |_| {}).totals();
    assert_eq!(outcome(Subject::new(&naive).computes_on_a_device()).failed, suite.list().len());
    let cases = suite.cases().iter().cloned().map(|mut case| {
        case.options.batch_invariant = false;
        case
    });
    let plain = Suite::with_cases(cases.collect()).dtypes(wide).passes([Pass::Forward]);
    let report = plain.run(Subject::new(&naive).computes_on_a_device(), |_| {});
    assert_eq!(report.totals().passed, plain.list().len());
}

/// A backend without batch invariance is skipped with the feature, also where it declares everything else.
#[test]
fn undeclared_batch_invariance_is_skipped_by_name() {
    let mut naive = Naive::new(Flaw::None);
    naive.capabilities.forward = PassCapabilities::new(FeatureSet::all());
    let cases = attention_conformance::cases::of_batch_invariance();
    let suite = Suite::with_cases(cases).dtypes([DType::F32]).passes([Pass::Forward]);
    let report = suite.run(&naive, |_| {});
    assert_eq!(report.totals().skipped, suite.list().len());
    for result in &report.results {
        let Outcome::Skipped { reason } = &result.outcome else { panic!("{result}") };
        assert!(reason.contains("batch invariant"), "{reason}");
    }
}

/// A backend without packed and paged sequences is skipped with the feature, and never passes.
#[test]
fn undeclared_sequences_are_skipped_by_name() {
    let mut naive = Naive::new(Flaw::None);
    let dense = PassCapabilities::new(FeatureSet::all().difference(FeatureSet::SEQUENCES));
    naive.capabilities.forward = dense.clone();
    naive.capabilities.backward = Some(dense);
    let suite = Suite::with_cases(attention_conformance::cases::of_sequences()).dtypes([DType::F32]);
    let report = suite.run(&naive, |_| {});
    assert_eq!(report.totals().skipped, suite.list().len());
    for result in &report.results {
        let Outcome::Skipped { reason } = &result.outcome else { panic!("{result}") };
        assert!(reason.contains("packed") || reason.contains("page"), "{reason}");
    }
}

/// Scales of 8-bit keys and values that are not used, or are those of another head or sequence.
#[test]
fn wrong_scales_of_8_bits_are_out_of_bounds() {
    for (flaw, filter, share) in [
        (Flaw::IgnoresKeyScales, "scales-heads-none", 0.9),
        (Flaw::IgnoresValueScales, "scales-none-sequences", 0.9),
        (Flaw::ScalesOfTheFirstHead, "scales-heads-heads", 0.9),
        (Flaw::ScalesOfTheFirstSequence, "scales-sequences-sequences", 0.9),
        (Flaw::ScalesOfTheQueryHead, "scales-sequences-sequences", 0.9),
        (Flaw::Ignores(Feature::Mask), "eight_bit/mask", 0.9),
        (Flaw::IgnoresTheTable, "eight_bit/paged-f8e4m3", 0.9),
        (Flaw::IgnoresStarts, "eight_bit/packed-f8e5m2", 0.9),
        (Flaw::ScaleOff(1.01), "eight_bit/f8e4m3-scales", 0.9),
    ] {
        is_out_of_bounds(flaw, filter, Pass::Forward, share);
    }
    fails_in(
        Flaw::KeepsLengths,
        "eight_bit/paged",
        &DType::FLOATS,
        &[Pass::Forward],
        "made after one with other numbers",
    );
}

/// A backend without 8-bit keys and values is skipped with the feature, also where it declares everything
/// else that there is.
#[test]
fn undeclared_8_bits_are_skipped_by_name() {
    let mut naive = Naive::new(Flaw::None);
    naive.capabilities.forward = PassCapabilities::new(FeatureSet::all());
    let suite = Suite::with_cases(attention_conformance::cases::of_eight_bits());
    assert_eq!(suite.list().len(), DType::FLOATS.len() * suite.cases().len());
    let report = suite.run(&naive, |_| {});
    assert_eq!(report.totals().skipped, suite.list().len());
    for result in &report.results {
        let Outcome::Skipped { reason } = &result.outcome else { panic!("{result}") };
        assert!(reason.contains("8-bit keys and values"), "{reason}");
    }
}

/// One per cent is far outside the bounds of the wide dtypes.
#[test]
fn one_per_cent_is_out_of_bounds_in_f64_and_f32() {
    for dtype in [DType::F64, DType::F32] {
        for (flaw, pass) in [
            (Flaw::OutputOff(1.01), Pass::Forward),
            (Flaw::ScaleOff(1.01), Pass::Forward),
            (Flaw::GradientOff(1.01), Pass::Backward),
            (Flaw::ScaleOff(1.01), Pass::Backward),
        ] {
            let report = run(flaw, "groups/", &[dtype], &[pass]);
            assert_eq!(report.totals().passed, 0, "{flaw:?} {dtype} {pass}: {}", report.totals());
        }
    }
}

#[test]
fn failures_say_which_elements() {
    let report = run(Flaw::OutputOff(2.0), "groups/n1-k1-t5", &[DType::F32], &[Pass::Forward]);
    let Outcome::Failed { differences, .. } = &report.results[0].outcome else {
        panic!("{}", report.results[0]);
    };
    assert_eq!(differences.len(), 5);

    let first = &differences[0];
    assert!((first.got / first.want - 2.0).abs() < 1e-5 && first.bound < 1e-4, "{first}");
}
