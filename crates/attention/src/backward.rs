//! The backward pass: with owned gradients, or into the caller's memory.

use attention_core::{
    BackwardCall, BackwardInputs, BackwardOutputs, Dropout, Gradients, InvalidCall, Problem, ProblemBuilder,
    Role, View,
};

use crate::forward::{allocate, host_outputs};
use crate::numbers::{KeptNumbers, KeptOffset};
use crate::operands::{Operands, input};
use crate::{Attention, AxisOrder, Error, Forward, IntoView, Tensor};

/// The gradients of a call: each present where it was wanted, with the shape and dtype of the tensor it
/// belongs to.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Backward {
    /// The gradient of the query.
    pub dq: Option<Tensor>,
    /// The gradient of the key.
    pub dk: Option<Tensor>,
    /// The gradient of the value.
    pub dv: Option<Tensor>,
    /// The gradient of the bias, in the shape in which the bias was given: summed over every axis along which
    /// it was broadcast.
    pub dbias: Option<Tensor>,
    /// The gradient of the sinks.
    pub dsinks: Option<Tensor>,
}

impl Backward {
    /// The gradients of query, key and value, or `None` where not all three were wanted.
    pub fn into_qkv(self) -> Option<(Tensor, Tensor, Tensor)> {
        Some((self.dq?, self.dk?, self.dv?))
    }
}

impl<'a> Attention<'a> {
    /// Computes gradients from what the forward returned and the incoming gradient of its output, `d_out`
    /// `[B, T, N, Hv]`, of any strides.
    ///
    /// The call must have the forward's options, numbers, masks and biases, and its [`longest`](Self::longest):
    /// others are refused, but for [`deterministic`](Self::deterministic), which changes no meaning. Numbers
    /// are compared by value, whether they were given as a list or as a tensor; of masks and biases, dtypes
    /// and shapes.
    /// [`gradients`](Self::gradients) says which are computed, and [`d_lse`](Self::d_lse) gives the incoming
    /// gradient of the logsumexp, if there is one.
    ///
    /// # Errors
    /// As [`forward`](Self::forward); [`Error::OtherForward`] where the forward was another call.
    pub fn backward<'b>(
        &self,
        query: impl IntoView<'b>,
        key: impl IntoView<'b>,
        value: impl IntoView<'b>,
        forward: &Forward,
        d_out: impl IntoView<'b>,
    ) -> Result<Backward, Error> {
        let operands = self.operands(query, key, value)?;
        let d_out = input(Role::DOut, d_out)?;
        self.backward_owned(&operands, forward, d_out)
    }

    /// As [`backward`](Self::backward), for a caller who kept nothing of the forward: runs it again first.
    ///
    /// # Errors
    /// As [`forward`](Self::forward).
    ///
    /// # Examples
    /// ```
    /// # #[cfg(feature = "cpu")] {
    /// use attention::{Attention, Gradients};
    ///
    /// let x = vec![0.5f32; 3 * 2 * 4];
    /// let x = (&x, [1, 3, 2, 4]);
    /// let d_out = vec![1.0f32; 3 * 2 * 4];
    /// // The value's gradient alone.
    /// let gradients = Attention::new()
    ///     .gradients(Gradients::VALUE)
    ///     .backward_recompute(x, x, x, (&d_out, [1, 3, 2, 4]))?;
    /// assert!(gradients.dq.is_none());
    /// assert_eq!(gradients.dv.unwrap().shape(), [1, 3, 2, 4].into());
    /// # }
    /// # Ok::<(), attention::Error>(())
    /// ```
    pub fn backward_recompute<'b>(
        &self,
        query: impl IntoView<'b>,
        key: impl IntoView<'b>,
        value: impl IntoView<'b>,
        d_out: impl IntoView<'b>,
    ) -> Result<Backward, Error> {
        let operands = self.operands(query, key, value)?;
        let d_out = input(Role::DOut, d_out)?;
        host_outputs(operands.device(), "backward_into")?;
        // Judged first, so that a backward that cannot run does not cost a forward.
        let incoming = Incoming::new(&operands, d_out, self.d_lse)?;
        let problem = incoming.problem(self, &operands, self.wanted());
        let problem = operands.build(problem, &self.options)?;
        self.plan_call(&operands, &problem)?;
        let forward = self.forward_owned(&operands, "backward_into")?;
        self.backward_owned(&operands, &forward, d_out)
    }

    /// As [`backward`](Self::backward), into memory of the caller's and from views: `saved` holds the
    /// forward's output and logsumexp and the incoming gradients, and the gradients computed are those that
    /// `outputs` has memory for. A [`d_lse`](Self::d_lse) of the builder counts where `saved` has none.
    ///
    /// Tensors come without the batch axis where query, key and value do. A refused call writes nothing. That
    /// options and numbers are those of the forward is not checked.
    ///
    /// # Errors
    /// As [`forward_into`](Self::forward_into). Where [`gradients`](Self::gradients) was set and says
    /// something else than `outputs`, the call is invalid.
    ///
    /// # Examples
    /// ```
    /// # #[cfg(feature = "cpu")] {
    /// use attention::{Attention, BackwardInputs, BackwardOutputs, View, ViewMut};
    ///
    /// let x = vec![0.5f32; 3 * 2 * 4];
    /// let (x, shape) = ((&x, [1, 3, 2, 4]), [1, 3, 2, 4]);
    /// let attention = Attention::new().causal(true);
    /// let forward = attention.forward_with_lse(x, x, x)?;
    ///
    /// let d_out = vec![1.0f32; 3 * 2 * 4];
    /// let saved = BackwardInputs {
    ///     out: forward.out.view(),
    ///     lse: forward.lse.view(),
    ///     d_out: View::from_slice(&d_out, shape)?,
    ///     d_lse: None,
    /// };
    /// // Gradients of key and value, side by side in one buffer.
    /// let mut memory = vec![0.0f32; 2 * 3 * 2 * 4];
    /// let (dk, dv) = memory.split_at_mut(3 * 2 * 4);
    /// let outputs = BackwardOutputs {
    ///     dk: Some(ViewMut::from_slice(dk, shape)?),
    ///     dv: Some(ViewMut::from_slice(dv, shape)?),
    ///     ..BackwardOutputs::default()
    /// };
    /// attention.backward_into(x, x, x, saved, outputs)?;
    /// // Every row spreads a gradient of 1 over the values that it sees.
    /// assert!((memory[3 * 2 * 4..].iter().sum::<f32>() - 24.0).abs() < 1e-4);
    /// # }
    /// # Ok::<(), attention::Error>(())
    /// ```
    pub fn backward_into<'b>(
        &self,
        query: impl IntoView<'b>,
        key: impl IntoView<'b>,
        value: impl IntoView<'b>,
        saved: BackwardInputs<'_>,
        outputs: BackwardOutputs<'_>,
    ) -> Result<(), Error> {
        let operands = self.operands(query, key, value)?;
        let incoming = Incoming::new(&operands, saved.d_out, saved.d_lse.or(self.d_lse))?;
        let saved = incoming.with(&operands, saved.out, saved.lse)?;
        let outputs = operands.gradients(outputs)?;
        let mut given = Gradients::NONE;
        let mut layouts = Vec::with_capacity(5);
        for (gradient, role, output) in [
            (Gradients::QUERY, Role::DQuery, &outputs.dq),
            (Gradients::KEY, Role::DKey, &outputs.dk),
            (Gradients::VALUE, Role::DValue, &outputs.dv),
            (Gradients::BIAS, Role::DBias, &outputs.dbias),
            (Gradients::SINKS, Role::DSinks, &outputs.dsinks),
        ] {
            if let Some(output) = output {
                given = given | gradient;
                layouts.push((role, output.desc()));
            }
        }
        let builder = incoming.problem(self, &operands, self.gradients.unwrap_or(given));
        let builder = builder.layout(Role::Out, saved.out.desc()).layout(Role::Lse, saved.lse.desc());
        let builder = layouts.into_iter().fold(builder, |builder, (role, desc)| builder.layout(role, desc));
        let problem = operands.build(builder, &self.options)?;
        self.backward_views(&operands, &problem, saved, outputs)
    }

    fn backward_owned(
        &self,
        operands: &Operands<'_>,
        forward: &Forward,
        d_out: View<'_>,
    ) -> Result<Backward, Error> {
        host_outputs(operands.device(), "backward_into")?;
        let incoming = Incoming::new(operands, d_out, self.d_lse)?;
        let (problem, mut gradients) = self.prepare_backward(operands, forward, &incoming)?;
        let saved = incoming.with(operands, forward.out.view(), forward.lse.view())?;
        self.backward_views(operands, &problem, saved, operands.gradients(gradients.outputs())?)?;
        Ok(gradients)
    }

    /// The problem of a backward call into owned tensors, and these.
    ///
    /// Returns before the call begins, so that what it builds with is not on the stack beside the call.
    #[inline(never)]
    fn prepare_backward(
        &self,
        operands: &Operands<'_>,
        forward: &Forward,
        incoming: &Incoming<'_>,
    ) -> Result<(Box<Problem>, Backward), Error> {
        // What the forward returned is contiguous in the caller's order, as the problem has it by default.
        let problem = operands.build(incoming.problem(self, operands, self.wanted()), &self.options)?;
        let numbers = KeptNumbers::of(&operands.call(&problem)?);
        same_call(forward, (&problem, &numbers), operands.order)?;
        let gradients = Backward::allocate(self, operands, &problem)?;
        Ok((Box::new(problem), gradients))
    }

    fn backward_views(
        &self,
        operands: &Operands<'_>,
        problem: &Problem,
        saved: BackwardInputs<'_>,
        outputs: BackwardOutputs<'_>,
    ) -> Result<(), Error> {
        let check = |outputs| BackwardCall::new(problem, operands.inputs, saved, outputs).map(drop);
        self.run(operands, problem, outputs, check, |plan, outputs| {
            plan.run_backward(operands, saved, outputs)
        })
    }
}

/// Refuses a backward of another call than its forward was: its gradients would be those of neither.
///
/// All of this is in host memory, where outputs that the facade owns are: there are no numbers that the host
/// does not know.
fn same_call(
    forward: &Forward,
    (problem, numbers): (&Problem, &KeptNumbers),
    order: AxisOrder,
) -> Result<(), Error> {
    fn compare<T: PartialEq>(
        what: &'static str,
        [forward, backward]: [T; 2],
        text: impl Fn(&T) -> String,
    ) -> Result<(), Error> {
        if forward == backward {
            return Ok(());
        }
        Err(Error::OtherForward { what, forward: text(&forward), backward: text(&backward) })
    }
    fn number(value: &Option<f64>) -> String {
        value.map_or_else(|| "none".to_owned(), |value| value.to_string())
    }
    /// Short lists as they are, of long ones the first number that differs.
    fn lists<T: PartialEq + std::fmt::Debug>(
        what: &'static str,
        [forward, backward]: [Option<&[T]>; 2],
    ) -> Result<(), Error> {
        const SHORT: usize = 16;
        let pairs = forward.zip(backward);
        let at = pairs.and_then(|(one, other)| one.iter().zip(other).position(|(one, other)| one != other));
        let (none, of) = if what.ends_with("starts") { ("none", "number") } else { ("full", "batch row") };
        compare(what, [forward, backward], |list| match (list, at) {
            (None, _) => none.to_owned(),
            (Some(list), Some(at)) if list.len() > SHORT => format!("{:?} in {of} {at}", list[at]),
            (Some(list), None) if list.len() > SHORT => format!("{} numbers", list.len()),
            (Some(list), _) => format!("{list:?}"),
        })
    }
    fn dropout(dropout: &Option<Dropout>) -> String {
        dropout.map_or_else(
            || "none".to_owned(),
            |dropout| {
                format!("of rate {}, seed {} and offset {}", dropout.rate, dropout.seed, dropout.offset)
            },
        )
    }
    let both = [&forward.problem, problem];
    let both_numbers = [&forward.numbers, numbers];
    compare("order of axes", [forward.order, order], ToString::to_string)?;
    compare("dtype", both.map(Problem::dtype), ToString::to_string)?;
    lists("query starts", both_numbers.map(|numbers| numbers.query_starts.as_deref()))?;
    lists("key/value starts", both_numbers.map(|numbers| numbers.key_value_starts.as_deref()))?;
    compare("sizes", both.map(Problem::dims), ToString::to_string)?;
    compare("scale", both_numbers.map(|numbers| numbers.scale), ToString::to_string)?;
    compare("causal", both.map(Problem::causal), ToString::to_string)?;
    match both_numbers.map(|numbers| &numbers.query_offset) {
        [KeptOffset::PerBatchRow(one), KeptOffset::PerBatchRow(other)] => {
            lists("query offset", [Some(&one[..]), Some(&other[..])])?;
        }
        different => compare("query offset", different, ToString::to_string)?,
    }
    compare("window", both.map(Problem::window), ToString::to_string)?;
    compare("softcap", both_numbers.map(|numbers| numbers.softcap), number)?;
    compare("dropout", both_numbers.map(|numbers| numbers.dropout), dropout)?;
    lists("query lengths", both_numbers.map(|numbers| numbers.query_lengths.as_deref()))?;
    lists("key/value lengths", both_numbers.map(|numbers| numbers.key_value_lengths.as_deref()))?;
    for role in [Role::Mask, Role::Bias, Role::AlibiSlopes, Role::Sinks] {
        let like = both.map(|problem| problem.tensor(role).map(|desc| (desc.dtype(), desc.shape())));
        compare(role.name(), like, |like| {
            like.map_or_else(|| "none".to_owned(), |(dtype, shape)| format!("of {dtype} {shape}"))
        })?;
    }
    Ok(())
}

/// The incoming gradients, with the batch axis.
struct Incoming<'a> {
    d_out: View<'a>,
    d_lse: Option<View<'a>>,
}

impl<'a> Incoming<'a> {
    fn new(operands: &Operands<'_>, d_out: View<'a>, d_lse: Option<View<'a>>) -> Result<Self, InvalidCall> {
        Ok(Self {
            d_out: operands.read(Role::DOut, d_out)?,
            d_lse: d_lse.map(|d_lse| operands.read(Role::DLse, d_lse)).transpose()?,
        })
    }

    /// What the forward left, and these.
    fn with<'v>(
        &self,
        operands: &Operands<'_>,
        out: View<'v>,
        lse: View<'v>,
    ) -> Result<BackwardInputs<'v>, InvalidCall>
    where
        'a: 'v,
    {
        Ok(BackwardInputs {
            out: operands.read(Role::Out, out)?,
            lse: operands.read(Role::Lse, lse)?,
            d_out: self.d_out,
            d_lse: self.d_lse,
        })
    }

    fn problem(&self, call: &Attention<'_>, operands: &Operands<'_>, wanted: Gradients) -> ProblemBuilder {
        let builder = operands.problem(&call.options).gradients(wanted).layout(Role::DOut, self.d_out.desc());
        match self.d_lse {
            Some(d_lse) => builder.d_lse(true).layout(Role::DLse, d_lse.desc()),
            None => builder,
        }
    }
}

impl Backward {
    /// Memory for every gradient of the problem.
    fn allocate(call: &Attention<'_>, operands: &Operands<'_>, problem: &Problem) -> Result<Self, Error> {
        let wanted = |role| problem.has(role).then(|| allocate(operands, problem, role)).transpose();
        let like = |role, view: Option<View<'_>>| {
            let view = view.filter(|_| problem.has(role));
            view.map(|view| Tensor::zeros_of(view.desc().dtype(), view.shape())).transpose()
        };
        Ok(Self {
            dq: wanted(Role::DQuery)?,
            dk: wanted(Role::DKey)?,
            dv: wanted(Role::DValue)?,
            // In the caller's shape, which may have fewer axes than the problem's.
            dbias: like(Role::DBias, call.optional.bias)?,
            dsinks: like(Role::DSinks, call.optional.sinks)?,
        })
    }

    fn outputs(&mut self) -> BackwardOutputs<'_> {
        let Self { dq, dk, dv, dbias, dsinks } = self;
        let [dq, dk, dv, dbias, dsinks] =
            [dq, dk, dv, dbias, dsinks].map(|tensor| tensor.as_mut().map(Tensor::view_mut));
        BackwardOutputs { dq, dk, dv, dbias, dsinks }
    }
}
