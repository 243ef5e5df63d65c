//! The tensors of a call as a backend gets them, made of those of the padded call that means the same.

use std::borrow::Cow;

use attention_core::Problem;

use super::{Invocation, SavedTensors};
use crate::cases::{Case, CaseData, Layouts, of_no_sequence};
use crate::rng::Rng;

/// Packed and paged tensors of a case that has them, the tensors themselves elsewhere.
pub(crate) struct Laid<'a> {
    pub(crate) data: Cow<'a, CaseData>,
    pub(crate) saved: Option<Cow<'a, SavedTensors>>,
}

impl<'a> Laid<'a> {
    pub(crate) fn new(case: &Case, data: &'a CaseData, saved: Option<&'a SavedTensors>) -> Self {
        let laid = case.laid_out(data);
        let saved = saved.map(|saved| match case.padding(&laid.numbers) {
            Some(padding) => {
                let mut rng = Rng::named(case.content.seed, "saved rows of no sequence");
                let number = || of_no_sequence(data.garbage, &mut rng);
                Cow::Owned(saved.laid_out(&padding, &case.layouts, number))
            }
            None => Cow::Borrowed(saved),
        });
        Self { data: laid, saved }
    }

    /// The call on them. `layouts` are those of its outputs.
    pub(crate) fn invocation<'b>(&'b self, problem: &'b Problem, layouts: &'b Layouts) -> Invocation<'b> {
        Invocation {
            problem,
            inputs: self.data.inputs(),
            saved: self.saved.as_ref().map(|saved| saved.inputs(&self.data)),
            layouts: Some(layouts),
        }
    }
}
