//! Weighted sums of values as they lie, with those that are not finite apart.

use attention_core::{HeadView, HostView};

use super::layout::STRIDE;
use super::row::{KeyRow, load_row};
use super::runs::KeyRuns;
use crate::float::Float;
use crate::paths::{Path, Taken};
use crate::scratch::extent;
use crate::simd::{Kernel, Simd};
use crate::tensor::{Source, ViewKernel, is_strided};

/// Rows that share one pass over the values.
const ROW_GROUP: usize = 4;

/// `values[row] = factors[row] * values[row] + sum over keys of weights[row][key] * value[key]`, for values
/// as they lie. A value that is not finite counts for the rows in which its key takes part alone: sums that
/// are not finite are summed once more, with zeros in the place of such values and those added apart, so the
/// other rows keep their bits.
pub(super) struct WeightedSums<'r, F, S> {
    pub(super) simd: S,
    pub(super) key_head: usize,
    pub(super) keys: KeyRuns<'r>,
    pub(super) rows: usize,
    pub(super) weights: &'r [F],
    pub(super) factors: &'r [F],
    /// The sums of weights, which are NaN in a row that no care can help.
    pub(super) totals: &'r [F],
    pub(super) values: &'r mut [F],
    pub(super) taken: &'r Taken,
}

impl<F: Float, S: Simd<F>> ViewKernel for WeightedSums<'_, F, S> {
    type Output = ();

    #[inline(always)]
    fn run<T: Source>(mut self, view: &HostView<'_, T>) {
        let width = view.shape()[3];
        assert!(self.keys.len() <= STRIDE);
        assert!(extent(self.rows, STRIDE, self.keys.len()) <= self.weights.len());
        assert!(self.rows.saturating_mul(width) <= self.values.len());
        assert!(self.rows <= self.factors.len() && self.rows <= self.totals.len());
        let head = view.head(self.key_head);
        if is_strided(view) {
            (0..self.rows).for_each(|row| self.group::<1, true, T>(head, row));
            return;
        }
        for row in (0..self.rows).step_by(ROW_GROUP) {
            match (self.rows - row).min(ROW_GROUP) {
                1 => self.group::<1, false, T>(head, row),
                2 => self.group::<2, false, T>(head, row),
                3 => self.group::<3, false, T>(head, row),
                _ => self.group::<ROW_GROUP, false, T>(head, row),
            }
        }
    }
}

impl<F: Float, S: Simd<F>> WeightedSums<'_, F, S> {
    /// `ROWS` rows from `first` on.
    #[inline(always)]
    fn group<const ROWS: usize, const STRIDED: bool, T: Source>(
        &mut self,
        head: HeadView<'_, T>,
        first: usize,
    ) {
        let width = head.width();
        let mut done = 0;
        while !STRIDED && ROWS <= 2 && done + 8 * S::LANES <= width {
            self.columns::<ROWS, 8, STRIDED, T>(head, first, done);
            done += 8 * S::LANES;
        }
        while !STRIDED && done + 4 * S::LANES <= width {
            self.columns::<ROWS, 4, STRIDED, T>(head, first, done);
            done += 4 * S::LANES;
        }
        while done + S::LANES <= width {
            self.columns::<ROWS, 1, STRIDED, T>(head, first, done);
            done += S::LANES;
        }
        let (keys, weights, taken) = (self.keys, self.weights, self.taken);
        for column in done..width {
            let mut sums = [F::ZERO; ROWS];
            for (index, row) in keys.rows(head).enumerate() {
                let value: F = row.at(column).widen();
                for (row, sum) in sums.iter_mut().enumerate() {
                    *sum += weights[(first + row) * STRIDE + index] * value;
                }
            }
            for (row, mut sum) in sums.into_iter().enumerate() {
                let row = first + row;
                if !sum.is_finite() && !self.totals[row].is_nan() {
                    taken.mark(Path::DecodeValuesApart);
                    sum = careful_sum(head, keys, column, &weights[row * STRIDE..]);
                }
                let to = &mut self.values[row * width + column];
                *to = *to * self.factors[row] + sum;
            }
        }
    }

    /// `VECTORS` vectors of columns from `column` on, which the values have.
    #[inline(always)]
    fn columns<const ROWS: usize, const VECTORS: usize, const STRIDED: bool, T: Source>(
        &mut self,
        head: HeadView<'_, T>,
        first: usize,
        column: usize,
    ) {
        let simd = self.simd;
        let width = head.width();
        let mut sums = [[simd.splat(F::ZERO); VECTORS]; ROWS];
        let mut index = 0;
        let level = self.keys.prefetched_into();
        for run in self.keys.runs() {
            let rows = run.rows(head);
            let ahead = run.ahead(head);
            for key in 0..run.len() {
                let row = KeyRow::<STRIDED, T>::new(rows.row(key), width);
                row.prefetch(level, ahead, column, VECTORS * S::LANES * size_of::<T>());
                let mut values = [simd.splat(F::ZERO); VECTORS];
                for (vector, value) in values.iter_mut().enumerate() {
                    // SAFETY: `group`, the only caller, keeps `column + VECTORS * LANES` within the width of
                    // a value, and this is one of those vectors.
                    *value = unsafe { row.load(simd, column + vector * S::LANES) };
                }
                for (row, sums) in sums.iter_mut().enumerate() {
                    let weight = simd.splat(self.weights[(first + row) * STRIDE + index]);
                    for (sum, &value) in sums.iter_mut().zip(&values) {
                        *sum = simd.fma(weight, value, *sum);
                    }
                }
                index += 1;
            }
        }
        // A copy, so that the sums of the loop stay in registers.
        let done = sums;
        let sums = done.as_flattened();
        let rows = first..first + ROWS;
        simd.vectorize(AddSums {
            simd,
            head,
            keys: self.keys,
            weights: &self.weights[first * STRIDE..],
            factors: &self.factors[rows.clone()],
            totals: &self.totals[rows],
            taken: self.taken,
            sums,
            vectors: VECTORS,
            column,
            values: &mut self.values[first * width..],
        });
    }
}

/// Adds the sums of some rows to their values. Compiled once for all numbers of rows and columns.
struct AddSums<'k, 'v, F: Float, S: Simd<F>, T> {
    simd: S,
    head: HeadView<'v, T>,
    keys: KeyRuns<'k>,
    weights: &'k [F],
    /// One for each row, as `totals` has.
    factors: &'k [F],
    totals: &'k [F],
    taken: &'k Taken,
    /// Some vectors for each row.
    sums: &'k [S::V],
    vectors: usize,
    /// The first column, of as many vectors, which the values have.
    column: usize,
    values: &'k mut [F],
}

impl<F: Float, S: Simd<F>, T: Source> Kernel for AddSums<'_, '_, F, S, T> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        let Self { simd, head, keys, weights, factors, totals, taken, sums, vectors, column, values } = self;
        let width = head.width();
        let zero = simd.splat(F::ZERO);
        for (row, (sums, (&factor, total))) in
            sums.chunks_exact(vectors).zip(factors.iter().zip(totals)).enumerate()
        {
            // Zero times what is not finite is NaN, which every sum keeps.
            let nothing = sums.iter().fold(zero, |nothing, &sum| simd.fma(sum, zero, nothing));
            let to = &mut values[row * width + column..][..vectors * S::LANES];
            if simd.reduce_sum(nothing) != F::ZERO && !total.is_nan() {
                taken.mark(Path::DecodeValuesApart);
                let weights = &weights[row * STRIDE..];
                simd.vectorize(CarefulSums { simd, head, keys, column, weights, factor, to });
                continue;
            }
            for (to, &sum) in to.chunks_exact_mut(S::LANES).zip(sums) {
                scale_and_add(simd, to, factor, sum);
            }
        }
    }
}

/// `to = factor * to + sum`, for a vector of values.
#[inline(always)]
fn scale_and_add<F: Float, S: Simd<F>>(simd: S, to: &mut [F], factor: F, sum: S::V) {
    assert_eq!(to.len(), S::LANES);
    let at = to.as_mut_ptr();
    // SAFETY: `to` has `LANES` elements, as asserted above.
    unsafe { simd.store(at, simd.fma(simd.load(at), simd.splat(factor), sum)) };
}

/// The sums of some whole vectors of columns of a row, with values that are not finite apart: what is finite
/// is summed as it always is. Rare, so compiled once for all numbers of rows and columns.
struct CarefulSums<'v, 'r, F, S, T> {
    simd: S,
    head: HeadView<'v, T>,
    keys: KeyRuns<'r>,
    /// The first column, which the values have, as they have those behind it.
    column: usize,
    /// Of the row.
    weights: &'r [F],
    factor: F,
    /// The row's values from the column on.
    to: &'r mut [F],
}

impl<F: Float, S: Simd<F>, T: Source> Kernel for CarefulSums<'_, '_, F, S, T> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        let Self { simd, head, keys, column, weights, factor, to } = self;
        let zero = simd.splat(F::ZERO);
        assert!(column + to.len() <= head.width());
        for (vector, to) in to.chunks_exact_mut(S::LANES).enumerate() {
            let (mut sum, mut apart) = (zero, zero);
            for (row, &weight) in keys.rows(head).zip(weights) {
                // SAFETY: the assert above checked that all columns of `to` from `column` on are inside a row
                // of the values, and this vector is one of them.
                let value = unsafe { load_row(simd, &row, column + vector * S::LANES) };
                let finite = simd.equal(simd.sub(value, value), zero);
                sum = simd.fma(simd.splat(weight), simd.select(finite, value, zero), sum);
                if !weight.is_disallowed() {
                    apart = simd.fma(simd.splat(weight), simd.select(finite, zero, value), apart);
                }
            }
            scale_and_add(simd, to, factor, simd.add(sum, apart));
        }
    }
}

/// The same for one column behind the last whole vector.
#[inline(never)]
fn careful_sum<F: Float, T: Source>(
    head: HeadView<'_, T>,
    keys: KeyRuns<'_>,
    column: usize,
    weights: &[F],
) -> F {
    let (mut sum, mut apart) = (F::ZERO, F::ZERO);
    for (row, &weight) in keys.rows(head).zip(weights) {
        let value: F = row.at(column).widen();
        if value.is_finite() {
            sum += weight * value;
        } else {
            sum += weight * F::ZERO;
            if !weight.is_disallowed() {
                apart += weight * value;
            }
        }
    }
    sum + apart
}
