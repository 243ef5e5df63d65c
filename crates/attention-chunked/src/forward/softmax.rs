//! The online softmax of a block: from products to unnormalised weights, with the shift and the sum of each row
//! (Rabe and Staats, arXiv 2112.05682, section 3; Milakov and Gimelshein, arXiv 1805.02867).
//!
//! Any shift near the maximum serves as well as the maximum itself, so that a row is passed over once: its weights are
//! taken relative to the shift of the blocks before, and only where a logit is more than [`Float::ROOM`] above it, the
//! shift moves and the row is passed over again. The first shift is the largest logit of a row's first keys.

use attention_core::merge::Accumulator;

use crate::engine::Engine;
use crate::float::Float;
use crate::simd::{Kernel, Simd, exp2};
use crate::terms::{Added, QueryRow, Terms};

/// Columns of the longest row of a tile.
pub(crate) const MAX_COLUMNS: usize = 272;

/// Vectors in which the first shift is looked for.
const FIRST_VECTORS: usize = 4;

/// A vector of an engine.
type Vector<E> = <<E as Engine>::S as Simd<<E as Engine>::F>>::V;

/// A vector of products, and of the logits that they make.
type Logit<E> = (Vector<E>, Vector<E>);

/// Turns a tile of products into weights `2^(x - shift)`.
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
    /// What the logits of each row are taken relative to, of base two; -inf before the first allowed key.
    pub(crate) shifts: &'t mut [E::F],
    /// The sum of weights of each row so far.
    pub(crate) sums: &'t mut [E::F],
    /// Receives what the sums of values so far must be multiplied by.
    pub(crate) factors: &'t mut [E::F],
}

/// A row on its way through the softmax.
#[derive(Clone, Copy)]
struct Row<F> {
    index: usize,
    products: *const F,
    /// As many elements as the row has columns, where the pass has a bias.
    bias: *const F,
    /// The same, where it has a mask.
    mask: *const u8,
    /// What products are multiplied by.
    factor: F,
}

impl<E: Engine> Kernel for BlockSoftmax<'_, '_, E> {
    /// Whether any factor is not 1.
    type Output = bool;

    #[inline(always)]
    fn run(mut self) -> bool {
        let lanes = <E::S as Simd<E::F>>::LANES;
        let rows = self.rows.len();
        assert!(self.columns.is_multiple_of(2 * lanes) && self.columns <= self.stride);
        assert!(self.columns <= MAX_COLUMNS);
        assert!(rows == 0 || (rows - 1) * self.stride + self.columns <= self.tile.len());
        assert!(self.packed.len() >= E::weights_len(rows, self.packed_columns));
        assert!(self.columns <= self.packed_columns);
        assert!(rows <= self.shifts.len() && rows <= self.sums.len() && rows <= self.factors.len());
        let (mut bias, mut mask) = ([E::F::ZERO; MAX_COLUMNS], [0; MAX_COLUMNS]);
        let mut kept = [E::F::ZERO; MAX_COLUMNS];
        let in_place = self.mark || self.terms.needs_tile();
        let factor = if self.mark { self.terms.tile_factor() } else { self.terms.product_factor() };
        let mut rescaled = false;
        for index in 0..rows {
            // SAFETY: the row's columns are in the tile, as checked above.
            let products = unsafe { self.tile.as_mut_ptr().add(index * self.stride) };
            let mut added = Added::default();
            if self.apply && in_place {
                // SAFETY: `columns` elements of the row.
                unsafe {
                    self.terms.apply(
                        self.engine.simd(),
                        &self.rows[index],
                        self.first,
                        self.columns,
                        products,
                        None,
                    );
                }
            } else if self.apply {
                // SAFETY: as above, and nothing else refers to the row here.
                let tile = unsafe { std::slice::from_raw_parts_mut(products, self.columns) };
                let simd = self.engine.simd();
                added = self.terms.added(simd, &self.rows[index..], self.first, tile, &mut bias, &mut mask);
            }
            let row = Row {
                index,
                products: products.cast_const(),
                bias: added.bias.map_or(std::ptr::null(), <[_]>::as_ptr),
                mask: added.mask.map_or(std::ptr::null(), <[_]>::as_ptr),
                factor,
            };
            // SAFETY: as above; what is added has as many columns as the row.
            rescaled |= unsafe {
                match (added.bias.is_some(), added.mask.is_some(), self.mark) {
                    (_, _, true) => self.row::<false, false, true>(&row, &mut kept),
                    (false, false, false) => self.row::<false, false, false>(&row, &mut kept),
                    (true, false, false) => self.row::<true, false, false>(&row, &mut kept),
                    (false, true, false) => self.row::<false, true, false>(&row, &mut kept),
                    (true, true, false) => self.row::<true, true, false>(&row, &mut kept),
                }
            };
        }
        rescaled
    }
}

impl<E: Engine> BlockSoftmax<'_, '_, E> {
    /// A row of the block; whether its factor is not 1.
    ///
    /// # Safety
    /// As checked in `run`: the row is in the tile, and what is added has its columns.
    #[inline(always)]
    unsafe fn row<const BIAS: bool, const MASK: bool, const MARK: bool>(
        &mut self,
        row: &Row<E::F>,
        kept: &mut [E::F; MAX_COLUMNS],
    ) -> bool {
        let simd = self.engine.simd();
        let nothing = E::F::NEG_INFINITY;
        let index = row.index;
        let before = self.shifts[index];
        let mut shift = before;
        // SAFETY: the caller's, here and below.
        unsafe {
            if shift == nothing {
                shift = self.first_shift::<BIAS, MASK>(row);
            }
            let used = if shift == nothing { E::F::ZERO } else { shift };
            // Weights may take the place of products, which a second pass needs again.
            let overwrites = E::WEIGHTS_IN_TILE || MARK || self.terms.has_dropout();
            let keep = overwrites.then_some(kept.as_mut_ptr());
            let (mut sum, above) = self.pass::<BIAS, MASK, MARK>(row, used, keep);
            if simd.any(simd.less(simd.splat(E::F::ROOM), above)) {
                shift = used + simd.reduce_max(above);
                let products = if overwrites { kept.as_ptr() } else { row.products };
                (sum, _) = self.pass::<BIAS, MASK, MARK>(&Row { products, ..*row }, shift, None);
            }
            if self.terms.has_dropout() {
                self.drop_weights(index);
            }
            let mut factor = E::F::ONE;
            if shift != before && before != nothing {
                let mut room = [E::F::ZERO; 64];
                let [power] = exp2::<E::F, E::S, true, 1>(simd, [simd.splat(before - shift)]);
                simd.store(room.as_mut_ptr(), power);
                factor = room[0];
            }
            self.sums[index] = self.sums[index] * factor + sum;
            self.shifts[index] = shift;
            self.factors[index] = factor;
            factor != E::F::ONE
        }
    }

    /// A shift for a row that has none: the largest logit of its first keys, or of all where those are masked. Which
    /// keys are looked at depends on the row alone, not on where its tile begins.
    ///
    /// # Safety
    /// As for [`row`](Self::row).
    #[inline(always)]
    unsafe fn first_shift<const BIAS: bool, const MASK: bool>(&self, row: &Row<E::F>) -> E::F {
        let lanes = <E::S as Simd<E::F>>::LANES;
        let begin = self.rows[row.index].begin;
        let begin = begin.saturating_sub(self.first).min(self.columns) / lanes * lanes;
        let end = self.columns.min(begin + FIRST_VECTORS * lanes);
        // SAFETY: the caller's.
        unsafe {
            let shift = self.largest::<BIAS, MASK>(row, begin, end);
            if shift == E::F::NEG_INFINITY { self.largest::<BIAS, MASK>(row, 0, self.columns) } else { shift }
        }
    }

    /// The largest logit in some columns of a row: whole vectors.
    ///
    /// # Safety
    /// As for [`row`](Self::row); the columns are inside the row.
    #[inline(always)]
    unsafe fn largest<const BIAS: bool, const MASK: bool>(
        &self,
        row: &Row<E::F>,
        begin: usize,
        end: usize,
    ) -> E::F {
        let simd = self.engine.simd();
        let mut largest = simd.splat(E::F::NEG_INFINITY);
        for column in (begin..end).step_by(<E::S as Simd<E::F>>::LANES) {
            // SAFETY: the caller's.
            let [(_, x)] = unsafe { self.logits::<BIAS, MASK, 1>(row, column, simd.splat(E::F::ZERO)) };
            largest = simd.max(largest, x);
        }
        simd.reduce_max(largest)
    }

    /// The products at `COUNT` vectors of a row, and the logits that they make, of base two, plus `start`.
    ///
    /// # Safety
    /// As for [`row`](Self::row); the columns are inside the row.
    #[inline(always)]
    unsafe fn logits<const BIAS: bool, const MASK: bool, const COUNT: usize>(
        &self,
        row: &Row<E::F>,
        column: usize,
        start: Vector<E>,
    ) -> [Logit<E>; COUNT] {
        let simd = self.engine.simd();
        let lanes = <E::S as Simd<E::F>>::LANES;
        let factor = simd.splat(row.factor);
        let mut all = [(start, start); COUNT];
        // SAFETY: the caller's.
        unsafe {
            for (index, (product, x)) in all.iter_mut().enumerate() {
                let column = column + index * lanes;
                *product = simd.load(row.products.add(column));
                *x = simd.fma(*product, factor, start);
                if BIAS {
                    *x = simd.fma(simd.load(row.bias.add(column)), simd.splat(E::F::LOG2_E), *x);
                }
                if MASK {
                    let allowed = simd.load_mask(row.mask.add(column));
                    *x = simd.select(allowed, *x, simd.splat(E::F::NEG_INFINITY));
                }
            }
        }
        all
    }

    /// The weights of a row relative to a shift, their sum, and how far the logits are above the shift.
    ///
    /// # Safety
    /// As for [`row`](Self::row); `keep` has room for the products of the row.
    #[inline(always)]
    unsafe fn pass<const BIAS: bool, const MASK: bool, const MARK: bool>(
        &mut self,
        row: &Row<E::F>,
        shift: E::F,
        keep: Option<*mut E::F>,
    ) -> (E::F, Vector<E>) {
        let simd = self.engine.simd();
        let lanes = <E::S as Simd<E::F>>::LANES;
        let mut sums = [simd.splat(E::F::ZERO); 2];
        let mut above = [simd.splat(E::F::NEG_INFINITY); 2];
        let mut column = 0;
        // SAFETY: columns are whole pairs of vectors; the rest is the caller's.
        unsafe {
            if <E::S as Simd<E::F>>::SIDE_BY_SIDE == 4 {
                while column + 4 * lanes <= self.columns {
                    self.weights::<BIAS, MASK, MARK, 4>(row, column, shift, keep, &mut sums, &mut above);
                    column += 4 * lanes;
                }
            }
            while column < self.columns {
                self.weights::<BIAS, MASK, MARK, 2>(row, column, shift, keep, &mut sums, &mut above);
                column += 2 * lanes;
            }
        }
        (simd.reduce_sum(simd.add(sums[0], sums[1])), simd.max(above[0], above[1]))
    }

    /// Weights of `COUNT` vectors of a row: 2 or 4.
    ///
    /// # Safety
    /// As for [`pass`](Self::pass); the vectors at `column` are inside the row and the packed weights.
    #[inline(always)]
    unsafe fn weights<const BIAS: bool, const MASK: bool, const MARK: bool, const COUNT: usize>(
        &mut self,
        row: &Row<E::F>,
        column: usize,
        shift: E::F,
        keep: Option<*mut E::F>,
        sums: &mut [Vector<E>; 2],
        above: &mut [Vector<E>; 2],
    ) {
        let simd = self.engine.simd();
        let lanes = <E::S as Simd<E::F>>::LANES;
        // SAFETY: the caller's: every vector at `at` is inside the row, and inside the packed weights.
        unsafe {
            let at = self.tile.as_mut_ptr().add(row.index * self.stride + column);
            let logits = self.logits::<BIAS, MASK, COUNT>(row, column, simd.splat(-shift));
            let mut x = logits.map(|(_, x)| x);
            for (index, &x) in x.iter().enumerate() {
                above[index % 2] = simd.max(above[index % 2], x);
            }
            if let Some(keep) = keep {
                for (index, &(product, _)) in logits.iter().enumerate() {
                    simd.store(keep.add(column + index * lanes), product);
                }
            }
            x = exp2::<E::F, E::S, true, COUNT>(simd, x);
            if MARK {
                let masked = simd.splat(E::F::NEG_INFINITY);
                for (weight, &(product, _)) in x.iter_mut().zip(&logits) {
                    let is_masked = simd.equal(product, masked);
                    *weight = simd.select(is_masked, simd.splat(E::F::DISALLOWED), *weight);
                }
            }
            for (index, &weight) in x.iter().enumerate() {
                sums[index % 2] = simd.add(sums[index % 2], weight);
            }
            let dropped = self.terms.has_dropout();
            if MARK || dropped {
                for (index, &weight) in x.iter().enumerate() {
                    simd.store(at.add(index * lanes), weight);
                }
            }
            if !dropped {
                let packed = self.packed.as_mut_ptr();
                for (pair, weights) in x.as_chunks::<2>().0.iter().enumerate() {
                    let (column, at) = (column + 2 * pair * lanes, at.add(2 * pair * lanes));
                    E::put_weights(simd, packed, self.packed_columns, row.index, column, at, *weights);
                }
            }
        }
    }

    /// Applies dropout to the weights of a row, which are in the tile.
    ///
    /// # Safety
    /// As for [`row`](Self::row).
    #[inline(always)]
    unsafe fn drop_weights(&mut self, row: usize) {
        let simd = self.engine.simd();
        let lanes = <E::S as Simd<E::F>>::LANES;
        // SAFETY: `columns` elements of the row, which nothing else refers to here.
        let weights = unsafe {
            std::slice::from_raw_parts_mut(self.tile.as_mut_ptr().add(row * self.stride), self.columns)
        };
        self.terms.drop(&self.rows[row], self.first, weights);
        let (tile, packed) = (weights.as_mut_ptr(), self.packed.as_mut_ptr());
        for column in (0..self.columns).step_by(2 * lanes) {
            // SAFETY: two vectors inside the row, and inside the packed weights.
            unsafe {
                let at = tile.add(column);
                let weights = [simd.load(at), simd.load(at.add(lanes))];
                E::put_weights(simd, packed, self.packed_columns, row, column, at, weights);
            }
        }
    }
}
