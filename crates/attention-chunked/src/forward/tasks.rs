//! The tasks of a call, and what they need: chunks of rows; for decoding, all keys of some
//! heads or a split of them.

use std::ops::Range;

use attention_core::Problem;

use super::decode::{self, DecodeLayout};
use super::layout::Layout;
use crate::config::{self, Sizes};
use crate::cut::{self, Rows};
use crate::engine::Engine;

/// What a task computes.
pub(super) enum Task {
    /// A chunk of rows.
    Chunk(Rows),
    /// Decoding of some heads, over all keys.
    Decode(DecodeHeads),
    /// Decoding of some heads over a split of the keys, into a slot for partial results.
    DecodeSplit { heads: DecodeHeads, keys: Range<usize>, slot: usize },
}

/// Neighbouring key/value heads of a batch row that are decoded together.
#[derive(Clone, Debug)]
pub(super) struct DecodeHeads {
    pub(super) batch: usize,
    pub(super) key_heads: Range<usize>,
}

impl DecodeHeads {
    /// Runs `work` on the rows of each head.
    pub(super) fn with_rows<R>(&self, problem: &Problem, work: impl FnOnce(&[Rows]) -> R) -> R {
        let group = problem.dims().group_size();
        let rows: [Rows; decode::MAX_HEADS] = std::array::from_fn(|index| {
            let key_head = self.key_heads.start + index;
            let heads = key_head * group..(key_head + 1) * group;
            Rows { batch: self.batch, key_head, heads, queries: 0..problem.query_len(self.batch) }
        });
        work(&rows[..self.key_heads.len()])
    }
}

/// The tasks of a call: found by their number, since a list would grow with the batch.
#[derive(Debug)]
pub(super) struct Tasks {
    /// The most tasks of a batch row, splits left out. Numbers go over the batch rows in steps of this; a
    /// batch row with fewer tasks leaves numbers without one.
    pub(super) per_row: usize,
    /// The splits, where heads are too few for the threads: some for each thread.
    pub(super) splits: Vec<(DecodeHeads, Range<usize>)>,
    /// Heads whose splits are combined afterwards, with their slots. The slot of a split is its index.
    pub(super) combines: Vec<(DecodeHeads, Range<usize>)>,
    pub(super) is_split: bool,
    /// Key/value heads that are decoded together.
    pub(super) decode_heads: usize,
    /// How many threads have something to do.
    pub(super) workers: usize,
}

/// Whether a batch row is decoded: its query rows per key/value head are too few to pack keys for.
fn decodes(problem: &Problem, batch: usize) -> bool {
    problem.query_len(batch).saturating_mul(problem.dims().group_size()) <= decode::MAX_ROWS
}

/// Key/value heads of all batch rows that are decoded.
fn decode_heads(problem: &Problem) -> usize {
    if !cut::has_rows(problem) {
        return 0;
    }
    let key_heads = problem.dims().key_heads;
    cut::count_up_to(problem, usize::MAX, |batch| {
        if decodes(problem, batch) && problem.query_len(batch) > 0 { key_heads } else { 0 }
    })
}

impl Tasks {
    /// With at most `limit(batch)` rows in a chunk, and `decode.heads` heads decoded together.
    fn of(problem: &Problem, threads: usize, decode: &DecodeLayout, limit: impl Fn(usize) -> usize) -> Self {
        let key_heads = problem.dims().key_heads;
        let all_heads = decode_heads(problem);
        // The bits are the same.
        let is_split = all_heads > 0 && threads > 1 && all_heads.div_ceil(decode.heads) < 4 * threads;
        let count = |batch: usize| match decodes(problem, batch) {
            _ if problem.query_len(batch) == 0 => 0,
            true if is_split => 0,
            true => key_heads.div_ceil(decode.heads),
            false => cut::Cut::of(problem, batch, limit(batch)).count(problem, batch),
        };
        let (mut splits, mut combines) = (Vec::new(), Vec::new());
        let is_split_of = |batch: usize| is_split && decodes(problem, batch) && problem.query_len(batch) > 0;
        for batch in (0..if is_split { problem.dims().batch } else { 0 }).filter(|&batch| is_split_of(batch))
        {
            let keys = problem.key_range_of_rows(batch, 0..problem.query_len(batch));
            for first in (0..key_heads).step_by(decode.heads) {
                let heads = DecodeHeads { batch, key_heads: first..key_heads.min(first + decode.heads) };
                let slot = splits.len();
                splits.extend(decode::splits(&keys).map(|keys| (heads.clone(), keys)));
                combines.push((heads, slot..splits.len()));
            }
        }
        let (mut per_row, mut workers) = (0, splits.len().max(combines.len()));
        if cut::has_rows(problem) {
            per_row = cut::different_rows(problem).map(count).max().unwrap_or(0);
            workers = workers.saturating_add(cut::count_up_to(problem, threads, count));
        }
        let workers = threads.min(workers);
        Self { per_row, splits, combines, is_split, decode_heads: decode.heads, workers }
    }

    /// How many numbers there are.
    pub(super) fn count(&self, problem: &Problem) -> usize {
        self.splits.len() + self.per_row * problem.dims().batch
    }

    /// The task of a number, if it has one.
    pub(super) fn at(
        &self,
        problem: &Problem,
        limit: impl Fn(usize) -> usize,
        number: usize,
    ) -> Option<Task> {
        // Under causal masking the last rows of a head see the most keys: begin with those.
        let Some(number) = (self.per_row * problem.dims().batch).checked_sub(number + 1) else {
            let slot = number - self.per_row * problem.dims().batch;
            let (heads, keys) = self.splits[slot].clone();
            return Some(Task::DecodeSplit { heads, keys, slot });
        };
        let (batch, index) = (number / self.per_row, number % self.per_row);
        if !decodes(problem, batch) {
            return cut::Cut::of(problem, batch, limit(batch)).rows(problem, batch, index).map(Task::Chunk);
        }
        let key_heads = problem.dims().key_heads;
        let first = index * self.decode_heads;
        if self.is_split || first >= key_heads || problem.query_len(batch) == 0 {
            return None;
        }
        Some(Task::Decode(DecodeHeads { batch, key_heads: first..key_heads.min(first + self.decode_heads) }))
    }
}

/// What a call takes.
#[derive(Debug)]
pub(crate) struct Needs {
    pub(super) layout: Layout,
    pub(super) small: Layout,
    pub(super) decode: DecodeLayout,
    /// Bytes of a worker's scratch.
    pub(super) bytes: usize,
    /// Bytes of a partial result.
    pub(super) slot: usize,
    pub(super) tasks: Tasks,
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
        let layout = Layout::of::<E>(problem, sizes, threads);
        let small = Layout::of::<Small>(problem, sizes, threads);
        // Which kinds of batch rows there are, by whether they are decoded and small.
        let (mut kinds, mut decode_rows) = ([[false; 2]; 2], 0);
        for batch in cut::different_rows(problem) {
            let (decode, small) = (decodes(problem, batch), has_small && cut::is_small(problem, batch));
            kinds[usize::from(decode)][usize::from(small)] = true;
            if decode {
                decode_rows = decode_rows.max(problem.query_len(batch) * dims.group_size());
            }
        }
        let splits = decode::splits(&(0..dims.key_length)).len().max(1);
        let enough = decode_heads(problem).saturating_mul(splits) / threads.saturating_mul(4).max(1);
        let decode = DecodeLayout::of(problem, decode_rows, enough);
        let (mut bytes, mut slot) = (0usize, 0usize);
        let [[many, many_small], [decode_large, decode_small]] = kinds;
        if many {
            bytes = bytes.max(layout.bytes::<E>()?);
        }
        if many_small {
            bytes = bytes.max(small.bytes::<Small>()?);
        }
        if decode_large {
            bytes = bytes.max(decode.bytes::<E::F>()?);
            slot = slot.max(decode.partial_bytes::<E::F>()?);
        }
        if decode_small {
            bytes = bytes.max(decode.bytes::<Small::F>()?);
            slot = slot.max(decode.partial_bytes::<Small::F>()?);
        }
        let limit =
            |batch: usize| if has_small && cut::is_small(problem, batch) { small.rows } else { layout.rows };
        let tasks = Tasks::of(problem, threads, &decode, limit);
        Some(Self { layout, small, decode, bytes, slot, tasks })
    }
}

impl config::Needs for Needs {
    fn workers(&self) -> usize {
        self.tasks.workers
    }

    fn scratch(&self) -> Option<usize> {
        let slots = self.slot.checked_mul(self.tasks.splits.len())?;
        self.bytes.checked_mul(self.tasks.workers)?.checked_add(slots)
    }
}
