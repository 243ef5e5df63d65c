//! Products by fused multiply-add, on any vector level.
//!
//! The right operand is packed in panels of the register tile's columns, `[panel][depth][columns]`, the last
//! one narrower; the left one is read element by element and needs no packing beyond being in the computing
//! type. So a block of weights is used where it lies, in either direction.

use std::ops::Range;

use attention_core::DType;

use super::{Accumulate, Engine, FloatRows, KeySumsMut, PackedRows, STAGE, Staged, TileMut, Weights};
use crate::float::Float;
use crate::scratch::{extent, round_up};
use crate::simd::{Kernel, Simd};
use crate::tensor::Operands;

/// The width of rows from which products of queries and keys in f32 are two sums.
const TWO_SUMS: usize = 16;

/// The engine of a vector level.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Fused<F, S> {
    simd: S,
    float: std::marker::PhantomData<F>,
}

impl<F: Float, S: Simd<F>> Fused<F, S> {
    pub(crate) const fn new(simd: S) -> Self {
        Self { simd, float: std::marker::PhantomData }
    }

    /// Columns of the packed right operand: whole vectors.
    const fn padded(columns: usize) -> usize {
        round_up(columns, S::LANES)
    }
}

/// A right operand in panels.
#[derive(Clone, Copy)]
struct Panels<'a, F> {
    data: &'a [F],
    /// Rows of every panel.
    depth: usize,
    /// Columns of all panels together, whole vectors.
    columns: usize,
}

/// `out (+)= left * right` over a part of the right operand.
struct Product<'a, F: Float, S: Simd<F>> {
    simd: S,
    /// The left operand: element `(row, depth)` is at `row * left_row + depth * left_depth`.
    left: &'a [F],
    left_row: usize,
    left_depth: usize,
    rows: usize,
    right: Panels<'a, F>,
    /// The first row of the right operand that takes part, and how many do.
    depth: (usize, usize),
    /// The columns of the right operand that take part: from a multiple of the panel's, whole vectors.
    columns: (usize, usize),
    accumulate: Accumulate<'a, F>,
    out: &'a mut [F],
    stride: usize,
}

impl<F: Float, S: Simd<F>> Kernel for Product<'_, F, S> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        let (begin, end) = self.columns;
        if self.rows == 0 || begin >= end {
            return;
        }
        // Everything that the pointers below reach.
        assert!(begin.is_multiple_of(S::TILE_COLUMNS) && end.is_multiple_of(S::LANES));
        assert!(end <= self.right.columns && self.depth.0.saturating_add(self.depth.1) <= self.right.depth);
        assert!(self.right.columns.saturating_mul(self.right.depth) <= self.right.data.len());
        let left = extent(self.rows, self.left_row, extent(self.depth.1, self.left_depth, 1));
        assert!(self.depth.1 == 0 || left <= self.left.len());
        assert!(extent(self.rows, self.stride, end - begin) <= self.out.len());
        if let Accumulate::ScaleAdd(scales) = self.accumulate {
            assert!(self.rows <= scales.len());
        }

        let mut column = begin;
        while column < end {
            let width = S::TILE_COLUMNS.min(self.right.columns - column);
            let vectors = (end - column).min(width) / S::LANES;
            // SAFETY: a panel begins at `column * depth`, and the first row that takes part is inside it; the
            // asserts above checked that the panels of all columns are in `right.data`.
            let panel =
                unsafe { self.right.data.as_ptr().add(column * self.right.depth + self.depth.0 * width) };
            // SAFETY: `column` is below `end`, and `out` has `end - begin` columns, as asserted above.
            let out = unsafe { self.out.as_mut_ptr().add(column - begin) };
            // SAFETY: the asserts above checked that the panel has `vectors` vectors in each of
            // `self.depth.1` rows, that `out` has them in each of `rows` rows, and that the left operand has
            // all its elements.
            unsafe {
                match vectors {
                    1 => self.panel::<1>(panel, width, out),
                    2 => self.panel::<2>(panel, width, out),
                    3 => self.panel::<3>(panel, width, out),
                    _ => self.panel::<4>(panel, width, out),
                }
            }
            column += width;
        }
    }
}

impl<F: Float, S: Simd<F>> Product<'_, F, S> {
    /// All rows against `VECTORS` vectors of a panel whose rows are `width` apart.
    ///
    /// # Safety
    /// `panel` has `self.depth.1` rows, `width` apart, of `VECTORS` vectors, and `out` has `rows` rows,
    /// `stride` apart, of as many. The left operand, and the scales if there are any, have the sizes that
    /// `run` asserts.
    #[inline(always)]
    unsafe fn panel<const VECTORS: usize>(&self, panel: *const F, width: usize, out: *mut F) {
        // SAFETY: `row + ROWS <= rows` in each call; the caller guarantees the sizes of `panel`, `out` and
        // the left operand.
        unsafe {
            let mut row = 0;
            if S::TILE_ROWS == 6 {
                while row + 6 <= self.rows {
                    self.tile::<6, VECTORS>(row, panel, width, out);
                    row += 6;
                }
            }
            while row + 4 <= self.rows {
                self.tile::<4, VECTORS>(row, panel, width, out);
                row += 4;
            }
            while row < self.rows {
                self.tile::<1, VECTORS>(row, panel, width, out);
                row += 1;
            }
        }
    }

    /// `ROWS` rows from `row` on: the register tile.
    ///
    /// # Safety
    /// The caller guarantees what [`panel`](Self::panel) asks for, and `row + ROWS <= rows`.
    #[inline(always)]
    unsafe fn tile<const ROWS: usize, const VECTORS: usize>(
        &self,
        row: usize,
        panel: *const F,
        width: usize,
        out: *mut F,
    ) {
        let simd = self.simd;
        let (left_row, left_depth) = (self.left_row, self.left_depth);
        // SAFETY: the pointers reach rows below `row + ROWS`, depths below `self.depth.1` and `VECTORS`
        // vectors, which the caller guarantees for the panel, `out`, the left operand and the scales.
        unsafe {
            let mut left = self.left.as_ptr().add(row * left_row);
            let mut panel = panel;
            let mut sums = [[simd.splat(F::ZERO); VECTORS]; ROWS];
            for _ in 0..self.depth.1 {
                let mut right = [simd.splat(F::ZERO); VECTORS];
                for (index, right) in right.iter_mut().enumerate() {
                    *right = simd.load(panel.add(index * S::LANES));
                }
                for (index, sums) in sums.iter_mut().enumerate() {
                    let left = simd.splat(*left.add(index * left_row));
                    for (sum, &right) in sums.iter_mut().zip(&right) {
                        *sum = simd.fma(left, right, *sum);
                    }
                }
                panel = panel.add(width);
                // Wrapping: behind the last depth there may be nothing.
                left = left.wrapping_add(left_depth);
            }
            for (index, sums) in sums.iter().enumerate() {
                let out = out.add((row + index) * self.stride);
                for (vector, &sum) in sums.iter().enumerate() {
                    let out = out.add(vector * S::LANES);
                    let sum = match self.accumulate {
                        Accumulate::Overwrite => sum,
                        Accumulate::Add => simd.add(simd.load(out), sum),
                        Accumulate::ScaleAdd(scales) => {
                            simd.fma(simd.load(out), simd.splat(*scales.get_unchecked(row + index)), sum)
                        }
                    };
                    simd.store(out, sum);
                }
            }
        }
    }
}

/// Staged rows into columns of panels.
struct PackColumns<'a, F, S> {
    simd: S,
    staged: FloatRows<'a, F>,
    first: usize,
    columns: usize,
    to: &'a mut [F],
}

impl<F: Float, S: Simd<F>> Kernel for PackColumns<'_, F, S> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        let Self { simd, staged, first, columns, to } = self;
        let depth = staged.width;
        assert!(first.is_multiple_of(STAGE) && columns.is_multiple_of(STAGE) && first < columns);
        assert!(extent(STAGE, staged.stride, depth) <= staged.data.len());
        assert!(columns.saturating_mul(depth) <= to.len());
        for group in (0..STAGE).step_by(S::LANES) {
            let column = first + group;
            let start = column / S::TILE_COLUMNS * S::TILE_COLUMNS;
            let width = S::TILE_COLUMNS.min(columns - start);
            // The panel, and the column in it: both are inside, since columns and panels are whole vectors.
            let panel = &mut to[start * depth..][..width * depth];
            let offset = column - start;
            let mut d = 0;
            while d + S::LANES <= depth {
                // SAFETY: the asserts above checked that the stage has columns `d..d + LANES` of the rows
                // `group..group + LANES`; the slice `panel` has the rows `d..d + LANES`, and the vector at
                // `offset` in each of them.
                unsafe {
                    simd.transpose(
                        staged.data.as_ptr().add(group * staged.stride + d),
                        staged.stride,
                        panel.as_mut_ptr().add(d * width + offset),
                        width,
                    );
                }
                d += S::LANES;
            }
            for d in d..depth {
                for lane in 0..S::LANES {
                    panel[d * width + offset + lane] = staged.data[(group + lane) * staged.stride + d];
                }
            }
        }
    }
}

/// Staged rows into rows of panels.
fn pack_rows<F: Float, S: Simd<F>>(
    staged: FloatRows<'_, F>,
    first: usize,
    depth: usize,
    columns: usize,
    to: &mut [F],
) {
    for (start, width) in panels::<F, S>(columns) {
        let panel = &mut to[start * depth..][..width * depth];
        let real = width.min(staged.width.saturating_sub(start));
        let rows = panel.chunks_exact_mut(width).skip(first).take(STAGE);
        for (row, to) in rows.enumerate() {
            to[..real].copy_from_slice(&staged.data[row * staged.stride + start..][..real]);
            to[real..].fill(F::ZERO);
        }
    }
}

/// First column and width of each panel.
fn panels<F: Float, S: Simd<F>>(columns: usize) -> impl Iterator<Item = (usize, usize)> {
    (0..columns).step_by(S::TILE_COLUMNS).map(move |start| (start, S::TILE_COLUMNS.min(columns - start)))
}

impl<F: Operands, S: Simd<F>> Engine for Fused<F, S> {
    type F = F;
    type S = S;
    type Plain = S;
    type Packed = F;

    const BLOCK_ROWS: usize = 48;
    const BLOCK_KEYS: usize = 256;
    const KEY_STEP: usize = if S::TILE_COLUMNS > 2 * S::LANES { S::TILE_COLUMNS } else { 2 * S::LANES };

    const WEIGHTS_IN_TILE: bool = true;
    const WEIGHT_STEP: usize = 1;

    fn sum_stride(width: usize) -> usize {
        Self::padded(width)
    }

    fn simd(self) -> S {
        self.simd
    }

    fn plain(self) -> S {
        self.simd
    }

    fn queries_len(rows: usize, width: usize) -> usize {
        rows.saturating_mul(width)
    }

    fn pack_queries(self, staged: Staged<'_, F>, first: usize, rows: usize, to: &mut [F]) {
        let staged = staged.floats();
        let width = staged.width;
        for (row, to) in to[..rows * width].chunks_exact_mut(width).skip(first).take(STAGE).enumerate() {
            to.copy_from_slice(&staged.data[row * staged.stride..][..width]);
        }
    }

    fn keys_len(keys: usize, width: usize) -> usize {
        keys.saturating_mul(width)
    }

    fn pack_keys(self, staged: Staged<'_, F>, first: usize, keys: usize, to: &mut [F]) {
        let staged = staged.floats();
        self.simd.vectorize(PackColumns { simd: self.simd, staged, first, columns: keys, to });
    }

    fn values_len(keys: usize, width: usize) -> usize {
        keys.saturating_mul(Self::padded(width))
    }

    fn pack_values(self, staged: Staged<'_, F>, first: usize, keys: usize, to: &mut [F]) {
        let staged = staged.floats();
        pack_rows::<F, S>(staged, first, keys, Self::padded(staged.width), to);
    }

    fn products(
        self,
        queries: PackedRows<'_, F>,
        rows: Range<usize>,
        keys: PackedRows<'_, F>,
        range: Range<usize>,
        width: usize,
        out: TileMut<'_, F>,
    ) {
        // Two sums for each product in f32: one chain of additions over all of a row loses up to 1.4 times as
        // much, which large logits amplify.
        let two = F::DTYPE == DType::F32 && width >= TWO_SUMS;
        let half = if two { width / 2 } else { width };
        let sums = [(0, half, Accumulate::Overwrite), (half, width - half, Accumulate::Add)];
        for (from, depth, accumulate) in sums.into_iter().take(if two { 2 } else { 1 }) {
            self.simd.vectorize(Product {
                simd: self.simd,
                left: &queries.data[rows.start * width + from..],
                left_row: width,
                left_depth: 1,
                rows: rows.len(),
                right: Panels { data: keys.data, depth: width, columns: keys.len },
                depth: (from, depth),
                columns: (range.start, range.end),
                accumulate,
                out: out.data,
                stride: out.stride,
            });
        }
    }

    fn weights_len(_: usize, _: usize) -> usize {
        0
    }

    #[inline(always)]
    unsafe fn put_weights(
        simd: S,
        _: *mut F,
        _: usize,
        _: usize,
        _: usize,
        tile: *mut F,
        weights: [S::V; 2],
    ) {
        // SAFETY: the caller guarantees that `tile` points to two vectors of columns.
        unsafe {
            simd.store(tile, weights[0]);
            simd.store(tile.add(S::LANES), weights[1]);
        }
    }

    fn weighted_sums(
        self,
        weights: Weights<'_, F, F>,
        values: PackedRows<'_, F>,
        keys: Range<usize>,
        width: usize,
        accumulate: Accumulate<'_, F>,
        out: TileMut<'_, F>,
    ) {
        let columns = Self::padded(width);
        self.simd.vectorize(Product {
            simd: self.simd,
            left: weights.tile,
            left_row: weights.stride,
            left_depth: 1,
            rows: weights.rows,
            right: Panels { data: values.data, depth: values.len, columns },
            depth: (keys.start, keys.len()),
            columns: (0, columns),
            accumulate,
            out: out.data,
            stride: out.stride,
        });
    }

    fn terms_len(rows: usize, width: usize) -> usize {
        rows.saturating_mul(Self::padded(width))
    }

    fn pack_terms(self, staged: Staged<'_, F>, first: usize, rows: usize, to: &mut [F]) {
        let staged = staged.floats();
        pack_rows::<F, S>(staged, first, rows, Self::padded(staged.width), to);
    }

    fn gradients_len(_: usize, _: usize) -> usize {
        0
    }

    fn pack_gradients(self, _: &[F], _: usize, _: usize, _: usize, _: Option<&mut [F]>, _: Option<&mut [F]>) {
    }

    fn key_sums_len(keys: usize, width: usize) -> usize {
        keys.saturating_mul(Self::padded(width))
    }

    fn add_key_sums(
        self,
        weights: Weights<'_, F, F>,
        terms: PackedRows<'_, F>,
        first: usize,
        keys: Range<usize>,
        width: usize,
        sums: KeySumsMut<'_, F>,
    ) {
        let columns = Self::padded(width);
        self.simd.vectorize(Product {
            simd: self.simd,
            left: weights.tile,
            left_row: 1,
            left_depth: weights.stride,
            rows: keys.len(),
            right: Panels { data: terms.data, depth: terms.len, columns },
            depth: (first, weights.rows),
            columns: (0, columns),
            accumulate: Accumulate::Add,
            out: &mut sums.data[keys.start * columns..],
            stride: columns,
        });
    }

    fn key_sum_rows<'r>(
        self,
        sums: &'r [F],
        _: usize,
        width: usize,
        first: usize,
        _: &'r mut [F],
    ) -> (&'r [F], usize) {
        let stride = Self::padded(width);
        (&sums[first * stride..], stride)
    }

    fn key_sum_at(_: usize, width: usize, key: usize, column: usize) -> usize {
        key * Self::padded(width) + column
    }
}
