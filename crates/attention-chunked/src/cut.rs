//! How a problem is cut into tasks.
//!
//! A row's result depends on the blocks of keys it meets, which begin at multiples of the engine's block size
//! from key 0 of its batch row, and on nothing else. So the cuts along query rows are free: they may depend
//! on the number of threads without changing a bit.

use std::ops::Range;

use attention_core::{CallProblem, Problem, Role, RowLayout, SequenceRows};

use crate::logits::QueryRow;

/// Logits of a head up to which a batch row is small: there calls and conversions cost more than arithmetic,
/// and the largest of a few dozen rounding errors is a matter of luck, so f32 is computed in f64.
pub(crate) const SMALL_LOGITS: usize = 1 << 12;

/// Whether a batch row is small.
pub(crate) fn is_small(problem: &CallProblem<'_>, batch: usize) -> bool {
    problem.query_len(batch).saturating_mul(problem.key_value_len(batch)) <= SMALL_LOGITS
}

/// Query rows of some neighbouring heads that share a key/value head: the same queries of each, head by head.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Rows {
    pub(crate) batch: usize,
    pub(crate) key_head: usize,
    pub(crate) heads: Range<usize>,
    pub(crate) queries: Range<usize>,
}

impl Rows {
    pub(crate) fn len(&self) -> usize {
        self.heads.len() * self.queries.len()
    }

    /// Head and query of row `index`.
    pub(crate) fn at(&self, index: usize) -> (usize, usize) {
        let queries = self.queries.len();
        (self.heads.start + index / queries, self.queries.start + index % queries)
    }

    /// Where row `index` is in tensors of queries and outputs: all indices but that of the last axis. Whether
    /// rows are dense, packed or in pages, only this and the function for keys ask.
    #[inline]
    pub(crate) fn query_index<'c>(
        &self,
        problem: &CallProblem<'c>,
    ) -> impl Fn(usize) -> [usize; 3] + use<'c, '_> {
        let places = problem.query_places(self.batch);
        move |index| {
            let (head, query) = self.at(index);
            let [outer, inner] = places.of(query);
            [outer, inner, head]
        }
    }

    /// Where key `first + index` of the head of these rows is in tensors of keys and values.
    #[inline]
    pub(crate) fn key_index<'c>(
        &self,
        problem: &CallProblem<'c>,
        first: usize,
    ) -> impl Fn(usize) -> [usize; 3] + use<'c> {
        let (places, head) = (problem.key_places(self.batch), self.key_head);
        move |index| {
            let [outer, inner] = places.of(first + index);
            [outer, inner, head]
        }
    }

    /// Row `index`, with the keys that structure lets it see in the sequence of these rows.
    pub(crate) fn row(&self, sequence: &SequenceRows, index: usize) -> QueryRow {
        let (head, query) = self.at(index);
        let keys = sequence.key_range(query);
        QueryRow { batch: self.batch, head, query, begin: keys.start, end: keys.end }
    }
}

/// How the query rows of each head of a batch row are cut into tasks: neighbouring heads of a group times
/// queries.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Cut {
    all_queries: usize,
    group: usize,
    key_heads: usize,
    /// Queries and heads of a task.
    queries: usize,
    heads: usize,
}

impl Cut {
    /// Of `all_queries` query rows a head into tasks of at most `limit` rows. More query rows and a lower
    /// limit never make fewer tasks.
    pub(crate) fn of(problem: &Problem, all_queries: usize, limit: usize) -> Self {
        let dims = problem.dims();
        let (group, queries) = (dims.group_size(), all_queries.clamp(1, limit.max(1)));
        let heads = (limit / queries).clamp(1, group.max(1));
        Self { all_queries, group, key_heads: dims.key_heads, queries, heads }
    }

    /// How many tasks a key/value head has: of heads of its group, and of queries.
    fn counts(&self) -> [usize; 2] {
        [self.group.div_ceil(self.heads), self.all_queries.div_ceil(self.queries)]
    }

    /// How many tasks a batch row has. No overflow: each has a row of the problem, whose rows can be counted.
    pub(crate) fn count(&self) -> usize {
        let [heads, queries] = self.counts();
        self.key_heads * heads * queries
    }

    /// Task `index` of batch row `batch`, or `None` where it has fewer tasks. The queries of a head ascend.
    pub(crate) fn rows(&self, batch: usize, index: usize) -> Option<Rows> {
        if index >= self.count() {
            return None;
        }
        let group = self.group;
        let [heads, queries] = self.counts();
        let (head, query) = (index / queries, index % queries * self.queries);
        let (key_head, head) = (head / heads, head % heads * self.heads);
        Some(Rows {
            batch,
            key_head,
            heads: key_head * group + head..key_head * group + group.min(head + self.heads),
            queries: query..self.all_queries.min(query + self.queries),
        })
    }
}

/// The least and the most query rows and keys that a batch row of a problem's calls may have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Bounds {
    queries: [usize; 2],
    keys: [usize; 2],
}

impl Bounds {
    pub(crate) fn of(problem: &Problem) -> Self {
        let dims = problem.dims();
        let bounds = |vary: bool, full: usize| if vary { [0, full] } else { [full, full] };
        let keys_vary = problem.has(Role::KeyValueLengths) || problem.key_layout() != RowLayout::Dense;
        Self {
            queries: bounds(query_rows_vary(problem), dims.query_length),
            keys: bounds(keys_vary, dims.key_length),
        }
    }

    /// Those of the batch rows with `least` to `most` query rows, if there may be such.
    pub(crate) fn with_queries(self, least: usize, most: usize) -> Option<Self> {
        let queries = [self.queries[0].max(least), self.queries[1].min(most)];
        (queries[0] <= queries[1]).then_some(Self { queries, ..self })
    }

    /// The most query rows of a batch row.
    pub(crate) fn most_queries(&self) -> usize {
        self.queries[1]
    }

    /// Whether there may be batch rows that are not small.
    pub(crate) fn may_be_large(&self) -> bool {
        self.queries[1].saturating_mul(self.keys[1]) > SMALL_LOGITS
    }

    /// Whether there may be small batch rows.
    pub(crate) fn may_be_small(&self) -> bool {
        self.queries[0].saturating_mul(self.keys[0]) <= SMALL_LOGITS
    }

    /// The most query rows of a small batch row that has keys.
    pub(crate) fn most_small_queries(&self) -> usize {
        self.queries[1].min(SMALL_LOGITS / self.keys[0].max(1))
    }
}

/// Whether queries are packed: sequences have as many rows as they say, and work is counted over those that
/// have any.
#[inline]
pub(crate) fn is_packed(problem: &Problem) -> bool {
    problem.query_layout() == RowLayout::Packed
}

/// Whether batch rows may have fewer query rows than the most.
pub(crate) fn query_rows_vary(problem: &Problem) -> bool {
    problem.has(Role::QueryLengths) || is_packed(problem)
}

/// The most query rows of a head that all batch rows of a call have together.
pub(crate) fn most_query_rows(problem: &Problem) -> usize {
    let dims = problem.dims();
    let all = dims.batch.saturating_mul(dims.query_length);
    if is_packed(problem) { all.min(tensor_rows(problem)) } else { all }
}

/// The rows of the tensors of queries and outputs, those of no sequence and padding included.
fn tensor_rows(problem: &Problem) -> usize {
    let [outer, inner] = query_axes(problem);
    outer.saturating_mul(inner)
}

/// The first two axes of the tensors of queries and outputs.
#[inline]
pub(crate) fn query_axes(problem: &Problem) -> [usize; 2] {
    let Some(query) = problem.tensor(Role::Query) else { unreachable!("every problem has a query") };
    let shape = query.shape();
    [shape[0], shape[1]]
}

/// Batch rows with query rows of which every other is like one, and how many are like each: a single one
/// where all have the same lengths.
pub(crate) fn different_rows<'p, 'c>(
    problem: &'p CallProblem<'c>,
) -> (impl Iterator<Item = usize> + Clone + use<'p, 'c>, usize) {
    let batch = problem.dims().batch;
    let vary = problem.has_lengths() || is_packed(problem);
    let (rows, alike) = if vary { (batch, 1) } else { (batch.min(1), batch) };
    (problem.sequences_with_queries(0..rows), alike)
}

/// Whether there are query rows at all, padded ones included: without, the number of batch rows says nothing
/// about time.
pub(crate) fn has_rows(problem: &Problem) -> bool {
    let dims = problem.dims();
    dims.batch > 0 && dims.query_length > 0 && dims.query_heads > 0
}

/// Calls `empty` with the first indices of every query row that is padding or belongs to no sequence.
pub(crate) fn for_each_padded_row(problem: &CallProblem<'_>, mut empty: impl FnMut([usize; 3])) {
    let dims = problem.dims();
    for row in problem.query_rows_of_no_sequence() {
        (0..dims.query_heads).for_each(|head| empty([0, row, head]));
    }
    if !has_rows(problem) || !problem.has(Role::QueryLengths) {
        return;
    }
    for batch in 0..dims.batch {
        for query in problem.query_len(batch)..dims.query_length {
            (0..dims.query_heads).for_each(|head| empty([batch, query, head]));
        }
    }
}

/// Whether there are logits.
pub(crate) fn has_logits(problem: &Problem) -> bool {
    has_rows(problem) && problem.dims().key_length > 0
}

/// Whether every product of sizes that scratch is made of fits: rows of chunks, or of a whole key/value head,
/// of the widest row with its padding, in up to three parts of up to eight bytes. Strides of 0 let head
/// dimensions be anything.
pub(crate) fn sizes_fit(problem: &Problem) -> bool {
    let dims = problem.dims();
    let rows = dims.query_length.saturating_mul(dims.group_size()).saturating_add(256).max(1 << 13);
    let width = dims.head_dim.max(dims.value_head_dim).saturating_add(64);
    rows.saturating_mul(width) <= isize::MAX as usize / 32
}

/// The intersection of two ranges, empty where they do not meet.
pub(crate) fn intersection(a: &Range<usize>, b: &Range<usize>) -> Range<usize> {
    let start = a.start.max(b.start);
    start..a.end.min(b.end).max(start)
}
