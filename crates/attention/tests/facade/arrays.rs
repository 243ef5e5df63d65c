//! Arrays of ndarray.

use attention::arrays::Operand;
use attention::{Error, IntoView, InvalidCall, Tensor};
use ndarray::{Array, Array3, Array4, Array5, ArrayView4, Axis, Dimension, Ix3, Ix4, arr1, arr2, s};

use crate::support::{attention, served};

/// Numbers that differ.
fn numbers(shape: (usize, usize, usize, usize)) -> Array4<f64> {
    let mut next = 0.0;
    Array4::from_shape_simple_fn(shape, || {
        next = (next + 0.618_033_988_75) % 1.0;
        next - 0.5
    })
}

fn out(query: &Operand<'_>, key: &Operand<'_>, value: &Operand<'_>) -> Array4<f64> {
    attention().causal(true).forward(query, key, value).unwrap().into_array().unwrap()
}

/// What the same call gives on contiguous copies.
fn want(array: ArrayView4<'_, f64>) -> Array4<f64> {
    let data: Vec<f64> = array.iter().copied().collect();
    let (b, t, n, h) = array.dim();
    let tensor = Tensor::from_vec(data, [b, t, n, h]).unwrap();
    attention().causal(true).forward(&tensor, &tensor, &tensor).unwrap().into_array().unwrap()
}

#[test]
fn arrays_of_any_strides_are_inputs() {
    let stored = numbers((2, 6, 4, 8));
    let whole = stored.view();
    let one = stored.slice(s![1..2, .., .., ..]);
    let cases: [(&str, ArrayView4<'_, f64>, bool); 9] = [
        ("contiguous", whole, false),
        ("swapped", whole.permuted_axes([0, 2, 1, 3]), false),
        ("transposed", whole.reversed_axes(), false),
        ("backwards", stored.slice(s![.., ..;-1, .., ..;-1]), false),
        ("one batch row", one, false),
        ("expanded", one.broadcast((3, 6, 4, 8)).unwrap(), false),
        ("every second head", stored.slice(s![.., .., ..;2, ..]), true),
        ("part of the rows", stored.slice(s![.., 1..5, .., ..]), true),
        ("part of the width, backwards", stored.slice(s![.., .., .., 1..7;-2]), true),
    ];
    for (name, array, copied) in cases {
        let operand = Operand::from(array);
        assert_eq!(operand.is_copied(), copied, "{name}");
        assert_eq!((&operand).into_view().unwrap().shape()[..], *array.shape(), "{name}");
        let difference = (out(&operand, &operand, &operand) - want(array)).abs();
        // Strides decide in which order some sums are.
        assert!(difference.iter().all(|&x| x < 1e-14), "{name}: {difference}");
    }
    assert_eq!(out(&(&stored).into(), &(&stored).into(), &(&stored).into()), want(whole));
}

#[test]
fn arrays_without_a_batch_axis_are_inputs() {
    let stored = numbers((1, 6, 4, 8));
    let three = stored.index_axis(Axis(0), 0);
    let operand = Operand::from(three);
    let out = attention().causal(true).forward(&operand, &operand, &operand).unwrap();
    let out: Array3<f64> = out.into_array().unwrap();
    assert_eq!(out, want(stored.view()).index_axis_move(Axis(0), 0));
}

#[test]
fn masks_biases_and_gradients_are_arrays_too() {
    let x = numbers((1, 5, 2, 4));
    let bias = numbers((1, 2, 5, 5));
    let mask = Array::from_shape_fn((5, 5), |(t, j)| j <= t);
    let (x, bias, mask) = (Operand::from(&x), Operand::from(&bias), Operand::from(&mask));
    let masked = attention().bias(&bias).mask(&mask);
    let causal = attention().bias(&bias).causal(true);
    let (masked, causal) =
        [masked, causal].map(|call| call.backward_recompute(&x, &x, &x, &x).unwrap().dbias.unwrap()).into();
    let masked: Array4<f64> = masked.into_array().unwrap();
    assert_eq!(masked.dim(), (1, 2, 5, 5));
    assert_eq!(masked, causal.into_array::<f64, Ix4>().unwrap());
}

#[test]
fn outputs_go_into_arrays_of_any_strides() {
    let x = numbers((2, 6, 4, 8));
    let operand = Operand::from(&x);
    let want = want(x.view());
    let call = attention().causal(true);
    let mut swapped = Array4::<f64>::from_elem((2, 4, 6, 8), f64::NAN);
    let view = swapped.view_mut().permuted_axes([0, 2, 1, 3]);
    call.forward_into_array(&operand, &operand, &operand, view).unwrap();
    assert_eq!(swapped.permuted_axes([0, 2, 1, 3]), want);

    let mut wide = Array4::<f64>::from_elem((2, 6, 8, 9), 7.0);
    let view = wide.slice_mut(s![.., ..;-1, ..;2, 1..]);
    call.forward_into_array(&operand, &operand, &operand, view).unwrap();
    assert_eq!(wide.slice(s![.., ..;-1, ..;2, 1..]), want);
    // What lies between is as it was.
    assert!(wide.slice(s![.., .., 1..;2, ..]).iter().chain(wide.slice(s![.., .., .., 0])).all(|&x| x == 7.0));
}

#[test]
fn what_does_not_fit_is_an_error() {
    let five = Array5::<f32>::zeros((1, 1, 1, 1, 1));
    let four = Array4::<f32>::zeros((1, 3, 2, 4));
    let operand = Operand::from(&four);
    let error = attention().forward(&Operand::from(&five), &operand, &operand).unwrap_err();
    assert_eq!(error.to_string(), "invalid call: query: rank 5 is above the largest supported rank of 4");
    let mut five = five;
    let error = attention().forward_into_array(&operand, &operand, &operand, five.view_mut());
    let error = error.unwrap_err();
    assert!(matches!(error, Error::Input { source: InvalidCall::RankTooLarge { rank: 5, max: 4 }, .. }));
    let mut small = Array4::<f32>::zeros((1, 2, 2, 4));
    let error = attention().forward_into_array(&operand, &operand, &operand, small.view_mut());
    assert!(error.unwrap_err().to_string().contains("[1, 2, 2, 4]"));
    let tensor = attention().forward(&operand, &operand, &operand).unwrap();
    let error = tensor.into_array::<f64, Ix4>().unwrap_err();
    assert!(
        error.to_string().starts_with("the tensor is f32 [") && error.to_string().ends_with("expected f64")
    );
    let error = error.into_tensor().into_array::<f32, ndarray::Ix3>().unwrap_err();
    assert!(error.to_string().ends_with(", expected f32 with 3 axes"), "{error}");
    let tensor = error.into_tensor();
    assert_eq!(tensor.into_array::<f32, ndarray::IxDyn>().unwrap().ndim(), 4);
    assert_eq!(Ix4::NDIM, Some(4));
}

#[test]
fn empty_arrays_are_inputs() {
    let none = Array4::<f32>::zeros((0, 3, 2, 4));
    let operand = Operand::from(&none);
    let out: Array4<f32> = attention().forward(&operand, &operand, &operand).unwrap().into_array().unwrap();
    assert_eq!(out.dim(), (0, 3, 2, 4));
}

/// Packed tokens, offsets, pages and tables as arrays, of any strides and of each integer dtype.
#[test]
fn sequences_are_arrays() {
    // Stored [N, total, H].
    let stored = Array3::from_shape_fn((2, 7, 4), |(n, t, h)| ((t * 31 + n * 17 + h * 7) % 13) as f32 / 13.0);
    let x = Operand::from(stored.view().permuted_axes([1, 0, 2]));
    assert!(!x.is_copied());
    let want = served().packed([0, 3, 7]).causal(true).forward(&x, &x, &x).unwrap();
    let (narrow, wide) = (arr1(&[0i32, 3, 7]), arr1(&[0usize, 3, 7]));
    for offsets in [Operand::from(&narrow), Operand::from(&wide)] {
        let call = served().packed(&offsets).causal(true);
        assert_eq!(call.forward(&x, &x, &x).unwrap(), want);
        let mut out = Array3::<f32>::zeros((7, 2, 4));
        call.forward_into_array(&x, &x, &x, out.view_mut()).unwrap();
        assert_eq!(out, want.clone().into_array::<f32, Ix3>().unwrap());
    }

    // The same keys in pages of 3, of which the table has the last column first.
    let mut pages = Array4::<f32>::from_elem((5, 3, 2, 4), f32::NAN);
    let (table, lengths) = (arr2(&[[-1i64, -1, 4], [2, 0, 1]]), arr1(&[3u32, 4]));
    for (row, [page, slot]) in
        [[4, 0], [4, 1], [4, 2], [1, 0], [1, 1], [1, 2], [0, 0]].into_iter().enumerate()
    {
        for (n, h) in (0..2).flat_map(|n| (0..4).map(move |h| (n, h))) {
            pages[[page, slot, n, h]] = stored[[n, row, h]];
        }
    }
    let (pages, lengths) = (Operand::from(&pages), Operand::from(&lengths));
    let reversed = Operand::from(table.slice(s![.., ..;-1]));
    assert!(!reversed.is_copied());
    let call = served().packed_queries([0, 3, 7]).paged(&reversed, &lengths).causal(true);
    assert_eq!(call.forward(&x, &pages, &pages).unwrap(), want);
}
