//! `merge_partials` on whole tensors.

use half::{bf16, f16};

use crate::merge::{merge_partials, merge_row};
use crate::{DType, Device, Element, Scalar, TensorDesc, View, ViewMut};

const OUT: [usize; 4] = [2, 3, 2, 4];
const LSE: [usize; 3] = [2, 3, 2];
const ROWS: usize = 12;

/// Outputs and logsumexps of a part, from a seed, exact in every dtype.
fn part(seed: usize) -> (Vec<f64>, Vec<f64>) {
    let value = |i: usize| ((i * 7 + seed * 13) % 16) as f64 / 8.0 - 1.0;
    ((0..ROWS * 4).map(value).collect(), (0..ROWS).map(|i| value(i + 5)).collect())
}

fn converted<T: Scalar>(values: &[f64]) -> Vec<T> {
    values.iter().map(|&value| T::from_f64(value)).collect()
}

/// Merges three parts of operand type `T` with statistics `F` and checks every element.
fn merges<T: Scalar, F: Scalar>(tolerance: f64) {
    let parts: Vec<_> = (0..3).map(part).collect();
    let data: Vec<_> = (parts.iter()).map(|(o, l)| (converted::<T>(o), converted::<F>(l))).collect();
    let views: Vec<_> = (data.iter())
        .map(|(o, l)| (View::from_slice(o, OUT).unwrap(), View::from_slice(l, LSE).unwrap()))
        .collect();
    let (mut out, mut lse) = (vec![T::from_f64(f64::NAN); ROWS * 4], vec![F::from_f64(f64::NAN); ROWS]);
    merge_partials(
        &views,
        ViewMut::from_slice(&mut out, OUT).unwrap(),
        ViewMut::from_slice(&mut lse, LSE).unwrap(),
    )
    .unwrap();
    for row in 0..ROWS {
        let sum: f64 = parts.iter().map(|(_, l)| l[row].exp()).sum();
        assert!((lse[row].to_f64() - sum.ln()).abs() < 1e-6, "lse of row {row}");
        for i in 4 * row..4 * row + 4 {
            let want = parts.iter().map(|(o, l)| l[row].exp() * o[i]).sum::<f64>() / sum;
            assert!((out[i].to_f64() - want).abs() <= tolerance, "{} at {i}, want {want}", out[i].to_f64());
        }
    }
}

#[test]
fn every_float_dtype_merges() {
    merges::<f64, f64>(1e-15);
    merges::<f32, f32>(1e-6);
    merges::<f16, f32>(2f64.powi(-11));
    merges::<bf16, f32>(2f64.powi(-8));
}

#[test]
fn layouts_of_parts_and_outputs_are_free() {
    // Part and output in BNTH storage, and the statistics with the heads before the rows.
    let (o, l) = part(1);
    let (o, l): (Vec<f32>, Vec<f32>) = (converted(&o), converted(&l));
    let part_out = View::from_slice(&o, [2, 2, 3, 4]).unwrap().permute([0, 2, 1, 3]).unwrap();
    let part_lse = View::from_slice(&l, [2, 2, 3]).unwrap().permute([0, 2, 1]).unwrap();
    let (mut out, mut lse) = (vec![f32::NAN; ROWS * 4], vec![f32::NAN; ROWS]);
    let whole_out = ViewMut::from_slice(&mut out, [2, 2, 4, 3]).unwrap().permute([0, 3, 1, 2]).unwrap();
    merge_partials(&[(part_out, part_lse)], whole_out, ViewMut::from_slice(&mut lse, LSE).unwrap()).unwrap();
    for (b, n, t, h) in indices(2, 2, 3, 4) {
        assert_eq!(out[((b * 2 + n) * 4 + h) * 3 + t], o[((b * 2 + n) * 3 + t) * 4 + h]);
        assert_eq!(lse[(b * 3 + t) * 2 + n], l[(b * 2 + n) * 3 + t]);
    }
}

fn indices(a: usize, b: usize, c: usize, d: usize) -> impl Iterator<Item = (usize, usize, usize, usize)> {
    (0..a * b * c * d).map(move |i| (i / (b * c * d), i / (c * d) % b, i / d % c, i % d))
}

#[test]
fn no_parts_are_the_result_of_no_keys() {
    let (mut out, mut lse) = (vec![f32::NAN; ROWS * 4], vec![f32::NAN; ROWS]);
    merge_partials(
        &[],
        ViewMut::from_slice(&mut out, OUT).unwrap(),
        ViewMut::from_slice(&mut lse, LSE).unwrap(),
    )
    .unwrap();
    assert_eq!(out, [0.0; ROWS * 4]);
    assert_eq!(lse, [f32::NEG_INFINITY; ROWS]);
}

/// Merges one part into fresh outputs; on refusal they must be untouched.
fn refusal<'a>(part: (View<'a>, View<'a>), out: ViewMut<'_>, lse: ViewMut<'_>) -> String {
    merge_partials(&[part], out, lse).unwrap_err().to_string()
}

#[test]
fn refusals_name_the_tensor_and_write_nothing() {
    let (o, l) = (vec![1.0f32; ROWS * 4], vec![0.0f32; ROWS]);
    let (mut out, mut lse) = (vec![7.0f32; ROWS * 4], vec![7.0f32; ROWS]);
    let good = (View::from_slice(&o, OUT).unwrap(), View::from_slice(&l, LSE).unwrap());

    let mut check = |part, out_shape: &[usize], lse_shape: &[usize], want: &str| {
        let shape = |shape: &[usize]| crate::Dims::from_slice(shape).unwrap();
        let message = refusal(
            part,
            ViewMut::from_slice(&mut out, shape(out_shape)).unwrap(),
            ViewMut::from_slice(&mut lse, shape(lse_shape)).unwrap(),
        );
        assert_eq!(message, want);
    };
    check(good, &[2, 3, 8], &LSE, "out has rank 3 (shape [2, 3, 8]), expected rank 4");
    check(good, &OUT, &[2, 2, 3], "lse has shape [2, 2, 3], expected [2, 3, 2] ([B, T, N] of out)");
    check(good, &OUT, &[12], "lse has shape [12], expected [2, 3, 2] ([B, T, N] of out)");
    let other = (View::from_slice(&o, [2, 3, 4, 2]).unwrap(), good.1);
    let why = "(every part has the shape of the whole)";
    check(other, &OUT, &LSE, &format!("out has shape [2, 3, 4, 2], expected [2, 3, 2, 4] {why}"));
    let other = (good.0, View::from_slice(&l, [3, 2, 2]).unwrap());
    check(other, &OUT, &LSE, &format!("lse has shape [3, 2, 2], expected [2, 3, 2] {why}"));

    let wide = vec![0.0f64; ROWS];
    check((good.0, View::from_slice(&wide, LSE).unwrap()), &OUT, &LSE, "lse has dtype f64, expected f32");
    let flags = vec![true; ROWS * 4];
    check(
        (View::from_slice(&flags, OUT).unwrap(), good.1),
        &OUT,
        &LSE,
        "out has dtype bool, expected f64, f32, f16 or bf16",
    );
    assert_eq!((out, lse), (vec![7.0; ROWS * 4], vec![7.0; ROWS]));

    let (mut flags, mut lse) = (flags, vec![7.0f32; ROWS]);
    let message = refusal(
        good,
        ViewMut::from_slice(&mut flags, OUT).unwrap(),
        ViewMut::from_slice(&mut lse, LSE).unwrap(),
    );
    assert_eq!(message, "out has dtype bool, expected f64, f32, f16 or bf16");
    let (mut out, mut half_lse) = (vec![7.0f32; ROWS * 4], vec![f16::ONE; ROWS]);
    let message = refusal(
        good,
        ViewMut::from_slice(&mut out, OUT).unwrap(),
        ViewMut::from_slice(&mut half_lse, LSE).unwrap(),
    );
    assert_eq!(message, "lse has dtype f16, expected f32");
}

#[test]
fn device_memory_is_refused() {
    let (o, l) = (vec![1.0f32; ROWS * 4], vec![0.0f32; ROWS]);
    let (mut out, mut lse) = (vec![7.0f32; ROWS * 4], vec![7.0f32; ROWS]);
    let desc = TensorDesc::contiguous(f32::DTYPE, OUT);
    // SAFETY: the memory is the vector's; only the device is a lie, which keeps everybody from touching it.
    #[allow(unsafe_code)]
    let elsewhere = unsafe { View::from_raw_parts(o.as_ptr().cast(), Device::Cuda(1), desc) }.unwrap();
    let message = refusal(
        (elsewhere, View::from_slice(&l, LSE).unwrap()),
        ViewMut::from_slice(&mut out, OUT).unwrap(),
        ViewMut::from_slice(&mut lse, LSE).unwrap(),
    );
    assert_eq!(message, "out is on cuda:1, the call is on cpu");
    let desc = TensorDesc::contiguous(DType::F32, LSE);
    // SAFETY: the call is refused for the device before anything is read.
    #[allow(unsafe_code)]
    let elsewhere =
        unsafe { ViewMut::from_raw_parts(lse.as_mut_ptr().cast(), Device::Cuda(0), desc) }.unwrap();
    let good = (View::from_slice(&o, OUT).unwrap(), View::from_slice(&l, LSE).unwrap());
    let message = refusal(good, ViewMut::from_slice(&mut out, OUT).unwrap(), elsewhere);
    assert_eq!(message, "lse is on cuda:0, the call is on cpu");
}

/// The sizes of an empty tensor may be anything; a row is merged in blocks, which must not show.
#[test]
fn no_memory_or_time_depends_on_sizes_of_an_empty_output() {
    let (mut out, mut lse): ([f32; 0], [f32; 0]) = ([], []);
    for shape in [
        [0, 1, 1, usize::MAX],
        [0, 1, 1, 1 << 45],
        [1, 0, 1, 1 << 45],
        [1, 1, 0, 1 << 45],
        [1 << 60, 0, 1, 1],
        [1 << 20, 1 << 40, 0, 1],
    ] {
        let [batch, length, heads, _] = shape;
        let rows = [batch, length, heads];
        let part = (View::from_slice(&out, shape).unwrap(), View::from_slice(&lse, rows).unwrap());
        let (no_out, no_lse): (&mut [f32], &mut [f32]) = (&mut [], &mut []);
        merge_partials(
            &[part, part],
            ViewMut::from_slice(no_out, shape).unwrap(),
            ViewMut::from_slice(no_lse, rows).unwrap(),
        )
        .unwrap();
    }
    merge_partials(
        &[],
        ViewMut::from_slice(&mut out, [0, 1, 1, usize::MAX]).unwrap(),
        ViewMut::from_slice(&mut lse, [0, 1, 1]).unwrap(),
    )
    .unwrap();
}

#[test]
fn long_rows_are_merged_to_the_last_element() {
    for width in [0, 1, 255, 256, 257, 1000] {
        let part = |factor: f64| -> Vec<f64> { (0..2 * width).map(|i| factor * (i as f64 + 1.0)).collect() };
        let (a, b, c) = (part(1.0), part(-2.0), part(0.25));
        let (l, m, n) = ([0.5, -1.0], [0.0, 2.0], [f64::NEG_INFINITY, 1.0]);
        let view = |out, lse| {
            (View::from_slice(out, [1, 2, 1, width]).unwrap(), View::from_slice(lse, [1, 2, 1]).unwrap())
        };
        let (mut out, mut lse) = (vec![f64::NAN; 2 * width], [f64::NAN; 2]);
        merge_partials(
            &[view(&a, &l), view(&b, &m), view(&c, &n)],
            ViewMut::from_slice(&mut out, [1, 2, 1, width]).unwrap(),
            ViewMut::from_slice(&mut lse, [1, 2, 1]).unwrap(),
        )
        .unwrap();
        for (row, got_lse) in lse.into_iter().enumerate() {
            let range = row * width..(row + 1) * width;
            let (mut want, mut want_lse) = (vec![0.0; width], f64::NEG_INFINITY);
            for (out, lse) in [(&a, l), (&b, m), (&c, n)] {
                merge_row(&mut want, &mut want_lse, &out[range.clone()], lse[row]);
            }
            assert_eq!((&out[range], got_lse), (&want[..], want_lse), "row {row} of {width}");
        }
    }
}
