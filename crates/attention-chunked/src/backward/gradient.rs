//! The gradients of a block of logits: from products and the gradients of probabilities to probabilities and the
//! gradients of products (Dao et al., arXiv 2205.14135, appendix B.2).

use attention_core::Scalar;
use attention_core::merge::Accumulator;

use crate::engine::{Engine, GradientPacks, STAGE};
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
    /// Where the engine packs what is computed. Not with a softcap or dropout.
    pub(crate) packs: Option<GradientPacks<E::Packed>>,
    /// Whether the tiles receive what is computed too.
    pub(crate) keep: bool,
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
        if let Some(packs) = self.packs {
            assert!(!self.terms.has_softcap() && !self.terms.has_dropout());
            assert!(self.columns <= E::BLOCK_KEYS && rows <= E::BLOCK_ROWS);
            // Packed rows come in pairs of whole groups.
            for row in (0..rows.next_multiple_of(STAGE)).step_by(2) {
                // SAFETY: as above; the rows and columns are inside the block, whose packs the caller vouches for.
                unsafe { self.pair(row, &packs) };
            }
            return;
        }
        for row in 0..rows {
            // SAFETY: the row's columns are in both tiles, as checked above.
            unsafe { self.row(row) };
        }
    }
}

/// Row and vector of what is computed side by side in a pair of rows.
const PLACES: [(usize, usize); 4] = [(0, 0), (0, 1), (1, 0), (1, 1)];

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

    /// Two rows, packed; those behind the last real row are zero.
    ///
    /// # Safety
    /// As checked in `run`, for rows of the block, and the packs are those of a block.
    #[inline(always)]
    unsafe fn pair(&mut self, first: usize, packs: &GradientPacks<E::Packed>) {
        let simd = self.engine.simd();
        let lanes = <E::S as Simd<E::F>>::LANES;
        let columns = self.columns;
        let zero = simd.splat(E::F::ZERO);
        let real = self.rows.len().saturating_sub(first).min(2);
        for row in first..first + real {
            let start = row * self.stride;
            if self.states[row].lse == f64::NEG_INFINITY {
                // As in `row`: all of it takes no part.
                self.products[start..start + columns].fill(E::F::NEG_INFINITY);
                self.gradients[start..start + columns].fill(E::F::ZERO);
            } else if self.apply {
                // SAFETY: `columns` elements of the row.
                unsafe {
                    let tile = self.products.as_mut_ptr().add(start);
                    self.terms.apply(simd, &self.rows[row], self.first, columns, tile, None);
                }
            }
        }
        let factor = simd.splat(self.terms.tile_factor());
        let masked = simd.splat(E::F::NEG_INFINITY);
        let state = |row: usize| {
            let RowState { lse, delta } = self.states[row.min(self.rows.len() - 1)];
            let lse = if lse == f64::NEG_INFINITY { 0.0 } else { lse };
            (simd.splat(E::F::from_f64(-lse)), simd.splat(E::F::from_f64(delta)))
        };
        let states = [state(first), state(first + 1)];
        for column in (0..columns).step_by(2 * lanes) {
            let (mut products, mut x) = ([masked; 4], [masked; 4]);
            let mut incoming = [zero; 4];
            // SAFETY: two vectors of real rows.
            unsafe {
                for (index, (row, vector)) in PLACES.into_iter().enumerate() {
                    if row < real {
                        let at = (first + row) * self.stride + column + vector * lanes;
                        products[index] = simd.load(self.products.as_ptr().add(at));
                        incoming[index] = simd.load(self.gradients.as_ptr().add(at));
                        x[index] = simd.fma(products[index], factor, states[row].0);
                    }
                }
            }
            let weights = exp2::<E::F, E::S, false, 4>(simd, x);
            let (mut p, mut d) = ([[zero; 2]; 2], [[zero; 2]; 2]);
            for (index, (row, vector)) in PLACES.into_iter().enumerate() {
                let disallowed = simd.equal(products[index], masked);
                let gradient = simd.mul(weights[index], simd.sub(incoming[index], states[row].1));
                p[row][vector] = simd.select(disallowed, simd.splat(E::F::DISALLOWED), weights[index]);
                d[row][vector] = simd.select(disallowed, zero, gradient);
            }
            // SAFETY: the caller's; rows that are kept are real.
            unsafe {
                E::put_gradients(simd, packs, first, column, p, d);
                if self.keep {
                    for (row, vector) in PLACES.into_iter().filter(|&(row, _)| row < real) {
                        let at = (first + row) * self.stride + column + vector * lanes;
                        simd.store(self.products.as_mut_ptr().add(at), p[row][vector]);
                        simd.store(self.gradients.as_mut_ptr().add(at), d[row][vector]);
                    }
                }
            }
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
