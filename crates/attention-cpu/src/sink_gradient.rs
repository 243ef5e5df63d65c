//! The gradient of the sinks: `dsink[n] = -sum over rows of exp(sink - lse) (<d_out, out> - d_lse)`.
//!
//! The sink has no value, so the derivative of the softmax leaves only the row term.

use attention_core::{DType, HostViewMut, Scalar, ViewMut};
use half::{bf16, f16};

use crate::backward::Shared;
use crate::elementary::Compute;
use crate::operand::Operand;

pub(crate) fn run<E: Operand>(shared: &Shared<'_, E>, dsinks: ViewMut<'_>) {
    match dsinks.desc().dtype() {
        DType::F64 => write::<E, f64>(shared, dsinks.host_mut()),
        DType::F32 => write::<E, f32>(shared, dsinks.host_mut()),
        DType::F16 => write::<E, f16>(shared, dsinks.host_mut()),
        DType::Bf16 => write::<E, bf16>(shared, dsinks.host_mut()),
        dtype => unreachable!("a checked call has sinks of a float dtype, got {dtype}"),
    }
}

fn write<E: Operand, T: Scalar>(shared: &Shared<'_, E>, dsinks: Option<HostViewMut<'_, T>>) {
    let (Some(mut dsinks), Some(sinks)) = (dsinks, &shared.sinks) else {
        unreachable!("a checked call has sinks and their gradient in host memory")
    };
    let dims = shared.problem.dims();
    for head in 0..dims.query_heads {
        let sink: f64 = sinks.at(&[head]);
        let mut sum = 0.0;
        // Without query rows, of any number of batch rows.
        // And a sink of -inf is no sink: no row has a gradient through it, whatever its own are.
        for batch in 0..if dims.query_length > 0 && sink != f64::NEG_INFINITY { dims.batch } else { 0 } {
            for query in 0..shared.problem.query_len(batch) {
                let state = shared.row_state(batch, head, query);
                if state.lse != E::Compute::NEG_INFINITY {
                    // A probability is at most 1; the given logsumexp was rounded. NaN passes the comparison.
                    let above = sink - state.lse.to_f64();
                    let p = if above > 0.0 { 1.0 } else { above.exp() };
                    sum -= p * state.delta().to_f64();
                }
            }
        }
        dsinks.set(&[head], T::from_f64(sum));
    }
}
