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
        let (mut key, mut value) = (operand(Role::Key, &inputs.key), operand(Role::Value, &inputs.value));
        if flaw != Flaw::IgnoresKeyScales {
            scale(&mut key, problem, flaw, |b, head| problem.key_scale(b, head));
        }
        if flaw != Flaw::IgnoresValueScales {
            scale(&mut value, problem, flaw, |b, head| problem.value_scale(b, head));
        }
        Self {
            query: operand(Role::Query, &inputs.query),
            key,
            value,
            mask: load(inputs.mask),
            bias: load(inputs.bias),
            alibi_slopes: load(inputs.alibi_slopes),
            sinks: load(inputs.sinks),
        }
    }
}

/// Multiplies 8-bit numbers `[B, S, K, D]` by the scale of their head.
fn scale(tensor: &mut Dense, problem: &CallProblem<'_>, flaw: Flaw, scale_of: impl Fn(usize, usize) -> f32) {
    if !problem.dtype_of(Role::Key).is_some_and(DType::is_eight_bit) {
        return;
    }
    let [_, rows, heads, width] = tensor.shape[..] else { unreachable!("keys and values have four axes") };
    for (row, numbers) in tensor.data.chunks_exact_mut(width).enumerate() {
        let (b, head) = (row / (rows * heads), row % heads);
        let scale = match flaw {
            Flaw::ScalesOfTheFirstHead => scale_of(b, 0),
            Flaw::ScalesOfTheFirstSequence => scale_of(0, head),
            // As if there were as many scales as query heads.
            Flaw::ScalesOfTheQueryHead => scale_of(b, head / problem.dims().group_size()),
            _ => scale_of(b, head),
        };
        numbers.iter_mut().for_each(|number| *number *= f64::from(scale));
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
