//! Tensors with memory of their own, in several layouts, and both passes over them.

use attention_core::{
    AttentionBackend, BackwardCall, BackwardInputs, BackwardOutputs, Dims, Element, ForwardCall,
    ForwardOutputs, Gradients, Inputs, Problem, Role, Scalar, ScratchBuffer, Strides, View, ViewMut,
};
use attention_cpu::CpuBackend;

/// How a tensor lies in its memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Layout {
    Contiguous,
    /// The last two axes before the innermost are swapped in memory: heads before rows.
    HeadsFirst,
    /// Every element has a gap behind it.
    InnerStride,
    /// The first axis runs backwards.
    Reversed,
}

pub(crate) const LAYOUTS: [Layout; 4] =
    [Layout::Contiguous, Layout::HeadsFirst, Layout::InnerStride, Layout::Reversed];

/// A tensor of up to four axes.
#[derive(Clone, Debug)]
pub(crate) struct Store<T> {
    data: Vec<T>,
    pub(crate) shape: Dims,
    strides: Strides,
    first: usize,
}

impl<T: Scalar + Element> Store<T> {
    /// Full of NaN.
    pub(crate) fn new(shape: impl Into<Dims>, layout: Layout) -> Self {
        let shape = shape.into();
        let rank = shape.rank();
        let mut order: Vec<usize> = (0..rank).collect();
        if layout == Layout::HeadsFirst && rank >= 3 {
            order.swap(rank - 2, rank - 3);
        }
        let mut strides = Strides::from_slice(&vec![0; rank]).unwrap();
        let mut step = if layout == Layout::InnerStride { 2 } else { 1 };
        for &axis in order.iter().rev() {
            strides[axis] = step;
            step *= shape[axis].max(1) as isize;
        }
        let mut first = 0;
        if layout == Layout::Reversed && shape[0] > 0 {
            first = strides[0] as usize * (shape[0] - 1);
            strides[0] = -strides[0];
        }
        Self { data: vec![T::from_f32(f32::NAN); step as usize], shape, strides, first }
    }

    /// Row-major elements.
    pub(crate) fn of(shape: impl Into<Dims>, layout: Layout, elements: &[T]) -> Self {
        let mut store = Self::new(shape, layout);
        store.write(0, elements);
        store
    }

    fn at(&self, flat: usize) -> usize {
        let (mut flat, mut at) = (flat, self.first as isize);
        for axis in (0..self.shape.rank()).rev() {
            at += (flat % self.shape[axis]) as isize * self.strides[axis];
            flat /= self.shape[axis];
        }
        at as usize
    }

    /// Elements of one index of the first axis.
    pub(crate) fn row(&self) -> usize {
        self.shape.iter().skip(1).product()
    }

    /// Writes row-major elements from index `from` of the first axis on.
    pub(crate) fn write(&mut self, from: usize, elements: &[T]) {
        for (index, &element) in elements.iter().enumerate() {
            let at = self.at(from * self.row() + index);
            self.data[at] = element;
        }
    }

    /// Writes the first row-major elements of index `from` of the first axis.
    pub(crate) fn write_part(&mut self, from: usize, elements: &[T]) {
        assert!(elements.len() <= self.row());
        self.write(from, elements);
    }

    /// The elements of `count` indices of the first axis, row-major.
    pub(crate) fn read(&self, from: usize, count: usize) -> Vec<T> {
        (from * self.row()..(from + count) * self.row()).map(|flat| self.data[self.at(flat)]).collect()
    }

    pub(crate) fn view(&self) -> View<'_> {
        View::strided(&self.data, self.first, self.shape, self.strides).unwrap()
    }

    pub(crate) fn view_mut(&mut self) -> ViewMut<'_> {
        ViewMut::strided(&mut self.data, self.first, self.shape, self.strides).unwrap()
    }
}

/// The bits of some numbers, for comparisons that tell zeros apart.
pub(crate) fn bits<T: Scalar>(numbers: &[T]) -> Vec<u64> {
    numbers.iter().map(|number| number.to_f64().to_bits()).collect()
}

/// What both passes write.
#[derive(Clone, Debug)]
pub(crate) struct Results<T, L> {
    pub(crate) out: Store<T>,
    pub(crate) lse: Store<L>,
    pub(crate) dq: Store<T>,
    pub(crate) dk: Store<T>,
    pub(crate) dv: Store<T>,
    pub(crate) dbias: Option<Store<f64>>,
    pub(crate) dsinks: Option<Store<f64>>,
}

/// Planned scratch, to the byte, full of NaN.
fn scratch(bytes: usize) -> ScratchBuffer {
    let mut scratch = ScratchBuffer::new(bytes);
    scratch.bytes_mut().fill(0xFF);
    scratch
}

fn with_last(shape: Dims, last: usize) -> Dims {
    let mut shape = shape;
    let axis = shape.rank() - 1;
    shape[axis] = last;
    shape
}

/// Runs the forward pass; outputs lie as `layout` says.
pub(crate) fn forward<T: Scalar + Element, L: Scalar + Element>(
    backend: &CpuBackend,
    inputs: Inputs<'_>,
    problem: &Problem,
    layout: Layout,
) -> (Store<T>, Store<L>) {
    let query = inputs.query.shape();
    let mut out = Store::<T>::new(with_last(query, problem.dims().value_head_dim), layout);
    let mut lse = Store::<L>::new(Dims::from_slice(&query[..query.rank() - 1]).unwrap(), layout);
    let problem = problem.to_builder().layout(Role::Out, out.view().desc());
    let problem = problem.layout(Role::Lse, lse.view().desc()).build().unwrap();
    let plan = backend.plan(&problem).unwrap();
    let outputs = ForwardOutputs { out: out.view_mut(), lse: Some(lse.view_mut()) };
    let call = ForwardCall::new(&problem, inputs, outputs).unwrap();
    plan.forward(call, scratch(plan.scratch_bytes()).scratch()).unwrap();
    (out, lse)
}

/// Runs the forward pass and then the backward pass. In between, `spoil` may write to what belongs to no
/// sequence.
pub(crate) fn both<T: Scalar + Element, L: Scalar + Element>(
    backend: &CpuBackend,
    inputs: Inputs<'_>,
    problem: &Problem,
    layout: Layout,
    (d_out, d_lse): (&Store<T>, Option<&Store<L>>),
    spoil: impl FnOnce(&mut Store<T>, &mut Store<L>),
) -> Results<T, L> {
    let (out, lse) = forward::<T, L>(backend, inputs, problem, layout);
    let (mut saved_out, mut saved_lse) = (out.clone(), lse.clone());
    spoil(&mut saved_out, &mut saved_lse);

    let mut gradients = Gradients::QKV;
    for (role, gradient) in [(Role::Bias, Gradients::BIAS), (Role::Sinks, Gradients::SINKS)] {
        if problem.has(role) {
            gradients = gradients | gradient;
        }
    }
    let mut dq = Store::<T>::new(inputs.query.shape(), layout);
    let mut dk = Store::<T>::new(inputs.key.shape(), layout);
    let mut dv = Store::<T>::new(inputs.value.shape(), layout);
    let mut dbias = inputs.bias.map(|bias| Store::<f64>::new(bias.shape(), Layout::Contiguous));
    let mut dsinks = inputs.sinks.map(|sinks| Store::<f64>::new(sinks.shape(), Layout::Contiguous));
    let mut builder = problem.to_builder().gradients(gradients).d_lse(d_lse.is_some());
    for (role, desc) in [
        (Role::Out, saved_out.view().desc()),
        (Role::Lse, saved_lse.view().desc()),
        (Role::DOut, d_out.view().desc()),
        (Role::DQuery, dq.view().desc()),
        (Role::DKey, dk.view().desc()),
        (Role::DValue, dv.view().desc()),
    ] {
        builder = builder.layout(role, desc);
    }
    if let Some(d_lse) = d_lse {
        builder = builder.layout(Role::DLse, d_lse.view().desc());
    }
    let problem = builder.build().unwrap();
    let plan = backend.plan(&problem).unwrap();
    let saved = BackwardInputs {
        out: saved_out.view(),
        lse: saved_lse.view(),
        d_out: d_out.view(),
        d_lse: d_lse.map(Store::view),
    };
    let outputs = BackwardOutputs {
        dq: Some(dq.view_mut()),
        dk: Some(dk.view_mut()),
        dv: Some(dv.view_mut()),
        dbias: dbias.as_mut().map(Store::view_mut),
        dsinks: dsinks.as_mut().map(Store::view_mut),
    };
    let call = BackwardCall::new(&problem, inputs, saved, outputs).unwrap();
    plan.backward(call, scratch(plan.scratch_bytes()).scratch()).unwrap();
    Results { out, lse, dq, dk, dv, dbias, dsinks }
}
