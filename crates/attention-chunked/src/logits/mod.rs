//! From products of queries and keys to logits: scale, softcap, ALiBi, bias, masks, dropout.
//!
//! The semantics of [`Problem`](attention_core::Problem), steps 2 and 3. Logits come in units of the call:
//! products as they are where nothing but the scale applies, so that no pass and no rounding is spent on it,
//! natural logits otherwise. [`Terms::unit`] says how large a unit is; weights are powers of [`Terms::base`].
//! Differences of logits are taken in these units, where those of equal logits are exactly 0 whatever their
//! size, and only they go to base two.
//!
//! [`TileShape::begin_logits`] is the only way from products to logits, for every path, pass and column: the
//! bits of a result do not depend on how a bias or a mask lies, or on what is masked.

mod added;
mod terms;

use std::marker::PhantomData;
use std::ptr::null;

use self::added::Added;
pub(crate) use self::added::{AddedRow, MAX_COLUMNS};
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

    /// Begins to turn the products of row `row` into logits: writes -inf where causal masking, the window or
    /// the lengths mask, applies scale and softcap where these come before a bias, and finds bias and mask of
    /// the row, which are copied to `memory` where they cannot be read as they lie. `slopes`, of the size of
    /// the products, receives the softcap's derivative at each product. Does nothing without
    /// [`apply`](Self::apply).
    ///
    /// # Panics
    /// Unless `products` are the columns of the tile: whole vectors, at most [`MAX_COLUMNS`].
    #[inline(always)]
    pub(crate) fn begin_logits<'r, F: Float, S: Simd<F>>(
        &self,
        row: usize,
        terms: &'r Terms<'_, F>,
        simd: S,
        products: &mut [F],
        slopes: Option<&mut [F]>,
        memory: &'r mut AddedRow<F>,
    ) -> RowLogits<'r, F> {
        if !self.apply {
            return RowLogits::DONE;
        }
        assert_eq!(products.len(), self.columns);
        if terms.needs_tile() {
            terms.capped(simd, products, slopes);
        }
        let Added { bias, mask } = terms.added(simd, &self.rows[row..], self.first_key, products, memory);
        RowLogits {
            bias: bias.map_or(null(), <[F]>::as_ptr),
            mask: mask.map_or(null(), <[u8]>::as_ptr),
            factor: terms.factor(),
            borrowed: PhantomData,
        }
    }
}

/// The rest of the way from the products of a row to its logits, after [`TileShape::begin_logits`]: a bias
/// and a mask that are still to be applied, or neither.
///
/// They are applied to vectors that the caller loads anyway, by [`vector`](Self::vector) or
/// [`vector_with`](Self::vector_with), or in the tile, by [`finish`](Self::finish).
#[derive(Clone, Copy)]
pub(crate) struct RowLogits<'r, F> {
    /// Bias less ALiBi, an element per column: where it is -inf a key takes no part. Null without.
    bias: *const F,
    /// Zero where a key takes no part, an element per column. Null without.
    mask: *const u8,
    /// What products are multiplied by where a bias is added; they are logits without.
    factor: F,
    borrowed: PhantomData<(&'r [F], &'r [u8])>,
}

impl<'r, F: Float> RowLogits<'r, F> {
    /// Of products that are logits.
    pub(crate) const DONE: Self = Self { bias: null(), mask: null(), factor: F::ONE, borrowed: PhantomData };

    /// Whether a bias or ALiBi is left to be added.
    #[inline(always)]
    pub(crate) fn has_bias(&self) -> bool {
        !self.bias.is_null()
    }

    /// Whether a mask is left to be applied.
    #[inline(always)]
    pub(crate) fn has_mask(&self) -> bool {
        !self.mask.is_null()
    }

    /// Whether products are logits.
    #[inline(always)]
    pub(crate) fn is_done(&self) -> bool {
        !self.has_bias() && !self.has_mask()
    }

    /// The logits of the products at `column`, where it is a constant whether there are bias and mask.
    ///
    /// A natural logit is rounded once where the level has fused operations. A bias of -inf masks like a
    /// boolean mask, whatever the product is.
    ///
    /// # Safety
    /// The row has a vector at `column`; it has what `BIAS` and `MASK` say.
    #[inline(always)]
    pub(crate) unsafe fn vector_with<const BIAS: bool, const MASK: bool, S: Simd<F>>(
        &self,
        simd: S,
        product: S::V,
        column: usize,
    ) -> S::V {
        let nothing = simd.splat(F::NEG_INFINITY);
        let mut x = product;
        // SAFETY: the caller guarantees that the row has a vector at `column` and the bias and the mask that
        // `BIAS` and `MASK` name; `begin_logits` takes both with as many elements as the row has columns.
        unsafe {
            if BIAS {
                let bias = simd.load(self.bias.add(column));
                let sum = simd.fma(x, simd.splat(self.factor), bias);
                x = simd.select(simd.equal(bias, nothing), bias, sum);
            }
            if MASK {
                x = simd.select(simd.load_mask(self.mask.add(column)), x, nothing);
            }
        }
        x
    }

    /// The logits of the products at `column`.
    ///
    /// # Safety
    /// The row has a vector at `column`.
    #[inline(always)]
    pub(crate) unsafe fn vector<S: Simd<F>>(&self, simd: S, product: S::V, column: usize) -> S::V {
        let mut x = product;
        // SAFETY: the caller guarantees that the row has a vector at `column`; each call names a bias or a
        // mask that the row has, by the condition in front of it.
        unsafe {
            if self.has_bias() {
                x = self.vector_with::<true, false, S>(simd, x, column);
            }
            if self.has_mask() {
                x = self.vector_with::<false, true, S>(simd, x, column);
            }
        }
        x
    }

    /// Turns the products in the tile into logits, after which nothing is left.
    ///
    /// # Safety
    /// `row` points to the row's `columns` products, whole vectors.
    #[inline(always)]
    #[must_use = "what was left before is done"]
    pub(crate) unsafe fn finish<S: Simd<F>>(self, simd: S, row: *mut F, columns: usize) -> Self {
        if !self.is_done() {
            for column in (0..columns).step_by(S::LANES) {
                // SAFETY: the caller guarantees that `row` points to `columns` elements, whole vectors, one
                // of which begins at `column`.
                unsafe {
                    let at = row.add(column);
                    simd.store(at, self.vector(simd, simd.load(at), column));
                }
            }
        }
        Self::DONE
    }
}

impl<F: Float> Terms<'_, F> {
    /// Makes natural logits of a row of products by scale and softcap alone, where
    /// [`needs_tile`](Self::needs_tile). `slopes`, of the tile's size, receives the softcap's derivative at
    /// each product.
    #[inline(always)]
    fn capped<S: Simd<F>>(&self, simd: S, tile: &mut [F], slopes: Option<&mut [F]>) {
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
