//! Elementary functions at every level, over dense sweeps of floats.

use super::*;
use crate::Level;

/// A function of one vector, applied to a slice of whole vectors.
struct Map<'a, F, S> {
    simd: S,
    tanh: bool,
    values: &'a mut [F],
}

impl<F: Float, S: Simd<F>> Kernel for Map<'_, F, S> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        for chunk in self.values.chunks_exact_mut(S::LANES) {
            // SAFETY: a chunk is one vector.
            unsafe {
                let x = self.simd.load(chunk.as_ptr());
                let y =
                    if self.tanh { tanh(self.simd, x) } else { exp2::<F, S, false, 1>(self.simd, [x])[0] };
                self.simd.store(chunk.as_mut_ptr(), y);
            }
        }
    }
}

/// Both functions in both types at a level.
type Functions = (fn(&mut [f32], bool), fn(&mut [f64], bool));

fn functions() -> Vec<(Level, Functions)> {
    fn with<F: Float, S: Simd<F>>(simd: S, values: &mut [F], tanh: bool) {
        assert!(values.len().is_multiple_of(16));
        simd.vectorize(Map { simd, tanh, values });
    }
    let mut all: Vec<(Level, Functions)> = vec![(
        Level::Scalar,
        (|x, tanh| with(Scalar::new(), x, tanh), |x, tanh| with(Scalar::new(), x, tanh)),
    )];
    #[cfg(target_arch = "x86_64")]
    {
        if Avx2::detect().is_some() {
            all.push((
                Level::Avx2,
                (
                    |x, tanh| with(Avx2::detect().unwrap(), x, tanh),
                    |x, tanh| with(Avx2::detect().unwrap(), x, tanh),
                ),
            ));
        }
        if Avx512::<false>::detect().is_some() {
            all.push((
                Level::Avx512,
                (
                    |x, tanh| with(Avx512::<false>::detect().unwrap(), x, tanh),
                    |x, tanh| with(Avx512::<false>::detect().unwrap(), x, tanh),
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
fn exp2_is_within_one_and_a_half_units_or_three_with_a_table() {
    for (level, (single, double)) in functions() {
        let mut x = floats(127.9);
        x.retain(|&x| x >= -126.0);
        x.truncate(x.len() / 16 * 16);
        let mut y = x.clone();
        single(&mut y, false);
        let worst_single = worst(&x, &y, |x, y| ulps_f32(y, f64::from(x).exp2()));
        let limit = if level == Level::Avx512 { 3.0 } else { 1.5 };
        assert!(worst_single <= limit, "{level}: {worst_single}");
        let x = doubles(1022.0);
        let mut y = x.clone();
        double(&mut y, false);
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
        single(&mut y, true);
        let worst_single = worst(&x, &y, |x, y| ulps_f32(y, f64::from(x).tanh()));
        assert!(worst_single <= 2.5, "{level}: {worst_single}");
        let x = doubles(25.0);
        let mut y = x.clone();
        double(&mut y, true);
        let worst_double = worst(&x, &y, |x, y| ulps_f64(y, x.tanh()));
        assert!(worst_double <= 3.5, "{level}: {worst_double}");
    }
}

#[test]
fn special_values() {
    for (level, (single, double)) in functions() {
        let mut y = [0f32; 16];
        y[..8].copy_from_slice(&[0.0, -0.0, f32::NEG_INFINITY, f32::INFINITY, f32::NAN, -1e30, 1e30, -149.0]);
        let mut x = y;
        single(&mut x, false);
        assert_eq!(x[..4], [1.0, 1.0, 0.0, f32::INFINITY], "{level}");
        assert!(x[4].is_nan() && x[5] == 0.0 && x[6] == f32::INFINITY, "{level}: {x:?}");
        // What would be subnormal is zero.
        assert_eq!(x[7], 0.0, "{level}");
        let mut x = y;
        single(&mut x, true);
        assert_eq!(x[..4], [0.0, 0.0, -1.0, 1.0], "{level}");
        assert!(x[4].is_nan() && x[5] == -1.0 && x[6] == 1.0, "{level}: {x:?}");

        let mut x = [0f64; 16];
        x[..5].copy_from_slice(&[0.0, f64::NEG_INFINITY, f64::INFINITY, f64::NAN, -1e300]);
        double(&mut x, false);
        assert_eq!(x[..3], [1.0, 0.0, f64::INFINITY], "{level}");
        assert!(x[3].is_nan() && x[4] == 0.0, "{level}: {x:?}");
    }
}
