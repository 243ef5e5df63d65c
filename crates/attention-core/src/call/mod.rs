//! A problem together with its data.

mod described;
mod key_scale;
mod overlap;
mod problem;

pub use problem::CallProblem;

use crate::{CallData, InvalidCall, Pass, Problem, ProblemBuilder, Role, View, ViewMut};
use described::expect_as_described;
use overlap::{Extent, elements_meet};

/// The inputs that forward and backward share.
#[derive(Clone, Copy, Debug)]
pub struct Inputs<'a> {
    /// `[B, T, N, H]`.
    pub query: View<'a>,
    /// `[B, S, K, H]`.
    pub key: View<'a>,
    /// `[B, S, K, Hv]`.
    pub value: View<'a>,
    /// Boolean, `true` takes part; broadcasts to `[B, N, T, S]`.
    pub mask: Option<View<'a>>,
    /// Added to the logits; broadcasts to `[B, N, T, S]`.
    pub bias: Option<View<'a>>,
    /// `[N]` or `[B, N]`.
    pub alibi_slopes: Option<View<'a>>,
    /// `[N]`.
    pub sinks: Option<View<'a>>,
    /// Lengths, offsets, scale, softcap and dropout.
    pub data: CallData<'a>,
}

impl<'a> Inputs<'a> {
    /// Inputs without optional tensors, and with no numbers but the defaults.
    pub fn new(query: View<'a>, key: View<'a>, value: View<'a>) -> Self {
        let data = CallData::default();
        Self { query, key, value, mask: None, bias: None, alibi_slopes: None, sinks: None, data }
    }

    /// Starts the problem of these inputs: their layouts, the query's device, and which numbers there are.
    pub fn problem(&self) -> ProblemBuilder {
        let mut builder = Problem::builder(self.query.desc(), self.key.desc(), self.value.desc());
        builder.set_device(self.query.device());
        for (role, view) in self.views() {
            if let Some(view) = view {
                builder.set_layout(role, view.desc());
            }
        }
        builder.set_data(&self.data);
        builder
    }

    #[inline]
    fn views(&self) -> [(Role, Option<&View<'a>>); 7] {
        [
            (Role::Query, Some(&self.query)),
            (Role::Key, Some(&self.key)),
            (Role::Value, Some(&self.value)),
            (Role::Mask, self.mask.as_ref()),
            (Role::Bias, self.bias.as_ref()),
            (Role::AlibiSlopes, self.alibi_slopes.as_ref()),
            (Role::Sinks, self.sinks.as_ref()),
        ]
    }

    /// Brings masks, biases and packed tensors to the axes that the problem describes them with. Called on
    /// checked inputs.
    #[inline]
    fn fill_ranks(&mut self) {
        let operands = [&mut self.query, &mut self.key, &mut self.value].into_iter();
        for view in operands.chain([&mut self.mask, &mut self.bias].into_iter().flatten()) {
            read_with_axes(view, 4);
        }
    }
}

/// Adds leading axes of size 1 until there are this many, at most four.
#[inline]
fn read_with_axes(view: &mut View<'_>, axes: usize) {
    while view.desc().rank() < axes {
        *view = view.unsqueeze().expect("a rank below four leaves room for another axis");
    }
}

/// As [`read_with_axes`].
#[inline]
fn written_with_axes(mut view: ViewMut<'_>, axes: usize) -> ViewMut<'_> {
    while view.desc().rank() < axes {
        view = view.unsqueeze().expect("a rank below four leaves room for another axis");
    }
    view
}

/// What a forward call writes.
#[derive(Debug)]
pub struct ForwardOutputs<'a> {
    /// `[B, T, N, Hv]`, of the query's dtype.
    pub out: ViewMut<'a>,
    /// `[B, T, N]`, f32 (f64 for f64 operands); present where the problem wants it.
    pub lse: Option<ViewMut<'a>>,
}

/// What a backward call reads besides the shared inputs.
#[derive(Clone, Copy, Debug)]
pub struct BackwardInputs<'a> {
    /// The forward's output, `[B, T, N, Hv]`.
    pub out: View<'a>,
    /// The forward's logsumexp, `[B, T, N]`.
    pub lse: View<'a>,
    /// The incoming gradient of the output, `[B, T, N, Hv]`.
    pub d_out: View<'a>,
    /// The incoming gradient of the logsumexp, `[B, T, N]`.
    pub d_lse: Option<View<'a>>,
}

/// What a backward call writes: each present where the problem wants that gradient.
#[derive(Debug, Default)]
pub struct BackwardOutputs<'a> {
    /// The gradient of the query.
    pub dq: Option<ViewMut<'a>>,
    /// The gradient of the key.
    pub dk: Option<ViewMut<'a>>,
    /// The gradient of the value.
    pub dv: Option<ViewMut<'a>>,
    /// The gradient of the bias, of the bias's shape.
    pub dbias: Option<ViewMut<'a>>,
    /// The gradient of the sinks.
    pub dsinks: Option<ViewMut<'a>>,
}

/// A forward problem with its data, checked: every tensor is there, is as the problem says, lies on its
/// device, and no output overlaps anything.
///
/// # Examples
/// ```
/// use attention_core::{ForwardCall, ForwardOutputs, Inputs, View, ViewMut};
///
/// let (tokens, mut out) = (vec![0.5f32; 4 * 2 * 8], vec![0f32; 4 * 2 * 8]);
/// let x = View::from_slice(&tokens, [1, 4, 2, 8])?;
/// let inputs = Inputs::new(x, x, x);
/// let problem = inputs.problem().causal(true).build()?;
/// let outputs = ForwardOutputs { out: ViewMut::from_slice(&mut out, [1, 4, 2, 8])?, lse: None };
/// // Ready for `Plan::forward`.
/// let call = ForwardCall::new(&problem, inputs, outputs)?;
/// # assert!(call.problem().causal());
/// # Ok::<(), attention_core::InvalidCall>(())
/// ```
#[derive(Debug)]
pub struct ForwardCall<'a> {
    problem: CallProblem<'a>,
    inputs: Inputs<'a>,
    outputs: ForwardOutputs<'a>,
}

/// A backward problem with its data, checked as in [`ForwardCall`].
#[derive(Debug)]
pub struct BackwardCall<'a> {
    problem: CallProblem<'a>,
    inputs: Inputs<'a>,
    saved: BackwardInputs<'a>,
    outputs: BackwardOutputs<'a>,
}

impl<'a> ForwardCall<'a> {
    /// Checks the data against the problem.
    ///
    /// # Errors
    /// [`InvalidCall`]: a missing or unexpected tensor, one that differs from the problem's description, one
    /// on another device, an output that overlaps another tensor, a problem of the other pass.
    pub fn new(
        problem: &'a Problem,
        mut inputs: Inputs<'a>,
        mut outputs: ForwardOutputs<'a>,
    ) -> Result<Self, InvalidCall> {
        expect_pass(problem, Pass::Forward)?;
        let mut checker = Checker::new(problem);
        let problem = checker.inputs(&inputs)?;
        checker.written(Role::Out, Some(&outputs.out))?;
        checker.written(Role::Lse, outputs.lse.as_ref())?;
        checker.overlaps()?;
        inputs.fill_ranks();
        // Packed outputs may come without the axis in front.
        outputs.out = written_with_axes(outputs.out, 4);
        outputs.lse = outputs.lse.map(|lse| written_with_axes(lse, 3));
        Ok(Self { problem, inputs, outputs })
    }

    /// The problem.
    pub fn problem(&self) -> &'a Problem {
        self.problem.problem()
    }

    /// The problem with the numbers of this call, the inputs and the outputs: masks, biases and packed
    /// tensors with the axes that the problem has.
    #[inline]
    pub fn into_parts(self) -> (CallProblem<'a>, Inputs<'a>, ForwardOutputs<'a>) {
        (self.problem, self.inputs, self.outputs)
    }
}

impl<'a> BackwardCall<'a> {
    /// Checks the data against the problem.
    ///
    /// # Errors
    /// As [`ForwardCall::new`].
    pub fn new(
        problem: &'a Problem,
        mut inputs: Inputs<'a>,
        mut saved: BackwardInputs<'a>,
        mut outputs: BackwardOutputs<'a>,
    ) -> Result<Self, InvalidCall> {
        expect_pass(problem, Pass::Backward)?;
        let mut checker = Checker::new(problem);
        let problem = checker.inputs(&inputs)?;
        checker.read(Role::Out, Some(&saved.out))?;
        checker.read(Role::Lse, Some(&saved.lse))?;
        checker.read(Role::DOut, Some(&saved.d_out))?;
        checker.read(Role::DLse, saved.d_lse.as_ref())?;
        checker.written(Role::DQuery, outputs.dq.as_ref())?;
        checker.written(Role::DKey, outputs.dk.as_ref())?;
        checker.written(Role::DValue, outputs.dv.as_ref())?;
        checker.written(Role::DBias, outputs.dbias.as_ref())?;
        checker.written(Role::DSinks, outputs.dsinks.as_ref())?;
        checker.overlaps()?;
        read_with_axes(&mut saved.out, 4);
        read_with_axes(&mut saved.lse, 3);
        read_with_axes(&mut saved.d_out, 4);
        saved.d_lse.iter_mut().for_each(|d_lse| read_with_axes(d_lse, 3));
        for gradient in [&mut outputs.dq, &mut outputs.dk, &mut outputs.dv, &mut outputs.dbias] {
            *gradient = gradient.take().map(|view| written_with_axes(view, 4));
        }
        inputs.fill_ranks();
        Ok(Self { problem, inputs, saved, outputs })
    }

    /// The problem.
    pub fn problem(&self) -> &'a Problem {
        self.problem.problem()
    }

    /// The problem with the numbers of this call, the inputs, what the forward left, and the outputs, all
    /// with the axes that the problem has.
    #[inline]
    pub fn into_parts(self) -> (CallProblem<'a>, Inputs<'a>, BackwardInputs<'a>, BackwardOutputs<'a>) {
        (self.problem, self.inputs, self.saved, self.outputs)
    }
}

fn expect_pass(problem: &Problem, call: Pass) -> Result<(), InvalidCall> {
    let problem = problem.pass();
    if problem != call {
        return Err(InvalidCall::WrongPass { problem, call });
    }
    Ok(())
}

/// Compares tensors with the problem and collects where they lie.
struct Checker<'p> {
    problem: &'p Problem,
    /// Where tensors lie, by role.
    extents: [Extent; Role::COUNT],
    /// The roles of tensors with bytes that are read, and of those that are written.
    read: u32,
    written: u32,
}

impl<'p> Checker<'p> {
    fn new(problem: &'p Problem) -> Self {
        Self { problem, extents: [Extent::default(); Role::COUNT], read: 0, written: 0 }
    }

    /// The inputs, and what they make of the problem.
    fn inputs<'c>(&mut self, inputs: &Inputs<'c>) -> Result<CallProblem<'c>, InvalidCall>
    where
        'p: 'c,
    {
        for (role, view) in inputs.views() {
            self.read(role, view)?;
        }
        for (role, view) in inputs.data.views() {
            self.read |= view.map_or(0, |view| self.lies(role, view.address_range().into()));
        }
        CallProblem::new(self.problem, &inputs.data)
    }

    #[inline]
    fn read(&mut self, role: Role, view: Option<&View<'_>>) -> Result<(), InvalidCall> {
        expect_as_described(self.problem, role, view.map(|view| (view.desc_ref(), view.device())))?;
        self.read |= view.map_or(0, |view| self.lies(role, view.address_range().into()));
        Ok(())
    }

    #[inline]
    fn written(&mut self, role: Role, view: Option<&ViewMut<'_>>) -> Result<(), InvalidCall> {
        expect_as_described(self.problem, role, view.map(|view| (view.desc_ref(), view.device())))?;
        self.written |= view.map_or(0, |view| self.lies(role, view.address_range().into()));
        Ok(())
    }

    /// The bit of the role, where the tensor has bytes.
    fn lies(&mut self, role: Role, extent: Extent) -> u32 {
        self.extents[role as usize] = extent;
        u32::from(extent.has_bytes()) << role as u32
    }

    /// Called on tensors that are as the problem describes them.
    fn overlaps(&self) -> Result<(), InvalidCall> {
        let at = |role: Role| self.extents[role as usize];
        for role in roles(self.written) {
            let output = at(role);
            // The gaps of an input count as its memory: views promise that nobody writes to them.
            let input = roles(self.read).find(|&input| at(input).meets(output));
            let meets = |other: &Role| {
                let descs = self.problem.tensor(role).zip(self.problem.tensor(*other));
                descs.is_some_and(|(one, two)| elements_meet((output, one), (at(*other), two)))
            };
            let mut before = roles(self.written).take_while(|&other| other != role);
            if let Some(second) = input.or_else(|| before.find(meets)) {
                return Err(InvalidCall::Overlap { first: role, second });
            }
        }
        Ok(())
    }
}

/// The roles of the bits, in order.
fn roles(mut bits: u32) -> impl Iterator<Item = Role> {
    std::iter::from_fn(move || {
        let role = Role::every().nth(bits.trailing_zeros() as usize)?;
        bits &= bits - 1;
        Some(role)
    })
}

#[cfg(test)]
mod tests;
