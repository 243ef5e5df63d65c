//! Element types: what they are called, how large they are, and how they convert.

use half::{bf16, f16};

/// The type of a tensor's elements.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(rename_all = "lowercase"))]
#[non_exhaustive]
pub enum DType {
    /// IEEE 754 binary64.
    F64,
    /// IEEE 754 binary32.
    F32,
    /// IEEE 754 binary16.
    F16,
    /// bfloat16: the upper half of a binary32.
    Bf16,
    /// 8-bit float, 4 exponent and 3 mantissa bits: e4m3fn ([`F8E4M3`](crate::F8E4M3)). For keys and values
    /// beside a query of another dtype.
    F8E4M3,
    /// 8-bit float, 5 exponent and 2 mantissa bits ([`F8E5M2`](crate::F8E5M2)); likewise.
    F8E5M2,
    /// One byte an element, zero is `false` and everything else is `true`.
    Bool,
    /// Signed integers of 32 bits: lengths, offsets and seeds, as the other integers.
    I32,
    /// Unsigned integers of 32 bits.
    U32,
    /// Signed integers of 64 bits.
    I64,
}

impl DType {
    /// The float dtypes that queries, keys, values and biases can have. Keys and values can also have those of
    /// [`EIGHT_BIT`](Self::EIGHT_BIT).
    pub const FLOATS: [DType; 4] = [DType::F64, DType::F32, DType::F16, DType::Bf16];

    /// The 8-bit floats, which keys and values can have beside a query of [`FLOATS`](Self::FLOATS).
    pub const EIGHT_BIT: [DType; 2] = [DType::F8E4M3, DType::F8E5M2];

    /// The dtypes that lengths, offsets and seeds can have as tensors.
    pub const INTEGERS: [DType; 3] = [DType::I32, DType::U32, DType::I64];

    /// Every dtype that there is a name for.
    const ALL: [DType; 10] = [
        DType::F64,
        DType::F32,
        DType::F16,
        DType::Bf16,
        DType::F8E4M3,
        DType::F8E5M2,
        DType::Bool,
        DType::I32,
        DType::U32,
        DType::I64,
    ];

    /// Bytes an element takes.
    pub const fn size(self) -> usize {
        match self {
            DType::F64 | DType::I64 => 8,
            DType::F32 | DType::I32 | DType::U32 => 4,
            DType::F16 | DType::Bf16 => 2,
            DType::F8E4M3 | DType::F8E5M2 | DType::Bool => 1,
        }
    }

    /// The lower-case name, as used in messages, file names and on command lines.
    pub const fn name(self) -> &'static str {
        match self {
            DType::F64 => "f64",
            DType::F32 => "f32",
            DType::F16 => "f16",
            DType::Bf16 => "bf16",
            DType::F8E4M3 => "f8e4m3",
            DType::F8E5M2 => "f8e5m2",
            DType::Bool => "bool",
            DType::I32 => "i32",
            DType::U32 => "u32",
            DType::I64 => "i64",
        }
    }

    /// True for the dtypes of [`DType::FLOATS`].
    pub const fn is_supported_float(self) -> bool {
        matches!(self, DType::F64 | DType::F32 | DType::F16 | DType::Bf16)
    }

    /// True for the dtypes of [`DType::EIGHT_BIT`].
    pub const fn is_eight_bit(self) -> bool {
        matches!(self, DType::F8E4M3 | DType::F8E5M2)
    }

    /// True for the dtypes of [`DType::INTEGERS`].
    pub const fn is_integer(self) -> bool {
        matches!(self, DType::I32 | DType::U32 | DType::I64)
    }

    /// The dtype of logits, softmax statistics and the logsumexp for operands of this dtype:
    /// [`F64`](DType::F64) for f64 and [`F32`](DType::F32) for everything else.
    pub const fn accumulator(self) -> DType {
        match self {
            DType::F64 => DType::F64,
            _ => DType::F32,
        }
    }
}

impl std::fmt::Display for DType {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(self.name())
    }
}

impl std::str::FromStr for DType {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Self::ALL.into_iter().find(|dtype| dtype.name() == text).ok_or_else(|| {
            format!("unknown dtype '{text}'; known are {}", Self::ALL.map(DType::name).join(", "))
        })
    }
}

pub(crate) mod sealed {
    pub trait Sealed {}
}

/// A Rust type that a view can be made of. Sealed: f64, f32, f16, bf16, [`F8E4M3`](crate::F8E4M3),
/// [`F8E5M2`](crate::F8E5M2), bool, i32, u32 and i64, and usize, which is one of the latter two by its size.
pub trait Element: Copy + Send + Sync + 'static + sealed::Sealed {
    /// The dtype of this element.
    const DTYPE: DType;
}

/// A float [`Element`]: can be read back from a view and converted. The 8-bit ones are
/// [`Float8`](crate::Float8) instead, whose conversions are told what to do with too large numbers.
pub trait Scalar: Element + bytemuck::Pod {
    /// The value as f32; f64 is rounded to nearest even.
    fn to_f32(self) -> f32;
    /// The value as f64; exact for every dtype.
    fn to_f64(self) -> f64;
    /// Rounds to nearest even.
    fn from_f32(value: f32) -> Self;
    /// Rounds to nearest even, once, for every dtype.
    fn from_f64(value: f64) -> Self;
}

impl sealed::Sealed for bool {}
impl Element for bool {
    const DTYPE: DType = DType::Bool;
}

macro_rules! integer {
    ($($type:ty => $dtype:expr),* $(,)?) => {$(
        impl sealed::Sealed for $type {}
        impl Element for $type {
            const DTYPE: DType = $dtype;
        }
    )*};
}

// A usize above i64::MAX reads as a negative number, which no length is.
integer!(
    i32 => DType::I32,
    u32 => DType::U32,
    i64 => DType::I64,
    usize => if usize::BITS == 64 { DType::I64 } else { DType::U32 },
);

macro_rules! scalar {
    ($type:ty, $dtype:expr, $to32:expr, $to64:expr, $from32:expr, $from64:expr) => {
        impl sealed::Sealed for $type {}
        impl Element for $type {
            const DTYPE: DType = $dtype;
        }
        impl Scalar for $type {
            #[inline(always)]
            fn to_f32(self) -> f32 {
                $to32(self)
            }
            #[inline(always)]
            fn to_f64(self) -> f64 {
                $to64(self)
            }
            #[inline(always)]
            fn from_f32(value: f32) -> Self {
                $from32(value)
            }
            #[inline(always)]
            fn from_f64(value: f64) -> Self {
                $from64(value)
            }
        }
    };
}

scalar!(f64, DType::F64, |x| x as f32, |x| x, f64::from, |x| x);
scalar!(f32, DType::F32, |x| x, f64::from, |x| x, |x| x as f32);
scalar!(f16, DType::F16, f16::to_f32, f16::to_f64, f16::from_f32, |x| f16::from_f32(round_to_odd(x)));
scalar!(bf16, DType::Bf16, bf16::to_f32, bf16::to_f64, bf16::from_f32, |x| bf16::from_f32(round_to_odd(x)));

/// An f32 from which rounding to a half gives the same as rounding the f64 would: inexact values get an odd
/// last bit, which keeps them off the midpoints (Boldo and Melquiond, "Emulation of FMA and correctly rounded
/// sums"). The conversions of `half` go through a rounded f32 where the processor has instructions for it.
pub(crate) fn round_to_odd(value: f64) -> f32 {
    let rounded = value as f32;
    let back = f64::from(rounded);
    if back == value || value.is_nan() {
        return rounded;
    }
    // One step towards zero where rounding went away from it; infinity steps to the largest finite number.
    let bits = rounded.to_bits() - u32::from(back.abs() > value.abs());
    f32::from_bits(bits | 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_parse_back() {
        for dtype in DType::ALL {
            assert_eq!(dtype.name().parse::<DType>(), Ok(dtype));
        }
        assert!("int8".parse::<DType>().unwrap_err().contains("unknown dtype 'int8'"));
    }

    #[test]
    fn sizes_are_those_of_the_types() {
        assert_eq!(f64::DTYPE.size(), size_of::<f64>());
        assert_eq!(f32::DTYPE.size(), size_of::<f32>());
        assert_eq!(f16::DTYPE.size(), size_of::<f16>());
        assert_eq!(bf16::DTYPE.size(), size_of::<bf16>());
        assert_eq!(bool::DTYPE.size(), size_of::<bool>());
        assert_eq!(i32::DTYPE.size(), size_of::<i32>());
        assert_eq!(u32::DTYPE.size(), size_of::<u32>());
        assert_eq!(i64::DTYPE.size(), size_of::<i64>());
        assert_eq!(usize::DTYPE.size(), size_of::<usize>());
    }

    #[test]
    fn f64_rounds_once_to_the_halves() {
        // 1 + 2^-11 + 2^-40 is above the midpoint between 1 and 1 + 2^-10 in f16; through f32 it would be
        // rounded to the midpoint first and then down to even.
        let value = 1.0 + 2f64.powi(-11) + 2f64.powi(-40);
        assert_eq!(<f16 as Scalar>::from_f64(value).to_f64(), 1.0 + 2f64.powi(-10));
        let value = 1.0 + 2f64.powi(-8) + 2f64.powi(-40);
        assert_eq!(<bf16 as Scalar>::from_f64(value).to_f64(), 1.0 + 2f64.powi(-7));
    }

    /// The nearest of a value's neighbours, the even one in the middle, judged in f64 where all of them are
    /// exact.
    fn is_nearest<T: Scalar>(value: f64, bits: impl Fn(T) -> u16, from_bits: impl Fn(u16) -> T) -> bool {
        let rounded = T::from_f64(value);
        let distance = |other: T| (other.to_f64() - value).abs();
        [bits(rounded).wrapping_sub(1), bits(rounded).wrapping_add(1)].into_iter().all(|neighbour| {
            let other = from_bits(neighbour);
            let other_distance = distance(other);
            let tie = distance(rounded) == other_distance && bits(rounded).is_multiple_of(2);
            !other.to_f64().is_finite() || distance(rounded) < other_distance || tie
        })
    }

    proptest::proptest! {
        #![proptest_config(proptest::prelude::ProptestConfig::with_cases(4000))]

        /// Also close to the midpoints between two halves, where rounding twice goes wrong.
        #[test]
        fn halves_are_the_nearest(
            bits in proptest::prelude::any::<u16>(),
            nudge in -3i32..4,
            scale in 20i32..60,
        ) {
            for half in [f16::from_bits(bits).to_f64(), bf16::from_bits(bits).to_f64()] {
                let next_f16 = f16::from_bits(bits.wrapping_add(1)).to_f64();
                let next_bf16 = bf16::from_bits(bits.wrapping_add(1)).to_f64();
                for middle in [half, (half + next_f16) / 2.0, (half + next_bf16) / 2.0] {
                    let value = middle * (1.0 + f64::from(nudge) * 2f64.powi(-scale));
                    if value.abs() < 65504.0 {
                        proptest::prop_assert!(is_nearest(value, f16::to_bits, f16::from_bits), "{value:e} to f16");
                    }
                    if value.abs() < 3e38 {
                        proptest::prop_assert!(is_nearest(value, bf16::to_bits, bf16::from_bits), "{value:e} to bf16");
                    }
                }
            }
        }
    }

    /// Every finite half, the midpoint above it, and what lies next to both in f64, at every distance that a
    /// conversion could lose: one unit of the f64, and one bit in the part that an f32 or the upper word of
    /// the f64 drops.
    fn rounds_to_nearest_even<T: Scalar>(
        from_bits: impl Fn(u16) -> T,
        to_bits: impl Fn(T) -> u16,
        overflow: f64,
    ) {
        for bits in 0..0x7fff_u16 {
            let (low, high) = (from_bits(bits).to_f64(), from_bits(bits + 1).to_f64());
            if !low.is_finite() {
                continue;
            }
            // Beyond the largest finite half, the next would be where infinity begins.
            let high = if high.is_finite() { high } else { overflow };
            let (middle, even) = ((low + high) / 2.0, bits + bits % 2);
            let check = |value: f64, want: u16| {
                for (value, want) in [(value, want), (-value, want | 0x8000)] {
                    assert_eq!(to_bits(T::from_f64(value)), want, "{value:e} ({:#x})", value.to_bits());
                }
            };
            check(low, bits);
            check(middle, even);
            for unit in [0, 3, 20, 28, 29, 31, 32, 36] {
                let step = 1u64 << unit;
                let above = f64::from_bits(middle.to_bits() + step);
                let below = f64::from_bits(middle.to_bits() - step);
                assert!(low <= below && above <= high, "{middle:e}");
                check(above, bits + 1);
                check(below, bits);
            }
        }
        assert_eq!(to_bits(T::from_f64(f64::MIN_POSITIVE)), 0);
        assert_eq!(to_bits(T::from_f64(5e-324)), 0);
    }

    #[test]
    fn every_half_and_every_midpoint_rounds_to_nearest_even() {
        rounds_to_nearest_even(f16::from_bits, f16::to_bits, 65536.0);
        rounds_to_nearest_even(bf16::from_bits, bf16::to_bits, 2f64.powi(128));
        // The value that `half`'s own conversion rounds down.
        let value = 1.0 + 2f64.powi(-8) + 2f64.powi(-21);
        assert_eq!(<bf16 as Scalar>::from_f64(value).to_f64(), 1.0 + 2f64.powi(-7));
    }

    #[test]
    fn what_is_not_finite_stays_so() {
        for value in [f64::INFINITY, f64::NEG_INFINITY, 1e300, -1e300] {
            let infinite = f64::INFINITY.copysign(value);
            assert_eq!(<f16 as Scalar>::from_f64(value).to_f64(), infinite);
            assert_eq!(<bf16 as Scalar>::from_f64(value).to_f64(), infinite);
        }
        assert!(
            <f16 as Scalar>::from_f64(f64::NAN).is_nan() && <bf16 as Scalar>::from_f64(f64::NAN).is_nan()
        );
        assert_eq!(<f16 as Scalar>::from_f64(-0.0).to_bits(), 0x8000);
    }
}
