//! The forward pass: chunks of query rows, against chunks of keys and values that are packed once for all of them
//! (Rabe and Staats, arXiv 2112.05682).
//!
//! A task is a chunk of query rows of heads that share a key/value head. It goes over its keys chunk by chunk; a
//! chunk of keys and values is packed, and each block of rows meets it in blocks of keys: products, online softmax,
//! weighted sum of values. What is carried from block to block is a shift near the maximum, the sum and the value of
//! each row.

mod few_rows;
pub(crate) mod softmax;

use std::ops::Range;

use attention_core::merge::{Accumulator, RunningSoftmax};
use attention_core::{ForwardCall, ForwardOutputs, Inputs, Problem};

use self::few_rows::Few;
use self::softmax::BlockSoftmax;
use crate::config::{ChunkedConfig, Plan, Sizes};
use crate::engine::{Before, Engine, MAX_BLOCK_ROWS, STAGE, Weights, tile_stride};
use crate::float::Float;
use crate::paths::{Path, Taken};
use crate::plan::{self, Rows};
use crate::scratch::Pieces;
use crate::simd::{Kernel, Simd};
use crate::tensor::{Floats, SharedOutput};
use crate::terms::{QueryRow, Terms};
use crate::workers;

/// What a task works in.
struct Scratch<'a, E: Engine> {
    stage: &'a mut [E::F],
    queries: &'a mut [E::Packed],
    keys: &'a mut [E::Packed],
    values: &'a mut [E::Packed],
    tile: &'a mut [E::F],
    weights: &'a mut [E::Packed],
    /// The value of each row, unnormalised.
    out: &'a mut [E::F],
    shifts: &'a mut [E::F],
    sums: &'a mut [E::F],
    factors: &'a mut [E::F],
    /// The keys that structure lets each row see.
    begins: &'a mut [u64],
    ends: &'a mut [u64],
    /// For each block of rows, the keys that any and that all of them can see: begin and end of each.
    bounds: &'a mut [[u64; 4]],
    /// One value row, for those that are not finite.
    row: &'a mut [E::F],
    /// For each group of staged values, which are not finite.
    not_finite: &'a mut [u32],
}

/// The sizes of a task's scratch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Layout {
    /// Rows of a chunk, a multiple of what blocks are padded to.
    rows: usize,
    /// Keys of a chunk, a multiple of the block.
    keys: usize,
    head_dim: usize,
    value_head_dim: usize,
}

impl Layout {
    /// For problems of these dimensions: chunks as configured, or such that a task stays inside a budget.
    pub(crate) fn of<E: Engine>(problem: &Problem, sizes: &Sizes, threads: usize) -> Self {
        let dims = problem.dims();
        let (head_dim, value_head_dim) = (dims.head_dim, dims.value_head_dim);
        let most_keys = plan::most_keys(problem);
        let all_rows = plan::total_rows(problem);
        let group_rows = dims.query_length.saturating_mul(dims.group_size().max(1));
        // Enough tasks for every thread to have a few, where rows allow it.
        let fair = (all_rows / (threads * 3).max(1)).clamp(4 * E::BLOCK_ROWS, usize::MAX);
        let packed = |length: usize| size_of::<E::Packed>().saturating_mul(length) / STAGE;
        let row_bytes = packed(E::queries_len(STAGE, head_dim))
            .saturating_add(size_of::<E::F>().saturating_mul(E::sum_stride(value_head_dim)));
        let key_bytes =
            packed(E::keys_len(STAGE, head_dim).saturating_add(E::values_len(STAGE, value_head_dim)));
        // One block of keys at a time is enough for all rows of a chunk, and the more rows there are, the fewer times
        // keys and values are packed.
        let keys = sizes.keys.map_or(E::BLOCK_KEYS, |keys| keys.get());
        let keys = (keys / E::BLOCK_KEYS * E::BLOCK_KEYS)
            .clamp(E::BLOCK_KEYS, 8 * E::BLOCK_KEYS)
            .min(most_keys.next_multiple_of(STAGE).max(STAGE));
        let left = sizes.budget.saturating_sub(keys.saturating_mul(key_bytes)).max(sizes.budget / 4);
        // Whole blocks that fit.
        let within_budget = (left / row_bytes.max(1)).min(1024).min(fair) / E::BLOCK_ROWS * E::BLOCK_ROWS;
        let rows = sizes.rows.map_or(within_budget, |rows| rows.get());
        let rows = rows.min(group_rows).max(1).next_multiple_of(E::BLOCK_ROWS);
        Self { rows, keys, head_dim, value_head_dim }
    }

    fn scratch<'a, E: Engine>(&self, pieces: &mut Pieces<'a>) -> Scratch<'a, E> {
        let Self { rows, keys, head_dim, value_head_dim } = *self;
        let width = head_dim.max(value_head_dim);
        Scratch {
            stage: pieces.take(Floats::stage_len(width)),
            queries: pieces.take(E::queries_len(rows.next_multiple_of(STAGE), head_dim)),
            keys: pieces.take(E::keys_len(keys.next_multiple_of(STAGE), head_dim)),
            values: pieces.take(E::values_len(keys.next_multiple_of(STAGE), value_head_dim)),
            tile: pieces.take(E::BLOCK_ROWS * tile_stride::<E>()),
            weights: pieces.take(E::weights_len(E::BLOCK_ROWS, E::BLOCK_KEYS)),
            out: pieces.take(rows.saturating_mul(E::sum_stride(value_head_dim))),
            shifts: pieces.take(rows),
            sums: pieces.take(rows),
            factors: pieces.take(E::BLOCK_ROWS),
            begins: pieces.take(rows),
            ends: pieces.take(rows),
            bounds: pieces.take(rows / E::BLOCK_ROWS),
            row: pieces.take(value_head_dim),
            not_finite: pieces.take(keys.div_ceil(STAGE)),
        }
    }

    /// Bytes of a task's scratch; `None` on overflow.
    pub(crate) fn bytes<E: Engine>(&self) -> Option<usize> {
        let mut pieces = Pieces::counting();
        let _ = self.scratch::<E>(&mut pieces);
        pieces.bytes()
    }
}

/// Everything that the tasks of a call share.
pub(crate) struct Forward<'a, E: Engine> {
    engine: E,
    problem: &'a Problem,
    query: Floats<'a>,
    key: Floats<'a>,
    value: Floats<'a>,
    sinks: Option<Floats<'a>>,
    terms: Terms<'a, E::F>,
    layout: Layout,
    few: Few,
    taken: &'a Taken,
}

/// What the tasks of a call write.
pub(crate) struct Outputs<'a> {
    pub(crate) out: SharedOutput<'a>,
    pub(crate) lse: Option<SharedOutput<'a>>,
}

impl<'a> Outputs<'a> {
    /// Takes the outputs of a call and fills the padded rows: with 0 an output, with -inf a logsumexp.
    pub(crate) fn new(problem: &Problem, outputs: ForwardOutputs<'a>) -> Self {
        let new = Self { out: SharedOutput::new(outputs.out), lse: outputs.lse.map(SharedOutput::new) };
        let dims = problem.dims();
        for batch in 0..if plan::may_have_padding(problem) { dims.batch } else { 0 } {
            for query in problem.query_len(batch)..dims.query_length {
                for head in 0..dims.query_heads {
                    // SAFETY: no task has begun.
                    unsafe { new.empty_row(batch, query, head) };
                }
            }
        }
        new
    }

    /// # Safety
    /// No other thread writes this row.
    unsafe fn empty_row(&self, batch: usize, query: usize, head: usize) {
        // SAFETY: the caller's.
        unsafe {
            self.out.zero_row([batch, query, head]);
            if let Some(lse) = &self.lse {
                lse.write([batch, query, head, 0], f64::NEG_INFINITY);
            }
        }
    }
}

impl<'a, E: Engine> Forward<'a, E> {
    fn new(
        engine: E,
        problem: &'a Problem,
        inputs: &Inputs<'a>,
        layout: Layout,
        few: Few,
        taken: &'a Taken,
    ) -> Self {
        Self {
            engine,
            problem,
            query: Floats::new(inputs.query),
            key: Floats::new(inputs.key),
            value: Floats::new(inputs.value),
            sinks: inputs.sinks.map(Floats::new),
            terms: Terms::new(problem, inputs),
            layout,
            few,
            taken,
        }
    }

    /// Computes the rows of a task.
    ///
    /// # Safety
    /// No other thread writes these rows of the outputs.
    unsafe fn task(&self, rows: &Rows, outputs: &Outputs<'a>, memory: &mut [u8]) {
        self.taken.mark(Path::Chunk);
        let mut scratch = self.layout.scratch::<E>(&mut Pieces::of(memory));
        let range = self.problem.key_range_of_rows(rows.batch, rows.queries.clone());
        self.engine.with_state(|| {
            self.begin(rows, &mut scratch);
            let mut chunk = range.start / self.layout.keys * self.layout.keys;
            while chunk < range.end {
                let keys = chunk..range.end.min(chunk + self.layout.keys);
                let all_finite = self.pack(rows, &keys, range.start, &mut scratch);
                // A block of keys and values stays in the first cache levels while all rows pass it.
                for start in keys.clone().step_by(E::BLOCK_KEYS) {
                    let block_keys = start..keys.end.min(start + E::BLOCK_KEYS);
                    for first in (0..rows.len()).step_by(E::BLOCK_ROWS) {
                        let block = first..rows.len().min(first + E::BLOCK_ROWS);
                        self.rows_and_keys(rows, block, &block_keys, &keys, all_finite, &mut scratch);
                    }
                }
                chunk += self.layout.keys;
            }
        });
        // SAFETY: the caller's.
        unsafe { self.finish(rows, outputs, &mut scratch) };
    }

    /// Packs the queries and sets every row to the value of no keys.
    fn begin(&self, rows: &Rows, scratch: &mut Scratch<'_, E>) {
        let count = rows.len();
        for first in (0..count).step_by(STAGE) {
            let index = |row: usize| {
                let (head, query) = rows.at(first + row);
                [rows.batch, query, head]
            };
            let sign = self.terms.query_sign();
            let staged = STAGE.min(count - first);
            let (staged, _) = self.query.stage(self.engine, staged, &index, sign, false, scratch.stage);
            let packed = self.layout.rows.next_multiple_of(STAGE);
            self.engine.pack_queries(staged, first, packed, scratch.queries);
        }
        for query in rows.queries.clone() {
            let keys = self.problem.key_range(rows.batch, query);
            for head in 0..rows.heads.len() {
                let row = head * rows.queries.len() + query - rows.queries.start;
                (scratch.begins[row], scratch.ends[row]) = (keys.start as u64, keys.end as u64);
            }
        }
        for (index, bounds) in scratch.bounds[..count.div_ceil(E::BLOCK_ROWS)].iter_mut().enumerate() {
            let block = index * E::BLOCK_ROWS..count.min((index + 1) * E::BLOCK_ROWS);
            *bounds = [u64::MAX, 0, 0, u64::MAX];
            for (&begin, &end) in scratch.begins[block.clone()].iter().zip(&scratch.ends[block]) {
                if begin < end {
                    (bounds[0], bounds[1]) = (bounds[0].min(begin), bounds[1].max(end));
                }
                (bounds[2], bounds[3]) = (bounds[2].max(begin), bounds[3].min(end));
            }
            bounds[0] = bounds[0].min(bounds[1]);
        }
        let stride = E::sum_stride(self.layout.value_head_dim);
        scratch.out[..count * stride].fill(E::F::ZERO);
        scratch.shifts[..count].fill(E::F::NEG_INFINITY);
        scratch.sums[..count].fill(E::F::ZERO);
    }

    /// Packs the keys and values of a chunk from `needed` on; whether all of the values are finite.
    fn pack(&self, rows: &Rows, keys: &Range<usize>, needed: usize, scratch: &mut Scratch<'_, E>) -> bool {
        let packed = keys.len().next_multiple_of(STAGE);
        let skipped = needed.saturating_sub(keys.start) / E::BLOCK_KEYS * E::BLOCK_KEYS;
        let mut all = 0;
        for first in (skipped..keys.len()).step_by(STAGE) {
            let staged = STAGE.min(keys.len() - first);
            let index = |row: usize| [rows.batch, keys.start + first + row, rows.key_head];
            let (rows, _) = self.key.stage(self.engine, staged, &index, E::F::ONE, false, scratch.stage);
            self.engine.pack_keys(rows, first, packed, scratch.keys);
            let (rows, not_finite) =
                self.value.stage(self.engine, staged, &index, E::F::ONE, true, scratch.stage);
            self.engine.pack_values(rows, first, packed, scratch.values);
            scratch.not_finite[first / STAGE] = not_finite;
            all |= not_finite;
        }
        all == 0
    }

    /// A block of rows against those keys of a block that any of them can see.
    fn rows_and_keys(
        &self,
        rows: &Rows,
        block: Range<usize>,
        keys: &Range<usize>,
        chunk: &Range<usize>,
        all_finite: bool,
        scratch: &mut Scratch<'_, E>,
    ) {
        let [any_begin, any_end, all_begin, all_end] =
            scratch.bounds[block.start / E::BLOCK_ROWS].map(|bound| bound as usize);
        let seen = plan::intersection(&(any_begin..any_end), keys);
        if seen.is_empty() {
            return;
        }
        let keys = keys.start.max(seen.start / E::KEY_STEP * E::KEY_STEP)..seen.end;
        let inside = all_begin <= keys.start && all_end >= keys.end;
        let mut room = [QueryRow { batch: 0, head: 0, query: 0, begin: 0, end: 0 }; MAX_BLOCK_ROWS];
        let infos = &mut room[..block.len()];
        let apply = !inside || !self.terms.is_plain() || self.terms.has_mask() || self.terms.has_dropout();
        // Only what masks or adds something asks for more than the first row.
        let needed = if apply { infos.len() } else { 1 };
        for (info, row) in infos[..needed].iter_mut().zip(block.clone()) {
            let (head, query) = rows.at(row);
            let (begin, end) = (scratch.begins[row] as usize, scratch.ends[row] as usize);
            *info = QueryRow { batch: rows.batch, head, query, begin, end };
        }
        if self.terms.has_mask() && self.terms.masks_all(infos, keys.clone()) {
            self.taken.mark(Path::MaskedBlock);
            return;
        }
        self.block(&block, infos, chunk, keys, apply, all_finite, scratch);
    }

    /// A block of rows against a block of keys.
    #[allow(clippy::too_many_arguments, reason = "what the loops around it know")]
    fn block(
        &self,
        block: &Range<usize>,
        infos: &[QueryRow],
        chunk: &Range<usize>,
        keys: Range<usize>,
        apply: bool,
        all_finite: bool,
        scratch: &mut Scratch<'_, E>,
    ) {
        let Layout { head_dim, value_head_dim, .. } = self.layout;
        let engine = self.engine;
        let stride = tile_stride::<E>();
        let pair = 2 * <E::S as Simd<E::F>>::LANES;
        let packed = chunk.len().next_multiple_of(STAGE);
        let (begin, count) = (keys.start - chunk.start, keys.len());
        let end = (begin + count).next_multiple_of(E::KEY_STEP).min(packed);
        engine.products(
            (scratch.queries, self.layout.rows.next_multiple_of(STAGE)),
            (block.start, block.len()),
            (scratch.keys, packed),
            (begin, end),
            head_dim,
            scratch.tile,
            stride,
        );
        let columns = count.next_multiple_of(pair.max(E::WEIGHT_STEP));
        if columns != count && !apply {
            // Columns behind the last key of the block: all rows end where it ends, or see more keys behind it.
            for row in 0..block.len() {
                scratch.tile[row * stride + count..row * stride + columns].fill(E::F::NEG_INFINITY);
            }
        }
        let rescaled = engine.simd().vectorize(BlockSoftmax {
            engine,
            terms: &self.terms,
            rows: infos,
            first: keys.start,
            columns,
            apply,
            mark: !all_finite,
            tile: scratch.tile,
            stride,
            packed_columns: E::BLOCK_KEYS,
            packed: scratch.weights,
            shifts: &mut scratch.shifts[block.clone()],
            sums: &mut scratch.sums[block.clone()],
            factors: scratch.factors,
        });
        self.taken.mark(Path::softmax(&self.terms, apply));
        if self.terms.has_dropout() {
            self.taken.mark(Path::Dropout);
        }
        if rescaled {
            self.taken.mark(Path::Rescaled);
        }
        let out_stride = E::sum_stride(value_head_dim);
        let out = &mut scratch.out[block.start * out_stride..];
        engine.weighted_sums(
            Weights { tile: scratch.tile, stride, packed: scratch.weights },
            block.len(),
            (scratch.values, packed),
            begin,
            count,
            value_head_dim,
            if rescaled { Before::Scaled(scratch.factors) } else { Before::Kept },
            out,
            out_stride,
        );
        if !all_finite {
            let groups = begin / STAGE..(begin + count).div_ceil(STAGE);
            for group in groups {
                let bits = scratch.not_finite[group];
                for key in (0..STAGE).filter(|key| bits >> key & 1 == 1).map(|key| group * STAGE + key) {
                    if !(begin..begin + count).contains(&key) {
                        continue;
                    }
                    self.taken.mark(Path::ValuesApart);
                    let index = [infos[0].batch, chunk.start + key, infos[0].head / self.group()];
                    self.value.read_row(index, scratch.row);
                    add_apart(scratch.row, scratch.tile, stride, key - begin, infos.len(), out, out_stride);
                }
            }
        }
    }

    fn group(&self) -> usize {
        self.problem.dims().group_size().max(1)
    }

    /// Normalises the rows and writes them.
    ///
    /// # Safety
    /// As for [`task`](Self::task).
    unsafe fn finish(&self, rows: &Rows, outputs: &Outputs<'a>, scratch: &mut Scratch<'_, E>) {
        self.engine.simd().vectorize(Finish { forward: self, rows, outputs, scratch });
    }
}

/// Adds a value row that is not finite to the rows in which its key takes part.
fn add_apart<F: Float>(
    value: &[F],
    weights: &[F],
    stride: usize,
    column: usize,
    rows: usize,
    out: &mut [F],
    out_stride: usize,
) {
    for row in 0..rows {
        let weight = weights[row * stride + column];
        if !weight.is_disallowed() {
            for (out, &value) in out[row * out_stride..].iter_mut().zip(value) {
                *out += weight * value;
            }
        }
    }
}

struct Finish<'s, 'o, 'a, 'm, E: Engine> {
    forward: &'s Forward<'a, E>,
    rows: &'s Rows,
    outputs: &'s Outputs<'o>,
    scratch: &'s mut Scratch<'m, E>,
}

impl<E: Engine> Kernel for Finish<'_, '_, '_, '_, E> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        let Self { forward, rows, outputs, scratch } = self;
        let width = forward.layout.value_head_dim;
        let stride = E::sum_stride(width);
        for row in 0..rows.len() {
            let (head, query) = rows.at(row);
            let sink = forward.sinks.as_ref().map(|sinks| sinks.at(&[head]));
            let values = &mut scratch.out[row * stride..][..width];
            let lse = normalise(scratch.shifts[row], scratch.sums[row], forward.terms.unit(), sink, values);
            // SAFETY: the caller of `finish` vouches for the rows of the task.
            unsafe {
                outputs.out.write_row([rows.batch, query, head], values, E::F::ONE);
                if let Some(to) = &outputs.lse {
                    to.write([rows.batch, query, head, 0], lse);
                }
            }
        }
    }
}

/// Divides the value of a row by the sum of its weights and its sink's, and gives the logsumexp. The shift is in units of
/// the call, of size `unit`; the sink and the logsumexp are natural.
#[inline(always)]
pub(crate) fn normalise<F: Float>(shift: F, sum: F, unit: F, sink: Option<F>, values: &mut [F]) -> F {
    let max = shift * unit;
    let mut running = RunningSoftmax { max, sum };
    let mut factor = F::ONE;
    if let Some(sink) = sink.filter(|&sink| sink != F::NEG_INFINITY) {
        factor = running.merge(RunningSoftmax::of(sink)).old;
    }
    if running.sum == F::ZERO {
        values.fill(F::ZERO);
        return F::NEG_INFINITY;
    }
    let is_nan = running.sum.partial_cmp(&F::ZERO).is_none();
    // The sum without the sink's scale; a row of keys that are nothing beside the sink has factor 0.
    let total = running.sum / factor;
    if factor == F::ZERO && !is_nan {
        values.fill(F::ZERO);
    } else {
        for value in values.iter_mut() {
            *value = *value / total;
        }
    }
    // The shift may have missed a NaN, the sum cannot.
    if is_nan {
        running.sum
    } else if running.max == max {
        shift.fused(unit, running.sum.ln())
    } else {
        running.lse()
    }
}

/// What a task computes.
enum Task {
    /// A chunk of rows.
    Chunk(Rows),
    /// All keys of few rows of some heads.
    Few(FewHeads),
    /// A part of the keys of few rows of some heads, into a slot for partial results.
    Part { heads: FewHeads, keys: Range<usize>, slot: usize },
}

/// Neighbouring key/value heads of a batch row with few query rows.
#[derive(Clone, Debug)]
struct FewHeads {
    batch: usize,
    key_heads: Range<usize>,
}

impl FewHeads {
    /// Runs `work` on the rows of each head.
    fn with_rows<R>(&self, problem: &Problem, work: impl FnOnce(&[Rows]) -> R) -> R {
        let group = problem.dims().group_size();
        let rows: [Rows; few_rows::MAX_HEADS] = std::array::from_fn(|index| {
            let key_head = self.key_heads.start + index;
            let heads = key_head * group..(key_head + 1) * group;
            Rows { batch: self.batch, key_head, heads, queries: 0..problem.query_len(self.batch) }
        });
        work(&rows[..self.key_heads.len()])
    }
}

/// The tasks of a call: found by their number, since a list would grow with the batch.
struct Tasks {
    /// The most tasks of a batch row, parts left out. Numbers go over the batch rows in steps of this; a batch row with
    /// fewer tasks leaves numbers without one.
    per_row: usize,
    /// Few rows in parts, where whole rows are too few for the threads: a few for each thread.
    parts: Vec<(FewHeads, Range<usize>)>,
    /// Few rows whose parts are merged afterwards, with their slots. The slot of a part is its index.
    merges: Vec<(FewHeads, Range<usize>)>,
    in_parts: bool,
    /// Key/value heads with few rows that are worked on together.
    few_heads: usize,
    /// How many threads have something to do.
    workers: usize,
}

/// Whether the rows of a key/value head are few in a batch row.
fn is_few(problem: &Problem, batch: usize) -> bool {
    problem.query_len(batch).saturating_mul(problem.dims().group_size()) <= few_rows::FEW
}

/// Key/value heads of all batch rows with few query rows.
fn few_heads(problem: &Problem) -> usize {
    if !plan::has_rows(problem) {
        return 0;
    }
    let key_heads = problem.dims().key_heads;
    plan::count_up_to(problem, usize::MAX, |batch| {
        if is_few(problem, batch) && problem.query_len(batch) > 0 { key_heads } else { 0 }
    })
}

impl Tasks {
    /// With at most `limit(batch)` rows in a chunk, and `few.heads` heads with few rows together.
    fn of(problem: &Problem, threads: usize, few: &Few, limit: impl Fn(usize) -> usize) -> Self {
        let key_heads = problem.dims().key_heads;
        let all_few = few_heads(problem);
        // The bits are the same.
        let in_parts = all_few > 0 && threads > 1 && all_few.div_ceil(few.heads) < 4 * threads;
        let count = |batch: usize| match is_few(problem, batch) {
            _ if problem.query_len(batch) == 0 => 0,
            true if in_parts => 0,
            true => key_heads.div_ceil(few.heads),
            false => plan::Cut::of(problem, batch, limit(batch)).count(problem, batch),
        };
        let (mut parts, mut merges) = (Vec::new(), Vec::new());
        let in_parts_of = |batch: usize| in_parts && is_few(problem, batch) && problem.query_len(batch) > 0;
        for batch in (0..if in_parts { problem.dims().batch } else { 0 }).filter(|&batch| in_parts_of(batch))
        {
            let keys = problem.key_range_of_rows(batch, 0..problem.query_len(batch));
            for first in (0..key_heads).step_by(few.heads) {
                let heads = FewHeads { batch, key_heads: first..key_heads.min(first + few.heads) };
                let slot = parts.len();
                parts.extend(few_rows::parts(&keys).map(|keys| (heads.clone(), keys)));
                merges.push((heads, slot..parts.len()));
            }
        }
        let (mut per_row, mut workers) = (0, parts.len().max(merges.len()));
        if plan::has_rows(problem) {
            per_row = plan::different_rows(problem).map(count).max().unwrap_or(0);
            workers = workers.saturating_add(plan::count_up_to(problem, threads, count));
        }
        let workers = threads.min(workers);
        Self { per_row, parts, merges, in_parts, few_heads: few.heads, workers }
    }

    /// How many numbers there are.
    fn count(&self, problem: &Problem) -> usize {
        self.parts.len() + self.per_row * problem.dims().batch
    }

    /// The task of a number, if it has one.
    fn at(&self, problem: &Problem, limit: impl Fn(usize) -> usize, number: usize) -> Option<Task> {
        // Under causal masking the last rows of a head see the most keys: begin with those.
        let Some(number) = (self.per_row * problem.dims().batch).checked_sub(number + 1) else {
            let slot = number - self.per_row * problem.dims().batch;
            let (heads, keys) = self.parts[slot].clone();
            return Some(Task::Part { heads, keys, slot });
        };
        let (batch, index) = (number / self.per_row, number % self.per_row);
        if !is_few(problem, batch) {
            return plan::Cut::of(problem, batch, limit(batch)).rows(problem, batch, index).map(Task::Chunk);
        }
        let key_heads = problem.dims().key_heads;
        let first = index * self.few_heads;
        if self.in_parts || first >= key_heads || problem.query_len(batch) == 0 {
            return None;
        }
        Some(Task::Few(FewHeads { batch, key_heads: first..key_heads.min(first + self.few_heads) }))
    }
}

/// What a call takes.
struct Needs {
    layout: Layout,
    small: Layout,
    few: Few,
    /// Bytes of a worker's scratch.
    bytes: usize,
    /// Bytes of a partial result.
    slot: usize,
    tasks: Tasks,
}

impl Needs {
    /// `None` on overflow.
    fn of<E: Engine, Small: Engine>(
        problem: &Problem,
        has_small: bool,
        sizes: &Sizes,
        threads: usize,
    ) -> Option<Self> {
        let dims = problem.dims();
        let layout = Layout::of::<E>(problem, sizes, threads);
        let small = Layout::of::<Small>(problem, sizes, threads);
        // Which kinds of batch rows there are, by whether they are of few rows and small.
        let (mut kinds, mut few_rows_of_head) = ([[false; 2]; 2], 0);
        for batch in plan::different_rows(problem) {
            let (few, small) = (is_few(problem, batch), has_small && plan::is_small(problem, batch));
            kinds[usize::from(few)][usize::from(small)] = true;
            if few {
                few_rows_of_head = few_rows_of_head.max(problem.query_len(batch) * dims.group_size());
            }
        }
        let parts = few_rows::parts(&(0..dims.key_length)).len().max(1);
        let enough = few_heads(problem).saturating_mul(parts) / threads.saturating_mul(4).max(1);
        let few = Few::of(problem, few_rows_of_head, enough);
        let (mut bytes, mut slot) = (0usize, 0usize);
        let [[many, many_small], [few_large, few_small]] = kinds;
        if many {
            bytes = bytes.max(layout.bytes::<E>()?);
        }
        if many_small {
            bytes = bytes.max(small.bytes::<Small>()?);
        }
        if few_large {
            bytes = bytes.max(few.bytes::<E::F>()?);
            slot = slot.max(few.partial_bytes::<E::F>()?);
        }
        if few_small {
            bytes = bytes.max(few.bytes::<Small::F>()?);
            slot = slot.max(few.partial_bytes::<Small::F>()?);
        }
        let limit =
            |batch: usize| if has_small && plan::is_small(problem, batch) { small.rows } else { layout.rows };
        let tasks = Tasks::of(problem, threads, &few, limit);
        Some(Self { layout, small, few, bytes, slot, tasks })
    }
}

impl Plan for Needs {
    fn workers(&self) -> usize {
        self.tasks.workers
    }

    fn scratch(&self) -> Option<usize> {
        let slots = self.slot.checked_mul(self.tasks.parts.len())?;
        self.bytes.checked_mul(self.tasks.workers)?.checked_add(slots)
    }
}

/// Bytes of scratch of a call; `None` on overflow.
pub(crate) fn needs<E: Engine, Small: Engine>(
    problem: &Problem,
    has_small: bool,
    config: &ChunkedConfig,
) -> Option<usize> {
    Needs::of::<E, Small>(problem, has_small, &config.sizes(), config.planned_threads())?.scratch()
}

/// Runs a checked call in checked scratch, and marks the paths that it takes: on the engine, and on the small one.
pub(crate) fn run<E: Engine, Small: Engine>(
    engine: E,
    small: Option<Small>,
    call: ForwardCall<'_>,
    config: &ChunkedConfig,
    scratch: &mut [u8],
    taken: [&Taken; 2],
) {
    let (problem, inputs, outputs) = call.into_parts();
    let outputs = Outputs::new(problem, outputs);
    let sizes = config.sizes();
    let (Needs { layout, small: small_layout, few, bytes, slot, tasks }, team) = config
        .begin(scratch.len(), |threads| Needs::of::<E, Small>(problem, small.is_some(), &sizes, threads));
    let limit = |batch: usize| {
        if small.is_some() && plan::is_small(problem, batch) { small_layout.rows } else { layout.rows }
    };
    let forward = Forward::new(engine, problem, &inputs, layout, few, taken[0]);
    let small = small.map(|small| Forward::new(small, problem, &inputs, small_layout, few, taken[1]));
    let small_of = |batch: usize| small.as_ref().filter(|_| plan::is_small(problem, batch));
    let (slots, scratch) = scratch.split_at_mut(slot * tasks.parts.len());
    let slots = Slots { first: slots.as_mut_ptr(), bytes: slot, count: tasks.parts.len() };

    workers::run(tasks.count(problem), &team, scratch, bytes, &|number, memory| {
        let Some(task) = tasks.at(problem, limit, number) else { return };
        // SAFETY: the tasks are different rows or different slots, and each is run once.
        unsafe {
            match task {
                Task::Chunk(rows) => match small_of(rows.batch) {
                    Some(small) => small.task(&rows, &outputs, memory),
                    None => forward.task(&rows, &outputs, memory),
                },
                Task::Few(heads) => heads.with_rows(problem, |rows| match small_of(heads.batch) {
                    Some(small) => small.few_rows(rows, &outputs, memory),
                    None => forward.few_rows(rows, &outputs, memory),
                }),
                Task::Part { heads, keys, slot } => heads.with_rows(problem, |rows| {
                    let to = slots.range(slot..slot + 1);
                    match small_of(heads.batch) {
                        Some(small) => small.few_rows_part(rows, keys, to, memory),
                        None => forward.few_rows_part(rows, keys, to, memory),
                    }
                }),
            }
        }
    });
    workers::run(tasks.merges.len(), &team, scratch, bytes, &|index, memory| {
        let (heads, range) = &tasks.merges[index];
        // SAFETY: the merges are different rows with different slots, whose parts are done.
        unsafe {
            let parts = slots.range(range.clone());
            heads.with_rows(problem, |rows| match small_of(heads.batch) {
                Some(small) => small.merge_parts(rows, parts, slot, &outputs, memory),
                None => forward.merge_parts(rows, parts, slot, &outputs, memory),
            });
        }
    });
}

/// Memory for partial results that tasks share: each uses slots of its own.
struct Slots {
    first: *mut u8,
    bytes: usize,
    count: usize,
}

// SAFETY: an exclusive piece of memory, whose parts are handed out by an unsafe method.
unsafe impl Sync for Slots {}

impl Slots {
    /// # Safety
    /// Nobody else uses these slots, and the memory is still borrowed.
    #[allow(clippy::mut_from_ref, reason = "the caller vouches for exclusive slots")]
    unsafe fn range(&self, slots: Range<usize>) -> &mut [u8] {
        assert!(slots.start <= slots.end && slots.end <= self.count);
        // SAFETY: inside the memory that the slots were made of; exclusive by the caller's word.
        unsafe {
            std::slice::from_raw_parts_mut(self.first.add(slots.start * self.bytes), slots.len() * self.bytes)
        }
    }
}

#[cfg(test)]
mod tests {
    use attention_core::{DType, TensorDesc};

    use super::*;
    use crate::config::ChunkedConfig;

    /// Bytes of a worker's scratch for one head of `head_dim`, on an engine that this machine need not have.
    fn bytes<E: Engine>(dtype: DType, head_dim: usize) -> usize {
        let desc = TensorDesc::contiguous(dtype, [1, 1 << 18, 1, head_dim]);
        let problem = Problem::builder(desc, desc, desc).build().expect("a valid problem");
        Layout::of::<E>(&problem, &ChunkedConfig::default().sizes(), 1).bytes::<E>().expect("no overflow")
    }

    #[test]
    fn a_thread_needs_at_most_a_mebibyte_on_every_engine() {
        use crate::engine::vector::Fused;
        use crate::simd::Scalar;
        for head_dim in [16, 64, 80, 128] {
            let mut all = vec![
                ("scalar f32", bytes::<Fused<f32, Scalar>>(DType::F32, head_dim)),
                ("scalar f64", bytes::<Fused<f64, Scalar>>(DType::F64, head_dim)),
            ];
            #[cfg(target_arch = "x86_64")]
            {
                use crate::engine::amx::Tiles;
                use crate::simd::{Avx2, Avx512};
                all.extend([
                    ("avx2 f32", bytes::<Fused<f32, Avx2>>(DType::F32, head_dim)),
                    ("avx512 f32", bytes::<Fused<f32, Avx512>>(DType::F32, head_dim)),
                    ("avx512 f64", bytes::<Fused<f64, Avx512>>(DType::F64, head_dim)),
                    ("amx bf16", bytes::<Tiles<1>>(DType::Bf16, head_dim)),
                    ("amx f16", bytes::<Tiles<2>>(DType::F16, head_dim)),
                ]);
            }
            for (engine, bytes) in all {
                assert!(bytes <= 1 << 20, "{engine}, H = {head_dim}: {bytes} bytes");
            }
        }
    }
}
