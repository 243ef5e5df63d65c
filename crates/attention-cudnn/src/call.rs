//! One call: from its tensors to work on the stream.

use std::ffi::c_void;
use std::sync::Arc;

use attention_core::{CallProblem, Error, Pass, Role, Scratch, Unsupported};
use attention_cuda::{Addresses, failure};

use crate::NAME;
use crate::arguments::{Intervals, Seen};
use crate::contain::Large;
use crate::failure::Failure;
use crate::large;
use crate::launch::{Kernels, SourceAddresses};
use crate::lists::List;
use crate::numbers::Numbers;
use crate::planned::Planned;
use crate::sequences::Sequences;
use crate::slot::Slot;

/// A call on its way to the device.
pub(crate) struct Run<'a> {
    planned: &'a Planned,
    pub(crate) kernels: Kernels<'a>,
    memory: Addresses,
    /// The address of the scratch.
    scratch: u64,
    /// Whether structure leaves each row a key and each key a row, as numbers say that are the same for every
    /// batch row.
    excludes_nothing: bool,
}

impl<'a> Run<'a> {
    /// Checks the addresses that cuDNN is given, of a call whose scratch was admitted.
    pub(crate) fn new(
        planned: &'a Planned,
        problem: CallProblem<'a>,
        memory: Addresses,
        mut scratch: Scratch<'_>,
    ) -> Result<Self, Error> {
        let runtime = &*planned.runtime;
        let scratch = scratch.as_mut_ptr().addr() as u64;
        let at = |slot: Slot| planned.layout.at(slot).map(|start| scratch + start);
        let marks = |slot: Slot| at(slot).unwrap_or(0);
        let bias = planned.key.bias.filter(|bias| bias.made);
        let sequences = Sequences::of(&problem, at);
        let dims = problem.dims();
        let all = (Intervals::new(0, 0..dims.query_length), Intervals::new(0, 0..dims.key_length));
        let excludes_nothing = (sequences.rows, sequences.keys) == all;
        let run = Self {
            planned,
            kernels: Kernels {
                runtime,
                problem,
                sequences,
                seen: Seen { rows: marks(Slot::SeenRows), keys: marks(Slot::SeenKeys) },
                seen_heads: bias.map_or(1, |bias| bias.shape[1]),
                bias_row: bias.map_or(0, |bias| bias.strides[2]),
            },
            memory,
            scratch,
            excludes_nothing,
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

    /// Whether the graph reads an operand where it is, and not a copy without what takes no part.
    fn skips_copy(&self, role: Role) -> bool {
        self.excludes_nothing && self.planned.skippable.contains(&role)
    }

    fn scratch_at(&self, slot: Slot) -> Option<u64> {
        if slot.role().is_some_and(|role| self.skips_copy(role)) {
            return None;
        }
        self.planned.layout.at(slot).map(|start| self.scratch + start)
    }

    /// Where the numbers are that are stored in the scratch; 0 where none are.
    fn stored(&self) -> u64 {
        self.scratch_at(Slot::StoredNumbers).unwrap_or(0)
    }

    /// The device memory behind a slot: in the scratch, or the caller's.
    pub(crate) fn at(&self, slot: Slot) -> u64 {
        let elsewhere = || slot.role().map_or(0, |role| self.memory.at(role));
        self.scratch_at(slot).unwrap_or_else(elsewhere)
    }

    /// Brings what the plan reads to the scratch.
    ///
    /// # Safety
    /// The memory is that of a checked call of the planned problem.
    pub(crate) unsafe fn bring(&self) -> Result<(), Error> {
        let (key, problem) = (&self.planned.key, &self.kernels.problem);
        let runtime = &self.planned.runtime;
        // SAFETY: the call's tensors by the caller's word; room in the scratch by its layout, which was checked.
        unsafe {
            if let Some(sequences) = &self.planned.sequences {
                self.planned
                    .numbers
                    .store(runtime.device.stream(), problem, self.stored())
                    .map_err(|error| failure(NAME, "running a kernel", error))?;
                sequences.run(runtime, problem, &self.memory, self.stored(), &self.kernels.sequences)?;
            }
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
                    far.run(runtime, problem, &self.memory, self.stored(), states)?;
                }
            }
            let stats = if key.clean_rows { self.at(Slot::Stats) } else { 0 };
            for &role in self.planned.cleaned.iter().filter(|&&role| !self.skips_copy(role)) {
                let to = Slot::of(role).map_or(0, |slot| self.at(slot));
                self.kernels.clean(role, self.memory.at(role), to, stats)?;
            }
            if key.writes_kept() {
                self.kernels.keep_mask(&self.memory, self.at(Slot::Kept))?;
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
            let addresses: Vec<u64> = planned.execution.slots().map(|slot| self.at(slot)).collect();
            let workspace_address = workspace.pointer();
            let kept = planned.lists.take(&addresses, workspace_address);
            let list = match kept {
                Some(list) => list,
                None => self.list(addresses, workspace_address)?,
            };
            list.numbers.set(&self.kernels.problem);
            runtime.with_handle(|handle| {
                // SAFETY: a list of this plan.
                unsafe { planned.execution.execute(&runtime.cudnn, handle, &list.list) }
                    .map_err(Failure::from)
            })?;
            planned.lists.put(list);
            Ok(())
        };
        run().map_err(|error| error.during("running a plan"))
    }

    /// A list of this memory, by slot: where a slot is a number, it points to that in the place of the
    /// address.
    fn list(&self, addresses: Vec<u64>, workspace: u64) -> Result<List, Failure> {
        let (planned, numbers) = (self.planned, Arc::new(Numbers::default()));
        let pointer = |(slot, &address): (Slot, &u64)| {
            let memory: *mut c_void = std::ptr::with_exposed_provenance_mut(address as usize);
            numbers.address(slot).unwrap_or(memory)
        };
        let pointers: Vec<*mut c_void> = planned.execution.slots().zip(&addresses).map(pointer).collect();
        // SAFETY: numbers are as the graph describes them and outlive the list; the workspace is as large as the plan asks for
        // and goes back to calls on the same stream alone; the rest is in the scratch, by its layout, or was
        // promised by the caller of `execute`.
        let list = unsafe { planned.execution.memory(&planned.runtime.cudnn, &pointers, workspace) }?;
        Ok(List { addresses, workspace, list, numbers })
    }

    /// Writes zeros to gradients that cuDNN may leave unwritten: those of batch rows without keys. Seen with
    /// 9.19 on an H200, with dropout and without.
    ///
    /// # Safety
    /// As for [`Run::bring`].
    pub(crate) unsafe fn clear(&self) -> Result<(), Error> {
        if !self.kernels.problem.has(Role::KeyValueLengths) {
            return Ok(());
        }
        for role in [Role::DQuery, Role::DKey, Role::DValue] {
            // SAFETY: the call's gradients, which cuDNN writes in the same form, by the caller's word.
            unsafe { self.kernels.clear_gradient(role, self.memory.at(role)) }?;
        }
        Ok(())
    }

    /// Computes rows of the results again that what they must not see may have reached.
    ///
    /// # Safety
    /// As for [`Run::bring`].
    pub(crate) unsafe fn contain(&self) -> Result<(), Error> {
        let Some(containment) = &self.planned.containment else { return Ok(()) };
        let problem = &self.kernels.problem;
        let large = match (problem.pass(), self.scratch_at(Slot::States)) {
            (Pass::Backward, Some(states)) => Large::States(states),
            (Pass::Forward, _) if large::may_be_large(problem) => Large::Stats(self.at(Slot::Stats)),
            _ => Large::Unknown,
        };
        // SAFETY: the call's tensors, by the caller's word; what cuDNN or a kernel left in the scratch, by its layout.
        unsafe { containment.run(&self.planned.runtime, problem, &self.memory, self.stored(), large) }
    }
}
