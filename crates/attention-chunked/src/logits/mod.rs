//! From products of queries and keys to logits: scale, softcap, ALiBi, bias, masks, dropout.
//!
//! The semantics of [`Problem`](attention_core::Problem), steps 2 and 3. Logits come in units of the call: products as they are where
//! nothing but the scale applies, so that no pass and no rounding is spent on it, natural logits otherwise.
//! [`Terms::unit`] says how large a unit is; weights are powers of [`Terms::base`]. Differences of logits are
//! taken in these units, where those of equal logits are exactly 0 whatever their size, and only they go to
//! base two.
//!
//! One expression makes a natural logit of a product and of what is added to it, [`logit`], for every path,
//! pass and column: the bits of a result do not depend on how a bias or a mask lies, or on what is masked.

mod added;
mod terms;

pub(crate) use self::added::{Added, AddedRow, MAX_COLUMNS};
pub(crate) use self::terms::{QueryRow, Terms};
use crate::float::Float;
use crate::scratch::extent;
use crate::simd::{Kernel, Simd, tanh};

/// Which logits the products in a tile are, and where they lie in it.
#[derive(Clone, Copy)]
pub(crate) struct TileShape<'t> {
    /// The query row of each row of the tile.
    pub(crate) rows: &'t [QueryRow],
    /// The key of the first column.
    pub(crate) first_key: usize,
    /// Columns to look at: whole pairs of vectors. Those behind the last key are masked by the rows' ranges.
    pub(crate) columns: usize,
    /// The distance between rows.
    pub(crate) stride: usize,
    /// Whether products are masked, or something is added to them; without it they are logits.
    pub(crate) apply: bool,
}

impl TileShape<'_> {
    /// Elements from the first of the tile to the last column of its last row.
    #[inline(always)]
    pub(crate) fn extent(&self) -> usize {
        extent(self.rows.len(), self.stride, self.columns)
    }
}

impl<F: Float> Terms<'_, F> {
    /// Turns a row of products into logits by what is to be [`added`](Self::added); -inf wherever a key takes
    /// no part.
    ///
    /// # Safety
    /// The tile has `columns` elements, whole vectors, and what is added has as many.
    #[inline(always)]
    pub(crate) unsafe fn add<S: Simd<F>>(&self, simd: S, added: Added<'_, F>, tile: *mut F, columns: usize) {
        if added.bias.is_none() && added.mask.is_none() {
            return;
        }
        let factor = simd.splat(self.factor());
        for column in (0..columns).step_by(S::LANES) {
            // SAFETY: a whole vector of the tile, and of what is added.
            unsafe {
                let at = tile.add(column);
                let mut x = simd.load(at);
                if let Some(bias) = added.bias {
                    x = logit(simd, x, factor, simd.load(bias.as_ptr().add(column)));
                }
                if let Some(mask) = added.mask {
                    x = masked(simd, x, simd.load_mask(mask.as_ptr().add(column)));
                }
                simd.store(at, x);
            }
        }
    }

    /// Makes natural logits of a row of products by scale and softcap alone, where
    /// [`needs_tile`](Self::needs_tile). `slopes`, of the tile's size, receives the softcap's derivative at
    /// each product.
    #[inline(always)]
    pub(crate) fn capped<S: Simd<F>>(&self, simd: S, tile: &mut [F], slopes: Option<&mut [F]>) {
        simd.vectorize(Capped { terms: self, simd, tile, slopes });
    }
}

/// [`Terms::capped`], compiled once for all kernels of a level.
struct Capped<'t, 'a, F, S> {
    terms: &'t Terms<'a, F>,
    simd: S,
    tile: &'t mut [F],
    slopes: Option<&'t mut [F]>,
}

impl<F: Float, S: Simd<F>> Kernel for Capped<'_, '_, F, S> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        let Self { terms, simd, tile, mut slopes } = self;
        assert!(tile.len().is_multiple_of(S::LANES));
        assert!(slopes.as_ref().is_none_or(|slopes| slopes.len() == tile.len()));
        let scale = simd.splat(terms.scale);
        for column in (0..tile.len()).step_by(S::LANES) {
            // SAFETY: the tile has whole vectors, and the slopes have its size, as checked above.
            unsafe {
                let at = tile.as_mut_ptr().add(column);
                let mut x = simd.mul(simd.load(at), scale);
                if let Some(cap) = terms.softcap {
                    let t = tanh(simd, simd.div(x, simd.splat(cap)));
                    if let Some(slopes) = &mut slopes {
                        let slope = simd.sub(simd.splat(F::ONE), simd.mul(t, t));
                        simd.store(slopes.as_mut_ptr().add(column), slope);
                    }
                    x = simd.mul(simd.splat(cap), t);
                }
                simd.store(at, x);
            }
        }
    }
}

/// The natural logit of a product and what is added to it: rounded once where the level has fused operations.
/// What is added as -inf masks like a boolean mask, whatever the product is.
#[inline(always)]
pub(crate) fn logit<F: Float, S: Simd<F>>(simd: S, product: S::V, factor: S::V, added: S::V) -> S::V {
    let disallowed = simd.equal(added, simd.splat(F::NEG_INFINITY));
    simd.select(disallowed, added, simd.fma(product, factor, added))
}

/// -inf where the mask is false.
#[inline(always)]
pub(crate) fn masked<F: Float, S: Simd<F>>(simd: S, x: S::V, allowed: S::Mask) -> S::V {
    simd.select(allowed, x, simd.splat(F::NEG_INFINITY))
}
