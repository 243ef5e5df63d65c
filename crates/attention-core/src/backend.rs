//! The trait that every implementation of attention fulfils.

use std::sync::Arc;

use crate::{Capabilities, Error, Plan, Problem, Unavailable, Unsupported, Variants};

/// An implementation of attention.
///
/// The contract, which the conformance suite checks:
/// - Results follow the semantics of [`Problem`] in the numerics class that
///   [`capabilities`](Self::capabilities) declare, for every problem that [`supports`](Self::supports)
///   accepts.
/// - A refused call of a [`Plan`] writes nothing. An accepted call writes every element of every output,
///   including the zeros of empty and padded rows; what outputs and scratch held before does not matter.
/// - What lies at masked positions, in padding or between the elements of a strided view never reaches a
///   result.
/// - No option is ignored, and nothing else is run in the backend's place.
/// - No panic on any call that a [`ForwardCall`](crate::ForwardCall) or [`BackwardCall`](crate::BackwardCall)
///   can hold.
///
/// Backends are values: configuration (threads, chunk sizes, streams) belongs to the value, so the trait has
/// no room for options that only some backends have. A backend that wraps another one implements
/// [`Delegate`](crate::Delegate) instead, and writes only what differs.
#[diagnostic::on_unimplemented(
    message = "`{Self}` is not a backend",
    note = "a backend implements `AttentionBackend`, and one that wraps another backend implements `Delegate`"
)]
pub trait AttentionBackend: Send + Sync + std::fmt::Debug {
    /// The name by which users ask for it, in lower case: `cpu`, `chunked`, `cudnn`.
    fn name(&self) -> &str;

    /// The version of the implementation, stored with choices.
    fn version(&self) -> &str;

    /// What it can do, as data.
    fn capabilities(&self) -> &Capabilities;

    /// Whether its library and device are there.
    ///
    /// # Errors
    /// [`Unavailable`] names what is missing and where it was looked for.
    fn available(&self) -> Result<(), Unavailable>;

    /// The compute capability of the CUDA device that it works on, `(9, 0)` for Hopper: an automatic choice
    /// orders implementations by it. What it assumes for its answers where there is no device; `None`, the
    /// default, where it works on none, or cannot say.
    fn compute_capability(&self) -> Option<(u32, u32)> {
        None
    }

    /// Whether it can serve this problem. Pure: runs nothing, allocates no device memory, needs no device.
    ///
    /// # Errors
    /// [`Unsupported`] names the limit and the value that meets it.
    fn supports(&self, problem: &Problem) -> Result<(), Unsupported>;

    /// The code paths that its plans may choose on this machine, with a count of how often each was run, for
    /// suites that prove what they reach. A wrapper gives those of the backend that it wraps.
    ///
    /// The default says nothing about paths, and is right for a backend that has only one.
    fn variants(&self) -> Option<&Variants> {
        None
    }

    /// Bytes of scratch memory that a call of this problem must be given, exactly: what its
    /// [plan](Plan::scratch_bytes) says, for whoever judges a problem before it is planned. Pure, as
    /// [`supports`](Self::supports).
    ///
    /// The answer depends on the problem and on the backend's configuration alone: not on the thread or the
    /// pool that asks. A backend that spreads calls over threads answers for a number of them that is part of
    /// its configuration; in a smaller pool a call runs on fewer threads, in a larger one it uses no more
    /// than were asked for. So a caller may size scratch once and call from anywhere. It starts no thread,
    /// and its cost does not grow with the batch, but for reading lengths.
    ///
    /// # Errors
    /// As [`supports`](Self::supports).
    fn scratch_bytes(&self, problem: &Problem) -> Result<usize, Unsupported>;

    /// Plans a problem: the step that may fail after [`supports`](Self::supports) has said yes. All calls are
    /// the [plan](Plan)'s.
    ///
    /// Kernels are compiled, work is cut and libraries are asked here, so this may take seconds; whoever
    /// calls again keeps the plan. A backend whose plans send something to a device refuses to plan while its
    /// stream is captured into a graph. A backend keeps no plans of its own. Whoever chooses among backends
    /// plans before the call, and may choose another one after an error; once a call has begun, there is no
    /// other.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for all that [`supports`](Self::supports) refuses, and for limits that only the
    /// plan shows; [`Error::Unavailable`] and [`Error::Backend`] by the machine.
    fn plan(&self, problem: &Problem) -> Result<Arc<dyn Plan>, Error>;
}
