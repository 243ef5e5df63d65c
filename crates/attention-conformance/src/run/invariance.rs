//! What must not change a single bit: repetition, a new plan, the number of threads, the rest of the batch.

use attention_core::{AttentionBackend, BackwardInputs, CallData, Inputs, Plan, Role, View};

use super::call::Invocation;
use super::{Results, Stop};
use crate::cases::Case;
use crate::suite::Subject;
use crate::tensor::{HostTensor, unravel};

/// The same call again: of the plan that gave the results, of a new one, and on the same backend in its other
/// configurations.
pub(super) fn repeated(
    subject: &Subject<'_>,
    plan: &dyn Plan,
    invocation: &Invocation<'_>,
    results: &Results,
) -> Result<(), Stop> {
    same(results, &invocation.run_on(plan)?, "repeated")?;
    same(results, &invocation.run(subject.backend)?, "planned again")?;
    for (label, other) in &subject.same {
        same(results, &invocation.run(*other)?, &format!("with {label}"))?;
    }
    Ok(())
}

pub(super) fn same(results: &Results, again: &Results, how: &str) -> Result<(), Stop> {
    for ((role, first), (_, second)) in results.iter().zip(again.iter()) {
        if let Some(index) = first_difference(&first.bits(), first, &second.bits(), second) {
            let at = unravel(index, &first.desc().shape());
            let (a, b) = (first.values()[index], second.values()[index]);
            return Err(Stop::failed(format!(
                "{role}{at:?} differs when the call is {how}: {a:e}, then {b:e}"
            )));
        }
    }
    Ok(())
}

/// Two NaNs are the same, whatever their bits.
fn first_difference(a: &[u64], first: &HostTensor, b: &[u64], second: &HostTensor) -> Option<usize> {
    let differ = (0..a.len()).filter(|&index| a[index] != b[index]);
    let both_nan = |index: usize| first.values()[index].is_nan() && second.values()[index].is_nan();
    differ.into_iter().find(|&index| !both_nan(index))
}

/// Each batch row alone gives the bits that it gives in the batch. Of sequences that are batch rows.
pub(crate) fn batch_rows_alone(
    backend: &dyn AttentionBackend,
    case: &Case,
    invocation: &Invocation<'_>,
    results: &Results,
) -> Result<(), Stop> {
    let batch = case.dims.batch;
    // The dropout stream counts batch rows, so only the first one keeps its bits.
    let rows = if case.options.dropout.is_some() { batch.min(1) } else { batch };
    if batch < 2 {
        return Ok(());
    }
    for row in 0..rows {
        let inputs = row_of_inputs(&invocation.inputs, row);
        let saved = invocation.saved.map(|saved| BackwardInputs {
            out: alone(saved.out, row),
            lse: alone(saved.lse, row),
            d_out: alone(saved.d_out, row),
            d_lse: saved.d_lse.map(|d_lse| alone(d_lse, row)),
        });
        let problem = case.problem_of_row(&inputs, saved.as_ref(), invocation.problem);
        let problem = problem.map_err(|error| Stop::failed(format!("batch row {row} alone: {error}")))?;
        let part = Invocation { problem: &problem, inputs, saved, layouts: None }.run(backend)?;
        for (role, tensor) in part.iter() {
            let whole = results.get(role).expect("the same outputs");
            if is_summed_over_batch(role, whole, batch) {
                continue;
            }
            let count = tensor.desc().element_count().unwrap_or(0);
            let (bits, values) = (whole.bits(), whole.values());
            let alone = (tensor.bits(), tensor.values());
            for index in 0..count {
                let in_batch = row * count + index;
                let both_nan = values[in_batch].is_nan() && alone.1[index].is_nan();
                if bits[in_batch] != alone.0[index] && !both_nan {
                    let at = unravel(in_batch, &whole.desc().shape());
                    return Err(Stop::failed(format!(
                        "{role}{at:?} is {:e} in the batch and {:e} with batch row {row} alone",
                        values[in_batch], alone.1[index]
                    )));
                }
            }
        }
    }
    Ok(())
}

/// Gradients of tensors that all batch rows share are sums over them.
pub(super) fn is_summed_over_batch(role: Role, whole: &HostTensor, batch: usize) -> bool {
    role == Role::DSinks || (role == Role::DBias && whole.desc().shape()[0] != batch)
}

fn row_of_inputs<'a>(inputs: &Inputs<'a>, row: usize) -> Inputs<'a> {
    let broadcast = |view: View<'a>| {
        let has_batch = view.shape().rank() == 4 && view.shape()[0] > 1;
        if has_batch { alone(view, row) } else { view }
    };
    let by_batch_row = |view: View<'a>| if view.shape().rank() == 2 { alone(view, row) } else { view };
    let data = inputs.data;
    Inputs {
        query: alone(inputs.query, row),
        key: alone(inputs.key, row),
        value: alone(inputs.value, row),
        mask: inputs.mask.map(broadcast),
        bias: inputs.bias.map(broadcast),
        alibi_slopes: inputs.alibi_slopes.map(by_batch_row),
        sinks: inputs.sinks,
        data: CallData {
            query_offsets: data.query_offsets.map(|offsets| alone(offsets, row)),
            query_lengths: data.query_lengths.map(|lengths| alone(lengths, row)),
            key_value_lengths: data.key_value_lengths.map(|lengths| alone(lengths, row)),
            key_scales: data.key_scales.map(by_batch_row),
            value_scales: data.value_scales.map(by_batch_row),
            ..data
        },
    }
}

fn alone(view: View<'_>, row: usize) -> View<'_> {
    view.narrow(0, row..row + 1).expect("the row is in the batch")
}
