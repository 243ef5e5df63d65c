use half::f16;

use super::*;

/// A format by its definition, in f64.
#[derive(Clone, Copy)]
struct Definition {
    exponent_bits: u32,
    fraction_bits: u32,
    /// Whether the highest exponent is that of infinities and NaNs alone.
    is_ieee: bool,
}

const E4M3FN: Definition = Definition { exponent_bits: 4, fraction_bits: 3, is_ieee: false };
const E5M2_IEEE: Definition = Definition { exponent_bits: 5, fraction_bits: 2, is_ieee: true };

impl Definition {
    fn value(self, byte: u8) -> f64 {
        let sign = if byte & 0x80 == 0 { 1.0 } else { -1.0 };
        let bias = (1 << (self.exponent_bits - 1)) - 1;
        let exponent = i32::from(byte >> self.fraction_bits) & ((1 << self.exponent_bits) - 1);
        let fraction = f64::from(byte & ((1 << self.fraction_bits) - 1)) / f64::from(1 << self.fraction_bits);
        let highest = (1 << self.exponent_bits) - 1;
        if self.is_ieee && exponent == highest {
            return if fraction == 0.0 { sign * f64::INFINITY } else { f64::NAN };
        }
        if !self.is_ieee && byte & 0x7f == 0x7f {
            return f64::NAN;
        }
        match exponent {
            0 => sign * fraction * 2f64.powi(1 - bias),
            _ => sign * (1.0 + fraction) * 2f64.powi(exponent - bias),
        }
    }

    /// The byte of the nearest finite number, or `None` where the nearest with unlimited exponents is above
    /// all finite ones. By search: the values of bytes 0 to the largest rise.
    fn nearest(self, value: f64) -> Option<u8> {
        let magnitude = value.abs();
        let largest: u8 = if self.is_ieee { 0x7b } else { 0x7e };
        let next = self.value(largest) + (self.value(largest) - self.value(largest - 1));
        let above = (0..=largest).find(|&byte| self.value(byte) >= magnitude);
        let (low, high, high_value) = match above {
            Some(0) => (0, 0, 0.0),
            Some(byte) => (byte - 1, byte, self.value(byte)),
            None => (largest, largest + 1, next),
        };
        let (below, beyond) = (magnitude - self.value(low), high_value - magnitude);
        let takes_low = below < beyond || below == beyond && low % 2 == 0;
        let byte = if takes_low { low } else { high };
        (byte <= largest).then_some(byte | if value.is_sign_negative() { 0x80 } else { 0 })
    }
}

fn agrees<T: Float8>(format: Definition, value: f32, [nan, infinity]: [u8; 2]) {
    let sign = if value.is_sign_negative() { 0x80 } else { 0 };
    let largest = T::from_f32(T::LARGEST, Overflow::Nan).to_bits();
    let marked = if value.is_infinite() { infinity } else { nan };
    for (overflow, above) in [(Overflow::Saturate, largest), (Overflow::Nan, marked)] {
        let want = format.nearest(f64::from(value)).unwrap_or(above | sign);
        for got in [T::from_f32(value, overflow), T::from_f64(f64::from(value), overflow)] {
            assert_eq!(got.to_bits(), want, "{value:e} ({:#x}), {overflow:?}", value.to_bits());
        }
    }
}

fn all_bytes<T: Float8>(format: Definition) {
    for byte in 0..=u8::MAX {
        let (got, want) = (T::from_bits(byte), format.value(byte));
        assert_eq!(got.to_bits(), byte);
        if want.is_nan() {
            assert!(got.to_f32().is_nan() && got.to_f64().is_nan(), "{byte:#x}");
            let negative = byte & 0x80 != 0;
            assert_eq!(got.to_f32().is_sign_negative(), negative, "{byte:#x}");
            // A NaN is one afterwards, of the same sign.
            let again = T::from_f32(got.to_f32(), Overflow::Saturate);
            assert!(again.to_f32().is_nan() && again.to_f32().is_sign_negative() == negative);
            continue;
        }
        assert_eq!(got.to_f64().to_bits(), want.to_bits(), "{byte:#x}");
        assert_eq!(f64::from(got.to_f32()).to_bits(), want.to_bits(), "{byte:#x}");
        if want.is_finite() {
            let exact = [Overflow::Saturate, Overflow::Nan].map(|overflow| {
                [T::from_f32(got.to_f32(), overflow), T::from_f64(want, overflow)].map(T::to_bits)
            });
            assert_eq!(exact, [[byte; 2]; 2]);
        }
    }
}

#[test]
fn every_byte_means_what_its_format_says() {
    all_bytes::<F8E4M3>(E4M3FN);
    all_bytes::<F8E5M2>(E5M2_IEEE);
    assert_eq!(F8E4M3::from_bits(0x7e).to_f32(), 448.0);
    assert_eq!(F8E4M3::from_bits(0x01).to_f32(), 2f32.powi(-9));
    assert_eq!(F8E5M2::from_bits(0x7b).to_f32(), 57344.0);
    assert_eq!(F8E5M2::from_bits(0x01).to_f32(), 2f32.powi(-16));
    assert_eq!(F8E5M2::from_bits(0xfc).to_f32(), f32::NEG_INFINITY);
}

#[test]
fn e5m2_is_the_upper_byte_of_an_f16() {
    for byte in 0..=u8::MAX {
        let (got, want) = (F8E5M2::from_bits(byte).to_f32(), f16::from_bits(u16::from(byte) << 8).to_f32());
        assert!(got.to_bits() == want.to_bits() || got.is_nan() && want.is_nan(), "{byte:#x}");
    }
}

/// Every f16 with its f32 neighbours, all that lie around the numbers of an 8-bit float in the upper bits of
/// an f32, and the middles between two neighbours with theirs.
#[test]
fn numbers_round_to_the_nearest_even_one() {
    fn with_neighbours<T: Float8>(format: Definition, nan_and_infinity: [u8; 2]) {
        let around = |value: f32| {
            for step in -2i32..=2 {
                let bits = (value.to_bits() & !SIGN).wrapping_add_signed(step) & !SIGN;
                for value in [f32::from_bits(bits), f32::from_bits(bits | SIGN)] {
                    if !value.is_nan() {
                        agrees::<T>(format, value, nan_and_infinity);
                    }
                }
            }
        };
        for bits in 0..=f16::MAX.to_bits() {
            around(f16::from_bits(bits).to_f32());
        }
        for bits in (0..f32::INFINITY.to_bits()).step_by(1 << 15) {
            around(f32::from_bits(bits));
        }
        for byte in 0..0x7fu8 {
            let middle = (format.value(byte) + format.value(byte + 1)) / 2.0;
            if middle.is_finite() {
                assert_eq!(f64::from(middle as f32), middle);
                around(middle as f32);
                // In f64 there are numbers closer to the middle than any f32.
                for (bits, want) in [(middle.to_bits() - 1, byte), (middle.to_bits() + 1, byte + 1)] {
                    let got = [1.0, -1.0].map(|sign| T::from_f64(sign * f64::from_bits(bits), Overflow::Nan));
                    assert_eq!(got.map(T::to_bits), [want, want | 0x80], "{middle:e}");
                }
            }
        }
    }
    with_neighbours::<F8E4M3>(E4M3FN, [0x7f, 0x7f]);
    with_neighbours::<F8E5M2>(E5M2_IEEE, [0x7e, 0x7c]);
}

/// The numbers of docs/semantics.md at which libraries differ, as bytes.
#[test]
fn what_is_above_the_largest_number_is_what_the_caller_says() {
    let next = |value: f32| f32::from_bits(value.to_bits() + 1);
    let e4m3 = |value: f32| {
        [Overflow::Saturate, Overflow::Nan].map(|overflow| F8E4M3::from_f32(value, overflow).to_bits())
    };
    assert_eq!(e4m3(464.0), [0x7e, 0x7e]);
    for value in [next(464.0), 465.0, 480.0, 495.75, 496.0, 1e6, f32::MAX, f32::INFINITY] {
        assert_eq!(e4m3(value), [0x7e, 0x7f], "{value}");
        assert_eq!(e4m3(-value), [0xfe, 0xff], "{value}");
    }
    assert_eq!([e4m3(f32::NAN), e4m3(-f32::NAN)], [[0x7f; 2], [0xff; 2]]);
    assert_eq!([e4m3(2f32.powi(-10)), e4m3(next(2f32.powi(-10)))], [[0; 2], [1; 2]]);
    assert_eq!([e4m3(-0.0), e4m3(f32::from_bits(SIGN | 1))], [[0x80; 2]; 2]);
    let e5m2 = |value: f32| {
        [Overflow::Saturate, Overflow::Nan].map(|overflow| F8E5M2::from_f32(value, overflow).to_bits())
    };
    let before = f32::from_bits(61440f32.to_bits() - 1);
    assert_eq!(e5m2(before), [0x7b, 0x7b]);
    for value in [61440.0, 65536.0, f32::MAX] {
        assert_eq!(e5m2(value), [0x7b, 0x7e], "{value}");
        assert_eq!(e5m2(-value), [0xfb, 0xfe], "{value}");
    }
    assert_eq!([e5m2(f32::INFINITY), e5m2(f32::NEG_INFINITY)], [[0x7b, 0x7c], [0xfb, 0xfc]]);
    assert_eq!([e5m2(f32::NAN), e5m2(-f32::NAN)], [[0x7e; 2], [0xfe; 2]]);
    assert_eq!(F8E5M2::from_f64(1e300, Overflow::Nan).to_bits(), 0x7e);
    assert_eq!(F8E5M2::from_f64(f64::NEG_INFINITY, Overflow::Nan).to_bits(), 0xfc);
    assert_eq!(F8E4M3::from_f64(f64::NEG_INFINITY, Overflow::Saturate).to_bits(), 0xfe);
    assert!(F8E4M3::from_f64(f64::NAN, Overflow::Saturate).to_f32().is_nan());
}

#[test]
fn slices_convert_as_their_numbers_do() {
    let bytes: Vec<F8E4M3> = (0..=u8::MAX).map(F8E4M3::from_bits).collect();
    let mut wide = vec![0.0f32; 256];
    F8E4M3::widen(&bytes, &mut wide);
    let mut back = vec![F8E4M3::default(); 256];
    F8E4M3::narrow(&wide, &mut back, Overflow::Saturate);
    for (byte, (&wide, back)) in (0..=u8::MAX).zip(wide.iter().zip(back)) {
        assert_eq!(back.to_bits(), byte);
        assert!(wide == F8E4M3::from_bits(byte).to_f32() || wide.is_nan());
    }
}

#[test]
fn they_compare_and_print_as_numbers() {
    let [zero, negative, nan] = [0x00, 0x80, 0x7f].map(F8E4M3::from_bits);
    assert!(zero == negative && nan != nan && zero < F8E4M3::from_bits(1));
    assert_eq!(format!("{} {:?}", F8E5M2::from_bits(0x3d), F8E5M2::from_bits(0xbc)), "1.25 -1.0");
}
