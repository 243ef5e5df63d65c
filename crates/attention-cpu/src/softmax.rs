//! The softmax of a row, and its dropout.

use attention_core::{DropoutStream, Problem};

use crate::elementary::Compute;
use crate::packed::Columns;

/// Independent accumulators of a reduction: enough for four vectors of the widest kind.
const LANES: usize = 64;

/// Reduces a row with [`LANES`] accumulators, in an order that depends on its length alone.
#[inline(always)]
fn reduce<C: Compute>(row: &[C], start: C, combine: impl Fn(C, C) -> C) -> C {
    let mut lanes = [start; LANES];
    let (chunks, tail) = row.as_chunks::<LANES>();
    for chunk in chunks {
        for lane in 0..LANES {
            lanes[lane] = combine(lanes[lane], chunk[lane]);
        }
    }
    for (lane, &value) in lanes.iter_mut().zip(tail) {
        *lane = combine(*lane, value);
    }
    fold(lanes, combine)
}

/// Combines accumulators by halves.
#[inline(always)]
fn fold<C: Compute>(mut lanes: [C; LANES], combine: impl Fn(C, C) -> C) -> C {
    let mut width = LANES / 2;
    while width > 0 {
        for lane in 0..width {
            lanes[lane] = combine(lanes[lane], lanes[lane + width]);
        }
        width /= 2;
    }
    lanes[0]
}

/// The sum of a row.
#[inline(always)]
fn sum<C: Compute>(row: &[C]) -> C {
    reduce(row, C::ZERO, |a, b| a + b)
}

/// The sum of the products of two rows.
#[inline(always)]
pub(crate) fn sum_of_products<C: Compute>(a: &[C], b: &[C]) -> C {
    let mut lanes = [C::ZERO; LANES];
    let ((a, a_tail), (b, b_tail)) = (a.as_chunks::<LANES>(), b.as_chunks::<LANES>());
    for (a, b) in a.iter().zip(b) {
        for lane in 0..LANES {
            lanes[lane] += a[lane] * b[lane];
        }
    }
    for (lane, (&a, &b)) in lanes.iter_mut().zip(a_tail.iter().zip(b_tail)) {
        *lane += a * b;
    }
    fold(lanes, |a, b| a + b)
}

/// What a row of logits comes to.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RowSoftmax<C> {
    /// What unnormalised probabilities are divided by: the sum of `exp(x - max)`, and 1 for a row without keys.
    pub(crate) total: C,
    /// The logsumexp; -inf for a row without keys or sink.
    pub(crate) lse: C,
}

/// Turns logits into unnormalised probabilities `exp(x - max)`, [`Compute::DISALLOWED`] where `x` is -inf.
#[inline(always)]
pub(crate) fn softmax<C: Compute, const FMA: bool>(row: &mut [C], sink: Option<C>) -> RowSoftmax<C> {
    // NaN loses every comparison here and returns with the exponentials.
    let max = reduce(row, C::NEG_INFINITY, |a, b| if b > a { b } else { a });
    let sink = sink.filter(|&sink| sink != C::NEG_INFINITY);
    // A row without keys has weight 0 beside any sink; with a NaN among the logits the maximum may be -inf too.
    let max = sink.map_or(max, |sink| if max > sink { max } else { sink });
    let shift = if max == C::NEG_INFINITY { C::ZERO } else { max };
    exponentials::<C, FMA>(row, shift);
    let keys = sum(row);
    let total = sink.map_or(keys, |sink| keys + (sink - shift).exp_lane::<FMA>());
    if total == C::ZERO {
        return RowSoftmax { total: C::ONE, lse: C::NEG_INFINITY };
    }
    RowSoftmax { total, lse: shift + total.ln() }
}

/// `x = exp(x - shift)`, [`Compute::DISALLOWED`] where `x` is -inf.
#[inline(always)]
fn exponentials<C: Compute, const FMA: bool>(row: &mut [C], shift: C) {
    for x in row {
        let p = (*x - shift).exp_lane::<FMA>();
        *x = if *x == C::NEG_INFINITY { C::DISALLOWED } else { p };
    }
}

/// Dropout of a call, with the batch row and head already numbered.
#[derive(Clone, Copy)]
pub(crate) struct RowDropout<C> {
    stream: DropoutStream,
    keep_scale: C,
    batch_head: u32,
    query: u32,
}

impl<C: Compute> RowDropout<C> {
    /// The dropout of one row, if the problem has any.
    pub(crate) fn new(problem: &Problem, batch: usize, head: usize, query: usize) -> Option<Self> {
        let stream = problem.dropout_stream()?;
        // The problem checked that all counters fit.
        let batch_head = (batch * problem.dims().query_heads + head) as u32;
        Some(Self { stream, keep_scale: C::from_f64(stream.keep_scale()), batch_head, query: query as u32 })
    }

    /// Calls `visit(column, factor)` for the columns that stand for keys: 0 where the key is dropped, else the scale
    /// of kept probabilities.
    pub(crate) fn for_each(&self, columns: &Columns, keys: usize, mut visit: impl FnMut(usize, C)) {
        let range = columns.start..(columns.start + columns.count).min(keys);
        self.stream.for_each(self.batch_head, self.query, range, |key, keep| {
            visit(key - columns.start, if keep { self.keep_scale } else { C::ZERO });
        });
    }

    /// Drops and scales the probabilities of a row. A disallowed one stays so: negative zero times a factor that is
    /// not negative.
    pub(crate) fn apply(&self, columns: &Columns, keys: usize, row: &mut [C]) {
        self.for_each(columns, keys, |column, factor| row[column] *= factor);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_without_keys_is_empty_and_a_sink_fills_it() {
        let mut row = [f32::NEG_INFINITY; 3];
        let empty = softmax::<f32, false>(&mut row, None);
        assert_eq!((empty.total, empty.lse), (1.0, f32::NEG_INFINITY));
        assert!(row.iter().all(|p| p.is_disallowed()));

        let mut row = [f32::NEG_INFINITY; 3];
        let sunk = softmax::<f32, false>(&mut row, Some(-2.5));
        assert_eq!(sunk.lse, -2.5);
        assert!(row.iter().all(|p| p.is_disallowed()));
    }

    #[test]
    fn an_allowed_probability_of_zero_is_not_disallowed() {
        let mut row = [0.0f32, -500.0, f32::NEG_INFINITY];
        softmax::<f32, false>(&mut row, None);
        assert_eq!(row[1], 0.0);
        assert!(!row[1].is_disallowed() && row[2].is_disallowed());
    }

    #[test]
    fn nan_and_infinity_propagate() {
        for bad in [f64::NAN, f64::INFINITY] {
            let mut row = [1.0, bad, 2.0];
            let result = softmax::<f64, false>(&mut row, None);
            assert!(result.lse.is_nan() || result.lse == f64::INFINITY, "{result:?}");
            assert!((row[1] / result.total).is_nan());
        }
        let mut only_nan = [f64::NAN, f64::NEG_INFINITY];
        assert!(softmax::<f64, false>(&mut only_nan, None).lse.is_nan());
    }
}
