//! Numbers of every magnitude: biases, sinks and slopes up to the end of the accumulator's range, and queries
//! and keys with few bits, so that the logits that they make need no rounding (`docs/numerics.md`, "Large
//! logits").

use attention_core::{DType, Dimensions};
use serde::{Deserialize, Serialize};

use crate::rng::Rng;

/// Which keys of a row have a bias that is far from 0. Each row has a magnitude of its own: the usual
/// constants of additive masks first, then 1 to 9 times every power of ten.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Far {
    /// All keys alike, in three rows of four far below and in the fourth far above.
    Rows,
    /// As `Rows`, with a third of the keys at -inf.
    RowsWithInfinity,
    /// The first three quarters of the keys far below: padding on the left, and whole blocks of keys.
    First,
    /// The last three quarters of the keys far below: padding on the right.
    Last,
    /// All but the last key far below.
    AllButLast,
    /// One key in the middle far above.
    OneAbove,
}

/// The constants that libraries and models write into additive masks; f32 and bf16 have their largest numbers
/// among them.
const USUAL: [f64; 9] =
    [f32::MAX as f64, 1e9, 1e4, 65504.0, 3.389_531_389_251_535_5e38, 1e10, 1e12, 1e20, 1e30];

/// The magnitude of the row of this index, in the range of a bias of `dtype` for logits of `accumulator`.
pub(super) fn magnitude(accumulator: DType, dtype: DType, index: usize) -> f64 {
    const DIGITS: [u32; 9] = [7, 1, 3, 9, 5, 2, 8, 4, 6];
    let decades = if accumulator == DType::F64 { 309 } else { 39 };
    let most = largest(accumulator).min(largest(dtype));
    let usual = if accumulator == DType::F64 && index == 0 { f64::MAX } else { USUAL[index % USUAL.len()] };
    let Some(rest) = index.checked_sub(USUAL.len()) else { return usual.min(most) };
    let digit = DIGITS[rest / decades % DIGITS.len()];
    // Parsed, because powers of ten beyond 10^22 are not exact products.
    let number = format!("{digit}e{}", rest % decades).parse::<f64>().expect("a number");
    number.min(most)
}

fn largest(dtype: DType) -> f64 {
    match dtype {
        DType::F64 => f64::MAX,
        DType::F16 => 65504.0,
        DType::Bf16 => USUAL[4],
        _ => f64::from(f32::MAX),
    }
}

impl Far {
    /// The bias of key `j` of `keys` in the row of this index, of this magnitude.
    pub(super) fn bias(self, index: usize, j: usize, keys: usize, magnitude: f64) -> f64 {
        let below = |is_far: bool| if is_far { -magnitude } else { 0.0 };
        match self {
            Far::RowsWithInfinity if j % 3 == 1 => f64::NEG_INFINITY,
            Far::Rows | Far::RowsWithInfinity => sign(index) * rows_magnitude(index, magnitude),
            Far::First => below(4 * j < 3 * keys && j + 1 < keys),
            Far::Last => below(4 * j >= keys && j > 0),
            Far::AllButLast => below(j + 1 < keys),
            Far::OneAbove if j == middle(keys) => magnitude,
            Far::OneAbove => 0.0,
        }
    }
}

fn sign(index: usize) -> f64 {
    if index % 4 == 3 { 1.0 } else { -1.0 }
}

/// Every second row has few bits, so that logits beside it can be other multiples of the same power of two.
fn rows_magnitude(index: usize, magnitude: f64) -> f64 {
    if index.is_multiple_of(2) { magnitude } else { with_bits(magnitude, 16) }
}

/// The key that is far above; its elements are 0, so that its logit is its bias.
pub(super) fn middle(keys: usize) -> usize {
    keys / 2
}

/// A sink of head `n` of this magnitude: far below, far above, or the bias of a row of `Far::Rows` with that
/// index.
pub(super) fn sink(index: usize, magnitude: f64) -> f64 {
    match index % 3 {
        0 => -magnitude,
        1 => magnitude,
        _ => sign(index) * rows_magnitude(index, magnitude),
    }
}

/// An ALiBi slope of this magnitude: with few bits, and small enough for any distance that a case has.
pub(super) fn slope(index: usize, magnitude: f64, accumulator: DType, dtype: DType) -> f64 {
    let most = largest(dtype).min(largest(accumulator) / 4096.0);
    sign(index) * with_bits(magnitude.min(most), 8)
}

/// The number of at most this many bits below a positive one.
fn with_bits(x: f64, bits: i32) -> f64 {
    let unit = 2f64.powi(exponent(x) + 1 - bits);
    (x / unit).floor() * unit
}

/// The exponent of the power of two below a positive normal number.
fn exponent(x: f64) -> i32 {
    (x.to_bits() >> 52) as i32 - 1023
}

/// Which power of two the whole numbers of a query row are multiplied by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Grid {
    /// Two to these; 0 where the dtype has no such numbers.
    Powers {
        /// For queries.
        query: i32,
        /// For keys.
        key: i32,
    },
    /// One that makes logits differ by few units in the last of 16 bits of the row's `Far::Rows` bias; 0 in
    /// every second row, which has a bias with all its bits, and where the dtype has no such numbers.
    OfTheBias,
    /// Another in each row, up to the largest logits that the accumulator has; the numbers times 1 to 9.
    UpToTheEnd,
    /// One element of a row is two to this, in keys with either sign or 0: products that saturate a softcap.
    Signs(i32),
}

/// What decides about the elements of a query row.
pub(super) struct QueryRow {
    /// Of the row, among all.
    pub(super) index: usize,
    /// Of its bias.
    pub(super) magnitude: f64,
    pub(super) dtype: DType,
    pub(super) scale: f64,
}

/// Whole numbers of at most 3; logits of 16 products of two of them, and of 64, have few bits.
pub(super) fn whole(rng: &mut Rng) -> f64 {
    rng.below(7) as f64 - 3.0
}

impl Grid {
    /// An element of a query row.
    pub(super) fn query(self, row: &QueryRow, dim: usize, rng: &mut Rng) -> f64 {
        let whole = whole(rng);
        let accumulator = row.dtype.accumulator();
        let (least, most) = exponents(row.dtype);
        let factor = match self {
            Grid::Powers { query, .. } => Some(query).filter(|exponent| (least..=most).contains(exponent)),
            Grid::OfTheBias => {
                let beside = row.magnitude < largest(accumulator) / 2.0 && row.index % 2 == 1;
                let unit = exponent(row.magnitude) - 15 - exponent(row.scale.abs());
                Some(unit).filter(|unit| beside && (least..=most).contains(unit))
            }
            Grid::UpToTheEnd => {
                // Sums of up to 64 products of 27 and 3, and of keys' own powers of two.
                let end = if accumulator == DType::F64 { 1023 } else { 127 } - 13 - key_exponent(row.dtype);
                let end = (end - exponent(row.scale.abs()).max(0)).min(most);
                let exponent = (row.index * 37 % (end + 7) as usize) as i32 - 6;
                return (1 + row.index % 9) as f64 * whole * 2f64.powi(exponent);
            }
            Grid::Signs(exponent) => return if dim == 0 { 2f64.powi(exponent) } else { 0.0 },
        };
        factor.map_or(0.0, |exponent| whole * 2f64.powi(exponent))
    }

    /// An element of key `j`.
    pub(super) fn key(self, dtype: DType, j: usize, keys: usize, dim: usize, rng: &mut Rng) -> f64 {
        let whole = whole(rng);
        match self {
            Grid::Signs(exponent) => {
                if dim == 0 {
                    [1.0, -1.0, 0.0][j % 3] * 2f64.powi(exponent)
                } else {
                    0.0
                }
            }
            Grid::UpToTheEnd => whole * 2f64.powi(key_exponent(dtype)),
            Grid::Powers { .. } if j == middle(keys) => 0.0,
            Grid::Powers { key, .. } if (exponents(dtype).0..=exponents(dtype).1).contains(&key) => {
                whole * 2f64.powi(key)
            }
            Grid::Powers { .. } => 0.0,
            Grid::OfTheBias => whole,
        }
    }
}

/// Keys of f16 are as large as they can be, because its queries are small.
fn key_exponent(dtype: DType) -> i32 {
    if dtype == DType::F16 { 13 } else { 0 }
}

/// The exponents of powers of two that whole numbers up to 27 can be multiplied by.
fn exponents(dtype: DType) -> (i32, i32) {
    match dtype {
        DType::F64 => (-1022, 1018),
        DType::F16 => (-14, 10),
        _ => (-126, 122),
    }
}

/// The index of a query row: of `[B, N, T]`, as the rows of a bias with all axes are counted.
pub(super) fn row_index(d: &Dimensions, [b, t, n]: [usize; 3]) -> usize {
    (b * d.query_heads + n) * d.query_length + t
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn rows_have_every_digit_and_power_of_ten() {
        let of = |count, accumulator| -> BTreeSet<u64> {
            (0..count).map(|index| magnitude(accumulator, accumulator, index).to_bits()).collect()
        };
        let f32s = of(9 + 9 * 39, DType::F32);
        for decade in 0..38 {
            for digit in 1..=9 {
                let number: f64 = format!("{digit}e{decade}").parse().unwrap();
                assert!(f32s.contains(&number.to_bits()), "{number:e}");
            }
        }
        assert!(f32s.contains(&f64::from(f32::MAX).to_bits()));
        let f64s = of(9 + 309, DType::F64);
        assert!(f64s.contains(&f64::MAX.to_bits()) && f64s.contains(&7e307f64.to_bits()));
        assert_eq!(magnitude(DType::F32, DType::F16, 1), 65504.0);
    }

    #[test]
    fn few_bits_are_those_in_front() {
        assert_eq!(with_bits(1e9, 16), 999_997_440.0);
        assert_eq!(with_bits(7.0, 16), 7.0);
        assert_eq!(with_bits(f64::MAX, 8), 255.0 * 2f64.powi(1016));
    }
}
