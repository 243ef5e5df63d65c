//! The gradients of a block of logits: from products and the gradients of probabilities to probabilities and
//! the gradients of products (Dao et al., arXiv 2205.14135, appendix B.2).

use attention_core::merge::Accumulator;

use crate::engine::{Engine, GradientPacks, STAGE};
use crate::float::Float;
use crate::logits::{AddedRow, RowLogits, Terms, TileShape};
use crate::simd::{Base, Kernel, Simd};

/// What the gradient of a block is taken of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum GradientOf {
    /// The scaled products of queries and keys, below the softcap: what dq and dk are made of.
    Products,
    /// The logits, above the softcap: what dbias is made of.
    Logits,
}

/// What probabilities of a query row are made of, `gain e^(x - shift)`, and the row term of their gradients.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RowState<F> {
    /// Near the logsumexp, or the largest logit, in units of the call; -inf for a row that attends to
    /// nothing.
    shift: F,
    /// Brings the sum of probabilities to 1: `e` to what the shift leaves of the logsumexp.
    gain: F,
    /// How far a logit may be above the shift, so that no probability is above 1.
    most: F,
    /// `<d_out, out> - d_lse`: what the softmax subtracts from the gradient of each probability.
    delta: F,
}

impl<F: Float> RowState<F> {
    /// Of a row that attends to nothing.
    pub(crate) const EMPTY: Self =
        Self { shift: F::NEG_INFINITY, gain: F::ZERO, most: F::ZERO, delta: F::ZERO };

    /// Of a state in f64, with the logarithm of the gain, where logits come in units of size `unit`.
    pub(crate) fn of([shift, log_gain, delta]: [f64; 3], unit: F) -> Self {
        // What the rounding of a shift leaves is mostly so small that two terms are exact, in a fraction of
        // the time.
        let is_tiny = log_gain.abs() < 1e-6;
        // Where the shift of a very large logsumexp was rounded up by far, no key is near it, and zero times
        // infinity would be NaN.
        let gain =
            if is_tiny { 1.0 + (log_gain + 0.5 * log_gain * log_gain) } else { log_gain.min(64.0).exp() };
        // The softmax's own shift is at most this far below the largest logit.
        let room = F::ROOM.to_f64() * std::f64::consts::LN_2;
        let most = F::from_f64((-log_gain).min(room) / unit.to_f64());
        Self { shift: F::from_f64(shift), gain: F::from_f64(gain), most, delta: F::from_f64(delta) }
    }

    fn is_empty(&self) -> bool {
        self.shift == F::NEG_INFINITY
    }
}

/// Turns a tile of products and one of gradients of probabilities, in place, into probabilities after dropout
/// (with the marks of what takes no part) and the gradients of the block.
pub(crate) struct BlockGradient<'t, 'a, E: Engine> {
    pub(crate) engine: E,
    pub(crate) terms: &'t Terms<'a, E::F>,
    pub(crate) of: GradientOf,
    /// Of both tiles.
    pub(crate) shape: TileShape<'t>,
    pub(crate) states: &'t [RowState<E::F>],
    pub(crate) tiles: GradientTiles<'t, E::F>,
    pub(crate) destination: Destination<E::Packed>,
}

/// The tiles that the gradients of a block are computed in.
pub(crate) struct GradientTiles<'t, F> {
    /// Products of queries and keys, then probabilities.
    pub(crate) products: &'t mut [F],
    /// Gradients of probabilities, then of logits or products.
    pub(crate) gradients: &'t mut [F],
    /// The softcap's derivative at each product of one row.
    pub(crate) slopes: &'t mut [F],
}

/// Where probabilities and gradients are written. Packs are for an engine with
/// [`PACKS_GRADIENTS`](Engine::PACKS_GRADIENTS), without softcap and dropout.
#[derive(Clone, Copy)]
pub(crate) enum Destination<P> {
    /// To the tiles.
    Tiles,
    /// To the tiles, and packed.
    TilesAndPacks(GradientPacks<P>),
    /// Packed; the tiles keep what they have.
    Packs(GradientPacks<P>),
}

impl<E: Engine> Kernel for BlockGradient<'_, '_, E> {
    type Output = ();

    #[inline(always)]
    fn run(mut self) {
        let lanes = <E::S as Simd<E::F>>::LANES;
        let TileShape { rows, columns, stride, .. } = self.shape;
        let (rows, tiles) = (rows.len(), &self.tiles);
        assert!(columns.is_multiple_of(2 * lanes) && columns <= stride && rows <= self.states.len());
        let needed = self.shape.extent();
        assert!(needed <= tiles.products.len() && needed <= tiles.gradients.len());
        assert!(!self.terms.has_softcap() || columns <= tiles.slopes.len());
        let mut memory: [AddedRow<E::F>; 2] = Default::default();
        let before = self.before();
        if before != E::F::ONE {
            for row in 0..rows {
                let gradients = &mut self.tiles.gradients[row * stride..][..columns];
                gradients.iter_mut().for_each(|gradient| *gradient = *gradient * before);
            }
        }
        let (packs, keeps_tiles) = match self.destination {
            Destination::Tiles => (None, true),
            Destination::TilesAndPacks(packs) => (Some(packs), true),
            Destination::Packs(packs) => (Some(packs), false),
        };
        if E::PACKS_GRADIENTS
            && let Some(packs) = packs
        {
            assert!(!self.terms.has_softcap() && !self.terms.has_dropout());
            assert!(columns <= E::BLOCK_KEYS && rows <= E::BLOCK_ROWS);
            // Packed rows come in pairs of whole groups.
            for row in (0..rows.next_multiple_of(STAGE)).step_by(2) {
                // SAFETY: `Pair::packs`, which makes all packs, checked that each buffer is null or has the
                // length of a whole block; `Pair::gradients`, which runs this, borrows the buffers meanwhile.
                // Both rows and all columns are inside the block, by the asserts above.
                unsafe { self.pair(row, &packs, keeps_tiles, &mut memory) };
            }
            return;
        }
        for row in 0..rows {
            // SAFETY: the row is below `rows`, so its columns are in both tiles by the asserts above.
            unsafe { self.row(row, &mut memory[0]) };
        }
    }
}

/// Row and vector of what is computed side by side in a pair of rows.
const PLACES: [(usize, usize); 4] = [(0, 0), (0, 1), (1, 0), (1, 1)];

impl<E: Engine> BlockGradient<'_, '_, E> {
    /// What the gradients of products are multiplied with before they are summed.
    #[inline(always)]
    fn before(&self) -> E::F {
        if self.of == GradientOf::Products { self.terms.gradient_scale().0 } else { E::F::ONE }
    }

    /// # Safety
    /// `row` is below the number of rows, and both tiles, the slopes and the states have the sizes that `run`
    /// asserts.
    #[inline(always)]
    unsafe fn row(&mut self, row: usize, memory: &mut AddedRow<E::F>) {
        let plain = self.engine.plain();
        let lanes = <E::S as Simd<E::F>>::LANES;
        let terms = self.terms;
        let TileShape { rows, first_key, columns, stride, .. } = self.shape;
        let (info, state, start) = (rows[row], self.states[row], row * stride);
        if state.is_empty() {
            // The row attends to nothing, and whatever its gradients hold does not matter.
            self.tiles.products[start..start + columns].fill(E::F::DISALLOWED);
            self.tiles.gradients[start..start + columns].fill(E::F::ZERO);
            return;
        }
        // SAFETY: the caller guarantees a row of the tile, so its first element is inside `products`.
        let tile = unsafe { self.tiles.products.as_mut_ptr().add(start) };
        // SAFETY: the caller guarantees that the tile has the row's `columns` elements. They are changed
        // through this slice in `begin_logits` only, and nothing else refers to them until then.
        let products = unsafe { std::slice::from_raw_parts_mut(tile, columns) };
        let slopes = terms.has_softcap().then(|| &mut self.tiles.slopes[..columns]);
        let logits = self.shape.begin_logits(row, terms, plain, products, slopes, memory);
        if self.terms.has_dropout() {
            let gradients = &mut self.tiles.gradients[start..start + columns];
            self.terms.drop(&info, first_key, gradients);
        }
        let mut column = 0;
        if <E::S as Simd<E::F>>::SIDE_BY_SIDE == 4 {
            while column + 4 * lanes <= columns {
                // SAFETY: four vectors from `column` on are inside the row, by the condition of the loop, and
                // the caller guarantees that the row is inside both tiles.
                unsafe { self.vectors::<4>(start + column, column, &state, &logits) };
                column += 4 * lanes;
            }
        }
        while column < columns {
            // SAFETY: `columns` is a multiple of two vectors, as `run` asserts, and so is `column`: two
            // vectors from there on are inside the row, and the caller guarantees that the row is inside both
            // tiles.
            unsafe { self.vectors::<2>(start + column, column, &state, &logits) };
            column += 2 * lanes;
        }
        if self.terms.has_dropout() {
            let weights = &mut self.tiles.products[start..start + columns];
            self.terms.drop(&info, first_key, weights);
        }
    }

    /// Two rows, packed; those behind the last real row are zero.
    ///
    /// # Safety
    /// `first` is even, both rows are below the rows of a block of the engine, and both tiles and the states
    /// have the sizes that `run` asserts. Each pack is null or has the length of a block.
    #[inline(always)]
    unsafe fn pair(
        &mut self,
        first: usize,
        packs: &GradientPacks<E::Packed>,
        keeps_tiles: bool,
        memory: &mut [AddedRow<E::F>; 2],
    ) {
        let (simd, plain) = (self.engine.simd(), self.engine.plain());
        let lanes = <E::S as Simd<E::F>>::LANES;
        let terms = self.terms;
        let TileShape { rows, columns, stride, .. } = self.shape;
        let zero = simd.splat(E::F::ZERO);
        let real = rows.len().saturating_sub(first).min(2);
        let mut logits = [RowLogits::DONE; 2];
        for (index, memory) in memory.iter_mut().enumerate().take(real) {
            let row = first + index;
            let start = row * stride;
            if self.states[row].is_empty() {
                // As in `row`: all of it takes no part.
                self.tiles.products[start..start + columns].fill(E::F::NEG_INFINITY);
                self.tiles.gradients[start..start + columns].fill(E::F::ZERO);
            } else {
                let products = &mut self.tiles.products[start..start + columns];
                logits[index] = self.shape.begin_logits(row, terms, plain, products, None, memory);
            }
        }
        let are_logits = logits.iter().all(RowLogits::is_done);
        let nothing = simd.splat(E::F::NEG_INFINITY);
        let base = terms.base();
        let states = [first, first + 1]
            .map(|row| State::of(simd, &self.states[row.min(rows.len() - 1)], self.before()));
        for column in (0..columns).step_by(2 * lanes) {
            let mut x = [nothing; 4];
            let mut incoming = [zero; 4];
            // SAFETY: rows below `real` are rows of the tiles, which have the sizes that `run` asserts, as
            // the caller guarantees; `columns` is a multiple of two vectors, so both are inside the row.
            unsafe {
                for (index, (row, vector)) in PLACES.into_iter().enumerate() {
                    if row < real {
                        let at = (first + row) * stride + column + vector * lanes;
                        x[index] = simd.load(self.tiles.products.as_ptr().add(at));
                        incoming[index] = simd.load(self.tiles.gradients.as_ptr().add(at));
                    }
                }
            }
            if !are_logits {
                for (x, (row, vector)) in x.iter_mut().zip(PLACES) {
                    // SAFETY: `columns` is a multiple of two vectors, so both are inside the row; rows that
                    // are not real have logits that are done, which read nothing.
                    *x = unsafe { logits[row].vector(simd, *x, column + vector * lanes) };
                }
            }
            let weights = probabilities(simd, base, x, PLACES.map(|(row, _)| states[row]));
            let (mut p, mut d) = ([[zero; 2]; 2], [[zero; 2]; 2]);
            for (index, (row, vector)) in PLACES.into_iter().enumerate() {
                let disallowed = simd.equal(x[index], nothing);
                let gradient = simd.mul(weights[index], simd.sub(incoming[index], states[row].delta));
                p[row][vector] = simd.select(disallowed, simd.splat(E::F::DISALLOWED), weights[index]);
                d[row][vector] = simd.select(disallowed, zero, gradient);
            }
            // SAFETY: the caller guarantees packs of a block, and that both rows and the columns are inside
            // it; `column` is a multiple of two vectors. Only rows below `real` are stored, which are in the
            // tiles.
            unsafe {
                E::put_gradients(simd, packs, first, column, p, d);
                if keeps_tiles {
                    for (row, vector) in PLACES.into_iter().filter(|&(row, _)| row < real) {
                        let at = (first + row) * stride + column + vector * lanes;
                        simd.store(self.tiles.products.as_mut_ptr().add(at), p[row][vector]);
                        simd.store(self.tiles.gradients.as_mut_ptr().add(at), d[row][vector]);
                    }
                }
            }
        }
    }

    /// `COUNT` vectors of a row: 2 or 4.
    ///
    /// # Safety
    /// The vectors at `at` are inside both tiles, and those at `column` inside the slopes and the row.
    #[inline(always)]
    unsafe fn vectors<const COUNT: usize>(
        &mut self,
        at: usize,
        column: usize,
        state: &RowState<E::F>,
        logits: &RowLogits<'_, E::F>,
    ) {
        let simd = self.engine.simd();
        let lanes = <E::S as Simd<E::F>>::LANES;
        let nothing = simd.splat(E::F::NEG_INFINITY);
        let has_slopes = self.terms.has_softcap() && self.of == GradientOf::Products;
        let state = State::of(simd, state, self.before());
        // SAFETY: the caller guarantees that the vectors at `at` are inside both tiles, and those at the
        // column inside the slopes and the row.
        unsafe {
            let (tile, gradients) =
                (self.tiles.products.as_mut_ptr().add(at), self.tiles.gradients.as_mut_ptr().add(at));
            let mut x = [nothing; COUNT];
            for (index, x) in x.iter_mut().enumerate() {
                *x = simd.load(tile.add(index * lanes));
            }
            if !logits.is_done() {
                for (index, x) in x.iter_mut().enumerate() {
                    *x = logits.vector(simd, *x, column + index * lanes);
                }
            }
            let weights = probabilities(simd, self.terms.base(), x, [state; COUNT]);
            for (index, (&p, &x)) in weights.iter().zip(&x).enumerate() {
                let disallowed = simd.equal(x, nothing);
                let at = gradients.add(index * lanes);
                let mut d = simd.mul(p, simd.sub(simd.load(at), state.delta));
                if has_slopes {
                    d = simd.mul(d, simd.load(self.tiles.slopes.as_ptr().add(column + index * lanes)));
                }
                let p = simd.select(disallowed, simd.splat(E::F::DISALLOWED), p);
                simd.store(tile.add(index * lanes), p);
                simd.store(at, simd.select(disallowed, simd.splat(E::F::ZERO), d));
            }
        }
    }
}

/// A [`RowState`] in vectors.
#[derive(Clone, Copy)]
struct State<V> {
    shift: V,
    gain: V,
    most: V,
    delta: V,
}

impl<V: Copy> State<V> {
    #[inline(always)]
    fn of<F: Float, S: Simd<F, V = V>>(simd: S, state: &RowState<F>, before: F) -> Self {
        // A row that attends to nothing has logits of -inf, which no shift may make NaN of.
        let shift = if state.is_empty() { F::ZERO } else { state.shift };
        Self {
            shift: simd.splat(shift),
            gain: simd.splat(state.gain),
            most: simd.splat(state.most),
            delta: simd.splat(state.delta * before),
        }
    }
}

/// The probabilities of logits. NaN stays NaN.
#[inline(always)]
fn probabilities<F: Float, S: Simd<F>, const COUNT: usize>(
    simd: S,
    base: Base<F>,
    mut x: [S::V; COUNT],
    states: [State<S::V>; COUNT],
) -> [S::V; COUNT] {
    for (x, state) in x.iter_mut().zip(&states) {
        *x = simd.min(state.most, simd.sub(*x, state.shift));
    }
    simd.scaled_power(base, x, states.map(|state| state.gain))
}
