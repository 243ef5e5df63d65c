//! The forward pass: with owned outputs, or into the caller's memory.

use attention_core::{Device, ForwardCall, ForwardOutputs, Problem, Role, ViewMut};

use crate::numbers::KeptNumbers;
use crate::operands::{Operands, output};
use crate::{Attention, AxisOrder, Error, IntoView, IntoViewMut, Tensor};

/// What a forward call with logsumexp returns, and what backward wants back.
#[derive(Clone, Debug, PartialEq)]
pub struct Forward {
    /// `[B, T, N, Hv]`, of the query's dtype; `[T, N, Hv]` where the inputs had no batch axis, `[total, N,
    /// Hv]` of packed queries. Heads come before the sequence in a call of [`Attention::bnth`].
    pub out: Tensor,
    /// The logsumexp of each row's logits, natural logarithm, `[B, T, N]` (`[T, N]`, `[total, N]`): f32, or
    /// f64 for f64 operands. -inf for a row with nothing to attend to.
    pub lse: Tensor,
    /// What was called, so that backward can refuse another call.
    pub(crate) problem: Problem,
    pub(crate) numbers: KeptNumbers,
    pub(crate) order: AxisOrder,
}

impl Forward {
    /// The problem that these are the outputs of.
    pub fn problem(&self) -> &Problem {
        &self.problem
    }
}

impl<'a> Attention<'a> {
    /// Computes the output, `[B, T, N, Hv]` in the query's dtype (`[T, N, Hv]` for inputs without a batch
    /// axis).
    ///
    /// Query, key and value are [views](crate::View) of any strides, references to [tensors](Tensor), or
    /// slices with a shape; the table of [`Attention`] has the shapes, also those of [`Attention::bnth`].
    ///
    /// # Errors
    /// [`Error::Core`] with the [`InvalidCall`](crate::InvalidCall), [`Error::Input`], [`Error::MixedRanks`]
    /// or [`Error::OtherOrder`] where the call is wrong; [`Error::NoImplementation`],
    /// [`Error::UnknownImplementation`], [`Error::NotBuilt`], [`Error::EmptyList`], or [`Error::Core`] with
    /// the refusal of the one asked for, where nothing runs it; [`Error::DeviceOutput`],
    /// [`Error::OutOfMemory`]; [`Error::Core`] with what the implementation failed in.
    pub fn forward<'b>(
        &self,
        query: impl IntoView<'b>,
        key: impl IntoView<'b>,
        value: impl IntoView<'b>,
    ) -> Result<Tensor, Error> {
        let operands = self.operands(query, key, value)?;
        host_outputs(operands.device(), "forward_into")?;
        let problem = self.forward_problem(&operands, false)?;
        let mut out = allocate(&operands, &problem, Role::Out)?;
        self.run_forward(&operands, &problem, &mut out, None)?;
        Ok(out)
    }

    /// As [`forward`](Self::forward), with the logsumexp.
    ///
    /// # Errors
    /// As [`forward`](Self::forward).
    pub fn forward_with_lse<'b>(
        &self,
        query: impl IntoView<'b>,
        key: impl IntoView<'b>,
        value: impl IntoView<'b>,
    ) -> Result<Forward, Error> {
        self.forward_owned(&self.operands(query, key, value)?, "forward_into")
    }

    /// As [`forward`](Self::forward), into memory of the caller's, of any strides in which no two elements
    /// meet: `out` `[B, T, N, Hv]`, and `lse` `[B, T, N]` where it is wanted (each without `B` for inputs
    /// without it).
    ///
    /// Memory may be on a device, with all tensors of the call: the implementation lends scratch there. Work
    /// is then done in the order and by the time that the implementation says.
    ///
    /// A refused call writes nothing.
    ///
    /// # Errors
    /// As [`forward`](Self::forward); an output that overlaps itself or another tensor is an invalid call.
    ///
    /// # Examples
    /// ```
    /// # #[cfg(feature = "cpu")] {
    /// use attention::{Attention, ViewMut};
    ///
    /// let x = vec![1.0f32; 2 * 3 * 4];
    /// let x = (&x, [1, 2, 3, 4]);
    /// let (mut out, mut lse) = (vec![0.0f32; 2 * 3 * 4], vec![0.0f32; 2 * 3]);
    /// let lse = ViewMut::from_slice(&mut lse, [1, 2, 3])?;
    /// Attention::new().forward_into(x, x, x, (&mut out, [1, 2, 3, 4]), Some(lse))?;
    /// assert_eq!(out, [1.0; 24]);
    /// // Without the logsumexp:
    /// Attention::new().forward_into(x, x, x, (&mut out, [1, 2, 3, 4]), None)?;
    /// # }
    /// # Ok::<(), attention::Error>(())
    /// ```
    pub fn forward_into<'b, 'o>(
        &self,
        query: impl IntoView<'b>,
        key: impl IntoView<'b>,
        value: impl IntoView<'b>,
        out: impl IntoViewMut<'o>,
        lse: Option<ViewMut<'o>>,
    ) -> Result<(), Error> {
        let operands = self.operands(query, key, value)?;
        let out = operands.written(Role::Out, output(Role::Out, out)?)?;
        let lse = lse.map(|lse| operands.written(Role::Lse, lse)).transpose()?;
        let mut builder = operands.problem(&self.options).layout(Role::Out, out.desc());
        if let Some(lse) = &lse {
            builder = builder.lse(true).layout(Role::Lse, lse.desc());
        }
        let problem = operands.build(builder, &self.options)?;
        self.forward_views(&operands, &problem, ForwardOutputs { out, lse })
    }

    /// Forward with logsumexp into owned tensors.
    pub(crate) fn forward_owned(
        &self,
        operands: &Operands<'_>,
        method: &'static str,
    ) -> Result<Forward, Error> {
        host_outputs(operands.device(), method)?;
        let problem = self.forward_problem(operands, true)?;
        let mut out = allocate(operands, &problem, Role::Out)?;
        let mut lse = allocate(operands, &problem, Role::Lse)?;
        self.run_forward(operands, &problem, &mut out, Some(&mut lse))?;
        let numbers = KeptNumbers::of(&operands.call(&problem)?);
        Ok(Forward { out, lse, problem, numbers, order: operands.order })
    }

    fn run_forward(
        &self,
        operands: &Operands<'_>,
        problem: &Problem,
        out: &mut Tensor,
        lse: Option<&mut Tensor>,
    ) -> Result<(), Error> {
        let outputs = ForwardOutputs {
            out: operands.written(Role::Out, out.view_mut())?,
            lse: lse.map(|lse| operands.written(Role::Lse, lse.view_mut())).transpose()?,
        };
        self.forward_views(operands, problem, outputs)
    }

    fn forward_views(
        &self,
        operands: &Operands<'_>,
        problem: &Problem,
        outputs: ForwardOutputs<'_>,
    ) -> Result<(), Error> {
        let check = |outputs| ForwardCall::new(problem, operands.inputs, outputs).map(drop);
        self.run(operands, problem, outputs, check, |plan, outputs| plan.run_forward(operands, outputs))
    }
}

/// Refuses to allocate outputs for a call whose inputs are not in host memory.
pub(crate) fn host_outputs(device: Device, method: &'static str) -> Result<(), Error> {
    if device == Device::Cpu { Ok(()) } else { Err(Error::DeviceOutput { device, method }) }
}

/// A tensor for an output of a problem, without the first axis if the caller gave none.
pub(crate) fn allocate(operands: &Operands<'_>, problem: &Problem, role: Role) -> Result<Tensor, Error> {
    let desc = problem.tensor(role).expect("the problem was built with this output");
    Tensor::zeros_of(desc.dtype(), operands.returned(&desc.shape(), role))
}
