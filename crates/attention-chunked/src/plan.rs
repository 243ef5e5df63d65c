//! A planned problem: what its calls take, and how they run.

use std::sync::Arc;

use attention_core::{
    BackwardCall, BackwardInputs, BackwardOutputs, CallProblem, Error, ForwardCall, ForwardOutputs, Inputs,
    Pass, Plan, Problem, Scratch,
};

use crate::config::{ChunkedConfig, Needs as _};
use crate::engine::Engine;
use crate::engines::{WithEngines, with_engines};
use crate::paths::{Paths, Taken};
use crate::{Level, NAME, backward, cut, forward};

/// What calls of a problem take: their tasks, and the layout of their scratch.
#[derive(Debug)]
pub(crate) enum Needs {
    Forward(forward::Needs),
    Backward(backward::Needs),
}

impl Needs {
    /// Cuts a problem, for as many threads as the configuration plans for; with its bytes of scratch. `None`
    /// on overflow.
    pub(crate) fn of(problem: &Problem, config: &ChunkedConfig, level: Level) -> Option<(Self, usize)> {
        struct Cut<'p> {
            problem: &'p Problem,
            config: &'p ChunkedConfig,
        }

        impl WithEngines for Cut<'_> {
            type Output = Option<(Needs, usize)>;

            fn run<E: Engine, Small: Engine>(self, _: E, small: Option<Small>) -> Self::Output {
                let Self { problem, config } = self;
                let (small, sizes, threads) = (small.is_some(), config.sizes(), config.planned_threads());
                Some(match problem.pass() {
                    Pass::Forward => {
                        let needs = forward::Needs::of::<E, Small>(problem, small, &sizes, threads)?;
                        let bytes = needs.scratch()?;
                        (Needs::Forward(needs), bytes)
                    }
                    Pass::Backward => {
                        let needs = backward::Needs::of::<E, Small>(problem, small, &sizes, threads)?;
                        let bytes = needs.scratch()?;
                        (Needs::Backward(needs), bytes)
                    }
                })
            }
        }

        if !cut::sizes_fit(problem) {
            return None;
        }
        let needs = with_engines(level, config, problem.dtype(), Cut { problem, config });
        needs.filter(|&(_, bytes)| bytes <= isize::MAX as usize)
    }
}

/// A problem with what its calls take.
#[derive(Debug)]
pub(crate) struct ChunkedPlan {
    pub(crate) problem: Problem,
    pub(crate) needs: Needs,
    pub(crate) scratch_bytes: usize,
    pub(crate) level: Level,
    pub(crate) config: ChunkedConfig,
    pub(crate) paths: Arc<Paths>,
}

/// What a call of either pass writes, and what it takes.
#[allow(clippy::large_enum_variant, reason = "one is made a call, and no box is worth an allocation")]
enum Pending<'c> {
    Forward(ForwardOutputs<'c>, &'c forward::Needs),
    Backward(&'c BackwardInputs<'c>, BackwardOutputs<'c>, &'c backward::Needs),
}

impl ChunkedPlan {
    /// Runs an admitted call.
    fn run<'c>(
        &'c self,
        problem: &'c CallProblem<'c>,
        inputs: &'c Inputs<'c>,
        pending: Pending<'c>,
        scratch: Scratch<'c>,
    ) {
        struct Run<'c, 'd> {
            problem: &'c CallProblem<'c>,
            inputs: &'c Inputs<'c>,
            pending: Pending<'c>,
            config: &'d ChunkedConfig,
            scratch: &'d mut [u8],
            taken: [&'d Taken; 2],
        }

        impl WithEngines for Run<'_, '_> {
            type Output = ();

            fn run<E: Engine, Small: Engine>(self, engine: E, small: Option<Small>) {
                let Self { problem, inputs, pending, config, scratch, taken } = self;
                match pending {
                    Pending::Forward(outputs, needs) => {
                        let call = forward::Call { problem, inputs, outputs };
                        forward::run(engine, small, call, needs, config, scratch, taken);
                    }
                    Pending::Backward(saved, outputs, needs) => {
                        let call = backward::Call { problem, inputs, saved, outputs };
                        backward::run(engine, small, call, needs, config, scratch, taken);
                    }
                }
            }
        }

        // Device and size were checked; a call without scratch may bring one from anywhere.
        let scratch = scratch.into_host().unwrap_or_default();
        let taken = [Taken::default(), Taken::default()];
        let run = Run { problem, inputs, pending, config: &self.config, scratch, taken: taken.each_ref() };
        with_engines(self.level, &self.config, self.problem.dtype(), run);
        self.paths.count(self.problem.dtype(), taken);
    }
}

impl Plan for ChunkedPlan {
    fn backend(&self) -> &str {
        NAME
    }

    fn problem(&self) -> &Problem {
        &self.problem
    }

    fn scratch_bytes(&self) -> usize {
        self.scratch_bytes
    }

    fn forward(&self, call: ForwardCall<'_>, scratch: Scratch<'_>) -> Result<(), Error> {
        self.admit(call.problem(), &scratch)?;
        let Needs::Forward(needs) = &self.needs else {
            unreachable!("a forward call is of a forward problem")
        };
        let (problem, inputs, outputs) = call.into_parts();
        self.run(&problem, &inputs, Pending::Forward(outputs, needs), scratch);
        Ok(())
    }

    fn backward(&self, call: BackwardCall<'_>, scratch: Scratch<'_>) -> Result<(), Error> {
        self.admit(call.problem(), &scratch)?;
        let Needs::Backward(needs) = &self.needs else {
            unreachable!("a backward call is of a backward problem")
        };
        let (problem, inputs, saved, outputs) = call.into_parts();
        self.run(&problem, &inputs, Pending::Backward(&saved, outputs, needs), scratch);
        Ok(())
    }
}
