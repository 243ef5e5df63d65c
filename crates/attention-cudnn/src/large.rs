//! Rows of large logits: which problems may have them, and where their maxima and sums are in scratch.

use attention_core::{Alignment, CallProblem, Problem, Role};
use attention_cuda::parameters::{Parameters, ScratchAddresses};

/// Whether what is added to products may make logits so large that cuDNN's exponents have no digits left, in
/// forward, or the logsumexp none, in backward: a bias, or slopes where a row's own position may have no key.
pub(crate) fn may_be_large(problem: &Problem) -> bool {
    let has_own_keys = || {
        let sequence = CallProblem::at_bounds(problem).sequence(0);
        let (offset, rows) = (i128::from(sequence.offset()), sequence.queries() as i128);
        offset >= 0 && offset + rows <= sequence.keys() as i128
    };
    // Fewer rows are at the same keys as the first of all rows, or as the last.
    let varies = problem.has(Role::KeyValueLengths)
        || !matches!(problem.alignment(), Alignment::TopLeft | Alignment::BottomRight);
    problem.has(Role::Bias) || (problem.has(Role::AlibiSlopes) && (varies || !has_own_keys()))
}

/// `FAR` of the kernels, for halves: the logsumexp from which a row counts as large.
pub(crate) const FAR: f32 = 1024.0;

/// Numbers that [`FarRows`](crate::far::FarRows) leaves: an offset, one that is not used, and a score of each
/// row, then one for each head (`gradients.cuh`).
pub(crate) fn numbers(problem: &Problem) -> Option<usize> {
    let dims = problem.dims();
    let of_head = dims.query_length.checked_mul(3)?.checked_add(1)?;
    dims.batch.checked_mul(dims.query_heads)?.checked_mul(of_head)
}

/// The addresses of these numbers, which begin here: offsets, scores, and those of heads.
pub(crate) fn places(problem: &Problem, start: u64) -> [u64; 3] {
    let dims = problem.dims();
    let rows = 4 * (dims.batch * dims.query_heads * dims.query_length) as u64;
    [start, start + 2 * rows, start + 3 * rows]
}

/// Tells kernels where the numbers are.
pub(crate) fn set(parameters: &mut Parameters, problem: &Problem, start: u64) {
    let [offsets, scores, _] = places(problem, start);
    // The kernels expect row terms in front of the scores.
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
