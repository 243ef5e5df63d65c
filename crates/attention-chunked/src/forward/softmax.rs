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
        for row in 0..rows {
            // SAFETY: the row's columns are in the tile, as checked above.
            rescaled |= unsafe { if self.mark { self.row::<true>(row) } else { self.row::<false>(row) } };
        }
        rescaled
    }
}

impl<E: Engine> BlockSoftmax<'_, '_, E> {
    /// # Safety
    /// As checked in `run`, for a row of the block.
    #[inline(always)]
    unsafe fn row<const MARK: bool>(&mut self, row: usize) -> bool {
        let simd = self.engine.simd();
        let lanes = <E::S as Simd<E::F>>::LANES;
        let columns = self.columns;
        // SAFETY: the row is in the tile.
        let tile = unsafe { self.tile.as_mut_ptr().add(row * self.stride) };
        if self.apply {
            // SAFETY: `columns` elements of the row.
            unsafe { self.terms.apply(simd, &self.rows[row], self.first, columns, tile, None) };
        }
        let factor = self.terms.tile_factor();

        // A NaN loses or wins here, and returns with the exponentials in any case.
        let mut largest = [simd.splat(E::F::NEG_INFINITY); 2];
        for column in (0..columns).step_by(2 * lanes) {
            // SAFETY: two vectors inside the row.
            unsafe {
                largest[0] = simd.max(largest[0], simd.load(tile.add(column)));
                largest[1] = simd.max(largest[1], simd.load(tile.add(column + lanes)));
            }
        }
        let block = simd.reduce_max(simd.max(largest[0], largest[1])) * factor;
        let before = self.maxima[row];
        let maximum = if before > block { before } else { block };
        let shift = if maximum == E::F::NEG_INFINITY { E::F::ZERO } else { maximum };
        let rescale = if before == maximum {
            E::F::ONE
        } else if before == E::F::NEG_INFINITY {
            E::F::ZERO
        } else {
            let [factor] = exp2::<E::F, E::S, true, 1>(simd, [simd.splat(before - shift)]);
            let mut first = [E::F::ZERO; 64];
            // SAFETY: 64 elements are as many as any vector has.
            unsafe { simd.store(first.as_mut_ptr(), factor) };
            first[0]
        };

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
        let dropped = self.terms.has_dropout();
        let packed = self.packed.as_mut_ptr();
        if dropped {
            // SAFETY: `columns` elements of the row, which nothing else refers to here.
            let weights = unsafe { std::slice::from_raw_parts_mut(tile, columns) };
            self.terms.drop(&self.rows[row], self.first, weights);
            for column in (0..columns).step_by(2 * lanes) {
                // SAFETY: as above.
                unsafe {
                    let at = tile.add(column);
                    let weights = [simd.load(at), simd.load(at.add(lanes))];
                    E::put_weights(simd, packed, self.packed_columns, row, column, at, weights);
                }
            }
        }
        let sum = simd.reduce_sum(simd.add(sums[0], sums[1]));
        self.sums[row] = self.sums[row] * rescale + sum;
        self.maxima[row] = maximum;
        self.factors[row] = rescale;
        rescale != E::F::ONE
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
