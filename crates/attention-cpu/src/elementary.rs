//! The floats that logits and softmax are computed in, with exp and tanh that vectorise: no branch, no table.

use crate::gemm::Multiply;
use crate::variants::{ComputeRuns, Runs};

/// f32, or f64 for f64 operands.
pub(crate) trait Compute:
    Multiply
    + Default
    + PartialOrd
    + std::fmt::Debug
    + std::ops::Add<Output = Self>
    + std::ops::Sub<Output = Self>
    + std::ops::Mul<Output = Self>
    + std::ops::Div<Output = Self>
    + std::ops::AddAssign
    + std::ops::MulAssign
{
    const ZERO: Self;
    const ONE: Self;
    const NEG_INFINITY: Self;

    /// The probability at a position that takes no part: negative zero, which adds nothing to a sum and can
    /// be told from an allowed probability that is zero.
    const DISALLOWED: Self;

    /// The counters of the code that is compiled for this.
    fn runs(runs: &Runs) -> &ComputeRuns;
    /// Whether this is exactly [`DISALLOWED`](Self::DISALLOWED).
    fn is_disallowed(self) -> bool;
    /// Neither infinite nor NaN.
    fn is_finite(self) -> bool;
    /// This logit with a bias: -inf where the bias is, even if this is NaN, and the `lowest` finite logit
    /// where a finite bias leads below it.
    fn biased(self, bias: Self, lowest: Self) -> Self;
    /// `e` to this, to within 2 ulp.
    fn exp_lane<const FMA: bool>(self) -> Self;
    /// The hyperbolic tangent, to within 2 ulp.
    fn tanh_lane<const FMA: bool>(self) -> Self;
    /// `self * b + c`, fused where that is one instruction.
    fn scaled_plus<const FMA: bool>(self, b: Self, c: Self) -> Self;
    /// The natural logarithm; not vectorised, once a row.
    fn ln(self) -> Self;
    /// The distance between a position and a key.
    fn from_distance(distance: u64) -> Self;
}

/// `a * b + c`, fused where that is one instruction.
macro_rules! fma {
    ($a:expr, $b:expr, $c:expr) => {
        if FMA { ($a).mul_add($b, $c) } else { ($a) * ($b) + ($c) }
    };
}

/// A polynomial, highest coefficient first.
macro_rules! horner {
    ($x:expr, $first:expr $(, $coefficient:expr)*) => {{
        let p: Self = $first;
        $(let p: Self = fma!(p, $x, $coefficient);)*
        p
    }};
}

/// What f32 and f64 do alike.
macro_rules! same_for_all {
    ($float:ident, $runs:ident) => {
        const ZERO: Self = 0.0;
        const ONE: Self = 1.0;
        const NEG_INFINITY: Self = $float::NEG_INFINITY;
        const DISALLOWED: Self = -0.0;

        fn runs(runs: &Runs) -> &ComputeRuns {
            &runs.$runs
        }

        #[inline(always)]
        fn is_disallowed(self) -> bool {
            self.to_bits() == Self::DISALLOWED.to_bits()
        }

        #[inline(always)]
        fn is_finite(self) -> bool {
            self.abs() < $float::INFINITY
        }

        #[inline(always)]
        fn biased(self, bias: Self, lowest: Self) -> Self {
            let sum = self + bias;
            // A logit of -inf stays it. NaN passes the comparison.
            let sum = if sum < lowest && self != $float::NEG_INFINITY { lowest } else { sum };
            if bias == $float::NEG_INFINITY { bias } else { sum }
        }

        #[inline(always)]
        fn scaled_plus<const FMA: bool>(self, b: Self, c: Self) -> Self {
            fma!(self, b, c)
        }

        #[inline(always)]
        fn ln(self) -> Self {
            $float::ln(self)
        }

        #[inline(always)]
        fn from_distance(distance: u64) -> Self {
            distance as $float
        }
    };
}

impl Compute for f32 {
    same_for_all!(f32, in_f32);

    /// Cody and Waite's reduction to `|r| <= ln 2 / 2` and the minimax polynomial of Cephes (`expf`).
    #[inline(always)]
    fn exp_lane<const FMA: bool>(self) -> Self {
        // Beyond these the result is 0 or infinity; NaN passes both comparisons.
        let x = if self < -104.0 { -104.0 } else { self };
        let x = if x > 89.0 { 89.0 } else { x };
        // 1.5 * 2^23: adding it rounds to an integer, which is then in the low bits.
        const ROUND: f32 = 12_582_912.0;
        let t = fma!(x, std::f32::consts::LOG2_E, ROUND);
        let n = t - ROUND;
        let k = (t.to_bits() as i32).wrapping_sub(ROUND.to_bits() as i32);
        // ln 2 in two parts, the first short enough for n * part to be exact.
        let r = fma!(n, -0.693_359_4, x);
        let r = fma!(n, 2.121_944_4e-4, r);
        let p =
            horner!(r, 0.000_198_527_62, 0.001_393_043_6, 0.008_333_361, 0.041_666_485, 0.166_666_67, 0.5);
        let p = fma!(p, r * r, r) + 1.0;
        // 2^k in two factors, so that neither overflows and subnormal results are rounded once.
        let half = k >> 1;
        let power = |k: i32| f32::from_bits((k.wrapping_add(127) as u32) << 23);
        p * power(half) * power(k.wrapping_sub(half))
    }

    /// Cephes (`tanhf`): an odd polynomial near 0, the exponential elsewhere.
    #[inline(always)]
    fn tanh_lane<const FMA: bool>(self) -> Self {
        let y = self.abs();
        let z = self * self;
        let p = horner!(z, -5.704_988_7e-3, 2.063_908_8e-2, -5.373_971_5e-2, 1.333_144_2e-1, -3.333_328e-1);
        let small = fma!(p * z, self, self);
        let large = 1.0 - 2.0 / ((y + y).exp_lane::<FMA>() + 1.0);
        (if y < 0.625 { small } else { large }).copysign(self)
    }
}

impl Compute for f64 {
    same_for_all!(f64, in_f64);

    /// As for f32, with a polynomial of degree 12.
    #[inline(always)]
    fn exp_lane<const FMA: bool>(self) -> Self {
        let x = if self < -746.0 { -746.0 } else { self };
        let x = if x > 710.0 { 710.0 } else { x };
        // 1.5 * 2^52.
        const ROUND: f64 = 6_755_399_441_055_744.0;
        let t = fma!(x, std::f64::consts::LOG2_E, ROUND);
        let n = t - ROUND;
        let k = t.to_bits().wrapping_sub(ROUND.to_bits());
        let r = fma!(n, -0.693_147_180_559_663, x);
        let r = fma!(n, -2.823_529_056_303_157_7e-13, r);
        let p = horner!(
            r,
            2.088_606_211_072_837e-9,
            2.511_129_308_928_765_2e-8,
            2.755_739_112_349_004_7e-7,
            2.755_723_629_119_288_3e-6,
            2.480_158_715_923_547_3e-5,
            0.000_198_412_698_960_509_2,
            0.001_388_888_888_897_745,
            0.008_333_333_333_316_527,
            0.041_666_666_666_666_505,
            0.166_666_666_666_666_85,
            0.5
        );
        let p = fma!(p, r * r, r) + 1.0;
        // Biased before the shift: AVX2 has no arithmetic shift of 64-bit lanes.
        let half = (k.wrapping_add(2048) >> 1).wrapping_sub(1024);
        let power = |k: u64| f64::from_bits(k.wrapping_add(1023) << 52);
        p * power(half) * power(k.wrapping_sub(half))
    }

    /// Cephes (`tanh`): a rational function near 0, the exponential elsewhere.
    #[inline(always)]
    fn tanh_lane<const FMA: bool>(self) -> Self {
        let y = self.abs();
        let z = self * self;
        let p = horner!(z, -9.643_991_794_250_523e-1, -9.928_772_310_019_185e1, -1.614_687_684_417_084_5e3);
        let q = horner!(z, z + 1.128_116_784_916_329_3e2, 2.235_488_390_601_004_5e3, 4.844_063_053_251_255e3);
        let small = fma!(self * z, p / q, self);
        let large = 1.0 - 2.0 / ((y + y).exp_lane::<FMA>() + 1.0);
        (if y < 0.625 { small } else { large }).copysign(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The distance in units in the last place of an f32 at `want`.
    fn ulps_f32(got: f32, want: f64) -> f64 {
        let magnitude = (want as f32).abs().max(f32::MIN_POSITIVE);
        let ulp = f32::from_bits(magnitude.to_bits() + 1) - magnitude;
        (f64::from(got) - want).abs() / f64::from(ulp)
    }

    /// The distance in units in the last place of an f64 from the value of the standard library, itself
    /// within 1.
    fn ulps_f64(got: f64, want: f64) -> f64 {
        let magnitude = want.abs().max(f64::MIN_POSITIVE);
        let ulp = f64::from_bits(magnitude.to_bits() + 1) - magnitude;
        (got - want).abs() / ulp
    }

    /// Floats of both signs up to `limit`, densely.
    fn floats(limit: f32) -> impl Iterator<Item = f32> {
        (2f32.powi(-24).to_bits()..=limit.to_bits())
            .step_by(97)
            .flat_map(|bits| [f32::from_bits(bits), -f32::from_bits(bits)])
    }

    fn doubles(limit: f64) -> impl Iterator<Item = f64> {
        (-300_000..=300_000).map(move |i| limit * (f64::from(i) + 0.37) / 300_001.0)
    }

    #[test]
    fn exp_is_within_two_ulp_with_and_without_fma() {
        for exp in [<f32 as Compute>::exp_lane::<true>, <f32 as Compute>::exp_lane::<false>] {
            let worst = floats(104.0)
                .filter(|&x| x < 88.7)
                .map(|x| ulps_f32(exp(x), f64::from(x).exp()))
                .fold(0.0, f64::max);
            assert!(worst <= 2.0, "{worst}");
        }
        for exp in [<f64 as Compute>::exp_lane::<true>, <f64 as Compute>::exp_lane::<false>] {
            let worst =
                doubles(745.0).filter(|&x| x < 709.7).map(|x| ulps_f64(exp(x), x.exp())).fold(0.0, f64::max);
            assert!(worst <= 3.0, "{worst}");
        }
    }

    #[test]
    fn tanh_is_within_two_ulp_with_and_without_fma() {
        for tanh in [<f32 as Compute>::tanh_lane::<true>, <f32 as Compute>::tanh_lane::<false>] {
            let worst = floats(20.0).map(|x| ulps_f32(tanh(x), f64::from(x).tanh())).fold(0.0, f64::max);
            assert!(worst <= 2.0, "{worst}");
        }
        for tanh in [<f64 as Compute>::tanh_lane::<true>, <f64 as Compute>::tanh_lane::<false>] {
            let worst = doubles(25.0).map(|x| ulps_f64(tanh(x), x.tanh())).fold(0.0, f64::max);
            assert!(worst <= 3.0, "{worst}");
        }
    }

    #[test]
    fn special_values() {
        fn check<C: Compute>(infinity: C, nan: C, lowest: C) {
            let exp = |x: C| x.exp_lane::<false>();
            assert_eq!(exp(C::ZERO), C::ONE);
            assert_eq!(exp(C::NEG_INFINITY), C::ZERO);
            assert_eq!(exp(infinity), infinity);
            assert!(exp(nan).to_f64().is_nan());
            let tanh = |x: C| x.tanh_lane::<false>();
            assert_eq!(tanh(infinity), C::ONE);
            assert_eq!(tanh(C::NEG_INFINITY), C::ZERO - C::ONE);
            assert!(tanh(nan).to_f64().is_nan());
            assert!(C::DISALLOWED.is_disallowed() && !C::ZERO.is_disallowed() && !nan.is_disallowed());
            assert!(!infinity.is_finite() && !nan.is_finite() && C::ONE.is_finite());
            for logit in [nan, infinity, C::NEG_INFINITY, C::ONE] {
                assert_eq!(logit.biased(C::NEG_INFINITY, lowest), C::NEG_INFINITY);
            }
            let biased = |logit: C, bias| logit.biased(bias, lowest);
            assert!(biased(nan, lowest).to_f64().is_nan() && biased(C::ONE, nan).to_f64().is_nan());
            assert_eq!((biased(lowest, lowest), biased(C::ZERO, lowest)), (lowest, lowest));
            assert_eq!(biased(C::NEG_INFINITY, C::ONE), C::NEG_INFINITY);
            assert_eq!(biased(C::ONE, C::ONE).to_f64(), 2.0);
        }
        check(f32::INFINITY, f32::NAN, f32::MIN);
        check(f64::INFINITY, f64::NAN, f64::MIN);
        check(f64::INFINITY, f64::NAN, f32::MIN.into());
    }
}
