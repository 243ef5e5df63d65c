//! The online softmax of a block: from products to unnormalised weights, with the running maximum and sum of each row
//! (Rabe and Staats, arXiv 2112.05682, section 3; Milakov and Gimelshein, arXiv 1805.02867).

use crate::engine::Engine;
use crate::float::Float;
use crate::simd::{Kernel, Simd, exp2};
use crate::terms::{QueryRow, Terms};
use attention_core::merge::Accumulator;

/// Turns a tile of products into weights `2^(x - maximum)`.
pub(crate) struct BlockSoftmax<'t, 'a, E: Engine> {
    pub(crate) engine: E,
    pub(crate) terms: &'t Terms<'a, E::F>,
    pub(crate) rows: &'t [QueryRow],
    /// The key of the tile's first column.
    pub(crate) first: usize,
    /// Columns to look at: whole pairs of vectors. Those behind the last key are masked by the rows' ranges.
    pub(crate) columns: usize,
    /// Whether there is something to mask or to add.
    pub(crate) apply: bool,
    /// Whether weights of disallowed keys must be told from weights that are zero.
    pub(crate) mark: bool,
    pub(crate) tile: &'t mut [E::F],
    pub(crate) stride: usize,
    /// Columns of the packed weights.
    pub(crate) packed_columns: usize,
    pub(crate) packed: &'t mut [E::Packed],
    /// The largest logit of each row so far, of base two.
    pub(crate) maxima: &'t mut [E::F],
    /// The sum of weights of each row so far.
    pub(crate) sums: &'t mut [E::F],
    /// Receives what the sums of values so far must be multiplied by.
    pub(crate) factors: &'t mut [E::F],
}

impl<E: Engine> Kernel for BlockSoftmax<'_, '_, E> {
    /// Whether any factor is not 1.
    type Output = bool;

    #[inline(always)]
    fn run(mut self) -> bool {
        let lanes = <E::S as Simd<E::F>>::LANES;
        let rows = self.rows.len();
        assert!(self.columns.is_multiple_of(2 * lanes) && self.columns <= self.stride);
        assert!(rows == 0 || (rows - 1) * self.stride + self.columns <= self.tile.len());
        assert!(self.packed.len() >= E::weights_len(rows, self.packed_columns));
        assert!(self.columns <= self.packed_columns);
        assert!(rows <= self.maxima.len() && rows <= self.sums.len() && rows <= self.factors.len());
        let mut rescaled = false;
        for first in (0..rows).step_by(lanes) {
            // SAFETY: the rows' columns are in the tile, as checked above.
            rescaled |= unsafe { self.group(first, lanes.min(rows - first)) };
        }
        rescaled
    }
}

impl<E: Engine> BlockSoftmax<'_, '_, E> {
    /// As many rows as a vector has lanes, so that their maxima are brought up to date together.
    ///
    /// # Safety
    /// As checked in `run`, for rows of the block.
    #[inline(always)]
    unsafe fn group(&mut self, first: usize, count: usize) -> bool {
        let simd = self.engine.simd();
        let (zero, nothing) = (simd.splat(E::F::ZERO), simd.splat(E::F::NEG_INFINITY));
        // Room for the longest vector there is.
        let mut before = [E::F::NEG_INFINITY; 64];
        let mut block = before;
        let factor = self.terms.tile_factor();
        for row in 0..count {
            before[row] = self.maxima[first + row];
            // SAFETY: a row of the block.
            block[row] = unsafe { self.maximum(first + row) } * factor;
        }
        let (mut maxima, mut shifts, mut factors) = (before, before, before);
        // SAFETY: the arrays are longer than a vector.
        unsafe {
            let (old, new) = (simd.load(before.as_ptr()), simd.load(block.as_ptr()));
            // The larger; a NaN in the block gives way here, and returns with the exponentials.
            let maximum = simd.select(simd.less(old, new), new, old);
            let shift = simd.select(simd.equal(maximum, nothing), zero, maximum);
            let [rescale] = exp2::<E::F, E::S, true, 1>(simd, [simd.sub(old, shift)]);
            let rescale = simd.select(simd.equal(old, maximum), simd.splat(E::F::ONE), rescale);
            simd.store(maxima.as_mut_ptr(), maximum);
            simd.store(shifts.as_mut_ptr(), shift);
            simd.store(factors.as_mut_ptr(), rescale);
        }
        let mut rescaled = false;
        for row in 0..count {
            // SAFETY: a row of the block.
            let sum = unsafe {
                if self.mark {
                    self.row::<true>(first + row, factor, shifts[row])
                } else {
                    self.row::<false>(first + row, factor, shifts[row])
                }
            };
            let place = first + row;
            self.sums[place] = self.sums[place] * factors[row] + sum;
            self.maxima[place] = maxima[row];
            self.factors[place] = factors[row];
            rescaled |= factors[row] != E::F::ONE;
        }
        rescaled
    }

    /// Masks a row, adds what is to be added, and gives the largest of it.
    ///
    /// # Safety
    /// As for [`group`](Self::group).
    #[inline(always)]
    unsafe fn maximum(&mut self, row: usize) -> E::F {
        let simd = self.engine.simd();
        let lanes = <E::S as Simd<E::F>>::LANES;
        // SAFETY: the row is in the tile.
        let tile = unsafe { self.tile.as_mut_ptr().add(row * self.stride) };
        if self.apply {
            // SAFETY: `columns` elements of the row.
            unsafe { self.terms.apply(simd, &self.rows[row], self.first, self.columns, tile, None) };
        }
        let mut largest = [simd.splat(E::F::NEG_INFINITY); 2];
        for column in (0..self.columns).step_by(2 * lanes) {
            // SAFETY: two vectors inside the row.
            unsafe {
                largest[0] = simd.max(largest[0], simd.load(tile.add(column)));
                largest[1] = simd.max(largest[1], simd.load(tile.add(column + lanes)));
            }
        }
        simd.reduce_max(simd.max(largest[0], largest[1]))
    }

    /// The weights of a row, and their sum.
    ///
    /// # Safety
    /// As for [`group`](Self::group).
    #[inline(always)]
    unsafe fn row<const MARK: bool>(&mut self, row: usize, factor: E::F, shift: E::F) -> E::F {
        let simd = self.engine.simd();
        let lanes = <E::S as Simd<E::F>>::LANES;
        let columns = self.columns;
        let mut sums = [simd.splat(E::F::ZERO); 2];
        let mut column = 0;
        if <E::S as Simd<E::F>>::SIDE_BY_SIDE == 4 {
            while column + 4 * lanes <= columns {
                // SAFETY: four vectors inside the row.
                unsafe { self.weights::<MARK, 4>(row, column, factor, shift, &mut sums) };
                column += 4 * lanes;
            }
        }
        while column < columns {
            // SAFETY: columns are whole pairs of vectors.
            unsafe { self.weights::<MARK, 2>(row, column, factor, shift, &mut sums) };
            column += 2 * lanes;
        }
        if self.terms.has_dropout() {
            // SAFETY: `columns` elements of the row, which nothing else refers to here.
            let weights = unsafe {
                std::slice::from_raw_parts_mut(self.tile.as_mut_ptr().add(row * self.stride), columns)
            };
            self.terms.drop(&self.rows[row], self.first, weights);
            let (tile, packed) = (weights.as_mut_ptr(), self.packed.as_mut_ptr());
            for column in (0..columns).step_by(2 * lanes) {
                // SAFETY: two vectors inside the row, and inside the packed weights.
                unsafe {
                    let at = tile.add(column);
                    let weights = [simd.load(at), simd.load(at.add(lanes))];
                    E::put_weights(simd, packed, self.packed_columns, row, column, at, weights);
                }
            }
        }
        simd.reduce_sum(simd.add(sums[0], sums[1]))
    }

    /// Weights of `COUNT` vectors of a row: 2 or 4.
    ///
    /// # Safety
    /// The vectors at `column` are inside the row and the packed weights.
    #[inline(always)]
    unsafe fn weights<const MARK: bool, const COUNT: usize>(
        &mut self,
        row: usize,
        column: usize,
        factor: E::F,
        shift: E::F,
        sums: &mut [<E::S as Simd<E::F>>::V; 2],
    ) {
        let simd = self.engine.simd();
        let lanes = <E::S as Simd<E::F>>::LANES;
        let (shift, factor) = (simd.splat(-shift), simd.splat(factor));
        // SAFETY: the caller's: every vector at `at` is inside the row, and inside the packed weights.
        unsafe {
            let at = self.tile.as_mut_ptr().add(row * self.stride + column);
            let mut products = [shift; COUNT];
            let mut x = [shift; COUNT];
            for (index, (product, x)) in products.iter_mut().zip(&mut x).enumerate() {
                *product = simd.load(at.add(index * lanes));
                *x = simd.fma(*product, factor, shift);
            }
            let mut weights = exp2::<E::F, E::S, true, COUNT>(simd, x);
            if MARK {
                let masked = simd.splat(E::F::NEG_INFINITY);
                for (weight, &product) in weights.iter_mut().zip(&products) {
                    let is_masked = simd.equal(product, masked);
                    *weight = simd.select(is_masked, simd.splat(E::F::DISALLOWED), *weight);
                }
            }
            for (index, &weight) in weights.iter().enumerate() {
                sums[index % 2] = simd.add(sums[index % 2], weight);
            }
            let dropped = self.terms.has_dropout();
            if MARK || dropped {
                for (index, &weight) in weights.iter().enumerate() {
                    simd.store(at.add(index * lanes), weight);
                }
            }
            if !dropped {
                let packed = self.packed.as_mut_ptr();
                for (pair, weights) in weights.as_chunks::<2>().0.iter().enumerate() {
                    let (column, at) = (column + 2 * pair * lanes, at.add(2 * pair * lanes));
                    E::put_weights(simd, packed, self.packed_columns, row, column, at, *weights);
                }
            }
        }
    }
}
