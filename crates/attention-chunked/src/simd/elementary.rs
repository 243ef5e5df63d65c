//! Powers of two and hyperbolic tangents, for whole vectors: no branch, no table.

use super::{Base, Simd};
use crate::float::Float;

/// `2^(log2 x)` of several vectors, to within 3 units in the last place (1.5 where the level has no table) of
/// that of the product, which is not rounded where the level has fused operations; exactly 1 at 0; 0 below
/// the smallest normal number and at negative infinity; NaN stays NaN. From 128 on (1024 in f64) the result
/// is any number.
///
/// Results that would be subnormal are 0, since processors take a hundred times as long for products with
/// them, and weights that small are nothing beside the largest. The steps are taken for all vectors together,
/// so that the processor finds independent operations side by side.
#[inline(always)]
pub(crate) fn power<F: Float, S: Simd<F>, const COUNT: usize>(
    simd: S,
    base: Base<F>,
    x: [S::V; COUNT],
) -> [S::V; COUNT] {
    simd.power(base, x)
}

/// [`power`] from a polynomial alone.
#[inline(always)]
pub(super) fn power_by_polynomial<F: Float, S: Simd<F>, const COUNT: usize>(
    simd: S,
    base: Base<F>,
    x: [S::V; COUNT],
) -> [S::V; COUNT] {
    let (log2, integers) = (simd.splat(base.log2), simd.splat(F::INTEGERS));
    let mut k = x;
    for k in &mut k {
        *k = simd.sub(simd.fma(*k, log2, integers), integers);
    }
    let mut r = x;
    for (r, &k) in r.iter_mut().zip(&k) {
        *r = simd.fms(*r, log2, k);
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
        let nothing = simd.less(x, simd.splat(base.least));
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
    // From 20 on the tangent is 1 in every precision. A NaN is the second argument, which survives.
    let bounded = simd.min(simd.splat(F::from_f64(20.0)), y);
    let [square] = power(simd, Base::new((F::ONE + F::ONE) * F::LOG2_E), [bounded]);
    let large = simd.sub(one, simd.div(two, simd.add(square, one)));
    let is_small = simd.less(y, simd.splat(F::from_f64(0.625)));
    simd.select(is_small, small, simd.copysign(large, x))
}
