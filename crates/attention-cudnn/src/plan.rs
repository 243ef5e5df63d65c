//! Execution plans: a graph that cuDNN has chosen and compiled a kernel for.

use std::ffi::c_void;

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
    /// `<d_out, out>` of each row, in f32.
    Delta,
    /// The gradient of the query while it is summed up, in f32.
    DQuerySum,
    QueryLengths,
    KeyLengths,
    Scale,
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

/// A plan, and what it is to be given. Made once a problem, shared by all threads.
#[derive(Debug)]
pub(crate) struct Plan {
    plan: Descriptor,
    /// Bytes that cuDNN needs beside its inputs and outputs.
    pub(crate) workspace: usize,
    slots: Vec<(i64, Slot)>,
    /// What the plan was made of.
    _kept: (Finished, Descriptor),
}

/// A cuDNN handle. Not for two threads at once; leaked at exit, since the library may be gone before us.
#[derive(Debug)]
pub(crate) struct Handle(Opaque);

// SAFETY: a handle may move between threads; whoever holds it has it alone.
unsafe impl Send for Handle {}

impl Handle {
    /// A handle for the current context.
    pub(crate) fn new(cudnn: &Cudnn) -> Result<Self, CudnnError> {
        let mut raw = std::ptr::null_mut();
        // SAFETY: writes one pointer.
        let status = unsafe { (cudnn.functions.create)(&raw mut raw) };
        cudnn.check("creating a handle", status)?;
        Ok(Self(raw))
    }

    /// Puts the work of this handle on a stream.
    pub(crate) fn set_stream(&self, cudnn: &Cudnn, stream: *mut c_void) -> Result<(), CudnnError> {
        // SAFETY: a handle of this library, and a stream of its context.
        cudnn.check("setting a stream", unsafe { (cudnn.functions.set_stream)(self.0, stream) })
    }
}

/// Whether cuDNN has no kernel, as opposed to having failed.
pub(crate) fn is_refusal(error: &CudnnError) -> bool {
    (3000..4000).contains(&error.status)
}

impl Plan {
    /// The first configuration of cuDNN's own choice that compiles; `None` where it has none.
    pub(crate) fn build(cudnn: &Cudnn, handle: &Handle, graph: Finished) -> Result<Option<Self>, CudnnError> {
        let mut all = Descriptor::new(cudnn, 15)?;
        // SAFETY: a handle of this library.
        unsafe { all.pointers(800, kind::HANDLE, &[handle.0])? };
        all.descriptors(801, &graph.operations)?;
        all.finalize("describing a graph")?;
        // The library's best guess first, then whatever works.
        for mode in [3, 2] {
            let mut heuristics = Descriptor::new(cudnn, 4)?;
            heuristics.descriptors(201, [&all])?;
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
                        return Ok(Some(Self { plan, workspace, slots, _kept: (graph, all) }));
                    }
                }
            }
        }
        Ok(None)
    }

    /// Puts the plan's work on the handle's stream.
    ///
    /// # Safety
    /// `address` gives, for every slot of the graph, device memory of the tensor that it was described as or, for
    /// numbers, host memory that lives as long as the call; `workspace` has the bytes that the plan asks for. They stay
    /// valid until the work is done.
    pub(crate) unsafe fn execute(
        &self,
        cudnn: &Cudnn,
        handle: &Handle,
        workspace: u64,
        address: impl Fn(Slot) -> *mut c_void,
    ) -> Result<(), CudnnError> {
        let uids: Vec<i64> = self.slots.iter().map(|&(uid, _)| uid).collect();
        let addresses: Vec<*mut c_void> = self.slots.iter().map(|&(_, slot)| address(slot)).collect();
        let mut pack = Descriptor::new(cudnn, 16)?;
        pack.integers(1000, &uids)?;
        // SAFETY: addresses by the caller's word.
        unsafe {
            pack.pointers(1001, kind::VOID_PTR, &addresses)?;
            pack.pointers(
                1003,
                kind::VOID_PTR,
                &[std::ptr::with_exposed_provenance_mut(workspace as usize)],
            )?;
        }
        pack.finalize("listing a call's memory")?;
        // SAFETY: handle, plan and pack are of this library and finalised; the memory is the caller's word.
        let status = unsafe { (cudnn.functions.execute)(handle.0, self.plan.raw(), pack.raw()) };
        cudnn.check("running a plan", status)
    }
}
