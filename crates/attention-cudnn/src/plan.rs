//! A plan: the calls of a planned problem.

use attention_core::{BackwardCall, Error, ForwardCall, LentScratch, Plan, Problem, Role, Scratch};
use attention_cuda::Addresses;

use crate::NAME;
use crate::call::Run;
use crate::key::Stats;
use crate::planned::Planned;
use crate::runtime::Runtime;
use crate::slot::Slot;

/// A planned problem, to be called.
#[derive(Debug)]
pub(crate) struct CudnnPlan(pub(crate) Planned);

impl Plan for CudnnPlan {
    fn backend(&self) -> &str {
        NAME
    }

    fn problem(&self) -> &Problem {
        &self.0.problem
    }

    fn scratch_bytes(&self) -> usize {
        self.0.layout.bytes
    }

    fn lend_scratch(&self) -> Result<Box<dyn LentScratch + '_>, Error> {
        let Runtime { workspaces, device, .. } = &*self.0.runtime;
        workspaces.lend(NAME, device, self.scratch_bytes())
    }

    fn forward(&self, call: ForwardCall<'_>, scratch: Scratch<'_>) -> Result<(), Error> {
        self.admit(call.problem(), &scratch)?;
        let (problem, inputs, mut outputs) = call.into_parts();
        let memory = Addresses::of_forward(&inputs, &mut outputs);
        let run = Run::new(&self.0, problem, memory, scratch)?;
        // SAFETY: an admitted call: its tensors are what the problem, and so graph and kernels, say.
        unsafe {
            run.bring()?;
            run.execute()?;
            if self.0.key.stats == Stats::Packed {
                let sinks = if self.0.problem.has(Role::Sinks) { run.at(Slot::Sinks) } else { 0 };
                let (out, lse) = (memory.at(Role::Out), memory.at(Role::Lse));
                run.kernels.finish_forward(out, lse, run.at(Slot::Stats), sinks)?;
            }
            run.contain()?;
        }
        self.0.runs.count();
        Ok(())
    }

    fn backward(&self, call: BackwardCall<'_>, scratch: Scratch<'_>) -> Result<(), Error> {
        self.admit(call.problem(), &scratch)?;
        let (problem, inputs, saved, mut outputs) = call.into_parts();
        let memory = Addresses::of_backward(&inputs, &saved, &mut outputs);
        let run = Run::new(&self.0, problem, memory, scratch)?;
        // SAFETY: as in `forward`.
        unsafe {
            run.bring()?;
            run.execute()?;
            run.clear()?;
            if self.0.problem.has(Role::DSinks) {
                let (sinks, delta, states) = (run.at(Slot::Sinks), run.at(Slot::Delta), run.at(Slot::States));
                let (dsinks, lse) = (memory.at(Role::DSinks), memory.at(Role::Lse));
                run.kernels.sink_gradient(dsinks, sinks, delta, lse, states)?;
            }
            run.contain()?;
        }
        self.0.runs.count();
        Ok(())
    }
}
