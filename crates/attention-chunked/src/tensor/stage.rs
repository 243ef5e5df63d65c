//! Rows on their way from a tensor to an engine: read in groups, widened, and checked for what is not finite.

use attention_core::HostView;
use half::bf16;

use super::{Floats, Operands, Source, ViewKernel};
use crate::engine::{Engine, FloatRows, STAGE, Staged};
use crate::float::Float;
use crate::simd::{CacheLevel, Kernel, Simd, prefetch};

/// How many positions ahead rows are asked for: those of neighbouring positions are as far apart as all heads
/// together, which no processor's own prefetching follows.
pub(super) const AHEAD: usize = STAGE;

impl Floats<'_> {
    /// The rows `index(0), .., index(count - 1)` of the last axis, each multiplied by `factor`, on their way
    /// to be packed; in the room, unless the engine takes them as they lie. Bit `r` of the result says that
    /// row `r` has an element that is not finite; with `clean` such a row becomes zero.
    pub(crate) fn stage<'r, E: Engine>(
        &'r self,
        engine: E,
        count: usize,
        index: &dyn Fn(usize) -> [usize; 3],
        factor: E::F,
        clean: bool,
        room: &'r mut [E::F],
    ) -> (Staged<'r, E::F>, u32) {
        if E::TAKES_BF16
            && factor == E::F::ONE
            && let Self::Bf16(view) = self
            && let Some(rows) = contiguous_rows(view, count, index)
        {
            let ahead = view.strides()[1].wrapping_mul(AHEAD as isize);
            let not_finite = engine.plain().vectorize(NotFinite { rows: &rows, ahead });
            if !clean || not_finite == 0 {
                return (Staged::Bf16(rows), not_finite);
            }
        }
        let not_finite = self.stage_floats(engine.plain(), count, index, factor, clean, room);
        let width = self.width();
        (Staged::Floats(FloatRows { data: room, stride: Self::stage_stride(width), width }), not_finite)
    }

    /// As [`stage`](Self::stage), always in the room: zero rows up to [`STAGE`],
    /// [`stage_stride`](Self::stage_stride) apart.
    pub(crate) fn stage_floats<F: Operands, S: Simd<F>>(
        &self,
        simd: S,
        count: usize,
        index: &dyn Fn(usize) -> [usize; 3],
        factor: F,
        clean: bool,
        room: &mut [F],
    ) -> u32 {
        F::vectorize(self, simd, StageRows { simd, count, index, factor, clean, to: room })
    }

    /// The distance of staged rows of `width` elements.
    pub(crate) const fn stage_stride(width: usize) -> usize {
        // Rows a power of two apart would share the sets of the cache. No memory is that large where it
        // saturates.
        match width.checked_next_multiple_of(16) {
            Some(width) => width.saturating_add(16),
            None => usize::MAX,
        }
    }

    /// Elements of the room that staging needs.
    pub(crate) const fn stage_len(width: usize) -> usize {
        STAGE.saturating_mul(Self::stage_stride(width))
    }
}

/// Some rows of the last axis, where their elements are neighbours; empty behind the last.
fn contiguous_rows<'a, T: Copy>(
    view: &HostView<'a, T>,
    count: usize,
    index: &dyn Fn(usize) -> [usize; 3],
) -> Option<[&'a [T]; STAGE]> {
    let mut rows: [&[T]; STAGE] = [&[]; STAGE];
    for (row, to) in rows[..count].iter_mut().enumerate() {
        *to = view.row(&index(row)).contiguous()?;
    }
    Some(rows)
}

/// Which of some rows of bf16 have an element that is not finite.
struct NotFinite<'r, 'a> {
    rows: &'r [&'a [bf16]; STAGE],
    /// How far away the row is that will be wanted later.
    ahead: isize,
}

impl Kernel for NotFinite<'_, '_> {
    type Output = u32;

    #[inline(always)]
    fn run(self) -> u32 {
        const EXPONENT: u16 = 0x7f80;
        let mut not_finite = 0;
        for (index, row) in self.rows.iter().enumerate().filter(|(_, row)| !row.is_empty()) {
            prefetch(CacheLevel::First, row.as_ptr().wrapping_offset(self.ahead).cast(), size_of_val(*row));
            let largest = row.iter().fold(0, |largest, x| (x.to_bits() & EXPONENT).max(largest));
            if largest == EXPONENT {
                not_finite |= 1 << index;
            }
        }
        not_finite
    }
}

struct StageRows<'r, F, S> {
    simd: S,
    count: usize,
    index: &'r dyn Fn(usize) -> [usize; 3],
    factor: F,
    clean: bool,
    to: &'r mut [F],
}

impl<F: Float, S: Simd<F>> ViewKernel for StageRows<'_, F, S> {
    type Output = u32;

    #[inline(always)]
    fn run<T: Source>(self, view: &HostView<'_, T>) -> u32 {
        let Self { simd, count, index, factor, clean, to } = self;
        let width = view.shape()[3];
        let stride = Floats::stage_stride(width);
        let mut not_finite = 0;
        let ahead = view.strides()[1].wrapping_mul(AHEAD as isize);
        for (row, to) in to.chunks_exact_mut(stride).take(STAGE).enumerate() {
            let to = &mut to[..width];
            if row >= count {
                to.fill(F::ZERO);
                continue;
            }
            let from = view.row(&index(row));
            // Zero times a number that is not finite is NaN, which every sum keeps.
            let mut nothing = simd.splat(F::ZERO);
            let mut nothing_left = F::ZERO;
            let mut done = 0;
            if let Some(from) = from.contiguous() {
                prefetch(CacheLevel::First, from.as_ptr().wrapping_offset(ahead).cast(), size_of_val(from));
                while done + S::LANES <= width {
                    // SAFETY: `done + LANES` is at most `width`, the length of both rows.
                    unsafe {
                        let x = T::load(simd, from.as_ptr().add(done));
                        nothing = simd.fma(x, simd.splat(F::ZERO), nothing);
                        simd.store(to.as_mut_ptr().add(done), simd.mul(x, simd.splat(factor)));
                    }
                    done += S::LANES;
                }
            }
            for (column, to) in to.iter_mut().enumerate().skip(done) {
                let x: F = from.at(column).widen();
                nothing_left += x * F::ZERO;
                *to = x * factor;
            }
            if simd.reduce_sum(nothing) + nothing_left != F::ZERO {
                not_finite |= 1 << row;
                if clean {
                    to.fill(F::ZERO);
                }
            }
        }
        not_finite
    }
}
