//! How a problem is cut into tasks.
//!
//! A row's result depends on the blocks of keys it meets, which begin at multiples of the engine's block size from
//! key 0 of its batch row, and on nothing else. So the cuts along query rows are free: they may depend on the number
//! of threads without changing a bit.

use std::ops::Range;

use attention_core::Problem;

use crate::terms::QueryRow;

/// Logits of a head up to which a batch row is small: there calls and conversions cost more than arithmetic, and the
/// largest of a few dozen rounding errors is a matter of luck, so f32 is computed in f64.
const SMALL_LOGITS: usize = 1 << 12;

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

/// The rows of every task with at most `limit(batch)` rows each, in an order in which the queries of a head ascend. A
/// batch row with a limit of 0 has none.
pub(crate) fn row_tasks(problem: &Problem, limit: impl Fn(usize) -> usize) -> impl Iterator<Item = Rows> {
    (0..problem.dims().batch)
        .map(move |batch| (batch, limit(batch)))
        .filter(|&(_, limit)| limit > 0)
        .flat_map(move |(batch, limit)| batch_tasks(problem, batch, limit))
}

/// The same for one batch row.
pub(crate) fn batch_tasks(problem: &Problem, batch: usize, limit: usize) -> impl Iterator<Item = Rows> {
    let dims = problem.dims();
    let group = dims.group_size();
    let all = problem.query_len(batch);
    let queries = all.clamp(1, limit.max(1));
    let heads = (limit / queries).clamp(1, group.max(1));
    (0..dims.key_heads).flat_map(move |key_head| {
        let group = key_head * group..(key_head + 1) * group;
        group.clone().step_by(heads).flat_map(move |head| {
            let heads = head..(head + heads).min(group.end);
            (0..all).step_by(queries).map(move |query| Rows {
                batch,
                key_head,
                heads: heads.clone(),
                queries: query..(query + queries).min(all),
            })
        })
    })
}

/// Real query rows of all heads of a problem.
pub(crate) fn total_rows(problem: &Problem) -> usize {
    let dims = problem.dims();
    let queries: usize = (0..dims.batch).map(|batch| problem.query_len(batch)).sum();
    queries.saturating_mul(dims.query_heads)
}

/// The intersection of two ranges, empty where they do not meet.
pub(crate) fn intersection(a: &Range<usize>, b: &Range<usize>) -> Range<usize> {
    let start = a.start.max(b.start);
    start..a.end.min(b.end).max(start)
}
