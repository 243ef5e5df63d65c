//! Vectors of one instruction set, behind one trait: kernels are written once, over [`Simd`], and compiled
//! for each level in its file.
//!
//! A value of a type that implements [`Simd`] is the proof that the machine has the level: it is made by
//! detection alone. Whatever uses its operations must be inlined into [`Simd::vectorize`], which is where the
//! instructions are enabled; so kernels are structs whose `run` and helpers are `#[inline(always)]`.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod elementary;
mod scalar;
#[cfg(target_arch = "x86_64")]
mod x86;

use half::{bf16, f16};

use crate::float::Float;

#[cfg(target_arch = "x86_64")]
pub(crate) use avx2::Avx2;
#[cfg(target_arch = "x86_64")]
pub(crate) use avx512::Avx512;
pub(crate) use elementary::{power, tanh};
pub(crate) use scalar::Scalar;

/// A loop nest that is compiled for each level.
pub(crate) trait Kernel {
    /// What it returns.
    type Output;

    /// Must be `#[inline(always)]`, like everything in it that uses vectors.
    fn run(self) -> Self::Output;
}

/// The base of powers, by its logarithm: `2^log2`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Base<F> {
    /// The logarithm to base two: positive, finite and a normal number.
    pub(crate) log2: F,
    /// The exponent below which a power would be less than the smallest normal number. Finite, so that -inf
    /// is below.
    pub(crate) least: F,
}

impl<F: Float> Base<F> {
    /// Of a logarithm that is positive, finite and a normal number.
    pub(crate) fn new(log2: F) -> Self {
        let least = F::EXPONENTS[0] / log2;
        Self { log2, least: if least < -F::LARGEST { -F::LARGEST } else { least } }
    }
}

/// Vector operations on one kind of float, at one level.
///
/// # Safety
/// The methods that take pointers are unsafe and say how many elements they reach. The others are safe
/// because a value of the type proves that the instructions exist.
pub(crate) trait Simd<F: Float>: Copy + Send + Sync + std::fmt::Debug + 'static {
    /// A vector.
    type V: Copy;
    /// One truth value for each lane.
    type Mask: Copy;

    /// Elements of a vector.
    const LANES: usize;
    /// Rows of the register tile of a matrix product.
    const TILE_ROWS: usize;
    /// Vectors in a row of the register tile: 1, 2 or 4.
    const TILE_VECTORS: usize;
    /// Vectors whose exponentials are computed side by side: as many as registers allow, 2 or 4.
    const SIDE_BY_SIDE: usize = 2;
    /// Columns of the register tile.
    const TILE_COLUMNS: usize = Self::LANES * Self::TILE_VECTORS;

    /// Runs a kernel with the instructions of the level.
    fn vectorize<K: Kernel>(self, kernel: K) -> K::Output;

    /// The same number in every lane.
    fn splat(self, x: F) -> Self::V;
    /// `LANES` elements at `from`.
    ///
    /// # Safety
    /// The elements can be read.
    unsafe fn load(self, from: *const F) -> Self::V;
    /// Writes `LANES` elements at `to`.
    ///
    /// # Safety
    /// The elements can be written.
    unsafe fn store(self, to: *mut F, x: Self::V);
    /// `LANES` elements of another type, converted.
    ///
    /// # Safety
    /// `LANES` elements at `from` can be read.
    unsafe fn load_f64(self, from: *const f64) -> Self::V;
    /// `LANES` elements of another type, converted.
    ///
    /// # Safety
    /// `LANES` elements at `from` can be read.
    unsafe fn load_f32(self, from: *const f32) -> Self::V;
    /// `LANES` elements of another type, converted.
    ///
    /// # Safety
    /// `LANES` elements at `from` can be read.
    unsafe fn load_f16(self, from: *const f16) -> Self::V;
    /// `LANES` elements of another type, converted.
    ///
    /// # Safety
    /// `LANES` elements at `from` can be read.
    unsafe fn load_bf16(self, from: *const bf16) -> Self::V;
    /// Which of `LANES` bytes are not zero.
    ///
    /// # Safety
    /// `LANES` bytes at `from` can be read.
    unsafe fn load_mask(self, from: *const u8) -> Self::Mask;

    /// `a + b`.
    fn add(self, a: Self::V, b: Self::V) -> Self::V;
    /// `a - b`.
    fn sub(self, a: Self::V, b: Self::V) -> Self::V;
    /// `a * b`.
    fn mul(self, a: Self::V, b: Self::V) -> Self::V;
    /// `a / b`.
    fn div(self, a: Self::V, b: Self::V) -> Self::V;
    /// `a * b + c`, fused where the level has the instruction.
    fn fma(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    /// `a * b - c`, the same.
    fn fms(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    /// The larger; `b` where either is NaN.
    fn max(self, a: Self::V, b: Self::V) -> Self::V;
    /// The smaller; `b` where either is NaN.
    fn min(self, a: Self::V, b: Self::V) -> Self::V;
    /// The absolute value.
    fn abs(self, a: Self::V) -> Self::V;
    /// `a` with the sign of `b`; `a` must not be negative.
    fn copysign(self, a: Self::V, b: Self::V) -> Self::V;
    /// `a * 2^k` for integers `k` inside [`Float::EXPONENTS`]; any number for others.
    fn times_power_of_two(self, a: Self::V, k: Self::V) -> Self::V;
    /// `a < b`, false for NaN.
    fn less(self, a: Self::V, b: Self::V) -> Self::Mask;
    /// `a == b`, false for NaN.
    fn equal(self, a: Self::V, b: Self::V) -> Self::Mask;
    /// `yes` where the mask is true, `no` elsewhere.
    fn select(self, mask: Self::Mask, yes: Self::V, no: Self::V) -> Self::V;
    /// Whether the mask is true anywhere.
    fn any(self, mask: Self::Mask) -> bool;
    /// The sum of the lanes, by halves.
    fn reduce_sum(self, a: Self::V) -> F;
    /// The largest lane; a NaN may win or lose.
    fn reduce_max(self, a: Self::V) -> F;

    /// Powers of vectors side by side, as [`power`] says; from a polynomial alone, unless the level has a
    /// table.
    fn power<const COUNT: usize>(self, base: Base<F>, x: [Self::V; COUNT]) -> [Self::V; COUNT];

    /// The same, each multiplied by a factor.
    #[inline(always)]
    fn scaled_power<const COUNT: usize>(
        self,
        base: Base<F>,
        x: [Self::V; COUNT],
        factors: [Self::V; COUNT],
    ) -> [Self::V; COUNT] {
        let mut powers = self.power(base, x);
        for (power, &factor) in powers.iter_mut().zip(&factors) {
            *power = self.mul(*power, factor);
        }
        powers
    }

    /// Transposes `LANES x LANES` elements: `to[j * to_row + i] = from[i * from_row + j]`.
    ///
    /// # Safety
    /// `LANES` rows of `LANES` elements can be read and written at these distances.
    #[inline(always)]
    unsafe fn transpose(self, from: *const F, from_row: usize, to: *mut F, to_row: usize) {
        for i in 0..Self::LANES {
            for j in 0..Self::LANES {
                // SAFETY: both indices are below `LANES`, and the caller guarantees that `LANES` rows of
                // `LANES` elements can be read and written.
                unsafe { *to.add(j * to_row + i) = *from.add(i * from_row + j) };
            }
        }
    }
}

/// The cache that lines are prefetched into.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum CacheLevel {
    /// For rows that are read soon.
    First,
    /// For rows whose addresses have no pattern: more lines can be on their way to the second-level cache at
    /// a time than to the first, and the processor's own prefetching brings none of them.
    Second,
}

/// Prefetches the cache lines of `bytes` bytes, at least one, from `from` on. Any address will do: nothing is
/// read.
///
/// The line of the last byte is one more where the first byte lies inside a line, as it does in nearly every
/// allocation, whose data begin 16 bytes behind a page's. Without it, decoding took 1.2 to 1.4 times as long.
#[inline(always)]
pub(crate) fn prefetch(level: CacheLevel, from: *const u8, bytes: usize) {
    match level {
        CacheLevel::First => prefetch_lines::<false>(from, bytes),
        CacheLevel::Second => prefetch_lines::<true>(from, bytes),
    }
}

/// The same without the line of the first byte, for where the bytes before are prefetched too.
#[inline(always)]
pub(crate) fn prefetch_behind(level: CacheLevel, from: *const u8, bytes: usize) {
    match level {
        CacheLevel::First => prefetch_lines_behind::<false>(from, bytes),
        CacheLevel::Second => prefetch_lines_behind::<true>(from, bytes),
    }
}

#[inline(always)]
fn prefetch_lines<const SECOND: bool>(from: *const u8, bytes: usize) {
    for offset in (0..bytes).step_by(64) {
        prefetch_line::<SECOND>(from.wrapping_add(offset));
    }
    prefetch_line::<SECOND>(from.wrapping_add(bytes).wrapping_sub(1));
}

#[inline(always)]
fn prefetch_lines_behind<const SECOND: bool>(from: *const u8, bytes: usize) {
    for offset in (0..bytes).step_by(64) {
        prefetch_line::<SECOND>(from.wrapping_add((offset + 63).min(bytes - 1)));
    }
}

/// Prefetches the cache line of an address into the first-level or the `SECOND`-level cache, where the
/// machine has an instruction for it.
#[inline(always)]
fn prefetch_line<const SECOND: bool>(address: *const u8) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{_MM_HINT_T0, _MM_HINT_T1, _mm_prefetch};
        // SAFETY: every x86-64 processor has the instruction, which never faults.
        unsafe {
            if SECOND {
                _mm_prefetch::<_MM_HINT_T1>(address.cast());
            } else {
                _mm_prefetch::<_MM_HINT_T0>(address.cast());
            }
        }
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = address;
}

#[cfg(test)]
mod tests;
