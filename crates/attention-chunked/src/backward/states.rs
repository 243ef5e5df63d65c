//! What the forward pass left of each query row, and the gradient of the sinks, which takes nothing else.

use attention_core::{BackwardInputs, Inputs, Problem, ViewMut};
use attention_threads::Team;

use crate::scratch::Pieces;
use crate::tensor::{Floats, SharedOutput};
use crate::workers;

/// Rows whose states are computed by one task.
const TASK_ROWS: usize = 256;

/// A shared pointer to states that tasks write different parts of.
struct Parts(*mut [f64; 2]);

// SAFETY: tasks write through it to different elements.
unsafe impl Sync for Parts {}

impl Parts {
    /// # Safety
    /// The element is inside the memory, and no other thread uses it.
    unsafe fn write(&self, index: usize, state: [f64; 2]) {
        // SAFETY: the caller's.
        unsafe { self.0.add(index).write(state) };
    }
}

/// Computes the logsumexp of base two and `<d_out, out> - d_lse` of every query row, `[B, N, T]`, in f64: the
/// product is subtracted from numbers that it nearly equals.
pub(crate) fn compute<'m>(
    problem: &Problem,
    saved: &BackwardInputs<'_>,
    memory: &'m mut [u8],
    team: &Team,
) -> &'m [[f64; 2]] {
    let dims = problem.dims();
    let total = dims.batch * dims.query_heads * dims.query_length;
    let states: &mut [[f64; 2]] = Pieces::of(memory).take(total);
    let (out, d_out, lse) = (Floats::new(saved.out), Floats::new(saved.d_out), Floats::new(saved.lse));
    let d_lse = saved.d_lse.map(Floats::new);
    let parts = Parts(states.as_mut_ptr());
    workers::run(total.div_ceil(TASK_ROWS), team, &mut [], 0, |task, _| {
        for index in task * TASK_ROWS..total.min((task + 1) * TASK_ROWS) {
            let (row, query) = (index / dims.query_length, index % dims.query_length);
            let (batch, head) = (row / dims.query_heads, row % dims.query_heads);
            let at = [batch, query, head];
            let is_real = query < problem.query_len(batch);
            let natural: f64 = if is_real { lse.at(&at) } else { f64::NEG_INFINITY };
            let state = if natural == f64::NEG_INFINITY {
                // Nothing is attended to, and whatever the gradients hold does not matter.
                [natural, 0.0]
            } else {
                let d_lse = d_lse.as_ref().map_or(0.0, |d_lse| d_lse.at(&at));
                [natural * std::f64::consts::LOG2_E, out.dot(&d_out, at) - d_lse]
            };
            // SAFETY: tasks have different indices, below `total`.
            unsafe { parts.write(index, state) };
        }
    });
    states
}

/// `dsink[n] = -sum over rows of exp(sink - lse) (<d_out, out> - d_lse)`: the sink has no value, so the derivative
/// of the softmax leaves only the row term.
pub(crate) fn sink_gradient(
    problem: &Problem,
    inputs: &Inputs<'_>,
    states: &[[f64; 2]],
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
        // Without query rows, of any number of batch rows.
        for batch in 0..if dims.query_length > 0 { dims.batch } else { 0 } {
            let first = (batch * dims.query_heads + head) * dims.query_length;
            for [lse, delta] in &states[first..first + dims.query_length] {
                if *lse != f64::NEG_INFINITY {
                    sum -= (sink - lse * std::f64::consts::LN_2).exp() * delta;
                }
            }
        }
        // SAFETY: no other thread writes.
        unsafe { dsinks.write([head, 0, 0, 0], sum) };
    }
}
