//! Elementary functions at every level, over dense sweeps of floats.

use super::*;
use crate::Level;

/// A function of one vector, applied to a slice of whole vectors.
struct Map<'a, F, S> {
    simd: S,
    tanh: bool,
    base: Base<F>,
    values: &'a mut [F],
}

impl<F: Float, S: Simd<F>> Kernel for Map<'_, F, S> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        for chunk in self.values.chunks_exact_mut(S::LANES) {
            // SAFETY: a chunk has `LANES` elements, one vector, to be read and written.
            unsafe {
                let x = self.simd.load(chunk.as_ptr());
                let y = if self.tanh { tanh(self.simd, x) } else { power(self.simd, self.base, [x])[0] };
                self.simd.store(chunk.as_mut_ptr(), y);
            }
        }
    }
}

/// Which function; powers of a base by its logarithm to base two.
#[derive(Clone, Copy)]
enum Function<F> {
    Tanh,
    Power(F),
}

/// Both functions in both types at a level.
type Functions = (fn(&mut [f32], Function<f32>), fn(&mut [f64], Function<f64>));

fn functions() -> Vec<(Level, Functions)> {
    fn with<F: Float, S: Simd<F>>(simd: S, values: &mut [F], of: Function<F>) {
        assert!(values.len().is_multiple_of(16));
        let (tanh, log2) = match of {
            Function::Tanh => (true, F::ONE),
            Function::Power(log2) => (false, log2),
        };
        simd.vectorize(Map { simd, tanh, base: Base::new(log2), values });
    }
    let mut all: Vec<(Level, Functions)> =
        vec![(Level::Scalar, (|x, of| with(Scalar::new(), x, of), |x, of| with(Scalar::new(), x, of)))];
    #[cfg(target_arch = "x86_64")]
    {
        if Avx2::detect().is_some() {
            all.push((
                Level::Avx2,
                (|x, of| with(Avx2::detect().unwrap(), x, of), |x, of| with(Avx2::detect().unwrap(), x, of)),
            ));
        }
        if Avx512::<false>::detect().is_some() {
            all.push((
                Level::Avx512,
                (
                    |x, of| with(Avx512::<false>::detect().unwrap(), x, of),
                    |x, of| with(Avx512::<false>::detect().unwrap(), x, of),
                ),
            ));
        }
    }
    all
}

/// The distance in units in the last place at `want`, with those of the smallest normal number below it.
fn ulps_f32(got: f32, want: f64) -> f64 {
    let magnitude = (want.abs() as f32).max(f32::MIN_POSITIVE);
    (f64::from(got) - want).abs() / f64::from(f32::from_bits(magnitude.to_bits() + 1) - magnitude)
}

fn ulps_f64(got: f64, want: f64) -> f64 {
    let magnitude = want.abs().max(f64::MIN_POSITIVE);
    (got - want).abs() / (f64::from_bits(magnitude.to_bits() + 1) - magnitude)
}

/// Floats of both signs up to `limit`, densely, a whole number of vectors.
fn floats(limit: f32) -> Vec<f32> {
    let mut all: Vec<f32> = (2f32.powi(-26).to_bits()..=limit.to_bits())
        .step_by(61)
        .flat_map(|bits| [f32::from_bits(bits), -f32::from_bits(bits)])
        .collect();
    all.truncate(all.len() / 16 * 16);
    all
}

fn doubles(limit: f64) -> Vec<f64> {
    (-320_000..320_000).map(|i| limit * (f64::from(i) + 0.37) / 320_000.0).collect()
}

fn worst<T: Copy>(x: &[T], y: &[T], ulps: impl Fn(T, T) -> f64) -> f64 {
    x.iter().zip(y).map(|(&x, &y)| ulps(x, y)).fold(0.0, f64::max)
}

#[test]
fn powers_of_two_are_within_one_and_a_half_units_or_three_with_a_table() {
    for (level, (single, double)) in functions() {
        let mut x = floats(127.9);
        x.retain(|&x| x >= -126.0);
        x.truncate(x.len() / 16 * 16);
        let mut y = x.clone();
        single(&mut y, Function::Power(1.0));
        let worst_single = worst(&x, &y, |x, y| ulps_f32(y, f64::from(x).exp2()));
        let limit = if level == Level::Avx512 { 3.0 } else { 1.5 };
        assert!(worst_single <= limit, "{level}: {worst_single}");
        let x = doubles(1022.0);
        let mut y = x.clone();
        double(&mut y, Function::Power(1.0));
        // The standard library's is itself off by up to one.
        let worst_double = worst(&x, &y, |x, y| ulps_f64(y, x.exp2()));
        assert!(worst_double <= 2.5, "{level}: {worst_double}");
    }
}

#[test]
fn tanh_is_within_two_and_a_half_units() {
    for (level, (single, double)) in functions() {
        let x = floats(20.0);
        let mut y = x.clone();
        single(&mut y, Function::Tanh);
        let worst_single = worst(&x, &y, |x, y| ulps_f32(y, f64::from(x).tanh()));
        assert!(worst_single <= 2.5, "{level}: {worst_single}");
        let x = doubles(25.0);
        let mut y = x.clone();
        double(&mut y, Function::Tanh);
        let worst_double = worst(&x, &y, |x, y| ulps_f64(y, x.tanh()));
        assert!(worst_double <= 3.5, "{level}: {worst_double}");
    }
}

/// The product with the logarithm is not rounded where operations are fused: powers of e keep the digits of
/// those of two.
#[test]
fn powers_of_e_lose_no_digits_to_the_change_of_base() {
    for (level, (single, double)) in functions() {
        let mut x = floats(87.0);
        x.truncate(x.len() / 16 * 16);
        let log2 = std::f32::consts::LOG2_E;
        let mut y = x.clone();
        single(&mut y, Function::Power(log2));
        // Of the base that the rounded logarithm stands for.
        let worst_single = worst(&x, &y, |x, y| ulps_f32(y, (f64::from(x) * f64::from(log2)).exp2()));
        let limit = match level {
            // Not fused: half a unit of 125, twice.
            Level::Scalar => 100.0,
            Level::Avx512 => 3.0,
            _ => 1.5,
        };
        assert!(worst_single <= limit, "{level}: {worst_single}");
        let mut y =
            [0f64, -0.0, -1.0, -1000.0, -f64::MAX, f64::NEG_INFINITY, 3.0, -1e-300, -1e300, 0.0, 0.0, 0.0]
                .iter()
                .chain(&[0.0; 4])
                .copied()
                .collect::<Vec<_>>();
        let x = y.clone();
        double(&mut y, Function::Power(std::f64::consts::LOG2_E));
        for (x, y) in x.iter().zip(&y) {
            let want = if *x < -708.0 { 0.0 } else { x.exp() };
            assert!((y - want).abs() <= 1e-15 * want, "{level}: {x} gave {y}");
        }
    }
}

#[test]
fn special_values() {
    for (level, (single, double)) in functions() {
        let mut y = [0f32; 16];
        y[..7].copy_from_slice(&[0.0, -0.0, f32::NEG_INFINITY, f32::NAN, -1e30, f32::MIN, -149.0]);
        // Also where the exponents that give normal numbers reach further than finite numbers do.
        for log2 in [1.0, std::f32::consts::LOG2_E, 1e-37, f32::MIN_POSITIVE, 1e38, f32::MAX] {
            let mut x = y;
            single(&mut x, Function::Power(log2));
            assert_eq!(x[..3], [1.0, 1.0, 0.0], "{level} {log2}");
            assert!(x[3].is_nan(), "{level} {log2}: {x:?}");
            if log2 >= 1.0 {
                // What would be subnormal is zero.
                assert_eq!(x[4..7], [0.0; 3], "{level} {log2}");
            }
        }
        let mut x = y;
        x[7..9].copy_from_slice(&[f32::INFINITY, 1e30]);
        single(&mut x, Function::Tanh);
        assert_eq!(x[..3], [0.0, 0.0, -1.0], "{level}");
        assert!(x[3].is_nan() && x[4..7] == [-1.0; 3] && x[7..9] == [1.0; 2], "{level}: {x:?}");

        let mut x = [0f64; 16];
        x[..4].copy_from_slice(&[0.0, f64::NEG_INFINITY, f64::NAN, -1e300]);
        double(&mut x, Function::Power(1.0));
        assert_eq!(x[..2], [1.0, 0.0], "{level}");
        assert!(x[2].is_nan() && x[3] == 0.0, "{level}: {x:?}");
    }
}
