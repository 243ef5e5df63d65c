//! The tasks of a call, and what they need: key/value heads, or chunks of rows and of keys apart.

use attention_core::{CallProblem, Gradients, Problem, Role};

use super::layout::Layout;
use super::{bias_parts, states};
use crate::config::{self, Sizes};
use crate::cut::{self, Bounds, Cut, Rows};
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

/// The tasks of every call with dense queries: found by their number, since a list would grow with the batch.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Tasks {
    pub(super) together: bool,
    batch: usize,
    key_heads: usize,
    /// The most tasks of a batch row: for a key/value head if together, else for a chunk of its keys. Numbers
    /// go over the batch rows in steps of this; a batch row with fewer tasks leaves numbers without one.
    keys_per_row: usize,
    /// The most tasks of a batch row for rows of dq.
    queries_per_row: usize,
    /// Whether there are gradients of queries to write, and of keys or values.
    pub(super) writes_queries: bool,
    pub(super) writes_keys: bool,
}

impl Tasks {
    /// For batch rows of these kinds, each with the layout of its chunks, of at most `queries` query rows.
    fn of(
        problem: &Problem,
        threads: usize,
        queries: usize,
        kinds: impl Iterator<Item = Layout> + Clone,
    ) -> Self {
        let dims = problem.dims();
        // An empty gradient has no tasks, whatever the number of batch rows.
        let writes = |role: Role| problem.tensor(role).is_some_and(|desc| !desc.is_empty());
        let (dq, dkv) = (writes(Role::DQuery), writes(Role::DKey) || writes(Role::DValue));
        let together = together(problem, threads);
        let for_keys = |layout: Layout| match (together, dkv) {
            (true, _) if dq || dkv => dims.key_heads,
            (false, true) => dims.key_length.div_ceil(layout.keys).saturating_mul(dims.key_heads),
            _ => 0,
        };
        let for_queries = |layout: Layout| {
            if together || !dq { 0 } else { Cut::of(problem, queries, layout.rows).count() }
        };
        Self {
            together,
            batch: dims.batch,
            key_heads: dims.key_heads,
            keys_per_row: kinds.clone().map(for_keys).max().unwrap_or(0),
            queries_per_row: kinds.map(for_queries).max().unwrap_or(0),
            writes_queries: dq,
            writes_keys: dkv,
        }
    }

    /// How many numbers there are.
    pub(super) fn count(&self) -> usize {
        self.batch * self.keys_per_row + self.batch * self.queries_per_row
    }

    /// The task of a number, if it has one. `layout` gives the layout of a batch row's chunks.
    pub(super) fn at(
        &self,
        problem: &CallProblem<'_>,
        number: usize,
        layout: impl Fn(usize) -> Layout,
    ) -> Option<Task> {
        let for_keys = self.batch * self.keys_per_row;
        if let Some(number) = number.checked_sub(for_keys) {
            let (batch, index) = (number / self.queries_per_row, number % self.queries_per_row);
            let cut = Cut::of(problem, problem.query_len(batch), layout(batch).rows);
            return cut.rows(batch, index).map(Task::Queries);
        }
        let (batch, index) = (number / self.keys_per_row, number % self.keys_per_row);
        if self.together {
            return Some(Task::Together { batch, key_head: index });
        }
        let chunks = self.keys_per_row / self.key_heads;
        let (key_head, first) = (index / chunks, index % chunks * layout(batch).keys);
        (first < problem.dims().key_length).then_some(Task::Keys { batch, key_head, first })
    }
}

/// The layouts of a problem's tasks, and what its calls take at most. Nothing of it depends on the numbers of
/// a call: gradients of padding are written too, and tasks that a call does not have are passed over.
#[derive(Debug)]
pub(crate) struct Needs {
    pub(super) layout: Layout,
    pub(super) small: Layout,
    /// Bytes of a worker's scratch.
    pub(super) bytes: usize,
    /// Bytes of the states of all query rows.
    pub(super) states: usize,
    pub(super) tasks: Tasks,
    /// How many workers have scratch.
    workers: usize,
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
        let (bounds, is_together) = (Bounds::of(problem), together(problem, threads));
        let has_batch = dims.batch > 0;
        let is_large = has_batch && (!has_small || bounds.may_be_large());
        let is_small = has_batch && has_small && bounds.may_be_small();
        let rows = |may_be: bool, queries: usize| {
            if may_be { queries.checked_mul(dims.group_size()) } else { Some(0) }
        };
        let large_rows = rows(is_large, bounds.most_queries())?;
        let small_rows = rows(is_small, bounds.most_small_queries())?;
        let layout = Layout::of::<E>(problem, sizes, large_rows, is_together);
        let small = Layout::of::<Small>(problem, sizes, small_rows, is_together);
        // A bias without batch rows has a gradient of zeros all the same.
        let mut bytes = bias_parts::sums_bytes(problem)?;
        if is_large {
            bytes = bytes.max(layout.bytes::<E>()?);
        }
        if is_small {
            bytes = bytes.max(small.bytes::<Small>()?);
        }
        let states = states::bytes(problem)?;
        let kinds = is_large.then_some(layout).into_iter().chain(is_small.then_some(small));
        let tasks = Tasks::of(problem, threads, bounds.most_queries(), kinds);
        let count = dims.batch.saturating_mul(tasks.keys_per_row.saturating_add(tasks.queries_per_row));
        let bias = bias_parts::Parts::of(problem).map_or(0, |parts| parts.count());
        // Sums of rows take the place of logsumexps that have lost digits, also where sinks alone have a
        // gradient.
        let sums = usize::from(cut::has_rows(problem) && dims.key_heads > 0);
        let workers = threads.min(count.max(bias).max(sums));
        Some(Self { layout, small, bytes, states, tasks, workers })
    }

    /// How many threads have something to do.
    pub(super) fn workers(&self) -> usize {
        // The states of rows are computed without scratch, some hundred rows a task.
        self.workers.max(self.states >> 13)
    }
}

impl config::Needs for Needs {
    fn scratch(&self) -> Option<usize> {
        self.bytes.checked_mul(self.workers)?.checked_add(self.states)
    }
}
