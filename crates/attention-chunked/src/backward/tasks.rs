//! The tasks of a call, and what they need: key/value heads, or chunks of rows and of keys apart.

use attention_core::{Gradients, Problem, Role};

use super::layout::Layout;
use super::{bias_parts, states};
use crate::config::{self, Sizes};
use crate::cut::{self, Rows};
use crate::engine::Engine;

/// What a task computes.
#[derive(Clone, Debug)]
pub(super) enum Task {
    /// Every gradient of a key/value head.
    Together { batch: usize, key_head: usize },
    /// dq of some rows.
    Queries(Rows),
    /// dk and dv of a chunk of keys.
    Keys { batch: usize, key_head: usize, first: usize },
}

impl Task {
    pub(super) fn batch(&self) -> usize {
        match self {
            Self::Together { batch, .. } | Self::Keys { batch, .. } => *batch,
            Self::Queries(rows) => rows.batch,
        }
    }
}

/// Whether one task a key/value head keeps the threads busy enough to be worth its two products less.
fn together(problem: &Problem, threads: usize) -> bool {
    let dims = problem.dims();
    let wanted = problem.gradients();
    let heads = dims.batch as u128 * dims.key_heads as u128;
    let both = wanted.contains(Gradients::QUERY)
        && (wanted.contains(Gradients::KEY) || wanted.contains(Gradients::VALUE));
    // Five products by the busiest thread, against seven spread evenly.
    let threads = threads.max(1) as u128;
    // Waking a thread takes longer than all of a small call.
    let is_small = dims.logits().iter().product::<usize>() <= cut::SMALL_LOGITS;
    both && (is_small || heads.div_ceil(threads) * 5 * threads <= 7 * heads)
}

/// The tasks of a call: found by their number, since a list would grow with the batch.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Tasks {
    together: bool,
    batch: usize,
    key_heads: usize,
    /// The most tasks of a batch row: for a key/value head if together, else for a chunk of its keys. Numbers
    /// go over the batch rows in steps of this; a batch row with fewer tasks leaves numbers without one.
    keys_per_row: usize,
    /// The most tasks of a batch row for rows of dq.
    queries_per_row: usize,
    /// How many threads have something to do.
    workers: usize,
}

impl Tasks {
    /// `keys` gives the keys of a chunk and `rows` the rows of one for a batch row.
    fn of(
        problem: &Problem,
        threads: usize,
        keys: impl Fn(usize) -> usize,
        rows: impl Fn(usize) -> usize,
    ) -> Self {
        let dims = problem.dims();
        // An empty gradient has no tasks, whatever the number of batch rows.
        let writes = |role: Role| problem.tensor(role).is_some_and(|desc| !desc.is_empty());
        let (dq, dkv) = (writes(Role::DQuery), writes(Role::DKey) || writes(Role::DValue));
        let together = together(problem, threads);
        let for_keys = |batch: usize| match (together, dkv) {
            (true, _) if dq || dkv => dims.key_heads,
            (false, true) => dims.key_length.div_ceil(keys(batch)).saturating_mul(dims.key_heads),
            _ => 0,
        };
        let for_queries = |batch: usize| {
            if together || !dq { 0 } else { cut::Cut::of(problem, batch, rows(batch)).count(problem, batch) }
        };
        let most =
            |count: &dyn Fn(usize) -> usize| cut::different_rows(problem).map(count).max().unwrap_or(0);
        let (keys_per_row, queries_per_row) = (most(&for_keys), most(&for_queries));
        let workers =
            cut::count_up_to(problem, threads, |batch| for_keys(batch).saturating_add(for_queries(batch)));
        let (batch, key_heads) = (dims.batch, dims.key_heads);
        Self { together, batch, key_heads, keys_per_row, queries_per_row, workers }
    }

    /// How many numbers there are.
    pub(super) fn count(&self) -> usize {
        self.batch * self.keys_per_row + self.batch * self.queries_per_row
    }

    /// The task of a number, if it has one.
    pub(super) fn at(
        &self,
        problem: &Problem,
        number: usize,
        keys: impl Fn(usize) -> usize,
        rows: impl Fn(usize) -> usize,
    ) -> Option<Task> {
        let for_keys = self.batch * self.keys_per_row;
        if let Some(number) = number.checked_sub(for_keys) {
            let (batch, index) = (number / self.queries_per_row, number % self.queries_per_row);
            return cut::Cut::of(problem, batch, rows(batch)).rows(problem, batch, index).map(Task::Queries);
        }
        let (batch, index) = (number / self.keys_per_row, number % self.keys_per_row);
        if self.together {
            return Some(Task::Together { batch, key_head: index });
        }
        let chunks = self.keys_per_row / self.key_heads;
        let (key_head, first) = (index / chunks, index % chunks * keys(batch));
        (first < problem.dims().key_length).then_some(Task::Keys { batch, key_head, first })
    }
}

/// The layouts of a problem's tasks, and what they take.
#[derive(Debug)]
pub(crate) struct Needs {
    pub(super) layout: Layout,
    pub(super) small: Layout,
    /// Bytes of a worker's scratch.
    pub(super) bytes: usize,
    /// Bytes of the states of all query rows.
    pub(super) states: usize,
    pub(super) tasks: Tasks,
    pub(super) workers: usize,
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
        let is_together = together(problem, threads);
        let is_small = |batch: usize| has_small && cut::is_small(problem, batch);
        let rows_of = |small: bool| {
            let queries = cut::different_rows(problem).filter(|&batch| is_small(batch) == small);
            queries.map(|batch| problem.query_len(batch)).max()
        };
        let layout_of = |small: bool| rows_of(small).unwrap_or(0).checked_mul(dims.group_size());
        let layout = Layout::of::<E>(problem, sizes, layout_of(false)?, is_together);
        let small = Layout::of::<Small>(problem, sizes, layout_of(true)?, is_together);
        // A bias without batch rows has a gradient of zeros all the same.
        let mut bytes = bias_parts::sums_bytes(problem)?;
        if rows_of(false).is_some() {
            bytes = bytes.max(layout.bytes::<E>()?);
        }
        if rows_of(true).is_some() {
            bytes = bytes.max(small.bytes::<Small>()?);
        }
        let states = states::bytes(problem)?;
        let keys = |batch: usize| if is_small(batch) { small.keys } else { layout.keys };
        let rows = |batch: usize| if is_small(batch) { small.rows } else { layout.rows };
        let tasks = Tasks::of(problem, threads, keys, rows);
        let bias = bias_parts::Parts::of(problem).map_or(0, |parts| parts.count());
        // Sums of rows take the place of logsumexps that have lost digits, also where sinks alone have a
        // gradient.
        let sums = usize::from(cut::has_rows(problem) && dims.key_heads > 0);
        let workers = threads.min(tasks.workers.max(bias).max(sums));
        Some(Self { layout, small, bytes, states, tasks, workers })
    }
}

impl config::Needs for Needs {
    fn workers(&self) -> usize {
        // The states of rows are computed without scratch, some hundred rows a task.
        self.workers.max(self.states >> 13)
    }

    fn scratch(&self) -> Option<usize> {
        self.bytes.checked_mul(self.workers)?.checked_add(self.states)
    }
}
