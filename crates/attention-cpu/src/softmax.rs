//! The softmax of a row, and its dropout.

use attention_core::{CallProblem, DropoutStream};

use crate::bias::AnyFloat;
use crate::elementary::Compute;
use crate::logits::{Rows, Terms};
use crate::packed::Columns;
use crate::simd::Kernel;

/// Independent accumulators of a reduction: enough for four vectors of the widest kind.
const LANES: usize = 4 * GROUP;

/// Accumulators in one array. The compiler unrolls a loop over 16 and keeps the array in registers; one of 64
/// stays in memory, where each step waits for the stores of the step before.
const GROUP: usize = 16;

/// Reduces a row with [`LANES`] accumulators, in an order that depends on its length alone.
#[inline(always)]
fn reduce<C: Compute>(row: &[C], start: C, combine: impl Fn(C, C) -> C) -> C {
    let (mut first, mut second, mut third, mut fourth) =
        ([start; GROUP], [start; GROUP], [start; GROUP], [start; GROUP]);
    let (chunks, tail) = row.as_chunks::<LANES>();
    for chunk in chunks {
        for lane in 0..GROUP {
            first[lane] = combine(first[lane], chunk[lane]);
        }
        for lane in 0..GROUP {
            second[lane] = combine(second[lane], chunk[GROUP + lane]);
        }
        for lane in 0..GROUP {
            third[lane] = combine(third[lane], chunk[2 * GROUP + lane]);
        }
        for lane in 0..GROUP {
            fourth[lane] = combine(fourth[lane], chunk[3 * GROUP + lane]);
        }
    }
    let mut lanes = [start; LANES];
    for (lanes, group) in lanes.chunks_exact_mut(GROUP).zip([first, second, third, fourth]) {
        lanes.copy_from_slice(&group);
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

/// The mean of `values` with these weights and one more of value 0, computed in f64.
///
/// Divided by the sum of the weights, which is 1 but for their rounding, so that values that are all alike
/// have this mean: it is subtracted from them.
#[inline(always)]
pub(crate) fn mean<C: Compute>(weights: &[C], values: &[C], of_zero: C) -> C {
    let (mut totals, mut sums) = ([0.0f64; GROUP], [0.0f64; GROUP]);
    let (chunks, tail) = weights.as_chunks::<GROUP>();
    let (chunks_of_values, tail_of_values) = values.as_chunks::<GROUP>();
    // One loop each: the compiler makes no vectors of both in one.
    for weights in chunks {
        for lane in 0..GROUP {
            totals[lane] += weights[lane].to_f64();
        }
    }
    for (weights, values) in chunks.iter().zip(chunks_of_values) {
        for lane in 0..GROUP {
            sums[lane] += weights[lane].to_f64() * values[lane].to_f64();
        }
    }
    let (mut total, mut sum) = (of_zero.to_f64(), 0.0);
    for lane in 0..GROUP {
        total += totals[lane];
        sum += sums[lane];
    }
    for (weight, value) in tail.iter().zip(tail_of_values) {
        total += weight.to_f64();
        sum += weight.to_f64() * value.to_f64();
    }
    C::from_f64(sum / total)
}

/// What a row of logits comes to.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RowSoftmax<C> {
    /// What unnormalised probabilities are divided by: the sum of `exp(x - max)`, and 1 for a row without
    /// keys.
    pub(crate) total: C,
    /// The logsumexp; -inf for a row without keys or sink.
    pub(crate) lse: C,
    /// The part of the total that is the sink's.
    pub(crate) sink: C,
}

/// Turns logits into unnormalised probabilities `exp(x - max)`, [`Compute::DISALLOWED`] where `x` is -inf.
#[inline(always)]
pub(crate) fn softmax<C: Compute, const FMA: bool>(row: &mut [C], sink: Option<C>) -> RowSoftmax<C> {
    // NaN loses every comparison here and returns with the exponentials.
    let max = reduce(row, C::NEG_INFINITY, |a, b| if b > a { b } else { a });
    let sink = sink.filter(|&sink| sink != C::NEG_INFINITY);
    // A row without keys has weight 0 beside any sink; with a NaN among the logits the maximum may be -inf
    // too.
    let max = sink.map_or(max, |sink| if max > sink { max } else { sink });
    let shift = if max == C::NEG_INFINITY { C::ZERO } else { max };
    exponentials::<C, FMA>(row, shift);
    let keys = sum(row);
    let sink = sink.map_or(C::ZERO, |sink| (sink - shift).exp_lane::<FMA>());
    let total = keys + sink;
    if total == C::ZERO {
        return RowSoftmax { total: C::ONE, lse: C::NEG_INFINITY, sink };
    }
    RowSoftmax { total, lse: shift + total.ln(), sink }
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
    pub(crate) fn new(problem: &CallProblem<'_>, batch: usize, head: usize, query: usize) -> Option<Self> {
        let stream = problem.dropout_stream()?;
        // The problem checked that all counters fit.
        let batch_head = (batch * problem.dims().query_heads + head) as u32;
        Some(Self { stream, keep_scale: C::from_f64(stream.keep_scale()), batch_head, query: query as u32 })
    }

    /// Calls `visit(column, factor)` for the columns that stand for keys: 0 where the key is dropped, else
    /// the scale of kept probabilities.
    pub(crate) fn for_each(&self, columns: &Columns, keys: usize, mut visit: impl FnMut(usize, C)) {
        let range = columns.start..(columns.start + columns.count).min(keys);
        self.stream.for_each(self.batch_head, self.query, range, |key, keep| {
            visit(key - columns.start, if keep { self.keep_scale } else { C::ZERO });
        });
    }

    /// Drops and scales the probabilities of a row. A disallowed one stays so: negative zero times a factor
    /// that is not negative.
    pub(crate) fn apply(&self, columns: &Columns, keys: usize, row: &mut [C]) {
        self.for_each(columns, keys, |column, factor| row[column] *= factor);
    }
}

/// The softmax of the rows of a block, from products to unnormalised weights.
pub(crate) struct SoftmaxRows<'b, 'a, C> {
    pub(crate) terms: &'b Terms<'a, C>,
    pub(crate) sinks: Option<&'b AnyFloat<'a>>,
    pub(crate) rows: &'b Rows,
    pub(crate) columns: &'b Columns,
    /// Rows some distance apart.
    pub(crate) logits: &'b mut [C],
    pub(crate) stride: usize,
    /// With a softcap, receives the soft-capped products, as far apart.
    pub(crate) capped: Option<&'b mut [C]>,
}

impl<C: Compute> Kernel for SoftmaxRows<'_, '_, C> {
    type Output = Vec<RowSoftmax<C>>;

    #[inline(always)]
    fn run<const FMA: bool>(self) -> Self::Output {
        let Self { terms, sinks, rows, columns, logits, stride, mut capped } = self;
        let mut results = Vec::with_capacity(rows.len());
        let sequence = terms.problem.sequence(rows.batch);
        for (index, (head, query)) in rows.iter().enumerate() {
            let at = index * stride;
            let row = &mut logits[at..][..columns.count];
            let capped = capped.as_deref_mut().map(|capped| &mut capped[at..][..columns.count]);
            terms.apply::<FMA>((rows.batch, &sequence), (head, query), columns, row, capped);
            results.push(softmax::<_, FMA>(row, sinks.map(|sinks| sinks.at(&[head]))));
        }
        results
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

    /// 1000 weights of 1/1000 add up to 1 but for their rounding.
    #[test]
    fn the_mean_of_values_that_are_alike_is_their_value() {
        for count in [1usize, 15, 16, 17, 1000] {
            let weights = vec![1.0 / count as f32; count];
            for value in [0.1f32, -3.7e20, 1e-30] {
                assert_eq!(mean(&weights, &vec![value; count], 0.0), value, "{count}");
                let half = mean(&weights, &vec![value; count], 1.0);
                assert!((half - value / 2.0).abs() <= 1e-6 * value.abs(), "{count}");
            }
        }
        assert!(mean(&[0.5f32, f32::NAN], &[1.0, 2.0], 0.0).is_nan());
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
