//! Products of a few queries with keys as they lie.

use attention_core::{HeadView, HostView};

use super::layout::{MAX_ROWS, STRIDE};
use super::row::KeyRow;
use super::runs::KeyRuns;
use crate::float::Float;
use crate::scratch::extent;
use crate::simd::Simd;
use crate::tensor::{Source, ViewKernel, is_strided};

/// The products of at most [`MAX_ROWS`] queries with keys as they lie.
pub(super) struct Dots<'r, F, S> {
    pub(super) simd: S,
    pub(super) key_head: usize,
    pub(super) keys: KeyRuns<'r>,
    pub(super) rows: usize,
    pub(super) queries: &'r [F],
    pub(super) queries_stride: usize,
    /// Rows [`STRIDE`] apart.
    pub(super) tile: &'r mut [F],
}

impl<F: Float, S: Simd<F>> ViewKernel for Dots<'_, F, S> {
    type Output = ();

    #[inline(always)]
    fn run<T: Source>(mut self, view: &HostView<'_, T>) {
        let head = view.head(self.key_head);
        if is_strided(view) {
            (0..self.rows).for_each(|row| self.rows::<1, true, T>(head, row));
            return;
        }
        match self.rows {
            1 => self.rows::<1, false, T>(head, 0),
            2 => self.rows::<2, false, T>(head, 0),
            3 | 4 => self.rows::<4, false, T>(head, 0),
            _ => self.rows::<MAX_ROWS, false, T>(head, 0),
        }
    }
}

impl<F: Float, S: Simd<F>> Dots<'_, F, S> {
    /// At most `ROWS` rows from `first` on; the stage holds zeros behind the real ones.
    #[inline(always)]
    fn rows<const ROWS: usize, const STRIDED: bool, T: Source>(
        &mut self,
        head: HeadView<'_, T>,
        first: usize,
    ) {
        let Self { simd, queries_stride, .. } = *self;
        let width = head.width();
        let count = (self.rows - first).min(ROWS);
        let queries = &self.queries[first * queries_stride..];
        assert!(extent(ROWS, queries_stride, width) <= queries.len());
        assert!(self.keys.len() <= STRIDE);
        assert!(extent(first + count, STRIDE, self.keys.len()) <= self.tile.len());
        let row_bytes = width * size_of::<T>();
        let mut column = 0;
        let level = self.keys.prefetched_into();
        for run in self.keys.runs() {
            let rows = run.rows(head);
            let ahead = run.ahead(head);
            for key in 0..run.len() {
                let row = KeyRow::<STRIDED, T>::new(rows.row(key), width);
                row.prefetch(level, ahead, 0, row_bytes);
                let mut sums = [simd.splat(F::ZERO); ROWS];
                let mut done = 0;
                while done + S::LANES <= width {
                    // SAFETY: `done + LANES` is at most `width`, the length of a key; the assert above
                    // checked that `queries` has as many elements in each of `ROWS` rows.
                    unsafe {
                        let key = row.load(simd, done);
                        for (index, sum) in sums.iter_mut().enumerate() {
                            let query = simd.load(queries.as_ptr().add(index * queries_stride + done));
                            *sum = simd.fma(query, key, *sum);
                        }
                    }
                    done += S::LANES;
                }
                for (index, &sum) in sums.iter().enumerate().take(count) {
                    let mut total = simd.reduce_sum(sum);
                    for d in done..width {
                        total += queries[index * queries_stride + d] * row.row.at(d).widen::<F>();
                    }
                    self.tile[(first + index) * STRIDE + column] = total;
                }
                column += 1;
            }
        }
    }
}
