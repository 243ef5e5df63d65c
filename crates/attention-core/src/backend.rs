//! The trait that every implementation of attention fulfils.

use crate::{
    BackwardCall, Capabilities, Error, ForwardCall, LentScratch, Problem, Scratch, Unavailable, Unsupported,
    Variants,
};

/// An implementation of attention.
///
/// The contract, which the conformance suite checks:
/// - Results follow the semantics of [`Problem`] in the numerics class that [`capabilities`](Self::capabilities)
///   declare, for every problem that [`supports`](Self::supports) accepts.
/// - A refused call writes nothing. An accepted call writes every element of every output, including the zeros of
///   empty and padded rows; what outputs and scratch held before does not matter.
/// - What lies at masked positions, in padding or between the elements of a strided view never reaches a result.
/// - No option is ignored, and nothing else is run in the backend's place.
/// - No panic on any call that a [`ForwardCall`] or [`BackwardCall`] can hold.
///
/// Backends are values: configuration (threads, chunk sizes, streams) belongs to the value, so the trait has no
/// room for options that only some backends have. A backend that wraps another one implements
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

    /// Whether it can serve this problem. Pure: runs nothing, allocates no device memory, needs no device.
    ///
    /// # Errors
    /// [`Unsupported`] names the limit and the value that meets it.
    fn supports(&self, problem: &Problem) -> Result<(), Unsupported>;

    /// The code paths that its plans may choose on this machine, with a count of how often each was run, for suites that
    /// prove what they reach. A wrapper gives those of the backend that it wraps.
    ///
    /// The default says nothing about paths, and is right for a backend that has only one.
    fn variants(&self) -> Option<&Variants> {
        None
    }

    /// Bytes of scratch memory that a call of this problem must be given, exactly.
    ///
    /// The answer depends on the problem and on the backend's configuration alone: not on the thread or the pool that
    /// asks. A backend that spreads calls over threads answers for a number of them that is part of its configuration; in
    /// a smaller pool a call runs on fewer threads, in a larger one it uses no more than were asked for. So a caller may
    /// size scratch once and call from anywhere. It starts no thread, and its cost does not grow with the batch, but for
    /// reading lengths.
    ///
    /// # Errors
    /// As [`supports`](Self::supports).
    fn scratch_bytes(&self, problem: &Problem) -> Result<usize, Unsupported>;

    /// Plans a problem ahead of its calls: the step that may fail after [`supports`](Self::supports) has said yes.
    ///
    /// A backend whose plans take long, or for which a library has the last word on what it serves, makes the plan
    /// here and keeps it, so that asking again costs a look-up and a call finds it. Whoever chooses among backends
    /// asks before the call, and may choose another one after an error; once a call has begun, there is no other. A
    /// call of a problem that nobody has prepared plans by itself.
    ///
    /// The default asks [`supports`](Self::supports), and is right for a backend that has nothing to plan.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for all that [`supports`](Self::supports) refuses, and for limits that only the plan
    /// shows; [`Error::Unavailable`] and [`Error::Backend`] by the machine.
    fn prepare(&self, problem: &Problem) -> Result<(), Error> {
        Ok(self.supports(problem)?)
    }

    /// Lends at least `bytes` bytes of scratch for one call of this problem, for callers that cannot allocate where
    /// the problem's memory is.
    ///
    /// The memory is the backend's. It is on the problem's device, aligned to
    /// [`SCRATCH_ALIGNMENT`](crate::SCRATCH_ALIGNMENT), and good for one call of this backend, and no more: a backend
    /// that puts its work on a stream lends memory in the order of that stream, so once the call has returned the
    /// memory may go back, and to the next call on the stream, although the work is still to be done. Nothing else
    /// may read or write it.
    ///
    /// The default lends none, and is right for a backend on host memory, where callers have scratch of their own.
    ///
    /// # Errors
    /// [`Unsupported::LentScratch`] by a backend that lends none, [`Unsupported::ScratchLimit`] above what it lends;
    /// [`InvalidCall::ScratchDevice`](crate::InvalidCall::ScratchDevice) where the problem is on a device that it
    /// does not work on; [`Error::Unavailable`] and [`Error::Backend`] by the machine.
    fn lend_scratch(&self, problem: &Problem, bytes: usize) -> Result<Box<dyn LentScratch + '_>, Error> {
        let (backend, device) = (self.name().to_owned(), problem.device());
        Err(Unsupported::LentScratch { backend, device, needed: bytes }.into())
    }

    /// Computes the output and, where the problem wants it, the logsumexp.
    ///
    /// # Errors
    /// [`Error::InvalidCall`] where the scratch is too small, misaligned or elsewhere; [`Error::Unsupported`] as
    /// [`supports`](Self::supports); [`Error::Unavailable`] and [`Error::Backend`] by the machine.
    fn forward(&self, call: ForwardCall<'_>, scratch: Scratch<'_>) -> Result<(), Error>;

    /// Computes the wanted gradients.
    ///
    /// # Semantics
    /// Probabilities are `exp(x - lse)` with the logsumexp that the call gives, and the row term of the softmax
    /// gradient is `<d_out, out> - d_lse`. With the output and logsumexp of a row's *whole* set of keys, a call on
    /// a part of the keys gives that part's share of the gradients, so parts can be computed apart and added.
    ///
    /// Both were rounded when they were stored. A backend may put its own, more exact numbers in their place where
    /// the keys at hand account for the whole logsumexp to within that rounding.
    ///
    /// # Errors
    /// As [`forward`](Self::forward).
    fn backward(&self, call: BackwardCall<'_>, scratch: Scratch<'_>) -> Result<(), Error>;
}
