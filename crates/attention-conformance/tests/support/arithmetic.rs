//! The arithmetic of the accumulator, and reading tensors into it.

use std::ops::{Add, AddAssign, Div, Mul, Neg, Sub};

use attention_core::{DType, Scalar, View, ViewMut};
use half::{bf16, f16};

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

/// One element of a tensor of any float dtype.
pub(crate) fn read<A: Real>(view: &View<'_>, index: &[usize]) -> A {
    A::from_f64(match view.desc().dtype() {
        DType::F64 => view.host::<f64>().unwrap().at(index),
        DType::F32 => view.host::<f32>().unwrap().at(index).into(),
        DType::F16 => Scalar::to_f64(view.host::<f16>().unwrap().at(index)),
        _ => Scalar::to_f64(view.host::<bf16>().unwrap().at(index)),
    })
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
pub(crate) fn clamp(view: &View<'_>, index: [usize; 4]) -> [usize; 4] {
    std::array::from_fn(|axis| if view.shape()[axis] == 1 { 0 } else { index[axis] })
}
