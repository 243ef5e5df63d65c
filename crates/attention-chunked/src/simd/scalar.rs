//! Plain Rust on short arrays, which the compiler turns into whatever the target has by default.

use half::{bf16, f16};

use super::elementary::power_by_polynomial;
use super::{Base, Kernel, Simd};
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

/// One or two SSE2 or NEON registers: enough for the compiler to find vectors in. Lanes are written out one
/// by one: each loop over them would be one more that the compiler must unroll wherever an operation is used.
const LANES: usize = 4;

#[inline(always)]
fn map<A: Copy, B>(a: [A; LANES], f: impl Fn(A) -> B) -> [B; LANES] {
    [f(a[0]), f(a[1]), f(a[2]), f(a[3])]
}

#[inline(always)]
fn zip<A: Copy, B>(a: [A; LANES], b: [A; LANES], f: impl Fn(A, A) -> B) -> [B; LANES] {
    [f(a[0], b[0]), f(a[1], b[1]), f(a[2], b[2]), f(a[3], b[3])]
}

/// # Safety
/// `LANES` elements at `from` can be read.
#[inline(always)]
unsafe fn read<T: Copy>(from: *const T) -> [T; LANES] {
    // SAFETY: the caller guarantees that `LANES` elements can be read; an array has the layout of its
    // elements side by side.
    unsafe { from.cast::<[T; LANES]>().read() }
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
        // SAFETY: the caller guarantees that `LANES` elements can be read.
        unsafe { read(from) }
    }
    #[inline(always)]
    unsafe fn store(self, to: *mut F, x: Self::V) {
        // SAFETY: the caller guarantees that `LANES` elements can be written; an array has the layout of its
        // elements side by side.
        unsafe { to.cast::<Self::V>().write(x) }
    }
    #[inline(always)]
    unsafe fn load_f64(self, from: *const f64) -> Self::V {
        // SAFETY: the caller guarantees that `LANES` elements can be read.
        map(unsafe { read(from) }, F::from_f64)
    }
    #[inline(always)]
    unsafe fn load_f32(self, from: *const f32) -> Self::V {
        // SAFETY: the caller guarantees that `LANES` elements can be read.
        map(unsafe { read(from) }, F::from_f32)
    }
    #[inline(always)]
    unsafe fn load_f16(self, from: *const f16) -> Self::V {
        // SAFETY: the caller guarantees that `LANES` elements can be read.
        map(unsafe { read(from) }, |x: f16| F::from_f32(x.to_f32()))
    }
    #[inline(always)]
    unsafe fn load_bf16(self, from: *const bf16) -> Self::V {
        // SAFETY: the caller guarantees that `LANES` elements can be read.
        map(unsafe { read(from) }, |x: bf16| F::from_f32(x.to_f32()))
    }
    #[inline(always)]
    unsafe fn load_mask(self, from: *const u8) -> Self::Mask {
        // SAFETY: the caller guarantees that `LANES` bytes can be read.
        map(unsafe { read(from) }, |x| x != 0)
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
        mask[0] | mask[1] | mask[2] | mask[3]
    }
    #[inline(always)]
    fn select(self, mask: Self::Mask, yes: Self::V, no: Self::V) -> Self::V {
        // A loop, unlike the others: of lanes written out the compiler made branches (the softmax took a
        // third longer).
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
    #[inline(always)]
    fn power<const COUNT: usize>(self, base: Base<F>, x: [Self::V; COUNT]) -> [Self::V; COUNT] {
        power_by_polynomial(self, base, x)
    }
}
