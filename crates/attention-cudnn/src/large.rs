//! Rows of large logits: which problems may have them, and where their maxima and sums are in scratch.

use attention_core::{Problem, Role};
use attention_cuda::parameters::{Parameters, ScratchAddresses};

/// Whether what is added to products may make logits so large that cuDNN's exponents have no digits left, in
/// forward, or the logsumexp none, in backward: a bias, or slopes where a row's own position has no key.
pub(crate) fn may_be_large(problem: &Problem) -> bool {
    let has_own_key = |batch: usize| {
        let (offset, rows) = (i128::from(problem.offset(batch)), problem.query_len(batch) as i128);
        offset >= 0 && offset + rows <= problem.key_value_len(batch) as i128
    };
    let far = || !(0..problem.dims().batch).all(has_own_key);
    problem.has(Role::Bias) || (problem.has(Role::AlibiSlopes) && far())
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
