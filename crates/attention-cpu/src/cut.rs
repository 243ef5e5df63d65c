//! How a problem is cut into tasks and blocks, and what memory that takes.
//!
//! Cuts depend on the lengths of the batch row or sequence at hand and on nothing else: not on threads, not
//! on other sequences, not on padding, not on where rows lie. So neither do the results, to the bit.

use std::ops::Range;

use attention_core::{Alignment, CallProblem, Problem, Role, RowLayout};

use crate::logits::Rows;
use crate::operand::Operand;
use crate::packed::PANEL;
use crate::sequences::{keys_vary, queries_vary};

/// Query rows that share one packing of keys and values. Packing costs about as much as 30 rows of products,
/// and fewer, larger tasks leave threads idle.
const TASK_ROWS: usize = 512;

/// Logits of a block: 1 MiB in f32, half of a typical second-level cache.
const BLOCK_LOGITS: usize = 1 << 18;

/// Rows of a block: matrix products reach full speed from 48 rows on.
const BLOCK_ROWS: Range<usize> = 48..128;

/// Logits of a head up to which a batch row is small: 64 queries against 64 keys, where calls and conversions
/// cost more than arithmetic.
const SMALL_LOGITS: usize = 1 << 12;

/// Whether a batch row is computed the way of [`Operand::Small`].
pub(crate) fn is_small<E: Operand>(problem: &CallProblem<'_>, batch: usize) -> bool {
    E::HAS_SMALL && are_few_logits(problem.query_len(batch), problem.key_value_len(batch))
}

fn are_few_logits(queries: usize, keys: usize) -> bool {
    queries.saturating_mul(keys) <= SMALL_LOGITS
}

/// Whether so few query rows share a key/value head that reading keys and values as they lie beats packing
/// them: decoding. Packing reads and writes them once more, and products of few rows are bound by memory.
pub(crate) fn few_rows(rows: usize) -> bool {
    rows <= FEW_ROWS
}

/// The most rows that are few.
pub(crate) const FEW_ROWS: usize = 8;

/// A task: query rows of some heads that share a key/value head.
#[derive(Clone, Debug)]
pub(crate) struct Task {
    pub(crate) key_head: usize,
    pub(crate) rows: Rows,
    /// The keys that any of the rows can see.
    pub(crate) keys: Range<usize>,
}

/// How the query rows of one batch row are cut into tasks: so many heads times so many queries.
#[derive(Clone, Copy, Debug)]
pub(crate) struct TaskSize {
    pub(crate) heads: usize,
    pub(crate) queries: usize,
}

impl TaskSize {
    /// For `queries` real rows a head and groups of `group` heads.
    pub(crate) fn of(queries: usize, group: usize) -> Self {
        let queries = queries.clamp(1, TASK_ROWS);
        Self { heads: (TASK_ROWS / queries).clamp(1, group.max(1)), queries }
    }

    fn rows(self) -> usize {
        self.heads * self.queries
    }
}

/// Whether there are logits at all: sizes of a problem without any say nothing about time.
pub(crate) fn has_logits(problem: &Problem) -> bool {
    !problem.dims().logits().contains(&0)
}

/// Real queries and keys that scratch is sized by: the most of some batch rows of the calls of a problem.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct SizedRows {
    pub(crate) queries: usize,
    pub(crate) keys: usize,
    /// Whether they are small batch rows.
    pub(crate) are_small: bool,
}

/// What scratch is sized by: each batch row of each call has at most the queries and keys of one of its kind.
/// A single one where calls give no lengths, as all batch rows have the same.
pub(crate) fn sized_rows<E: Operand>(problem: &Problem) -> impl Iterator<Item = SizedRows> {
    let bounds = CallProblem::at_bounds(problem);
    let (queries, keys) = (bounds.query_len(0), bounds.key_value_len(0));
    let are_small = E::HAS_SMALL && are_few_logits(queries, keys);
    let has_others = E::HAS_SMALL && !are_small;
    // The small batch rows beside large ones: the fewer queries, the more keys.
    let mut next = if queries_vary(problem) { 1 } else { queries };
    let least_keys = if keys_vary(problem) { 0 } else { keys };
    let small = std::iter::from_fn(move || {
        if !has_others || next > queries {
            return None;
        }
        let most_keys = SMALL_LOGITS / next;
        // All numbers of queries for which it is as many keys.
        let last = SMALL_LOGITS.checked_div(most_keys).map_or(queries, |last| last.min(queries));
        next = last + 1;
        let keys = keys.min(most_keys);
        (keys >= least_keys).then_some(SizedRows { queries: last, keys, are_small: true })
    });
    std::iter::once(SizedRows { queries, keys, are_small }).chain(small)
}

impl SizedRows {
    /// The most queries of a head in a task of the forward pass.
    pub(crate) fn task_queries(&self, problem: &Problem) -> usize {
        TaskSize::of(self.queries, problem.dims().group_size()).queries
    }

    /// The most rows of a task of the forward pass.
    pub(crate) fn task_rows(&self, problem: &Problem) -> usize {
        let group = problem.dims().group_size();
        if queries_vary(problem) {
            // Fewer queries may fill a task better: its heads are a whole number.
            self.queries.saturating_mul(group).min(TASK_ROWS)
        } else {
            TaskSize::of(self.queries, group).rows()
        }
    }

    /// The most keys that `queries` neighbouring rows of a head see.
    pub(crate) fn keys_of(&self, problem: &Problem, queries: usize) -> usize {
        if queries == 0 {
            return 0;
        }
        let all = match problem.alignment() {
            // Shorter rows see no more than full ones.
            Alignment::TopLeft | Alignment::BottomRight => {
                let rows = 0..problem.dims().query_length;
                CallProblem::at_bounds(problem).key_range_of_rows(0, rows).len()
            }
            // An offset may bring rows anywhere among the keys.
            Alignment::Offset(_) | Alignment::Offsets(_) => self.keys,
        };
        let window = problem.window();
        let right = if problem.causal() { Some(0) } else { window.right };
        // A window of both sides moves with the rows. Causal rows alone see more the later they are.
        let moving = (window.left.zip(right))
            .map_or(usize::MAX, |(left, right)| left.saturating_add(right).saturating_add(queries));
        all.min(self.keys).min(moving)
    }
}

/// How many tasks the forward calls of a problem have at most, or `most` if there are more.
pub(crate) fn most_tasks(problem: &Problem, most: usize) -> usize {
    if !has_rows(problem) {
        return 0;
    }
    let bounds = CallProblem::at_bounds(problem);
    let tasks = tasks_of(problem, bounds.query_len(0)).saturating_mul(problem.dims().batch).min(most);
    match problem.query_layout() {
        // Every task has a row of its own.
        RowLayout::Packed => problem.tensor(Role::Query).map_or(0, |query| {
            let shape = query.shape();
            tasks.min(shape[1].saturating_mul(shape[2]))
        }),
        _ => tasks,
    }
}

/// How many tasks a forward call has, or `most` if there are more.
pub(crate) fn task_count(problem: &CallProblem<'_>, most: usize) -> usize {
    if !has_rows(problem) {
        return 0;
    }
    let batch = problem.dims().batch;
    if !queries_vary(problem) {
        return tasks_of(problem, problem.query_len(0)).saturating_mul(batch).min(most);
    }
    let mut count = 0usize;
    for batch in problem.sequences_with_queries(0..batch) {
        count = count.saturating_add(tasks_of(problem, problem.query_len(batch)));
        if count >= most {
            return most;
        }
    }
    count
}

/// The tasks of a sequence of so many queries.
fn tasks_of(problem: &Problem, queries: usize) -> usize {
    let dims = problem.dims();
    let size = TaskSize::of(queries, dims.group_size());
    let heads = dims.group_size().div_ceil(size.heads).saturating_mul(dims.key_heads);
    heads.saturating_mul(queries.div_ceil(size.queries))
}

/// Whether there are query rows at all.
pub(crate) fn has_rows(problem: &Problem) -> bool {
    let dims = problem.dims();
    dims.batch > 0 && dims.query_length > 0 && dims.query_heads > 0
}

/// The blocks of a task, each with the keys it can see. `matrices` of the size of a block's logits are in use
/// at a time.
pub(crate) fn blocks(
    problem: &CallProblem<'_>,
    rows: &Rows,
    keys: &Range<usize>,
    matrices: usize,
) -> impl Iterator<Item = (Rows, Range<usize>)> + use<> {
    let limit = block_rows(keys.len(), matrices);
    let queries = rows.queries.len().clamp(1, limit);
    let heads = (limit / queries).clamp(1, rows.heads.len().max(1));
    let Rows { batch, heads: all_heads, queries: all_queries } = rows.clone();
    let sequence = problem.sequence(batch);
    all_heads.clone().step_by(heads).flat_map(move |head| {
        let heads = head..(head + heads).min(all_heads.end);
        let all_queries = all_queries.clone();
        all_queries.clone().step_by(queries).map(move |query| {
            let queries = query..(query + queries).min(all_queries.end);
            let keys = sequence.key_range_of_rows(queries.clone());
            (Rows { batch, heads: heads.clone(), queries }, keys)
        })
    })
}

/// The most rows of a block over this many keys.
pub(crate) fn block_rows(keys: usize, matrices: usize) -> usize {
    let rows = BLOCK_LOGITS / (keys.max(1) * matrices.max(1));
    (rows / 16 * 16).clamp(BLOCK_ROWS.start, BLOCK_ROWS.end)
}

/// The most elements that the logits of a block of at most `rows` rows take over up to `keys` keys,
/// `matrices` in use at a time; `None` on overflow.
pub(crate) fn block_elements(rows: usize, keys: usize, matrices: usize) -> Option<usize> {
    // Blocks have fewer rows the more keys there are, in steps of 16: the most at the last number of keys of
    // a step.
    let mut most = rows.min(block_rows(keys, matrices)).checked_mul(logits_stride(keys)?)?;
    for step in (BLOCK_ROWS.start..=BLOCK_ROWS.end).step_by(16) {
        let last = keys.min(BLOCK_LOGITS / (step * matrices.max(1)));
        most = most.max(rows.min(block_rows(last, matrices)) * logits_stride(last)?);
    }
    Some(most)
}

/// The distance between rows of logits over this many keys. A multiple of a panel, and a bit more: rows a
/// power of two apart would share the sets of the cache. `None` on overflow.
pub(crate) fn logits_stride(keys: usize) -> Option<usize> {
    // A block may begin inside a panel of its task.
    keys.checked_add(PANEL)?.checked_next_multiple_of(PANEL)?.checked_add(16)
}
