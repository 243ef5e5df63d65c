//! A row of a key or a value as it lies in the caller's tensor: vectors of it, and prefetches of those behind
//! it.

use attention_core::Row;

use crate::float::Float;
use crate::simd::{CacheLevel, Simd, prefetch, prefetch_behind};
use crate::tensor::Source;

/// How many keys ahead rows are prefetched: rows of neighbouring keys are as far apart as all heads together,
/// often a page or more, which no processor's own prefetching bridges. 16 takes 1.01 to 1.15 times less than
/// 8 on an AMD EPYC (AVX2 and AVX-512, 4096 keys); 4 and 32 are faster and slower by case.
pub(super) const AHEAD: usize = 16;

/// A key or its value. Whether its elements are neighbours is a constant of the kernel: in a loop that may
/// also call `gather`, the compiler keeps the sums in memory, and the loop takes nearly twice as long.
pub(super) struct KeyRow<'v, const STRIDED: bool, T> {
    pub(super) row: Row<'v, T>,
    /// Empty if STRIDED.
    neighbours: &'v [T],
}

impl<'v, const STRIDED: bool, T: Source> KeyRow<'v, STRIDED, T> {
    /// # Panics
    /// Unless STRIDED, where the elements are not neighbours, or not `width`.
    #[inline(always)]
    pub(super) fn new(row: Row<'v, T>, width: usize) -> Self {
        let neighbours = if STRIDED { None } else { row.contiguous() }.unwrap_or_default();
        assert!(STRIDED || neighbours.len() == width, "elements side by side");
        Self { row, neighbours }
    }

    /// Prefetches `bytes` of the row that lies `ahead` elements behind this one, from its element `at` on;
    /// those before it are prefetched too.
    #[inline(always)]
    pub(super) fn prefetch(&self, level: CacheLevel, ahead: isize, at: usize, bytes: usize) {
        if !STRIDED {
            let from = self.neighbours.as_ptr().wrapping_offset(ahead).wrapping_add(at).cast();
            if at == 0 {
                prefetch(level, from, bytes);
            } else {
                prefetch_behind(level, from, bytes);
            }
        }
    }

    /// A vector of it.
    ///
    /// # Safety
    /// The row has `at + LANES` elements.
    #[inline(always)]
    pub(super) unsafe fn load<F: Float, S: Simd<F>>(&self, simd: S, at: usize) -> S::V {
        // SAFETY: the caller guarantees that the row has `at + LANES` elements; without STRIDED, `new`
        // checked that the neighbours are the whole row.
        unsafe {
            if STRIDED {
                load_row(simd, &self.row, at)
            } else {
                T::load(simd, self.neighbours.as_ptr().add(at))
            }
        }
    }
}

/// A vector of a row, whatever the stride of its elements.
///
/// # Safety
/// The row has `at + LANES` elements.
#[inline(always)]
pub(super) unsafe fn load_row<F: Float, S: Simd<F>, T: Source>(simd: S, row: &Row<'_, T>, at: usize) -> S::V {
    match row.contiguous() {
        // SAFETY: the caller guarantees that the row has `at + LANES` elements.
        Some(row) => unsafe { T::load(simd, row.as_ptr().add(at)) },
        None => {
            let mut lanes = [F::ZERO; 64];
            gather(row, at, &mut lanes[..S::LANES]);
            // SAFETY: `lanes` has 64 elements, and no vector has more.
            unsafe { simd.load(lanes.as_ptr()) }
        }
    }
}

/// Elements of a row whose elements are not neighbours, from `at` on. Compiled once, not for each vector of
/// each kernel.
#[inline(never)]
fn gather<F: Float, T: Source>(row: &Row<'_, T>, at: usize, to: &mut [F]) {
    for (lane, to) in to.iter_mut().enumerate() {
        *to = row.at(at + lane).widen();
    }
}
