//! The end of a row: its value is divided by the sum of its weights, and the logsumexp is taken.

use attention_core::merge::RunningSoftmax;

use super::call::{Forward, Outputs};
use super::layout::Scratch;
use crate::cut::Rows;
use crate::engine::Engine;
use crate::float::Float;
use crate::simd::{Kernel, Simd};

impl<'a, E: Engine> Forward<'a, E> {
    /// Normalises the rows and writes them.
    ///
    /// # Safety
    /// No other thread writes these rows of the outputs.
    pub(super) unsafe fn finish(&self, rows: &Rows, outputs: &Outputs<'a>, scratch: &mut Scratch<'_, E>) {
        self.engine.simd().vectorize(Finish { forward: self, rows, outputs, scratch });
    }
}

struct Finish<'s, 'o, 'a, 'm, E: Engine> {
    forward: &'s Forward<'a, E>,
    rows: &'s Rows,
    outputs: &'s Outputs<'o>,
    scratch: &'s mut Scratch<'m, E>,
}

impl<E: Engine> Kernel for Finish<'_, '_, '_, '_, E> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        let Self { forward, rows, outputs, scratch } = self;
        let width = forward.layout.value_head_dim;
        let stride = E::sum_stride(width);
        let index = rows.query_index(forward.problem);
        for row in 0..rows.len() {
            let [outer, inner, head] = index(row);
            let sink = forward.sinks.as_ref().map(|sinks| sinks.at(&[head]));
            let values = &mut scratch.out[row * stride..][..width];
            let lse = normalise(scratch.shifts[row], scratch.sums[row], forward.terms.unit(), sink, values);
            // SAFETY: `Forward::finish` alone makes this kernel, and its caller guarantees that no other
            // thread writes these rows of the outputs.
            unsafe {
                outputs.out.write_row([outer, inner, head], values, forward.value_scale);
                if let Some(to) = &outputs.lse {
                    to.write([outer, inner, head, 0], lse);
                }
            }
        }
    }
}

/// Divides the value of a row by the sum of its weights and its sink's, and gives the logsumexp. The shift is
/// in units of the call, of size `unit`; the sink and the logsumexp are natural.
#[inline(always)]
pub(super) fn normalise<F: Float>(shift: F, sum: F, unit: F, sink: Option<F>, values: &mut [F]) -> F {
    let max = shift * unit;
    let mut running = RunningSoftmax { max, sum };
    let mut factor = F::ONE;
    if let Some(sink) = sink.filter(|&sink| sink != F::NEG_INFINITY) {
        factor = running.merge(RunningSoftmax::of(sink)).old;
    }
    if running.sum == F::ZERO {
        values.fill(F::ZERO);
        return F::NEG_INFINITY;
    }
    let is_nan = running.sum.partial_cmp(&F::ZERO).is_none();
    // The sum without the sink's scale; a row of keys that are nothing beside the sink has factor 0.
    let total = running.sum / factor;
    if factor == F::ZERO && !is_nan {
        values.fill(F::ZERO);
    } else {
        for value in values.iter_mut() {
            *value = *value / total;
        }
    }
    // The shift may have missed a NaN, the sum cannot.
    if is_nan {
        running.sum
    } else if running.max == max {
        shift.fused(unit, running.sum.ln())
    } else {
        running.lse()
    }
}
