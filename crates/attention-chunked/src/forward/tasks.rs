//! The tasks of a call, and what they need: chunks of rows; for decoding, all keys of some
//! heads or a split of them.

use std::borrow::Cow;
use std::ops::Range;

use attention_core::{CallProblem, Problem};

use super::decode::{self, DecodeLayout};
use super::layout::Layout;
use crate::config::{self, Sizes};
use crate::cut::{self, Bounds, Cut, Rows};
use crate::engine::Engine;
use crate::listed::Listed;

/// What a task computes.
pub(super) enum Task {
    /// A chunk of rows.
    Chunk(Rows),
    /// Decoding of some heads, over all keys.
    Decode(DecodeHeads),
    /// Decoding of some heads over a split of the keys, into these bytes of the partial results.
    DecodeSplit { heads: DecodeHeads, keys: Range<usize>, to: Range<usize> },
}

/// Neighbouring key/value heads of a batch row that are decoded together.
#[derive(Clone, Debug)]
pub(super) struct DecodeHeads {
    pub(super) batch: usize,
    pub(super) key_heads: Range<usize>,
}

impl DecodeHeads {
    /// Runs `work` on the rows of each head.
    pub(super) fn with_rows<R>(&self, problem: &CallProblem<'_>, work: impl FnOnce(&[Rows]) -> R) -> R {
        let group = problem.dims().group_size();
        let rows: [Rows; decode::MAX_HEADS] = std::array::from_fn(|index| {
            let key_head = self.key_heads.start + index;
            let heads = key_head * group..(key_head + 1) * group;
            Rows { batch: self.batch, key_head, heads, queries: 0..problem.query_len(self.batch) }
        });
        work(&rows[..self.key_heads.len()])
    }
}

/// Heads that are decoded in splits, which are combined afterwards.
#[derive(Clone, Debug)]
pub(super) struct SplitHeads {
    pub(super) heads: DecodeHeads,
    keys: Range<usize>,
    /// The splits, numbered over all heads.
    numbers: Range<usize>,
    /// Bytes of a partial result, and where the first is.
    pub(super) slot: usize,
    first: usize,
}

impl SplitHeads {
    /// The bytes of all partial results.
    pub(super) fn slots(&self) -> Range<usize> {
        self.first..self.first + self.numbers.len() * self.slot
    }
}

/// The tasks of a call, with their layouts: found by their number, since a list would grow with the batch.
#[derive(Clone, Debug)]
pub(super) struct Tasks {
    pub(super) layout: Layout,
    pub(super) small: Layout,
    pub(super) decode: DecodeLayout,
    /// The most tasks of a dense batch row, splits left out. Numbers go over the batch rows in steps of this;
    /// a batch row with fewer tasks leaves numbers without one.
    per_row: usize,
    /// The same tasks of packed sequences, which may differ by far.
    listed: Listed,
    /// Where the heads that are decoded are too few for the threads, all of them: some for each thread.
    pub(super) split: Vec<SplitHeads>,
    /// Whether batch rows with tasks are small.
    pub(super) has_small_rows: bool,
    /// Whether others are not.
    pub(super) has_large_rows: bool,
    /// How many threads have something to do.
    pub(super) workers: usize,
}

/// Whether a batch row of this many query rows is decoded: those of a key/value head are too few to pack keys
/// for.
fn decodes(problem: &Problem, queries: usize) -> bool {
    queries.saturating_mul(problem.dims().group_size()) <= decode::MAX_ROWS
}

/// The most splits of a batch row that is decoded, of at most `keys` keys and `queries` query rows, whatever
/// its offset.
fn most_splits(problem: &Problem, queries: usize, keys: usize) -> usize {
    let (low, high) = CallProblem::at_bounds(problem).sequence(0).reach();
    let reach = low.zip(high).map(|(low, high)| high - low + queries as i128 - 1);
    decode::most_splits(reach.map_or(keys, |reach| reach.clamp(0, keys as i128) as usize))
}

/// Whether `decoded` batch rows, `heads` key/value heads at a time, are too few tasks for the threads. The
/// bits are the same.
fn is_split(problem: &Problem, decoded: usize, heads: usize, threads: usize) -> bool {
    threads > 1
        && decoded.saturating_mul(problem.dims().key_heads).div_ceil(heads) < threads.saturating_mul(4)
}

/// Bytes of a partial result; `None` on overflow.
fn slot<E: Engine, Small: Engine>(decode: &DecodeLayout, is_small: bool) -> Option<usize> {
    if is_small { decode.partial_bytes::<Small::F>() } else { decode.partial_bytes::<E::F>() }
}

/// What the batch rows of a call have.
#[derive(Clone, Copy, Debug, Default)]
struct Totals {
    /// Query rows of a head, over all batch rows.
    queries: usize,
    most_queries: usize,
    /// Batch rows with query rows that are decoded.
    decoded: usize,
    most_decoded_queries: usize,
    most_decoded_keys: usize,
}

impl Totals {
    fn of(problem: &CallProblem<'_>) -> Self {
        let mut totals = Self::default();
        let (different, alike) = cut::different_rows(problem);
        for batch in different {
            let queries = problem.query_len(batch);
            totals.queries = totals.queries.saturating_add(queries.saturating_mul(alike));
            totals.most_queries = totals.most_queries.max(queries);
            if decodes(problem, queries) {
                totals.decoded += alike;
                totals.most_decoded_queries = totals.most_decoded_queries.max(queries);
                totals.most_decoded_keys = totals.most_decoded_keys.max(problem.key_value_len(batch));
            }
        }
        totals
    }
}

impl Tasks {
    fn none(needs: &Needs) -> Self {
        let Needs { layout, small, decode, .. } = *needs;
        Self {
            layout,
            small,
            decode,
            per_row: 0,
            listed: Listed::default(),
            split: Vec::new(),
            has_small_rows: false,
            has_large_rows: false,
            workers: 0,
        }
    }

    /// Inside of what is needed at most.
    fn of<E: Engine, Small: Engine>(problem: &CallProblem<'_>, needs: &Needs) -> Self {
        let mut tasks = Self::none(needs);
        if !cut::has_rows(problem) {
            return tasks;
        }
        let (threads, sizes, key_heads) = (needs.threads, &needs.sizes, problem.dims().key_heads);
        let totals = Totals::of(problem);
        let Totals { queries, most_queries, decoded, .. } = totals;
        if !decodes(problem, most_queries) {
            tasks.layout = needs.layout.for_queries::<E>(problem, sizes, threads, queries, most_queries);
            tasks.small = needs.small.for_queries::<Small>(problem, sizes, threads, queries, most_queries);
        }
        tasks.decode = DecodeLayout::of(problem, totals.most_decoded_queries, decoded, threads);
        let heads = tasks.decode.heads;
        let Totals { most_decoded_queries, most_decoded_keys, .. } = totals;
        let is_split = is_split(problem, decoded, heads, threads)
            && most_splits(problem, most_decoded_queries, most_decoded_keys) > 1;
        let is_small = |batch: usize| needs.has_small && cut::is_small(problem, batch);
        if is_split {
            tasks.split.reserve_exact(decoded * key_heads.div_ceil(heads));
            let (mut splits, mut bytes) = (0, 0);
            for batch in problem.sequences_with_queries(0..problem.dims().batch) {
                let queries = problem.query_len(batch);
                if !decodes(problem, queries) {
                    continue;
                }
                let keys = problem.key_range_of_rows(batch, 0..queries);
                let slot = slot::<E, Small>(&tasks.decode, is_small(batch)).unwrap_or_else(|| {
                    unreachable!("a slot is no larger than the largest, whose size does not overflow")
                });
                for first in (0..key_heads).step_by(heads) {
                    let heads = DecodeHeads { batch, key_heads: first..key_heads.min(first + heads) };
                    let numbers = splits..splits + decode::splits(&keys).len();
                    let split = SplitHeads { heads, keys: keys.clone(), numbers, slot, first: bytes };
                    (splits, bytes) = (split.numbers.end, split.slots().end);
                    tasks.split.push(split);
                }
            }
        }
        let mut all = 0usize;
        let (different, alike) = cut::different_rows(problem);
        for batch in different {
            let is_small = is_small(batch);
            let count = tasks.count_of_row(problem, batch, is_small);
            all = all.saturating_add(count.saturating_mul(alike));
            if cut::is_packed(problem) {
                tasks.listed.push(problem, batch, count, problem.query_len(batch));
            } else {
                tasks.per_row = tasks.per_row.max(count);
            }
            tasks.has_small_rows |= is_small;
            tasks.has_large_rows |= !is_small;
        }
        tasks.listed.sort();
        tasks.workers = threads.min(all.saturating_add(tasks.splits().max(tasks.split.len())));
        tasks
    }

    /// How many tasks a batch row has, splits left out.
    fn count_of_row(&self, problem: &CallProblem<'_>, batch: usize, is_small: bool) -> usize {
        match problem.query_len(batch) {
            0 => 0,
            queries if !decodes(problem, queries) => self.cut(problem, queries, is_small).count(),
            _ if self.split.is_empty() => problem.dims().key_heads.div_ceil(self.decode.heads),
            _ => 0,
        }
    }

    /// The chunks of a batch row.
    fn cut(&self, problem: &Problem, queries: usize, is_small: bool) -> Cut {
        Cut::of(problem, queries, if is_small { self.small.rows } else { self.layout.rows })
    }

    /// How many splits there are.
    fn splits(&self) -> usize {
        self.split.last().map_or(0, |last| last.numbers.end)
    }

    /// Bytes of all partial results.
    pub(super) fn slots(&self) -> usize {
        self.split.last().map_or(0, |last| last.slots().end)
    }

    /// How many numbers there are for tasks that are no splits.
    fn whole(&self, problem: &Problem) -> usize {
        self.listed.count() + self.per_row * problem.dims().batch
    }

    /// How many numbers there are.
    pub(super) fn count(&self, problem: &Problem) -> usize {
        self.splits() + self.whole(problem)
    }

    /// The task of a number, if it has one.
    pub(super) fn at(
        &self,
        problem: &CallProblem<'_>,
        is_small: impl Fn(usize) -> bool,
        number: usize,
    ) -> Option<Task> {
        // Under causal masking the last rows of a head see the most keys: begin with those.
        let Some(from_last) = self.whole(problem).checked_sub(number + 1) else {
            let number = number - self.whole(problem);
            let split = &self.split[self.split.partition_point(|split| split.numbers.end <= number)];
            let index = number - split.numbers.start;
            let first = split.first + index * split.slot;
            let (heads, to) = (split.heads.clone(), first..first + split.slot);
            return decode::splits(&split.keys).nth(index).map(|keys| Task::DecodeSplit { heads, keys, to });
        };
        let (batch, index) = match self.listed.at(number) {
            Some((batch, index, count)) => (batch, count - 1 - index),
            None => (from_last / self.per_row, from_last % self.per_row),
        };
        let queries = problem.query_len(batch);
        if !decodes(problem, queries) {
            return self.cut(problem, queries, is_small(batch)).rows(batch, index).map(Task::Chunk);
        }
        let key_heads = problem.dims().key_heads;
        let first = index * self.decode.heads;
        if !self.split.is_empty() || first >= key_heads || queries == 0 {
            return None;
        }
        Some(Task::Decode(DecodeHeads { batch, key_heads: first..key_heads.min(first + self.decode.heads) }))
    }
}

/// Which batch rows calls of a problem may have: some that are not small, and small ones.
#[derive(Clone, Copy, Debug, Default)]
struct Kinds {
    large: bool,
    small: bool,
}

impl Kinds {
    fn of(bounds: Option<Bounds>, has_small: bool) -> Self {
        let Some(bounds) = bounds else { return Self::default() };
        Self { large: !has_small || bounds.may_be_large(), small: has_small && bounds.may_be_small() }
    }
}

/// What calls of a problem take at most, and their tasks where they all have the same.
#[derive(Debug)]
pub(crate) struct Needs {
    layout: Layout,
    small: Layout,
    decode: DecodeLayout,
    /// Of batch rows that are decoded.
    decoded: Kinds,
    has_small: bool,
    sizes: Sizes,
    threads: usize,
    /// Bytes of a worker's scratch.
    pub(super) bytes: usize,
    /// Bytes of all partial results.
    pub(super) slots: usize,
    /// How many workers have scratch.
    workers: usize,
    tasks: Option<Tasks>,
}

impl Needs {
    /// `None` on overflow.
    pub(crate) fn of<E: Engine, Small: Engine>(
        problem: &Problem,
        has_small: bool,
        sizes: &Sizes,
        threads: usize,
    ) -> Option<Self> {
        let dims = problem.dims();
        let (bounds, group) = (Bounds::of(problem), dims.group_size().max(1));
        let most_decoded = decode::MAX_ROWS / group;
        let (decoded, chunked) =
            (bounds.with_queries(0, most_decoded), bounds.with_queries(most_decoded + 1, usize::MAX));
        let all_queries = cut::most_query_rows(problem);
        let most = dims.query_length;
        let layout = Layout::of::<E>(problem, sizes);
        let layout = layout.for_queries::<E>(problem, sizes, threads, all_queries, most);
        let small = Layout::of::<Small>(problem, sizes);
        let small = small.for_queries::<Small>(problem, sizes, threads, all_queries, most);
        let most_decoded = decoded.map_or(0, |decoded| decoded.most_queries());
        let decode = DecodeLayout::of(problem, most_decoded, dims.batch, threads);
        let (decoded, chunked) = (Kinds::of(decoded, has_small), Kinds::of(chunked, has_small));
        let mut bytes = 0usize;
        if chunked.large {
            bytes = bytes.max(layout.bytes::<E>()?);
        }
        if chunked.small {
            bytes = bytes.max(small.bytes::<Small>()?);
        }
        if decoded.large {
            bytes = bytes.max(decode.bytes::<E::F>()?);
        }
        if decoded.small {
            bytes = bytes.max(decode.bytes::<Small::F>()?);
        }
        let (sizes, tasks) = (*sizes, None);
        let mut needs = Self {
            layout,
            small,
            decode,
            decoded,
            has_small,
            sizes,
            threads,
            bytes,
            slots: 0,
            workers: 0,
            tasks,
        };
        for is_small in [false, true] {
            slot::<E, Small>(&decode, is_small)?;
        }
        if problem.rows_vary() {
            needs.slots = needs.most_slots::<E, Small>(problem, most_decoded)?;
            needs.workers = needs.most_workers::<E, Small>(problem, chunked);
        } else {
            let tasks = Tasks::of::<E, Small>(&CallProblem::at_bounds(problem), &needs);
            needs.slots = tasks.slots();
            needs.workers = tasks.workers;
            needs.tasks = Some(tasks);
        }
        Some(needs)
    }

    /// The tasks of a call, inside of what is needed at most.
    pub(super) fn tasks<E: Engine, Small: Engine>(&self, problem: &CallProblem<'_>) -> Cow<'_, Tasks> {
        match &self.tasks {
            Some(tasks) => Cow::Borrowed(tasks),
            None => Cow::Owned(Tasks::of::<E, Small>(problem, self)),
        }
    }

    /// Bytes of the most partial results that a call leaves, whose batch rows have at most `queries` query
    /// rows where they are decoded; `None` on overflow.
    fn most_slots<E: Engine, Small: Engine>(&self, problem: &Problem, queries: usize) -> Option<usize> {
        let (dims, threads) = (problem.dims(), self.threads);
        let splits = most_splits(problem, queries, dims.key_length);
        if threads <= 1 || splits <= 1 || queries == 0 || !cut::has_rows(problem) {
            return Some(0);
        }
        let fewest = if cut::query_rows_vary(problem) { 1 } else { dims.batch };
        let mut most = 0usize;
        for heads in 1..=self.decode.heads {
            // More batch rows are enough for the threads without splits, or have more heads at a time.
            let groups = threads.saturating_mul(4) - 1;
            let mut decoded = dims.batch.min(groups.saturating_mul(heads) / dims.key_heads);
            if heads < self.decode.heads {
                decoded = decoded.min(DecodeLayout::most_decoded(problem, heads, threads));
            }
            let decode = DecodeLayout::of(problem, queries, decoded, threads);
            if decoded < fewest || !is_split(problem, decoded, decode.heads, threads) {
                continue;
            }
            let groups = decoded * dims.key_heads.div_ceil(decode.heads);
            let bytes = |is_small: bool, splits: usize| {
                groups.checked_mul(splits)?.checked_mul(slot::<E, Small>(&decode, is_small)?)
            };
            if self.decoded.large {
                most = most.max(bytes(false, splits)?);
            }
            if self.decoded.small {
                most = most.max(bytes(true, splits.min(decode::most_splits(cut::SMALL_LOGITS)))?);
            }
        }
        Some(most)
    }

    /// How many threads have something to do in the calls with the most tasks, which have chunks of these
    /// kinds.
    fn most_workers<E: Engine, Small: Engine>(&self, problem: &Problem, chunked: Kinds) -> usize {
        let (dims, threads, sizes) = (problem.dims(), self.threads, &self.sizes);
        if !cut::has_rows(problem) {
            return 0;
        }
        // A call with fewer rows than all has smaller chunks.
        let queries = if cut::query_rows_vary(problem) { 0 } else { cut::most_query_rows(problem) };
        let most = dims.query_length;
        let count = |rows: usize| Cut::of(problem, most, rows).count();
        let mut per_row = 0;
        if chunked.large {
            let layout = self.layout.for_queries::<E>(problem, sizes, threads, queries, most);
            per_row = per_row.max(count(layout.rows));
        }
        if chunked.small {
            let small = self.small.for_queries::<Small>(problem, sizes, threads, queries, most);
            per_row = per_row.max(count(small.rows));
        }
        if self.decoded.large || self.decoded.small {
            let splits = if threads > 1 { decode::most_splits(dims.key_length).max(1) } else { 1 };
            per_row = per_row.max(dims.key_heads.saturating_mul(splits));
        }
        threads.min(dims.batch.saturating_mul(per_row))
    }
}

impl config::Needs for Needs {
    fn scratch(&self) -> Option<usize> {
        self.bytes.checked_mul(self.workers)?.checked_add(self.slots)
    }
}
