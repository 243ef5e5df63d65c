//! What probabilities of each query row are made of, and the gradient of the sinks, which takes nothing else.
//!
//! The forward pass left the logsumexp of a row. Its difference from a shift that a logit can be compared
//! with goes into a factor, the gain, so that nothing is rounded at the size of the logsumexp but the
//! logsumexp itself. Where that was rounded too far, which is where it is large, the sum of the keys at hand
//! takes its place ([`own`]).

mod own;

use std::sync::atomic::{AtomicBool, Ordering};

use attention_core::{BackwardInputs, CallProblem, DType, Inputs, Problem, ViewMut};
use attention_threads::Team;

use crate::cut;
use crate::float::Float;
use crate::scratch::Pieces;
use crate::tensor::{Floats, SharedOutput};
use crate::workers;

pub(super) use own::{Workers, replace};

/// Rows whose states are computed by one task.
const TASK_ROWS: usize = 256;

/// The shift, the logarithm of the gain and the row term of a query row, as
/// [`RowState`](super::gradient::RowState) has them.
pub(crate) type State = [f64; 3];

/// Which of the states is that of the query row at an index of the tensor of queries: `[B, N, T]`, or
/// `[1, N, total]` where queries are packed.
#[inline]
pub(crate) fn state_index(problem: &Problem, [outer, inner, head]: [usize; 3]) -> usize {
    (outer * problem.dims().query_heads + head) * cut::query_axes(problem)[1] + inner
}

/// Bytes of the states of all query rows; `None` on overflow.
pub(crate) fn bytes(problem: &Problem) -> Option<usize> {
    let [outer, inner] = cut::query_axes(problem);
    let rows = outer.checked_mul(problem.dims().query_heads)?.checked_mul(inner)?;
    let mut pieces = Pieces::counting();
    let _ = pieces.take::<State>(rows);
    pieces.bytes()
}

/// A shared pointer to states that tasks write different ones of.
#[derive(Clone, Copy)]
pub(crate) struct SharedStates<'m> {
    first: *mut State,
    count: usize,
    memory: std::marker::PhantomData<&'m mut [State]>,
}

// SAFETY: the pointer is that of an exclusive slice of plain data. Elements are reached through `update`
// only, whose caller guarantees that no other thread uses the element.
unsafe impl Sync for SharedStates<'_> {}

impl<'m> SharedStates<'m> {
    pub(crate) fn new(states: &'m mut [State]) -> Self {
        Self { first: states.as_mut_ptr(), count: states.len(), memory: std::marker::PhantomData }
    }

    /// Changes one state.
    ///
    /// # Safety
    /// No other thread uses this state.
    unsafe fn update(&self, index: usize, change: impl FnOnce(&mut State)) {
        assert!(index < self.count);
        // SAFETY: the index is below `count`, so the element is in the slice that `new` borrowed exclusively;
        // the caller guarantees that no other thread uses it.
        change(unsafe { &mut *self.first.add(index) });
    }
}

/// The largest logsumexp whose own rounding is no concern: relative to probabilities, it is up to half a unit
/// in the last place of the logsumexp. At 128 that is 64 roundings of a class with operands of the
/// logsumexp's own precision, half of what the products of a head of 128 are allowed; halves round
/// probabilities themselves, by more than all of it.
fn largest_exact(dtype: DType) -> f64 {
    match dtype {
        DType::F32 | DType::F64 => 128.0,
        _ => 1024.0,
    }
}

/// Whether a logsumexp that was stored has lost digits that matter.
fn has_lost_digits(dtype: DType, lse: f64) -> bool {
    lse.is_finite() && lse.abs() > largest_exact(dtype)
}

/// A natural logit in units of size `unit`, rounded to a shift that logits can be compared with: finite.
fn round_shift<F: Float>(natural: f64, unit: F) -> f64 {
    let largest = F::LARGEST.to_f64();
    F::from_f64((natural / unit.to_f64()).clamp(-largest, largest)).to_f64()
}

/// The shift that a logsumexp stands for, where logits come in units of size `unit`, and the logarithm of the
/// gain.
pub(crate) fn split<F: Float>(unit: F, lse: f64) -> [f64; 2] {
    if !lse.is_finite() {
        return [lse, 0.0];
    }
    let shift = round_shift(lse, unit);
    [shift, shift.mul_add(unit.to_f64(), -lse)]
}

/// Computes the [state](state_index) of every query row, with `split(batch, lse)` for shift and gain, and
/// `<d_out, out> - d_lse` in f64: the product is subtracted from numbers that it nearly equals. Says whether
/// there is a logsumexp that has lost digits.
pub(crate) fn compute<'m>(
    problem: &CallProblem<'_>,
    saved: &BackwardInputs<'_>,
    split: impl Fn(usize, f64) -> [f64; 2] + Sync,
    memory: &'m mut [u8],
    team: &Team,
) -> (&'m mut [State], bool) {
    let heads = problem.dims().query_heads;
    let [outer, length] = cut::query_axes(problem);
    let total = outer * heads * length;
    let states: &mut [State] = Pieces::of(memory).take(total);
    let (out, d_out, lse) = (Floats::new(saved.out), Floats::new(saved.d_out), Floats::new(saved.lse));
    let d_lse = saved.d_lse.map(Floats::new);
    let any_lost = AtomicBool::new(false);
    let shared = SharedStates::new(states);
    workers::run(total.div_ceil(TASK_ROWS), team, &mut [], 0, &|task, _| {
        let mut rows = task * TASK_ROWS..total.min((task + 1) * TASK_ROWS);
        while !rows.is_empty() {
            // Some rows of a sequence and head, or padding.
            let (row, inner) = (rows.start / length, rows.start % length);
            let (outer, head) = (row / heads, row % heads);
            let found = problem.query_at([outer, inner]);
            let left = found.map_or(length - inner, |(batch, query)| problem.query_len(batch) - query);
            let end = rows.end.min(rows.start + left);
            for (index, inner) in (rows.start..end).zip(inner..) {
                let at = [outer, inner, head];
                let mut new = [f64::NEG_INFINITY, 0.0, 0.0];
                if let Some((batch, _)) = found {
                    let natural: f64 = lse.at(&at);
                    // Else nothing is attended to, and whatever the gradients hold does not matter.
                    if natural != f64::NEG_INFINITY {
                        let d_lse = d_lse.as_ref().map_or(0.0, |d_lse| d_lse.at(&at));
                        let [shift, log_gain] = split(batch, natural);
                        new = [shift, log_gain, out.dot(&d_out, at) - d_lse];
                    }
                    if has_lost_digits(problem.dtype(), natural) {
                        any_lost.store(true, Ordering::Relaxed);
                    }
                }
                // SAFETY: each index belongs to one task, which runs once, so no other thread uses this
                // state.
                unsafe { shared.update(index, |state| *state = new) };
            }
            rows.start = end;
        }
    });
    (states, any_lost.into_inner())
}

/// `dsink[n] = -sum over rows of exp(sink - lse) (<d_out, out> - d_lse)`: the sink has no value, so the
/// derivative of the softmax leaves only the row term. `unit(batch)` is the size of the unit of the shifts.
pub(crate) fn sink_gradient(
    problem: &CallProblem<'_>,
    inputs: &Inputs<'_>,
    states: &[State],
    unit: impl Fn(usize) -> f64,
    dsinks: ViewMut<'_>,
) {
    let dims = problem.dims();
    let Some(sinks) = inputs.sinks.map(Floats::new) else {
        unreachable!("a checked call with this gradient has sinks")
    };
    let dsinks = SharedOutput::new(dsinks);
    for head in 0..dims.query_heads {
        let sink: f64 = sinks.at(&[head]);
        let mut sum = 0.0;
        // A sink of -inf is no sink: no row has a gradient through it, whatever its own are. Without query
        // rows there may be any number of batch rows.
        let batches = if sink == f64::NEG_INFINITY || dims.query_length == 0 { 0 } else { dims.batch };
        for batch in problem.sequences_with_queries(0..batches) {
            let [outer, inner] = problem.query_places(batch).of(0);
            let first = state_index(problem, [outer, inner, head]);
            let unit = unit(batch);
            for [shift, log_gain, delta] in &states[first..first + problem.query_len(batch)] {
                if *shift != f64::NEG_INFINITY {
                    sum -= sink_probability(sink, [*shift, *log_gain], unit) * delta;
                }
            }
        }
        // SAFETY: this function owns the output and runs on one thread, so no other thread writes it.
        unsafe { dsinks.write([head, 0, 0, 0], sum) };
    }
}

/// `exp(sink - lse)`, at most 1 but for NaN: the sink is in natural units, the shift in those of the call.
fn sink_probability(sink: f64, [shift, log_gain]: [f64; 2], unit: f64) -> f64 {
    let above = (-shift).mul_add(unit, sink) + log_gain;
    if above > 0.0 { 1.0 } else { above.exp() }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `gain e^(x - shift)` is `e^(x - lse)`, however the shift was rounded.
    #[test]
    fn a_shift_and_its_gain_are_the_logsumexp() {
        for lse in [0.0, 7.62, -88.3, 20.000_001, 1e4, 1.234_567_8e7, -3.3e38] {
            for unit in [1.0f32, 0.125, 0.1, 3.7] {
                let [shift, log_gain] = split(unit, lse);
                assert!(shift == f64::from(shift as f32) || shift.abs() > 3.4e38, "{lse} {unit}");
                let got = shift * f64::from(unit) - log_gain;
                assert!((got - lse).abs() <= 1e-15 * lse.abs(), "{lse} {unit}: {got}");
                // Only the rounding of the shift, but where no shift is as large.
                let is_held = lse.abs() / f64::from(unit) <= f64::from(f32::MAX);
                assert!(!is_held || log_gain.abs() <= 6.1e-8 * lse.abs(), "{lse} {unit}: {log_gain}");
            }
        }
        assert_eq!(split(1e-38f32, 7.0)[0], f64::from(f32::MAX));
        assert_eq!(split(0.5f32, f64::INFINITY), [f64::INFINITY, 0.0]);
        assert!(split(0.5f32, f64::NAN)[0].is_nan());
    }

    #[test]
    fn a_sink_has_at_most_probability_one() {
        assert_eq!(sink_probability(3e14, [3e14, 0.0], 1.0), 1.0);
        assert_eq!(sink_probability(f64::NEG_INFINITY, [0.0, 0.0], 1.0), 0.0);
        assert_eq!(sink_probability(1e300, [1.0, 0.0], 0.1), 1.0);
        assert!(sink_probability(f64::NAN, [0.0, 0.0], 1.0).is_nan());
        // A shift that cannot be as large as the sink.
        assert_eq!(sink_probability(f64::MAX, split(0.5f64, f64::MAX), 0.5), 1.0);
    }
}
