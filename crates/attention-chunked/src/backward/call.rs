//! A call of the backward pass: what its tasks share, and what they write.

use attention_core::{BackwardInputs, CallProblem, Inputs};

use super::gradient::RowState;
use super::layout::Layout;
use super::states::{State, state_index};
use crate::cut::Rows;
use crate::engine::Engine;
use crate::logits::Terms;
use crate::paths::Taken;
use crate::tensor::{Floats, SharedOutput};

/// Everything that the tasks of a call share.
pub(super) struct Backward<'a, E: Engine> {
    pub(super) engine: E,
    pub(super) problem: &'a CallProblem<'a>,
    pub(super) query: Floats<'a>,
    pub(super) key: Floats<'a>,
    pub(super) value: Floats<'a>,
    pub(super) d_out: Floats<'a>,
    pub(super) terms: Terms<'a, E::F>,
    /// Of every query row, [by its place](super::states::state_index).
    pub(super) states: &'a [State],
    pub(super) layout: Layout,
    pub(super) taken: &'a Taken,
}

/// The gradients of query, key and value that a call writes.
pub(super) struct Outputs<'a> {
    pub(super) dq: Option<SharedOutput<'a>>,
    pub(super) dk: Option<SharedOutput<'a>>,
    pub(super) dv: Option<SharedOutput<'a>>,
}

impl<'a, E: Engine> Backward<'a, E> {
    /// With the layout that the tasks of a call are planned for.
    pub(super) fn new(
        engine: E,
        problem: &'a CallProblem<'a>,
        inputs: &Inputs<'a>,
        saved: &BackwardInputs<'a>,
        states: &'a [State],
        layout: Layout,
        taken: &'a Taken,
    ) -> Self {
        Self {
            engine,
            problem,
            query: Floats::new(inputs.query),
            key: Floats::new(inputs.key),
            value: Floats::new(inputs.value),
            d_out: Floats::new(saved.d_out),
            terms: Terms::new(problem, inputs),
            states,
            layout,
            taken,
        }
    }

    /// The state of the query row at an index of the tensor of queries.
    pub(super) fn state(&self, index: [usize; 3]) -> RowState<E::F> {
        RowState::of(self.states[state_index(self.problem, index)], self.terms.unit())
    }

    /// Every query row of a key/value head.
    pub(super) fn all_rows(&self, batch: usize, key_head: usize) -> Rows {
        let group = self.problem.dims().group_size();
        let heads = key_head * group..(key_head + 1) * group;
        Rows { batch, key_head, heads, queries: 0..self.problem.query_len(batch) }
    }
}
