//! Powers of two and hyperbolic tangents, for whole vectors: no branch, no table.

use super::Simd;
use crate::float::Float;

/// `2^x` of several vectors, to within 3 units in the last place (1.5 where the level has no table); exactly 1 at 0; 0 below the smallest normal number
/// and at negative infinity; infinite from 128 on (1024 in f64); NaN stays NaN.
///
/// Results that would be subnormal are 0, since processors take a hundred times as long for products with them, and
/// weights that small are nothing beside the largest. The steps are taken for all vectors together, so that the
/// processor finds independent operations side by side.
///
/// With `BOUNDED` for numbers below 128 alone, NaN included; for others the result is any number.
#[inline(always)]
pub(crate) fn exp2<F: Float, S: Simd<F>, const BOUNDED: bool, const COUNT: usize>(
    simd: S,
    mut x: [S::V; COUNT],
) -> [S::V; COUNT] {
    if !BOUNDED {
        // A NaN is the second argument, which survives.
        for x in &mut x {
            *x = simd.min(simd.splat(F::EXPONENTS[1]), *x);
        }
    }
    simd.exp2(x)
}

/// [`exp2`] of numbers up to [`Float::EXPONENTS`], from a polynomial alone.
#[inline(always)]
pub(super) fn exp2_by_polynomial<F: Float, S: Simd<F>, const COUNT: usize>(
    simd: S,
    x: [S::V; COUNT],
) -> [S::V; COUNT] {
    let mut k = x;
    for k in &mut k {
        *k = simd.round(*k);
    }
    let mut r = x;
    for (r, &k) in r.iter_mut().zip(&k) {
        // Exact: the two are within a factor of two, or k is 0.
        *r = simd.sub(*r, k);
    }
    // 1 + r (c[0] + c[1] r + ...)
    let coefficients = F::EXP2;
    let mut p = [simd.splat(coefficients[coefficients.len() - 1]); COUNT];
    let mut index = coefficients.len() - 1;
    while index > 0 {
        index -= 1;
        for (p, &r) in p.iter_mut().zip(&r) {
            *p = simd.fma(*p, r, simd.splat(coefficients[index]));
        }
    }
    for (p, &r) in p.iter_mut().zip(&r) {
        *p = simd.fma(*p, r, simd.splat(F::ONE));
    }
    for ((p, &k), &x) in p.iter_mut().zip(&k).zip(&x) {
        let nothing = simd.less(x, simd.splat(F::EXPONENTS[0]));
        *p = simd.select(nothing, simd.splat(F::ZERO), simd.times_power_of_two(*p, k));
    }
    p
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
    let [power] = exp2::<F, S, false, 1>(simd, [simd.mul(y, simd.splat((F::ONE + F::ONE) * F::LOG2_E))]);
    let large = simd.sub(one, simd.div(two, simd.add(power, one)));
    let is_small = simd.less(y, simd.splat(F::from_f64(0.625)));
    simd.select(is_small, small, simd.copysign(large, x))
}
