//! Writing views, and cutting them into parts that are written apart.

use proptest::prelude::*;

use super::{indices, offset};
use crate::{DType, Device, Dims, InvalidCall, Strides, TensorDesc, View, ViewMut};

/// A layout without overlap: a part of a larger buffer, its axes in any order and any of them reversed.
#[derive(Clone, Debug)]
struct Output {
    shape: Dims,
    strides: Strides,
    first: usize,
    len: usize,
}

fn output() -> impl Strategy<Value = Output> {
    let axes = proptest::collection::vec((0usize..4, 0usize..3, any::<bool>()), 0..=4);
    (axes, Just([0usize, 1, 2, 3]).prop_shuffle()).prop_map(|(axes, order)| {
        let rank = axes.len();
        let (mut shape, mut strides) = (vec![0; rank], vec![0; rank]);
        let (mut step, mut first) = (1, 0);
        for axis in order.into_iter().filter(|&axis| axis < rank) {
            let (size, gap, reversed) = axes[axis];
            shape[axis] = size;
            strides[axis] = if reversed { -(step as isize) } else { step as isize };
            first += if reversed { size.saturating_sub(1) * step } else { 0 };
            step *= size.max(1) + gap;
        }
        let (shape, strides) = (Dims::try_from(shape).unwrap(), Strides::try_from(strides).unwrap());
        Output { shape, strides, first, len: step }
    })
}

impl Output {
    fn view<'a>(&self, data: &'a mut [f32]) -> ViewMut<'a> {
        ViewMut::strided(data, self.first, self.shape, self.strides).unwrap()
    }

    fn position(&self, index: &[usize]) -> usize {
        (self.first as isize + offset(index, &self.strides)) as usize
    }
}

/// Writes a number of its own into every element, counted from `start`, and returns how many there are.
fn number(view: ViewMut<'_>, start: usize) -> usize {
    let shape = view.shape();
    let mut host = view.host_mut::<f32>().unwrap();
    assert_eq!(host.shape(), shape);
    let mut count = 0;
    for index in indices(shape) {
        host.set(&index, (start + count) as f32);
        count += 1;
    }
    count
}

/// Every element was written once, and nothing between them.
fn written_once(output: &Output, data: &[f32]) -> Result<(), TestCaseError> {
    let mut left = data.to_vec();
    let mut seen = std::collections::HashSet::new();
    for index in indices(output.shape) {
        let value = std::mem::replace(&mut left[output.position(&index)], f32::NAN);
        prop_assert!(!value.is_nan() && seen.insert(value as usize), "{:?} holds {}", index, value);
    }
    prop_assert!(left.iter().all(|value| value.is_nan()));
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1000))]

    #[test]
    fn elements_are_written_where_the_strides_say(output in output()) {
        let mut data = vec![f32::NAN; output.len];
        number(output.view(&mut data), 0);
        for (count, index) in indices(output.shape).enumerate() {
            prop_assert_eq!(data[output.position(&index)], count as f32);
        }
        written_once(&output, &data)?;
    }

    #[test]
    fn rows_are_written_where_the_strides_say(output in output()) {
        if output.shape.rank() == 0 || output.shape.contains(&0) {
            return Ok(());
        }
        let mut data = vec![f32::NAN; output.len];
        let rank = output.shape.rank();
        let mut host = output.view(&mut data).host_mut::<f32>().unwrap();
        prop_assert_eq!(host.strides(), output.strides);
        let mut count = 0;
        for leading in indices(Dims::from_slice(&output.shape[..rank - 1]).unwrap()) {
            let mut row = host.row_mut(&leading);
            let side_by_side = row.len() == 1 || output.strides[rank - 1] == 1;
            prop_assert_eq!(row.len(), output.shape[rank - 1]);
            prop_assert_eq!(row.contiguous_mut().is_some(), side_by_side);
            row.fill_with(|i| (count + i) as f32);
            count += row.len();
        }
        for (count, index) in indices(output.shape).enumerate() {
            prop_assert_eq!(data[output.position(&index)], count as f32);
        }
    }

    #[test]
    fn split_parts_cover_the_whole_once(output in output(), axis in 0usize..4, cut in (0usize..5, 0usize..5)) {
        let mut data = vec![f32::NAN; output.len];
        let size = output.shape.get(axis).copied().unwrap_or(0);
        let (a, b) = (cut.0.min(size), cut.1.min(size - cut.0.min(size)));
        match output.view(&mut data).split(axis, [a, b, size - a - b]) {
            Err(_) => prop_assert!(axis >= output.shape.rank()),
            Ok(parts) => {
                // All at once: the parts are exclusive, also across threads.
                let mut start = 0;
                let starts = parts.each_ref().map(|part| {
                    let first = start;
                    start += part.shape().iter().product::<usize>();
                    first
                });
                std::thread::scope(|scope| {
                    for (part, start) in parts.into_iter().zip(starts) {
                        scope.spawn(move || number(part, start));
                    }
                });
                written_once(&output, &data)?;
            }
        }
    }

    #[test]
    fn axes_and_chunks_cover_the_whole_once(output in output(), axis in 0usize..4, size in 0usize..5) {
        let mut data = vec![f32::NAN; output.len];
        let length = output.shape.get(axis).copied().unwrap_or(0);
        let slices: Vec<_> = output.view(&mut data).into_axis(axis).collect();
        prop_assert_eq!(slices.len(), length);
        let mut count = 0;
        for slice in slices {
            prop_assert_eq!(slice.shape().rank() + 1, output.shape.rank());
            count += number(slice, count);
        }
        if axis < output.shape.rank() {
            written_once(&output, &data)?;
        }

        let mut data = vec![f32::NAN; output.len];
        let chunks: Vec<_> = output.view(&mut data).into_chunks(axis, size).collect();
        prop_assert_eq!(chunks.len(), length.div_ceil(size.max(1)));
        let mut count = 0;
        for chunk in chunks {
            prop_assert!(chunk.shape()[axis] <= size.max(1));
            count += number(chunk, count);
        }
        if axis < output.shape.rank() {
            written_once(&output, &data)?;
        }
    }

    #[test]
    fn narrowed_and_permuted_outputs_stay_inside(output in output(), axis in 0usize..4, cut in (0usize..4, 0usize..4)) {
        let mut data = vec![f32::NAN; output.len];
        let rank = output.shape.rank();
        if axis >= rank {
            return Ok(());
        }
        let [start, end] = [cut.0.min(cut.1), cut.0.max(cut.1)].map(|cut| cut.min(output.shape[axis]));
        let order: Vec<_> = (0..rank).rev().collect();
        let view = output.view(&mut data).narrow(axis, start..end).unwrap().permute(&order).unwrap();
        number(view, 0);
        for index in indices(output.shape) {
            let inside = (start..end).contains(&index[axis]);
            prop_assert_eq!(!data[output.position(&index)].is_nan(), inside);
        }
        prop_assert_eq!(
            data.iter().filter(|value| !value.is_nan()).count(),
            output.shape.iter().enumerate().map(|(i, &size)| if i == axis { end - start } else { size }).product::<usize>()
        );
    }
}

#[test]
fn outputs_that_reach_an_element_twice_are_refused() {
    let mut data = [0f32; 16];
    for strides in [[0, 1], [1, 1], [3, 1], [-3, 1], [2, -1]] {
        let refused = ViewMut::strided(&mut data, 8, [2, 4], strides);
        assert!(matches!(refused, Err(InvalidCall::SelfOverlap { .. })), "{strides:?}");
    }
    // Inputs may.
    assert!(View::strided(&data, 8, [2, 4], [0, 1]).is_ok());
    let desc = TensorDesc::strided(DType::F32, [2], [0]).unwrap();
    // SAFETY: the array is not reached through anything else while the view lives; it is refused anyway.
    let refused = unsafe { ViewMut::from_raw_parts(data.as_mut_ptr().cast(), Device::Cpu, desc) };
    assert!(matches!(refused, Err(InvalidCall::SelfOverlap { .. })));
}

#[test]
fn fused_gradients_are_parts_of_one_buffer() {
    let mut data = vec![0f32; 2 * 3 * (4 + 2 + 2) * 5];
    let fused = ViewMut::from_slice(&mut data, [2, 3, 8, 5]).unwrap();
    let [dq, dk, dv] = fused.split(2, [4, 2, 2]).unwrap();
    assert_eq!(
        [dq.shape(), dk.shape(), dv.shape()],
        [[2, 3, 4, 5], [2, 3, 2, 5], [2, 3, 2, 5]].map(Dims::from)
    );
    for (part, value) in [(dq, 1.0), (dk, 2.0), (dv, 3.0)] {
        let shape = part.shape();
        let mut host = part.host_mut::<f32>().unwrap();
        indices(shape).for_each(|index| host.set(&index, value));
    }
    for (position, value) in data.into_iter().enumerate() {
        assert_eq!(value, [1.0, 1.0, 1.0, 1.0, 2.0, 2.0, 3.0, 3.0][position / 5 % 8]);
    }
}

#[test]
fn a_reborrow_is_the_same_view_for_a_while() {
    let mut data = [0f32; 4];
    let mut view = ViewMut::from_slice(&mut data, [4]).unwrap();
    let address = view.as_mut_ptr();
    assert_eq!((view.reborrow().as_mut_ptr(), view.reborrow().desc()), (address, view.desc()));
    view.reborrow().host_mut::<f32>().unwrap().set(&[1], 1.0);
    view.unsqueeze().unwrap().host_mut::<f32>().unwrap().set(&[0, 2], 2.0);
    assert_eq!(data, [0.0, 1.0, 2.0, 0.0]);
}
