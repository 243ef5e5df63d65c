//! How a problem is cut into tasks.
//!
//! A row's result depends on the blocks of keys it meets, which begin at multiples of the engine's block size
//! from key 0 of its batch row, and on nothing else. So the cuts along query rows are free: they may depend
//! on the number of threads without changing a bit.

use std::ops::Range;

use attention_core::{Problem, Sequences};

use crate::logits::QueryRow;

/// Logits of a head up to which a batch row is small: there calls and conversions cost more than arithmetic,
/// and the largest of a few dozen rounding errors is a matter of luck, so f32 is computed in f64.
pub(crate) const SMALL_LOGITS: usize = 1 << 12;

/// Whether a batch row is small.
pub(crate) fn is_small(problem: &Problem, batch: usize) -> bool {
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

    /// Row `index`, with the keys that structure lets it see.
    pub(crate) fn row(&self, problem: &Problem, index: usize) -> QueryRow {
        let (head, query) = self.at(index);
        let keys = problem.key_range(self.batch, query);
        QueryRow { batch: self.batch, head, query, begin: keys.start, end: keys.end }
    }
}

/// How the query rows of each head of a batch row are cut into tasks: neighbouring heads of a group times
/// queries.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Cut {
    queries: usize,
    heads: usize,
}

impl Cut {
    /// For tasks of at most `limit` rows.
    pub(crate) fn of(problem: &Problem, batch: usize, limit: usize) -> Self {
        let queries = problem.query_len(batch).clamp(1, limit.max(1));
        Self { queries, heads: (limit / queries).clamp(1, problem.dims().group_size().max(1)) }
    }

    /// How many tasks there are: of heads of a group, and of queries.
    fn counts(&self, problem: &Problem, batch: usize) -> [usize; 2] {
        let group = problem.dims().group_size();
        [group.div_ceil(self.heads), problem.query_len(batch).div_ceil(self.queries)]
    }

    /// How many tasks a batch row has. No overflow: each has a row of the problem, whose rows can be counted.
    pub(crate) fn count(&self, problem: &Problem, batch: usize) -> usize {
        let [heads, queries] = self.counts(problem, batch);
        problem.dims().key_heads * heads * queries
    }

    /// Task `index` of a batch row, if it has so many. The queries of a head ascend.
    pub(crate) fn rows(&self, problem: &Problem, batch: usize, index: usize) -> Option<Rows> {
        if index >= self.count(problem, batch) {
            return None;
        }
        let group = problem.dims().group_size();
        let [heads, queries] = self.counts(problem, batch);
        let (head, query) = (index / queries, index % queries * self.queries);
        let (key_head, head) = (head / heads, head % heads * self.heads);
        Some(Rows {
            batch,
            key_head,
            heads: key_head * group + head..key_head * group + group.min(head + self.heads),
            queries: query..problem.query_len(batch).min(query + self.queries),
        })
    }
}

/// Batch rows of which every other is like one: a single one where all have the same lengths.
pub(crate) fn different_rows(problem: &Problem) -> Range<usize> {
    let batch = problem.dims().batch;
    match problem.sequences() {
        Sequences::Dense { query, key_value } if query.is_full() && key_value.is_full() => 0..batch.min(1),
        _ => 0..batch,
    }
}

/// The sum of `count` over all batch rows, or `most` if it is more.
pub(crate) fn count_up_to(problem: &Problem, most: usize, count: impl Fn(usize) -> usize) -> usize {
    let different = different_rows(problem);
    let alike = problem.dims().batch / different.len().max(1);
    let mut sum = 0usize;
    for batch in different {
        sum = sum.saturating_add(count(batch).saturating_mul(alike));
        if sum >= most {
            return most;
        }
    }
    sum
}

/// Whether there are query rows at all, padded ones included: without, the number of batch rows says nothing
/// about time.
pub(crate) fn has_rows(problem: &Problem) -> bool {
    let dims = problem.dims();
    dims.batch > 0 && dims.query_length > 0 && dims.query_heads > 0
}

/// Whether there are query rows that lengths may make padding.
pub(crate) fn may_have_padding(problem: &Problem) -> bool {
    let full = matches!(problem.sequences(), Sequences::Dense { query, .. } if query.is_full());
    has_rows(problem) && !full
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

/// Real query rows of all heads of a problem.
pub(crate) fn total_rows(problem: &Problem) -> usize {
    let queries = count_up_to(problem, usize::MAX, |batch| problem.query_len(batch));
    queries.saturating_mul(problem.dims().query_heads)
}

/// The most real keys of a batch row.
pub(crate) fn most_keys(problem: &Problem) -> usize {
    different_rows(problem).map(|batch| problem.key_value_len(batch)).max().unwrap_or(0)
}

/// The intersection of two ranges, empty where they do not meet.
pub(crate) fn intersection(a: &Range<usize>, b: &Range<usize>) -> Range<usize> {
    let start = a.start.max(b.start);
    start..a.end.min(b.end).max(start)
}
