//! From products of queries and keys to logits, in units of base two: scale, softcap, ALiBi, bias, masks, dropout.
//!
//! The semantics of [`Problem`], steps 2 and 3. A tile of products stays as it is where nothing but the scale
//! applies: the softmax multiplies with [`Terms::tile_factor`] in the same operation that subtracts the shift. A bias
//! and a mask reach the forward softmax beside the tile ([`Terms::added`]), so that no pass is spent on them.

use std::ops::Range;

use attention_core::{DropoutStream, HostView, Inputs, Problem, Row};

use crate::float::Float;
use crate::simd::{Simd, prefetch, tanh};
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

/// What a row's products meet on their way to logits, after they were multiplied by [`Terms::product_factor`].
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Added<'r, F> {
    /// Added, in natural units.
    pub(crate) bias: Option<&'r [F]>,
    /// Makes -inf of where it is zero.
    pub(crate) mask: Option<&'r [u8]>,
}

/// How many rows ahead bias and mask are asked for: a piece of a row is too short for the processor's own prefetching.
const AHEAD: usize = 4;

/// What turns products into logits, read from the call once.
pub(crate) struct Terms<'a, F> {
    problem: &'a Problem,
    scale: F,
    softcap: Option<F>,
    slopes: Option<Floats<'a>>,
    slopes_per_batch: bool,
    bias: Option<(Floats<'a>, [usize; 4])>,
    mask: Option<(HostView<'a, u8>, [usize; 4])>,
    dropout: Option<DropoutStream>,
}

impl<'a, F: Float> Terms<'a, F> {
    pub(crate) fn new(problem: &'a Problem, inputs: &Inputs<'a>) -> Self {
        let shape = |view: attention_core::View<'_>| std::array::from_fn(|axis| view.shape()[axis]);
        let mask = inputs.mask.map(|mask| {
            let bytes = mask.host_mask();
            let bytes = bytes.unwrap_or_else(|| unreachable!("a checked call has a mask in host memory"));
            (bytes, shape(mask))
        });
        Self {
            problem,
            scale: F::from_f64(problem.scale().abs()),
            softcap: problem.softcap().map(F::from_f64),
            slopes: inputs.alibi_slopes.map(Floats::new),
            slopes_per_batch: inputs.alibi_slopes.is_some_and(|slopes| slopes.shape().rank() == 2),
            bias: inputs.bias.map(|bias| (Floats::new(bias), shape(bias))),
            mask,
            dropout: problem.dropout_stream(),
        }
    }

    /// What queries are multiplied by when they are packed, so that the scale is never negative from there on.
    pub(crate) fn query_sign(&self) -> F {
        if self.problem.scale() < 0.0 { -F::ONE } else { F::ONE }
    }

    /// Whether the logits are more than products times the scale, whatever is masked.
    pub(crate) fn is_plain(&self) -> bool {
        // Zero times the -inf of a masked product would be NaN.
        self.softcap.is_none() && self.slopes.is_none() && self.bias.is_none() && self.scale > F::ZERO
    }

    /// What a tile that [`apply`](Self::apply) left is multiplied by to give logits of base two.
    pub(crate) fn tile_factor(&self) -> F {
        if self.is_plain() { self.scale * F::LOG2_E } else { F::ONE }
    }

    /// Whether only [`apply`](Self::apply) can make logits of products.
    pub(crate) fn needs_tile(&self) -> bool {
        self.softcap.is_some() || self.scale == F::ZERO
    }

    /// What products are multiplied by before what [`added`](Self::added) gives; after [`apply`](Self::apply) where
    /// that is needed.
    pub(crate) fn product_factor(&self) -> F {
        if self.needs_tile() { self.tile_factor() } else { self.scale * F::LOG2_E }
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

    /// Turns a row of products into what [`tile_factor`](Self::tile_factor) makes logits of; -inf wherever a key
    /// takes no part. Column 0 is key `first`; `columns` is a multiple of the vector's lanes.
    ///
    /// With a softcap, `slopes` receives its derivative at each product.
    ///
    /// # Safety
    /// `tile`, and `slopes` where it is given, point to `columns` elements.
    #[inline(always)]
    pub(crate) unsafe fn apply<S: Simd<F>>(
        &self,
        simd: S,
        row: &QueryRow,
        first: usize,
        columns: usize,
        tile: *mut F,
        slopes: Option<*mut F>,
    ) {
        // SAFETY: the caller vouches for `columns` elements, which these slices are.
        let tile = unsafe { std::slice::from_raw_parts_mut(tile, columns) };
        // SAFETY: as above; another buffer.
        let slopes = slopes.map(|slopes| unsafe { std::slice::from_raw_parts_mut(slopes, columns) });
        if !self.is_plain() {
            self.scaled(simd, row, first, tile, slopes);
            if let Some((bias, shape)) = &self.bias {
                let index = broadcast(shape, [row.batch, row.head, row.query]);
                typed!(bias, bias => add_bias(simd, bias.row(&index), first, tile));
            }
        }
        if let Some((mask, shape)) = &self.mask {
            let index = broadcast(shape, [row.batch, row.head, row.query]);
            apply_mask(simd, mask.row(&index), first, tile);
        }
        let (begin, end) = seen(row, first, columns);
        tile[..begin].fill(F::NEG_INFINITY);
        tile[end..].fill(F::NEG_INFINITY);
    }

    /// Masks what structure masks in a row of products, the first of these, and gives what is to be added to it: as many
    /// elements as the row has columns, which may lie in the rooms. Column 0 is key `first`; the columns are a multiple
    /// of the vector's lanes. Not where [`needs_tile`](Self::needs_tile).
    #[inline(always)]
    pub(crate) fn added<'r, S: Simd<F>>(
        &'r self,
        simd: S,
        rows: &[QueryRow],
        first: usize,
        tile: &mut [F],
        bias_room: &'r mut [F],
        mask_room: &'r mut [u8],
    ) -> Added<'r, F> {
        let row = &rows[0];
        let columns = tile.len();
        let (begin, end) = seen(row, first, columns);
        tile[..begin].fill(F::NEG_INFINITY);
        tile[end..].fill(F::NEG_INFINITY);
        let mut added = Added::default();
        if let Some((mask, shape)) = &self.mask {
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
        let slope = self.slope(row);
        if let Some((bias, shape)) = &self.bias {
            let index = broadcast(shape, [row.batch, row.head, row.query]);
            typed!(bias, bias => {
                let bias_row = bias.row(&index);
                if let Some(next) = rows.get(AHEAD) {
                    ahead(bias.row(&broadcast(shape, [next.batch, next.head, next.query])), first, columns);
                }
                let direct = if slope.is_none() && begin == 0 && end == columns {
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
        } else if slope.is_some() {
            bias_room[begin..end].fill(F::ZERO);
        } else {
            return added;
        }
        if let Some(slope) = slope {
            let position = self.problem.position(row.batch, row.query);
            let distance = F::from_difference(position.saturating_sub(first as i64));
            for (column, x) in bias_room[..columns].iter_mut().enumerate().take(end).skip(begin) {
                *x = *x - slope * (distance - F::from_difference(column as i64)).abs();
            }
        }
        // What structure masks stays so, whatever the bias holds there.
        bias_room[..begin].fill(F::ZERO);
        bias_room[end..columns].fill(F::ZERO);
        added.bias = Some(&bias_room[..columns]);
        added
    }

    /// The ALiBi slope of a row's head.
    #[inline(always)]
    fn slope(&self, row: &QueryRow) -> Option<F> {
        let slopes = self.slopes.as_ref()?;
        Some(if self.slopes_per_batch { slopes.at(&[row.batch, row.head]) } else { slopes.at(&[row.head]) })
    }

    /// Scale, softcap and ALiBi, in units of base two.
    #[inline(always)]
    fn scaled<S: Simd<F>>(
        &self,
        simd: S,
        row: &QueryRow,
        first: usize,
        tile: &mut [F],
        mut slopes: Option<&mut [F]>,
    ) {
        let log2_e = simd.splat(F::LOG2_E);
        let alibi = self.slope(row).map(|slope| {
            let position = self.problem.position(row.batch, row.query);
            // The key's distance is that of the tile's first column, and then one more a column.
            (slope * F::LOG2_E, F::from_difference(position.saturating_sub(first as i64)))
        });
        let mut lanes = [F::ZERO; 64];
        for (lane, value) in lanes.iter_mut().enumerate() {
            *value = F::from_difference(lane as i64);
        }
        // SAFETY: 64 elements are as many as any vector has.
        let lanes = unsafe { simd.load(lanes.as_ptr()) };
        for column in (0..tile.len()).step_by(S::LANES) {
            // SAFETY: the tile has whole vectors.
            let at = unsafe { tile.as_mut_ptr().add(column) };
            // SAFETY: as above.
            let product = unsafe { simd.load(at) };
            let mut x = match self.softcap {
                None => simd.mul(product, simd.splat(self.scale * F::LOG2_E)),
                Some(cap) => {
                    let scaled = simd.mul(product, simd.splat(self.scale));
                    let t = tanh(simd, simd.div(scaled, simd.splat(cap)));
                    if let Some(slopes) = &mut slopes {
                        let slope = simd.sub(simd.splat(F::ONE), simd.mul(t, t));
                        // SAFETY: the slopes have the tile's size.
                        unsafe { simd.store(slopes.as_mut_ptr().add(column), slope) };
                    }
                    simd.mul(simd.mul(simd.splat(cap), t), log2_e)
                }
            };
            if let Some((slope, distance)) = alibi {
                let start = simd.splat(distance - F::from_difference(column as i64));
                let distance = simd.abs(simd.sub(start, lanes));
                x = simd.sub(x, simd.mul(simd.splat(slope), distance));
            }
            // SAFETY: as above.
            unsafe { simd.store(at, x) };
        }
    }

    /// Multiplies the weights of a row by the factors of dropout: 0 or the scale of what is kept. A disallowed weight
    /// stays so: negative zero times a factor that is not negative.
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

/// `x += bias` for the columns that the bias has; the others are masked by structure.
#[inline(always)]
fn add_bias<F: Float, S: Simd<F>, T: Source>(simd: S, bias: Row<'_, T>, first: usize, tile: &mut [F]) {
    let log2_e = simd.splat(F::LOG2_E);
    if bias.len() == 1 {
        let bias = simd.mul(simd.splat(bias.at(0).widen()), log2_e);
        for column in (0..tile.len()).step_by(S::LANES) {
            // SAFETY: the tile has whole vectors.
            unsafe {
                let at = tile.as_mut_ptr().add(column);
                simd.store(at, simd.add(simd.load(at), bias));
            }
        }
        return;
    }
    let count = tile.len().min(bias.len() - first);
    let mut done = 0;
    if let Some(bias) = bias.contiguous() {
        let bias = &bias[first..first + count];
        while done + S::LANES <= count {
            // SAFETY: `done + LANES` elements are in both.
            unsafe {
                let at = tile.as_mut_ptr().add(done);
                let value = T::load(simd, bias.as_ptr().add(done));
                simd.store(at, simd.fma(value, log2_e, simd.load(at)));
            }
            done += S::LANES;
        }
    }
    for (column, x) in tile[..count].iter_mut().enumerate().skip(done) {
        *x += bias.at(first + column).widen::<F>() * F::LOG2_E;
    }
}

/// `x = -inf` where the mask is false, for the columns that the mask has.
#[inline(always)]
fn apply_mask<F: Float, S: Simd<F>>(simd: S, mask: Row<'_, u8>, first: usize, tile: &mut [F]) {
    if mask.len() == 1 {
        if mask.at(0) == 0 {
            tile.fill(F::NEG_INFINITY);
        }
        return;
    }
    let count = tile.len().min(mask.len() - first);
    let mut done = 0;
    if let Some(mask) = mask.contiguous() {
        let mask = &mask[first..first + count];
        let masked = simd.splat(F::NEG_INFINITY);
        while done + S::LANES <= count {
            // SAFETY: `done + LANES` elements are in both.
            unsafe {
                let at = tile.as_mut_ptr().add(done);
                let kept = simd.load_mask(mask.as_ptr().add(done));
                simd.store(at, simd.select(kept, simd.load(at), masked));
            }
            done += S::LANES;
        }
    }
    for (column, x) in tile[..count].iter_mut().enumerate().skip(done) {
        if mask.at(first + column) == 0 {
            *x = F::NEG_INFINITY;
        }
    }
}
