//! Reading views, and making other views of them.

use proptest::prelude::*;

use super::{Layout, agrees, indices, layout};
use crate::{DType, Device, Dims, F8E4M3, F8E5M2, Float8, HostView, InvalidCall, Scalar, TensorDesc, View};

/// A layout with one of its axes, where it has any.
fn layout_and_axis() -> impl Strategy<Value = (Layout, usize)> {
    (layout().prop_filter("has axes", |layout| layout.shape.rank() > 0), 0usize..4)
        .prop_map(|(layout, axis)| (layout.clone(), axis % layout.shape.rank()))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1000))]

    #[test]
    fn strided_views_read_what_the_strides_say(layout in layout()) {
        let data = layout.data();
        let view = layout.view(&data);
        prop_assert_eq!(view.device(), Device::Cpu);
        agrees(&view, |index| layout.at(index))?;
    }

    #[test]
    fn narrowing_shifts_one_index((layout, axis) in layout_and_axis(), cut in (0usize..5, 0usize..5)) {
        let data = layout.data();
        let range = cut.0.min(cut.1)..cut.0.max(cut.1);
        match layout.view(&data).narrow(axis, range.clone()) {
            Err(_) => prop_assert!(range.end > layout.shape[axis]),
            Ok(part) => {
                let mut shape = layout.shape;
                shape[axis] = range.len();
                prop_assert_eq!(part.shape(), shape);
                agrees(&part, |index| {
                    let mut whole = index.to_vec();
                    whole[axis] += range.start;
                    layout.at(&whole)
                })?;
                let typed = layout.view(&data).host::<f32>().unwrap().narrow(axis, range.clone());
                prop_assert_eq!((typed.shape(), typed.strides()), (shape, layout.strides));
                for mut index in indices(shape) {
                    let found = typed.at(&index);
                    index[axis] += range.start;
                    prop_assert_eq!(found, layout.at(&index));
                }
            }
        }
    }

    #[test]
    fn indexing_drops_an_axis((layout, axis) in layout_and_axis(), at in 0usize..5) {
        let data = layout.data();
        match layout.view(&data).index_axis(axis, at) {
            Err(_) => prop_assert!(at >= layout.shape[axis]),
            Ok(part) => {
                prop_assert_eq!(part.shape().rank(), layout.shape.rank() - 1);
                agrees(&part, |index| {
                    let mut whole = index.to_vec();
                    whole.insert(axis, at);
                    layout.at(&whole)
                })?;
            }
        }
    }

    #[test]
    fn permuting_reorders_indices(layout in layout(), order in Just([0usize, 1, 2, 3]).prop_shuffle()) {
        let data = layout.data();
        let rank = layout.shape.rank();
        let order: Vec<_> = order.into_iter().filter(|&axis| axis < rank).collect();
        let permuted = layout.view(&data).permute(&order).unwrap();
        agrees(&permuted, |index| {
            let mut whole = vec![0; rank];
            for (to, &from) in order.iter().enumerate() {
                whole[from] = index[to];
            }
            layout.at(&whole)
        })?;
    }

    #[test]
    fn unsqueezing_adds_an_axis_in_front(layout in layout()) {
        let data = layout.data();
        match layout.view(&data).unsqueeze() {
            Err(_) => prop_assert_eq!(layout.shape.rank(), 4),
            Ok(view) => {
                prop_assert_eq!(view.shape()[0], 1);
                agrees(&view, |index| layout.at(&index[1..]))?;
            }
        }
    }

    #[test]
    fn expanding_repeats(layout in layout(), to in proptest::array::uniform4(0usize..4)) {
        let data = layout.data();
        let to = Dims::from_slice(&to[..layout.shape.rank()]).unwrap();
        let fits = layout.shape.iter().zip(to.iter()).all(|(&from, &to)| from == to || from == 1);
        match layout.view(&data).expand(to) {
            Err(_) => prop_assert!(!fits),
            Ok(view) => {
                prop_assert!(fits);
                prop_assert_eq!(view.shape(), to);
                agrees(&view, |index| {
                    let whole: Vec<_> = index.iter().zip(layout.shape.iter()).map(|(&i, &size)| i.min(size - 1)).collect();
                    layout.at(&whole)
                })?;
            }
        }
    }

    /// The slice of `matrix` reaches every element by the strides that it gives.
    #[test]
    fn matrices_are_slices_with_strides((layout, row_axis) in layout_and_axis(), column_axis in 0usize..4) {
        let rank = layout.shape.rank();
        if column_axis >= rank || column_axis == row_axis {
            return Ok(());
        }
        let data = layout.data();
        let host = layout.view(&data).host::<f32>().unwrap();
        for index in indices(layout.shape) {
            let mut fixed = index.clone();
            (fixed[row_axis], fixed[column_axis]) = (0, 0);
            let negative = layout.strides[row_axis] < 0 || layout.strides[column_axis] < 0;
            match host.matrix(&fixed, row_axis, column_axis) {
                None => prop_assert!(negative),
                Some((elements, row_stride, column_stride)) => {
                    let position = index[row_axis] * row_stride + index[column_axis] * column_stride;
                    prop_assert_eq!(elements[position], layout.at(&index));
                }
            }
        }
    }

    /// Strides and offsets of any size are refused or read inside the slice.
    #[test]
    fn nothing_makes_strided_views_reach_outside(
        axes in proptest::collection::vec(
            (
                prop_oneof![4 => 0usize..4, 1 => Just(1 << 62), 1 => Just(usize::MAX)],
                prop_oneof![4 => -9isize..10, 1 => Just(isize::MIN), 1 => Just(isize::MAX)],
            ),
            0..=4,
        ),
        offset in prop_oneof![4 => 0usize..40, 1 => Just(usize::MAX), 1 => Just(isize::MAX as usize)],
    ) {
        let data: Vec<f32> = (0..32).map(|value| value as f32).collect();
        let (shape, strides): (Vec<_>, Vec<_>) = axes.into_iter().unzip();
        let (shape, strides) = (Dims::try_from(shape).unwrap(), crate::Strides::try_from(strides).unwrap());
        let Ok(view) = View::strided(&data, offset, shape, strides) else { return Ok(()) };
        let host = view.host::<f32>().unwrap();
        if shape.iter().try_fold(1usize, |count, &size| count.checked_mul(size)).is_some_and(|count| count < 4096) {
            for index in indices(shape) {
                let position = offset as i128 + super::offset(&index, &strides) as i128;
                prop_assert_eq!(host.at(&index), position as f32);
            }
        }
    }
}

#[test]
fn rows_and_parts_that_are_not_there_panic() {
    let data = [0.0f32; 24];
    let host = View::from_slice(&data, [2, 3, 4]).unwrap().host::<f32>().unwrap();
    let panics = |work: &dyn Fn()| std::panic::catch_unwind(std::panic::AssertUnwindSafe(work)).is_err();
    for (at, count) in [
        ([2, 0], 1),
        ([2, 0], 0),
        ([0, 4], 0),
        ([0, 3], 1),
        ([0, 1], 3),
        ([0, 1], usize::MAX),
        ([0, usize::MAX], 1),
        ([usize::MAX, 0], 1),
    ] {
        assert!(panics(&|| _ = host.stack_rows(at, count)), "{at:?} {count}");
    }
    assert_eq!(host.stack_rows([1, 3], 0).count(), 0);
    assert!(panics(&|| _ = host.index_axis(0, 0).stack_rows([0, 0], 1)));
    assert!(panics(&|| _ = host.matrix_row(0)));
    for (axis, range) in [(3, 0..0), (1, 0..4), (1, 4..4), (1, std::ops::Range { start: 2, end: 1 })] {
        assert!(panics(&|| _ = host.narrow(axis, range.clone())), "{axis} {range:?}");
    }
}

fn reads<T: Scalar>(other: DType) {
    let data: Vec<T> = (0..6).map(|value| T::from_f32(value as f32 / 2.0)).collect();
    let view = View::from_slice(&data, [2, 3]).unwrap();
    assert_eq!(view.desc(), TensorDesc::contiguous(T::DTYPE, [2, 3]));
    let host = view.host::<T>().unwrap();
    assert_eq!(host.at(&[1, 2]).to_f64(), 2.5);
    assert_eq!(host.row(&[1]).iter().map(T::to_f32).collect::<Vec<_>>(), [1.5, 2.0, 2.5]);
    assert_ne!(T::DTYPE, other);
    assert!(view.host_mask().is_none());
}

#[test]
fn every_float_dtype_reads_as_itself_only() {
    reads::<f64>(DType::F32);
    reads::<f32>(DType::F64);
    reads::<half::f16>(DType::Bf16);
    reads::<half::bf16>(DType::F16);
    let halves = [half::f16::ONE; 2];
    let view = View::from_slice(&halves, [2]).unwrap();
    assert!(view.host::<half::bf16>().is_none() && view.host::<f32>().is_none());
}

#[test]
fn masks_read_as_bytes() {
    let data = [true, false, false, true, true, false];
    let view = View::from_slice(&data, [2, 3]).unwrap();
    assert!(view.host::<f32>().is_none());
    let host = view.host_mask().unwrap();
    for index in indices(view.shape()) {
        assert_eq!(host.at(&index) != 0, data[index[0] * 3 + index[1]]);
    }
    let columns = view.permute([1, 0]).unwrap().host_mask().unwrap();
    assert_eq!(columns.row(&[0]).iter().collect::<Vec<_>>(), [1, 1]);
}

/// Other libraries store `true` as any byte but zero; no `bool` is ever made of it.
#[test]
fn masks_of_other_libraries_may_hold_any_byte() {
    let bytes = [0u8, 1, 2, 255, 128, 0];
    let desc = TensorDesc::contiguous(DType::Bool, [2, 3]);
    // SAFETY: the array outlives the view and is not written.
    let view = unsafe { View::from_raw_parts(bytes.as_ptr(), Device::Cpu, desc) }.unwrap();
    let host = view.host_mask().unwrap();
    let taken: Vec<_> = indices(view.shape()).map(|index| host.at(&index) != 0).collect();
    assert_eq!(taken, [false, true, true, true, true, false]);
    assert_eq!(host.row(&[1]).contiguous(), Some(&bytes[3..]));
}

#[test]
fn masks_are_made_of_bytes_with_any_strides_inside_them() {
    let bytes = [9u8, 0, 1, 2, 0, 255, 0];
    let view = View::strided_mask(&bytes, 1, [2, 3], [1, 2]).unwrap();
    assert_eq!(view.desc(), TensorDesc::strided(DType::Bool, [2, 3], [1, 2]).unwrap());
    let host = view.host_mask().unwrap();
    let taken: Vec<_> = indices(view.shape()).map(|index| host.at(&index)).collect();
    assert_eq!(taken, [0, 2, 255, 1, 0, 0]);
    let error = View::strided_mask(&bytes, 2, [2, 3], [1, 2]).unwrap_err();
    assert!(matches!(error, InvalidCall::BufferTooSmall { last: 7, available: 7, .. }), "{error}");
    let error = View::strided_mask(&bytes, 0, [2, 3], [1]).unwrap_err();
    assert_eq!(error, InvalidCall::StridesRank { shape: 2, strides: 1 });
    assert!(View::strided_mask(&[], 5, [0, 3], [1, 1]).unwrap().host_mask().unwrap().shape().contains(&0));
}

#[test]
fn numbers_of_8_bits_read_as_their_bytes() {
    let data = [1, 2, 3, 0x80, 0xff, 6].map(F8E4M3::from_bits);
    let view = View::from_slice(&data, [2, 3]).unwrap().permute([1, 0]).unwrap();
    let host = view.host_bytes().unwrap();
    assert_eq!(
        [0, 1, 2].map(|row| host.row(&[row]).iter().collect::<Vec<_>>()),
        [[1, 0x80], [2, 0xff], [3, 6]]
    );
    assert!(view.host_mask().is_none() && view.host::<F8E5M2>().is_none());
    let masks = [true; 2];
    assert!(View::from_slice(&[1.0f32; 2], [2]).unwrap().host_bytes().is_none());
    assert!(View::from_slice(&masks, [2]).unwrap().host_bytes().is_none());
}

#[test]
fn rows_are_the_tokens_of_a_head() {
    let data: Vec<u16> = (0..14).collect();
    let view = HostView::of_rows(&data, 4);
    assert_eq!(view.shape(), Dims::from([1, 3, 1, 4]));
    let rows = view.head(0).stretch([0, 1], 2);
    assert_eq!(
        [0, 1].map(|row| rows.row(row).contiguous().unwrap().to_vec()),
        [[4, 5, 6, 7], [8, 9, 10, 11]]
    );
    assert!(HostView::of_rows(&data[..3], 4).shape().contains(&0));
}

#[test]
fn a_stretch_has_the_rows_of_a_head_one_behind_the_other() {
    let data: Vec<f32> = (0..2 * 5 * 3 * 4).map(|x| x as f32).collect();
    let dense = View::from_slice(&data, [2, 5, 3, 4]).unwrap();
    // Heads before rows, rows in reverse, and elements apart.
    let other = View::strided(&data, 16, [2, 5, 3, 2], [60, -4, 20, 2]).unwrap();
    for view in [dense.host::<f32>().unwrap(), other.host::<f32>().unwrap()] {
        for head in 0..3 {
            let stretch = view.head(head).stretch([1, 2], 3);
            assert_eq!(stretch.rows(), 3);
            for row in 0..3 {
                let (got, want) = (stretch.row(row), view.row(&[1, 2 + row, head]));
                assert_eq!(got.iter().collect::<Vec<_>>(), want.iter().collect::<Vec<_>>());
            }
        }
        assert_eq!(view.head(0).stretch([0, 5], 0).rows(), 0);
        let head = view.head(2);
        assert_eq!((head.width(), head.strides()), (view.shape()[3], [view.strides()[0], view.strides()[1]]));
        for (first, rows) in [([2, 0], 1), ([0, 3], 3), ([0, 6], 0)] {
            assert!(std::panic::catch_unwind(|| head.stretch(first, rows)).is_err());
        }
        assert!(std::panic::catch_unwind(|| head.stretch([0, 0], 2).row(2)).is_err());
        assert!(std::panic::catch_unwind(|| view.head(3)).is_err());
    }
}
