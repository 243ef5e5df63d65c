//! Query, key and value as they were given, brought to four axes in the order of the core.

use attention_core::{
    BackwardOutputs, CallProblem, Device, Dims, Inputs, InvalidCall, Problem, ProblemBuilder, Role, View,
    ViewMut,
};

use crate::order::Kind;
use crate::{AxisOrder, Error, IntoView, IntoViewMut, Options};

/// The tensors of a call besides query, key and value, whose axes do not depend on the order of the call's.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct OptionalInputs<'a> {
    pub(crate) mask: Option<View<'a>>,
    pub(crate) bias: Option<View<'a>>,
    pub(crate) alibi_slopes: Option<View<'a>>,
    pub(crate) sinks: Option<View<'a>>,
    /// These five take the place of what the options say.
    pub(crate) query_lengths: Option<View<'a>>,
    pub(crate) key_value_lengths: Option<View<'a>>,
    pub(crate) query_offsets: Option<View<'a>>,
    pub(crate) dropout_seed: Option<View<'a>>,
    pub(crate) dropout_offset: Option<View<'a>>,
}

/// The inputs of a call with four axes in the order of the core, and how they came.
#[derive(Clone, Copy)]
pub(crate) struct Operands<'a> {
    pub(crate) inputs: Inputs<'a>,
    /// False where query, key and value came without a batch axis; outputs have none then.
    pub(crate) batched: bool,
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
        let batched = ranks[0] == 4;
        let mut operands = Self { inputs, batched, order };
        // Mostly they are in the order of the core, and inputs are large.
        if !(batched && order == AxisOrder::Btnh) {
            let Inputs { query, key, value, .. } = &mut operands.inputs;
            for view in [query, key, value] {
                *view = order.read(Kind::Operand, *view)?;
                if !batched {
                    *view = view.unsqueeze()?;
                }
            }
        }
        operands.one_device()?;
        Ok(operands)
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

    /// The problem of these inputs and options, with outputs and gradients that are contiguous in the caller's order.
    pub(crate) fn problem(&self, options: &Options) -> ProblemBuilder {
        let builder = options.apply_flags(self.inputs.problem());
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

    /// The checked problem, or an error with shapes as the caller has them, which says so where the inputs would fit in the
    /// other order of axes.
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
            let shapes = [query, key, value].map(|view| self.returned(&view.shape(), Kind::Operand));
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
        if self.batched { Ok(view) } else { view.unsqueeze() }
    }

    /// As [`read`](Self::read), for a tensor that is written.
    pub(crate) fn written<'o>(&self, role: Role, view: ViewMut<'o>) -> Result<ViewMut<'o>, InvalidCall> {
        if self.batched && self.order == AxisOrder::Btnh {
            return Ok(view);
        }
        self.expect_rank(role, view.shape())?;
        let view = match Kind::of(role) {
            Some(kind) => self.order.written(kind, view)?,
            None => view,
        };
        if self.batched { Ok(view) } else { view.unsqueeze() }
    }

    /// As [`written`](Self::written), for the gradients of query, key and value; those of bias and sinks are as they are.
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

    /// Without a batch axis, another number of axes could pass for a batch; with one, the core says what is wrong.
    fn expect_rank(&self, role: Role, shape: Dims) -> Result<(), InvalidCall> {
        if self.batched {
            return Ok(());
        }
        let (axes, expected) = match role {
            Role::Lse | Role::DLse => (2, "2, as the query has no batch axis"),
            _ => (3, "3, as the query has no batch axis"),
        };
        if shape.rank() != axes {
            return Err(InvalidCall::Rank { role, rank: shape.rank(), shape, expected });
        }
        Ok(())
    }

    /// The shape of a tensor in the caller's order, without the batch axis that the caller did not give.
    pub(crate) fn returned(&self, shape: &[usize], kind: Kind) -> Dims {
        let shape = Dims::from_slice(shape).expect("a tensor of a call has at most four axes");
        let shape = self.order.shape(kind, shape);
        if self.batched { shape } else { Dims::from_slice(&shape[1..]).expect("fewer axes than before") }
    }
}
