//! The arithmetic of the accumulator, and reading tensors into it.

use std::ops::{Add, AddAssign, Div, Mul, Neg, Sub};

use attention_conformance::oracle::Dense;
use attention_core::{CallProblem, DType, Inputs, Role, Scalar, View, ViewMut};
use half::{bf16, f16};

use super::Flaw;
use super::sequences::padded;

/// f32 or f64.
pub(crate) trait Real:
    Scalar
    + PartialOrd
    + Add<Output = Self>
    + Sub<Output = Self>
    + Mul<Output = Self>
    + Div<Output = Self>
    + Neg<Output = Self>
    + AddAssign
{
    fn exp(self) -> Self;
    fn ln(self) -> Self;
    fn tanh(self) -> Self;
}

macro_rules! real {
    ($type:ident) => {
        impl Real for $type {
            fn exp(self) -> Self {
                $type::exp(self)
            }
            fn ln(self) -> Self {
                $type::ln(self)
            }
            fn tanh(self) -> Self {
                $type::tanh(self)
            }
        }
    };
}
real!(f32);
real!(f64);

/// The inputs of a call, loaded once.
pub(crate) struct Loaded {
    pub(crate) query: Dense,
    pub(crate) key: Dense,
    pub(crate) value: Dense,
    pub(crate) mask: Option<Dense>,
    pub(crate) bias: Option<Dense>,
    pub(crate) alibi_slopes: Option<Dense>,
    pub(crate) sinks: Option<Dense>,
}

impl Loaded {
    pub(crate) fn new(problem: &CallProblem<'_>, inputs: &Inputs<'_>, flaw: Flaw) -> Self {
        let load = |view: Option<View<'_>>| view.map(|view| Dense::read(&view));
        let operand = |role: Role, view: &View<'_>| padded(problem, role, Dense::read(view), flaw);
        Self {
            query: operand(Role::Query, &inputs.query),
            key: operand(Role::Key, &inputs.key),
            value: operand(Role::Value, &inputs.value),
            mask: load(inputs.mask),
            bias: load(inputs.bias),
            alibi_slopes: load(inputs.alibi_slopes),
            sinks: load(inputs.sinks),
        }
    }
}

/// One element, rounded to the accumulator.
pub(crate) fn read<A: Real>(tensor: &Dense, index: &[usize]) -> A {
    A::from_f64(tensor.at(index))
}

/// Writes a row-major list of numbers, rounded to the tensor's dtype.
pub(crate) fn write(view: ViewMut<'_>, values: &[f64]) {
    match view.desc().dtype() {
        DType::F64 => write_as::<f64>(view, values),
        DType::F32 => write_as::<f32>(view, values),
        DType::F16 => write_as::<f16>(view, values),
        _ => write_as::<bf16>(view, values),
    }
}

fn write_as<T: Scalar>(view: ViewMut<'_>, values: &[f64]) {
    let shape = view.shape();
    let mut view = view.host_mut::<T>().unwrap();
    for (flat, &value) in values.iter().enumerate() {
        view.set(&attention_conformance::tensor::unravel(flat, &shape), T::from_f64(value));
    }
}

/// The index that broadcasting reads.
pub(crate) fn clamp(tensor: &Dense, index: [usize; 4]) -> [usize; 4] {
    std::array::from_fn(|axis| if tensor.shape[axis] == 1 { 0 } else { index[axis] })
}

/// The distance from 1 to the next number, of bf16 for halves.
pub(crate) fn epsilon<T: Scalar>() -> f64 {
    match T::DTYPE.size() {
        8 => f64::EPSILON,
        4 => f64::from(f32::EPSILON),
        _ => 2f64.powi(-7),
    }
}
