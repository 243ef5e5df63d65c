//! Views against plain index arithmetic.

mod edges;
mod parts;
mod reading;
mod scratch;

use proptest::prelude::*;

use crate::{Dims, Strides, TensorDesc, View};

/// Every index of a shape, in row-major order.
fn indices(shape: Dims) -> impl Iterator<Item = Vec<usize>> {
    let count = shape.iter().product::<usize>();
    (0..count).map(move |mut flat| {
        let mut index = vec![0; shape.rank()];
        for axis in (0..shape.rank()).rev() {
            index[axis] = flat % shape[axis];
            flat /= shape[axis];
        }
        index
    })
}

/// Where an index lies, in elements from the first.
fn offset(index: &[usize], strides: &[isize]) -> isize {
    index.iter().zip(strides).map(|(&index, &stride)| index as isize * stride).sum()
}

/// A layout with some memory around it: shape, strides, offset of the first element, length of the buffer.
#[derive(Clone, Debug)]
struct Layout {
    shape: Dims,
    strides: Strides,
    first: usize,
    len: usize,
}

impl Layout {
    fn view<'a>(&self, data: &'a [f32]) -> View<'a> {
        View::strided(data, self.first, self.shape, self.strides).unwrap()
    }

    /// A buffer in which every element has its position as value.
    fn data(&self) -> Vec<f32> {
        (0..self.len).map(|position| position as f32).collect()
    }

    /// The value that `data` has at an index.
    fn at(&self, index: &[usize]) -> f32 {
        (self.first as isize + offset(index, &self.strides)) as f32
    }
}

/// Any strides that fit, also negative, zero and overlapping ones; sizes of zero too.
fn layout() -> impl Strategy<Value = Layout> {
    let axes = proptest::collection::vec((0usize..4, -9isize..10), 0..=4);
    (axes, 0usize..5, 0usize..5).prop_map(|(axes, before, after)| {
        let (shape, strides): (Vec<_>, Vec<_>) = axes.into_iter().unzip();
        let (shape, strides) = (Dims::try_from(shape).unwrap(), Strides::try_from(strides).unwrap());
        let (low, high) = TensorDesc::strided(crate::DType::F32, shape, strides).unwrap().span().unwrap();
        let first = before + low.unsigned_abs();
        Layout { shape, strides, first, len: (first as isize + high + 1) as usize + after }
    })
}

/// Checks every element of a view against `want` of its index, by element and by row.
fn agrees(view: &View<'_>, want: impl Fn(&[usize]) -> f32) -> Result<(), TestCaseError> {
    let host = view.host::<f32>().unwrap();
    prop_assert_eq!((host.shape(), host.strides()), (view.shape(), view.desc().strides()));
    for index in indices(view.shape()) {
        prop_assert_eq!(host.at(&index), want(&index), "at {:?}", &index);
        if let Some((&last, leading)) = index.split_last() {
            let row = host.row(leading);
            prop_assert_eq!(row.len(), view.shape()[leading.len()]);
            prop_assert_eq!(row.at(last), want(&index), "in the row of {:?}", &index);
            prop_assert_eq!(row.iter().nth(last), Some(want(&index)));
            let side_by_side = row.len() <= 1 || host.strides()[leading.len()] == 1;
            prop_assert_eq!(row.contiguous().is_some(), side_by_side);
            if let Some(elements) = row.contiguous() {
                prop_assert_eq!(elements[last], want(&index));
            }
            match *leading {
                [row] => prop_assert_eq!(host.matrix_row(row).at(last), want(&index)),
                [matrix, row] => {
                    let rows = host.shape()[1];
                    for first in 0..=row {
                        let mut run = host.stack_rows([matrix, first], rows - first);
                        prop_assert_eq!(run.len(), rows - first);
                        prop_assert_eq!(run.nth(row - first).unwrap().at(last), want(&index));
                        prop_assert_eq!(run.count(), rows - row - 1);
                    }
                }
                _ => {}
            }
        }
    }
    Ok(())
}
