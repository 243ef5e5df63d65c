//! Keys and values of 8 bits: the bits of wider ones, and scales at the ends of f32.

use attention_core::{
    AttentionBackend, CallData, DType, F8E4M3, F8E5M2, Feature, Float8, ForwardCall, ForwardOutputs,
    Gradients, Inputs, Overflow, Pass, Problem, Scalar, ScratchBuffer, TensorDesc, Unsupported, View,
    ViewMut,
};
use attention_cpu::{CpuBackend, CpuConfig};
use half::{bf16, f16};

/// B = 2, N = 4, K = 2.
const BATCH: usize = 2;
const HEADS: [usize; 2] = [4, 2];

/// The output and the logsumexp of a call on these elements of queries, and of keys and values.
fn run<T: Scalar, C: attention_core::Element>(
    [queries, keys, width]: [usize; 3],
    query: &[T],
    [key, value]: [&[C]; 2],
    data: CallData<'_>,
) -> (Vec<T>, Vec<f64>) {
    let cache = |elements| View::from_slice(elements, [BATCH, keys, HEADS[1], width]).unwrap();
    let shape = [BATCH, queries, HEADS[0], width];
    let query = View::from_slice(query, shape).unwrap();
    let inputs = Inputs { data, ..Inputs::new(query, cache(key), cache(value)) };
    let problem = inputs.problem().causal(true).lse(true).build().unwrap();
    let plan = CpuBackend::with_config(CpuConfig::default().threads(1)).plan(&problem).unwrap();
    let mut scratch = ScratchBuffer::new(plan.scratch_bytes());
    let rows = BATCH * queries * HEADS[0];
    let mut out = vec![T::from_f32(f32::NAN); rows * width];
    let lse_shape = [BATCH, queries, HEADS[0]];
    let (mut narrow, mut wide) = (vec![f32::NAN; rows], vec![f64::NAN; rows]);
    let lse = match T::DTYPE {
        DType::F64 => ViewMut::from_slice(&mut wide, lse_shape),
        _ => ViewMut::from_slice(&mut narrow, lse_shape),
    };
    let outputs =
        ForwardOutputs { out: ViewMut::from_slice(&mut out, shape).unwrap(), lse: Some(lse.unwrap()) };
    plan.forward(ForwardCall::new(&problem, inputs, outputs).unwrap(), scratch.scratch()).unwrap();
    let lse = if T::DTYPE == DType::F64 { wide } else { narrow.into_iter().map(f64::from).collect() };
    (out, lse)
}

/// Every byte but those that are not finite, over and over, and queries that differ.
fn operands<T: Scalar, F: Float8>([queries, keys, width]: [usize; 3]) -> (Vec<T>, [Vec<F>; 2]) {
    let bytes: Vec<F> = (0..=u8::MAX).map(F::from_bits).filter(|byte| byte.to_f32().is_finite()).collect();
    let cached = BATCH * keys * HEADS[1] * width;
    let of = |step: usize| (0..cached).map(|index| bytes[(index * step + index / 7) % bytes.len()]).collect();
    let query = (0..BATCH * queries * HEADS[0] * width)
        .map(|index| T::from_f32(((index * 37 % 101) as f32 - 50.0) / 3200.0))
        .collect();
    (query, [of(29), of(13)])
}

fn bits<T: Scalar>(numbers: &[T]) -> Vec<u64> {
    numbers.iter().map(|number| number.to_f64().to_bits()).collect()
}

/// Decoding and blocks, both with few logits and with many.
const SIZES: [[usize; 3]; 5] = [[1, 9, 16], [12, 10, 7], [2, 2100, 8], [70, 66, 24], [1, 300, 33]];

fn has_the_bits_of_wider_ones<T: Scalar, F: Float8>() {
    for sizes in SIZES {
        let (query, [key, value]) = operands::<T, F>(sizes);
        // Every byte is a number of every wider dtype, and so is its double, except that of f16.
        let powers = if T::DTYPE == DType::F16 { [1.0f32, 0.5] } else { [8.0, 0.125] };
        for factors in [[1.0, 1.0], powers] {
            let widened = |bytes: &[F], factor: f32| -> Vec<T> {
                bytes.iter().map(|byte| T::from_f32(factor * byte.to_f32())).collect()
            };
            let wide = [widened(&key, factors[0]), widened(&value, factors[1])];
            let (want, want_lse) =
                run(sizes, &query, wide.each_ref().map(Vec::as_slice), CallData::default());
            let scales = factors.map(|factor| [factor]);
            let data = CallData {
                key_scales: View::from_slice(&scales[0], [1]).ok().filter(|_| factors[0] != 1.0),
                value_scales: View::from_slice(&scales[1], []).ok(),
                ..CallData::default()
            };
            let (got, lse) = run(sizes, &query, [&key[..], &value[..]], data);
            assert_eq!(bits(&got), bits(&want), "{sizes:?} {} {factors:?}", T::DTYPE);
            assert_eq!(bits(&lse), bits(&want_lse), "{sizes:?} {} {factors:?}", T::DTYPE);
            assert!(lse.iter().all(|lse| lse.is_finite()));
        }
    }
}

/// Without scales, and with powers of two, a call has the bits that it has on wider keys and values.
#[test]
fn calls_have_the_bits_of_wider_keys_and_values() {
    has_the_bits_of_wider_ones::<f64, F8E4M3>();
    has_the_bits_of_wider_ones::<f32, F8E4M3>();
    has_the_bits_of_wider_ones::<f32, F8E5M2>();
    has_the_bits_of_wider_ones::<f16, F8E4M3>();
    has_the_bits_of_wider_ones::<bf16, F8E4M3>();
    has_the_bits_of_wider_ones::<bf16, F8E5M2>();
}

/// What a key stands for may be beyond f32 where its products are not: nothing on the way to them may be.
#[test]
fn key_scales_at_the_ends_of_f32_lose_no_logit() {
    fn check<T: Scalar>(query: f32, key: f32, key_scale: f32, scale: f64) {
        let sizes = [1, 1, 1];
        let queries = vec![T::from_f32(query); BATCH * HEADS[0]];
        let keys = vec![F8E5M2::from_f32(key, Overflow::Nan); BATCH * HEADS[1]];
        let scales = [key_scale; 4];
        let data = CallData {
            scale: Some(scale),
            key_scales: View::from_slice(&scales, [2, 2]).ok(),
            ..CallData::default()
        };
        let (out, lse) = run(sizes, &queries, [&keys[..], &keys[..]], data);
        // Of one key, the logsumexp is its logit, and the output its value.
        let want = scale * T::from_f32(query).to_f64() * f64::from(key) * f64::from(key_scale);
        for lse in lse {
            assert!((lse - want).abs() <= want.abs() * 2f64.powi(-22), "{} {lse:e} {want:e}", T::DTYPE);
        }
        assert!(out.iter().all(|out| out.to_f32() == T::from_f32(key).to_f32()));
    }
    // The smallest number of f16 with the largest key there is.
    check::<f16>(2f32.powi(-24), 49152.0, f32::MAX, 0.5);
    check::<bf16>(2f32.powi(-24), 49152.0, 3e38, 0.5);
    check::<f32>(1e-30, 448.0, 1e38, 1.0);
    // And the other way round: a scale that is not a normal number.
    check::<f16>(65504.0, 512.0, 1e-40, 1e20);
    check::<f32>(1e20, 512.0, 1e-44, 1e20);
    check::<bf16>(1e30, 1.0, 1e-30, 1.0);
    check::<f64>(1e30, 1.0, f32::MAX, 1e38);
}

/// A row of the output is multiplied once it is normalised: sums of many values do not overflow before.
#[test]
fn value_scales_are_applied_to_means() {
    let sizes = [3, 3000, 1];
    let query = vec![f32::MIN_POSITIVE; BATCH * 3 * HEADS[0]];
    let keys = vec![F8E4M3::default(); BATCH * 3000 * HEADS[1]];
    let values = vec![F8E4M3::from_f32(448.0, Overflow::Nan); keys.len()];
    let scale = [7e35f32];
    let data = CallData { value_scales: View::from_slice(&scale, [1]).ok(), ..CallData::default() };
    let (out, _) = run(sizes, &query, [&keys[..], &values[..]], data);
    assert!(out.iter().all(|&out| (out / (448.0 * 7e35) - 1.0).abs() < 1e-6), "{out:?}");
}

/// The backward pass has no such calls, whoever asks, and the capabilities say so.
#[test]
fn gradients_are_refused_before_the_backend() {
    let (query, key) = (
        TensorDesc::contiguous(DType::F32, [1, 2, 2, 8]),
        TensorDesc::contiguous(DType::F8E4M3, [1, 4, 2, 8]),
    );
    let backend = CpuBackend::new();
    let problem = Problem::builder(query, key, key).build().unwrap();
    assert_eq!(backend.supports(&problem), Ok(()));
    assert!(problem.to_builder().gradients(Gradients::QKV).build().is_err());
    let of = |pass| backend.capabilities().pass(pass).unwrap().features.contains(Feature::EightBitKeys);
    assert_eq!([Pass::Forward, Pass::Backward].map(of), [true, false]);
    let device = problem.to_builder().device(attention_core::Device::Cuda(0)).build().unwrap();
    assert!(matches!(backend.supports(&device), Err(Unsupported::Device { .. })));
}
