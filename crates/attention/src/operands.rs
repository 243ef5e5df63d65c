//! Query, key and value as they were given, brought to four axes.

use attention_core::{Device, Dims, Inputs, InvalidCall, ProblemBuilder, Role, View, ViewMut};

use crate::{Attention, Error, IntoView, IntoViewMut, Options};

/// The inputs of a call with four axes, and whether they came with them.
#[derive(Clone, Copy)]
pub(crate) struct Operands<'a> {
    pub(crate) inputs: Inputs<'a>,
    /// False where query, key and value came without a batch axis; outputs have none then.
    pub(crate) batched: bool,
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
    pub(crate) fn new<'b: 'a>(
        call: &Attention<'a>,
        query: impl IntoView<'b>,
        key: impl IntoView<'b>,
        value: impl IntoView<'b>,
    ) -> Result<Self, Error> {
        if let Some((role, source)) = call.broken.clone() {
            return Err(Error::Input { role, source });
        }
        let (query, key, value) =
            (input(Role::Query, query)?, input(Role::Key, key)?, input(Role::Value, value)?);
        let views = [(Role::Query, query), (Role::Key, key), (Role::Value, value)];
        let ranks = views.map(|(_, view)| view.shape().rank());
        for ((role, view), rank) in views.into_iter().zip(ranks) {
            if !(3..=4).contains(&rank) {
                let expected = "4 ([B, T, N, H]) or 3 ([T, N, H])";
                return Err(InvalidCall::Rank { role, rank, shape: view.shape(), expected }.into());
            }
        }
        if ranks != [ranks[0]; 3] {
            let (query, key, value) = (query.shape(), key.shape(), value.shape());
            return Err(Error::MixedRanks { query, key, value });
        }
        let batched = ranks[0] == 4;
        let four = |view: View<'b>| if batched { Ok(view) } else { view.unsqueeze() };
        let inputs = Inputs {
            mask: call.mask,
            bias: call.bias,
            alibi_slopes: call.alibi_slopes,
            sinks: call.sinks,
            ..Inputs::new(four(query)?, four(key)?, four(value)?)
        };
        let operands = Self { inputs, batched };
        operands.one_device()?;
        Ok(operands)
    }

    pub(crate) fn device(&self) -> Device {
        self.inputs.query.device()
    }

    /// Checked before an implementation is chosen by the query's device.
    fn one_device(&self) -> Result<(), InvalidCall> {
        let Inputs { query, key, value, mask, bias, alibi_slopes, sinks } = self.inputs;
        let others = [
            (Role::Key, Some(key)),
            (Role::Value, Some(value)),
            (Role::Mask, mask),
            (Role::Bias, bias),
            (Role::AlibiSlopes, alibi_slopes),
            (Role::Sinks, sinks),
        ];
        let expected = query.device();
        for (role, device) in others.into_iter().filter_map(|(role, view)| Some((role, view?.device()))) {
            if device != expected {
                return Err(InvalidCall::Device { role, device, expected });
            }
        }
        Ok(())
    }

    /// The problem of these inputs and options.
    pub(crate) fn problem(&self, options: &Options) -> ProblemBuilder {
        options.apply(self.inputs.problem())
    }

    /// Brings a tensor that comes with the output's axes to those of the problem.
    pub(crate) fn read<'v>(&self, role: Role, view: View<'v>) -> Result<View<'v>, InvalidCall> {
        if self.batched {
            return Ok(view);
        }
        self.expect_unbatched(role, view.shape())?;
        view.unsqueeze()
    }

    /// As [`read`](Self::read), for a tensor that is written.
    pub(crate) fn written<'o>(&self, role: Role, view: ViewMut<'o>) -> Result<ViewMut<'o>, InvalidCall> {
        if self.batched {
            return Ok(view);
        }
        self.expect_unbatched(role, view.shape())?;
        view.unsqueeze()
    }

    fn expect_unbatched(&self, role: Role, shape: Dims) -> Result<(), InvalidCall> {
        let (axes, expected) = match role {
            Role::Lse | Role::DLse => (2, "2, as the query has no batch axis"),
            _ => (3, "3, as the query has no batch axis"),
        };
        if shape.rank() != axes {
            return Err(InvalidCall::Rank { role, rank: shape.rank(), shape, expected });
        }
        Ok(())
    }

    /// The shape of an output without the batch axis that the caller did not give.
    pub(crate) fn returned(&self, shape: &[usize]) -> Dims {
        let axes = if self.batched { shape } else { &shape[1..] };
        Dims::from_slice(axes).expect("a tensor of a call has at most four axes")
    }
}
