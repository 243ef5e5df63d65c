//! A call of the forward pass: what its tasks share, and what they write.

use attention_core::{CallProblem, ForwardOutputs, Inputs, Role, Scalar as _};

use super::decode::DecodeLayout;
use super::layout::Layout;
use crate::cut;
use crate::engine::Engine;
use crate::float::Float;
use crate::logits::Terms;
use crate::paths::Taken;
use crate::tensor::{Cached, Floats, SharedOutput};

/// Everything that the tasks of a call share.
#[derive(Clone)]
pub(super) struct Forward<'a, E: Engine> {
    pub(super) engine: E,
    pub(super) problem: &'a CallProblem<'a>,
    pub(super) query: Floats<'a>,
    pub(super) key: Cached<'a>,
    pub(super) value: Cached<'a>,
    /// What rows of the output are multiplied by once they are normalised.
    pub(super) value_scale: E::F,
    pub(super) sinks: Option<Floats<'a>>,
    pub(super) terms: Terms<'a, E::F>,
    pub(super) layout: Layout,
    pub(super) decode: DecodeLayout,
    pub(super) taken: &'a Taken,
}

/// What the tasks of a call write.
pub(super) struct Outputs<'a> {
    pub(super) out: SharedOutput<'a>,
    pub(super) lse: Option<SharedOutput<'a>>,
}

impl<'a> Outputs<'a> {
    /// Takes the outputs of a call and fills the rows that are padding or belong to no
    /// sequence: with 0 an output, with -inf a logsumexp.
    pub(super) fn new(problem: &CallProblem<'_>, outputs: ForwardOutputs<'a>) -> Self {
        let new = Self { out: SharedOutput::new(outputs.out), lse: outputs.lse.map(SharedOutput::new) };
        // SAFETY: this thread alone has the outputs, which tasks get only from the value returned.
        cut::for_each_padded_row(problem, |index| unsafe { new.empty_row(index) });
        new
    }

    /// # Safety
    /// No other thread writes this row.
    unsafe fn empty_row(&self, [outer, inner, head]: [usize; 3]) {
        // SAFETY: the caller guarantees that no other thread writes this row.
        unsafe {
            self.out.zero_row([outer, inner, head]);
            if let Some(lse) = &self.lse {
                lse.write([outer, inner, head, 0], f64::NEG_INFINITY);
            }
        }
    }
}

impl<'a, E: Engine> Forward<'a, E> {
    /// With the layouts that the tasks of a call are planned for.
    pub(super) fn new(
        engine: E,
        problem: &'a CallProblem<'a>,
        inputs: &Inputs<'a>,
        layout: Layout,
        decode: DecodeLayout,
        taken: &'a Taken,
    ) -> Self {
        Self {
            engine,
            problem,
            query: Floats::new(inputs.query),
            key: Cached::new(inputs.key),
            value: Cached::new(inputs.value),
            value_scale: E::F::ONE,
            sinks: inputs.sinks.map(Floats::new),
            terms: Terms::new(problem, inputs),
            layout,
            decode,
            taken,
        }
    }

    /// With the scales of 8-bit keys and values of a head of a sequence, for products with keys that are
    /// divided by `unit`; `None` where the call has no scales and the unit is 1.
    pub(super) fn scaled(&self, batch: usize, key_head: usize, unit: f64) -> Option<Self> {
        if unit == 1.0 && !self.has_scales() {
            return None;
        }
        let value_scale = E::F::from_f32(self.problem.value_scale(batch, key_head));
        Some(Self { terms: self.terms.with_key_scale(batch, key_head, unit), value_scale, ..self.clone() })
    }

    /// Whether keys or values have scales.
    pub(super) fn has_scales(&self) -> bool {
        self.problem.has(Role::KeyScales) || self.problem.has(Role::ValueScales)
    }
}
