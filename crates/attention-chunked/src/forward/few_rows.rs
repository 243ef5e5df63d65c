//! Decoding: few query rows a key/value head, where reading keys and values is all the work.
//!
//! Keys and values are read once, as they lie, for all rows of the group. The keys are cut into parts by their number
//! alone; each part gives a partial result, and the parts are merged in order, so that a single row can use every
//! thread and gives the same bits on one.

use std::ops::Range;

use attention_core::{HostView, Problem, Row};

use super::call::{Forward, Outputs};
use super::finish::normalise;
use super::softmax::BlockSoftmax;
use crate::engine::Engine;
use crate::engine::vector::Fused;
use crate::float::Float;
use crate::paths::{Path, Taken};
use crate::plan::Rows;
use crate::scratch::{Pieces, extent};
use crate::simd::{Kernel, Simd, prefetch, prefetch_behind};
use crate::tensor::{Floats, Operands, Source, ViewKernel, is_strided};
use crate::terms::QueryRow;

/// Rows of a key/value head up to which they are few: more have products enough to pay for packing keys and values.
pub(crate) const FEW: usize = 8;

/// Keys whose logits are held at a time.
const BLOCK_KEYS: usize = 256;

/// The distance between rows of logits.
const STRIDE: usize = BLOCK_KEYS + 16;

/// Keys of a part: at least so many, and at most so many parts.
const PART_KEYS: usize = 1024;
const MAX_PARTS: usize = 64;

/// Rows that share one pass over the values.
const ROW_GROUP: usize = 4;

/// How many keys ahead rows are prefetched: rows of neighbouring keys are as far apart as all heads together,
/// often a page or more, which no processor's own prefetching bridges. 16 takes 1.01 to 1.15 times less than
/// 8 on an AMD EPYC (AVX2 and AVX-512, 4096 keys); 4 and 32 are faster and slower by case.
const AHEAD: usize = 16;

/// Bytes that neighbouring heads of one key have in a page of memory: heads that share pages are worked on together,
/// since finding a page takes longer than reading a row of it.
const PAGE: usize = 4096;

/// The most heads that are worked on together.
pub(super) const MAX_HEADS: usize = 8;

/// The sizes of a task of few rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Few {
    /// Key/value heads that are worked on together.
    pub(super) heads: usize,
    /// Rows of each.
    rows: usize,
    head_dim: usize,
    value_head_dim: usize,
}

impl Few {
    /// For problems whose batch rows with few rows have at most `rows` of them a key/value head; `enough` says how
    /// many heads at a time leave enough tasks. Bits do not depend on it.
    pub(super) fn of(problem: &Problem, rows: usize, enough: usize) -> Self {
        let dims = problem.dims();
        let row_bytes = problem.dtype().size() * dims.head_dim.min(dims.value_head_dim).max(1);
        let heads = (PAGE / row_bytes).min(enough).clamp(1, MAX_HEADS);
        Self { heads, rows, head_dim: dims.head_dim, value_head_dim: dims.value_head_dim }
    }

    fn scratch<'a, F: Float>(&self, pieces: &mut Pieces<'a>) -> Scratch<'a, F> {
        Scratch {
            stage: pieces.take((self.heads * FEW).saturating_mul(Floats::stage_stride(self.head_dim))),
            tile: pieces.take(FEW * STRIDE),
            factors: pieces.take(FEW),
            part: self.partial(pieces),
            running: self.partial(pieces),
        }
    }

    fn partial<'a, F: Float>(&self, pieces: &mut Pieces<'a>) -> Partial<'a, F> {
        let rows = self.heads * self.rows;
        Partial {
            width: self.value_head_dim,
            shifts: pieces.take(rows),
            sums: pieces.take(rows),
            values: pieces.take(rows.saturating_mul(self.value_head_dim)),
        }
    }

    /// Bytes of a task's scratch; `None` on overflow.
    pub(super) fn bytes<F: Float>(&self) -> Option<usize> {
        let mut pieces = Pieces::counting();
        let _ = self.scratch::<F>(&mut pieces);
        pieces.bytes()
    }

    /// Bytes of a partial result that is kept; `None` on overflow.
    pub(super) fn partial_bytes<F: Float>(&self) -> Option<usize> {
        let mut pieces = Pieces::counting();
        let _ = self.partial::<F>(&mut pieces);
        pieces.bytes()
    }

    /// The rows of head `head` of a task among those of a partial result.
    fn rows_of(&self, head: usize, rows: &Rows) -> Range<usize> {
        head * self.rows..head * self.rows + rows.len()
    }
}

/// What a task of few rows works in.
struct Scratch<'a, F> {
    stage: &'a mut [F],
    tile: &'a mut [F],
    factors: &'a mut [F],
    part: Partial<'a, F>,
    /// The parts so far.
    running: Partial<'a, F>,
}

/// The result of some keys for each row of some heads.
struct Partial<'a, F> {
    width: usize,
    /// In units of the call.
    shifts: &'a mut [F],
    sums: &'a mut [F],
    /// Unnormalised, rows of the value head dimension.
    values: &'a mut [F],
}

impl<F: Float> Partial<'_, F> {
    fn clear(&mut self) {
        self.shifts.fill(F::NEG_INFINITY);
        self.sums.fill(F::ZERO);
        self.values.fill(F::ZERO);
    }

    /// Adds the result of further keys; `unit` is the size of the shifts' unit.
    fn merge(&mut self, part: &Self, unit: F) {
        let width = self.width;
        for row in 0..self.sums.len() {
            let shifts = [self.shifts[row], part.shifts[row]];
            // A NaN on either side becomes the shift and stays it.
            let shift = if shifts[1] > shifts[0] || shifts[1].is_nan() { shifts[1] } else { shifts[0] };
            let [old, new] =
                shifts.map(
                    |before| {
                        if before == F::NEG_INFINITY { F::ZERO } else { ((before - shift) * unit).exp() }
                    },
                );
            self.shifts[row] = shift;
            self.sums[row] = self.sums[row] * old + part.sums[row] * new;
            let values = &mut self.values[row * width..][..width];
            for (value, &from) in values.iter_mut().zip(&part.values[row * width..]) {
                *value = *value * old + from * new;
            }
        }
    }
}

/// The parts that the keys of some rows are cut into.
pub(super) fn parts(keys: &Range<usize>) -> impl ExactSizeIterator<Item = Range<usize>> + use<> {
    let size = PART_KEYS.max(keys.len().div_ceil(MAX_PARTS).next_multiple_of(BLOCK_KEYS));
    let keys = keys.clone();
    (0..keys.len().div_ceil(size)).map(move |part| {
        let start = keys.start + part * size;
        start..keys.end.min(start + size)
    })
}

/// The rows of some heads of one batch row: the same queries of each.
type Heads = [Rows];

impl<'a, E: Engine> Forward<'a, E> {
    /// All keys of some rows.
    ///
    /// # Safety
    /// No other thread writes these rows of the outputs.
    pub(super) unsafe fn few_rows(&self, heads: &Heads, outputs: &Outputs<'a>, memory: &mut [u8]) {
        self.taken.mark(Path::FewWhole);
        let mut scratch = self.few.scratch::<E::F>(&mut Pieces::of(memory));
        scratch.running.clear();
        self.stage_heads(heads, scratch.stage);
        let keys = self.problem.key_range_of_rows(heads[0].batch, heads[0].queries.clone());
        for part in parts(&keys) {
            self.part(heads, part, &mut scratch);
            scratch.running.merge(&scratch.part, self.terms.unit());
        }
        // SAFETY: the caller's.
        unsafe { self.finish_few(heads, &mut scratch.running, outputs) };
    }

    /// One part of the keys of some rows, into memory of [`Few::partial_bytes`].
    pub(super) fn few_rows_part(&self, heads: &Heads, keys: Range<usize>, to: &mut [u8], memory: &mut [u8]) {
        self.taken.mark(Path::FewPart);
        let mut scratch = self.few.scratch::<E::F>(&mut Pieces::of(memory));
        scratch.part = self.few.partial(&mut Pieces::of(to));
        self.stage_heads(heads, scratch.stage);
        self.part(heads, keys, &mut scratch);
    }

    /// Merges the parts of some rows, each in `bytes` of the memory, and writes the rows.
    ///
    /// # Safety
    /// No other thread writes these rows of the outputs.
    pub(super) unsafe fn merge_parts(
        &self,
        heads: &Heads,
        parts: &mut [u8],
        bytes: usize,
        outputs: &Outputs<'a>,
        memory: &mut [u8],
    ) {
        let mut scratch = self.few.scratch::<E::F>(&mut Pieces::of(memory));
        scratch.running.clear();
        for part in parts.chunks_exact_mut(bytes) {
            scratch.running.merge(&self.few.partial(&mut Pieces::of(part)), self.terms.unit());
        }
        // SAFETY: the caller's.
        unsafe { self.finish_few(heads, &mut scratch.running, outputs) };
    }

    fn stage_heads(&self, heads: &Heads, stage: &mut [E::F]) {
        let sign = self.terms.query_sign();
        let room = FEW * Floats::stage_stride(self.few.head_dim);
        for (rows, stage) in heads.iter().zip(stage.chunks_exact_mut(room)) {
            let index = |row: usize| {
                let (head, query) = rows.at(row);
                [rows.batch, query, head]
            };
            self.query.stage_floats(self.engine.plain(), rows.len(), &index, sign, false, stage);
        }
    }

    /// # Safety
    /// As for [`few_rows`](Self::few_rows).
    unsafe fn finish_few(&self, heads: &Heads, result: &mut Partial<'_, E::F>, outputs: &Outputs<'a>) {
        let width = result.width;
        for (index, rows) in heads.iter().enumerate() {
            for (row, place) in self.few.rows_of(index, rows).enumerate() {
                let (head, query) = rows.at(row);
                let sink = self.sinks.as_ref().map(|sinks| sinks.at(&[head]));
                let values = &mut result.values[place * width..][..width];
                let (shift, sum) = (result.shifts[place], result.sums[place]);
                let lse = normalise(shift, sum, self.terms.unit(), sink, values);
                // SAFETY: the caller's.
                unsafe {
                    outputs.out.write_row([rows.batch, query, head], values, E::F::ONE);
                    if let Some(to) = &outputs.lse {
                        to.write([rows.batch, query, head, 0], lse);
                    }
                }
            }
        }
    }

    /// Computes a part: a block of keys for all heads, then the next.
    fn part(&self, heads: &Heads, keys: Range<usize>, scratch: &mut Scratch<'_, E::F>) {
        if self.key.is_strided() || self.value.is_strided() {
            self.taken.mark(Path::FewStrided);
        }
        scratch.part.clear();
        for first in keys.clone().step_by(BLOCK_KEYS) {
            let block = first..keys.end.min(first + BLOCK_KEYS);
            for (index, rows) in heads.iter().enumerate() {
                self.few_block(index, rows, block.clone(), scratch);
            }
        }
    }

    fn few_block(&self, index: usize, rows: &Rows, keys: Range<usize>, scratch: &mut Scratch<'_, E::F>) {
        let simd = self.engine.plain();
        let (batch, key_head) = (rows.batch, rows.key_head);
        let mut infos = [QueryRow { batch: 0, head: 0, query: 0, begin: 0, end: 0 }; FEW];
        let infos = &mut infos[..rows.len()];
        for (row, info) in infos.iter_mut().enumerate() {
            *info = rows.row(self.problem, row);
        }
        let queries_stride = Floats::stage_stride(self.few.head_dim);
        let queries = &scratch.stage[index * FEW * queries_stride..][..FEW * queries_stride];
        let dots = Dots {
            simd,
            batch,
            key_head,
            keys: keys.clone(),
            rows: rows.len(),
            queries,
            queries_stride,
            tile: scratch.tile,
        };
        <E::F as Operands>::vectorize(&self.key, simd, dots);
        let columns = keys.len().next_multiple_of(2 * <E::Plain as Simd<E::F>>::LANES);
        let inside = infos.iter().all(|row| row.begin <= keys.start && row.end >= keys.end);
        let apply = !inside || columns != keys.len() || !self.terms.is_plain() || self.terms.has_mask();
        self.taken.mark(Path::few(rows.len()));
        if apply {
            self.taken.mark(Path::FewAdded);
        }
        let place = self.few.rows_of(index, rows);
        let width = scratch.part.width;
        let part = &mut scratch.part;
        simd.vectorize(BlockSoftmax {
            engine: Fused::<E::F, E::Plain>::new(simd),
            terms: &self.terms,
            rows: infos,
            first: keys.start,
            columns,
            apply,
            // Values that are not finite are told by it from those that take no part.
            mark: true,
            tile: scratch.tile,
            stride: STRIDE,
            packed_columns: BLOCK_KEYS,
            packed: &mut [],
            shifts: &mut part.shifts[place.clone()],
            sums: &mut part.sums[place.clone()],
            factors: scratch.factors,
        });
        let values = &mut part.values[place.start * width..place.end * width];
        let sums = &part.sums[place];
        let weighted_sums = WeightedSums {
            simd,
            batch,
            key_head,
            keys,
            rows: rows.len(),
            weights: scratch.tile,
            factors: scratch.factors,
            totals: sums,
            values,
            taken: self.taken,
        };
        <E::F as Operands>::vectorize(&self.value, simd, weighted_sums);
    }
}

/// The products of few queries with keys as they lie.
struct Dots<'r, F, S> {
    simd: S,
    batch: usize,
    key_head: usize,
    keys: Range<usize>,
    rows: usize,
    queries: &'r [F],
    queries_stride: usize,
    tile: &'r mut [F],
}

impl<F: Float, S: Simd<F>> ViewKernel for Dots<'_, F, S> {
    type Output = ();

    #[inline(always)]
    fn run<T: Source>(mut self, view: &HostView<'_, T>) {
        let head = view.index_axis(2, self.key_head).index_axis(0, self.batch);
        if is_strided(&head) {
            (0..self.rows).for_each(|row| self.rows::<1, true, T>(&head, row));
            return;
        }
        match self.rows {
            1 => self.rows::<1, false, T>(&head, 0),
            2 => self.rows::<2, false, T>(&head, 0),
            3 | 4 => self.rows::<4, false, T>(&head, 0),
            _ => self.rows::<FEW, false, T>(&head, 0),
        }
    }
}

impl<F: Float, S: Simd<F>> Dots<'_, F, S> {
    /// At most `ROWS` rows from `first` on; the stage holds zeros behind the real ones. `head` has a key in
    /// each row.
    #[inline(always)]
    fn rows<const ROWS: usize, const STRIDED: bool, T: Source>(
        &mut self,
        head: &HostView<'_, T>,
        first: usize,
    ) {
        let Self { simd, queries_stride, .. } = *self;
        let width = head.shape()[1];
        let count = (self.rows - first).min(ROWS);
        let queries = &self.queries[first * queries_stride..];
        assert!(extent(ROWS, queries_stride, width) <= queries.len());
        assert!(self.keys.len() <= STRIDE && (first + count) * STRIDE <= self.tile.len());
        let row_bytes = width * size_of::<T>();
        let ahead = head.strides()[0].wrapping_mul(AHEAD as isize);
        for (column, key) in self.keys.clone().enumerate() {
            let row = KeyRow::<STRIDED, T>::new(head.matrix_row(key), width);
            row.prefetch(ahead, 0, row_bytes);
            let mut sums = [simd.splat(F::ZERO); ROWS];
            let mut done = 0;
            while done + S::LANES <= width {
                // SAFETY: `done + LANES` elements are in the key and in each of ROWS queries.
                unsafe {
                    let key = row.load(simd, done);
                    for (index, sum) in sums.iter_mut().enumerate() {
                        let query = simd.load(queries.as_ptr().add(index * queries_stride + done));
                        *sum = simd.fma(query, key, *sum);
                    }
                }
                done += S::LANES;
            }
            for (index, &sum) in sums.iter().enumerate().take(count) {
                let mut total = simd.reduce_sum(sum);
                for d in done..width {
                    total += queries[index * queries_stride + d] * row.row.at(d).widen::<F>();
                }
                self.tile[(first + index) * STRIDE + column] = total;
            }
        }
    }
}

/// A key or its value. Whether its elements are neighbours is a constant of the kernel: in a loop that may
/// also call `gather`, the compiler keeps the sums in memory, and the loop takes nearly twice as long.
struct KeyRow<'v, const STRIDED: bool, T> {
    row: Row<'v, T>,
    /// Empty if STRIDED.
    neighbours: &'v [T],
}

impl<'v, const STRIDED: bool, T: Source> KeyRow<'v, STRIDED, T> {
    /// # Panics
    /// Unless STRIDED, where the elements are not neighbours, or not `width`.
    #[inline(always)]
    fn new(row: Row<'v, T>, width: usize) -> Self {
        let neighbours = if STRIDED { None } else { row.contiguous() }.unwrap_or_default();
        assert!(STRIDED || neighbours.len() == width, "elements side by side");
        Self { row, neighbours }
    }

    /// Prefetches `bytes` of the row that lies `ahead` elements behind this one, from its element `at` on;
    /// those before it are prefetched too.
    #[inline(always)]
    fn prefetch(&self, ahead: isize, at: usize, bytes: usize) {
        if !STRIDED {
            let from = self.neighbours.as_ptr().wrapping_offset(ahead).wrapping_add(at).cast();
            if at == 0 {
                prefetch(from, bytes);
            } else {
                prefetch_behind(from, bytes);
            }
        }
    }

    /// A vector of it.
    ///
    /// # Safety
    /// The row has `at + LANES` elements.
    #[inline(always)]
    unsafe fn load<F: Float, S: Simd<F>>(&self, simd: S, at: usize) -> S::V {
        // SAFETY: the caller's; without STRIDED, the neighbours are the whole row.
        unsafe {
            if STRIDED {
                load_row(simd, &self.row, at)
            } else {
                T::load(simd, self.neighbours.as_ptr().add(at))
            }
        }
    }
}

/// A vector of a row, whatever the stride of its elements.
///
/// # Safety
/// The row has `at + LANES` elements.
#[inline(always)]
unsafe fn load_row<F: Float, S: Simd<F>, T: Source>(simd: S, row: &Row<'_, T>, at: usize) -> S::V {
    match row.contiguous() {
        // SAFETY: the caller's.
        Some(row) => unsafe { T::load(simd, row.as_ptr().add(at)) },
        None => {
            let mut lanes = [F::ZERO; 64];
            gather(row, at, &mut lanes[..S::LANES]);
            // SAFETY: 64 elements are as many as any vector has.
            unsafe { simd.load(lanes.as_ptr()) }
        }
    }
}

/// Elements of a row whose elements are not neighbours, from `at` on. Compiled once, not for each vector of each kernel.
#[inline(never)]
fn gather<F: Float, T: Source>(row: &Row<'_, T>, at: usize, to: &mut [F]) {
    for (lane, to) in to.iter_mut().enumerate() {
        *to = row.at(at + lane).widen();
    }
}

/// `values[row] = factors[row] * values[row] + sum over keys of weights[row][key] * value[key]`, for values as they
/// lie. A value that is not finite counts for the rows in which its key takes part alone: sums that are not finite are
/// summed once more, with zeros in the place of such values and those added apart, so the other rows keep their bits.
struct WeightedSums<'r, F, S> {
    simd: S,
    batch: usize,
    key_head: usize,
    keys: Range<usize>,
    rows: usize,
    weights: &'r [F],
    factors: &'r [F],
    /// The sums of weights, which are NaN in a row that no care can help.
    totals: &'r [F],
    values: &'r mut [F],
    taken: &'r Taken,
}

impl<F: Float, S: Simd<F>> ViewKernel for WeightedSums<'_, F, S> {
    type Output = ();

    #[inline(always)]
    fn run<T: Source>(mut self, view: &HostView<'_, T>) {
        let width = view.shape()[3];
        assert!(self.rows * STRIDE <= self.weights.len() && self.keys.len() <= STRIDE);
        assert!(self.rows.saturating_mul(width) <= self.values.len());
        assert!(self.rows <= self.factors.len() && self.rows <= self.totals.len());
        let head = view.index_axis(2, self.key_head).index_axis(0, self.batch);
        if is_strided(&head) {
            (0..self.rows).for_each(|row| self.group::<1, true, T>(&head, row));
            return;
        }
        for row in (0..self.rows).step_by(ROW_GROUP) {
            match (self.rows - row).min(ROW_GROUP) {
                1 => self.group::<1, false, T>(&head, row),
                2 => self.group::<2, false, T>(&head, row),
                3 => self.group::<3, false, T>(&head, row),
                _ => self.group::<ROW_GROUP, false, T>(&head, row),
            }
        }
    }
}

impl<F: Float, S: Simd<F>> WeightedSums<'_, F, S> {
    /// `ROWS` rows; `head` has the values of a key in each row.
    #[inline(always)]
    fn group<const ROWS: usize, const STRIDED: bool, T: Source>(
        &mut self,
        head: &HostView<'_, T>,
        first: usize,
    ) {
        let width = head.shape()[1];
        let mut done = 0;
        while !STRIDED && ROWS <= 2 && done + 8 * S::LANES <= width {
            self.columns::<ROWS, 8, STRIDED, T>(head, first, done);
            done += 8 * S::LANES;
        }
        while !STRIDED && done + 4 * S::LANES <= width {
            self.columns::<ROWS, 4, STRIDED, T>(head, first, done);
            done += 4 * S::LANES;
        }
        while done + S::LANES <= width {
            self.columns::<ROWS, 1, STRIDED, T>(head, first, done);
            done += S::LANES;
        }
        let (keys, weights, taken) = (self.keys.clone(), self.weights, self.taken);
        for column in done..width {
            let mut sums = [F::ZERO; ROWS];
            for (index, key) in keys.clone().enumerate() {
                let value: F = head.matrix_row(key).at(column).widen();
                for (row, sum) in sums.iter_mut().enumerate() {
                    *sum += weights[(first + row) * STRIDE + index] * value;
                }
            }
            for (row, mut sum) in sums.into_iter().enumerate() {
                let row = first + row;
                if !sum.is_finite() && !self.totals[row].is_nan() {
                    taken.mark(Path::FewValuesApart);
                    sum = careful_sum(head, keys.clone(), column, &weights[row * STRIDE..]);
                }
                let to = &mut self.values[row * width + column];
                *to = *to * self.factors[row] + sum;
            }
        }
    }

    /// `VECTORS` vectors of columns from `column` on, which the values have.
    #[inline(always)]
    fn columns<const ROWS: usize, const VECTORS: usize, const STRIDED: bool, T: Source>(
        &mut self,
        head: &HostView<'_, T>,
        first: usize,
        column: usize,
    ) {
        let simd = self.simd;
        let width = head.shape()[1];
        let mut sums = [[simd.splat(F::ZERO); VECTORS]; ROWS];
        let ahead = head.strides()[0].wrapping_mul(AHEAD as isize);
        for (index, key) in self.keys.clone().enumerate() {
            let row = KeyRow::<STRIDED, T>::new(head.matrix_row(key), width);
            row.prefetch(ahead, column, VECTORS * S::LANES * size_of::<T>());
            let mut values = [simd.splat(F::ZERO); VECTORS];
            for (vector, value) in values.iter_mut().enumerate() {
                // SAFETY: the columns are inside the row.
                *value = unsafe { row.load(simd, column + vector * S::LANES) };
            }
            for (row, sums) in sums.iter_mut().enumerate() {
                let weight = simd.splat(self.weights[(first + row) * STRIDE + index]);
                for (sum, &value) in sums.iter_mut().zip(&values) {
                    *sum = simd.fma(weight, value, *sum);
                }
            }
        }
        // A copy, so that the sums of the loop stay in registers.
        let done = sums;
        let sums = done.as_flattened();
        let rows = first..first + ROWS;
        simd.vectorize(AddSums {
            simd,
            head,
            keys: self.keys.clone(),
            weights: &self.weights[first * STRIDE..],
            factors: &self.factors[rows.clone()],
            totals: &self.totals[rows],
            taken: self.taken,
            sums,
            vectors: VECTORS,
            column,
            values: &mut self.values[first * width..],
        });
    }
}

/// Adds the sums of some rows to their values. Compiled once for all numbers of rows and columns.
struct AddSums<'k, 'v, F: Float, S: Simd<F>, T> {
    simd: S,
    head: &'k HostView<'v, T>,
    keys: Range<usize>,
    weights: &'k [F],
    /// One for each row, as `totals` has.
    factors: &'k [F],
    totals: &'k [F],
    taken: &'k Taken,
    /// Some vectors for each row.
    sums: &'k [S::V],
    vectors: usize,
    /// The first column, of as many vectors, which the values have.
    column: usize,
    values: &'k mut [F],
}

impl<F: Float, S: Simd<F>, T: Source> Kernel for AddSums<'_, '_, F, S, T> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        let Self { simd, head, keys, weights, factors, totals, taken, sums, vectors, column, values } = self;
        let width = head.shape()[1];
        let zero = simd.splat(F::ZERO);
        for (row, (sums, (&factor, total))) in
            sums.chunks_exact(vectors).zip(factors.iter().zip(totals)).enumerate()
        {
            // Zero times what is not finite is NaN, which every sum keeps.
            let nothing = sums.iter().fold(zero, |nothing, &sum| simd.fma(sum, zero, nothing));
            let to = &mut values[row * width + column..][..vectors * S::LANES];
            if simd.reduce_sum(nothing) != F::ZERO && !total.is_nan() {
                taken.mark(Path::FewValuesApart);
                let (keys, weights) = (keys.clone(), &weights[row * STRIDE..]);
                simd.vectorize(CarefulSums { simd, head, keys, column, weights, factor, to });
                continue;
            }
            for (to, &sum) in to.chunks_exact_mut(S::LANES).zip(sums) {
                scale_and_add(simd, to, factor, sum);
            }
        }
    }
}

/// `to = factor * to + sum`, for a vector of values.
#[inline(always)]
fn scale_and_add<F: Float, S: Simd<F>>(simd: S, to: &mut [F], factor: F, sum: S::V) {
    assert_eq!(to.len(), S::LANES);
    let at = to.as_mut_ptr();
    // SAFETY: a whole vector, as checked above.
    unsafe { simd.store(at, simd.fma(simd.load(at), simd.splat(factor), sum)) };
}

/// The sums of some whole vectors of columns of a row, with values that are not finite apart: what is finite is summed as
/// it always is. Rare, so compiled once for all numbers of rows and columns.
struct CarefulSums<'v, 'r, F, S, T> {
    simd: S,
    head: &'r HostView<'v, T>,
    keys: Range<usize>,
    /// The first column, which the values have, as they have those behind it.
    column: usize,
    /// Of the row.
    weights: &'r [F],
    factor: F,
    /// The row's values from the column on.
    to: &'r mut [F],
}

impl<F: Float, S: Simd<F>, T: Source> Kernel for CarefulSums<'_, '_, F, S, T> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        let Self { simd, head, keys, column, weights, factor, to } = self;
        let zero = simd.splat(F::ZERO);
        assert!(column + to.len() <= head.shape()[1]);
        for (vector, to) in to.chunks_exact_mut(S::LANES).enumerate() {
            let (mut sum, mut apart) = (zero, zero);
            for (key, &weight) in keys.clone().zip(weights) {
                // SAFETY: the columns are inside the row, as checked above.
                let value = unsafe { load_row(simd, &head.matrix_row(key), column + vector * S::LANES) };
                let finite = simd.equal(simd.sub(value, value), zero);
                sum = simd.fma(simd.splat(weight), simd.select(finite, value, zero), sum);
                if !weight.is_disallowed() {
                    apart = simd.fma(simd.splat(weight), simd.select(finite, zero, value), apart);
                }
            }
            scale_and_add(simd, to, factor, simd.add(sum, apart));
        }
    }
}

/// The same for one column behind the last whole vector.
#[inline(never)]
fn careful_sum<F: Float, T: Source>(
    head: &HostView<'_, T>,
    keys: Range<usize>,
    column: usize,
    weights: &[F],
) -> F {
    let (mut sum, mut apart) = (F::ZERO, F::ZERO);
    for (key, &weight) in keys.zip(weights) {
        let value: F = head.matrix_row(key).at(column).widen();
        if value.is_finite() {
            sum += weight * value;
        } else {
            sum += weight * F::ZERO;
            if !weight.is_disallowed() {
                apart += weight * value;
            }
        }
    }
    sum + apart
}
