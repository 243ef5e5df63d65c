//! Keys and values of 8 bits: the numbers of wider ones, at every level, and scales at the ends of f32.

use attention_chunked::{ChunkedBackend, ChunkedConfig, Level};
use attention_core::{
    AttentionBackend, CallData, DType, Element, F8E4M3, F8E5M2, Feature, Float8, ForwardCall, ForwardOutputs,
    Inputs, Overflow, Pass, QueryOffset, Scalar, ScratchBuffer, View, ViewMut,
};
use half::{bf16, f16};

/// B = 2, N = 4, K = 2.
const BATCH: usize = 2;
const HEADS: [usize; 2] = [4, 2];

/// The output and the logsumexp of a call on these elements of queries, and of keys and values.
fn run<T: Scalar, C: Element>(
    level: Level,
    [queries, keys, width]: [usize; 3],
    query: &[T],
    [key, value]: [&[C]; 2],
    data: CallData<'_>,
) -> (Vec<f64>, Vec<f64>) {
    let cache = |elements| View::from_slice(elements, [BATCH, keys, HEADS[1], width]).unwrap();
    let shape = [BATCH, queries, HEADS[0], width];
    let query = View::from_slice(query, shape).unwrap();
    let data = CallData { query_offset: QueryOffset::BottomRight, ..data };
    let inputs = Inputs { data, ..Inputs::new(query, cache(key), cache(value)) };
    let problem = inputs.problem().causal(true).lse(true).build().unwrap();
    let plan = ChunkedBackend::with_config(ChunkedConfig::default().threads(1).level(level));
    let plan = plan.plan(&problem).unwrap();
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
    (out.into_iter().map(T::to_f64).collect(), lse)
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

/// Decoding of one tile and of many, of one split and of more, and chunks.
const DECODED: [[usize; 3]; 4] = [[1, 9, 16], [2, 2100, 8], [1, 300, 33], [4, 37, 80]];
const CHUNKED: [[usize; 3]; 2] = [[12, 20, 7], [66, 70, 24]];

fn means_what_wider_ones_mean<T: Scalar, F: Float8>(level: Level) {
    for sizes in DECODED.into_iter().chain(CHUNKED) {
        let (query, [key, value]) = operands::<T, F>(sizes);
        // Every byte is a number of every wider dtype, and so is its double, except that of f16.
        let powers = if T::DTYPE == DType::F16 { [1.0f32, 0.5] } else { [8.0, 0.125] };
        for factors in [[1.0, 1.0], powers, [-0.5, 1.0]] {
            let widened = |bytes: &[F], factor: f32| -> Vec<T> {
                bytes.iter().map(|byte| T::from_f32(factor * byte.to_f32())).collect()
            };
            let wide = [widened(&key, factors[0]), widened(&value, factors[1])];
            let wide = wide.each_ref().map(Vec::as_slice);
            let (want, want_lse) = run(level, sizes, &query, wide, CallData::default());
            let scales = factors.map(|factor| [factor]);
            let data = CallData {
                key_scales: View::from_slice(&scales[0], [1]).ok().filter(|_| factors[0] != 1.0),
                value_scales: View::from_slice(&scales[1], []).ok(),
                ..CallData::default()
            };
            let (got, lse) = run(level, sizes, &query, [&key[..], &value[..]], data);
            let what = format!("{level} {sizes:?} {} {factors:?}", T::DTYPE);
            // Products have the same bits in either case, and chunks have the same sums too. Where few rows
            // are decoded, sums of values are those of tiles.
            if CHUNKED.contains(&sizes) {
                assert_eq!((&got, &lse), (&want, &want_lse), "{what}");
            }
            assert_eq!(lse, want_lse, "{what}");
            let unit = match T::DTYPE {
                DType::F64 => f64::EPSILON,
                DType::F32 => f32::EPSILON.into(),
                DType::F16 => f16::EPSILON.into(),
                _ => bf16::EPSILON.into(),
            };
            let largest = f64::from(factors[1] * F::LARGEST);
            for (got, want) in got.iter().zip(&want) {
                assert!((got - want).abs() <= 8.0 * unit * largest, "{what}: {got} and {want}");
            }
            assert!(lse.iter().all(|lse| lse.is_finite()));
        }
    }
}

/// Without scales, with powers of two, and with a sign, a call means what it means on wider keys and values.
#[test]
fn calls_mean_what_they_mean_on_wider_keys_and_values() {
    for level in Level::available() {
        means_what_wider_ones_mean::<f64, F8E4M3>(level);
        means_what_wider_ones_mean::<f32, F8E4M3>(level);
        means_what_wider_ones_mean::<f32, F8E5M2>(level);
        means_what_wider_ones_mean::<f16, F8E4M3>(level);
        means_what_wider_ones_mean::<bf16, F8E4M3>(level);
        means_what_wider_ones_mean::<bf16, F8E5M2>(level);
    }
}

/// The logsumexps of keys that are all alike, in decoding and in chunks, in f64 where f32 is small and not.
fn alike<T: Scalar, F: Float8>(query: f32, key: f32, key_scale: f32, scale: f64) {
    for (level, sizes) in Level::available()
        .flat_map(|level| [[1, 1, 1], [1, 5000, 1], [9, 9, 1], [100, 100, 1]].map(|sizes| (level, sizes)))
    {
        let [rows, keys, _] = sizes;
        let queries = vec![T::from_f32(query); BATCH * HEADS[0] * rows];
        let cached = vec![F::from_f32(key, Overflow::Nan); BATCH * HEADS[1] * keys];
        let scales = [key_scale; 4];
        let data = CallData {
            scale: Some(scale),
            key_scales: View::from_slice(&scales, [2, 2]).ok(),
            ..CallData::default()
        };
        let (out, lse) = run(level, sizes, &queries, [&cached[..], &cached[..]], data);
        let logit = scale * T::from_f32(query).to_f64() * f64::from(key) * f64::from(key_scale);
        let what = format!("{level} {sizes:?} {} {query:e} {key} {key_scale:e} {scale:e}", T::DTYPE);
        for (index, lse) in lse.iter().enumerate() {
            // Row `t` of the last rows sees the keys up to its own.
            let seen = keys - rows + index / HEADS[0] % rows + 1;
            let want = logit + (seen as f64).ln();
            let bound = (logit.abs() + want.abs()) * 2f64.powi(-21);
            assert!((lse - want).abs() <= bound, "{what}: {lse:e} {want:e}");
        }
        for out in out {
            let value = f64::from(F::from_f32(key, Overflow::Nan).to_f32());
            assert!((out - value).abs() <= value.abs() * 1e-5, "{what}: {out}");
        }
    }
}

/// What a key stands for may be beyond f32 where its products are not: nothing on the way to them may be.
#[test]
fn scales_at_the_ends_of_f32_lose_no_logit() {
    // The smallest number of f16 with the largest key there is.
    alike::<f16, F8E5M2>(2f32.powi(-24), 49152.0, f32::MAX, 0.5);
    alike::<bf16, F8E5M2>(2f32.powi(-24), 49152.0, 3e38, 0.5);
    alike::<f32, F8E4M3>(1e-30, 448.0, 1e38, 1.0);
    // And the other way round: a scale that is not a normal number.
    alike::<f16, F8E4M3>(65504.0, 448.0, 1e-40, 1e20);
    alike::<f32, F8E4M3>(1e20, 448.0, 1e-44, 1e20);
    alike::<bf16, F8E5M2>(1e30, 1.0, 1e-30, 1.0);
    alike::<f64, F8E4M3>(1e30, 1.0, f32::MAX, 1e38);
    // Queries near the largest number, with the least key and with none.
    alike::<f32, F8E4M3>(3e38, 2f32.powi(-9), 1.0, 0.125);
    alike::<bf16, F8E4M3>(3e38, 0.0, 1.0, 0.125);
    alike::<f32, F8E4M3>(3e38, 0.0, -0.5, 1e-30);
    // A scale of the call near the largest number, and one of keys beside it.
    alike::<f32, F8E4M3>(1e-37, 2f32.powi(-7), 1.0, 2e38);
    alike::<bf16, F8E4M3>(1e-30, -1.5, 3e-8, 3e38);
    // Nothing is left of keys that stand for zeros, whatever they and the queries are.
    alike::<f32, F8E4M3>(3e38, 448.0, 0.0, 1e38);
    alike::<f16, F8E5M2>(65504.0, -57344.0, -0.0, -1.0);
    alike::<f32, F8E4M3>(2.0, 448.0, 0.7, 0.0);
}

/// A row of the output is multiplied once it is normalised: sums of many values do not overflow before.
#[test]
fn value_scales_are_applied_to_means() {
    for level in Level::available() {
        for (rows, value, scale) in [
            (1, 448.0, 7e35f32),
            (1, 2f32.powi(-9), 3e38),
            (1, 0.0, 3e38),
            (40, 448.0, 7e35),
            (40, 2.0, -1e-40),
        ] {
            let sizes = [rows, 3000, 1];
            let query = vec![f32::MIN_POSITIVE; BATCH * rows * HEADS[0]];
            let keys = vec![F8E4M3::default(); BATCH * 3000 * HEADS[1]];
            let values = vec![F8E4M3::from_f32(value, Overflow::Nan); keys.len()];
            let (scales, want) = ([scale], f64::from(value) * f64::from(scale));
            let data = CallData { value_scales: View::from_slice(&scales, [1]).ok(), ..CallData::default() };
            let (out, _) = run(level, sizes, &query, [&keys[..], &values[..]], data);
            for out in out {
                assert!((out - want).abs() <= want.abs() * 1e-5, "{level} {rows} {value} {scale}: {out}");
            }
        }
    }
}

/// The backward pass has no such calls, and the capabilities say so.
#[test]
fn the_forward_pass_alone_has_the_feature() {
    let backend = ChunkedBackend::new();
    let of = |pass| backend.capabilities().pass(pass).unwrap().features.contains(Feature::EightBitKeys);
    assert_eq!([Pass::Forward, Pass::Backward].map(of), [true, false]);
}
