//! Execution plans: an operation graph with the engine that cuDNN chose and compiled for it.
//!
//! The numbers of descriptor types, attributes and modes are those of cuDNN's header
//! (`cudnnBackendDescriptorType_t`, `cudnnBackendAttributeName_t` and `cudnnBackendHeurMode_t`).

use std::ffi::c_void;

use crate::descriptor::{Descriptor, kind};
use crate::graph::Finished;
use crate::library::{Cudnn, CudnnError, Opaque};
use crate::slot::Slot;

/// An execution plan with the tensors that it takes. It is made once per kind of problem and shared by all
/// threads.
#[derive(Debug)]
pub(crate) struct ExecutionPlan {
    plan: Descriptor,
    /// The bytes of workspace that cuDNN needs in addition to inputs and outputs.
    pub(crate) workspace: usize,
    /// The unique identifier of each tensor in the graph, and the tensor's meaning.
    slots: Vec<(i64, Slot)>,
    /// The descriptors that the plan was made of, kept alive for as long as the plan.
    _kept: (Finished, Option<Descriptor>),
}

/// A cuDNN handle, which one thread at a time may use. It is never destroyed: when the process exits, the
/// library may be unloaded before this value is dropped.
#[derive(Debug)]
pub(crate) struct Handle(Opaque);

// SAFETY: cuDNN allows a handle to be used from any thread, one at a time. `Handle` is not `Sync` or `Clone`,
// and `Runtime::with_handle` takes it out of the pool while a thread uses it.
unsafe impl Send for Handle {}

impl Handle {
    /// A handle for the current context, whose work is enqueued on this stream of the context.
    pub(crate) fn new(cudnn: &Cudnn, stream: *mut c_void) -> Result<Self, CudnnError> {
        let mut raw = std::ptr::null_mut();
        // SAFETY: cuDNN writes one pointer, to `raw`, which lives here.
        let status = unsafe { (cudnn.functions.create)(&raw mut raw) };
        cudnn.check("creating a handle", status)?;
        // SAFETY: `raw` is the handle that this library created above. `Runtime::with_handle`, the only
        // caller, passes the stream of the runtime's device, whose context it has bound to this thread.
        cudnn.check("setting a stream", unsafe { (cudnn.functions.set_stream)(raw, stream) })?;
        Ok(Self(raw))
    }
}

/// The device that a plan is built for.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Site<'a> {
    /// The device of a handle.
    Device(&'a Handle),
    /// A device that is described by its properties. The machine need not have it, and the plan cannot run.
    Described(&'a Descriptor),
}

/// Whether an error means that cuDNN supports no engine for a graph, as opposed to a failure: status codes of
/// the class `CUDNN_STATUS_NOT_SUPPORTED`, which are 3000 to 3999.
pub(crate) fn is_refusal(error: &CudnnError) -> bool {
    (3000..4000).contains(&error.status)
}

impl ExecutionPlan {
    /// Builds a plan of the first engine configuration that compiles, in the order of cuDNN's heuristics;
    /// `None` if there is none.
    pub(crate) fn build(cudnn: &Cudnn, site: Site<'_>, graph: Finished) -> Result<Option<Self>, CudnnError> {
        let mut all = Descriptor::new(cudnn, 15)?;
        if let Site::Device(handle) = site {
            // SAFETY: one handle, which this library created (`Handle::new`) and which is never destroyed.
            unsafe { all.pointers(800, kind::HANDLE, &[handle.0])? };
        }
        all.descriptors(801, &graph.operations)?;
        all.finalize("describing a graph")?;
        // The heuristics modes: A, cuDNN's best estimate, then the fallback list.
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

    /// The plan as JSON with its compiled kernels. [`load`](Self::load) takes it with the same version of
    /// cuDNN on a device of the same kind.
    pub(crate) fn saved(&self) -> Result<Vec<u8>, CudnnError> {
        self.plan.read_bytes(405)
    }

    /// Loads a plan of this graph that [`saved`](Self::saved) has written.
    pub(crate) fn load(
        cudnn: &Cudnn,
        handle: &Handle,
        graph: Finished,
        saved: &str,
    ) -> Result<Self, CudnnError> {
        let mut plan = Descriptor::new(cudnn, 5)?;
        // The handle is set first, because cuDNN reads it when it gets the text.
        // SAFETY: one handle, which this library created (`Handle::new`) and which is never destroyed.
        unsafe { plan.pointers(400, kind::HANDLE, &[handle.0])? };
        plan.text(405, saved)?;
        plan.finalize("loading a plan")?;
        let workspace = usize::try_from(plan.integer(402)?).unwrap_or(usize::MAX);
        let slots = graph.slots.clone();
        Ok(Self { plan, workspace, slots, _kept: (graph, None) })
    }

    /// The meaning of each tensor that the plan takes.
    pub(crate) fn slots(&self) -> impl Iterator<Item = Slot> + Clone {
        self.slots.iter().map(|&(_, slot)| slot)
    }

    /// The list of a call's memory, cuDNN's variant pack: an address for each of [`slots`](Self::slots), in
    /// their order, and the workspace.
    ///
    /// # Safety
    /// Each address is device memory of the tensor that the graph describes for its slot or, for a slot of a
    /// number, host memory of that number. `workspace` has the bytes that the plan asks for. All of it is
    /// valid whenever the pack is used, until the work that uses it is done.
    pub(crate) unsafe fn variant_pack(
        &self,
        cudnn: &Cudnn,
        addresses: &[*mut c_void],
        workspace: u64,
    ) -> Result<Descriptor, CudnnError> {
        let uids: Vec<i64> = self.slots.iter().map(|&(uid, _)| uid).collect();
        let mut pack = Descriptor::new(cudnn, 16)?;
        pack.integers(1000, &uids)?;
        // SAFETY: the caller promised that the addresses and the workspace are valid whenever the pack is
        // used.
        unsafe {
            pack.pointers(1001, kind::VOID_PTR, addresses)?;
            let workspace = std::ptr::with_exposed_provenance_mut(workspace as usize);
            pack.pointers(1003, kind::VOID_PTR, &[workspace])?;
        }
        pack.finalize("listing a call's memory")?;
        Ok(pack)
    }

    /// Enqueues the plan's work on the handle's stream.
    ///
    /// # Safety
    /// [`variant_pack`](Self::variant_pack) of this plan made the pack, and the memory in it is valid until
    /// the work is done.
    pub(crate) unsafe fn execute(
        &self,
        cudnn: &Cudnn,
        handle: &Handle,
        pack: &Descriptor,
    ) -> Result<(), CudnnError> {
        // SAFETY: this library created the handle, and the plan and the pack, which are finalised. The caller
        // promised that the pack is of this plan and that its memory is valid until the work is done.
        let status = unsafe { (cudnn.functions.execute)(handle.0, self.plan.raw(), pack.raw()) };
        cudnn.check("running a plan", status)
    }
}
