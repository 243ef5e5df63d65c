//! A planned problem: which implementation runs it and why, and its calls.

use std::sync::Arc;

use attention_core::{
    AttentionBackend, BackwardCall, BackwardInputs, BackwardOutputs, ForwardCall, ForwardOutputs, Inputs,
    NumericsClass, Plan, Problem, Role, Scratch,
};

use tracing::span::EnteredSpan;

use crate::operands::Operands;
use crate::scratch::with_scratch;
use crate::selection::Chosen;
use crate::{AxisOrder, Choice, Error, Reason, Refusal};

/// A problem with the implementation that runs it, planned: its calls look nothing up and choose nothing.
///
/// Made by [`Attention::plan`](crate::Attention::plan). Cheap to clone, and good for any number of calls from
/// any thread. A CUDA graph is captured from a plan that is held for as long as the graph is used.
///
/// Calls take tensors as the problem describes them, in the order of axes of the
/// [`Attention`](crate::Attention) that made the plan, with four axes, packed ones with three (or with an
/// axis of size 1 in front). Their numbers (lengths, offsets, scale, softcap, seed, and where packed and paged
/// rows are) are [`Inputs::data`], and each call may have others: of an `Attention`'s own, `Inputs { data:
/// attention.data(), ..Inputs::new(query, key, value) }`. Without, the call has the defaults, and is refused
/// where the problem says otherwise. Integers have the dtype that the problem has for them: lists are i64.
///
/// A plan of packed rows takes sequences up to a bound: what [`longest`](crate::Attention::longest) said
/// before the problem was made, else the longest sequence that the problem was made from, rounded up to a
/// power of two.
///
/// # Examples
/// ```
/// # #[cfg(feature = "cpu")] {
/// use attention::core::{ForwardOutputs, Inputs};
/// use attention::{Attention, View, ViewMut};
///
/// let shape = [1, 2, 3, 4];
/// let x = vec![1.0f32; 24];
/// let view = View::from_slice(&x, shape)?;
/// let attention = Attention::new().causal(true);
/// let step = attention.plan(&attention.problem(view, view, view)?)?;
/// for _ in 0..3 {
///     let mut out = vec![0.0f32; 24];
///     let outputs = ForwardOutputs { out: ViewMut::from_slice(&mut out, shape)?, lse: None };
///     step.forward_into(Inputs::new(view, view, view), outputs)?;
///     assert_eq!(out, x);
/// }
/// # }
/// # Ok::<(), attention::Error>(())
/// ```
///
/// A decoder over a cache of 16 rows, planned once and called with one more row each time:
/// ```
/// # #[cfg(feature = "cpu")] {
/// use attention::core::{ForwardOutputs, Inputs};
/// use attention::{Attention, CallData, QueryOffset, View, ViewMut};
///
/// let (query, mut cache) = (vec![0.5f32; 2 * 8], vec![0.0f32; 16 * 2 * 8]);
/// let (query_shape, cache_shape) = ([1, 1, 2, 8], [1, 16, 2, 8]);
/// let attention = Attention::new().causal(true).query_offset(QueryOffset::BottomRight).key_value_lengths([0]);
/// let problem = attention.problem((&query, query_shape), (&cache, cache_shape), (&cache, cache_shape))?;
/// let step = attention.plan(&problem)?;
/// for filled in 1..=16 {
///     cache[(filled - 1) * 16..][..16].fill(filled as f32);
///     let cache = View::from_slice(&cache, cache_shape)?;
///     // In place of the length that the problem was made with.
///     let lengths = [filled];
///     let data =
///         CallData { key_value_lengths: Some(View::from_slice(&lengths, [1])?), ..attention.data() };
///     let inputs = Inputs { data, ..Inputs::new(View::from_slice(&query, query_shape)?, cache, cache) };
///     let mut out = vec![0.0f32; 2 * 8];
///     step.forward_into(inputs, ForwardOutputs { out: ViewMut::from_slice(&mut out, query_shape)?, lse: None })?;
///     assert!(out[0] <= filled as f32);
/// }
/// # }
/// # Ok::<(), attention::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct AttentionPlan {
    pub(crate) chosen: Arc<Chosen>,
    pub(crate) order: AxisOrder,
}

impl AttentionPlan {
    /// What was planned. Its shapes are in the order of the core, `[B, T, N, H]`.
    pub fn problem(&self) -> &Problem {
        self.chosen.plan.problem()
    }

    /// The implementation.
    pub fn backend(&self) -> &Arc<dyn AttentionBackend> {
        &self.chosen.backend
    }

    /// Its own plan.
    pub fn backend_plan(&self) -> &Arc<dyn Plan> {
        &self.chosen.plan
    }

    /// Why it was chosen.
    pub fn reason(&self) -> Reason {
        self.chosen.reason
    }

    /// The numerics class that it computes this problem in.
    pub fn numerics(&self) -> NumericsClass {
        self.chosen.numerics
    }

    /// Bytes of scratch memory that a call takes.
    pub fn scratch_bytes(&self) -> usize {
        self.chosen.plan.scratch_bytes()
    }

    /// Why those that were asked before it do not run the problem, in the order in which they were asked:
    /// [`Refusal::Planning`] of one that would have served the problem and failed to plan it.
    pub fn passed_over(&self) -> &[Refusal] {
        &self.chosen.passed_over
    }

    /// The choice in a form to store.
    pub fn choice(&self) -> Choice {
        Choice::of(&*self.chosen.backend, self.problem().dtype(), self.chosen.numerics)
    }

    /// Computes the output and, where the problem wants it, the logsumexp. Scratch is the facade's on the
    /// host, and lent by the implementation on a device.
    ///
    /// A refused call writes nothing.
    ///
    /// # Errors
    /// [`Error::Core`] with the [`InvalidCall`](crate::InvalidCall) where the tensors are not those of the
    /// problem, or with what the implementation failed in; [`Error::MixedRanks`], [`Error::OutOfMemory`].
    pub fn forward_into(&self, inputs: Inputs<'_>, outputs: ForwardOutputs<'_>) -> Result<(), Error> {
        let (operands, outputs) = self.forward_operands(inputs, outputs)?;
        let _span = self.span();
        self.run_forward(&operands, outputs)
    }

    /// As [`forward_into`](Self::forward_into), in scratch of the caller's: at least
    /// [`scratch_bytes`](Self::scratch_bytes) bytes where the problem is.
    ///
    /// # Errors
    /// As [`forward_into`](Self::forward_into), and where the scratch is too small, misaligned or elsewhere.
    pub fn forward_with_scratch(
        &self,
        inputs: Inputs<'_>,
        outputs: ForwardOutputs<'_>,
        scratch: Scratch<'_>,
    ) -> Result<(), Error> {
        let (operands, outputs) = self.forward_operands(inputs, outputs)?;
        let _span = self.span();
        Ok(self.chosen.plan.forward(self.forward_call(&operands, outputs)?, scratch)?)
    }

    /// Computes the gradients of the problem from what the forward left and the incoming gradients; scratch
    /// as for [`forward_into`](Self::forward_into).
    ///
    /// A refused call writes nothing.
    ///
    /// # Errors
    /// As [`forward_into`](Self::forward_into).
    pub fn backward_into(
        &self,
        inputs: Inputs<'_>,
        saved: BackwardInputs<'_>,
        outputs: BackwardOutputs<'_>,
    ) -> Result<(), Error> {
        let (operands, saved, outputs) = self.backward_operands(inputs, saved, outputs)?;
        let _span = self.span();
        self.run_backward(&operands, saved, outputs)
    }

    /// As [`backward_into`](Self::backward_into), in scratch of the caller's, as for
    /// [`forward_with_scratch`](Self::forward_with_scratch).
    ///
    /// # Errors
    /// As [`forward_with_scratch`](Self::forward_with_scratch).
    pub fn backward_with_scratch(
        &self,
        inputs: Inputs<'_>,
        saved: BackwardInputs<'_>,
        outputs: BackwardOutputs<'_>,
        scratch: Scratch<'_>,
    ) -> Result<(), Error> {
        let (operands, saved, outputs) = self.backward_operands(inputs, saved, outputs)?;
        let _span = self.span();
        Ok(self.chosen.plan.backward(*self.backward_call(&operands, saved, outputs)?, scratch)?)
    }

    /// Runs forward on operands in the order of the core.
    pub(crate) fn run_forward(
        &self,
        operands: &Operands<'_>,
        outputs: ForwardOutputs<'_>,
    ) -> Result<(), Error> {
        let plan = &*self.chosen.plan;
        let call = self.forward_call(operands, outputs)?;
        with_scratch(plan, |scratch| Ok(plan.forward(call, scratch)?))
    }

    /// Runs backward on operands in the order of the core.
    pub(crate) fn run_backward(
        &self,
        operands: &Operands<'_>,
        saved: BackwardInputs<'_>,
        outputs: BackwardOutputs<'_>,
    ) -> Result<(), Error> {
        let (plan, call) = (&*self.chosen.plan, self.backward_call(operands, saved, outputs)?);
        with_scratch(plan, |scratch| Ok(plan.backward(*call, scratch)?))
    }

    fn forward_operands<'v, 'o>(
        &self,
        inputs: Inputs<'v>,
        outputs: ForwardOutputs<'o>,
    ) -> Result<(Operands<'v>, ForwardOutputs<'o>), Error> {
        let operands = self.operands(inputs)?;
        let out = operands.written(Role::Out, outputs.out)?;
        let lse = outputs.lse.map(|lse| operands.written(Role::Lse, lse)).transpose()?;
        Ok((operands, ForwardOutputs { out, lse }))
    }

    fn backward_operands<'v, 'o>(
        &self,
        inputs: Inputs<'v>,
        saved: BackwardInputs<'v>,
        outputs: BackwardOutputs<'o>,
    ) -> Result<(Operands<'v>, BackwardInputs<'v>, BackwardOutputs<'o>), Error> {
        let operands = self.operands(inputs)?;
        let saved = BackwardInputs {
            out: operands.read(Role::Out, saved.out)?,
            lse: operands.read(Role::Lse, saved.lse)?,
            d_out: operands.read(Role::DOut, saved.d_out)?,
            d_lse: saved.d_lse.map(|d_lse| operands.read(Role::DLse, d_lse)).transpose()?,
        };
        let outputs = operands.gradients(outputs)?;
        Ok((operands, saved, outputs))
    }

    fn operands<'v>(&self, inputs: Inputs<'v>) -> Result<Operands<'v>, Error> {
        Operands::new(self.order, inputs)
    }

    #[inline]
    fn forward_call<'c>(
        &'c self,
        operands: &Operands<'c>,
        outputs: ForwardOutputs<'c>,
    ) -> Result<ForwardCall<'c>, Error> {
        // By hand: a call is large, and `map_err` would copy it.
        match ForwardCall::new(self.problem(), operands.inputs, outputs) {
            Ok(call) => Ok(call),
            Err(error) => Err(operands.order.told(error).into()),
        }
    }

    /// Checks a call, which is boxed since it is some kilobytes that every move would put on the stack again.
    /// Never inlined: what the check takes of the stack is not there beside the call.
    #[inline(never)]
    fn backward_call<'c>(
        &'c self,
        operands: &Operands<'c>,
        saved: BackwardInputs<'c>,
        outputs: BackwardOutputs<'c>,
    ) -> Result<Box<BackwardCall<'c>>, Error> {
        let call = BackwardCall::new(self.problem(), operands.inputs, saved, outputs);
        Ok(Box::new(call.map_err(|error| operands.order.told(error))?))
    }

    /// The span of a call, entered.
    fn span(&self) -> EnteredSpan {
        let span = call_span(self.problem());
        self.tell(&span);
        span
    }

    /// Says in the span of a call what runs it.
    pub(crate) fn tell(&self, span: &EnteredSpan) {
        span.record("backend", self.chosen.backend.name());
    }
}

/// The span of a call, entered; its implementation is recorded once it is chosen.
pub(crate) fn call_span(problem: &Problem) -> EnteredSpan {
    let backend = tracing::field::Empty;
    tracing::debug_span!(target: "attention", "attention", %problem, backend).entered()
}
