//! Powers of two and hyperbolic tangents, for whole vectors: no branch, no table.

use super::Simd;
use crate::float::Float;

/// `1 + r (c[0] + c[1] r + ...)`.
#[inline(always)]
fn polynomial<F: Float, S: Simd<F>>(simd: S, r: S::V, coefficients: &'static [F]) -> S::V {
    let mut p = simd.splat(coefficients[coefficients.len() - 1]);
    let mut index = coefficients.len() - 1;
    while index > 0 {
        index -= 1;
        p = simd.fma(p, r, simd.splat(coefficients[index]));
    }
    simd.fma(p, r, simd.splat(F::ONE))
}

/// `2^x`, to within 1.5 units in the last place; exactly 1 at 0, 0 at negative infinity; NaN stays NaN.
///
/// With `NOT_POSITIVE`, for numbers up to 0 alone, a softmax's; NaN is allowed there too.
#[inline(always)]
pub(crate) fn exp2<F: Float, S: Simd<F>, const NOT_POSITIVE: bool>(simd: S, x: S::V) -> S::V {
    // A NaN is the second argument, which survives.
    let mut x = simd.max(simd.splat(F::EXPONENTS[0]), x);
    if !NOT_POSITIVE {
        x = simd.min(simd.splat(F::EXPONENTS[1]), x);
    }
    let k = simd.round(x);
    // Exact: the two are within a factor of two, or k is 0.
    let r = simd.sub(x, k);
    simd.times_power_of_two(polynomial(simd, r, F::EXP2), k)
}

/// The hyperbolic tangent, to within 2.5 units in the last place: a rational function near 0, exponentials
/// elsewhere (Cephes).
#[inline(always)]
pub(crate) fn tanh<F: Float, S: Simd<F>>(simd: S, x: S::V) -> S::V {
    #[inline(always)]
    fn horner<F: Float, S: Simd<F>>(simd: S, z: S::V, coefficients: &'static [F]) -> S::V {
        let mut p = simd.splat(coefficients[0]);
        let mut index = 1;
        while index < coefficients.len() {
            p = simd.fma(p, z, simd.splat(coefficients[index]));
            index += 1;
        }
        p
    }
    let (one, two) = (simd.splat(F::ONE), simd.splat(F::ONE + F::ONE));
    let y = simd.abs(x);
    let z = simd.mul(x, x);
    let mut p = horner(simd, z, F::TANH_P);
    if !F::TANH_Q.is_empty() {
        p = simd.div(p, horner(simd, z, F::TANH_Q));
    }
    let small = simd.fma(simd.mul(p, z), x, x);
    let power = exp2::<F, S, false>(simd, simd.mul(y, simd.splat((F::ONE + F::ONE) * F::LOG2_E)));
    let large = simd.sub(one, simd.div(two, simd.add(power, one)));
    let is_small = simd.less(y, simd.splat(F::from_f64(0.625)));
    simd.select(is_small, small, simd.copysign(large, x))
}
