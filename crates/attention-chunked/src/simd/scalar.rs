//! Plain Rust on short arrays, which the compiler turns into whatever the target has by default.

use half::{bf16, f16};

use super::{Kernel, Simd};
use crate::float::Float;

/// The level that every machine has.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Scalar;

impl Scalar {
    /// Always there.
    pub(crate) const fn new() -> Self {
        Self
    }
}

/// A kernel that is compiled once, not in each of its callers.
#[inline(never)]
fn vectorized<K: Kernel>(kernel: K) -> K::Output {
    kernel.run()
}

/// Two SSE2 or NEON registers of f32: enough for the compiler to find a vector in.
const LANES: usize = 4;

#[inline(always)]
fn map<A: Copy, B: Default + Copy>(a: [A; LANES], f: impl Fn(A) -> B) -> [B; LANES] {
    let mut out = [B::default(); LANES];
    for lane in 0..LANES {
        out[lane] = f(a[lane]);
    }
    out
}

#[inline(always)]
fn zip<A: Copy, B: Default + Copy>(a: [A; LANES], b: [A; LANES], f: impl Fn(A, A) -> B) -> [B; LANES] {
    let mut out = [B::default(); LANES];
    for lane in 0..LANES {
        out[lane] = f(a[lane], b[lane]);
    }
    out
}

/// # Safety
/// `LANES` elements at `from` can be read.
#[inline(always)]
unsafe fn read<T: Copy, F: Float>(from: *const T, convert: impl Fn(T) -> F) -> [F; LANES] {
    let mut out = [F::ZERO; LANES];
    for (lane, out) in out.iter_mut().enumerate() {
        // SAFETY: `lane` is below LANES, which the caller vouches for.
        *out = convert(unsafe { *from.add(lane) });
    }
    out
}

impl<F: Float> Simd<F> for Scalar {
    type V = [F; LANES];
    type Mask = [bool; LANES];

    const LANES: usize = LANES;
    const TILE_ROWS: usize = 4;
    const TILE_VECTORS: usize = 2;

    #[inline(always)]
    fn vectorize<K: Kernel>(self, kernel: K) -> K::Output {
        vectorized(kernel)
    }

    #[inline(always)]
    fn splat(self, x: F) -> Self::V {
        [x; LANES]
    }
    #[inline(always)]
    unsafe fn load(self, from: *const F) -> Self::V {
        // SAFETY: the caller's.
        unsafe { read(from, |x| x) }
    }
    #[inline(always)]
    unsafe fn store(self, to: *mut F, x: Self::V) {
        for (lane, x) in x.into_iter().enumerate() {
            // SAFETY: `lane` is below LANES, which the caller vouches for.
            unsafe { *to.add(lane) = x };
        }
    }
    #[inline(always)]
    unsafe fn load_f64(self, from: *const f64) -> Self::V {
        // SAFETY: the caller's.
        unsafe { read(from, F::from_f64) }
    }
    #[inline(always)]
    unsafe fn load_f32(self, from: *const f32) -> Self::V {
        // SAFETY: the caller's.
        unsafe { read(from, F::from_f32) }
    }
    #[inline(always)]
    unsafe fn load_f16(self, from: *const f16) -> Self::V {
        // SAFETY: the caller's.
        unsafe { read(from, |x| F::from_f32(x.to_f32())) }
    }
    #[inline(always)]
    unsafe fn load_bf16(self, from: *const bf16) -> Self::V {
        // SAFETY: the caller's.
        unsafe { read(from, |x| F::from_f32(x.to_f32())) }
    }
    #[inline(always)]
    unsafe fn load_mask(self, from: *const u8) -> Self::Mask {
        let mut out = [false; LANES];
        for (lane, out) in out.iter_mut().enumerate() {
            // SAFETY: `lane` is below LANES, which the caller vouches for.
            *out = unsafe { *from.add(lane) } != 0;
        }
        out
    }

    #[inline(always)]
    fn add(self, a: Self::V, b: Self::V) -> Self::V {
        zip(a, b, |a, b| a + b)
    }
    #[inline(always)]
    fn sub(self, a: Self::V, b: Self::V) -> Self::V {
        zip(a, b, |a, b| a - b)
    }
    #[inline(always)]
    fn mul(self, a: Self::V, b: Self::V) -> Self::V {
        zip(a, b, |a, b| a * b)
    }
    #[inline(always)]
    fn div(self, a: Self::V, b: Self::V) -> Self::V {
        zip(a, b, |a, b| a / b)
    }
    #[inline(always)]
    fn fma(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V {
        self.add(self.mul(a, b), c)
    }
    #[inline(always)]
    fn fms(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V {
        self.sub(self.mul(a, b), c)
    }
    #[inline(always)]
    fn max(self, a: Self::V, b: Self::V) -> Self::V {
        zip(a, b, |a, b| if a > b { a } else { b })
    }
    #[inline(always)]
    fn min(self, a: Self::V, b: Self::V) -> Self::V {
        zip(a, b, |a, b| if a < b { a } else { b })
    }
    #[inline(always)]
    fn abs(self, a: Self::V) -> Self::V {
        map(a, F::abs)
    }
    #[inline(always)]
    fn copysign(self, a: Self::V, b: Self::V) -> Self::V {
        zip(a, b, |a, b| if b < F::ZERO { -a } else { a })
    }
    #[inline(always)]
    fn times_power_of_two(self, a: Self::V, k: Self::V) -> Self::V {
        zip(a, k, F::times_power_of_two)
    }
    #[inline(always)]
    fn less(self, a: Self::V, b: Self::V) -> Self::Mask {
        zip(a, b, |a, b| a < b)
    }
    #[inline(always)]
    fn equal(self, a: Self::V, b: Self::V) -> Self::Mask {
        zip(a, b, |a, b| a == b)
    }
    #[inline(always)]
    fn any(self, mask: Self::Mask) -> bool {
        mask.contains(&true)
    }
    #[inline(always)]
    fn select(self, mask: Self::Mask, yes: Self::V, no: Self::V) -> Self::V {
        let mut out = no;
        for lane in 0..LANES {
            out[lane] = if mask[lane] { yes[lane] } else { no[lane] };
        }
        out
    }
    #[inline(always)]
    fn reduce_sum(self, a: Self::V) -> F {
        (a[0] + a[2]) + (a[1] + a[3])
    }
    #[inline(always)]
    fn reduce_max(self, a: Self::V) -> F {
        let max = |a, b| if a > b { a } else { b };
        max(max(a[0], a[2]), max(a[1], a[3]))
    }
}
