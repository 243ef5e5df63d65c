//! The tasks of packed sequences: a list, since their numbers of tasks may differ by any factor.

use attention_core::CallProblem;

/// Sequences that have tasks, those whose tasks take longest first: so no thread begins a long task when the
/// others have nothing left. Tasks are numbered over the sequences in this order.
#[derive(Clone, Debug, Default)]
pub(crate) struct Listed(Vec<Sequence>);

#[derive(Clone, Copy, Debug)]
struct Sequence {
    batch: usize,
    tasks: usize,
    /// About the logits of a task.
    work: u128,
    /// The tasks of this sequence and of those before it.
    end: usize,
}

impl Listed {
    /// Adds a sequence with this many tasks, which have `rows` query rows together. What has no tasks is left
    /// out.
    pub(crate) fn push(&mut self, problem: &CallProblem<'_>, batch: usize, tasks: usize, rows: usize) {
        if tasks > 0 {
            let keys = problem.key_range_of_rows(batch, 0..rows).len();
            let work = rows as u128 * (keys as u128 + 1) / tasks as u128;
            self.0.push(Sequence { batch, tasks, work, end: 0 });
        }
    }

    /// Numbers the tasks.
    pub(crate) fn sort(&mut self) {
        // In the order of the sequences where they take equally long.
        self.0.sort_unstable_by_key(|sequence| (std::cmp::Reverse(sequence.work), sequence.batch));
        let mut end = 0usize;
        for sequence in &mut self.0 {
            end = end.saturating_add(sequence.tasks);
            sequence.end = end;
        }
    }

    /// How many tasks there are.
    pub(crate) fn count(&self) -> usize {
        self.0.last().map_or(0, |last| last.end)
    }

    /// Sequence and index of a task by its number, with the number of tasks of the sequence.
    pub(crate) fn at(&self, number: usize) -> Option<(usize, usize, usize)> {
        let found = self.0.get(self.0.partition_point(|sequence| sequence.end <= number))?;
        Some((found.batch, number - (found.end - found.tasks), found.tasks))
    }
}
