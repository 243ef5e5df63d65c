//! The merge of parts against the softmax of the whole.

mod tensors;

use proptest::prelude::*;

use super::{Accumulator, RunningSoftmax, merge_lse, merge_row};

/// Logsumexp and mean of `values` weighted by the softmax of `logits`, in f64, straight from the formula.
fn whole(logits: &[f64], values: &[f64]) -> (f64, f64) {
    let max = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    if max == f64::NEG_INFINITY {
        return (f64::NEG_INFINITY, 0.0);
    }
    let sum: f64 = logits.iter().map(|x| (x - max).exp()).sum();
    let out = logits.iter().zip(values).map(|(x, v)| (x - max).exp() * v).sum::<f64>() / sum;
    (max + sum.ln(), out)
}

/// The same over one part, in the precision that parts are kept in.
fn part<F: Accumulator>(logits: &[f64], values: &[f64]) -> (F, [F; 1]) {
    let (lse, out) = whole(logits, values);
    (F::from_f64(lse), [F::from_f64(out)])
}

fn statistics<F: Accumulator>(logits: &[f64]) -> RunningSoftmax<F> {
    let mut running = RunningSoftmax::EMPTY;
    running.push(&logits.iter().map(|&x| F::from_f64(x)).collect::<Vec<_>>());
    running
}

/// Logits of which some are -inf, and values.
fn keys() -> impl Strategy<Value = (Vec<f64>, Vec<f64>)> {
    let logit = prop_oneof![4 => -50.0..50.0f64, 1 => Just(f64::NEG_INFINITY), 1 => -1e4..1e4f64];
    proptest::collection::vec((logit, -1.0..1.0f64), 0..24).prop_map(|keys| keys.into_iter().unzip())
}

/// Merges three parts of the keys and compares with the whole. Logsumexps of up to 1e4 are stored with an
/// error of half a unit in the last place, which moves weight between the parts by that much.
fn three_parts_give_the_whole<F: Accumulator>(
    logits: &[f64],
    values: &[f64],
    cuts: (usize, usize),
    epsilon: f64,
) -> Result<(), TestCaseError> {
    let (a, b) = (cuts.0.min(cuts.1).min(logits.len()), cuts.0.max(cuts.1).min(logits.len()));
    let (mut lse, mut out) = part::<F>(&logits[..a], &values[..a]);
    for range in [a..b, b..logits.len()] {
        let (other_lse, other_out) = part::<F>(&logits[range.clone()], &values[range]);
        merge_row(&mut out, &mut lse, &other_out, other_lse);
    }
    let (want_lse, want_out) = whole(logits, values);
    if want_lse == f64::NEG_INFINITY {
        prop_assert_eq!(lse.to_f64(), f64::NEG_INFINITY);
        prop_assert_eq!(out[0].to_f64(), 0.0);
        return Ok(());
    }
    let rounding = epsilon * (want_lse.abs() + 8.0);
    prop_assert!((lse.to_f64() - want_lse).abs() <= 4.0 * rounding, "{} {}", lse.to_f64(), want_lse);
    prop_assert!((out[0].to_f64() - want_out).abs() <= 8.0 * rounding, "{} {}", out[0].to_f64(), want_out);
    Ok(())
}

proptest! {
    #[test]
    fn parts_agree_with_the_whole_in_f64((logits, values) in keys(), cuts in (0usize..24, 0usize..24)) {
        three_parts_give_the_whole::<f64>(&logits, &values, cuts, f64::EPSILON)?;
    }

    #[test]
    fn parts_agree_with_the_whole_in_f32((logits, values) in keys(), cuts in (0usize..24, 0usize..24)) {
        three_parts_give_the_whole::<f32>(&logits, &values, cuts, f64::from(f32::EPSILON))?;
    }

    #[test]
    fn running_statistics_agree_with_the_whole((logits, values) in keys()) {
        let (want, _) = whole(&logits, &values);
        let (narrow, wide) = (statistics::<f32>(&logits).lse(), statistics::<f64>(&logits).lse());
        if want == f64::NEG_INFINITY {
            prop_assert_eq!(narrow, f32::NEG_INFINITY);
            prop_assert_eq!(wide, f64::NEG_INFINITY);
        } else {
            prop_assert!((wide - want).abs() <= 1e-14 * (want.abs() + 8.0), "{wide} {want}");
            prop_assert!((f64::from(narrow) - want).abs() <= 1e-6 * (want.abs() + 8.0), "{narrow} {want}");
        }
    }

    #[test]
    fn merging_commutes_bit_for_bit(a in -100.0..100.0f64, b in -100.0..100.0f64) {
        let (lse, factors) = merge_lse(a, b);
        let (swapped, swapped_factors) = merge_lse(b, a);
        prop_assert_eq!(lse, swapped);
        prop_assert_eq!((factors.old, factors.new), (swapped_factors.new, swapped_factors.old));
        let (mut left, mut right) = (RunningSoftmax::of(a), RunningSoftmax::of(b));
        left.merge(RunningSoftmax::of(b));
        right.merge(RunningSoftmax::of(a));
        prop_assert_eq!(left, right);
    }

    #[test]
    fn merging_associates(x in proptest::array::uniform3(-1e4..1e4f64)) {
        let [a, b, c] = x.map(RunningSoftmax::of);
        let (mut left, mut right) = (a, b);
        left.merge(b);
        left.merge(c);
        right.merge(c);
        let mut whole = a;
        whole.merge(right);
        prop_assert_eq!(left.max, whole.max);
        prop_assert!((left.sum - whole.sum).abs() <= 1e-12 * whole.sum);
        let (left, right) = (merge_lse(merge_lse(x[0], x[1]).0, x[2]).0, merge_lse(x[0], merge_lse(x[1], x[2]).0).0);
        prop_assert!((left - right).abs() <= 1e-11, "{left} {right}");
    }

    #[test]
    fn a_part_without_keys_changes_nothing(lse in -1e4..1e4f32, value in -1e4..1e4f32) {
        let (mut out, mut merged) = ([value], lse);
        merge_row(&mut out, &mut merged, &[0.0], f32::NEG_INFINITY);
        prop_assert_eq!((out, merged), ([value], lse));
        let (mut out, mut merged) = ([0.0], f32::NEG_INFINITY);
        merge_row(&mut out, &mut merged, &[value], lse);
        prop_assert_eq!((out, merged), ([value], lse));
        let mut running = RunningSoftmax::of(lse);
        running.merge(RunningSoftmax::EMPTY);
        prop_assert_eq!(running, RunningSoftmax::of(lse));
        let mut running = RunningSoftmax::EMPTY;
        running.merge(RunningSoftmax::of(lse));
        prop_assert_eq!(running, RunningSoftmax::of(lse));
    }

    /// Whatever the size of the logsumexps, the factors of two parts add up to one.
    #[test]
    fn factors_add_up_to_one(a in -1e4..1e4f32, difference in -20.0..20.0f32) {
        let (_, factors) = merge_lse(a, a + difference);
        prop_assert!((factors.old + factors.new - 1.0).abs() <= 1e-6, "{factors:?}");
    }
}

#[test]
fn empty_parts_stay_empty() {
    let (mut out, mut lse) = ([0.0f32; 2], f32::NEG_INFINITY);
    for _ in 0..3 {
        merge_row(&mut out, &mut lse, &[0.0; 2], f32::NEG_INFINITY);
    }
    assert_eq!((out, lse), ([0.0; 2], f32::NEG_INFINITY));
    let mut running = RunningSoftmax::<f64>::EMPTY;
    running.push(&[f64::NEG_INFINITY; 4]);
    assert_eq!(running, RunningSoftmax::EMPTY);
    assert_eq!(running.lse(), f64::NEG_INFINITY);
}

#[test]
fn rescaling_factors_carry_a_value_along() {
    // The value of a part is sum of exp(x - max) v.
    let (x, v) = ([2.0f64, 5.0], [3.0, -1.0]);
    let mut running = RunningSoftmax::of(x[0]);
    let rescale = running.merge(RunningSoftmax::of(x[1]));
    let value = v[0] * rescale.old + v[1] * rescale.new;
    let (_, want) = whole(&x, &v);
    assert!((value / running.sum - want).abs() < 1e-15);
}

/// A sink is a logit without a value; one part carries it, and it does not matter which.
#[test]
fn a_sink_in_exactly_one_part_gives_the_whole() {
    let (logits, values, sink) = ([0.5, -1.0, 2.0, 1.5], [1.0, 2.0, 3.0, 4.0], 1.25);
    let with_sink = |logits: &[f64], values: &[f64]| {
        let (logits, values) = ([logits, &[sink]].concat(), [values, &[0.0]].concat());
        part::<f64>(&logits, &values)
    };
    let (want_lse, want_out) = with_sink(&logits, &values);
    for carrier in [0, 1] {
        let parts: Vec<_> = [0..2, 2..4]
            .into_iter()
            .enumerate()
            .map(|(index, range)| {
                let (logits, values) = (&logits[range.clone()], &values[range]);
                if index == carrier { with_sink(logits, values) } else { part::<f64>(logits, values) }
            })
            .collect();
        let (mut lse, mut out) = parts[0];
        merge_row(&mut out, &mut lse, &parts[1].1, parts[1].0);
        assert!((lse - want_lse).abs() < 1e-14 && (out[0] - want_out[0]).abs() < 1e-14);
    }
    // A part of nothing but the sink: output 0, logsumexp the sink itself.
    assert_eq!(with_sink(&[], &[]), (sink, [0.0]));
}

#[test]
fn large_logits_do_not_overflow() {
    let (mut out, mut lse) = ([1.0f32], 1e4);
    merge_row(&mut out, &mut lse, &[3.0], 1e4);
    assert!((out[0] - 2.0).abs() <= 2.0 * f32::EPSILON, "{out:?}");
    assert!((lse - (1e4 + std::f32::consts::LN_2)).abs() < 1e-3, "{lse}");
    // Far apart, the smaller part vanishes.
    let (mut out, mut lse) = ([1.0f32], 1e4);
    merge_row(&mut out, &mut lse, &[3.0], -1e4);
    assert_eq!((out, lse), ([1.0], 1e4));
    let (mut out, mut lse) = ([1.0f32], f32::MIN);
    merge_row(&mut out, &mut lse, &[3.0], f32::MAX);
    assert_eq!((out, lse), ([3.0], f32::MAX));
}

/// A NaN or +inf among the logits reaches the result, wherever it stands and whatever joins later.
#[test]
fn what_is_not_finite_propagates() {
    for bad in [f64::NAN, f64::INFINITY] {
        for others in [&[][..], &[1.0], &[f64::NEG_INFINITY], &[f64::NEG_INFINITY, 2.0]] {
            for place in 0..=others.len() {
                let mut logits = others.to_vec();
                logits.insert(place, bad);
                let lse = statistics::<f64>(&logits).lse();
                assert!(lse.is_nan() || lse == f64::INFINITY, "{logits:?} gave {lse}");

                let (mut out, mut lse) = ([0.0], f64::NEG_INFINITY);
                for &logit in &logits {
                    let value = if logit == f64::NEG_INFINITY { 0.0 } else { 1.0 };
                    merge_row(&mut out, &mut lse, &[value], logit);
                }
                assert!(lse.is_nan() || lse == f64::INFINITY, "{logits:?} gave {lse}");
                assert!(out[0].is_nan(), "{logits:?} gave {out:?}");
            }
        }
    }
}

#[test]
#[should_panic(expected = "rows of one head have one length")]
fn rows_of_different_length_panic_as_documented() {
    merge_row(&mut [0.0f32; 2], &mut 0.0, &[0.0; 3], 0.0);
}
