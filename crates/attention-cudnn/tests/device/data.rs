//! Tensors of any dtype in host memory.

use attention_core::{DType, View, ViewMut, philox4x32_10};
use half::{bf16, f16};

use crate::Result;

/// Numbers that are uniform in [-2, 2) and repeat after a prime count, of which no row or head is a multiple.
pub(crate) fn numbers(seed: u32, count: usize) -> Vec<f64> {
    const PERIOD: usize = 65_537;
    let word = |index: usize| philox4x32_10([index as u32, 0, 0, 0], [seed, 0])[0];
    (0..count.min(PERIOD)).map(|index| f64::from(word(index)) / f64::from(1u32 << 30) - 2.0).collect()
}

/// The first `count` numbers of that sequence. They are copied instead of generated again, since tests may be
/// built without optimisation.
pub(crate) fn repeated<T: Copy>(numbers: &[T], count: usize) -> Vec<T> {
    let mut all = Vec::with_capacity(count + numbers.len());
    while all.len() < count {
        all.extend_from_slice(numbers);
    }
    all.truncate(count);
    all
}

/// A tensor of any dtype in host memory.
#[derive(Clone)]
pub(crate) enum Data {
    F64(Vec<f64>),
    F32(Vec<f32>),
    F16(Vec<f16>),
    Bf16(Vec<bf16>),
}

impl Data {
    pub(crate) fn of(dtype: DType, numbers: &[f64]) -> Self {
        // Through f32, from which f16 and bf16 are rounded correctly.
        let narrow = || numbers.iter().map(|&x| x as f32);
        match dtype {
            DType::F64 => Self::F64(numbers.to_vec()),
            DType::F32 => Self::F32(narrow().collect()),
            DType::F16 => Self::F16(narrow().map(f16::from_f32).collect()),
            _ => Self::Bf16(narrow().map(bf16::from_f32).collect()),
        }
    }

    /// This many elements, which repeat those of the tensor.
    pub(crate) fn repeating(dtype: DType, numbers: &[f64], count: usize) -> Self {
        match Self::of(dtype, numbers) {
            Self::F64(data) => Self::F64(repeated(&data, count)),
            Self::F32(data) => Self::F32(repeated(&data, count)),
            Self::F16(data) => Self::F16(repeated(&data, count)),
            Self::Bf16(data) => Self::Bf16(repeated(&data, count)),
        }
    }

    pub(crate) fn zeros(dtype: DType, count: usize) -> Self {
        Self::repeating(dtype, &[0.0], count)
    }

    pub(crate) fn to_f64(&self) -> Vec<f64> {
        self.part(0..self.len())
    }

    /// The elements of this range.
    pub(crate) fn part(&self, range: std::ops::Range<usize>) -> Vec<f64> {
        match self {
            Self::F64(data) => data[range].to_vec(),
            Self::F32(data) => data[range].iter().map(|&x| f64::from(x)).collect(),
            Self::F16(data) => data[range].iter().map(|&x| f64::from(x.to_f32())).collect(),
            Self::Bf16(data) => data[range].iter().map(|&x| f64::from(x.to_f32())).collect(),
        }
    }

    pub(crate) fn len(&self) -> usize {
        match self {
            Self::F64(data) => data.len(),
            Self::F32(data) => data.len(),
            Self::F16(data) => data.len(),
            Self::Bf16(data) => data.len(),
        }
    }

    pub(crate) fn view(&self, shape: impl Into<attention_core::Dims>) -> Result<View<'_>> {
        Ok(match self {
            Self::F64(data) => View::from_slice(data, shape)?,
            Self::F32(data) => View::from_slice(data, shape)?,
            Self::F16(data) => View::from_slice(data, shape)?,
            Self::Bf16(data) => View::from_slice(data, shape)?,
        })
    }

    pub(crate) fn view_mut(&mut self, shape: impl Into<attention_core::Dims>) -> Result<ViewMut<'_>> {
        Ok(match self {
            Self::F64(data) => ViewMut::from_slice(data, shape)?,
            Self::F32(data) => ViewMut::from_slice(data, shape)?,
            Self::F16(data) => ViewMut::from_slice(data, shape)?,
            Self::Bf16(data) => ViewMut::from_slice(data, shape)?,
        })
    }
}

/// The unit roundoff of what results are rounded to, and of logits.
pub(crate) fn units(dtype: DType) -> (f64, f64) {
    match dtype {
        DType::F64 => (f64::EPSILON, f64::EPSILON),
        DType::F32 => (f64::from(f32::EPSILON), f64::from(f32::EPSILON)),
        DType::F16 => (2f64.powi(-11), f64::from(f32::EPSILON)),
        _ => (2f64.powi(-8), f64::from(f32::EPSILON)),
    }
}
