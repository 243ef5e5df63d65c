//! How far a result may be from the oracle's: bounds that are derived, element by element.
//!
//! `docs/numerics.md` has the derivation; the constants are those of [`Precision`] and of the table in this
//! file. The shape of every bound is `c * eps * (the sum, with absolute values)`, plus what the errors of the
//! logits and of the saved tensors do to it.

mod backward;
mod forward;

pub use backward::{BackwardBounds, SavedErrors};
pub use forward::ForwardBounds;

use attention_core::{DType, NumericsClass};

/// The constants of the bounds, the same for every precision; each counts roundings.
///
/// | constant | roundings | of what |
/// |---|---|---|
/// | `PRODUCT` | 4 | a logit's product, beside the `H` of its sum: the scale's rounding, its multiplication (before or after), the store |
/// | `CAP` | 4 | softcap: the division, the hyperbolic tangent (also one made of exponentials, whose error is absolute), the multiplication |
/// | `ADDED` | 4 | ALiBi and bias: the conversion, the product, two additions |
/// | `ARGUMENT` | 3 | the argument of the exponential: the subtraction of the maximum or logsumexp, the change to base two |
/// | `EXPONENTIAL` | 8 | the exponential itself: 4 units in the last place |
/// | `SUM` | 6 | every sum of products, beside one rounding a term: the products themselves, a rescaling, the final division |
///
/// `NEAR` and `STORED` are sizes of logits: up to them, what grows with a logit may stand in place of what
/// does not.
pub mod constants {
    /// See the table in [`constants`](self).
    pub const PRODUCT: f64 = 4.0;
    /// See the table in [`constants`](self).
    pub const CAP: f64 = 4.0;
    /// See the table in [`constants`](self).
    pub const ADDED: f64 = 4.0;
    /// See the table in [`constants`](self).
    pub const ARGUMENT: f64 = 3.0;
    /// See the table in [`constants`](self).
    pub const EXPONENTIAL: f64 = 8.0;
    /// See the table in [`constants`](self).
    pub const SUM: f64 = 6.0;
    /// Up to which size of two logits their difference may be rounded in units of them rather than of the
    /// difference.
    pub const NEAR: f64 = 128.0;
    /// Up to which size a logsumexp that was stored may be used whatever its rounding does to probabilities,
    /// for operands that are no halves and for halves.
    pub const STORED: (f64, f64) = (128.0, 1024.0);
}

/// The roundings of a numerics class.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Precision {
    /// The unit roundoff of logits, softmax and sums.
    pub accumulator: f64,
    /// The unit roundoff of the factors of the products with queries, keys and values: 0 where they are
    /// exact.
    pub factor: f64,
    /// The unit roundoff with which logits are rounded before the softmax: 0 where they are not.
    pub logit: f64,
    /// The unit roundoff with which probabilities, and the gradients of the logits, may be rounded before
    /// they are multiplied: 0 where they stay in the accumulator's precision.
    pub weight: f64,
    /// The absolute error of that rounding where it underflows.
    pub weight_underflow: f64,
    /// The absolute error of a probability that underflows in the accumulator.
    pub underflow: f64,
    /// Whether results are rounded to their dtypes.
    pub rounds_results: bool,
}

/// Half of the distance between 1 and the next number.
pub fn unit_roundoff(dtype: DType) -> f64 {
    match dtype {
        DType::F64 => 2f64.powi(-53),
        DType::F32 => 2f64.powi(-24),
        DType::F16 => 2f64.powi(-11),
        DType::Bf16 => 2f64.powi(-8),
        other => unreachable!("{other} is no dtype of a result"),
    }
}

/// Half of the distance between subnormal numbers, or what is lost where they are flushed to zero. Twice the
/// smallest normal number of f32 stands for f32 and bf16, whose subnormals processors may flush.
pub fn underflow(dtype: DType) -> f64 {
    match dtype {
        DType::F64 => f64::MIN_POSITIVE,
        DType::F16 => 2f64.powi(-25),
        _ => 2.0 * f64::from(f32::MIN_POSITIVE),
    }
}

impl Precision {
    /// The precision of operands of `dtype` in a numerics class.
    pub fn new(dtype: DType, class: NumericsClass) -> Self {
        let full = unit_roundoff(dtype.accumulator());
        let exact = Self {
            accumulator: full,
            factor: 0.0,
            logit: 0.0,
            weight: 0.0,
            weight_underflow: underflow(dtype.accumulator()),
            underflow: underflow(dtype.accumulator()),
            rounds_results: true,
        };
        let half = Self { weight: unit_roundoff(dtype), weight_underflow: underflow(dtype), ..exact };
        // tf32 keeps 10 bits behind the leading one.
        let tf32 = 2f64.powi(-11);
        match class {
            NumericsClass::HalfF32 => half,
            NumericsClass::HalfRounded => Self { logit: unit_roundoff(dtype), ..half },
            NumericsClass::Tf32 => Self { factor: tf32, weight: tf32, ..exact },
            _ => exact,
        }
    }

    /// No rounding anywhere: what is left of a bound is what the saved tensors' errors do to it.
    pub const EXACT: Self = Self {
        accumulator: 0.0,
        factor: 0.0,
        logit: 0.0,
        weight: 0.0,
        weight_underflow: 0.0,
        underflow: 0.0,
        rounds_results: false,
    };

    /// The relative error of a sum of `terms` products, in units of the sum of their absolute values.
    fn sum(&self, terms: usize) -> f64 {
        // Each factor of a product may have been rounded.
        (terms as f64 + constants::SUM) * self.accumulator + 2.0 * self.factor
    }

    /// The error of rounding `value` to a result of `dtype`.
    fn rounding(&self, dtype: DType, value: f64) -> f64 {
        if self.rounds_results { unit_roundoff(dtype) * value.abs() + underflow(dtype) } else { 0.0 }
    }
}

/// The error of a probability `p = exp(log_p)` whose exponent is off by at most `error`.
fn probability_error(log_p: f64, p: f64, error: f64) -> f64 {
    if error < 1.0 {
        p * error.exp_m1()
    } else {
        // Where p underflows, or the error is large: p * (e^error - 1) without 0 * infinity. A computed
        // probability is never above 1, nor below 0.
        ((log_p + error).exp().min(1.0) - p).max(p)
    }
}

#[cfg(test)]
mod tests;
