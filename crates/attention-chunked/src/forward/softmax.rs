//! The online softmax of a block: from products to unnormalised weights, with the shift and the sum of each
//! row (Rabe and Staats, arXiv 2112.05682, section 3; Milakov and Gimelshein, arXiv 1805.02867).
//!
//! Any shift near the maximum serves as well as the maximum itself, so that a row is passed over once: its
//! weights are taken relative to the shift of the blocks before, and only where a logit is more than
//! [`Float::ROOM`] above it, the shift moves and the row is passed over again. The first shift is the largest
//! logit of a row's first keys. A shift is always a logit of the row, with the bits that it has as one: so
//! its own weight is exactly 1, and no logit is so large that the rounding of the shift could matter.

use std::mem::MaybeUninit;
use std::ops::Range;

use attention_core::merge::Accumulator;

use crate::engine::Engine;
use crate::float::Float;
use crate::logits::{AddedRow, MAX_COLUMNS, RowLogits, Terms, TileShape};
use crate::simd::{Base, Kernel, Simd, power};

/// Vectors in which the first shift is looked for.
const FIRST_VECTORS: usize = 4;

/// A vector of an engine.
type Vector<E> = <<E as Engine>::S as Simd<<E as Engine>::F>>::V;

/// Turns a tile of products into weights, `e` to `x - shift`.
pub(crate) struct BlockSoftmax<'t, 'a, E: Engine> {
    pub(crate) engine: E,
    pub(crate) terms: &'t Terms<'a, E::F>,
    pub(crate) shape: TileShape<'t>,
    pub(crate) tile: &'t mut [E::F],
    /// Whether weights of disallowed keys must be told from weights that are zero.
    pub(crate) mark: bool,
    pub(crate) packed: PackedWeightsMut<'t, E::Packed>,
    pub(crate) states: SoftmaxStates<'t, E::F>,
}

/// Where the engine packs weights.
pub(crate) struct PackedWeightsMut<'t, P> {
    pub(crate) data: &'t mut [P],
    /// Columns of the block that they are of.
    pub(crate) columns: usize,
}

/// What the online softmax knows of each row of a block.
pub(crate) struct SoftmaxStates<'t, F> {
    /// What the logits of each row are taken relative to, in units of the call; -inf before the first allowed
    /// key.
    pub(crate) shifts: &'t mut [F],
    /// The sum of weights of each row so far.
    pub(crate) sums: &'t mut [F],
    /// Receives what the sums of values so far must be multiplied by.
    pub(crate) factors: &'t mut [F],
}

/// A row on its way through the softmax.
#[derive(Clone, Copy)]
struct Row<'r, F> {
    index: usize,
    /// Logits, but for what is left to be done by `logits`.
    products: *const F,
    logits: RowLogits<'r, F>,
    /// What weights are powers of.
    base: Base<F>,
    /// How far a logit may be above the shift.
    room: F,
}

/// The power of one number, with the bits that it has among others. Shifts move rarely, so this is compiled
/// once for all kinds of rows.
struct PowerOfOne<F, S> {
    simd: S,
    base: Base<F>,
    x: F,
}

impl<F: Float, S: Simd<F>> Kernel for PowerOfOne<F, S> {
    type Output = F;

    #[inline(always)]
    fn run(self) -> F {
        let mut lanes = [F::ZERO; 64];
        let [power] = power(self.simd, self.base, [self.simd.splat(self.x)]);
        // SAFETY: `lanes` has 64 elements, and no vector has more.
        unsafe { self.simd.store(lanes.as_mut_ptr(), power) };
        lanes[0]
    }
}

impl<E: Engine> Kernel for BlockSoftmax<'_, '_, E> {
    /// Whether any factor is not 1.
    type Output = bool;

    #[inline(always)]
    fn run(mut self) -> bool {
        let lanes = <E::S as Simd<E::F>>::LANES;
        let (terms, shape, states) = (self.terms, self.shape, &self.states);
        let (count, columns, stride) = (shape.rows.len(), shape.columns, shape.stride);
        let (simd, plain) = (self.engine.simd(), self.engine.plain());
        assert!(columns.is_multiple_of(2 * lanes) && columns <= stride && columns <= MAX_COLUMNS);
        assert!(shape.extent() <= self.tile.len());
        assert!(self.packed.data.len() >= E::weights_len(count, self.packed.columns));
        assert!(columns <= self.packed.columns);
        assert!(count <= states.shifts.len() && count <= states.sums.len() && count <= states.factors.len());
        let mut memory = AddedRow::default();
        // Not cleared: that takes longer than all else of a block of few keys.
        let mut kept = [const { MaybeUninit::uninit() }; MAX_COLUMNS];
        let base = terms.base();
        // Finite, so that an infinite logit is above it.
        let room = E::F::ROOM / base.log2;
        let room = if room > E::F::LARGEST { E::F::LARGEST } else { room };
        let mut rescaled = false;
        for index in 0..count {
            // SAFETY: `index` is below the number of rows, all of which are in the tile, as asserted above.
            let products = unsafe { self.tile.as_mut_ptr().add(index * stride) };
            // SAFETY: the tile has `columns` elements of the row, as asserted above. They are changed through
            // this slice in `begin_logits` only, and nothing else refers to them until then.
            let tile = unsafe { std::slice::from_raw_parts_mut(products, columns) };
            let mut logits = shape.begin_logits(index, terms, plain, tile, None, &mut memory);
            if self.mark || terms.needs_tile() {
                // SAFETY: `products` points to the row's `columns` elements in the tile; the assert above
                // checked that they are whole vectors.
                logits = unsafe { logits.finish(simd, products, columns) };
            }
            let row = Row { index, products: products.cast_const(), logits, base, room };
            // SAFETY: the asserts above checked that the row is in the tile and that the states and the
            // packed weights have it. The row has the bias and the mask that the arm names; where keys are
            // marked, `finish` has applied both.
            rescaled |= unsafe {
                match (logits.has_bias(), logits.has_mask(), self.mark) {
                    (_, _, true) => self.row::<false, false, true>(&row, &mut kept),
                    (false, false, false) => self.row::<false, false, false>(&row, &mut kept),
                    (true, false, false) => self.row::<true, false, false>(&row, &mut kept),
                    (false, true, false) => self.row::<false, true, false>(&row, &mut kept),
                    (true, true, false) => self.row::<true, true, false>(&row, &mut kept),
                }
            };
            if terms.has_dropout() {
                // SAFETY: the asserts above checked that the row is in the tile and that the packed weights
                // have it.
                unsafe { self.drop_weights(index) };
            }
        }
        rescaled
    }
}

impl<E: Engine> BlockSoftmax<'_, '_, E> {
    /// A row of the block; whether its factor is not 1.
    ///
    /// # Safety
    /// `row.index` is below the number of rows, and the tile, the states and the packed weights have the
    /// sizes that `run` asserts. `row.products` points to the row's columns, and its logits have a bias and a
    /// mask, of as many columns, if `BIAS` and `MASK` say so.
    #[inline(always)]
    unsafe fn row<const BIAS: bool, const MASK: bool, const MARK: bool>(
        &mut self,
        row: &Row<'_, E::F>,
        kept: &mut [MaybeUninit<E::F>; MAX_COLUMNS],
    ) -> bool {
        let simd = self.engine.simd();
        let nothing = E::F::NEG_INFINITY;
        let index = row.index;
        let before = self.states.shifts[index];
        let mut shift = before;
        let kept = kept.as_mut_ptr().cast::<E::F>();
        // SAFETY: the caller guarantees that the row is in the tile, the states and the packed weights, and
        // that it has the bias and the mask; `kept` has `MAX_COLUMNS` elements, and `run` asserts that a row
        // has no more columns. The products that were kept are read where a pass over the row has written
        // each of them.
        unsafe {
            if shift == nothing {
                shift = self.first_shift::<BIAS, MASK>(row);
            }
            // Weights may take the place of what a second pass needs again.
            let overwrites = E::WEIGHTS_IN_TILE || MARK || self.terms.has_dropout();
            let mut from = *row;
            let mut sum;
            loop {
                let used = if shift == nothing { E::F::ZERO } else { shift };
                let keep = overwrites.then_some(kept);
                let above;
                (sum, above) = self.pass::<BIAS, MASK, MARK>(&from, used, keep);
                let room = simd.splat(row.room);
                if !simd.any(simd.less(room, simd.sub(above, simd.splat(used)))) {
                    break;
                }
                // Nothing is above the largest: the second pass is the last. With NaN there may be no
                // largest, or a smaller number in its place. The shift only rises, so the passes end.
                let largest = simd.reduce_max(above);
                if largest <= used || E::F::is_nan(largest) {
                    break;
                }
                shift = largest;
                if overwrites {
                    from.products = kept.cast_const();
                }
            }
            let mut factor = E::F::ONE;
            if shift != before && before != nothing {
                factor = simd.vectorize(PowerOfOne { simd, base: row.base, x: before - shift });
            }
            self.states.sums[index] = self.states.sums[index] * factor + sum;
            self.states.shifts[index] = shift;
            self.states.factors[index] = factor;
            factor != E::F::ONE
        }
    }

    /// A shift for a row that has none: the largest logit of its first keys, or of all where those are
    /// masked. Which keys are looked at depends on the row alone, not on where its tile begins.
    ///
    /// # Safety
    /// The caller guarantees what [`row`](Self::row) asks for.
    #[inline(always)]
    unsafe fn first_shift<const BIAS: bool, const MASK: bool>(&self, row: &Row<'_, E::F>) -> E::F {
        let lanes = <E::S as Simd<E::F>>::LANES;
        let TileShape { rows, first_key, columns: count, .. } = self.shape;
        let begin = rows[row.index].begin;
        let begin = begin.saturating_sub(first_key).min(count) / lanes * lanes;
        let end = count.min(begin + FIRST_VECTORS * lanes);
        // SAFETY: the caller guarantees the row with its bias and mask; both ranges are whole vectors inside
        // its columns.
        unsafe {
            let mut columns = begin..end;
            loop {
                let shift = self.largest::<BIAS, MASK>(row, columns.clone());
                let all = 0..count;
                if shift != E::F::NEG_INFINITY || columns == all {
                    return shift;
                }
                columns = all;
            }
        }
    }

    /// The largest logit in some columns of a row: whole vectors.
    ///
    /// # Safety
    /// The caller guarantees what [`row`](Self::row) asks for, and that the columns are inside the row.
    #[inline(always)]
    unsafe fn largest<const BIAS: bool, const MASK: bool>(
        &self,
        row: &Row<'_, E::F>,
        columns: Range<usize>,
    ) -> E::F {
        let simd = self.engine.simd();
        let mut largest = simd.splat(E::F::NEG_INFINITY);
        for column in columns.step_by(<E::S as Simd<E::F>>::LANES) {
            // SAFETY: the caller guarantees the row with its bias and mask, and that the columns, whole
            // vectors, are inside it.
            let [(_, x)] = unsafe { self.logits::<BIAS, MASK, 1>(row, column) };
            largest = simd.max(largest, x);
        }
        simd.reduce_max(largest)
    }

    /// What the row holds at `COUNT` vectors, and the logits that it makes.
    ///
    /// # Safety
    /// The caller guarantees what [`row`](Self::row) asks for, and that `COUNT` vectors from `column` on are
    /// inside the row.
    #[inline(always)]
    unsafe fn logits<const BIAS: bool, const MASK: bool, const COUNT: usize>(
        &self,
        row: &Row<'_, E::F>,
        column: usize,
    ) -> [(Vector<E>, Vector<E>); COUNT] {
        let simd = self.engine.simd();
        let lanes = <E::S as Simd<E::F>>::LANES;
        let mut all = [(simd.splat(E::F::ZERO), simd.splat(E::F::ZERO)); COUNT];
        // SAFETY: the caller guarantees `COUNT` vectors of the row at `column`, with bias and mask.
        unsafe {
            for (index, (product, x)) in all.iter_mut().enumerate() {
                let column = column + index * lanes;
                *product = simd.load(row.products.add(column));
                *x = row.logits.vector_with::<BIAS, MASK, _>(simd, *product, column);
            }
        }
        all
    }

    /// The weights of a row relative to a shift, their sum, and the largest logits.
    ///
    /// # Safety
    /// The caller guarantees what [`row`](Self::row) asks for, and that `keep`, if there is one, points to as
    /// many elements as the row has columns.
    #[inline(always)]
    unsafe fn pass<const BIAS: bool, const MASK: bool, const MARK: bool>(
        &mut self,
        row: &Row<'_, E::F>,
        shift: E::F,
        keep: Option<*mut E::F>,
    ) -> (E::F, Vector<E>) {
        let simd = self.engine.simd();
        let lanes = <E::S as Simd<E::F>>::LANES;
        let mut sums = [simd.splat(E::F::ZERO); 2];
        let mut above = [simd.splat(E::F::NEG_INFINITY); 2];
        let mut column = 0;
        // SAFETY: `run` asserts that columns are whole pairs of vectors, so 2 or 4 vectors from `column` on
        // are inside the row; the caller guarantees the row, its packed weights and `keep`.
        unsafe {
            if <E::S as Simd<E::F>>::SIDE_BY_SIDE == 4 {
                while column + 4 * lanes <= self.shape.columns {
                    self.weights::<BIAS, MASK, MARK, 4>(row, column, shift, keep, &mut sums, &mut above);
                    column += 4 * lanes;
                }
            }
            while column < self.shape.columns {
                self.weights::<BIAS, MASK, MARK, 2>(row, column, shift, keep, &mut sums, &mut above);
                column += 2 * lanes;
            }
        }
        (simd.reduce_sum(simd.add(sums[0], sums[1])), simd.max(above[0], above[1]))
    }

    /// Weights of `COUNT` vectors of a row: 2 or 4.
    ///
    /// # Safety
    /// The caller guarantees what [`pass`](Self::pass) asks for, and that `COUNT` vectors from `column` on
    /// are inside the row and the packed weights.
    #[inline(always)]
    unsafe fn weights<const BIAS: bool, const MASK: bool, const MARK: bool, const COUNT: usize>(
        &mut self,
        row: &Row<'_, E::F>,
        column: usize,
        shift: E::F,
        keep: Option<*mut E::F>,
        sums: &mut [Vector<E>; 2],
        above: &mut [Vector<E>; 2],
    ) {
        let simd = self.engine.simd();
        let lanes = <E::S as Simd<E::F>>::LANES;
        // SAFETY: the caller guarantees that `COUNT` vectors from `column` on are inside the row, so inside
        // the tile at `at`, inside `keep` and inside the packed weights.
        unsafe {
            let at = self.tile.as_mut_ptr().add(row.index * self.shape.stride + column);
            let logits = self.logits::<BIAS, MASK, COUNT>(row, column);
            let mut x = logits.map(|(_, x)| x);
            for (index, &x) in x.iter().enumerate() {
                above[index % 2] = simd.max(above[index % 2], x);
            }
            if let Some(keep) = keep {
                for (index, &(product, _)) in logits.iter().enumerate() {
                    simd.store(keep.add(column + index * lanes), product);
                }
            }
            for x in &mut x {
                *x = simd.sub(*x, simd.splat(shift));
            }
            x = power(simd, row.base, x);
            if MARK {
                let nothing = simd.splat(E::F::NEG_INFINITY);
                for (weight, &(_, logit)) in x.iter_mut().zip(&logits) {
                    let is_masked = simd.equal(logit, nothing);
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
                let packed = self.packed.data.as_mut_ptr();
                for (pair, weights) in x.as_chunks::<2>().0.iter().enumerate() {
                    let (column, at) = (column + 2 * pair * lanes, at.add(2 * pair * lanes));
                    E::put_weights(simd, packed, self.packed.columns, row.index, column, at, *weights);
                }
            }
        }
    }

    /// Applies dropout to the weights of a row, which are in the tile.
    ///
    /// # Safety
    /// `row` is below the number of rows, and the tile and the packed weights have the sizes that `run`
    /// asserts.
    #[inline(always)]
    unsafe fn drop_weights(&mut self, row: usize) {
        let simd = self.engine.simd();
        let lanes = <E::S as Simd<E::F>>::LANES;
        let TileShape { rows, first_key, columns, stride, .. } = self.shape;
        // SAFETY: the caller guarantees that the tile has the row's `columns` elements; nothing else refers
        // to them while this slice lives.
        let weights =
            unsafe { std::slice::from_raw_parts_mut(self.tile.as_mut_ptr().add(row * stride), columns) };
        self.terms.drop(&rows[row], first_key, weights);
        let (tile, packed) = (weights.as_mut_ptr(), self.packed.data.as_mut_ptr());
        for column in (0..columns).step_by(2 * lanes) {
            // SAFETY: `run` asserts that columns are whole pairs of vectors, so two vectors from `column` on
            // are inside the row, and inside the packed weights, as the caller guarantees.
            unsafe {
                let at = tile.add(column);
                let weights = [simd.load(at), simd.load(at.add(lanes))];
                E::put_weights(simd, packed, self.packed.columns, row, column, at, weights);
            }
        }
    }
}
