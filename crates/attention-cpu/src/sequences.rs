//! The sequences of a call: which of them have rows, and how the tensors that are written are cut among them.
//!
//! Only this file and [`Head`](crate::operand::Head) know that rows may be packed. Everything else counts
//! rows inside a sequence.

use std::ops::Range;

use attention_core::{CallProblem, Problem, Role, RowLayout, ViewMut};

/// Which rows a tensor has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Side {
    /// Those of queries: also outputs, and what is of their shape.
    Queries,
    /// Those of keys: also values, and the gradients of both.
    Keys,
}

impl Side {
    fn is_packed(self, problem: &Problem) -> bool {
        let layout = match self {
            Self::Queries => problem.query_layout(),
            Self::Keys => problem.key_layout(),
        };
        layout == RowLayout::Packed
    }

    /// The rows of a sequence in the tensors of this side, padding included.
    #[inline]
    fn rows(self, problem: &CallProblem<'_>, batch: usize) -> usize {
        match self {
            Self::Queries => problem.query_places(batch).rows(),
            Self::Keys => problem.key_places(batch).rows(),
        }
    }

    /// The first row of a sequence that has rows, among all rows of packed tensors.
    fn first_row(self, problem: &CallProblem<'_>, batch: usize) -> usize {
        let [_, row] = match self {
            Self::Queries => problem.query_places(batch).of(0),
            Self::Keys => problem.key_places(batch).of(0),
        };
        row
    }

    /// How many rows of packed tensors belong to sequences: all but the last ones.
    fn packed_rows(self, problem: &CallProblem<'_>) -> usize {
        match self {
            Self::Queries => problem.query_rows_of_no_sequence().start,
            Self::Keys => problem.keys_of_no_sequence().start,
        }
    }
}

/// Whether a call of a problem may have sequences with fewer queries than its longest.
pub(crate) fn queries_vary(problem: &Problem) -> bool {
    problem.has(Role::QueryLengths) || problem.query_layout() != RowLayout::Dense
}

/// The same of keys.
pub(crate) fn keys_vary(problem: &Problem) -> bool {
    problem.has(Role::KeyValueLengths) || problem.key_layout() != RowLayout::Dense
}

/// How many sequences have rows in calls of a problem, queries or keys, at most.
pub(crate) fn most_with_rows(problem: &Problem) -> usize {
    let batch = problem.dims().batch;
    if !Side::Queries.is_packed(problem) || !Side::Keys.is_packed(problem) {
        return batch;
    }
    let rows = |role: Role| problem.tensor(role).map_or(0, |desc| desc.shape()[1]);
    batch.min(rows(Role::Query).saturating_add(rows(Role::Key)))
}

/// How many sequences of a call have rows, queries or keys, or `most` if there are more.
pub(crate) fn with_rows(problem: &CallProblem<'_>, most: usize) -> usize {
    let (batch, sides) = (problem.dims().batch, [Side::Queries, Side::Keys]);
    if !sides.iter().all(|side| side.is_packed(problem)) {
        return batch.min(most);
    }
    let mut left = sides.map(|side| side.packed_rows(problem)).iter().sum::<usize>();
    let mut count = 0;
    for batch in 0..batch {
        if left == 0 || count == most {
            break;
        }
        let rows = sides.map(|side| side.rows(problem, batch)).iter().sum::<usize>();
        count += usize::from(rows > 0);
        left -= rows;
    }
    count
}

/// Neighbouring sequences in a tensor that is written.
#[derive(Debug)]
pub(crate) struct BySequence<'a> {
    /// `[sequences, length, ..]`, or packed, `[rows, ..]`. `None` while it is cut.
    view: Option<ViewMut<'a>>,
    side: Side,
    is_packed: bool,
    /// How many packed rows there are before these, counted by their tensor.
    first_row: usize,
}

impl<'a> BySequence<'a> {
    /// All of a tensor `[B, length, ..]` or `[1, total, ..]`. Gives `fill` the rows of packed tensors that
    /// belong to no sequence.
    pub(crate) fn new(
        problem: &CallProblem<'_>,
        side: Side,
        view: ViewMut<'a>,
        fill: impl FnOnce(ViewMut<'a>),
    ) -> Self {
        let is_packed = side.is_packed(problem);
        let view = if is_packed {
            let all = view.into_axis(0).next();
            let all = all.unwrap_or_else(|| unreachable!("packed tensors have an axis of size 1 in front"));
            let [rows, rest] = split(all, side.packed_rows(problem));
            fill(rest);
            rows
        } else {
            view
        };
        Self { view: Some(view), side, is_packed, first_row: 0 }
    }

    /// Cuts off the first `count` sequences, which have `rows` rows together where they are packed.
    fn cut(&mut self, count: usize, rows: usize) -> Self {
        let (size, first_row) = (if self.is_packed { rows } else { count }, self.first_row);
        let [first, left] = match self.view.take().map(|view| split(view, size)) {
            Some(parts) => parts.map(Some),
            None => [None, None],
        };
        (self.view, self.first_row) = (left, first_row + rows);
        Self { view: first, first_row, ..*self }
    }

    /// Cuts off the sequences `from..batch`; `batch` has rows.
    fn before(&mut self, problem: &CallProblem<'_>, from: usize, batch: usize) -> Self {
        let rows = if self.is_packed { self.side.first_row(problem, batch) - self.first_row } else { 0 };
        self.cut(batch - from, rows)
    }

    /// `None` where there is nothing to write.
    fn into_parts(self) -> Option<Parts<'a>> {
        let view = self.view.filter(|view| !view.desc().is_empty())?;
        Some(match self.is_packed {
            true => Parts::Packed(self.side, Some(view)),
            false => Parts::Dense(Box::new(view.into_axis(0))),
        })
    }
}

/// The rows of one sequence after the other, `[rows, ..]`.
enum Parts<'a> {
    Dense(Box<dyn Iterator<Item = ViewMut<'a>> + Send + 'a>),
    /// The rows that are left; `None` while they are cut.
    Packed(Side, Option<ViewMut<'a>>),
}

impl<'a> Parts<'a> {
    /// Whether the sequences that are left have no rows, however many there are.
    fn are_all_empty(&self) -> bool {
        match self {
            Self::Dense(_) => false,
            Self::Packed(_, left) => left.as_ref().is_none_or(|left| left.shape()[0] == 0),
        }
    }

    /// The rows of the next sequence, `batch`; `None` where it has none.
    fn next(&mut self, problem: &CallProblem<'_>, batch: usize) -> Option<ViewMut<'a>> {
        match self {
            Self::Dense(sequences) => sequences.next(),
            Self::Packed(side, left) => {
                // Nothing to cut off an empty one: a million of them cost no more than a look at their
                // starts.
                let rows = Some(side.rows(problem, batch)).filter(|&rows| rows > 0)?;
                let [next, rest] = split(left.take()?, rows);
                *left = Some(rest);
                Some(next)
            }
        }
    }
}

/// Cuts a view behind the first `size` of its first axis.
fn split(view: ViewMut<'_>, size: usize) -> [ViewMut<'_>; 2] {
    let length = view.shape()[0];
    view.split(0, [size, length - size])
        .unwrap_or_else(|_| unreachable!("the starts of a checked call are inside its tensors"))
}

/// The sequences of a call that have rows, with these of `N` tensors, in the order in which they are worked
/// on.
pub(crate) struct Sequences<'p, 'a, const N: usize> {
    problem: &'p CallProblem<'p>,
    runs: std::vec::IntoIter<Run<[Option<BySequence<'a>>; N]>>,
    run: Option<Run<[Option<Parts<'a>>; N]>>,
}

/// Neighbouring sequences.
struct Run<T> {
    batches: Range<usize>,
    tensors: T,
    /// 0 for sequences that are not known to be long.
    work: usize,
}

/// A sequence with its rows of each tensor: `None` where it has none, or where there is no such tensor.
pub(crate) type Sequence<'a, const N: usize> = (usize, [Option<ViewMut<'a>>; N]);

impl<'p, 'a, const N: usize> Sequences<'p, 'a, N> {
    /// For this many workers.
    pub(crate) fn new(
        problem: &'p CallProblem<'p>,
        workers: usize,
        mut tensors: [Option<BySequence<'a>>; N],
    ) -> Self {
        let (mut runs, mut next) = (Vec::new(), 0);
        for (batch, work) in long_sequences(problem, workers) {
            let mut push = |batches, work, cut: &dyn Fn(&mut BySequence<'a>) -> BySequence<'a>| {
                let tensors = tensors.each_mut().map(|tensor| tensor.as_mut().map(cut));
                runs.push(Run { batches, tensors, work });
            };
            if next < batch {
                push(next..batch, 0, &|tensor| tensor.before(problem, next, batch));
            }
            push(batch..batch + 1, work, &|tensor| tensor.cut(1, tensor.side.rows(problem, batch)));
            next = batch + 1;
        }
        runs.push(Run { batches: next..problem.dims().batch, tensors, work: 0 });
        // Stable, so that sequences of the same length stay in order.
        runs.sort_by_key(|run| std::cmp::Reverse(run.work));
        Self { problem, runs: runs.into_iter(), run: None }
    }
}

impl<'a, const N: usize> Iterator for Sequences<'_, 'a, N> {
    type Item = Sequence<'a, N>;

    fn next(&mut self) -> Option<Sequence<'a, N>> {
        loop {
            let Some(run) = &mut self.run else {
                let Run { batches, tensors, work } = self.runs.next()?;
                let tensors = tensors.map(|tensor| tensor.and_then(BySequence::into_parts));
                self.run = Some(Run { batches, tensors, work });
                continue;
            };
            let are_done = run.tensors.iter().flatten().all(Parts::are_all_empty);
            let Some(batch) = (if are_done { None } else { run.batches.next() }) else {
                self.run = None;
                continue;
            };
            let parts = run.tensors.each_mut().map(|parts| parts.as_mut()?.next(self.problem, batch));
            if parts.iter().any(Option::is_some) {
                return Some((batch, parts));
            }
        }
    }
}

/// Sequences that are worked on before the others, with their work, in order.
///
/// Where one sequence is far longer than the others and comes last, one thread would work on it while the
/// others have nothing left to do. Begun first, it runs beside them. Every other sequence has at most a
/// fourth of a worker's share of the work. So there are at most four of these a worker, however many
/// sequences there are.
fn long_sequences(problem: &CallProblem<'_>, workers: usize) -> Vec<(usize, usize)> {
    let batch = problem.dims().batch;
    let vary = problem.has_lengths() || Side::Queries.is_packed(problem) || Side::Keys.is_packed(problem);
    if workers < 2 || batch < 2 || !vary {
        return Vec::new();
    }
    let work = |batch: usize| {
        let sequence = problem.sequence(batch);
        let queries = sequence.queries();
        (batch, queries.saturating_mul(sequence.key_range_of_rows(0..queries).len()))
    };
    let works = || problem.sequences_with_queries(0..batch).map(work);
    let total = works().fold(0usize, |total, (_, work)| total.saturating_add(work));
    let share = total / workers.saturating_mul(4);
    works().filter(|&(_, work)| work > share).collect()
}
