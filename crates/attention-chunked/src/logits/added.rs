//! What is added to a row of products: bias and ALiBi, masks.

use std::ops::Range;

use attention_core::Row;

use super::terms::{QueryRow, Terms, broadcast};
use crate::float::Float;
use crate::simd::{CacheLevel, Kernel, Simd, prefetch};
use crate::tensor::{Floats, Source, typed};

/// What a row's products meet on their way to logits.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Added<'r, F> {
    /// Bias less ALiBi; where it is -inf a key takes no part. Products are multiplied by [`Terms::factor`]
    /// where it is added, and are logits without it.
    pub(super) bias: Option<&'r [F]>,
    /// Makes -inf of where it is zero.
    pub(super) mask: Option<&'r [u8]>,
}

/// Memory for what is added to a row, where it does not lie in the caller's as it is used. Cleared where it
/// is first used: that takes longer than all else of a block of few keys.
#[derive(Default)]
pub(crate) struct AddedRow<F> {
    bias: Option<[F; MAX_COLUMNS]>,
    mask: Option<[u8; MAX_COLUMNS]>,
}

/// Columns of the longest row of a tile.
pub(crate) const MAX_COLUMNS: usize = 272;

/// How many rows ahead bias and mask are asked for: a piece of a row is too short for the processor's own
/// prefetching.
const AHEAD: usize = 4;

impl<'a, F: Float> Terms<'a, F> {
    /// Masks what structure masks in a row of products, the first of these, and gives what is to be added to
    /// it: as many elements as the row has columns, at most [`MAX_COLUMNS`], which may lie in `memory`.
    /// Column 0 is key `first`; the columns are a multiple of the vector's lanes.
    #[inline(always)]
    pub(super) fn added<'r, S: Simd<F>>(
        &'r self,
        simd: S,
        rows: &[QueryRow],
        first: usize,
        tile: &mut [F],
        memory: &'r mut AddedRow<F>,
    ) -> Added<'r, F> {
        simd.vectorize(AddedOf { terms: self, simd, rows, first, tile, memory })
    }

    /// The ALiBi slope of a row's head.
    #[inline(always)]
    fn slope(&self, row: &QueryRow) -> Option<F> {
        let slopes = self.slopes.as_ref()?;
        Some(if self.slopes_per_batch { slopes.at(&[row.batch, row.head]) } else { slopes.at(&[row.head]) })
    }
}

/// [`Terms::added`], compiled once for all kernels of a level.
struct AddedOf<'t, 'a, 'i, 'r, F, S> {
    terms: &'r Terms<'a, F>,
    simd: S,
    rows: &'i [QueryRow],
    first: usize,
    tile: &'t mut [F],
    memory: &'r mut AddedRow<F>,
}

impl<'r, F: Float, S: Simd<F>> Kernel for AddedOf<'_, '_, '_, 'r, F, S> {
    type Output = Added<'r, F>;

    #[inline(always)]
    fn run(self) -> Added<'r, F> {
        let Self { terms, simd, rows, first, tile, memory } = self;
        let row = &rows[0];
        let columns = tile.len();
        assert!(columns <= MAX_COLUMNS && columns.is_multiple_of(S::LANES));
        let AddedRow { bias: bias_memory, mask: mask_memory } = memory;
        let (begin, end) = seen(row, first, columns);
        tile[..begin].fill(F::NEG_INFINITY);
        tile[end..].fill(F::NEG_INFINITY);
        let mut added = Added::default();
        if let Some((mask, shape)) = &terms.mask {
            let bytes = mask.row(&broadcast(shape, [row.batch, row.head, row.query]));
            if let Some(next) = rows.get(AHEAD) {
                ahead(mask.row(&broadcast(shape, [next.batch, next.head, next.query])), first, columns);
            }
            if bytes.len() == 1 {
                if bytes.at(0) == 0 {
                    tile.fill(F::NEG_INFINITY);
                    return added;
                }
            } else {
                let direct = bytes.contiguous().and_then(|bytes| bytes.get(first..first + columns));
                added.mask = Some(direct.unwrap_or_else(|| {
                    let mask_room = mask_memory.get_or_insert([0; MAX_COLUMNS]);
                    for (column, to) in mask_room[begin..end].iter_mut().enumerate() {
                        *to = bytes.at(first + begin + column);
                    }
                    &mask_room[..columns]
                }));
            }
        }
        let slope = terms.slope(row);
        if let Some((bias, shape)) = &terms.bias {
            let index = broadcast(shape, [row.batch, row.head, row.query]);
            typed!(bias, bias => {
                let bias_row = bias.row(&index);
                if let Some(next) = rows.get(AHEAD) {
                    ahead(bias.row(&broadcast(shape, [next.batch, next.head, next.query])), first, columns);
                }
                let direct = if slope.is_none() && !terms.narrows_bias && begin == 0 && end == columns {
                    bias_row.contiguous().and_then(|bias| bias.get(first..first + columns)).and_then(Source::floats)
                } else {
                    None
                };
                if direct.is_some() {
                    added.bias = direct;
                    return added;
                }
                let bias_room = bias_memory.get_or_insert([F::ZERO; MAX_COLUMNS]);
                stage_bias(simd, bias_row, first, begin..end, bias_room);
            });
            if terms.narrows_bias {
                let bias_room = bias_memory.get_or_insert([F::ZERO; MAX_COLUMNS]);
                for x in &mut bias_room[begin..end] {
                    *x = F::from_f32(x.to_f32());
                }
            }
        } else if slope.is_none() {
            return added;
        }
        let bias_room = bias_memory.get_or_insert([F::ZERO; MAX_COLUMNS]);
        if let Some(slope) = slope {
            let position = terms.problem.position(row.batch, row.query);
            let ahead = position.saturating_sub(first as i64);
            add_alibi(simd, slope, ahead, terms.bias.is_some(), begin..end, bias_room);
        }
        // What structure masks stays so, whatever the bias holds there.
        bias_room[..begin].fill(F::ZERO);
        bias_room[end..columns].fill(F::ZERO);
        added.bias = Some(&bias_room[..columns]);
        added
    }
}

/// Adds ALiBi, the slope times the distance of each key, negated, to the vectors of a row of bias, or to
/// zeros, that have columns in `range`; `ahead` is how far the query's position is ahead of column 0. What
/// masks stays so.
#[inline(always)]
fn add_alibi<F: Float, S: Simd<F>>(
    simd: S,
    slope: F,
    ahead: i64,
    has_bias: bool,
    range: Range<usize>,
    to: &mut [F; MAX_COLUMNS],
) {
    // Distances up to 2^24 are exact in every precision, as are their differences.
    let is_near = ahead.unsigned_abs() < (1 << 24) - MAX_COLUMNS as u64;
    let mut lanes = [F::ZERO; 64];
    for (lane, value) in lanes.iter_mut().enumerate() {
        *value = F::from_difference(lane as i64);
    }
    // SAFETY: `lanes` has 64 elements, and no vector has more.
    let offsets = unsafe { simd.load(lanes.as_ptr()) };
    let (slope, nothing) = (simd.splat(-slope), simd.splat(F::NEG_INFINITY));
    for column in (range.start / S::LANES * S::LANES..range.end).step_by(S::LANES) {
        let distance = if is_near {
            simd.sub(simd.splat(F::from_difference(ahead - column as i64)), offsets)
        } else {
            // Rounded once, whichever column of a tile a key is.
            for (lane, value) in lanes[..S::LANES].iter_mut().enumerate() {
                *value = F::from_difference(ahead.saturating_sub((column + lane) as i64));
            }
            // SAFETY: `lanes` has 64 elements, and no vector has more.
            unsafe { simd.load(lanes.as_ptr()) }
        };
        // SAFETY: `column` is a multiple of `LANES` below `range.end`, which the only caller keeps within the
        // row's columns: whole vectors, at most `MAX_COLUMNS`, as it asserts. So the vector is inside `to`.
        unsafe {
            let at = to.as_mut_ptr().add(column);
            let bias = if has_bias { simd.load(at) } else { simd.splat(F::ZERO) };
            let sum = simd.fma(slope, simd.abs(distance), bias);
            simd.store(at, simd.select(simd.equal(bias, nothing), nothing, sum));
        }
    }
}

/// The columns that structure lets a row see, begin and end.
#[inline(always)]
fn seen(row: &QueryRow, first: usize, columns: usize) -> (usize, usize) {
    let begin = row.begin.clamp(first, first + columns) - first;
    (begin, row.end.clamp(first + begin, first + columns) - first)
}

/// Asks for columns of a row that will be needed.
#[inline(always)]
fn ahead<T: Copy>(row: Row<'_, T>, first: usize, columns: usize) {
    if let Some(row) = row.contiguous().and_then(|row| row.get(first..first + columns)) {
        prefetch(CacheLevel::First, row.as_ptr().cast(), size_of_val(row));
    }
}

/// Copies the columns in `range` of a row of the bias, converted.
#[inline(always)]
fn stage_bias<F: Float, S: Simd<F>, T: Source>(
    simd: S,
    bias: Row<'_, T>,
    first: usize,
    range: Range<usize>,
    to: &mut [F],
) {
    let to = &mut to[range.clone()];
    if bias.len() == 1 {
        to.fill(bias.at(0).widen());
        return;
    }
    let start = first + range.start;
    let mut done = 0;
    if let Some(bias) = bias.contiguous() {
        let bias = &bias[start..start + to.len()];
        while done + S::LANES <= to.len() {
            // SAFETY: `done + LANES` is at most `to.len()`, which is the length of both slices.
            unsafe { simd.store(to.as_mut_ptr().add(done), T::load(simd, bias.as_ptr().add(done))) };
            done += S::LANES;
        }
    }
    for (column, to) in to.iter_mut().enumerate().skip(done) {
        *to = bias.at(start + column).widen();
    }
}
