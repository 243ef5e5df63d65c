//! Plans problems and makes calls, whatever the backend does.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use attention_core::{
    AttentionBackend, BackwardCall, BackwardInputs, Error, ForwardCall, Inputs, Pass, Plan, Problem, Scratch,
    ScratchBuffer,
};

use super::{Results, Stop};
use crate::cases::Layouts;
use crate::oracle::Padding;

/// What lies behind the scratch memory.
const GUARD: u8 = 0xA7;
/// What the scratch memory holds before a call: as floats of any width, NaN.
const POISON: u8 = 0xFF;
/// Guard bytes behind the scratch memory.
const GUARD_BYTES: usize = 256;

/// Everything about a call but the memory that it writes to.
#[derive(Clone, Copy)]
pub(crate) struct Invocation<'a> {
    pub(crate) problem: &'a Problem,
    pub(crate) inputs: Inputs<'a>,
    /// For backward calls.
    pub(crate) saved: Option<BackwardInputs<'a>>,
    /// The layouts of the outputs; contiguous if `None`.
    pub(crate) layouts: Option<&'a Layouts>,
}

impl Invocation<'_> {
    /// Plans the problem and makes one call of the plan.
    pub(crate) fn run(&self, backend: &dyn AttentionBackend) -> Result<Results, Stop> {
        self.run_on(&*self.plan(backend)?)
    }

    /// Plans the problem, and checks that the plan is of this problem and asks for the scratch that the
    /// backend says.
    pub(crate) fn plan(&self, backend: &dyn AttentionBackend) -> Result<Arc<dyn Plan>, Stop> {
        let needed = self.scratch_bytes(backend)?;
        let plan = catch(|| backend.plan(self.problem))?
            .map_err(|error| Stop::failed(format!("plan fails on what supports accepts: {error}")))?;
        if catch(|| plan.problem() != self.problem)? {
            return Err(Stop::failed("the plan's problem is not the one that was to be planned"));
        }
        let planned = catch(|| plan.scratch_bytes())?;
        if planned != needed {
            return Err(Stop::failed(format!(
                "the plan asks for {planned} bytes of scratch, and scratch_bytes says {needed}"
            )));
        }
        Ok(plan)
    }

    /// Makes one call of a plan of this problem, with exactly the scratch memory that it asks for, and checks
    /// what it wrote to: outputs and scratch, and nothing else. The results are those of the padded call
    /// where sequences are packed or in pages.
    pub(crate) fn run_on(&self, plan: &dyn Plan) -> Result<Results, Stop> {
        let bytes = catch(|| plan.scratch_bytes())?;
        let mut results = Results::poisoned(self.problem, self.layouts);
        let mut buffer = ScratchBuffer::new(bytes + GUARD_BYTES);
        let (scratch, guard) = buffer.bytes_mut().split_at_mut(bytes);
        scratch.fill(POISON);
        guard.fill(GUARD);
        self.attempt(plan, &mut results, Scratch::host(scratch))?
            .map_err(|error| Stop::failed(format!("the call failed: {error}")))?;
        results.expect_no_stray_writes()?;
        if let Some(at) = guard.iter().position(|&byte| byte != GUARD) {
            return Err(Stop::failed(format!("wrote {at} bytes behind its {bytes} bytes of scratch")));
        }
        results.padded(Padding::of(self.problem, &self.inputs.data).as_ref())
    }

    /// What the backend asks for.
    pub(crate) fn scratch_bytes(&self, backend: &dyn AttentionBackend) -> Result<usize, Stop> {
        catch(|| backend.scratch_bytes(self.problem))?
            .map_err(|error| Stop::failed(format!("scratch_bytes refuses what supports accepts: {error}")))
    }

    /// Makes the call; a panic is a failure, an error is returned.
    pub(crate) fn attempt(
        &self,
        plan: &dyn Plan,
        results: &mut Results,
        scratch: Scratch<'_>,
    ) -> Result<Result<(), Error>, Stop> {
        let invalid = |error| Stop::failed(format!("the suite made an invalid call: {error}"));
        match self.problem.pass() {
            Pass::Forward => {
                let call = ForwardCall::new(self.problem, self.inputs, results.forward()).map_err(invalid)?;
                catch(|| plan.forward(call, scratch))
            }
            Pass::Backward => {
                let saved = self.saved.expect("backward calls have saved tensors");
                let call = BackwardCall::new(self.problem, self.inputs, saved, results.backward())
                    .map_err(invalid)?;
                catch(|| plan.backward(call, scratch))
            }
        }
    }
}

/// Runs a backend's code and makes a panic in it a failure of the case.
pub(super) fn catch<T>(run: impl FnOnce() -> T) -> Result<T, Stop> {
    // What the backend was given is thrown away after a panic.
    catch_unwind(AssertUnwindSafe(run)).map_err(|payload| {
        let text = (payload.downcast_ref::<&str>().map(|text| (*text).to_owned()))
            .or_else(|| payload.downcast_ref::<String>().cloned())
            .unwrap_or_else(|| "no message".to_owned());
        Stop::failed(format!("panicked: {text}"))
    })
}
