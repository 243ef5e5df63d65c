//! The tasks of a call with packed queries, whose sequences may differ by any factor.

use attention_core::{CallProblem, RowLayout};

use super::layout::Layout;
use super::tasks::{Task, Tasks};
use crate::cut::{self, Cut};
use crate::listed::Listed;

/// The tasks of the sequences of a call: each together or apart, whichever leaves no thread with more than
/// its share; the bits are the same.
#[derive(Debug)]
pub(super) struct PackedTasks {
    /// Logits of a head up to which a sequence is computed together; `None` where none is.
    most_together: Option<u128>,
    writes_queries: bool,
    writes_keys: bool,
    listed: Listed,
}

impl PackedTasks {
    /// For `threads` threads, where the problem was planned with these tasks. `layout` gives the layout of a
    /// sequence's chunks.
    pub(super) fn of(
        planned: &Tasks,
        problem: &CallProblem<'_>,
        threads: usize,
        layout: impl Fn(usize) -> Layout,
    ) -> Self {
        let dims = problem.dims();
        let Tasks { writes_queries, writes_keys, .. } = *planned;
        let mut tasks = Self { most_together: None, writes_queries, writes_keys, listed: Listed::default() };
        // Empty gradients have no tasks, whatever the number of sequences.
        let batches = 0..if writes_queries || writes_keys { dims.batch } else { 0 };
        if planned.together {
            let all = problem.sequences_with_queries(batches.clone());
            let total = all.fold(0u128, |total, batch| total.saturating_add(logits(problem, batch)));
            let share = total.saturating_mul(dims.key_heads as u128) / threads.max(1) as u128;
            // Waking a thread takes longer than all of a small call.
            let is_small = total.saturating_mul(dims.query_heads as u128) <= cut::SMALL_LOGITS as u128;
            tasks.most_together = Some(if is_small { total } else { share });
        }
        // Behind the last packed row and key all sequences are empty, and there may be any number of them.
        let mut left = (problem.key_layout() == RowLayout::Packed).then(|| {
            problem.query_rows_of_no_sequence().start.saturating_add(problem.keys_of_no_sequence().start)
        });
        for batch in batches {
            if left == Some(0) {
                break;
            }
            let (queries, keys) = (problem.query_len(batch), problem.key_places(batch).rows());
            left = left.map(|left| left.saturating_sub(queries + keys));
            if queries > 0 || keys > 0 {
                let count = if tasks.is_together(problem, batch) {
                    dims.key_heads
                } else {
                    let layout = layout(batch);
                    tasks.key_tasks(problem, batch, layout)
                        + tasks.query_tasks(problem, batch, layout).count()
                };
                tasks.listed.push(problem, batch, count, queries);
            }
        }
        tasks.listed.sort();
        tasks
    }

    fn is_together(&self, problem: &CallProblem<'_>, batch: usize) -> bool {
        self.most_together.is_some_and(|most| logits(problem, batch) <= most)
    }

    /// How many tasks for chunks of its keys a sequence has that is computed apart.
    fn key_tasks(&self, problem: &CallProblem<'_>, batch: usize, layout: Layout) -> usize {
        let chunks = problem.key_places(batch).rows().div_ceil(layout.keys);
        if self.writes_keys { problem.dims().key_heads * chunks } else { 0 }
    }

    /// Its tasks for query rows.
    fn query_tasks(&self, problem: &CallProblem<'_>, batch: usize, layout: Layout) -> Cut {
        let queries = if self.writes_queries { problem.query_len(batch) } else { 0 };
        Cut::of(problem, queries, layout.rows)
    }

    /// How many there are.
    pub(super) fn count(&self) -> usize {
        self.listed.count()
    }

    /// The task of a number below that.
    pub(super) fn at(
        &self,
        problem: &CallProblem<'_>,
        number: usize,
        layout: impl Fn(usize) -> Layout,
    ) -> Option<Task> {
        let (batch, index, _) = self.listed.at(number)?;
        if self.is_together(problem, batch) {
            return Some(Task::Together { batch, key_head: index });
        }
        let layout = layout(batch);
        let for_keys = self.key_tasks(problem, batch, layout);
        if let Some(index) = index.checked_sub(for_keys) {
            return self.query_tasks(problem, batch, layout).rows(batch, index).map(Task::Queries);
        }
        let chunks = for_keys / problem.dims().key_heads;
        Some(Task::Keys { batch, key_head: index / chunks, first: index % chunks * layout.keys })
    }
}

/// About the logits of a head of a sequence.
fn logits(problem: &CallProblem<'_>, batch: usize) -> u128 {
    let queries = problem.query_len(batch);
    queries as u128 * problem.key_range_of_rows(batch, 0..queries).len() as u128
}
