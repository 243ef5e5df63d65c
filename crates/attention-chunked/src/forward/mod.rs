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
use crate::config::Sizes;
use crate::engine::{Before, Engine, STAGE, Weights};
use crate::float::Float;
use crate::plan::{self, Rows};
use crate::scratch::Pieces;
use crate::simd::{Kernel, Simd};
use crate::tensor::{Floats, SharedOutput};
use crate::terms::{QueryRow, Terms};
use crate::workers;

/// Rows of the largest block of any engine.
pub(crate) const MAX_BLOCK_ROWS: usize = 128;

/// The distance between rows of a tile: a bit more than a block, since rows a power of two apart would share the sets
/// of the cache.
pub(crate) const fn tile_stride<E: Engine>() -> usize {
    E::BLOCK_KEYS + 16
}

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
        let most_keys = (0..dims.batch).map(|batch| problem.key_value_len(batch)).max().unwrap_or(0);
        let all_rows = plan::total_rows(problem);
        let group_rows = dims.query_length.saturating_mul(dims.group_size().max(1));
        // Enough tasks for every thread to have a few, where rows allow it.
        let fair = (all_rows / (threads * 3).max(1)).clamp(4 * E::BLOCK_ROWS, usize::MAX);
        let row_bytes = size_of::<E::Packed>() * E::queries_len(STAGE, head_dim) / STAGE
            + size_of::<E::F>() * E::sum_stride(value_head_dim);
        let key_bytes = size_of::<E::Packed>()
            * (E::keys_len(STAGE, head_dim) + E::values_len(STAGE, value_head_dim))
            / STAGE;
        // One block of keys at a time is enough for all rows of a chunk, and the more rows there are, the fewer times
        // keys and values are packed.
        let keys = sizes.keys.map_or(E::BLOCK_KEYS, |keys| keys.get());
        let keys = (keys / E::BLOCK_KEYS * E::BLOCK_KEYS)
            .clamp(E::BLOCK_KEYS, 8 * E::BLOCK_KEYS)
            .min(most_keys.next_multiple_of(STAGE).max(STAGE));
        let left = sizes.budget.saturating_sub(keys * key_bytes).max(sizes.budget / 4);
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
            out: pieces.take(rows * E::sum_stride(value_head_dim)),
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
        for batch in 0..dims.batch {
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
    fn new(engine: E, problem: &'a Problem, inputs: &Inputs<'a>, layout: Layout, few: Few) -> Self {
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
        }
    }

    /// Computes the rows of a task.
    ///
    /// # Safety
    /// No other thread writes these rows of the outputs.
    unsafe fn task(&self, rows: &Rows, outputs: &Outputs<'a>, memory: &mut [u8]) {
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
            let (staged, _) = self.query.stage(self.engine, staged, index, sign, false, scratch.stage);
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
            let (rows, _) = self.key.stage(self.engine, staged, index, E::F::ONE, false, scratch.stage);
            self.engine.pack_keys(rows, first, packed, scratch.keys);
            let (rows, not_finite) =
                self.value.stage(self.engine, staged, index, E::F::ONE, true, scratch.stage);
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
            let running = RunningSoftmax { max: scratch.shifts[row] * E::F::LN_2, sum: scratch.sums[row] };
            let sink = forward.sinks.as_ref().map(|sinks| sinks.at(&[head]));
            let values = &mut scratch.out[row * stride..][..width];
            let lse = normalise(running, sink, values);
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

/// Divides the value of a row by the sum of its weights and its sink's, and gives the logsumexp.
#[inline(always)]
pub(crate) fn normalise<F: Float>(mut running: RunningSoftmax<F>, sink: Option<F>, values: &mut [F]) -> F {
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
    if is_nan { running.sum } else { running.lse() }
}

/// What a task computes.
#[derive(Clone, Debug)]
enum Task {
    /// A chunk of rows.
    Chunk(Rows),
    /// All keys of few rows of some heads.
    Few(Vec<Rows>),
    /// A part of the keys of few rows of some heads, into a slot for partial results.
    Part { heads: Vec<Rows>, keys: Range<usize>, slot: usize },
}

/// The tasks of a call.
struct Tasks {
    tasks: Vec<Task>,
    /// Few rows whose parts are merged afterwards, with their slots.
    merges: Vec<(Vec<Rows>, Range<usize>)>,
    slots: usize,
}

/// Whether the rows of a key/value head are few in a batch row.
fn is_few(problem: &Problem, batch: usize) -> bool {
    problem.query_len(batch).saturating_mul(problem.dims().group_size()) <= few_rows::FEW
}

/// Key/value heads of all batch rows with few query rows.
fn few_heads(problem: &Problem) -> usize {
    let dims = problem.dims();
    let few = (0..dims.batch).filter(|&batch| is_few(problem, batch) && problem.query_len(batch) > 0);
    few.count().saturating_mul(dims.key_heads)
}

impl Tasks {
    /// With at most `limit(batch)` rows in a chunk, and `few.heads` heads with few rows together.
    fn of(problem: &Problem, threads: usize, few: &Few, limit: impl Fn(usize) -> usize) -> Self {
        let dims = problem.dims();
        // Parts of their own where whole rows are too few for the threads; the bits are the same.
        let in_parts = threads > 1 && few_heads(problem).div_ceil(few.heads) < 4 * threads;
        let (mut tasks, mut merges, mut slots) = (Vec::new(), Vec::new(), 0);
        let many = |batch: usize| if is_few(problem, batch) { 0 } else { limit(batch) };
        for batch in (0..dims.batch).filter(|&batch| is_few(problem, batch)) {
            let all: Vec<Rows> = plan::batch_tasks(problem, batch, few_rows::FEW).collect();
            for heads in all.chunks(few.heads) {
                let heads = heads.to_vec();
                if !in_parts {
                    tasks.push(Task::Few(heads));
                    continue;
                }
                let keys = problem.key_range_of_rows(batch, heads[0].queries.clone());
                let first = slots;
                for keys in few_rows::parts(&keys) {
                    tasks.push(Task::Part { heads: heads.clone(), keys, slot: slots });
                    slots += 1;
                }
                merges.push((heads, first..slots));
            }
        }
        tasks.extend(plan::row_tasks(problem, many).map(Task::Chunk));
        // Under causal masking the last rows of a head see the most keys: begin with those.
        tasks.reverse();
        Self { tasks, merges, slots }
    }

    fn workers(&self, threads: usize) -> usize {
        threads.min(self.tasks.len().max(self.merges.len()))
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
        let few_rows = (0..dims.batch)
            .filter(|&batch| is_few(problem, batch))
            .map(|batch| problem.query_len(batch) * dims.group_size());
        let parts = few_rows::parts(&(0..dims.key_length)).len().max(1);
        let enough = few_heads(problem) * parts / (4 * threads).max(1);
        let few = Few::of(problem, few_rows.max().unwrap_or(0), enough);
        let (mut bytes, mut slot) = (0usize, 0usize);
        for batch in 0..dims.batch {
            let is_small = has_small && plan::is_small(problem, batch);
            let needed = match (is_few(problem, batch), is_small) {
                (true, true) => few.bytes::<Small::F>(),
                (true, false) => few.bytes::<E::F>(),
                (false, true) => small.bytes::<Small>(),
                (false, false) => layout.bytes::<E>(),
            };
            bytes = bytes.max(needed?);
            if is_few(problem, batch) {
                let partial =
                    if is_small { few.partial_bytes::<Small::F>() } else { few.partial_bytes::<E::F>() };
                slot = slot.max(partial?);
            }
        }
        let limit =
            |batch: usize| if has_small && plan::is_small(problem, batch) { small.rows } else { layout.rows };
        let tasks = Tasks::of(problem, threads, &few, limit);
        Some(Self { layout, small, few, bytes, slot, tasks })
    }

    fn total(&self, threads: usize) -> Option<usize> {
        let slots = self.slot.checked_mul(self.tasks.slots)?;
        self.bytes.checked_mul(self.tasks.workers(threads))?.checked_add(slots)
    }
}

/// Bytes of scratch of a call; `None` on overflow.
pub(crate) fn needs<E: Engine, Small: Engine>(
    problem: &Problem,
    has_small: bool,
    sizes: &Sizes,
    threads: usize,
) -> Option<usize> {
    Needs::of::<E, Small>(problem, has_small, sizes, threads)?.total(threads)
}

/// Runs a checked call in checked scratch.
pub(crate) fn run<E: Engine, Small: Engine>(
    engine: E,
    small: Option<Small>,
    call: ForwardCall<'_>,
    sizes: &Sizes,
    threads: usize,
    scratch: &mut [u8],
) {
    let (problem, inputs, outputs) = call.into_parts();
    let outputs = Outputs::new(problem, outputs);
    let Needs { layout, small: small_layout, few, bytes, slot, tasks } =
        Needs::of::<E, Small>(problem, small.is_some(), sizes, threads)
            .unwrap_or_else(|| unreachable!("the scratch was sized before"));
    let forward = Forward::new(engine, problem, &inputs, layout, few);
    let small = small.map(|small| Forward::new(small, problem, &inputs, small_layout, few));
    let small_of = |rows: &Rows| small.as_ref().filter(|_| plan::is_small(problem, rows.batch));
    let (slots, scratch) = scratch.split_at_mut(slot * tasks.slots);
    let slots = Slots { first: slots.as_mut_ptr(), bytes: slot, count: tasks.slots };

    workers::run(tasks.tasks.len(), threads, scratch, bytes, |index, memory| {
        // SAFETY: the tasks are different rows or different slots, and each is run once.
        unsafe {
            match &tasks.tasks[index] {
                Task::Chunk(rows) => match small_of(rows) {
                    Some(small) => small.task(rows, &outputs, memory),
                    None => forward.task(rows, &outputs, memory),
                },
                Task::Few(heads) => match small_of(&heads[0]) {
                    Some(small) => small.few_rows(heads, &outputs, memory),
                    None => forward.few_rows(heads, &outputs, memory),
                },
                Task::Part { heads, keys, slot } => {
                    let to = slots.range(*slot..slot + 1);
                    match small_of(&heads[0]) {
                        Some(small) => small.few_rows_part(heads, keys.clone(), to, memory),
                        None => forward.few_rows_part(heads, keys.clone(), to, memory),
                    }
                }
            }
        }
    });
    workers::run(tasks.merges.len(), threads, scratch, bytes, |index, memory| {
        let (heads, range) = &tasks.merges[index];
        // SAFETY: the merges are different rows with different slots, whose parts are done.
        unsafe {
            let parts = slots.range(range.clone());
            match small_of(&heads[0]) {
                Some(small) => small.merge_parts(heads, parts, slot, &outputs, memory),
                None => forward.merge_parts(heads, parts, slot, &outputs, memory),
            }
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
