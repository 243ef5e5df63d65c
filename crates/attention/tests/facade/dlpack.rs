//! Tensors of other libraries: of the dlpark crate, both ways, and what is wrong with some.

use attention::dlpack::{self, Error, Export, Import, ffi};
use attention::{DType, Device, InvalidCall, Tensor, bf16, f16};
use dlpark::allocation::dynamic::Initialized;
use dlpark::ffi::{DLManagedTensor, DLManagedTensorVersioned};
use dlpark::{DlpackFlags, Managed, TryFromDlpack};
use ndarray::{Array4, ArrayViewD};

use crate::support::{attention, served};

fn numbers() -> Array4<f32> {
    Array4::from_shape_fn((1, 4, 2, 8), |(_, t, n, h)| ((t * 31 + n * 17 + h * 7) % 13) as f32 / 13.0 - 0.4)
}

/// What the call gives on a tensor of this library.
fn want(array: &Array4<f32>) -> Tensor {
    let (b, t, n, h) = array.dim();
    let tensor = Tensor::from_vec(array.iter().copied().collect::<Vec<f32>>(), [b, t, n, h]).unwrap();
    attention().causal(true).forward(&tensor, &tensor, &tensor).unwrap()
}

fn run(x: &Import) -> Tensor {
    let x = x.view().unwrap();
    attention().causal(true).forward(x, x, x).unwrap()
}

#[test]
fn tensors_of_dlpark_are_borrowed_as_they_lie() {
    // Stored BNTH, so the strides are not those of a contiguous tensor.
    let array = numbers();
    let stored = array.view().permuted_axes([0, 2, 1, 3]).as_standard_layout().into_owned();
    let stored = || Box::new(stored.clone().permuted_axes([0, 2, 1, 3]));
    let versioned: Initialized<DLManagedTensorVersioned> = stored().try_into().unwrap();
    let unversioned: Initialized<DLManagedTensor> = stored().try_into().unwrap();
    // SAFETY: dlpark made both tensors, which own their memory, and each is handed over once. The structs of
    // both crates have DLPack's layout.
    let (versioned, unversioned) = unsafe {
        (
            Import::from_versioned(versioned.finish().into_raw().cast()).unwrap(),
            Import::from_unversioned(unversioned.finish().into_raw().cast()).unwrap(),
        )
    };
    for import in [&versioned, &unversioned] {
        assert_eq!(import.view().unwrap().desc().strides(), [64, 8, 32, 1].into());
        assert!(!import.is_read_only());
        assert_eq!(run(import), want(&array));
    }
}

#[test]
fn tensors_of_ours_are_read_by_dlpark_and_come_back() {
    let out = want(&numbers());
    // SAFETY: each pointer is that of a managed tensor that was just made, and is handed over once.
    let (versioned, unversioned) = unsafe {
        (
            Managed::<DLManagedTensorVersioned>::from_raw(Export::from(out.clone()).into_versioned().cast())
                .unwrap(),
            Managed::<DLManagedTensor>::from_raw(Export::from(out.clone()).into_unversioned().cast())
                .unwrap(),
        )
    };
    // SAFETY: the managed tensors live longer than the arrays, and nothing writes their elements meanwhile.
    let (a, b) = unsafe {
        (
            ArrayViewD::<f32>::try_from_dlpack(&versioned, ()).unwrap(),
            ArrayViewD::<f32>::try_from_dlpack(&unversioned, ()).unwrap(),
        )
    };
    for array in [a, b] {
        assert_eq!(array.shape(), [1, 4, 2, 8]);
        assert!(array.iter().eq(out.as_slice::<f32>().unwrap()));
    }
    let data = versioned.validate_export().unwrap().data_ptr();
    // SAFETY: `Export` made the managed tensor, which dlpark gives up here, so it is handed over once.
    let back = unsafe { Import::from_versioned(versioned.into_raw().cast()) }.unwrap();
    assert_eq!(back.view().unwrap().as_ptr().cast(), data);
    assert_eq!(
        back.view().unwrap().host::<f32>().unwrap().at(&[0, 3, 1, 7]),
        out.as_slice::<f32>().unwrap()[63]
    );
}

#[test]
fn every_dtype_and_empty_tensors_go_out_and_in() {
    let tensors = [
        Tensor::from_vec(vec![1.5f64; 6], [2, 3]).unwrap(),
        Tensor::from_vec(vec![1.5f32; 6], [2, 3]).unwrap(),
        Tensor::from_vec(vec![f16::ONE; 6], [2, 3]).unwrap(),
        Tensor::from_vec(vec![bf16::ONE; 6], [2, 3]).unwrap(),
        Tensor::from_vec(vec![true; 6], [2, 3]).unwrap(),
        Tensor::from_vec(vec![-1i32; 6], [2, 3]).unwrap(),
        Tensor::from_vec(vec![1u32; 6], [2, 3]).unwrap(),
        Tensor::from_vec(vec![-1i64; 6], [2, 3]).unwrap(),
        Tensor::from_vec(vec![1usize; 6], [2, 3]).unwrap(),
        Tensor::from_vec(vec![0f32; 0], [2, 0]).unwrap(),
        Tensor::from_vec(vec![7f32], []).unwrap(),
    ];
    for tensor in tensors {
        // SAFETY: each pointer is that of a managed tensor that was just made, and is handed over once.
        let imports = unsafe {
            [
                Import::from_versioned(Export::from(tensor.clone()).into_versioned()).unwrap(),
                Import::from_unversioned(Export::from(tensor.clone()).into_unversioned()).unwrap(),
            ]
        };
        for import in imports {
            assert_eq!(import.view().unwrap().desc(), tensor.view().desc());
        }
    }
}

/// Lengths as torch and JAX have them: integers of 64 and of 32 bits.
#[test]
fn integers_of_other_libraries_are_lengths() {
    let array = numbers();
    let x = Tensor::from_vec(array.iter().copied().collect::<Vec<f32>>(), [1, 4, 2, 8]).unwrap();
    let want = attention().key_value_lengths([3]).forward(&x, &x, &x).unwrap();
    let lengths = [
        Tensor::from_vec(vec![3i32], [1]).unwrap(),
        Tensor::from_vec(vec![3u32], [1]).unwrap(),
        Tensor::from_vec(vec![3i64], [1]).unwrap(),
    ];
    for lengths in lengths {
        // SAFETY: the pointer is that of a managed tensor that was just made, and is handed over once.
        let lengths = unsafe { Import::from_versioned(Export::from(lengths).into_versioned()) }.unwrap();
        let lengths = lengths.view().unwrap();
        assert_eq!(attention().key_value_lengths(lengths).forward(&x, &x, &x).unwrap(), want);
        // What integers mean in a mask is not the same in any two libraries.
        let text = attention().mask(lengths).forward(&x, &x, &x).unwrap_err().to_string();
        assert!(text.starts_with("invalid call: mask has dtype") && text.contains("expected bool"), "{text}");
        assert!(text.contains("numbers that say 1 or 0 are compared with 0 first"), "{text}");
    }
}

/// Offsets, tables and lengths as torch has them: integers of 32 bits beside packed tokens and pages.
#[test]
fn sequences_of_other_libraries_are_packed_and_paged() {
    fn import(tensor: Tensor) -> Import {
        // SAFETY: the pointer is that of a managed tensor that was just made, and is handed over once.
        unsafe { Import::from_versioned(Export::from(tensor).into_versioned()) }.unwrap()
    }
    let data: Vec<f32> = numbers().iter().copied().collect();
    let x = import(Tensor::from_vec(data.clone(), [4, 2, 8]).unwrap());
    let x = x.view().unwrap();
    let offsets = import(Tensor::from_vec(vec![0i32, 1, 4], [3]).unwrap());
    let want = served().packed([0, 1, 4]).causal(true).forward(x, x, x).unwrap();
    let call = served().packed(offsets.view().unwrap()).causal(true);
    assert_eq!(call.forward(x, x, x).unwrap(), want);

    // Pages of 2: the first row in page 2, the others in pages 1 and 0.
    let mut pages = vec![f32::NAN; 3 * 2 * 16];
    for (row, place) in [4, 2, 3, 0].into_iter().enumerate() {
        pages[place * 16..][..16].copy_from_slice(&data[row * 16..][..16]);
    }
    let pages = import(Tensor::from_vec(pages, [3, 2, 2, 8]).unwrap());
    let (table, lengths) = (
        import(Tensor::from_vec(vec![2i32, -1, 1, 0], [2, 2]).unwrap()),
        import(Tensor::from_vec(vec![1i32, 3], [2]).unwrap()),
    );
    let call = served().packed_queries(offsets.view().unwrap()).causal(true);
    let call = call.paged(table.view().unwrap(), lengths.view().unwrap());
    let pages = pages.view().unwrap();
    assert_eq!(call.forward(x, pages, pages).unwrap(), want);
}

#[test]
fn outputs_are_written_where_others_have_them() {
    let out: Initialized<DLManagedTensorVersioned> =
        Box::new(Array4::<f32>::zeros((1, 4, 2, 8))).try_into().unwrap();
    // SAFETY: dlpark made the tensor, which owns its memory, and it is handed over once.
    let mut out = unsafe { Import::from_versioned(out.finish().into_raw().cast()) }.unwrap();
    let x = Tensor::from_vec(numbers().into_raw_vec_and_offset().0, [1, 4, 2, 8]).unwrap();
    // SAFETY: `out` owns the tensor, and nothing else has its address, so nothing else reads or writes its
    // elements.
    let view = unsafe { out.view_mut() }.unwrap();
    attention().causal(true).forward_into(&x, &x, &x, view, None).unwrap();
    let written = out.view().unwrap().host::<f32>().unwrap();
    let want = want(&numbers());
    assert_eq!(written.at(&[0, 2, 1, 3]), want.as_slice::<f32>().unwrap()[2 * 16 + 8 + 3]);

    let mut fixed: Initialized<DLManagedTensorVersioned> =
        Box::new(Array4::<f32>::zeros((1, 4, 2, 8))).try_into().unwrap();
    fixed.set_flags(DlpackFlags::READ_ONLY).unwrap();
    // SAFETY: dlpark made the tensor, which owns its memory, and it is handed over once.
    let mut fixed = unsafe { Import::from_versioned(fixed.finish().into_raw().cast()) }.unwrap();
    assert!(fixed.is_read_only() && fixed.view().is_ok());
    // SAFETY: `fixed` owns the tensor, and nothing else has its address, so nothing else reads or writes its
    // elements.
    assert_eq!(unsafe { fixed.view_mut() }.unwrap_err(), Error::ReadOnly);
}

/// A tensor on memory of the test's.
fn tensor(data: &mut [f32], shape: &mut [i64], strides: Option<&mut [i64]>) -> ffi::Tensor {
    ffi::Tensor {
        data: data.as_mut_ptr().cast(),
        device: ffi::Device { device_type: 1, device_id: 0 },
        ndim: shape.len() as i32,
        dtype: ffi::DataType { code: 2, bits: 32, lanes: 1 },
        shape: shape.as_mut_ptr(),
        strides: strides.map_or(std::ptr::null_mut(), <[i64]>::as_mut_ptr),
        byte_offset: 0,
    }
}

#[test]
fn offsets_missing_strides_and_devices_are_understood() {
    let (mut data, mut shape) = ([0f32, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0], [2i64, 3]);
    let mut whole = tensor(&mut data, &mut shape, None);
    whole.byte_offset = 4;
    // SAFETY: shape and data are arrays that outlive the view; the six elements from the second on are in
    // `data`.
    let view = unsafe { dlpack::view(&whole) }.unwrap();
    assert_eq!(view.host::<f32>().unwrap().at(&[1, 2]), 6.0);
    let mut strides = [-3i64, 1];
    let mut reversed = tensor(&mut data, &mut shape, Some(&mut strides));
    reversed.byte_offset = 12;
    // SAFETY: shape, strides and data are arrays that outlive the view; elements 0 to 5, which it reaches,
    // are in `data`.
    let view = unsafe { dlpack::view(&reversed) }.unwrap();
    assert_eq!(view.host::<f32>().unwrap().at(&[1, 2]), 2.0);
    for (device_type, device_id, device) in
        [(3, 5, Device::Cpu), (2, 1, Device::Cuda(1)), (13, 0, Device::Cuda(0))]
    {
        let there = ffi::Tensor { device: ffi::Device { device_type, device_id }, ..whole };
        // SAFETY: shape and data are arrays that outlive the view, and nothing is read through it, whatever
        // device it names.
        assert_eq!(unsafe { dlpack::view(&there) }.unwrap().device(), device);
    }
}

/// torch's float8_e4m3fn and float8_e5m2 are known, and the other formats of 8 bits are not taken for them.
#[test]
fn floats_of_8_bits_are_told_apart() {
    let (mut data, mut shape) = ([0f32; 2], [8i64]);
    let whole = tensor(&mut data, &mut shape, None);
    for code in 7..=14 {
        let there = ffi::Tensor { dtype: ffi::DataType { code, bits: 8, lanes: 1 }, ..whole };
        // SAFETY: shape and data are arrays that outlive the view, and the eight elements of one byte are in
        // `data`.
        let view = unsafe { dlpack::view(&there) };
        match (code, view) {
            (10, Ok(view)) => assert_eq!(view.desc().dtype(), DType::F8E4M3),
            (12, Ok(view)) => assert_eq!(view.desc().dtype(), DType::F8E5M2),
            (10 | 12, Err(error)) => panic!("{error}"),
            (code, view) => {
                let text = view.unwrap_err().to_string();
                assert!(
                    text.contains("(float of 8 bits)") && text.contains("e4m3fn or e5m2"),
                    "{code}: {text}"
                );
            }
        }
    }
}

/// Other libraries export strides of axes of size 1 as they happen to be: torch gives (999, 8, 777, 1).
#[test]
fn strides_of_axes_of_size_one_say_nothing() {
    let shape = [1i64, 4, 1, 8];
    let plain = [32i64, 8, 8, 1];
    let mut data: Vec<f32> = numbers().iter().copied().take(32).collect();
    let run = |data: &mut [f32], mut strides: [i64; 4]| {
        let mut shape = shape;
        let x = tensor(data, &mut shape, Some(&mut strides));
        // SAFETY: shape and strides are arrays that outlive the view; its 32 elements are in `data`, whatever
        // the strides of the axes of size 1.
        let x = unsafe { dlpack::view(&x) }.unwrap();
        let mut out = vec![f32::NAN; 32];
        let (mut shape, mut strides) = (shape, strides);
        let written = tensor(&mut out, &mut shape, Some(&mut strides));
        // SAFETY: shape and strides are arrays that outlive the view; its 32 elements are in `out`, which
        // nothing else uses while the view lives.
        let written = unsafe { dlpack::view_mut(&written) }.unwrap();
        attention().causal(true).forward_into(x, x, x, written, None).unwrap();
        let gradients = attention().causal(true).backward_recompute(x, x, x, x).unwrap();
        (out, gradients)
    };
    let want = run(&mut data, plain);
    assert!(want.0.iter().all(|x| x.is_finite()));
    for strides in [[999, 8, 777, 1], [0, 8, 0, 1], [-5, 8, -3, 1], [i64::MAX, 8, i64::MIN, 1], [1, 8, 1, 1]]
    {
        assert_eq!(run(&mut data, strides), want, "{strides:?}");
    }
}

#[test]
fn what_is_no_tensor_of_a_call_is_an_error() {
    let (mut data, mut shape) = ([0f32; 6], [2i64, 3]);
    let whole = tensor(&mut data, &mut shape, None);
    // SAFETY: shape and strides have as many numbers as there are axes, or the tensor is refused before they
    // are read; every tensor here is refused, so no element is read.
    let text = |tensor: ffi::Tensor| unsafe { dlpack::view(&tensor) }.unwrap_err().to_string();
    let on = |device_type, device_id| ffi::Tensor { device: ffi::Device { device_type, device_id }, ..whole };
    assert!(text(on(10, 0)).starts_with("the tensor is on DLPack device type 10, number 0"));
    assert!(text(on(2, -1)).contains("number -1"));
    let of = |code, bits, lanes| ffi::Tensor { dtype: ffi::DataType { code, bits, lanes }, ..whole };
    let integers = text(of(0, 16, 1));
    assert!(
        integers.starts_with(
            "the tensor has DLPack elements of code 0 (signed integer), 16 bits, 1 lane; expected"
        ),
        "{integers}"
    );
    for (code, bits) in [(0, 8), (0, 16), (0, 128), (1, 8), (1, 16), (1, 64)] {
        let other = text(of(code, bits, 1));
        assert!(other.contains("Keras") && other.contains("an unsigned one of 32"), "{other}");
    }
    // As a mask, they mean something else in every library.
    assert!(
        integers.contains("Keras") && integers.ends_with("`mask != 0`, or floats for a bias)"),
        "{integers}"
    );
    assert!(text(of(2, 32, 4)).contains("4 lanes;") && text(of(6, 1, 1)).contains("1 bit, 1 lane;"));
    assert!(!text(of(6, 1, 1)).contains("Keras"));
    assert_eq!(text(ffi::Tensor { ndim: 5, ..whole }), "the tensor has 5 axes, expected 0 to 4");
    assert_eq!(text(ffi::Tensor { ndim: -1, ..whole }), "the tensor has -1 axes, expected 0 to 4");
    let shapeless = ffi::Tensor { shape: std::ptr::null_mut(), ..whole };
    assert_eq!(text(shapeless), "the tensor has 2 axes and no shape");
    let mut negative = [2i64, -3];
    assert_eq!(text(tensor(&mut data, &mut negative, None)), "axis 1 of the tensor has size -3 and stride 0");
    let mut large = [i64::MAX, 3];
    assert!(text(tensor(&mut data, &mut large, None)).contains("overflows the address space"));
    let null = ffi::Tensor { data: std::ptr::null_mut(), ..whole };
    // SAFETY: the shape has two sizes; a null pointer is refused, so no element is read.
    let error = unsafe { dlpack::view(&null) }.unwrap_err();
    assert!(
        matches!(error, Error::View(InvalidCall::Pointer { address: 0, dtype: DType::F32, .. })),
        "{error}"
    );
    let misaligned = ffi::Tensor { byte_offset: 2, ..whole };
    let said = format!("pointer {:#x} is null or not aligned", whole.data as usize + 2);
    assert!(text(misaligned).starts_with(&said), "{}", text(misaligned));
    // SAFETY: the shape has two sizes; a misaligned pointer is refused, so no element is read.
    let error = unsafe { dlpack::view(&misaligned) }.unwrap_err();
    // What `unwrap` and a `main` print: in hexadecimal too.
    assert!(format!("{error:?}").starts_with(&said), "{error:?}");
    let mut broadcast = [0i64, 1];
    let broadcast = tensor(&mut data, &mut shape, Some(&mut broadcast));
    // SAFETY: shape and strides have two numbers each, and the three elements are in `data`. The view is
    // refused, so nothing is written.
    let error = unsafe { dlpack::view_mut(&broadcast) }.unwrap_err();
    assert!(matches!(error, Error::View(InvalidCall::SelfOverlap { .. })), "{error}");
    // SAFETY: the contract allows null, which is refused.
    assert_eq!(unsafe { Import::from_versioned(std::ptr::null_mut()) }.unwrap_err(), Error::Null);
    // SAFETY: the contract allows null, which is refused.
    assert_eq!(unsafe { Import::from_unversioned(std::ptr::null_mut()) }.unwrap_err(), Error::Null);
}

#[test]
fn another_major_version_is_given_back_unread() {
    use std::sync::atomic::{AtomicUsize, Ordering};
    static GIVEN_BACK: AtomicUsize = AtomicUsize::new(0);
    unsafe extern "C" fn count(_: *mut ffi::ManagedTensorVersioned) {
        GIVEN_BACK.fetch_add(1, Ordering::SeqCst);
    }
    let (mut data, mut shape) = ([0f32; 6], [2i64, 3]);
    let mut managed = ffi::ManagedTensorVersioned {
        version: ffi::Version { major: 2, minor: 0 },
        manager_ctx: std::ptr::null_mut(),
        deleter: Some(count),
        flags: 0,
        dl_tensor: tensor(&mut data, &mut shape, None),
    };
    // SAFETY: the structs outlive the import, and the deleter only counts.
    let error = unsafe { Import::from_versioned(&mut managed) }.unwrap_err();
    assert_eq!(error.to_string(), "the capsule has DLPack 2.0, expected 1.x");
    assert_eq!(GIVEN_BACK.load(Ordering::SeqCst), 1);
    managed.version = ffi::Version { major: 1, minor: 9 };
    // SAFETY: the structs outlive the import, and the deleter only counts.
    drop(unsafe { Import::from_versioned(&mut managed) }.unwrap());
    assert_eq!(GIVEN_BACK.load(Ordering::SeqCst), 2);
    managed.deleter = None;
    // SAFETY: the structs outlive the import, which has no deleter to call.
    drop(unsafe { Import::from_versioned(&mut managed) }.unwrap());
}
