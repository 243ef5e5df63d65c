//! The gradients of a block of logits: from products and the gradients of probabilities to probabilities and the
//! gradients of products (Dao et al., arXiv 2205.14135, appendix B.2).

use attention_core::Scalar;
use attention_core::merge::Accumulator;

use crate::engine::Engine;
use crate::float::Float;
use crate::simd::{Kernel, Simd, exp2};
use crate::terms::{QueryRow, Terms};

/// What the gradient of a block is taken of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum GradientOf {
    /// The scaled products of queries and keys, below the softcap: what dq and dk are made of.
    Products,
    /// The logits, above the softcap: what dbias is made of.
    Logits,
}

/// What the forward pass left of a query row, with its incoming gradients.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RowState {
    /// The logsumexp, of base two; -inf for a row that attends to nothing.
    pub(crate) lse: f64,
    /// `<d_out, out> - d_lse`: what the softmax subtracts from the gradient of each probability.
    pub(crate) delta: f64,
}

/// Turns a tile of products and one of gradients of probabilities, in place, into probabilities after dropout (with
/// the marks of what takes no part) and the gradients of the block.
pub(crate) struct BlockGradient<'t, 'a, E: Engine> {
    pub(crate) engine: E,
    pub(crate) terms: &'t Terms<'a, E::F>,
    pub(crate) of: GradientOf,
    pub(crate) rows: &'t [QueryRow],
    pub(crate) states: &'t [RowState],
    /// The key of the tiles' first column.
    pub(crate) first: usize,
    /// Columns to look at: whole pairs of vectors. Those behind the last key are masked by the rows' ranges.
    pub(crate) columns: usize,
    /// Whether there is something to mask or to add.
    pub(crate) apply: bool,
    pub(crate) products: &'t mut [E::F],
    pub(crate) gradients: &'t mut [E::F],
    /// Room for the slopes of a softcap in one row.
    pub(crate) slopes: &'t mut [E::F],
    pub(crate) stride: usize,
}

impl<E: Engine> Kernel for BlockGradient<'_, '_, E> {
    type Output = ();

    #[inline(always)]
    fn run(mut self) {
        let lanes = <E::S as Simd<E::F>>::LANES;
        let rows = self.rows.len();
        assert!(self.columns.is_multiple_of(2 * lanes) && self.columns <= self.stride);
        let needed = rows.saturating_sub(1) * self.stride + self.columns;
        assert!(needed <= self.products.len() && needed <= self.gradients.len() && rows <= self.states.len());
        assert!(!self.terms.has_softcap() || self.columns <= self.slopes.len());
        for row in 0..rows {
            // SAFETY: the row's columns are in both tiles, as checked above.
            unsafe { self.row(row) };
        }
    }
}

impl<E: Engine> BlockGradient<'_, '_, E> {
    /// # Safety
    /// As checked in `run`, for a row of the block.
    #[inline(always)]
    unsafe fn row(&mut self, row: usize) {
        let simd = self.engine.simd();
        let lanes = <E::S as Simd<E::F>>::LANES;
        let (columns, start) = (self.columns, row * self.stride);
        let (info, state) = (self.rows[row], self.states[row]);
        if state.lse == f64::NEG_INFINITY {
            // The row attends to nothing, and whatever its gradients hold does not matter.
            self.products[start..start + columns].fill(E::F::DISALLOWED);
            self.gradients[start..start + columns].fill(E::F::ZERO);
            return;
        }
        // SAFETY: the row is in the tile.
        let tile = unsafe { self.products.as_mut_ptr().add(start) };
        let slopes = self.terms.has_softcap().then_some(self.slopes.as_mut_ptr());
        if self.apply {
            // SAFETY: `columns` elements of the row, and of the slopes.
            unsafe { self.terms.apply(simd, &info, self.first, columns, tile, slopes) };
        }
        if self.terms.has_dropout() {
            let gradients = &mut self.gradients[start..start + columns];
            self.terms.drop(&info, self.first, gradients);
        }
        let mut column = 0;
        if <E::S as Simd<E::F>>::SIDE_BY_SIDE == 4 {
            while column + 4 * lanes <= columns {
                // SAFETY: four vectors inside the row.
                unsafe { self.vectors::<4>(start + column, column, &state) };
                column += 4 * lanes;
            }
        }
        while column < columns {
            // SAFETY: columns are whole pairs of vectors.
            unsafe { self.vectors::<2>(start + column, column, &state) };
            column += 2 * lanes;
        }
        if self.terms.has_dropout() {
            let weights = &mut self.products[start..start + columns];
            self.terms.drop(&info, self.first, weights);
        }
    }

    /// `COUNT` vectors of a row: 2 or 4.
    ///
    /// # Safety
    /// The vectors at `at` are inside both tiles, and those at `column` inside the slopes.
    #[inline(always)]
    unsafe fn vectors<const COUNT: usize>(&mut self, at: usize, column: usize, state: &RowState) {
        let simd = self.engine.simd();
        let lanes = <E::S as Simd<E::F>>::LANES;
        let factor = simd.splat(self.terms.tile_factor());
        let shift = simd.splat(E::F::from_f64(-state.lse));
        let delta = simd.splat(E::F::from_f64(state.delta));
        let masked = simd.splat(E::F::NEG_INFINITY);
        let has_slopes = self.terms.has_softcap() && self.of == GradientOf::Products;
        // SAFETY: the caller's.
        unsafe {
            let (tile, gradients) = (self.products.as_mut_ptr().add(at), self.gradients.as_mut_ptr().add(at));
            let (mut products, mut x) = ([shift; COUNT], [shift; COUNT]);
            for (index, (product, x)) in products.iter_mut().zip(&mut x).enumerate() {
                *product = simd.load(tile.add(index * lanes));
                *x = simd.fma(*product, factor, shift);
            }
            let weights = exp2::<E::F, E::S, false, COUNT>(simd, x);
            for (index, (&p, &product)) in weights.iter().zip(&products).enumerate() {
                let disallowed = simd.equal(product, masked);
                let at = gradients.add(index * lanes);
                let mut d = simd.mul(p, simd.sub(simd.load(at), delta));
                if has_slopes {
                    d = simd.mul(d, simd.load(self.slopes.as_ptr().add(column + index * lanes)));
                }
                let p = simd.select(disallowed, simd.splat(E::F::DISALLOWED), p);
                simd.store(tile.add(index * lanes), p);
                simd.store(at, simd.select(disallowed, simd.splat(E::F::ZERO), d));
            }
        }
    }
}
