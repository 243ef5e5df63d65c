//! Attention in f64, straight from the formula: slow, short, and obviously right.
//!
//! Shares no code with any backend: the positions, masks and even the dropout stream are written again here,
//! from `docs/semantics.md` and the paper. Operands are the values stored in their dtype, converted exactly.
//!
//! A packed or paged call means what each of its sequences means alone. So its sequences are cut out into the
//! batch rows of a padded call with lengths, and everything here, results too, is in the positions of that
//! one: `[B, T, ..]` with `T` and `S` the longest that a sequence may have.

mod dense;
mod exact;
mod gradients;
mod padding;
mod philox;
mod row;
mod rows;
mod structure;

pub use dense::Dense;
pub use gradients::OracleGradients;
pub(crate) use gradients::product;
pub(crate) use padding::Padding;
pub use philox::keep;
pub use row::{Entry, Row};
pub use structure::{Dead, Structure};

use attention_core::{Dropout, Problem};

/// The logits, probabilities and results of one call.
#[derive(Clone, Debug)]
pub struct Oracle {
    pub(crate) problem: Problem,
    pub(crate) scale: f64,
    pub(crate) softcap: Option<f64>,
    pub(crate) dropout: Option<Dropout>,
    pub(crate) structure: Structure,
    pub(crate) query: Dense,
    pub(crate) key: Dense,
    pub(crate) value: Dense,
    pub(crate) bias: Option<Dense>,
    pub(crate) sinks: Option<Dense>,
    /// `[B, T, N]` in row-major order.
    pub(crate) rows: Vec<Row>,
}

impl Oracle {
    /// The row of query `t` of head `n` in batch row `b`.
    pub fn row(&self, b: usize, t: usize, n: usize) -> &Row {
        let d = self.problem.dims();
        &self.rows[(b * d.query_length + t) * d.query_heads + n]
    }

    /// The output, `[B, T, N, Hv]` in row-major order: `sum over j of p' v`.
    pub fn out(&self) -> Vec<f64> {
        let d = self.problem.dims();
        let mut out = Vec::with_capacity(self.rows.len() * d.value_head_dim);
        self.for_each_row(|[b, _, n], row| {
            let mut sums = vec![0.0; d.value_head_dim];
            for entry in row.entries.iter().filter(|entry| entry.keep > 0.0) {
                let value = self.value.row(&[b, entry.key, n / d.group_size()]);
                for (sum, v) in sums.iter_mut().zip(value) {
                    *sum += entry.keep * entry.probability * v;
                }
            }
            out.extend(sums);
        });
        out
    }

    /// The logsumexp, `[B, T, N]` in row-major order.
    pub fn lse(&self) -> Vec<f64> {
        self.rows.iter().map(|row| row.lse).collect()
    }

    /// Whether each row can attend to a key, `[B, T, N]` in row-major order.
    pub fn row_has_keys(&self) -> Vec<bool> {
        self.rows.iter().map(|row| !row.entries.is_empty()).collect()
    }

    /// The keep bits of every position, `[B, N, T, S]` in row-major order, or `None` without dropout.
    pub fn keep_mask(&self) -> Option<Vec<bool>> {
        let dropout = self.dropout?;
        let [batch, heads, queries, keys] = self.problem.dims().logits();
        let mut mask = Vec::with_capacity(batch * heads * queries * keys);
        for batch_head in 0..batch * heads {
            for t in 0..queries {
                mask.extend((0..keys).map(|s| keep(&dropout, batch_head, t, s)));
            }
        }
        Some(mask)
    }

    /// Calls `visit([b, t, n], row)` for every row, in the order of `[B, T, N]`.
    pub(crate) fn for_each_row(&self, mut visit: impl FnMut([usize; 3], &Row)) {
        let d = self.problem.dims();
        for (index, row) in self.rows.iter().enumerate() {
            let n = index % d.query_heads;
            let t = index / d.query_heads % d.query_length;
            visit([index / d.query_heads / d.query_length, t, n], row);
        }
    }
}

#[cfg(test)]
mod tests;
