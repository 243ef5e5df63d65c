//! The tasks of a call, and what they need: chunks of rows, and few rows with all keys or parts of them.

use std::ops::Range;

use attention_core::Problem;

use super::decode::{self, Few};
use super::layout::Layout;
use crate::config::{Plan, Sizes};
use crate::engine::Engine;
use crate::plan::{self, Rows};

/// What a task computes.
pub(super) enum Task {
    /// A chunk of rows.
    Chunk(Rows),
    /// All keys of few rows of some heads.
    Few(FewHeads),
    /// A part of the keys of few rows of some heads, into a slot for partial results.
    Part { heads: FewHeads, keys: Range<usize>, slot: usize },
}

/// Neighbouring key/value heads of a batch row with few query rows.
#[derive(Clone, Debug)]
pub(super) struct FewHeads {
    pub(super) batch: usize,
    pub(super) key_heads: Range<usize>,
}

impl FewHeads {
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
pub(super) struct Tasks {
    /// The most tasks of a batch row, parts left out. Numbers go over the batch rows in steps of this; a
    /// batch row with fewer tasks leaves numbers without one.
    pub(super) per_row: usize,
    /// Few rows in parts, where whole rows are too few for the threads: a few for each thread.
    pub(super) parts: Vec<(FewHeads, Range<usize>)>,
    /// Few rows whose parts are merged afterwards, with their slots. The slot of a part is its index.
    pub(super) merges: Vec<(FewHeads, Range<usize>)>,
    pub(super) in_parts: bool,
    /// Key/value heads with few rows that are worked on together.
    pub(super) few_heads: usize,
    /// How many threads have something to do.
    pub(super) workers: usize,
}

/// Whether the rows of a key/value head are few in a batch row.
fn is_few(problem: &Problem, batch: usize) -> bool {
    problem.query_len(batch).saturating_mul(problem.dims().group_size()) <= decode::FEW
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
                parts.extend(decode::parts(&keys).map(|keys| (heads.clone(), keys)));
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
    pub(super) fn count(&self, problem: &Problem) -> usize {
        self.parts.len() + self.per_row * problem.dims().batch
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
pub(super) struct Needs {
    pub(super) layout: Layout,
    pub(super) small: Layout,
    pub(super) few: Few,
    /// Bytes of a worker's scratch.
    pub(super) bytes: usize,
    /// Bytes of a partial result.
    pub(super) slot: usize,
    pub(super) tasks: Tasks,
}

impl Needs {
    /// `None` on overflow.
    pub(super) fn of<E: Engine, Small: Engine>(
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
        let parts = decode::parts(&(0..dims.key_length)).len().max(1);
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
