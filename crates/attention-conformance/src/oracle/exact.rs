//! Which logits an accumulator computes without any rounding.
//!
//! A bound on the error of `exp(x)` grows with the rounding of `x`, and says nothing where that is above one:
//! a logit of 1e9 has an ulp of 64 in f32. So the largest logits of the suite are made of numbers on a grid,
//! whole multiples of a power of two with few bits, of which every product and sum is exact in whichever
//! order it is computed.

use attention_core::{CallProblem, DType};

/// How many bits an element of a query or key may have: as many as bf16, so that it is also its own only part
/// where operands are split into parts of 8 or 11 bits.
const BITS: i32 = 8;
/// From where on the hyperbolic tangent of a quotient is 1 in every precision.
const SATURATED: f64 = 32.0;

/// The largest power of two that some numbers are all multiples of, as an exponent; `None` if all are 0.
#[derive(Clone, Copy, Debug)]
pub(super) struct Grid {
    lowest: Option<i32>,
    largest: f64,
    /// All finite, and none with more than [`BITS`] bits from the grid's own on.
    coarse: bool,
}

impl Grid {
    pub(super) fn of(numbers: &[f64]) -> Self {
        let lowest = numbers.iter().filter_map(|&x| lowest_bit(x)).min();
        let largest = numbers.iter().fold(0.0, |largest: f64, x| largest.max(x.abs()));
        let finite = numbers.iter().all(|x| x.is_finite());
        let coarse = finite && lowest.is_none_or(|lowest| largest <= power_of_two(lowest + BITS));
        Self { lowest, largest, coarse }
    }
}

/// The dtype that logits are computed in.
pub(super) struct Accumulator {
    /// Of a significand.
    bits: i32,
    /// The exponent of the smallest normal number.
    least: i32,
    /// The largest number.
    most: f64,
    scale: f64,
    softcap: Option<f64>,
}

impl Accumulator {
    pub(super) fn new(problem: &CallProblem<'_>) -> Self {
        let (bits, least, most) = match problem.dtype().accumulator() {
            DType::F64 => (53, -1022, f64::MAX),
            _ => (24, -126, f64::from(f32::MAX)),
        };
        Self { bits, least, most, scale: problem.scale(), softcap: problem.softcap() }
    }

    /// Whether `softcap(scale * <q, k>) - alibi + bias` is exact in every order of its operations.
    /// `magnitude` is `sum |q| |k|`, and `product` what is capped.
    pub(super) fn computes_exactly(
        &self,
        [query, key]: [&Grid; 2],
        magnitude: f64,
        product: f64,
        [alibi, bias]: [f64; 2],
    ) -> bool {
        let mut terms = Terms::default();
        if magnitude != 0.0 && self.scale != 0.0 {
            // A NaN or an infinity ends here too.
            let (Some(of_query), Some(of_key), Some(of_scale)) =
                (query.lowest, key.lowest, lowest_bit(self.scale))
            else {
                return false;
            };
            let scale = self.scale.abs();
            let steps = [
                Terms { lowest: Some(of_query + of_key), total: magnitude },
                Terms { lowest: Some(of_query + of_scale), total: query.largest * scale },
                Terms { lowest: Some(of_query + of_key + of_scale), total: magnitude * scale },
            ];
            if !(query.coarse && key.coarse && steps.iter().all(|step| self.holds(step))) {
                return false;
            }
            match self.softcap {
                None => terms = steps[2],
                Some(_) if product == 0.0 => {}
                Some(cap) if product.abs() >= SATURATED * cap => terms.add(lowest_bit(cap), cap),
                Some(_) => return false,
            }
        }
        terms.add(lowest_bit(alibi), alibi.abs());
        terms.add(lowest_bit(bias), bias.abs());
        self.holds(&terms)
    }

    /// Whether every sum of some of the terms is a number of this dtype.
    fn holds(&self, terms: &Terms) -> bool {
        let Some(lowest) = terms.lowest else { return terms.total == 0.0 };
        lowest >= self.least && terms.total <= power_of_two(lowest + self.bits) && terms.total <= self.most
    }
}

/// Numbers that are multiples of a power of two, and the sum of their absolute values.
#[derive(Clone, Copy, Default)]
struct Terms {
    lowest: Option<i32>,
    total: f64,
}

impl Terms {
    fn add(&mut self, lowest: Option<i32>, size: f64) {
        self.lowest = self.lowest.into_iter().chain(lowest).min();
        self.total += size;
    }
}

/// The exponent of the lowest bit that is set; `None` for 0 and for what is not finite.
fn lowest_bit(x: f64) -> Option<i32> {
    const FRACTION: u32 = f64::MANTISSA_DIGITS - 1;
    if x == 0.0 || !x.is_finite() {
        return None;
    }
    let bits = x.to_bits();
    let (exponent, fraction) = ((bits >> FRACTION & 0x7FF) as i32, bits & ((1 << FRACTION) - 1));
    let significand = if exponent == 0 { fraction } else { fraction | 1 << FRACTION };
    Some(exponent.max(1) - 1075 + significand.trailing_zeros() as i32)
}

/// Infinite where f64 ends.
fn power_of_two(exponent: i32) -> f64 {
    2f64.powi(exponent)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lowest_bits_by_hand() {
        assert_eq!(lowest_bit(1.0), Some(0));
        assert_eq!(lowest_bit(-12.0), Some(2));
        assert_eq!(lowest_bit(0.375), Some(-3));
        assert_eq!(lowest_bit(f64::from(f32::MAX)), Some(104));
        assert_eq!(lowest_bit(f64::from_bits(4)), Some(-1072));
        assert_eq!((lowest_bit(0.0), lowest_bit(f64::NAN)), (None, None));
    }

    #[test]
    fn sums_are_exact_up_to_the_bits_of_the_accumulator() {
        let f32s =
            Accumulator { bits: 24, least: -126, most: f64::from(f32::MAX), scale: 0.25, softcap: None };
        let exact = |query: &[f64], key: &[f64], bias: f64| {
            let magnitude = query.iter().zip(key).map(|(q, k)| (q * k).abs()).sum();
            let product = 0.25 * query.iter().zip(key).map(|(q, k)| q * k).sum::<f64>();
            f32s.computes_exactly([&Grid::of(query), &Grid::of(key)], magnitude, product, [0.0, bias])
        };
        assert!(exact(&[3.0, -1.0], &[2.0, 2.0], 0.0));
        assert!(exact(&[4.0, -8.0], &[1.0, 2.0], 1e7));
        // 1e9 + 1 needs 30 bits, 1e9 alone needs 21.
        assert!(!exact(&[4.0, 0.0], &[1.0, 2.0], 1e9));
        assert!(exact(&[0.0, 0.0], &[1.0, 2.0], 1e9) && exact(&[0.0, 0.0], &[0.1, 0.7], f64::from(f32::MIN)));
        assert!(!exact(&[0.1, 0.7], &[1.0, 2.0], 0.0), "more bits than the parts of an operand");
        assert!(!exact(&[4.0, 0.0], &[1.0, 2.0], f64::NAN) && !exact(&[0.0], &[f64::NAN], 0.0));
        assert!(!exact(&[2f64.powi(127)], &[4.0], 0.0), "overflows before the scale is there");
    }
}
