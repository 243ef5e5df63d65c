//! Slopes of ALiBi for any number of heads.

/// The slopes of Press, Smith and Lewis, "Train Short, Test Long" (arXiv 2108.12409), for any number of
/// heads.
///
/// For a power of two, head `n` has `2^(-8 (n + 1) / heads)`. For any other number, the first `m` heads have
/// the slopes of `m` heads, `m` being the largest power of two below, and the others every second slope of `2
/// m` heads, beginning with the steepest, as the authors' program does. MPT, BLOOM and llama.cpp use the same
/// slopes.
///
/// # Examples
/// ```
/// use attention_core::conventions::alibi_slopes;
///
/// assert_eq!(alibi_slopes(4), [0.25, 0.0625, 0.015625, 0.00390625]);
/// // The slopes of 2 heads, then the first of 4.
/// assert_eq!(alibi_slopes(3), [0.0625, 0.00390625, 0.25]);
/// ```
pub fn alibi_slopes(heads: usize) -> Vec<f64> {
    if heads == 0 {
        return Vec::new();
    }
    let lower = 1 << heads.ilog2();
    let first = (1..=lower).map(|n| slope(n, lower, 8.0));
    // Half steps between the slopes of `lower` heads: 1/2, 3/2, 5/2 and so on.
    let others = (0..heads - lower).map(|n| 2f64.powf(-8.0 * (n as f64 + 0.5) / lower as f64));
    first.chain(others).collect()
}

/// The slopes that candle-nn 0.11's `flash_attn` on the CPU makes of its argument `max_bias`: head `n` has
/// `2^(-max_bias (n + 1) / m)`, `m` being the smallest power of two that is not below the number of heads.
///
/// For a power of two and a `max_bias` of 8 they are those of [`alibi_slopes`], for any other number of heads
/// they are not. None for a `max_bias` of 0 or below, which adds nothing there.
///
/// # Examples
/// ```
/// use attention_core::conventions::candle_alibi_slopes;
///
/// assert_eq!(candle_alibi_slopes(3, 8.0), [0.25, 0.0625, 0.015625]);
/// ```
pub fn candle_alibi_slopes(heads: usize, max_bias: f64) -> Vec<f64> {
    if max_bias <= 0.0 {
        return vec![0.0; heads];
    }
    let steps = heads.checked_next_power_of_two().unwrap_or(heads);
    (1..=heads).map(|n| slope(n, steps, max_bias)).collect()
}

fn slope(step: usize, steps: usize, max_bias: f64) -> f64 {
    2f64.powf(-max_bias * step as f64 / steps as f64)
}
