//! A call of an [`Attention`]: planned, checked and run.

use attention_core::{InvalidCall, Problem};

use crate::operands::Operands;
use crate::plan::call_span;
use crate::{Attention, AttentionPlan, Error, hidden_keys};

impl Attention<'_> {
    /// As [`plan`](Self::plan), for a call: where it has wrong numbers, nothing is planned.
    pub(crate) fn plan_call(
        &self,
        operands: &Operands<'_>,
        problem: &Problem,
    ) -> Result<AttentionPlan, Error> {
        let check = || Ok(operands.call(problem).map(drop)?);
        Ok(AttentionPlan { chosen: self.policy.chosen(problem, check)?, order: self.order })
    }

    /// Plans a call and runs it. `check` makes the call of a pass, for what is wrong with it where nobody
    /// runs it.
    pub(crate) fn run<O>(
        &self,
        operands: &Operands<'_>,
        problem: &Problem,
        outputs: O,
        check: impl FnOnce(O) -> Result<(), InvalidCall>,
        run: impl FnOnce(&AttentionPlan, O) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let span = call_span(problem);
        let plan = match self.plan_call(operands, problem) {
            Ok(plan) => plan,
            // What is wrong with the call comes before who would have run it.
            Err(nobody) => {
                return Err(
                    check(outputs).map_or_else(|wrong| operands.order.told(wrong).into(), |()| nobody)
                );
            }
        };
        plan.tell(&span);
        hidden_keys::tell_of_lengths(problem, &operands.inputs.data);
        run(&plan, outputs)
    }
}
