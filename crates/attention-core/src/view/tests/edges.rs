//! Empty views, views of no axes, raw pointers, and the documented panics.

use std::ptr;

use crate::{DType, Device, InvalidCall, TensorDesc, View, ViewMut};

#[test]
fn empty_views_hold_nothing_and_point_nowhere() {
    for shape in [[0, 3, 4, 5], [2, 0, 4, 5], [2, 3, 4, 0], [0, usize::MAX, usize::MAX, 2]] {
        let view = View::from_slice::<f32>(&[], shape).unwrap();
        assert!(view.desc().is_empty() && view.address_range().is_empty());
        assert_eq!(view.host::<f32>().unwrap().shape(), shape.into());
        let mut none: [f32; 0] = [];
        let view = ViewMut::from_slice(&mut none, shape).unwrap();
        assert_eq!(view.host_mut::<f32>().unwrap().shape(), shape.into());
    }
    // Offsets and strides do not matter either.
    let view = View::strided(&[1f32], usize::MAX, [0, 2], [isize::MIN, isize::MAX]).unwrap();
    assert!(view.narrow(1, 1..2).is_ok() && view.index_axis(1, 1).is_ok());
    assert_eq!(view.expand([0, 2]).unwrap().desc(), view.desc());
}

#[test]
fn rows_of_no_elements_are_empty() {
    let view = View::from_slice::<f32>(&[], [2, 0]).unwrap();
    let row = view.host::<f32>().unwrap().row(&[1]);
    assert!(row.is_empty() && row.iter().next().is_none());
    assert_eq!(row.contiguous(), Some(&[][..]));
    let mut none: [f32; 0] = [];
    let mut host = ViewMut::from_slice(&mut none, [2, 0]).unwrap().host_mut::<f32>().unwrap();
    let mut row = host.row_mut(&[1]);
    assert!(row.is_empty());
    assert_eq!(row.contiguous_mut(), Some(&mut [][..]));
    row.fill_with(|_| unreachable!("there is no element to fill"));
}

#[test]
fn a_part_of_no_elements_stays_empty() {
    let mut data = [1f32; 6];
    let part = View::from_slice(&data, [2, 3]).unwrap().narrow(0, 2..2).unwrap();
    assert_eq!((part.shape(), part.host::<f32>().unwrap().shape()), ([0, 3].into(), [0, 3].into()));
    let parts = ViewMut::from_slice(&mut data, [2, 3]).unwrap().split(0, [0, 2, 0]).unwrap();
    assert_eq!(parts.map(|part| part.shape()[0]), [0, 2, 0]);
}

#[test]
fn one_element_without_axes_is_read_and_written() {
    let mut data = [5f32];
    let view = View::from_slice(&data, []).unwrap();
    assert_eq!(view.host::<f32>().unwrap().at(&[]), 5.0);
    ViewMut::from_slice(&mut data, []).unwrap().host_mut::<f32>().unwrap().set(&[], 6.0);
    assert_eq!(data, [6.0]);
    assert_eq!(ViewMut::from_slice(&mut data, []).unwrap().into_axis(0).len(), 0);
}

fn raw(address: usize, device: Device, desc: TensorDesc) -> Result<(), InvalidCall> {
    // SAFETY: nothing is read or written through the views.
    unsafe {
        let read = View::from_raw_parts(ptr::without_provenance(address), device, desc).map(|_| ());
        let written = ViewMut::from_raw_parts(ptr::without_provenance_mut(address), device, desc).map(|_| ());
        assert_eq!(read, written);
        read
    }
}

#[test]
fn raw_pointers_are_checked_as_far_as_they_can_be() {
    for (dtype, align) in
        [(DType::F64, 8), (DType::F32, 4), (DType::F16, 2), (DType::Bf16, 2), (DType::Bool, 1)]
    {
        let desc = TensorDesc::contiguous(dtype, [2]);
        for address in 4096..4096 + 2 * align {
            let want = (address % align != 0).then_some(InvalidCall::Pointer { address, dtype, align });
            assert_eq!(raw(address, Device::Cuda(0), desc).err(), want);
        }
        let null = InvalidCall::Pointer { address: 0, dtype, align };
        assert_eq!(raw(0, Device::Cpu, desc), Err(null));
        // An empty tensor has no memory to point at.
        assert_eq!(raw(0, Device::Cpu, TensorDesc::contiguous(dtype, [2, 0])), Ok(()));
        assert_eq!(raw(1, Device::Cuda(0), TensorDesc::contiguous(dtype, [0])), Ok(()));
    }
    let huge = TensorDesc::contiguous(DType::F32, [1 << 62]);
    assert!(matches!(raw(4096, Device::Cpu, huge), Err(InvalidCall::Overflow { .. })));
}

#[test]
fn device_memory_is_never_read_on_the_host() {
    let desc = TensorDesc::contiguous(DType::F32, [2]);
    // SAFETY: nothing reads the memory.
    let view = unsafe { View::from_raw_parts(ptr::without_provenance(4096), Device::Cuda(0), desc) }.unwrap();
    assert!(view.host::<f32>().is_none());
    assert_eq!((view.device(), view.narrow(0, 1..2).unwrap().as_ptr().addr()), (Device::Cuda(0), 4100));
    // SAFETY: nothing reads or writes the memory.
    let view = unsafe { ViewMut::from_raw_parts(ptr::without_provenance_mut(4096), Device::Cuda(0), desc) };
    assert!(view.unwrap().host_mut::<f32>().is_none());
    let flags = TensorDesc::contiguous(DType::Bool, [2]);
    // SAFETY: nothing reads the memory.
    let view =
        unsafe { View::from_raw_parts(ptr::without_provenance(4096), Device::Cuda(0), flags) }.unwrap();
    assert!(view.host_mask().is_none());
}

#[test]
fn impossible_parts_are_errors() {
    let data = [0f32; 6];
    let view = View::from_slice(&data, [2, 3]).unwrap();
    let reversed = std::ops::Range { start: 2, end: 1 };
    for refused in [
        view.narrow(2, 0..1),
        view.narrow(1, 0..4),
        view.narrow(1, reversed),
        view.narrow(0, usize::MAX..usize::MAX),
        view.index_axis(0, 2),
        view.index_axis(5, 0),
        view.index_axis(0, usize::MAX),
        view.permute([0]),
        view.permute([1, 2]),
        view.permute([0, 1, 2]),
        view.permute([0; 300]),
        view.expand([2]),
        view.expand([2, 3, 1]),
    ] {
        assert!(matches!(refused, Err(InvalidCall::ViewIndex { .. })), "{refused:?}");
    }
    let mut data = data;
    for (axis, sizes) in [(0, [1, 2]), (2, [0, 0]), (0, [usize::MAX, 3]), (1, [1, 1])] {
        let refused = ViewMut::from_slice(&mut data, [2, 3]).unwrap().split(axis, sizes);
        assert!(matches!(refused, Err(InvalidCall::ViewIndex { .. })), "{axis} {sizes:?}");
    }
}

/// What a documented panic says.
fn panic_of(run: impl FnOnce() + std::panic::UnwindSafe) -> String {
    let payload = std::panic::catch_unwind(run).unwrap_err();
    payload.downcast_ref::<String>().cloned().unwrap_or_default()
}

#[test]
fn indices_outside_panic_as_documented_and_say_where() {
    let data = [0f32; 6];
    let host = || View::from_slice(&data, [2, 3]).unwrap().host::<f32>().unwrap();
    assert_eq!(panic_of(|| _ = host().at(&[2, 0])), "index [2, 0] outside shape [2, 3]");
    assert_eq!(panic_of(|| _ = host().at(&[0])), "index [0] outside shape [2, 3]");
    assert_eq!(panic_of(|| _ = host().row(&[2])), "row [2] outside shape [2, 3]");
    assert_eq!(panic_of(|| _ = host().row(&[0, 0])), "row [0, 0] outside shape [2, 3]");
    assert_eq!(panic_of(|| _ = host().row(&[0]).at(3)), "index 3 of a row of 3");
    assert_eq!(panic_of(|| _ = host().matrix(&[0, 0], 1, 1)), "axes 1 and 1 of shape [2, 3]");
    assert_eq!(panic_of(|| _ = host().matrix(&[0, 3], 0, 1)), "index [0, 3] outside shape [2, 3]");

    let written = |run: fn(&mut crate::HostViewMut<'_, f32>)| {
        panic_of(move || {
            let mut data = [0f32; 6];
            run(&mut ViewMut::from_slice(&mut data, [2, 3]).unwrap().host_mut::<f32>().unwrap());
        })
    };
    assert_eq!(written(|host| host.set(&[0, 3], 1.0)), "index [0, 3] outside shape [2, 3]");
    assert_eq!(written(|host| host.set(&[], 1.0)), "index [] outside shape [2, 3]");
    assert_eq!(written(|host| host.row_mut(&[2]).set(0, 1.0)), "row [2] outside shape [2, 3]");
    assert_eq!(written(|host| host.row_mut(&[1]).set(3, 1.0)), "index 3 of a row of 3");
}
