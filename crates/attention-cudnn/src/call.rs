//! One call: the steps that turn its tensors into work on the stream.

use std::ffi::c_void;
use std::sync::Arc;

use attention_core::{CallProblem, Error, Pass, Role, Scratch, Unsupported};
use attention_cuda::{Addresses, failure};

use crate::NAME;
use crate::arguments::{Intervals, Seen};
use crate::failure::Failure;
use crate::large;
use crate::launch::{Kernels, SourceAddresses};
use crate::nan_isolation::LargeRows;
use crate::numbers::Numbers;
use crate::planned::Planned;
use crate::sequences::Sequences;
use crate::slot::{Side, Slot};
use crate::variant_packs::VariantPack;

/// A call with its addresses, whose steps are enqueued one after the other.
pub(crate) struct Run<'a> {
    planned: &'a Planned,
    pub(crate) kernels: Kernels<'a>,
    memory: Addresses,
    /// The address of the scratch.
    scratch: u64,
    /// Whether by structure each row sees a key and each key is seen by a row, and this is the same for every
    /// batch row.
    excludes_nothing: bool,
}

impl<'a> Run<'a> {
    /// The run of a call whose scratch the plan has admitted; checks the streams and the alignment of the
    /// addresses that cuDNN gets.
    pub(crate) fn new(
        planned: &'a Planned,
        problem: CallProblem<'a>,
        memory: Addresses,
        mut scratch: Scratch<'_>,
    ) -> Result<Self, Error> {
        let runtime = &*planned.runtime;
        let scratch = scratch.as_mut_ptr().addr() as u64;
        let at = |slot: Slot| planned.layout.at(slot).map(|start| scratch + start);
        let flags = |slot: Slot| at(slot).unwrap_or(0);
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
                seen: Seen { rows: flags(Slot::SeenRows), keys: flags(Slot::SeenKeys) },
                seen_heads: bias.map_or(1, |bias| bias.shape[1]),
                bias_row: bias.map_or(0, |bias| bias.strides[2]),
            },
            memory,
            scratch,
            excludes_nothing,
        };
        memory.check_streams(NAME, runtime.device.stream(), run.scratch)?;
        // cuDNN and the kernel that copies operands read 16 bytes at a time. cuDNN does not report an address
        // that is not aligned to that.
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

    /// Whether the graph reads the caller's operand instead of a copy whose masked rows are zeros.
    fn skips_copy(&self, role: Role) -> bool {
        self.excludes_nothing && self.planned.skippable.contains(&role)
    }

    fn scratch_at(&self, slot: Slot) -> Option<u64> {
        if slot.role().is_some_and(|role| self.skips_copy(role)) {
            return None;
        }
        self.planned.layout.at(slot).map(|start| self.scratch + start)
    }

    /// The address of the numbers that are stored in the scratch, or 0 if none are.
    fn stored(&self) -> u64 {
        self.scratch_at(Slot::StoredNumbers).unwrap_or(0)
    }

    /// The address of the device memory of a slot: in the scratch if the layout has the slot, else the
    /// caller's tensor.
    pub(crate) fn at(&self, slot: Slot) -> u64 {
        let elsewhere = || slot.role().map_or(0, |role| self.memory.at(role));
        self.scratch_at(slot).unwrap_or_else(elsewhere)
    }

    /// Enqueues the kernels that write the plan's inputs to the scratch: lengths, bias, row sums, copies of
    /// operands and the keep mask of dropout.
    ///
    /// # Safety
    /// The addresses that this run was made of are those of a call of the planned problem: each tensor is
    /// device memory of the description that the problem has for its role, and the scratch has the bytes of
    /// the plan's layout. Both are valid on the device's stream until the work is done.
    pub(crate) unsafe fn prepare(&self) -> Result<(), Error> {
        let (key, problem) = (&self.planned.key, &self.kernels.problem);
        let runtime = &self.planned.runtime;
        // SAFETY: the caller promised that `memory` has the tensors that the problem describes, and that the
        // scratch has the bytes of the layout. The kernels write to slots of the scratch only, for each of
        // which `Layout::of` reserved the bytes. `support::check` took only operands whose strides are
        // multiples of 16 bytes, and `Run::new` checked that their addresses are.
        unsafe {
            if let Some(sequences) = &self.planned.sequences {
                self.planned
                    .numbers
                    .store(runtime.device.stream(), problem, self.stored())
                    .map_err(|error| failure(NAME, "running a kernel", error))?;
                let arrays = &self.kernels.sequences;
                let at = |slot: Slot| self.scratch_at(slot);
                sequences.run(runtime, (problem, key), &self.memory, self.stored(), arrays, at)?;
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

    /// Enqueues the execution plan.
    ///
    /// # Safety
    /// The caller promises the same as for [`Run::prepare`], which must have been enqueued before.
    pub(crate) unsafe fn execute(&self) -> Result<(), Error> {
        let (runtime, planned) = (&*self.planned.runtime, self.planned);
        let run = || -> Result<(), Failure> {
            let workspace = runtime.workspaces.lease(runtime.device.stream(), planned.execution.workspace)?;
            let addresses = planned.execution.slots().map(|slot| self.at(slot));
            let workspace_address = workspace.pointer();
            let kept = planned.variant_packs.take(addresses.clone(), workspace_address);
            let pack = match kept {
                Some(pack) => pack,
                None => self.variant_pack(addresses.collect(), workspace_address)?,
            };
            pack.numbers.set(&self.kernels.problem);
            runtime.with_handle(|handle| {
                // SAFETY: `Run::variant_pack` made this pack of this plan. It was kept for the same addresses
                // and workspace, or made for them just now. The tensors and the scratch are valid until the
                // work is done, as the caller promised; the workspace is leased to this stream.
                unsafe { planned.execution.execute(&runtime.cudnn, handle, &pack.descriptor) }
                    .map_err(Failure::from)
            })?;
            planned.variant_packs.put(pack);
            Ok(())
        };
        run().map_err(|error| error.during("running a plan"))
    }

    /// The variant pack of the call: its memory, in the order of the plan's slots. A slot of a number points
    /// to that number in host memory.
    fn variant_pack(&self, addresses: Vec<u64>, workspace: u64) -> Result<VariantPack, Failure> {
        let (planned, numbers) = (self.planned, Arc::new(Numbers::default()));
        let pointer = |(slot, &address): (Slot, &u64)| {
            let memory: *mut c_void = std::ptr::with_exposed_provenance_mut(address as usize);
            numbers.address(slot).unwrap_or(memory)
        };
        let pointers: Vec<*mut c_void> = planned.execution.slots().zip(&addresses).map(pointer).collect();
        // SAFETY: there is one pointer per slot of the plan. A number has the type that the graph gives it,
        // and `VariantPack` drops the numbers after the pack. The workspace was leased with the bytes that
        // the plan asks for, and its lease goes back to calls on the same stream only. Every other address is
        // in the scratch, where the layout reserves the tensor's bytes, or is a tensor of the call; the
        // caller of `execute`, the only one to use the pack, promised that both are valid until the work is
        // done.
        let descriptor =
            unsafe { planned.execution.variant_pack(&planned.runtime.cudnn, &pointers, workspace) }?;
        Ok(VariantPack { addresses, workspace, descriptor, numbers })
    }

    /// Writes zeros to the gradients of batch rows without keys, which cuDNN may leave unwritten. Seen with
    /// 9.19 on an H200, with dropout and without. Of packed tensors, writes zeros to all rows that take no
    /// part.
    ///
    /// # Safety
    /// The caller promises the same as for [`Run::prepare`], which must have been enqueued before.
    pub(crate) unsafe fn clear(&self) -> Result<(), Error> {
        let places = self.planned.key.places;
        for role in [Role::DQuery, Role::DKey, Role::DValue] {
            if places.packs(Side::of(role)) {
                // SAFETY: as below; the layout has starts for each side that is packed, and the intervals of
                // both, which `prepare` wrote.
                unsafe { self.kernels.clear_packed(role, self.memory.at(role)) }?;
                continue;
            }
            if !self.kernels.problem.has(Role::KeyValueLengths) {
                continue;
            }
            // SAFETY: the caller promised that the address is that of the problem's gradient of this role.
            // `support::check` took only strides that are multiples of 16 bytes and widths that are multiples
            // of 8 elements, and `Run::new` checked that the address is a multiple of 16. `prepare` wrote the
            // key lengths, since the problem has them.
            unsafe { self.kernels.clear_gradient(role, self.memory.at(role)) }?;
        }
        Ok(())
    }

    /// Recomputes the rows of the results that NaN or infinity from masked positions may have reached, and
    /// those whose logits are too large for cuDNN.
    ///
    /// # Safety
    /// The caller promises the same as for [`Run::prepare`], which must have been enqueued before, as must
    /// [`Run::execute`].
    pub(crate) unsafe fn isolate_nan(&self) -> Result<(), Error> {
        let Some(isolation) = &self.planned.isolation else { return Ok(()) };
        let problem = &self.kernels.problem;
        let large = match (problem.pass(), self.scratch_at(Slot::States)) {
            (Pass::Backward, Some(states)) => LargeRows::States(states),
            (Pass::Forward, _) if large::may_be_large(problem) => LargeRows::Stats(self.at(Slot::Stats)),
            _ => LargeRows::Unknown,
        };
        // SAFETY: the caller promised that `memory` has the tensors that the problem describes. `stored` and
        // `large` are addresses of slots of the layout, which work that was enqueued before writes.
        unsafe { isolation.run(&self.planned.runtime, problem, &self.memory, self.stored(), large) }
    }
}
