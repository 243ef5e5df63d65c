//! From products of queries and keys to logits: scale, softcap, ALiBi, bias, masks, dropout.
//!
//! The semantics of [`Problem`], steps 2 and 3. Logits come in units of the call: products as they are where
//! nothing but the scale applies, so that no pass and no rounding is spent on it, natural logits otherwise.
//! [`Terms::unit`] says how large a unit is; weights are powers of [`Terms::base`]. Differences of logits are
//! taken in these units, where those of equal logits are exactly 0 whatever their size, and only they go to
//! base two.
//!
//! One expression makes a natural logit of a product and of what is added to it, [`logit`], for every path,
//! pass and column: the bits of a result do not depend on how a bias or a mask lies, or on what is masked.

use std::ops::Range;

use attention_core::{DType, DropoutStream, HostView, Inputs, Problem, Row};

use crate::float::Float;
use crate::simd::{Base, Kernel, Simd, prefetch, tanh};
use crate::tensor::{Floats, Source, typed};

/// A query row: its head and query, and the keys that structure lets it see.
#[derive(Clone, Copy, Debug)]
pub(crate) struct QueryRow {
    pub(crate) batch: usize,
    pub(crate) head: usize,
    pub(crate) query: usize,
    pub(crate) begin: usize,
    pub(crate) end: usize,
}

/// What a row's products meet on their way to logits.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Added<'r, F> {
    /// Bias less ALiBi; where it is -inf a key takes no part. Products are multiplied by [`Terms::factor`]
    /// where it is added, and are logits without it.
    pub(crate) bias: Option<&'r [F]>,
    /// Makes -inf of where it is zero.
    pub(crate) mask: Option<&'r [u8]>,
}

/// Memory for what is added to a row, where it does not lie in the caller's as it is used.
pub(crate) struct AddedRow<F> {
    bias: [F; MAX_COLUMNS],
    mask: [u8; MAX_COLUMNS],
}

impl<F: Float> Default for AddedRow<F> {
    fn default() -> Self {
        Self { bias: [F::ZERO; MAX_COLUMNS], mask: [0; MAX_COLUMNS] }
    }
}

/// Columns of the longest row of a tile.
pub(crate) const MAX_COLUMNS: usize = 272;

/// How many rows ahead bias and mask are asked for: a piece of a row is too short for the processor's own
/// prefetching.
const AHEAD: usize = 4;

/// What turns products into logits, read from the call once.
pub(crate) struct Terms<'a, F> {
    problem: &'a Problem,
    /// Not negative: packed queries have the sign.
    scale: F,
    unit: F,
    base: Base<F>,
    is_plain: bool,
    softcap: Option<F>,
    slopes: Option<Floats<'a>>,
    slopes_per_batch: bool,
    bias: Option<(Floats<'a>, [usize; 4])>,
    /// Whether a bias is rounded to f32, the precision of the logits by contract, although f64 computes them.
    narrows_bias: bool,
    mask: Option<(HostView<'a, u8>, [usize; 4])>,
    dropout: Option<DropoutStream>,
    gradient_scale: (F, F),
}

impl<'a, F: Float> Terms<'a, F> {
    pub(crate) fn new(problem: &'a Problem, inputs: &Inputs<'a>) -> Self {
        let shape = |view: attention_core::View<'_>| std::array::from_fn(|axis| view.shape()[axis]);
        let mask = inputs.mask.map(|mask| {
            let bytes = mask.host_mask();
            let bytes = bytes.unwrap_or_else(|| unreachable!("a checked call has a mask in host memory"));
            (bytes, shape(mask))
        });
        let scale = F::from_f64(problem.scale().abs());
        let nothing_added =
            problem.softcap().is_none() && inputs.alibi_slopes.is_none() && inputs.bias.is_none();
        // A scale of zero would make NaN of the -inf of a masked product, and one that cannot go to base two
        // is applied first.
        let plain = nothing_added && (scale * F::LOG2_E).is_normal();
        let unit = if plain { scale } else { F::ONE };
        Self {
            problem,
            scale,
            unit,
            base: Base::new(unit * F::LOG2_E),
            is_plain: plain,
            softcap: problem.softcap().map(F::from_f64),
            slopes: inputs.alibi_slopes.map(Floats::new),
            slopes_per_batch: inputs.alibi_slopes.is_some_and(|slopes| slopes.shape().rank() == 2),
            bias: inputs.bias.map(|bias| (Floats::new(bias), shape(bias))),
            narrows_bias: problem.dtype() != DType::F64
                && inputs.bias.is_some_and(|bias| bias.desc().dtype() == DType::F64),
            mask,
            dropout: problem.dropout_stream(),
            gradient_scale: {
                let exponent = problem.scale().abs().log2();
                let is_large = exponent > 24.0 && problem.dtype() != DType::F16;
                let before = if is_large { (exponent / 2.0).floor().exp2() } else { 1.0 };
                (F::from_f64(before), F::from_f64(problem.scale() / before))
            },
        }
    }

    /// The factors of the scale that gradients of products are multiplied with: before the sums that dq and
    /// dk are, a power of two, so that nothing is rounded, and after them. A scale of 1e38 has operands of
    /// 1e-19, whose products with small gradients would underflow. 1 and the scale otherwise, and for f16,
    /// whose range the gradients of products would leave.
    pub(crate) fn gradient_scale(&self) -> (F, F) {
        self.gradient_scale
    }

    /// What queries are multiplied by when they are packed, so that the scale is never negative from there
    /// on.
    pub(crate) fn query_sign(&self) -> F {
        if self.problem.scale() < 0.0 { -F::ONE } else { F::ONE }
    }

    /// Whether the logits are more than products times the scale, whatever is masked.
    pub(crate) fn is_plain(&self) -> bool {
        self.is_plain
    }

    /// How much a unit of logits is in natural ones.
    pub(crate) fn unit(&self) -> F {
        self.unit
    }

    /// What weights are powers of: `e` to a unit of logits.
    pub(crate) fn base(&self) -> Base<F> {
        self.base
    }

    /// What products are multiplied by where something is added to them, once [`capped`](Self::capped) has
    /// been where that is needed.
    pub(crate) fn factor(&self) -> F {
        if self.needs_tile() { F::ONE } else { self.scale }
    }

    /// Whether products become natural logits in the tile before anything is added: with a softcap, and where
    /// there is nothing to add that the scale could be applied with.
    pub(crate) fn needs_tile(&self) -> bool {
        self.softcap.is_some() || self.scale == F::ZERO || !(self.adds_bias() || self.is_plain)
    }

    /// Whether a bias or ALiBi is added.
    pub(crate) fn adds_bias(&self) -> bool {
        self.slopes.is_some() || self.bias.is_some()
    }

    /// Whether there is a boolean mask.
    pub(crate) fn has_mask(&self) -> bool {
        self.mask.is_some()
    }

    /// Whether there is a softcap.
    pub(crate) fn has_softcap(&self) -> bool {
        self.softcap.is_some()
    }

    /// Whether there is dropout.
    pub(crate) fn has_dropout(&self) -> bool {
        self.dropout.is_some()
    }

    /// Whether the mask is false for every one of these keys and rows: looks until it meets one that is true.
    pub(crate) fn masks_all(&self, rows: &[QueryRow], keys: Range<usize>) -> bool {
        let Some((mask, shape)) = &self.mask else { return false };
        rows.iter().all(|row| {
            let bytes = mask.row(&broadcast(shape, [row.batch, row.head, row.query]));
            if bytes.len() == 1 {
                return bytes.at(0) == 0;
            }
            let keys = keys.start.max(row.begin)..keys.end.min(row.end);
            match bytes.contiguous() {
                Some(bytes) => bytes.get(keys).is_none_or(|bytes| bytes.iter().all(|&byte| byte == 0)),
                None => keys.into_iter().all(|key| bytes.at(key) == 0),
            }
        })
    }

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

    /// Masks what structure masks in a row of products, the first of these, and gives what is to be added to
    /// it: as many elements as the row has columns, at most [`MAX_COLUMNS`], which may lie in `memory`.
    /// Column 0 is key `first`; the columns are a multiple of the vector's lanes.
    #[inline(always)]
    pub(crate) fn added<'r, S: Simd<F>>(
        &'r self,
        simd: S,
        rows: &[QueryRow],
        first: usize,
        tile: &mut [F],
        memory: &'r mut AddedRow<F>,
    ) -> Added<'r, F> {
        simd.vectorize(AddedOf { terms: self, simd, rows, first, tile, memory })
    }

    /// The ALiBi slope of a row's head.
    #[inline(always)]
    fn slope(&self, row: &QueryRow) -> Option<F> {
        let slopes = self.slopes.as_ref()?;
        Some(if self.slopes_per_batch { slopes.at(&[row.batch, row.head]) } else { slopes.at(&[row.head]) })
    }

    /// Makes natural logits of a row of products by scale and softcap alone, where
    /// [`needs_tile`](Self::needs_tile). `slopes`, of the tile's size, receives the softcap's derivative at
    /// each product.
    #[inline(always)]
    pub(crate) fn capped<S: Simd<F>>(&self, simd: S, tile: &mut [F], slopes: Option<&mut [F]>) {
        simd.vectorize(Capped { terms: self, simd, tile, slopes });
    }

    /// Multiplies the weights of a row by the factors of dropout: 0 or the scale of what is kept. A
    /// disallowed weight stays so: negative zero times a factor that is not negative.
    pub(crate) fn drop(&self, row: &QueryRow, first: usize, tile: &mut [F]) {
        self.for_each_kept(row, first, tile.len(), |column, factor| tile[column] = tile[column] * factor);
    }

    /// Calls `visit(column, factor)` for the columns of the row's keys in a tile.
    pub(crate) fn for_each_kept(
        &self,
        row: &QueryRow,
        first: usize,
        columns: usize,
        mut visit: impl FnMut(usize, F),
    ) {
        let Some(stream) = self.dropout else { return };
        // The problem checked that all counters fit.
        let batch_head = (row.batch * self.problem.dims().query_heads + row.head) as u32;
        let keep = F::from_f64(stream.keep_scale());
        let keys = row.begin.max(first)..row.end.min(first + columns);
        stream.for_each(batch_head, row.query as u32, keys, |key, kept| {
            visit(key - first, if kept { keep } else { F::ZERO });
        });
    }
}

/// [`Terms::added`], compiled once for all kernels of a level.
struct AddedOf<'t, 'a, 'i, 'r, F, S> {
    terms: &'r Terms<'a, F>,
    simd: S,
    rows: &'i [QueryRow],
    first: usize,
    tile: &'t mut [F],
    memory: &'r mut AddedRow<F>,
}

impl<'r, F: Float, S: Simd<F>> Kernel for AddedOf<'_, '_, '_, 'r, F, S> {
    type Output = Added<'r, F>;

    #[inline(always)]
    fn run(self) -> Added<'r, F> {
        let Self { terms, simd, rows, first, tile, memory } = self;
        let row = &rows[0];
        let columns = tile.len();
        assert!(columns <= MAX_COLUMNS && columns.is_multiple_of(S::LANES));
        let AddedRow { bias: bias_room, mask: mask_room } = memory;
        let (begin, end) = seen(row, first, columns);
        tile[..begin].fill(F::NEG_INFINITY);
        tile[end..].fill(F::NEG_INFINITY);
        let mut added = Added::default();
        if let Some((mask, shape)) = &terms.mask {
            let bytes = mask.row(&broadcast(shape, [row.batch, row.head, row.query]));
            if let Some(next) = rows.get(AHEAD) {
                ahead(mask.row(&broadcast(shape, [next.batch, next.head, next.query])), first, columns);
            }
            if bytes.len() == 1 {
                if bytes.at(0) == 0 {
                    tile.fill(F::NEG_INFINITY);
                    return added;
                }
            } else {
                let direct = bytes.contiguous().and_then(|bytes| bytes.get(first..first + columns));
                added.mask = Some(direct.unwrap_or_else(|| {
                    for (column, to) in mask_room[begin..end].iter_mut().enumerate() {
                        *to = bytes.at(first + begin + column);
                    }
                    &mask_room[..columns]
                }));
            }
        }
        let slope = terms.slope(row);
        if let Some((bias, shape)) = &terms.bias {
            let index = broadcast(shape, [row.batch, row.head, row.query]);
            typed!(bias, bias => {
                let bias_row = bias.row(&index);
                if let Some(next) = rows.get(AHEAD) {
                    ahead(bias.row(&broadcast(shape, [next.batch, next.head, next.query])), first, columns);
                }
                let direct = if slope.is_none() && !terms.narrows_bias && begin == 0 && end == columns {
                    bias_row.contiguous().and_then(|bias| bias.get(first..first + columns)).and_then(Source::floats)
                } else {
                    None
                };
                if direct.is_some() {
                    added.bias = direct;
                    return added;
                }
                stage_bias(simd, bias_row, first, begin..end, bias_room);
            });
            if terms.narrows_bias {
                for x in &mut bias_room[begin..end] {
                    *x = F::from_f32(x.to_f32());
                }
            }
        } else if slope.is_none() {
            return added;
        }
        if let Some(slope) = slope {
            let position = terms.problem.position(row.batch, row.query);
            let ahead = position.saturating_sub(first as i64);
            add_alibi(simd, slope, ahead, terms.bias.is_some(), begin..end, bias_room);
        }
        // What structure masks stays so, whatever the bias holds there.
        bias_room[..begin].fill(F::ZERO);
        bias_room[end..columns].fill(F::ZERO);
        added.bias = Some(&bias_room[..columns]);
        added
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

/// Adds ALiBi, the slope times the distance of each key, negated, to the vectors of a row of bias, or to
/// zeros, that have columns in `range`; `ahead` is how far the query's position is ahead of column 0. What
/// masks stays so.
#[inline(always)]
fn add_alibi<F: Float, S: Simd<F>>(
    simd: S,
    slope: F,
    ahead: i64,
    has_bias: bool,
    range: Range<usize>,
    to: &mut [F; MAX_COLUMNS],
) {
    // Distances up to 2^24 are exact in every precision, as are their differences.
    let is_near = ahead.unsigned_abs() < (1 << 24) - MAX_COLUMNS as u64;
    let mut lanes = [F::ZERO; 64];
    for (lane, value) in lanes.iter_mut().enumerate() {
        *value = F::from_difference(lane as i64);
    }
    // SAFETY: 64 elements are as many as any vector has.
    let offsets = unsafe { simd.load(lanes.as_ptr()) };
    let (slope, nothing) = (simd.splat(-slope), simd.splat(F::NEG_INFINITY));
    for column in (range.start / S::LANES * S::LANES..range.end).step_by(S::LANES) {
        let distance = if is_near {
            simd.sub(simd.splat(F::from_difference(ahead - column as i64)), offsets)
        } else {
            // Rounded once, whichever column of a tile a key is.
            for (lane, value) in lanes[..S::LANES].iter_mut().enumerate() {
                *value = F::from_difference(ahead.saturating_sub((column + lane) as i64));
            }
            // SAFETY: 64 elements are as many as any vector has.
            unsafe { simd.load(lanes.as_ptr()) }
        };
        // SAFETY: a row has whole vectors.
        unsafe {
            let at = to.as_mut_ptr().add(column);
            let bias = if has_bias { simd.load(at) } else { simd.splat(F::ZERO) };
            let sum = simd.fma(slope, simd.abs(distance), bias);
            simd.store(at, simd.select(simd.equal(bias, nothing), nothing, sum));
        }
    }
}

/// The columns that structure lets a row see, begin and end.
#[inline(always)]
fn seen(row: &QueryRow, first: usize, columns: usize) -> (usize, usize) {
    let begin = row.begin.clamp(first, first + columns) - first;
    (begin, row.end.clamp(first + begin, first + columns) - first)
}

/// Asks for columns of a row that will be needed.
#[inline(always)]
fn ahead<T: Copy>(row: Row<'_, T>, first: usize, columns: usize) {
    if let Some(row) = row.contiguous().and_then(|row| row.get(first..first + columns)) {
        prefetch(row.as_ptr().cast(), size_of_val(row));
    }
}

/// Copies the columns in `range` of a row of the bias, converted.
#[inline(always)]
fn stage_bias<F: Float, S: Simd<F>, T: Source>(
    simd: S,
    bias: Row<'_, T>,
    first: usize,
    range: Range<usize>,
    to: &mut [F],
) {
    let to = &mut to[range.clone()];
    if bias.len() == 1 {
        to.fill(bias.at(0).widen());
        return;
    }
    let start = first + range.start;
    let mut done = 0;
    if let Some(bias) = bias.contiguous() {
        let bias = &bias[start..start + to.len()];
        while done + S::LANES <= to.len() {
            // SAFETY: `done + LANES` elements are in both.
            unsafe { simd.store(to.as_mut_ptr().add(done), T::load(simd, bias.as_ptr().add(done))) };
            done += S::LANES;
        }
    }
    for (column, to) in to.iter_mut().enumerate().skip(done) {
        *to = bias.at(start + column).widen();
    }
}

/// The index of a broadcast tensor of four axes for a row of the logits: 0 along axes of size 1.
#[inline(always)]
fn broadcast(shape: &[usize; 4], index: [usize; 3]) -> [usize; 3] {
    let mut out = index;
    for axis in 0..3 {
        if shape[axis] == 1 {
            out[axis] = 0;
        }
    }
    out
}
