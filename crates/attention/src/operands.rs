//! Query, key and value as they were given, brought to four axes in the order of the core.

use attention_core::{
    BackwardOutputs, CallProblem, Device, Dims, Inputs, InvalidCall, Problem, ProblemBuilder, Role, View,
    ViewMut,
};

use crate::order::Kind;
use crate::{AxisOrder, Error, IntoView, IntoViewMut, Options, sequences};

/// The tensors of a call besides query, key and value, whose axes do not depend on the order of the call's.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct OptionalInputs<'a> {
    pub(crate) mask: Option<View<'a>>,
    pub(crate) bias: Option<View<'a>>,
    pub(crate) alibi_slopes: Option<View<'a>>,
    pub(crate) sinks: Option<View<'a>>,
    /// These take the place of what the options say.
    pub(crate) query_lengths: Option<View<'a>>,
    pub(crate) key_value_lengths: Option<View<'a>>,
    pub(crate) query_offsets: Option<View<'a>>,
    pub(crate) dropout_seed: Option<View<'a>>,
    pub(crate) dropout_offset: Option<View<'a>>,
    pub(crate) query_starts: Option<View<'a>>,
    pub(crate) key_value_starts: Option<View<'a>>,
    /// These have no place in the options.
    pub(crate) block_table: Option<View<'a>>,
    pub(crate) key_scales: Option<View<'a>>,
    pub(crate) value_scales: Option<View<'a>>,
}

/// The inputs of a call with four axes in the order of the core, and how they came.
#[derive(Clone, Copy)]
pub(crate) struct Operands<'a> {
    pub(crate) inputs: Inputs<'a>,
    /// Of query, key and value, which came without the first of four axes: without a batch, or packed. What
    /// is like one of them, outputs and gradients, has as many axes as it.
    without_first_axis: [bool; 3],
    /// The order of the axes of query, key, value and everything that is like them.
    pub(crate) order: AxisOrder,
}

/// A tensor as a view, or an error that names it.
pub(crate) fn input<'a>(role: Role, tensor: impl IntoView<'a>) -> Result<View<'a>, Error> {
    tensor.into_view().map_err(|source| Error::Input { role, source })
}

/// Memory for a tensor as a view, or an error that names it.
pub(crate) fn output<'a>(role: Role, tensor: impl IntoViewMut<'a>) -> Result<ViewMut<'a>, Error> {
    tensor.into_view_mut().map_err(|source| Error::Input { role, source })
}

impl<'a> Operands<'a> {
    /// Of inputs whose query, key and value have the order of axes of the call.
    pub(crate) fn new(order: AxisOrder, inputs: Inputs<'a>) -> Result<Self, Error> {
        let Inputs { query, key, value, .. } = &inputs;
        let views = [(Role::Query, query), (Role::Key, key), (Role::Value, value)];
        let ranks = views.map(|(_, view)| view.shape().rank());
        if sequences::has_sequences(&inputs.data) {
            sequences::check_ranks(order, &inputs)?;
            return Self::with_four_axes(order, inputs, ranks.map(|rank| rank == 3));
        }
        for ((role, view), rank) in views.into_iter().zip(ranks) {
            if !(3..=4).contains(&rank) {
                let expected = match order {
                    AxisOrder::Btnh => "4 ([B, T, N, H]) or 3 ([T, N, H])",
                    AxisOrder::Bnth => "4 ([B, N, T, H]) or 3 ([N, T, H])",
                };
                return Err(InvalidCall::Rank { role, rank, shape: view.shape(), expected }.into());
            }
        }
        if ranks != [ranks[0]; 3] {
            let (query, key, value) = (query.shape(), key.shape(), value.shape());
            return Err(Error::MixedRanks { query, key, value, order });
        }
        Self::with_four_axes(order, inputs, [ranks[0] == 3; 3])
    }

    /// Of inputs whose numbers of axes are right.
    #[inline]
    fn with_four_axes(
        order: AxisOrder,
        inputs: Inputs<'a>,
        without_first_axis: [bool; 3],
    ) -> Result<Self, Error> {
        let mut operands = Self { inputs, without_first_axis, order };
        // Mostly they are in the order of the core, and inputs are large.
        if !operands.is_as_in_core() {
            let Inputs { query, key, value, .. } = &mut operands.inputs;
            for (view, without) in [query, key, value].into_iter().zip(without_first_axis) {
                *view = order.read(Kind::Operand, *view)?;
                if without {
                    *view = view.unsqueeze()?;
                }
            }
        }
        operands.one_device()?;
        Ok(operands)
    }

    /// Whether all tensors have the axes that the core has.
    fn is_as_in_core(&self) -> bool {
        self.without_first_axis == [false; 3] && self.order == AxisOrder::Btnh
    }

    /// Whether a tensor comes and goes without the first of its axes in the core.
    fn is_without_first_axis(&self, role: Role) -> bool {
        let [query, key, value] = self.without_first_axis;
        match role {
            Role::Key | Role::DKey => key,
            Role::Value | Role::DValue => value,
            _ => query,
        }
    }

    pub(crate) fn device(&self) -> Device {
        self.inputs.query.device()
    }

    /// Checked before an implementation is chosen by the query's device. Numbers of the call may be in host
    /// memory too; the call checks where they are.
    fn one_device(&self) -> Result<(), InvalidCall> {
        let Inputs { query, key, value, mask, bias, alibi_slopes, sinks, .. } = &self.inputs;
        let others = [
            (Role::Key, Some(key)),
            (Role::Value, Some(value)),
            (Role::Mask, mask.as_ref()),
            (Role::Bias, bias.as_ref()),
            (Role::AlibiSlopes, alibi_slopes.as_ref()),
            (Role::Sinks, sinks.as_ref()),
        ];
        let expected = query.device();
        for (role, device) in others.into_iter().filter_map(|(role, view)| Some((role, view?.device()))) {
            if device != expected {
                return Err(InvalidCall::Device { role, device, expected });
            }
        }
        Ok(())
    }

    /// The problem of these inputs and options, with outputs and gradients that are contiguous in the
    /// caller's order.
    pub(crate) fn problem(&self, options: &Options) -> ProblemBuilder {
        let mut builder = options.apply_flags(self.inputs.problem());
        if sequences::has_sequences(&self.inputs.data) {
            let (queries, keys) = sequences::longest(&self.inputs, options);
            builder = builder.longest(queries, keys);
        }
        if self.order == AxisOrder::Btnh {
            return builder;
        }
        let [query, key, value] =
            [self.inputs.query, self.inputs.key, self.inputs.value].map(|view| view.desc());
        let dtype = query.dtype();
        let (rows, width) = (query.shape(), value.shape()[3]);
        let out = [rows[0], rows[1], rows[2], width];
        let lse = [rows[0], rows[1], rows[2]];
        let operand = |dtype, shape: Dims| self.order.contiguous(Kind::Operand, dtype, shape);
        // Those that the problem turns out not to have are left out of it.
        [
            (Role::Out, operand(dtype, out.into())),
            (Role::DOut, operand(dtype, out.into())),
            (Role::Lse, self.order.contiguous(Kind::Rows, dtype.accumulator(), lse)),
            (Role::DLse, self.order.contiguous(Kind::Rows, dtype.accumulator(), lse)),
            (Role::DQuery, operand(dtype, query.shape())),
            (Role::DKey, operand(key.dtype(), key.shape())),
            (Role::DValue, operand(value.dtype(), value.shape())),
        ]
        .into_iter()
        .fold(builder, |builder, (role, desc)| builder.layout(role, desc))
    }

    /// The checked problem, or an error with shapes as the caller has them, which says so where the inputs
    /// would fit in the other order of axes.
    #[inline]
    pub(crate) fn build(&self, builder: ProblemBuilder, options: &Options) -> Result<Problem, Error> {
        match builder.build() {
            Ok(problem) => Ok(problem),
            Err(error) => Err(self.not_built(error, options)),
        }
    }

    /// Why there is no problem, as the caller is told of it.
    #[cold]
    fn not_built(&self, error: InvalidCall, options: &Options) -> Error {
        let misfit = matches!(
            error,
            InvalidCall::HeadsNotDivisible { .. }
                | InvalidCall::NotBroadcastable { role: Role::Mask | Role::Bias, .. }
                | InvalidCall::Shape { role: Role::Key | Role::Value | Role::AlibiSlopes | Role::Sinks, .. }
        );
        let source = self.order.told(error);
        if misfit && self.in_other_order().is_ok_and(|other| other.problem(options).build().is_ok()) {
            let Inputs { query, key, value, .. } = self.inputs;
            let views = [(Role::Query, query), (Role::Key, key), (Role::Value, value)];
            let shapes = views.map(|(role, view)| self.returned(&view.shape(), role));
            return Error::OtherOrder {
                source: Box::new(source),
                shapes: Box::new(shapes),
                order: self.order,
            };
        }
        source.into()
    }

    /// A problem of these inputs with the numbers of the call, checked.
    pub(crate) fn call<'c>(&self, problem: &'c Problem) -> Result<CallProblem<'c>, InvalidCall>
    where
        'a: 'c,
    {
        CallProblem::new(problem, &self.inputs.data)
    }

    /// A problem of these inputs, where the numbers of the call are right.
    pub(crate) fn with_numbers(&self, problem: Problem) -> Result<Problem, Error> {
        self.call(&problem)?;
        Ok(problem)
    }

    /// The same memory read in the other order of axes.
    fn in_other_order(&self) -> Result<Self, InvalidCall> {
        let swap = |view: View<'a>| AxisOrder::Bnth.read(Kind::Operand, view);
        let Inputs { query, key, value, .. } = self.inputs;
        let inputs = Inputs { query: swap(query)?, key: swap(key)?, value: swap(value)?, ..self.inputs };
        Ok(Self { inputs, order: self.order.other(), ..*self })
    }

    /// Brings a tensor that comes with the output's axes to those of the problem.
    pub(crate) fn read<'v>(&self, role: Role, view: View<'v>) -> Result<View<'v>, InvalidCall> {
        self.expect_rank(role, view.shape())?;
        let view = Kind::of(role).map_or(Ok(view), |kind| self.order.read(kind, view))?;
        if self.is_without_first_axis(role) { view.unsqueeze() } else { Ok(view) }
    }

    /// As [`read`](Self::read), for a tensor that is written.
    pub(crate) fn written<'o>(&self, role: Role, view: ViewMut<'o>) -> Result<ViewMut<'o>, InvalidCall> {
        if self.is_as_in_core() {
            return Ok(view);
        }
        self.expect_rank(role, view.shape())?;
        let view = match Kind::of(role) {
            Some(kind) => self.order.written(kind, view)?,
            None => view,
        };
        if self.is_without_first_axis(role) { view.unsqueeze() } else { Ok(view) }
    }

    /// As [`written`](Self::written), for the gradients of query, key and value; those of bias and sinks are
    /// as they are.
    pub(crate) fn gradients<'o>(
        &self,
        outputs: BackwardOutputs<'o>,
    ) -> Result<BackwardOutputs<'o>, InvalidCall> {
        let written = |role, view: Option<_>| view.map(|view| self.written(role, view)).transpose();
        Ok(BackwardOutputs {
            dq: written(Role::DQuery, outputs.dq)?,
            dk: written(Role::DKey, outputs.dk)?,
            dv: written(Role::DValue, outputs.dv)?,
            ..outputs
        })
    }

    /// Without a first axis, another number of axes could pass for it; with one, the core says what is wrong.
    fn expect_rank(&self, role: Role, shape: Dims) -> Result<(), InvalidCall> {
        if !self.is_without_first_axis(role) {
            return Ok(());
        }
        let data = &self.inputs.data;
        let (axes, expected) = match role {
            Role::Lse | Role::DLse if data.query_starts.is_some() => (2, "2, as queries are packed"),
            Role::Lse | Role::DLse => (2, "2, as the query has no batch axis"),
            Role::DKey | Role::DValue if data.key_value_starts.is_some() => (3, "3, as keys are packed"),
            _ if data.query_starts.is_some() => (3, "3, as queries are packed"),
            _ => (3, "3, as the query has no batch axis"),
        };
        if shape.rank() != axes {
            return Err(InvalidCall::Rank { role, rank: shape.rank(), shape, expected });
        }
        Ok(())
    }

    /// The shape of a tensor in the caller's order, without the first axis where the caller gave none.
    pub(crate) fn returned(&self, shape: &[usize], role: Role) -> Dims {
        let shape = Dims::from_slice(shape).expect("a tensor of a call has at most four axes");
        let shape = Kind::of(role).map_or(shape, |kind| self.order.shape(kind, shape));
        if !self.is_without_first_axis(role) {
            return shape;
        }
        Dims::from_slice(&shape[1..]).expect("fewer axes than before")
    }
}
