use half::{bf16, f16};

use super::*;
use crate::Window;

/// The program of the paper's authors, as published: slopes of a power of two, and by recursion of any
/// number.
fn published(heads: usize) -> Vec<f64> {
    let of_power = |heads: usize| {
        let start = 2f64.powf(-(2f64.powf(-((heads as f64).log2() - 3.0))));
        (0..heads).map(|n| start * start.powi(n as i32)).collect::<Vec<_>>()
    };
    if heads.is_power_of_two() {
        return of_power(heads);
    }
    let closest = 1 << heads.ilog2();
    let others = published(2 * closest).into_iter().step_by(2).take(heads - closest);
    of_power(closest).into_iter().chain(others).collect()
}

#[test]
fn slopes_are_those_of_the_published_program() {
    assert_eq!(alibi_slopes(0), Vec::<f64>::new());
    for heads in 1..200 {
        let (slopes, expected) = (alibi_slopes(heads), published(heads));
        assert_eq!(slopes.len(), heads);
        for (slope, expected) in slopes.iter().zip(&expected) {
            assert!((slope - expected).abs() < 1e-13 * expected, "{heads} heads: {slope}, {expected}");
        }
    }
}

#[test]
fn slopes_of_candle_are_the_papers_for_powers_of_two_only() {
    for heads in 1..100 {
        let same = candle_alibi_slopes(heads, 8.0) == alibi_slopes(heads);
        assert_eq!(same, heads.is_power_of_two(), "{heads} heads");
    }
    // `2.0f32.powf(-max_bias * ((h + 1) as f32) / n2 as f32)` with n2 = 8 of 6 heads.
    let expected = [0.5, 0.25, 0.125, 0.0625, 0.03125, 0.015625];
    assert_eq!(candle_alibi_slopes(6, 8.0), expected);
    assert_eq!(candle_alibi_slopes(3, 0.0), [0.0; 3]);
    assert_eq!(candle_alibi_slopes(0, 8.0), Vec::<f64>::new());
}

#[test]
fn lengths_are_last_positions_and_one() {
    assert_eq!(lengths_of_last_positions(&[-1, 0, i32::MAX]), Ok(vec![0, 1, 1 << 31]));
    let error = lengths_of_last_positions(&[4, -2]).unwrap_err();
    assert_eq!(error.to_string(), "the last key of batch row 1 is -2, expected -1 (no key) or more");
}

#[test]
fn windows_count_their_sides_or_all_of_their_keys() {
    assert_eq!(window_of_sides(-1, -1), Ok(Window::UNBOUNDED));
    assert_eq!(window_of_sides(0, 3), Ok(Window::new(0, 3)));
    assert_eq!(window_of_width(1), Ok(Window::new(0, 0)));
    assert_eq!(window_of_width(-1), window_of_sides(-1, 0));
    for (error, text) in [
        (window_of_sides(-2, 0), "the left side of the window is -2, expected -1 (no bound) or more"),
        (window_of_sides(0, -7), "the right side of the window is -7, expected -1 (no bound) or more"),
        (
            window_of_width(0),
            "the window is 0 keys wide, expected -1 (no bound) or at least 1, the row's own position",
        ),
        (
            window_of_width(-2),
            "the window is -2 keys wide, expected -1 (no bound) or at least 1, the row's own position",
        ),
    ] {
        assert_eq!(error.unwrap_err().to_string(), text);
    }
}

#[test]
fn additive_masks_are_read_in_every_dtype() {
    let expected = Ok(vec![true, true, false, false]);
    let of = bool_where_above_half_minimum::<f64>;
    assert_eq!(of(&[0.0, -0.0, f64::MIN, f64::NEG_INFINITY]), expected);
    let of = bool_where_above_half_minimum::<f32>;
    assert_eq!(of(&[0.0, -0.0, f32::MIN, f32::NEG_INFINITY]), expected);
    let of = bool_where_above_half_minimum::<f16>;
    assert_eq!(of(&[f16::ZERO, f16::NEG_ZERO, f16::MIN, f16::NEG_INFINITY]), expected);
    let of = bool_where_above_half_minimum::<bf16>;
    assert_eq!(of(&[bf16::ZERO, bf16::NEG_ZERO, bf16::MIN, bf16::NEG_INFINITY]), expected);
    assert_eq!(bool_where_above(&[0.0f32, -65504.0, f32::MIN], -3e4), Ok(vec![true, false, false]));
}

#[test]
fn what_is_a_bias_is_no_mask() {
    for (mask, index) in [([0.0, -3.5], 1), ([f32::NAN, 0.0], 0), ([f32::MIN, 1.0], 1), ([-65504.0, 0.0], 0)]
    {
        let error = bool_where_above_half_minimum(&mask).unwrap_err();
        assert!(matches!(error, ConventionError::NotAMask { index: i, .. } if i == index), "{error}");
    }
    assert_eq!(
        bool_where_above(&[0.0f32, -3.5], -1e4).unwrap_err().to_string(),
        "entry 1 of the additive mask is -3.5, neither 0 nor at most -10000: pass such a mask as a bias"
    );
    for threshold in [0.0, 1.0, f64::NAN] {
        let error = bool_where_above(&[0.0f32], threshold).unwrap_err().to_string();
        let expected = format!("the threshold of an additive mask is {threshold}, expected a number below 0");
        assert_eq!(error, expected);
    }
}
