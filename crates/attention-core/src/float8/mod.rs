//! The two 8-bit floats: what their bytes mean, and how wider numbers become bytes.
//!
//! [`F8E4M3`] is the e4m3fn of Micikevicius et al., arXiv 2209.05433, section 3: no infinities, one NaN of
//! each sign, up to 448. [`F8E5M2`] follows IEEE 754: infinities, NaNs, up to 57344. The formats "fnuz" of
//! other hardware decode the same bytes differently and are not these.
//!
//! Libraries agree on what a byte means and on rounding up to the largest number, and disagree above it
//! (docs/semantics.md, "8-bit keys and values"). So neither type is a [`Scalar`](crate::Scalar), which would
//! have to choose: each conversion is told what to do by an [`Overflow`].

use crate::dtype::{round_to_odd, sealed};
use crate::{DType, Element};

/// What becomes of a number that rounds to more than the largest finite one of an 8-bit float: above 464 in
/// e4m3, from 61440 on in e5m2, either sign. NaN becomes NaN in either case.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Overflow {
    /// The largest finite number of the sign, 448 in e4m3 and 57344 in e5m2, of infinities too.
    Saturate,
    /// NaN. An infinity becomes NaN in e4m3, which has none, and stays what it is in e5m2.
    ///
    /// Most libraries give infinity in e5m2 where numbers are too large. Of a key that would hide the mistake:
    /// a logit of -inf masks its key.
    Nan,
}

/// An 8-bit float: an [`Element`] that keys and values can have beside a query of another dtype.
///
/// # Examples
/// ```
/// use attention_core::{F8E4M3, F8E5M2, Float8, Overflow}; // or of `attention`, which are the same
///
/// assert_eq!(F8E4M3::from_f32(464.0, Overflow::Nan).to_f32(), 448.0);
/// assert!(F8E4M3::from_f32(465.0, Overflow::Nan).to_f32().is_nan());
/// assert_eq!(F8E4M3::from_f32(465.0, Overflow::Saturate).to_f32(), 448.0);
/// assert!(F8E5M2::from_f32(61440.0, Overflow::Nan).to_f32().is_nan());
/// assert_eq!(F8E5M2::from_f32(-61440.0, Overflow::Saturate).to_f32(), -57344.0);
/// ```
pub trait Float8: Element + bytemuck::Pod + Default + std::fmt::Debug {
    /// The largest finite number: 448 or 57344.
    const LARGEST: f32;

    /// Of this byte.
    fn from_bits(bits: u8) -> Self;

    /// The byte.
    fn to_bits(self) -> u8;

    /// The value; exact.
    fn to_f32(self) -> f32;

    /// The value; exact.
    #[inline]
    fn to_f64(self) -> f64 {
        f64::from(self.to_f32())
    }

    /// Rounds to nearest, ties to even. Zeros and NaNs keep their sign; every NaN becomes the quiet one.
    fn from_f32(value: f32, overflow: Overflow) -> Self;

    /// As [`from_f32`](Self::from_f32): rounded once, not through f32.
    #[inline]
    fn from_f64(value: f64, overflow: Overflow) -> Self {
        Self::from_f32(round_to_odd(value), overflow)
    }

    /// Widens neighbours; exact. A loop without branches, which vectorises.
    ///
    /// # Panics
    /// Where the lengths differ.
    #[inline(always)]
    fn widen(from: &[Self], to: &mut [f32]) {
        assert_eq!(from.len(), to.len(), "as many numbers as bytes");
        for (to, &from) in to.iter_mut().zip(from) {
            *to = from.to_f32();
        }
    }

    /// Rounds neighbours as [`from_f32`](Self::from_f32) does.
    ///
    /// # Panics
    /// Where the lengths differ.
    ///
    /// # Examples
    /// Keys of a cache with a scale that spends the whole range: a number `x` of it stands for `scale * x`.
    /// ```
    /// use attention_core::{F8E4M3, Float8, Overflow};
    ///
    /// let keys = [0.5f32, -2.0, 0.125, 3.5];
    /// let scale = 3.5 / F8E4M3::LARGEST;
    /// let mut bytes = [F8E4M3::default(); 4];
    /// F8E4M3::narrow(&keys.map(|key| key / scale), &mut bytes, Overflow::Saturate);
    /// assert_eq!(bytes.map(|byte| scale * byte.to_f32()), keys);
    /// ```
    #[inline(always)]
    fn narrow(from: &[f32], to: &mut [Self], overflow: Overflow) {
        assert_eq!(from.len(), to.len(), "as many bytes as numbers");
        for (to, &from) in to.iter_mut().zip(from) {
            *to = Self::from_f32(from, overflow);
        }
    }
}

/// What the two formats differ in.
struct Format {
    /// Bits of the fraction.
    fraction: u32,
    /// The exponent of the smallest normal number: 2 to this power.
    least_exponent: i32,
    /// The byte of the largest finite number.
    largest: u8,
    /// The least f32 that rounds to more, as bits: those of positive f32 are in order.
    overflows_from: u32,
    /// The byte of infinity with [`Overflow::Nan`]: that of NaN where there is none.
    infinity: u8,
    /// The byte of NaN.
    nan: u8,
}

/// 464 is halfway between 448, which is even, and where 480 would be.
const E4M3: Format = Format {
    fraction: 3,
    least_exponent: -6,
    largest: 0x7e,
    overflows_from: 464f32.to_bits() + 1,
    infinity: 0x7f,
    nan: 0x7f,
};

/// 61440 is halfway between 57344, which is odd, and 65536, where infinity begins.
const E5M2: Format = Format {
    fraction: 2,
    least_exponent: -14,
    largest: 0x7b,
    overflows_from: 61440f32.to_bits(),
    infinity: 0x7c,
    nan: 0x7e,
};

const SIGN: u32 = 1 << 31;
/// Bits of the fraction of an f32, and the exponent of 1 in it.
const FRACTION: u32 = 23;
const BIAS: i32 = 127;

/// 2 to the power `exponent`.
const fn power_of_two(exponent: i32) -> u32 {
    ((exponent + BIAS) as u32) << FRACTION
}

impl Format {
    /// The value of a byte. All forms are computed and one is taken, so that a loop has no branch; none of them
    /// meets a subnormal f32, which is slow on many processors and 0 on some.
    #[inline(always)]
    const fn value(&self, bits: u8) -> f32 {
        let shift = FRACTION - self.fraction;
        let magnitude = bits & 0x7f;
        let shifted = (magnitude as u32) << shift;
        let normal = shifted + power_of_two(self.least_exponent - 1);
        // 2^least * (1 + fraction) - 2^least.
        let least = power_of_two(self.least_exponent);
        let subnormal = (f32::from_bits(shifted + least) - f32::from_bits(least)).to_bits();
        let finite = if magnitude < 1 << self.fraction { subnormal } else { normal };
        let is_infinite = magnitude == self.infinity && self.infinity != self.nan;
        let not_finite = if is_infinite { f32::INFINITY } else { f32::NAN }.to_bits();
        let sign = (bits as u32 & 0x80) << 24;
        f32::from_bits(sign | if magnitude > self.largest { not_finite } else { finite })
    }

    /// The byte of a number. As above, all forms are computed.
    #[inline(always)]
    fn round(&self, value: f32, overflow: Overflow) -> u8 {
        let shift = FRACTION - self.fraction;
        let bits = value.to_bits();
        let sign = ((bits & SIGN) >> 24) as u8;
        let magnitude = bits & !SIGN;
        // To nearest even by an addition to the bits: a carry into the exponent is what it should be. Of
        // numbers that are not normal here, this is nonsense, and not taken.
        let odd = magnitude >> shift & 1;
        let rounded = magnitude.wrapping_add((1 << (shift - 1)) - 1 + odd) >> shift;
        let normal = rounded.wrapping_sub(power_of_two(self.least_exponent - 1) >> shift) as u8;
        // The sum with a number whose last bit is worth the smallest subnormal is rounded there, to even.
        let unit = power_of_two(self.least_exponent - self.fraction as i32 + FRACTION as i32);
        let sum = f32::from_bits(magnitude) + f32::from_bits(unit);
        let subnormal = sum.to_bits().wrapping_sub(unit) as u8;
        let finite = if magnitude < power_of_two(self.least_exponent) { subnormal } else { normal };
        let above = match overflow {
            Overflow::Saturate => self.largest,
            Overflow::Nan if magnitude == f32::INFINITY.to_bits() => self.infinity,
            Overflow::Nan => self.nan,
        };
        let number = if magnitude >= self.overflows_from { above } else { finite };
        sign | if magnitude > f32::INFINITY.to_bits() { self.nan } else { number }
    }
}

macro_rules! float8 {
    ($(#[$doc:meta])* $type:ident, $dtype:expr, $format:expr, $largest:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Default, bytemuck::Pod, bytemuck::Zeroable)]
        #[repr(transparent)]
        pub struct $type(u8);

        impl sealed::Sealed for $type {}
        impl Element for $type {
            const DTYPE: DType = $dtype;
        }

        impl Float8 for $type {
            const LARGEST: f32 = $largest;

            #[inline(always)]
            fn from_bits(bits: u8) -> Self {
                Self(bits)
            }
            #[inline(always)]
            fn to_bits(self) -> u8 {
                self.0
            }
            #[inline(always)]
            fn to_f32(self) -> f32 {
                $format.value(self.0)
            }
            #[inline(always)]
            fn from_f32(value: f32, overflow: Overflow) -> Self {
                Self($format.round(value, overflow))
            }
        }

        /// As numbers: NaN is equal to nothing, and the zeros are equal.
        impl PartialEq for $type {
            fn eq(&self, other: &Self) -> bool {
                self.to_f32() == other.to_f32()
            }
        }

        impl PartialOrd for $type {
            fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
                self.to_f32().partial_cmp(&other.to_f32())
            }
        }

        impl std::fmt::Debug for $type {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                std::fmt::Debug::fmt(&self.to_f32(), f)
            }
        }

        impl std::fmt::Display for $type {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                std::fmt::Display::fmt(&self.to_f32(), f)
            }
        }
    };
}

float8!(
    /// e4m3fn: 4 exponent and 3 fraction bits, up to 448, no infinity. Zero by default.
    F8E4M3,
    DType::F8E4M3,
    E4M3,
    448.0
);
float8!(
    /// e5m2: 5 exponent and 2 fraction bits, up to 57344, with infinities. Zero by default.
    F8E5M2,
    DType::F8E5M2,
    E5M2,
    57344.0
);

#[cfg(test)]
mod tests;
