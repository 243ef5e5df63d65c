//! The plan of a problem: its forward and backward calls.

use attention_core::{BackwardCall, Error, ForwardCall, LentScratch, Plan, Problem, Role, Scratch};
use attention_cuda::Addresses;

use crate::NAME;
use crate::call::Run;
use crate::key::Stats;
use crate::planned::Planned;
use crate::runtime::Runtime;
use crate::slot::Slot;

/// The plan of a problem.
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
        // SAFETY: `admit` checked that the call is of this plan's problem and that the scratch has the size,
        // the alignment and the device that the plan needs, so every tensor in `memory` has the description
        // that the graph and the kernels were made for. It stays valid until the work is done: tensors of
        // attention-cuda are freed and written on the device's stream only, which `Run::new` checked, and who
        // makes views of other memory promises it, as the documentation of `CudnnBackend` asks. The arrays,
        // row sums and flags that a step reads are written by the steps before it. `Stats`, `Sinks` and `out`
        // have the shapes that `finish_forward` asks for by the layout and the problem.
        unsafe {
            run.prepare()?;
            run.execute()?;
            if self.0.key.stats == Stats::Packed {
                let sinks = if self.0.problem.has(Role::Sinks) { run.at(Slot::Sinks) } else { 0 };
                let (out, lse) = (memory.at(Role::Out), memory.at(Role::Lse));
                run.kernels.finish_forward(out, lse, run.at(Slot::Stats), sinks)?;
            }
            run.isolate_nan()?;
        }
        self.0.runs.count();
        Ok(())
    }

    fn backward(&self, call: BackwardCall<'_>, scratch: Scratch<'_>) -> Result<(), Error> {
        self.admit(call.problem(), &scratch)?;
        let (problem, inputs, saved, mut outputs) = call.into_parts();
        let memory = Addresses::of_backward(&inputs, &saved, &mut outputs);
        let run = Run::new(&self.0, problem, memory, scratch)?;
        // SAFETY: `admit` checked that the call is of this plan's problem and that the scratch has the size,
        // the alignment and the device that the plan needs, so every tensor in `memory` has the description
        // that the graph and the kernels were made for. It stays valid until the work is done: tensors of
        // attention-cuda are freed and written on the device's stream only, which `Run::new` checked, and who
        // makes views of other memory promises it, as the documentation of `CudnnBackend` asks. The arrays,
        // row sums and flags that a step reads are written by the steps before it. The layout has `Delta`
        // and, for sinks, `States`, with the floats that `sink_gradient` asks for.
        unsafe {
            run.prepare()?;
            run.execute()?;
            run.clear()?;
            if self.0.problem.has(Role::DSinks) {
                let (sinks, delta, states) = (run.at(Slot::Sinks), run.at(Slot::Delta), run.at(Slot::States));
                let (dsinks, lse) = (memory.at(Role::DSinks), memory.at(Role::Lse));
                run.kernels.sink_gradient(dsinks, sinks, delta, lse, states)?;
            }
            run.isolate_nan()?;
        }
        self.0.runs.count();
        Ok(())
    }
}
