//! Large logits: which problems may have them, and where the row maxima and sums of their rows are in
//! scratch.

use attention_core::{Alignment, CallProblem, Problem, Role};
use attention_cuda::parameters::{Parameters, ScratchAddresses};

/// Whether bias or ALiBi may make logits so large that no significant digits are left: in forward, those of
/// cuDNN's exponents, in backward, those of the logsumexp. A bias may do this, and so may slopes if there may
/// be no key at a row's own position.
pub(crate) fn may_be_large(problem: &Problem) -> bool {
    let has_own_keys = || {
        let sequence = CallProblem::at_bounds(problem).sequence(0);
        let (offset, rows) = (i128::from(sequence.offset()), sequence.queries() as i128);
        offset >= 0 && offset + rows <= sequence.keys() as i128
    };
    // Shorter query lengths need no case of their own: their rows are at the same keys as the first rows of
    // the full length (top-left) or as its last ones (bottom-right).
    let varies = problem.has(Role::KeyValueLengths)
        || !matches!(problem.alignment(), Alignment::TopLeft | Alignment::BottomRight);
    problem.has(Role::Bias) || (problem.has(Role::AlibiSlopes) && (varies || !has_own_keys()))
}

/// The logsumexp from which a row counts as far: the value of `FAR` that the kernels have for f16 and bf16,
/// where the reason for it is given.
pub(crate) const FAR: f32 = 1024.0;

/// How many floats of scratch [`FarRows`](crate::far::FarRows) takes: per row an offset, one that is not
/// used, and a score; then one per head (`gradients.cuh`). `None` on overflow.
pub(crate) fn numbers(problem: &Problem) -> Option<usize> {
    let dims = problem.dims();
    let of_head = dims.query_length.checked_mul(3)?.checked_add(1)?;
    dims.batch.checked_mul(dims.query_heads)?.checked_mul(of_head)
}

/// The addresses of these floats if they begin at `start`: of the offsets, of the scores, and of those per
/// head.
pub(crate) fn places(problem: &Problem, start: u64) -> [u64; 3] {
    let dims = problem.dims();
    let rows = 4 * (dims.batch * dims.query_heads * dims.query_length) as u64;
    [start, start + 2 * rows, start + 3 * rows]
}

/// Gives the addresses of these floats to a kernel.
pub(crate) fn set(parameters: &mut Parameters, problem: &Problem, start: u64) {
    let [offsets, scores, _] = places(problem, start);
    // The kernels read the row sums of backward (`deltas`) from in front of the scores.
    let deltas = offsets + (scores - offsets) / 2;
    parameters.set_scratch(ScratchAddresses::Rows { offsets, deltas });
}

#[cfg(test)]
mod tests {
    use attention_core::{DType, Device, Gradients, TensorDesc};

    use super::*;

    #[test]
    fn numbers_of_rows_and_heads_follow_each_other() {
        let desc = TensorDesc::contiguous(DType::Bf16, [2, 5, 3, 8]);
        let builder = Problem::builder(desc, desc, desc).device(Device::Cuda(0));
        let problem = builder.gradients(Gradients::QKV).build().expect("valid");
        assert_eq!(places(&problem, 64), [64, 64 + 4 * 60, 64 + 4 * 90]);
        assert_eq!(numbers(&problem), Some(96));
    }
}
