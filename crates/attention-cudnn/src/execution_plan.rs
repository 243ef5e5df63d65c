//! Execution plans: a graph that cuDNN has chosen and compiled a kernel for.

use std::ffi::c_void;

use crate::descriptor::{Descriptor, kind};
use crate::graph::Finished;
use crate::library::{Cudnn, CudnnError, Opaque};
use crate::slot::Slot;

/// A plan, and what it is to be given. Made once a problem, shared by all threads.
#[derive(Debug)]
pub(crate) struct ExecutionPlan {
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

impl ExecutionPlan {
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
