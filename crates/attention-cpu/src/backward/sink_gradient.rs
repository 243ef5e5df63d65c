//! The gradient of the sinks: `dsink[n] = -sum over rows of exp(sink - lse) (<d_out, out> - d_lse)`.
//!
//! The sink has no value, so the derivative of the softmax leaves only the row term.

use attention_core::{DType, Scalar, ViewMut};
use attention_threads::Team;
use half::{bf16, f16};

use super::pieces::{Scratch, Sizes};
use super::shared::Shared;
use crate::operand::Operand;
use crate::{cut, workers};

/// The size of a logsumexp up to which its rounding does no harm: relative to the probability of a sink, it
/// is half a unit in the last place of the logsumexp, at 128 as much as 64 roundings.
const LARGEST_EXACT: f64 = 128.0;

pub(super) fn run<E: Operand>(
    shared: &Shared<'_, E>,
    small: &Shared<'_, E::Small>,
    sizes: &Sizes,
    dsinks: ViewMut<'_>,
    team: &Team,
    scratch: &mut [u8],
) {
    shared.runs.dsinks_as.count(dsinks.desc().dtype());
    let batch = shared.problem.dims().batch;
    let tasks = dsinks.into_chunks(0, 1).enumerate();
    workers::run(team, sizes.workers, tasks, scratch, sizes.bytes_per_worker, |(head, view), scratch| {
        let mut sum = 0.0;
        for batch in shared.problem.sequences_with_queries(0..batch) {
            sum += if cut::is_small::<E>(shared.problem, batch) {
                small.sink_gradient(batch, head, || Scratch::carve(&sizes.small_pieces, scratch))
            } else {
                shared.sink_gradient(batch, head, || Scratch::carve(&sizes.pieces, scratch))
            };
        }
        write_one(view, sum);
    });
}

/// Writes a number, rounded.
fn write_one(view: ViewMut<'_>, number: f64) {
    fn typed<T: Scalar>(view: ViewMut<'_>, number: f64) {
        let Some(mut view) = view.host_mut::<T>() else {
            unreachable!("a checked call has the gradient in host memory")
        };
        view.set(&[0], T::from_f64(number));
    }
    match view.desc().dtype() {
        DType::F64 => typed::<f64>(view, number),
        DType::F32 => typed::<f32>(view, number),
        DType::F16 => typed::<f16>(view, number),
        DType::Bf16 => typed::<bf16>(view, number),
        dtype => unreachable!("a checked call has sinks of a float dtype, got {dtype}"),
    }
}

impl<E: Operand> Shared<'_, E> {
    /// What the rows of a head of one batch row contribute.
    fn sink_gradient<'s>(
        &self,
        batch: usize,
        head: usize,
        scratch: impl FnOnce() -> Scratch<'s, E::Compute>,
    ) -> f64 {
        let Some(sink) = self.sinks.as_ref().map(|sinks| sinks.at::<f64>(&[head])) else {
            unreachable!("a checked call with this gradient has sinks")
        };
        if sink == f64::NEG_INFINITY {
            // No sink: no row has a gradient through it, whatever its own are.
            return 0.0;
        }
        let places = self.problem.query_places(batch);
        let mut sum = 0.0;
        let (mut by_sum, mut by_lse) = (false, false);
        let (mut carve, mut carved) = (Some(scratch), None);
        for query in 0..self.problem.query_len(batch) {
            let state = self.row_state(&places, head, query);
            let lse = state.lse.to_f64();
            if lse == f64::NEG_INFINITY {
                continue;
            }
            let own = if lse.is_finite() && lse.abs() > LARGEST_EXACT {
                if let Some(carve) = carve.take() {
                    carved = Some(carve());
                }
                carved.as_mut().and_then(|scratch| self.own_sink(batch, head, query, &state, scratch))
            } else {
                None
            };
            by_sum |= own.is_some();
            by_lse |= own.is_none();
            // A probability is at most 1. NaN passes the comparison.
            let above = sink - lse;
            let p = own.unwrap_or(if above > 0.0 { 1.0 } else { above.exp() });
            sum -= p * state.delta().to_f64();
        }
        let runs = E::runs(self.runs);
        if by_sum {
            runs.sink_by_sum.count();
        }
        if by_lse {
            runs.sink_by_lse.count();
        }
        sum
    }
}
