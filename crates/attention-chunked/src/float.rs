//! The floats that logits, softmax and sums are computed in.

use attention_core::merge::Accumulator;

/// f32, or f64 for f64 operands and for batch rows so small that speed is no concern.
pub(crate) trait Float:
    Accumulator
    + Default
    + std::fmt::Debug
    + std::ops::Add<Output = Self>
    + std::ops::Sub<Output = Self>
    + std::ops::Mul<Output = Self>
    + std::ops::Div<Output = Self>
    + std::ops::AddAssign
    + std::ops::Neg<Output = Self>
{
    /// One.
    const ONE: Self;
    /// `log2(e)`.
    const LOG2_E: Self;

    /// The weight of a position that takes no part: negative zero, which adds nothing to a sum and can be
    /// told from an allowed weight that is zero.
    const DISALLOWED: Self;

    /// How far, in powers of two, logits may be above the shift that weights are taken relative to. Weights
    /// of up to 2^8 keep every digit, and leave sums of values as far from overflow as 256 times as many keys
    /// would.
    const ROOM: Self;

    /// The largest finite number.
    const LARGEST: Self;

    /// Exponents that powers of two are computed between ([`power`](crate::simd::power)): below the first,
    /// that of the smallest normal number, the result is 0; from the second on it is infinity.
    const EXPONENTS: [Self; 2];

    /// Adding it to a number of at most 2^21 (2^50 in f64) leaves the nearest integer, ties to even, in the
    /// low bits.
    const INTEGERS: Self;

    /// `2^r = 1 + r (c[0] + c[1] r + ...)` for `|r| <= 1/2`: minimax in the relative error (Remez exchange in
    /// 60 digits), which is 2.6e-9 in f32 and 1.8e-17 in f64, both below half a unit in the last place.
    const EXP2: &'static [Self];

    /// `tanh x = x + x z p(z) / q(z)` with `z = x^2` for `|x| < 0.625`, highest coefficient first (Cephes,
    /// `tanhf` and `tanh`).
    const TANH_P: &'static [Self];
    /// The denominator; empty for 1.
    const TANH_Q: &'static [Self];

    /// Whether this is exactly [`DISALLOWED`](Self::DISALLOWED).
    fn is_disallowed(self) -> bool;
    /// The absolute value.
    fn abs(self) -> Self;
    /// `2^k` times this, for an integer `k` inside [`EXPONENTS`](Self::EXPONENTS).
    fn times_power_of_two(self, k: Self) -> Self;
    /// Whether it is neither infinite nor NaN.
    fn is_finite(self) -> bool;
    /// Whether it is NaN.
    fn is_nan(self) -> bool;
    /// `self * b + c`, rounded once.
    fn fused(self, b: Self, c: Self) -> Self;
    /// A difference of positions.
    fn from_difference(difference: i64) -> Self;
}

macro_rules! float {
    ($float:ident, $bits:ident, $bias:expr, $mantissa:expr, $exponents:expr, [$($exp2:expr),*], [$($p:expr),*], [$($q:expr),*]) => {
        #[allow(
            clippy::approx_constant,
            clippy::excessive_precision,
            reason = "coefficients of minimax polynomials, as their exchange gave them"
        )]
        impl Float for $float {
            const ONE: Self = 1.0;
            const LOG2_E: Self = std::$float::consts::LOG2_E;
            const DISALLOWED: Self = -0.0;
            const ROOM: Self = 8.0;
            const LARGEST: Self = $float::MAX;
            const EXPONENTS: [Self; 2] = $exponents;
            const INTEGERS: Self = 1.5 * (1u64 << $mantissa) as $float;
            const EXP2: &'static [Self] = &[$($exp2),*];
            const TANH_P: &'static [Self] = &[$($p),*];
            const TANH_Q: &'static [Self] = &[$($q),*];

            #[inline(always)]
            fn is_disallowed(self) -> bool {
                self.to_bits() == Self::DISALLOWED.to_bits()
            }
            #[inline(always)]
            fn abs(self) -> Self {
                $float::abs(self)
            }
            #[inline(always)]
            fn times_power_of_two(self, k: Self) -> Self {
                // In two factors, so that neither overflows. Exponents that are no number, or below the
                // range, give some number; the caller selects another result then, or the factor is NaN too.
                let k = (k as i32).clamp(Self::EXPONENTS[0] as i32, Self::EXPONENTS[1] as i32);
                let half = k >> 1;
                let power = |k: i32| $float::from_bits(((k + $bias) as $bits) << $mantissa);
                self * power(half) * power(k - half)
            }
            #[inline(always)]
            fn is_finite(self) -> bool {
                $float::is_finite(self)
            }
            #[inline(always)]
            fn is_nan(self) -> bool {
                $float::is_nan(self)
            }
            #[inline(always)]
            fn fused(self, b: Self, c: Self) -> Self {
                self.mul_add(b, c)
            }
            #[inline(always)]
            fn from_difference(difference: i64) -> Self {
                difference as $float
            }
        }
    };
}

float!(
    f32,
    u32,
    127,
    23,
    [-126.0, 128.0],
    [0.693_147_2, 0.240_226_53, 0.055_503_11, 0.009_617_693, 0.001_340_664_4, 0.000_155_946_78],
    [-5.704_988_7e-3, 2.063_908_8e-2, -5.373_971_5e-2, 1.333_144_2e-1, -3.333_328e-1],
    []
);
float!(
    f64,
    u64,
    1023,
    52,
    [-1022.0, 1024.0],
    [
        0.693_147_180_559_945_7,
        0.240_226_506_959_100_98,
        0.055_504_108_664_790_395,
        0.009_618_129_107_607_002,
        0.001_333_355_815_343_996_5,
        0.000_154_035_304_415_721_33,
        0.000_015_252_727_385_193_868,
        1.321_544_267_532_983_1e-6,
        1.018_064_765_923_413_9e-7,
        7.072_570_412_814_423_5e-9,
        4.078_071_929_588_336_7e-10
    ],
    [-9.643_991_794_250_523e-1, -9.928_772_310_019_185e1, -1.614_687_684_417_084_5e3],
    [1.0, 1.128_116_784_916_329_3e2, 2.235_488_390_601_004_5e3, 4.844_063_053_251_255e3]
);
