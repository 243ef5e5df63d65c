//! Sums of the keys at hand, for rows whose logsumexp has lost digits.

use attention_core::DType;
use attention_core::merge::Accumulator;
use attention_threads::Team;

use super::{SharedStates, has_lost_digits, round_shift, state_index};
use crate::backward::block::Pair;
use crate::backward::call::Backward;
use crate::cut;
use crate::engine::{Engine, MAX_BLOCK_ROWS};
use crate::float::Float;
use crate::listed::Listed;
use crate::paths::Path;
use crate::scratch::Pieces;
use crate::tensor::Floats;
use crate::workers;

/// The threads and the scratch of a call.
pub(crate) struct Workers<'m> {
    pub(crate) team: &'m Team,
    pub(crate) scratch: &'m mut [u8],
    /// Bytes of each worker's scratch.
    pub(crate) bytes: usize,
}

/// Puts sums of the keys at hand in the place of the logsumexps that have lost digits, for the batch rows of
/// an engine.
///
/// The products are those of the gradients, to the bit, so the probabilities sum to 1. Where the keys at hand
/// are not all that the row has (context parallelism), their logsumexp is another than the one that was
/// given, which then stays.
pub(crate) fn replace<E: Engine>(
    backward: &Backward<'_, E>,
    lse: &Floats<'_>,
    sinks: Option<&Floats<'_>>,
    is_of_engine: impl Fn(usize) -> bool + Sync,
    states: SharedStates<'_>,
    workers: Workers<'_>,
) {
    let problem = backward.problem;
    let (dims, dtype, unit) = (problem.dims(), problem.dtype(), backward.terms.unit());
    let blocks_of = |queries: usize| queries.saturating_mul(dims.group_size()).div_ceil(E::BLOCK_ROWS);
    let blocks = blocks_of(dims.query_length);
    let is_packed = cut::is_packed(problem);
    let mut listed = Listed::default();
    for batch in problem.sequences_with_queries(0..if is_packed { dims.batch } else { 0 }) {
        let queries = problem.query_len(batch);
        listed.push(problem, batch, dims.key_heads * blocks_of(queries), queries);
    }
    listed.sort();
    let tasks = if is_packed { listed.count() } else { dims.batch * dims.key_heads * blocks };
    let Workers { team, scratch, bytes } = workers;
    workers::run(tasks, team, scratch, bytes, &|task, memory| {
        let (batch, key_head, block) = match listed.at(task) {
            Some((batch, index, count)) => {
                let blocks = count / dims.key_heads;
                (batch, index / blocks, index % blocks)
            }
            None => {
                let head = task / blocks;
                (head / dims.key_heads, head % dims.key_heads, task % blocks)
            }
        };
        if !is_of_engine(batch) {
            return;
        }
        let rows = backward.all_rows(batch, key_head);
        let first = block * E::BLOCK_ROWS;
        let range = first..rows.len().min(first + E::BLOCK_ROWS);
        let index = rows.query_index(problem);
        let given = |row: usize| -> f64 { lse.at(&index(row)) };
        if !range.clone().any(|row| has_lost_digits(dtype, given(row))) {
            return;
        }
        let mut scratch = backward.layout.scratch::<E>(&mut Pieces::of(memory));
        let pair = Pair { backward, rows: &rows, dq: false, dkv: false };
        let block = pair.block_without_states(0, range.clone());
        let mut shifts = [E::F::NEG_INFINITY; MAX_BLOCK_ROWS];
        let mut sums = [E::F::ZERO; MAX_BLOCK_ROWS];
        backward.engine.with_state(|| pair.sums(&block, &mut shifts, &mut sums, &mut scratch));
        for (in_block, row) in range.enumerate() {
            let given = given(row);
            if !has_lost_digits(dtype, given) {
                continue;
            }
            let at = index(row);
            let sink = sinks.map(|sinks| sinks.at(&[at[2]]));
            let own = Own::of(shifts[in_block], sums[in_block], unit, sink);
            if !own.is_of(given, dtype) {
                continue;
            }
            let index = state_index(problem, at);
            backward.taken.mark(Path::OwnSums);
            // SAFETY: each row is in one block, whose task runs once, so no other thread uses its state.
            unsafe { states.update(index, |state| (state[0], state[1]) = (own.shift, own.log_gain)) };
        }
    });
}

/// The logsumexp of a row's keys at hand and its sink, as a state has it.
#[derive(Clone, Copy, Debug)]
struct Own {
    shift: f64,
    log_gain: f64,
    lse: f64,
}

impl Own {
    /// Of a shift in units of size `unit` and the sum of weights relative to it, and a sink.
    fn of<F: Float>(keys: F, sum: F, unit: F, sink: Option<f64>) -> Self {
        let (keys, size) = (keys.to_f64(), unit.to_f64());
        let mut shift = keys;
        // The logarithm of the sum relative to the shift.
        let mut log_sum = sum.to_f64().ln();
        if let Some(sink) = sink.filter(|&sink| sink != f64::NEG_INFINITY) {
            if sink > keys * size {
                shift = round_shift(sink, unit);
            }
            let of_keys = if shift == keys { log_sum } else { (keys - shift).mul_add(size, log_sum) };
            let of_sink = (-shift).mul_add(size, sink);
            let (larger, smaller) = if of_keys > of_sink { (of_keys, of_sink) } else { (of_sink, of_keys) };
            log_sum = larger + (smaller - larger).exp().ln_1p();
        }
        Self { shift, log_gain: -log_sum, lse: shift.mul_add(size, log_sum) }
    }

    /// Whether this is the logsumexp that was given for the whole row, to within the rounding of what was
    /// stored.
    ///
    /// Four units in the last place is what two ways of summing differ by; a rest of the row that hides in it
    /// is as small as the rounding of the logsumexp that was given.
    fn is_of(&self, given: f64, dtype: DType) -> bool {
        let epsilon = if dtype == DType::F64 { f64::EPSILON } else { f64::from(f32::EPSILON) };
        self.lse.is_finite() && (self.lse - given).abs() <= 4.0 * epsilon * self.lse.abs().max(given.abs())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sink_joins_the_sum_whichever_is_larger() {
        let keys = (2f32, 3f32);
        let none = Own::of(keys.0, keys.1, 0.5, None);
        assert!((none.lse - (1.0 + 3f64.ln())).abs() < 1e-15);
        let same = Own::of(keys.0, keys.1, 0.5, Some(f64::NEG_INFINITY));
        assert_eq!(same.lse, none.lse);
        for sink in [-700.0, 0.3, 1.0, 5.25, 300.5, 1e30, -1e30] {
            let own = Own::of(keys.0, keys.1, 0.5, Some(sink));
            let (top, want) = if sink > 1.0 {
                (sink, 3.0 * (1.0 - sink).exp() + 1.0)
            } else {
                (1.0, 3.0 + (sink - 1.0).exp())
            };
            assert!((own.lse - (top + want.ln())).abs() <= 1e-15 * sink.abs().max(1.0), "{sink}: {own:?}");
        }
        // No keys, a sink alone; also where the shift cannot be as large.
        let alone = Own::of(f32::NEG_INFINITY, 0.0, 0.5, Some(3e14));
        assert!(alone.is_of(3e14, DType::F32), "{alone:?}");
        let alone = Own::of(f64::NEG_INFINITY, 0.0, 0.5, Some(f64::MAX));
        assert!(alone.is_of(f64::MAX, DType::F64) && alone.log_gain == -f64::MAX / 2.0, "{alone:?}");
        // Neither: nothing that a finite logsumexp could be of.
        assert!(!Own::of(f32::NEG_INFINITY, 0.0, 1.0, None).is_of(-1e9, DType::F32));
        assert!(!Own::of(f32::NAN, f32::NAN, 1.0, None).is_of(-1e9, DType::F32));
    }

    #[test]
    fn a_part_of_a_row_is_not_the_row() {
        let own = Own::of(-200f32, 4.0, 1.0, None);
        assert!(own.is_of(f64::from(-200f32 + 4f32.ln()), DType::F32));
        assert!(!own.is_of(f64::from(-200f32 + 4.01f32.ln()), DType::F32));
        assert!(!own.is_of(-200.0 + 4f64.ln() + 1e-12, DType::F64));
    }
}
