//! One call: from its tensors to work on the stream.

use std::ffi::c_void;

use attention_core::{Error, Pass, Role, Scratch, Unsupported};
use attention_cuda::Addresses;

use crate::NAME;
use crate::arguments::Seen;
use crate::contain::Large;
use crate::failure::Failure;
use crate::large;
use crate::launch::{Kernels, SourceAddresses};
use crate::planned::Planned;
use crate::runtime::Array;
use crate::slot::Slot;

/// A call on its way to the device.
pub(crate) struct Run<'a> {
    planned: &'a Planned,
    pub(crate) kernels: Kernels<'a>,
    memory: Addresses,
    /// The address of the scratch.
    scratch: u64,
    lengths: u64,
}

impl<'a> Run<'a> {
    /// Checks the addresses that cuDNN is given, of a call whose scratch was admitted.
    pub(crate) fn new(
        planned: &'a Planned,
        memory: Addresses,
        mut scratch: Scratch<'_>,
    ) -> Result<Self, Error> {
        let (runtime, problem) = (&*planned.runtime, &planned.problem);
        let address = |array: &Option<Array>| array.as_ref().map_or(0, |array| array.address);
        let lengths = address(&planned.lengths);
        let scratch = scratch.as_mut_ptr().addr() as u64;
        let marks = |slot: Slot| planned.layout.at(slot).map_or(0, |start| scratch + start);
        let bias = planned.key.bias.filter(|bias| bias.made);
        let run = Self {
            planned,
            kernels: Kernels {
                runtime,
                problem,
                rows: address(&planned.rows),
                keys: address(&planned.keys),
                query_lengths: lengths,
                positions: address(&planned.positions),
                seen: Seen { rows: marks(Slot::SeenRows), keys: marks(Slot::SeenKeys) },
                seen_heads: bias.map_or(1, |bias| bias.shape[1]),
                bias_row: bias.map_or(0, |bias| bias.strides[2]),
            },
            memory,
            scratch,
            lengths,
        };
        memory.check_streams(NAME, runtime.device.stream(), run.scratch)?;
        // cuDNN, and the kernel that copies operands, read 16 bytes at a time; cuDNN does not say so where it may not.
        let direct = planned.execution.slots().filter(|&slot| run.scratch_at(slot).is_none());
        for role in direct.filter_map(Slot::role).chain(planned.cleaned.iter().copied()) {
            let address = memory.at(role);
            if !address.is_multiple_of(16) {
                return Err(Unsupported::Limit {
                    backend: NAME.to_owned(),
                    what: format!("{role} at address"),
                    value: format!("{address:#x}"),
                    why: "cuDNN reads 16 bytes at a time, so it must be a multiple of 16 bytes".to_owned(),
                }
                .into());
            }
        }
        Ok(run)
    }

    fn scratch_at(&self, slot: Slot) -> Option<u64> {
        self.planned.layout.at(slot).map(|start| self.scratch + start)
    }

    /// The device memory behind a slot: in the scratch, or the caller's.
    pub(crate) fn at(&self, slot: Slot) -> u64 {
        let elsewhere = || match slot {
            Slot::QueryLengths => self.lengths,
            Slot::KeyLengths => self.lengths + 4 * self.kernels.problem.dims().batch as u64,
            slot => slot.role().map_or(0, |role| self.memory.at(role)),
        };
        self.scratch_at(slot).unwrap_or_else(elsewhere)
    }

    /// Brings what the plan reads to the scratch.
    ///
    /// # Safety
    /// The memory is that of a checked call of the planned problem.
    pub(crate) unsafe fn bring(&self) -> Result<(), Error> {
        let (key, problem) = (&self.planned.key, self.kernels.problem);
        // SAFETY: the call's tensors by the caller's word; room in the scratch by its layout, which was checked.
        unsafe {
            for (slot, role) in [(Slot::Slopes, Role::AlibiSlopes), (Slot::Sinks, Role::Sinks)] {
                if let Some(to) = self.scratch_at(slot) {
                    self.kernels.to_floats(role, self.memory.at(role), to)?;
                }
            }
            if let Some(made) = key.bias.filter(|bias| bias.made) {
                let slopes = if key.slopes { 0 } else { self.at(Slot::Slopes) };
                let (mask, bias) = (self.memory.at(Role::Mask), self.memory.at(Role::Bias));
                let from = SourceAddresses { mask, bias, slopes };
                self.kernels.make_bias(made, from, self.at(Slot::Bias))?;
            }
            if problem.pass() == Pass::Backward {
                let states = self.scratch_at(Slot::States);
                let lse = self.memory.at(Role::Lse);
                self.kernels.prepare_backward(lse, self.at(Slot::Stats), states)?;
                if let (Some(far), Some(states)) = (&self.planned.far, states) {
                    far.run(&self.planned.runtime, problem, &self.memory, states)?;
                }
            }
            let stats = if key.clean_rows { self.at(Slot::Stats) } else { 0 };
            for &role in &self.planned.cleaned {
                let to = Slot::of(role).map_or(0, |slot| self.at(slot));
                self.kernels.clean(role, self.memory.at(role), to, stats)?;
            }
            if key.writes_kept() {
                self.kernels.keep_mask(self.at(Slot::Kept))?;
            }
        }
        Ok(())
    }

    /// Puts the plan on the stream.
    ///
    /// # Safety
    /// As for [`Run::bring`].
    pub(crate) unsafe fn execute(&self) -> Result<(), Error> {
        let (runtime, planned) = (&*self.planned.runtime, self.planned);
        let run = || -> Result<(), Failure> {
            let workspace = runtime.workspaces.lease(runtime.device.stream(), planned.execution.workspace)?;
            let address = |slot: Slot| {
                let memory = || std::ptr::with_exposed_provenance_mut(self.at(slot) as usize);
                planned.numbers.address(slot).unwrap_or_else(memory)
            };
            let addresses: Vec<*mut c_void> = planned.execution.slots().map(address).collect();
            let list = planned.lists.take(&addresses, workspace.pointer());
            // SAFETY: numbers and lengths are as the graph describes them and outlive the call; the workspace is as large
            // as the plan asks for and goes back to calls on the same stream alone; the rest is in the scratch, by its
            // layout, or the caller's word.
            let make =
                || unsafe { planned.execution.memory(&runtime.cudnn, &addresses, workspace.pointer()) };
            let list = list.map_or_else(make, Ok)?;
            runtime.with_handle(|handle| {
                // SAFETY: a list of this plan.
                unsafe { planned.execution.execute(&runtime.cudnn, handle, &list) }.map_err(Failure::from)
            })?;
            planned.lists.put(&addresses, workspace.pointer(), list);
            Ok(())
        };
        run().map_err(|error| error.during("running a plan"))
    }

    /// Computes rows of the results again that what they must not see may have reached.
    ///
    /// # Safety
    /// As for [`Run::bring`].
    pub(crate) unsafe fn contain(&self) -> Result<(), Error> {
        let Some(containment) = &self.planned.containment else { return Ok(()) };
        let problem = self.kernels.problem;
        let large = match (problem.pass(), self.scratch_at(Slot::States)) {
            (Pass::Backward, Some(states)) => Large::States(states),
            (Pass::Forward, _) if large::may_be_large(problem) => Large::Stats(self.at(Slot::Stats)),
            _ => Large::Unknown,
        };
        // SAFETY: the call's tensors, by the caller's word; what cuDNN or a kernel left in the scratch, by its layout.
        unsafe { containment.run(&self.planned.runtime, problem, &self.memory, large) }
    }
}
