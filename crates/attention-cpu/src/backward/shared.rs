//! What the tasks of the backward pass share, and what a task over a key/value head writes.

use attention_core::{BackwardInputs, CallProblem, HostView, HostViewMut, Inputs, Scalar, View};

use crate::bias::AnyFloat;
use crate::logits::Terms;
use crate::operand::Operand;
use crate::variants::Runs;

/// Everything that the tasks of a call share.
pub(super) struct Shared<'a, E: Operand> {
    pub(super) problem: &'a CallProblem<'a>,
    pub(super) query: HostView<'a, E::Element>,
    pub(super) key: HostView<'a, E::Element>,
    pub(super) value: HostView<'a, E::Element>,
    pub(super) out: HostView<'a, E::Element>,
    pub(super) d_out: HostView<'a, E::Element>,
    pub(super) lse: HostView<'a, E::Statistics>,
    pub(super) d_lse: Option<HostView<'a, E::Statistics>>,
    pub(super) terms: Terms<'a, E::Compute>,
    pub(super) sinks: Option<AnyFloat<'a>>,
    pub(super) runs: &'a Runs,
}

/// One key/value head of one batch row, with the gradients it writes.
pub(super) struct Task<'a, T> {
    pub(super) batch: usize,
    pub(super) key_head: usize,
    /// `[T, H]` for each query head of the group.
    pub(super) dq: Vec<HostViewMut<'a, T>>,
    /// `[S, H]`.
    pub(super) dk: Option<HostViewMut<'a, T>>,
    /// `[S, Hv]`.
    pub(super) dv: Option<HostViewMut<'a, T>>,
}

impl<'a, E: Operand> Shared<'a, E> {
    pub(super) fn new(
        problem: &'a CallProblem<'a>,
        inputs: &Inputs<'a>,
        saved: &BackwardInputs<'a>,
        runs: &'a Runs,
    ) -> Self {
        fn host<'a, T: Scalar>(view: View<'a>) -> HostView<'a, T> {
            view.host()
                .unwrap_or_else(|| unreachable!("a checked call has tensors of its dtypes in host memory"))
        }
        Self {
            problem,
            query: host(inputs.query),
            key: host(inputs.key),
            value: host(inputs.value),
            out: host(saved.out),
            d_out: host(saved.d_out),
            lse: host(saved.lse),
            d_lse: saved.d_lse.map(host),
            terms: Terms::new(problem, inputs, runs),
            sinks: inputs.sinks.map(|sinks| AnyFloat::new(sinks, problem.dtype().accumulator())),
            runs,
        }
    }
}
