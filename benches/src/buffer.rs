//! Owned contiguous tensors of any dtype, filled quickly with reproducible numbers.

use attention_core::{DType, Dims, InvalidCall, Scalar, TensorDesc, View, ViewMut};
use half::{bf16, f16};

/// Elements of one dtype.
#[derive(Clone, Debug)]
enum Elements {
    F64(Vec<f64>),
    F32(Vec<f32>),
    F16(Vec<f16>),
    Bf16(Vec<bf16>),
    Bool(Vec<bool>),
    I32(Vec<i32>),
}

/// A contiguous tensor in memory that is mapped: every element was written.
#[derive(Clone, Debug)]
pub(crate) struct Buffer {
    shape: Dims,
    elements: Elements,
}

impl Buffer {
    /// Normally distributed numbers (the sum of four uniform ones, scaled to variance 1).
    pub(crate) fn normal(desc: &TensorDesc, seed: u64) -> Self {
        let scale = 3.0f32.sqrt() / 65536.0;
        let number = |word: u64| {
            let sum: i64 = (0..4).map(|part| (word >> (16 * part)) as i64 & 0xffff).sum();
            (sum - 131_070) as f32 * scale
        };
        Self::floats(desc, |index| number(random(seed, index)))
    }

    /// NaN throughout, for outputs.
    pub(crate) fn poisoned(desc: &TensorDesc) -> Self {
        Self::floats(desc, |_| f32::NAN)
    }

    /// A mask of which nine tenths are true, and every first key, so that no row is empty.
    pub(crate) fn mask(desc: &TensorDesc, seed: u64) -> Self {
        let shape = desc.shape();
        let keys = shape.last().copied().unwrap_or(1);
        let elements = (0..count(desc))
            .map(|index| index % keys == 0 || !random(seed, index).is_multiple_of(10))
            .collect();
        Self { shape, elements: Elements::Bool(elements) }
    }

    /// Numbers of a call, such as lengths.
    pub(crate) fn of_numbers(shape: Dims, numbers: Vec<i32>) -> Self {
        Self { shape, elements: Elements::I32(numbers) }
    }

    fn floats(desc: &TensorDesc, value: impl Fn(usize) -> f32) -> Self {
        fn collect<T: Scalar>(desc: &TensorDesc, value: impl Fn(usize) -> f32) -> Vec<T> {
            (0..count(desc)).map(|index| T::from_f32(value(index))).collect()
        }
        let elements = match desc.dtype() {
            DType::F64 => Elements::F64(collect(desc, value)),
            DType::F32 => Elements::F32(collect(desc, value)),
            DType::F16 => Elements::F16(collect(desc, value)),
            DType::Bf16 => Elements::Bf16(collect(desc, value)),
            dtype => unreachable!("no problem has operands of {dtype}"),
        };
        Self { shape: desc.shape(), elements }
    }

    /// The tensor, to be read.
    pub(crate) fn view(&self) -> Result<View<'_>, InvalidCall> {
        match &self.elements {
            Elements::F64(elements) => View::from_slice(elements, self.shape),
            Elements::F32(elements) => View::from_slice(elements, self.shape),
            Elements::F16(elements) => View::from_slice(elements, self.shape),
            Elements::Bf16(elements) => View::from_slice(elements, self.shape),
            Elements::Bool(elements) => View::from_slice(elements, self.shape),
            Elements::I32(elements) => View::from_slice(elements, self.shape),
        }
    }

    /// The tensor, to be written.
    pub(crate) fn view_mut(&mut self) -> Result<ViewMut<'_>, InvalidCall> {
        match &mut self.elements {
            Elements::F64(elements) => ViewMut::from_slice(elements, self.shape),
            Elements::F32(elements) => ViewMut::from_slice(elements, self.shape),
            Elements::F16(elements) => ViewMut::from_slice(elements, self.shape),
            Elements::Bf16(elements) => ViewMut::from_slice(elements, self.shape),
            Elements::Bool(elements) => ViewMut::from_slice(elements, self.shape),
            Elements::I32(elements) => ViewMut::from_slice(elements, self.shape),
        }
    }

    /// The sizes of its axes.
    #[cfg(test)]
    pub(crate) fn shape(&self) -> Dims {
        self.shape
    }

    /// Whether no element is NaN.
    #[cfg(test)]
    pub(crate) fn is_written(&self) -> bool {
        match &self.elements {
            Elements::F64(elements) => elements.iter().all(|x| !x.is_nan()),
            Elements::F32(elements) => elements.iter().all(|x| !x.is_nan()),
            Elements::F16(elements) => elements.iter().all(|x| !x.is_nan()),
            Elements::Bf16(elements) => elements.iter().all(|x| !x.is_nan()),
            Elements::Bool(_) | Elements::I32(_) => true,
        }
    }
}

/// How many elements a tensor of a checked problem has.
fn count(desc: &TensorDesc) -> usize {
    desc.element_count().expect("a problem's tensors have countable elements")
}

/// A well mixed word for each index (SplitMix64: Steele, Lea and Flood, OOPSLA 2014).
pub(crate) fn random(seed: u64, index: usize) -> u64 {
    let mut word = seed.wrapping_add(index as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    word ^ (word >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_normal_and_reproducible() {
        let desc = TensorDesc::contiguous(DType::F64, [100, 100]);
        let buffer = Buffer::normal(&desc, 7);
        let Elements::F64(values) = &buffer.elements else { panic!("asked for f64") };
        let mean = values.iter().sum::<f64>() / 1e4;
        let variance = values.iter().map(|x| x * x).sum::<f64>() / 1e4;
        assert!(mean.abs() < 0.05 && (variance - 1.0).abs() < 0.05, "{mean} {variance}");
        let Elements::F64(again) = &Buffer::normal(&desc, 7).elements else { panic!("asked for f64") };
        assert_eq!(values, again);
    }

    #[test]
    fn masks_leave_no_row_empty() {
        let buffer = Buffer::mask(&TensorDesc::contiguous(DType::Bool, [1, 1, 100, 50]), 3);
        let Elements::Bool(values) = &buffer.elements else { panic!("asked for bool") };
        assert!(values.chunks(50).all(|row| row[0]));
        let share = values.iter().filter(|&&kept| kept).count() as f64 / 5e3;
        assert!((0.87..0.94).contains(&share), "{share}");
    }
}
