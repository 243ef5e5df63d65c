//! Execution plans: a graph that cuDNN has chosen and compiled a kernel for.

use std::ffi::c_void;

use attention_core::Role;

use crate::descriptor::{Descriptor, kind};
use crate::graph::Finished;
use crate::library::{Cudnn, CudnnError, Opaque};

/// What a tensor of a graph stands for: memory or a number that each call gives.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Slot {
    Query,
    Key,
    Value,
    Out,
    Stats,
    DOut,
    DQuery,
    DKey,
    DValue,
    /// `<d_out, out>` of each row, in f32; times [`KeepShare`](Self::KeepShare) where cuDNN's own generator drops.
    Delta,
    /// The gradient of the query while it is summed up, in f32.
    DQuerySum,
    QueryLengths,
    KeyLengths,
    Scale,
    /// What is added to the logits: the caller's bias, or what a kernel made of mask and bias.
    Bias,
    /// Which rows see a key and which keys are seen, where a mask or a bias decides.
    SeenRows,
    SeenKeys,
    /// What [`FarRows`](crate::far::FarRows) leaves.
    States,
    /// Slopes of ALiBi, in f32.
    Slopes,
    /// Sinks, in f32.
    Sinks,
    /// 1 where a probability is kept and 0 where it is dropped, in the operands' dtype.
    Kept,
    /// What kept probabilities are multiplied by.
    KeepScale,
    /// One over that.
    KeepShare,
    /// Seed and offset of cuDNN's own generator.
    Seed,
    Offset,
    /// Negative infinity.
    Nothing,
    One,
    /// How far the diagonal is moved: added to the index of a row.
    RowShift,
    /// Key and query lengths of a call without lengths.
    KeyLength,
    QueryLength,
    /// How far beyond its position a row sees.
    Right,
    /// How far behind its position a row sees, and one, less the shift of the diagonal: a float.
    Left,
    /// The same without the shift: an integer.
    LeftInteger,
}

impl Slot {
    /// The slot of an operand that may be copied.
    pub(crate) fn of(role: Role) -> Option<Self> {
        Some(match role {
            Role::Query => Self::Query,
            Role::Key => Self::Key,
            Role::Value => Self::Value,
            Role::Out => Self::Out,
            Role::DOut => Self::DOut,
            _ => return None,
        })
    }

    /// The tensor of the call that is behind it, where it is not in the scratch.
    pub(crate) fn role(self) -> Option<Role> {
        Some(match self {
            Self::Query => Role::Query,
            Self::Key => Role::Key,
            Self::Value => Role::Value,
            Self::Out => Role::Out,
            Self::Stats => Role::Lse,
            Self::DOut => Role::DOut,
            Self::DQuery => Role::DQuery,
            Self::DKey => Role::DKey,
            Self::DValue => Role::DValue,
            Self::Bias => Role::Bias,
            Self::Slopes => Role::AlibiSlopes,
            Self::Sinks => Role::Sinks,
            _ => return None,
        })
    }
}

/// A plan, and what it is to be given. Made once a problem, shared by all threads.
#[derive(Debug)]
pub(crate) struct Plan {
    plan: Descriptor,
    /// Bytes that cuDNN needs beside its inputs and outputs.
    pub(crate) workspace: usize,
    slots: Vec<(i64, Slot)>,
    /// What the plan was made of.
    _kept: (Finished, Option<Descriptor>),
}

/// A cuDNN handle. Not for two threads at once; leaked at exit, since the library may be gone before us.
#[derive(Debug)]
pub(crate) struct Handle(Opaque);

// SAFETY: a handle may move between threads; whoever holds it has it alone.
unsafe impl Send for Handle {}

impl Handle {
    /// A handle for the current context, whose work is put on this stream of it.
    pub(crate) fn new(cudnn: &Cudnn, stream: *mut c_void) -> Result<Self, CudnnError> {
        let mut raw = std::ptr::null_mut();
        // SAFETY: writes one pointer.
        let status = unsafe { (cudnn.functions.create)(&raw mut raw) };
        cudnn.check("creating a handle", status)?;
        // SAFETY: a handle of this library, and a stream of its context.
        cudnn.check("setting a stream", unsafe { (cudnn.functions.set_stream)(raw, stream) })?;
        Ok(Self(raw))
    }
}

/// What a plan is built for.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Site<'a> {
    /// The device of a handle.
    Device(&'a Handle),
    /// A device that is described by its properties and need not be there: such a plan cannot run.
    Described(&'a Descriptor),
}

/// Whether cuDNN has no kernel, as opposed to having failed.
pub(crate) fn is_refusal(error: &CudnnError) -> bool {
    (3000..4000).contains(&error.status)
}

impl Plan {
    /// The first configuration of cuDNN's own choice that compiles; `None` where it has none.
    pub(crate) fn build(cudnn: &Cudnn, site: Site<'_>, graph: Finished) -> Result<Option<Self>, CudnnError> {
        let mut all = Descriptor::new(cudnn, 15)?;
        if let Site::Device(handle) = site {
            // SAFETY: a handle of this library.
            unsafe { all.pointers(800, kind::HANDLE, &[handle.0])? };
        }
        all.descriptors(801, &graph.operations)?;
        all.finalize("describing a graph")?;
        // The library's best guess first, then whatever works.
        for mode in [3, 2] {
            let mut heuristics = Descriptor::new(cudnn, 4)?;
            heuristics.descriptors(201, [&all])?;
            if let Site::Described(device) = site {
                heuristics.descriptors(204, [device])?;
            }
            heuristics.enumeration(200, kind::HEUR_MODE, mode)?;
            match heuristics.finalize("choosing an engine") {
                Err(error) if is_refusal(&error) => continue,
                other => other?,
            }
            for choice in heuristics.read_descriptors(202, 3)? {
                let mut plan = Descriptor::new(cudnn, 5)?;
                plan.descriptors(401, [&choice])?;
                match plan.finalize("compiling a plan") {
                    Err(error) => tracing::debug!(%error, "an engine was refused"),
                    Ok(()) => {
                        let workspace = usize::try_from(plan.integer(402)?).unwrap_or(usize::MAX);
                        let slots = graph.slots.clone();
                        return Ok(Some(Self { plan, workspace, slots, _kept: (graph, Some(all)) }));
                    }
                }
            }
        }
        Ok(None)
    }

    /// The plan as JSON, with its compiled kernels: for [`load`](Self::load), with the same cuDNN on such a device.
    pub(crate) fn saved(&self) -> Result<Vec<u8>, CudnnError> {
        self.plan.read_bytes(405)
    }

    /// A plan that was saved, of this graph.
    pub(crate) fn load(
        cudnn: &Cudnn,
        handle: &Handle,
        graph: Finished,
        saved: &str,
    ) -> Result<Self, CudnnError> {
        let mut plan = Descriptor::new(cudnn, 5)?;
        // The handle first: cuDNN reads it when it is given the text.
        // SAFETY: a handle of this library.
        unsafe { plan.pointers(400, kind::HANDLE, &[handle.0])? };
        plan.text(405, saved)?;
        plan.finalize("loading a plan")?;
        let workspace = usize::try_from(plan.integer(402)?).unwrap_or(usize::MAX);
        let slots = graph.slots.clone();
        Ok(Self { plan, workspace, slots, _kept: (graph, None) })
    }

    /// What its memory is for.
    pub(crate) fn slots(&self) -> impl Iterator<Item = Slot> {
        self.slots.iter().map(|&(_, slot)| slot)
    }

    /// Lists a call's memory: that behind each of [`slots`](Self::slots), in their order, and the workspace.
    ///
    /// # Safety
    /// The addresses are of device memory of the tensors that the graph describes or, for numbers, of host memory;
    /// `workspace` has the bytes that the plan asks for. They are valid whenever the list is used, until the work that
    /// uses it is done.
    pub(crate) unsafe fn memory(
        &self,
        cudnn: &Cudnn,
        addresses: &[*mut c_void],
        workspace: u64,
    ) -> Result<Descriptor, CudnnError> {
        let uids: Vec<i64> = self.slots.iter().map(|&(uid, _)| uid).collect();
        let mut pack = Descriptor::new(cudnn, 16)?;
        pack.integers(1000, &uids)?;
        // SAFETY: addresses by the caller's word.
        unsafe {
            pack.pointers(1001, kind::VOID_PTR, addresses)?;
            let workspace = std::ptr::with_exposed_provenance_mut(workspace as usize);
            pack.pointers(1003, kind::VOID_PTR, &[workspace])?;
        }
        pack.finalize("listing a call's memory")?;
        Ok(pack)
    }

    /// Puts the plan's work on the handle's stream.
    ///
    /// # Safety
    /// `memory` is by [`memory`](Self::memory) of this plan.
    pub(crate) unsafe fn execute(
        &self,
        cudnn: &Cudnn,
        handle: &Handle,
        memory: &Descriptor,
    ) -> Result<(), CudnnError> {
        // SAFETY: handle, plan and list are of this library and finalised; the memory is the caller's word.
        let status = unsafe { (cudnn.functions.execute)(handle.0, self.plan.raw(), memory.raw()) };
        cudnn.check("running a plan", status)
    }
}
