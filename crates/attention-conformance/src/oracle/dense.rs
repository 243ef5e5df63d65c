//! Tensors as the oracle sees them: f64, row-major.

use attention_core::{DType, F8E4M3, F8E5M2, Float8, Scalar, View};
use half::{bf16, f16};

/// A row-major tensor of f64.
#[derive(Clone, Debug)]
pub struct Dense {
    /// The shape.
    pub shape: Vec<usize>,
    /// The elements.
    pub data: Vec<f64>,
}

impl Dense {
    /// Reads a view of any float dtype, 8-bit ones included, or of booleans as 0 and 1. Exact.
    ///
    /// # Panics
    /// Where the view is not in host memory.
    pub fn read(view: &View<'_>) -> Self {
        let shape = view.shape().to_vec();
        let data = match view.desc().dtype() {
            DType::F64 => floats::<f64>(view),
            DType::F32 => floats::<f32>(view),
            DType::F16 => floats::<f16>(view),
            DType::Bf16 => floats::<bf16>(view),
            DType::F8E4M3 => eight_bit::<F8E4M3>(view),
            DType::F8E5M2 => eight_bit::<F8E5M2>(view),
            DType::Bool => {
                let mask = view.host_mask().expect("the oracle reads host memory");
                indices(&shape).map(|index| f64::from(u8::from(mask.at(&index) != 0))).collect()
            }
            other => panic!("{other} is no dtype of a call"),
        };
        Self { shape, data }
    }

    /// What 8-bit numbers `[B, S, K, D]` stand for, given the scales of their heads: `[1]` or a scalar, `[K]`,
    /// or `[B, K]`. Exact, since a scale has 24 bits and a number 4.
    ///
    /// # Panics
    /// Where the scales have another shape, or are not in host memory.
    #[must_use]
    pub fn scaled(mut self, scales: Option<&View<'_>>) -> Self {
        let Some(scales) = scales.map(Self::read) else { return self };
        let (heads, width) = (self.shape[2], self.shape[3]);
        let rows_of_sequence = self.shape[1] * heads;
        for (row, numbers) in self.data.chunks_exact_mut(width).enumerate() {
            let (sequence, head) = (row / rows_of_sequence, row % heads);
            let scale = match scales.shape[..] {
                [] | [1] => scales.data[0],
                [_] => scales.at(&[head]),
                _ => scales.at(&[sequence, head]),
            };
            numbers.iter_mut().for_each(|number| *number *= scale);
        }
        self
    }

    /// A tensor of these elements.
    ///
    /// # Panics
    /// Where their number is not that of the shape.
    pub fn new(shape: &[usize], data: Vec<f64>) -> Self {
        assert_eq!(shape.iter().product::<usize>(), data.len());
        Self { shape: shape.to_vec(), data }
    }

    /// The element at an index.
    ///
    /// # Panics
    /// Where the index is outside the shape.
    pub fn at(&self, index: &[usize]) -> f64 {
        self.data[self.flat(index)]
    }

    /// The elements along the last axis, at these indices of the others.
    ///
    /// # Panics
    /// Where the index is outside the shape.
    pub fn row(&self, leading: &[usize]) -> &[f64] {
        let len = self.shape[leading.len()];
        let start = self.flat(leading) * len;
        &self.data[start..start + len]
    }

    /// The row-major position of an index, or of the start of a part in units of the part where axes are left
    /// out.
    pub(crate) fn flat(&self, index: &[usize]) -> usize {
        index.iter().zip(&self.shape).fold(0, |flat, (&index, &size)| {
            assert!(index < size, "index outside the shape");
            flat * size + index
        })
    }

    /// The position of the element that broadcasting reads at an index of the same rank.
    pub(crate) fn broadcast_flat(&self, index: [usize; 4]) -> usize {
        let mut own = index;
        for (axis, index) in own.iter_mut().enumerate() {
            if self.shape[axis] == 1 {
                *index = 0;
            }
        }
        self.flat(&own)
    }
}

fn floats<T: Scalar>(view: &View<'_>) -> Vec<f64> {
    let host = view.host::<T>().expect("the oracle reads host memory");
    indices(&view.shape()).map(|index| host.at(&index).to_f64()).collect()
}

fn eight_bit<T: Float8>(view: &View<'_>) -> Vec<f64> {
    let host = view.host::<T>().expect("the oracle reads host memory");
    indices(&view.shape()).map(|index| host.at(&index).to_f64()).collect()
}

/// The integers of a tensor.
///
/// # Panics
/// Where it has none, or is not in host memory.
pub(super) fn integers(view: &View<'_>) -> Vec<i64> {
    macro_rules! of {
        ($type:ty) => {{
            let host = view.host::<$type>().expect("the oracle reads host memory");
            indices(&view.shape()).map(|index| i64::from(host.at(&index))).collect()
        }};
    }
    match view.desc().dtype() {
        DType::I32 => of!(i32),
        DType::U32 => of!(u32),
        DType::I64 => of!(i64),
        other => panic!("{other} is no integer"),
    }
}

/// Every index of a shape, in row-major order.
fn indices(shape: &[usize]) -> impl Iterator<Item = Vec<usize>> + '_ {
    (0..shape.iter().product()).map(move |flat| crate::tensor::unravel(flat, shape))
}
