//! A problem that a backend has planned.

use crate::{BackwardCall, Error, ForwardCall, InvalidCall, LentScratch, Problem, Scratch, Unsupported};

/// A problem that a backend has planned: kernels compiled, work cut, scratch sized. Its calls do nothing of
/// that again.
///
/// Made by [`AttentionBackend::plan`](crate::AttentionBackend::plan), good for any number of calls from any
/// thread, and alive without the backend. What a plan holds of a device is given back when the last of its
/// `Arc`s goes.
///
/// The contract, beside that of [`AttentionBackend`](crate::AttentionBackend):
/// - A call of another problem, or with scratch that is too small, misaligned or elsewhere, is refused by
///   [`admit`](Self::admit), which every implementation asks first.
/// - Calls of one plan do not wait for each other, but where a stream puts them in order.
#[diagnostic::on_unimplemented(
    message = "`{Self}` is not a plan",
    note = "a plan implements `Plan`, and one that wraps another plan implements `DelegatePlan`"
)]
pub trait Plan: Send + Sync + std::fmt::Debug {
    /// The name of the backend that planned it.
    fn backend(&self) -> &str;

    /// What was planned.
    fn problem(&self) -> &Problem;

    /// Bytes of scratch memory that each call must be given: as
    /// [`AttentionBackend::scratch_bytes`](crate::AttentionBackend::scratch_bytes) says.
    fn scratch_bytes(&self) -> usize;

    /// Lends at least [`scratch_bytes`](Self::scratch_bytes) bytes for one call, to callers that cannot
    /// allocate where the problem's memory is.
    ///
    /// The memory is the backend's. It is on the problem's device, aligned to
    /// [`SCRATCH_ALIGNMENT`](crate::SCRATCH_ALIGNMENT), and good for one call of this plan, and no more: a
    /// backend that puts its work on a stream lends memory in the order of that stream, so once the call has
    /// returned the memory may go back, and to the next call on the stream, although the work is still to be
    /// done. Nothing else may read or write it.
    ///
    /// The default lends none, and is right for a plan on host memory, where callers have scratch of their
    /// own.
    ///
    /// # Errors
    /// [`Unsupported::LentScratch`] by a backend that lends none, [`Unsupported::ScratchLimit`] above what it
    /// lends; [`Error::Unavailable`] and [`Error::Backend`] by the machine.
    fn lend_scratch(&self) -> Result<Box<dyn LentScratch + '_>, Error> {
        let (backend, device) = (self.backend().to_owned(), self.problem().device());
        Err(Unsupported::LentScratch { backend, device, needed: self.scratch_bytes() }.into())
    }

    /// Computes the output and, where the problem wants it, the logsumexp.
    ///
    /// # Errors
    /// [`Error::InvalidCall`] as [`admit`](Self::admit); [`Error::Unavailable`] and [`Error::Backend`] by the
    /// machine.
    fn forward(&self, call: ForwardCall<'_>, scratch: Scratch<'_>) -> Result<(), Error>;

    /// Computes the wanted gradients.
    ///
    /// # Semantics
    /// Probabilities are `exp(x - lse)` with the logsumexp that the call gives, and the row term of the
    /// softmax gradient is `<d_out, out> - d_lse`. With the output and logsumexp of a row's *whole* set of
    /// keys, a call on a part of the keys gives that part's share of the gradients, so parts can be computed
    /// apart and added.
    ///
    /// Both were rounded when they were stored. A backend may put its own, more exact numbers in their place
    /// where the keys at hand account for the whole logsumexp to within that rounding.
    ///
    /// # Errors
    /// As [`forward`](Self::forward).
    fn backward(&self, call: BackwardCall<'_>, scratch: Scratch<'_>) -> Result<(), Error>;

    /// What every call begins with: refuses one of another problem, and scratch that is too small, misaligned
    /// or elsewhere.
    ///
    /// A call that was made of [`problem`](Self::problem) itself costs the comparison of two addresses.
    ///
    /// # Errors
    /// [`InvalidCall::OtherProblem`], [`InvalidCall::ScratchDevice`], [`InvalidCall::ScratchTooSmall`],
    /// [`InvalidCall::ScratchMisaligned`].
    fn admit(&self, problem: &Problem, scratch: &Scratch<'_>) -> Result<(), InvalidCall> {
        let planned = self.problem();
        if !std::ptr::eq(planned, problem) && planned != problem {
            return Err(InvalidCall::OtherProblem {
                planned: planned.to_string(),
                call: problem.to_string(),
            });
        }
        scratch.check(planned.device(), self.scratch_bytes())
    }
}
