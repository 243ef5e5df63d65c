//! Finite logits of any size: a row's weights sum to 1, forward and backward, at every level.
//!
//! The usual way to mask by a number is a bias of a large negative one, so rows of one such number occur
//! wherever a whole row is padding. Which values fail where the rounding of a logit comes back as a weight is
//! a matter of luck, so the sweeps go over one to nine times every power of ten.

mod common;

use attention_chunked::{ChunkedBackend, ChunkedConfig, Level};
use attention_core::DType;
use common::{Case, Data, Results};

/// Sizes that take each way through the backend: small batch rows, chunks of rows, chunks of grouped rows
/// over several blocks of keys, few rows of one and of several parts.
const WAYS: [(&str, [usize; 6]); 5] = [
    ("small", [1, 9, 20, 1, 1, 4]),
    ("chunk", [1, 16, 300, 1, 1, 16]),
    ("blocks", [1, 20, 600, 2, 1, 8]),
    ("few", [1, 2, 300, 2, 1, 5]),
    ("parts", [1, 1, 2600, 1, 1, 8]),
];

/// The largest finite number of what logits are computed in.
fn largest(dtype: DType) -> f64 {
    if dtype == DType::F64 { f64::MAX } else { f64::from(f32::MAX) }
}

/// One to nine times each power of ten from 1 on, and the largest number; in dtypes whose logits are like
/// another's, or of very many powers, some of them, another digit each time. Longer ways take every fourth.
fn magnitudes(dtype: DType, way: &str) -> impl Iterator<Item = f64> {
    let largest = largest(dtype);
    let powers = if dtype == DType::F64 { 0..=308 } else { 0..=38 };
    let step = match dtype {
        DType::F64 => 25,
        DType::F32 => 1,
        _ => 4,
    };
    let all = powers.flat_map(|power| (1..=9).map(move |digit| format!("{digit}e{power}").parse().unwrap()));
    all.filter(move |&x: &f64| x <= largest)
        .step_by(step * if way == "small" { 1 } else { 5 })
        .chain([largest])
}

/// Every level with every dtype that it has kernels of its own for, and every way.
fn for_each(mut visit: impl FnMut(&ChunkedBackend, DType, &str, [usize; 6], String)) {
    for level in Level::available() {
        let backend = ChunkedBackend::with_config(ChunkedConfig::default().level(level).threads(1));
        for dtype in [DType::F64, DType::F32, DType::F16, DType::Bf16] {
            let is_half = matches!(dtype, DType::F16 | DType::Bf16);
            if level == Level::Amx && !is_half {
                continue;
            }
            for (way, sizes) in WAYS {
                visit(&backend, dtype, way, sizes, format!("{level}, {dtype}, {way}"));
            }
        }
    }
}

/// What rounding a result to its dtype may cost, and the sums of some hundred terms before it.
fn close(dtype: DType) -> f64 {
    match dtype {
        DType::F64 => 1e-12,
        DType::F32 => 2e-5,
        DType::F16 => 4e-3,
        _ => 3e-2,
    }
}

/// Biases over the keys of a row, in what logits are computed in.
fn bias_type(dtype: DType) -> DType {
    if dtype == DType::F64 { DType::F64 } else { DType::F32 }
}

fn with_bias(dtype: DType, sizes: [usize; 6], bias: impl Fn(usize) -> f64) -> Case {
    let mut case = Case::new(dtype, sizes);
    let numbers = (0..sizes[2]).map(bias).collect();
    case.bias = Some((bias_type(dtype), numbers, vec![sizes[2]]));
    case
}

/// Sums over the keys, of each key/value head and column.
fn sums(data: &Data, sizes: [usize; 6]) -> Vec<f64> {
    let [_, _, keys, _, key_heads, width] = sizes;
    let numbers = data.numbers();
    (0..key_heads * width)
        .map(|at| (0..keys).map(|key| numbers[key * key_heads * width + at]).sum())
        .collect()
}

/// That probabilities sum to 1 in both passes: with a gradient of ones, each row adds 1 to the sum of dv, and
/// an output is a mean of values.
fn assert_weights_sum_to_one(case: &Case, results: &Results, what: &str) {
    results.assert_finite(what);
    let [_, queries, _, heads, key_heads, _] = case.sizes;
    let rows = (queries * heads / key_heads) as f64;
    // A half loses its own rounding with every key.
    let tolerance = close(case.dtype);
    for sum in sums(&results.dv, case.sizes) {
        assert!((sum - rows).abs() <= tolerance * rows, "{what}: dv sums to {sum} for {rows}");
    }
    for out in results.out.numbers() {
        assert!(out.abs() <= 1.0 + tolerance, "{what}: out {out}");
    }
}

fn mean_of_values(case: &Case, results: &Results, keys: std::ops::Range<usize>, what: &str) {
    let [_, queries, _, heads, key_heads, width] = case.sizes;
    let value = Data::new(case.dtype, &case.value).numbers();
    let out = results.out.numbers();
    for row in 0..queries * heads {
        let key_head = row % heads / (heads / key_heads);
        for column in 0..width {
            let of = |key: usize| value[(key * key_heads + key_head) * width + column];
            let want = keys.clone().map(of).sum::<f64>() / keys.len() as f64;
            let got = out[row * width + column];
            assert!((got - want).abs() <= close(case.dtype), "{what}: out {got}, want {want}");
        }
    }
}

/// Rows of one number are means, with gradients of means: a finite bias never masks.
#[test]
fn rows_of_one_bias_are_means() {
    for_each(|backend, dtype, way, sizes, at| {
        for magnitude in magnitudes(dtype, way) {
            for bias in [-magnitude, magnitude] {
                let what = format!("{at}, bias {bias:e}");
                let mut case = with_bias(dtype, sizes, |_| bias);
                case.query.fill(0.0);
                let results = case.run(backend);
                assert_weights_sum_to_one(&case, &results, &what);
                mean_of_values(&case, &results, 0..sizes[2], &what);
                let want = bias + (sizes[2] as f64).ln();
                for lse in results.lse.numbers() {
                    let bound = 4.0 * close(dtype).min(1e-6) * want.abs().max(1.0);
                    assert!((lse - want).abs() <= bound, "{what}: lse {lse}, want {want}");
                }
            }
        }
    });
}

/// The same with ordinary queries and keys, whose products the bias swallows or does not.
#[test]
fn rows_of_one_bias_with_ordinary_products_sum_to_one() {
    for_each(|backend, dtype, way, sizes, at| {
        for magnitude in magnitudes(dtype, way) {
            for bias in [-magnitude, magnitude] {
                let case = with_bias(dtype, sizes, |_| bias);
                let what = format!("{at}, bias {bias:e}");
                assert_weights_sum_to_one(&case, &case.run(backend), &what);
            }
        }
    });
}

/// Left padding, all keys but the last, the first block and a half, by a number: what is left is as if alone,
/// once the number is far enough below.
#[test]
fn padding_by_a_number_is_padding() {
    for_each(|backend, dtype, way, sizes, at| {
        let keys = sizes[2];
        for begin in [keys / 3, keys - 1, keys * 2 / 3] {
            for magnitude in magnitudes(dtype, way) {
                let what = format!("{at}, {begin} keys at -{magnitude:e}");
                let mut case = with_bias(dtype, sizes, |key| if key < begin { -magnitude } else { 0.0 });
                let results = case.run(backend);
                assert_weights_sum_to_one(&case, &results, &what);
                if magnitude >= 1e3 {
                    case.query.fill(0.0);
                    let results = case.run(backend);
                    mean_of_values(&case, &results, begin..keys, &what);
                    let dv = results.dv.numbers();
                    let padded = &dv[..begin * sizes[4] * sizes[5]];
                    assert!(padded.iter().all(|&x| x == 0.0), "{what}: a gradient of padding");
                }
            }
        }
    });
}

/// One key far above all others takes everything.
#[test]
fn one_key_far_above_takes_all() {
    for_each(|backend, dtype, way, sizes, at| {
        let keys = sizes[2];
        for above in [0, keys / 2, keys - 1] {
            for magnitude in magnitudes(dtype, way) {
                let what = format!("{at}, key {above} at {magnitude:e}");
                let case = with_bias(dtype, sizes, |key| if key == above { magnitude } else { 0.0 });
                let results = case.run(backend);
                assert_weights_sum_to_one(&case, &results, &what);
                if magnitude >= 1e3 {
                    mean_of_values(&case, &results, above..above + 1, &what);
                }
            }
        }
    });
}

/// Large logits that are products: of large operands, or by a large scale.
#[test]
fn large_products_and_scales() {
    for_each(|backend, dtype, way, sizes, at| {
        for magnitude in magnitudes(dtype, way) {
            // Half of the magnitude a side, where the dtype has it.
            let side =
                if dtype == DType::F16 { magnitude.sqrt().min(100.0) } else { magnitude.sqrt() * 0.99 };
            let mut case = Case::new(dtype, sizes);
            case.scale = Some(1.0);
            case.key.fill(0.0);
            case.query.fill(0.0);
            let (width, key_heads) = (sizes[5], sizes[4]);
            case.query.iter_mut().step_by(width).for_each(|x| *x = side);
            case.key.iter_mut().step_by(width).for_each(|x| *x = side);
            let what = format!("{at}, products of {side:e} twice");
            let results = case.run(backend);
            assert_weights_sum_to_one(&case, &results, &what);
            mean_of_values(&case, &results, 0..sizes[2], &what);
            // One key alone is as large as that, the others as small.
            case.key.iter_mut().step_by(width).for_each(|x| *x = -side);
            for head in 0..key_heads {
                case.key[((sizes[2] - 1) * key_heads + head) * width] = side;
            }
            let results = case.run(backend);
            assert_weights_sum_to_one(&case, &results, &what);
            if side > 100.0 {
                mean_of_values(&case, &results, sizes[2] - 1..sizes[2], &what);
            }

            // A scale of any size that is honoured, on operands that make ordinary logits with it, or none
            // where their products would be subnormal, which some levels take as 0.
            let mut case = Case::new(dtype, sizes);
            case.scale = Some(magnitude);
            let is_small = dtype != DType::F16 && magnitude < largest(dtype).powf(0.8);
            let small = if is_small { (1.0 / magnitude).sqrt() } else { 0.0 };
            case.query.iter_mut().chain(&mut case.key).for_each(|x| *x *= small);
            let what = format!("{at}, scale {magnitude:e}");
            assert_weights_sum_to_one(&case, &case.run(backend), &what);
            case.scale = Some(1.0 / magnitude);
            assert_weights_sum_to_one(&case, &case.run(backend), &what);
            case.scale = Some(0.5);
            case.softcap = Some(magnitude);
            assert_weights_sum_to_one(&case, &case.run(backend), &what);
            case.softcap = Some(1.0 / magnitude);
            assert_weights_sum_to_one(&case, &case.run(backend), &what);
        }
    });
}

/// A sink far above or below the keys, and one that equals them.
#[test]
fn sinks_of_any_size() {
    for_each(|backend, dtype, way, sizes, at| {
        let (keys, rows) = (sizes[2] as f64, sizes[1] as f64);
        // Halves take the logsumexp as it was rounded up to 1024.
        let sink_tolerance = if matches!(dtype, DType::F16 | DType::Bf16) { 1e-4 } else { 2e-5 };
        for magnitude in magnitudes(dtype, way) {
            for sink in [magnitude, -magnitude] {
                let what = format!("{at}, sink {sink:e}");
                let mut case = with_bias(dtype, sizes, |_| sink);
                case.query.fill(0.0);
                case.sinks = Some(vec![sink; sizes[3]]);
                case.d_lse = 1.0;
                case.d_out.fill(0.0);
                let results = case.run(backend);
                results.assert_finite(&what);
                // A sink like each of the keys: one share more, and d_lse alone has a gradient.
                for dsink in results.dsinks.as_ref().expect("sinks").numbers() {
                    let want = rows / (keys + 1.0);
                    assert!(
                        (dsink - want).abs() <= sink_tolerance * want,
                        "{what}: dsink {dsink}, want {want}"
                    );
                }
                // Alone in its size.
                case.bias = None;
                let results = case.run(backend);
                results.assert_finite(&what);
                let want = if sink > 1e3 {
                    rows
                } else if sink < -1e3 {
                    0.0
                } else {
                    continue;
                };
                for dsink in results.dsinks.as_ref().expect("sinks").numbers() {
                    assert!(
                        (dsink - want).abs() <= sink_tolerance * want,
                        "{what}: dsink {dsink}, want {want}"
                    );
                }
            }
        }
    });
}

/// A bias is read in the precision of the logits: what is -inf there masks as a boolean mask does, and
/// whatever the memory of such a key holds reaches nothing.
#[test]
fn a_bias_of_minus_infinity_masks_memory_that_is_not_a_number() {
    for_each(|backend, dtype, _, sizes, at| {
        for number in [f64::NEG_INFINITY, f64::MIN] {
            if dtype == DType::F64 && number == f64::MIN {
                continue;
            }
            for softcap in [None, Some(3.0)] {
                let what = format!("{at}, bias {number:e}, softcap {softcap:?}");
                let mut case = Case::new(dtype, sizes);
                case.softcap = softcap;
                let keys = sizes[2];
                let numbers = (0..keys).map(|key| if key % 3 == 1 { number } else { 0.25 }).collect();
                case.bias = Some((DType::F64, numbers, vec![keys]));
                let want = case.run(backend);
                want.assert_finite(&what);
                let row = sizes[4] * sizes[5];
                for key in (1..keys).step_by(3) {
                    case.key[key * row..(key + 1) * row].fill(f64::NAN);
                    case.value[key * row..(key + 1) * row].fill(if key % 2 == 0 {
                        f64::NAN
                    } else {
                        f64::INFINITY
                    });
                }
                let got = case.run(backend);
                for ((name, want), (_, got)) in want.named().zip(got.named()) {
                    assert_eq!(want.bits(), got.bits(), "{what}: {name}");
                }
                // The same as a mask.
                case.mask = Some(((0..keys).map(|key| key % 3 != 1).collect(), vec![keys]));
                let numbers = vec![0.25; keys];
                case.bias = Some((DType::F64, numbers, vec![keys]));
                let got = case.run(backend);
                for ((name, want), (_, got)) in want.named().zip(got.named()) {
                    assert_eq!(want.bits(), got.bits(), "{what}: {name} of a mask");
                }
                // Every key: nothing to attend to.
                case.bias = Some((DType::F64, vec![number; keys], vec![keys]));
                let got = case.run(backend);
                assert!(got.lse.numbers().iter().all(|&x| x == f64::NEG_INFINITY), "{what}");
                for (name, data) in got.named().filter(|(name, _)| *name != "lse") {
                    assert!(data.numbers().iter().all(|&x| x == 0.0), "{what}: {name}");
                }
            }
        }
    });
}

/// No row has a gradient through a sink of -inf, which is no sink, whatever its own gradients are.
#[test]
fn a_sink_of_minus_infinity_has_no_gradient() {
    for_each(|backend, dtype, _, sizes, at| {
        let mut case = Case::new(dtype, sizes);
        case.sinks = Some(vec![f64::NEG_INFINITY; sizes[3]]);
        case.d_out[0] = f64::NAN;
        let dsinks = case.run(backend).dsinks.expect("sinks").numbers();
        assert!(dsinks.iter().all(|&x| x.to_bits() == 0), "{at}: {dsinks:?}");
    });
}

/// A large logit and a NaN alone among masked keys: which of them a vector's maximum keeps depends on where
/// they are. The row is NaN, and the call ends.
#[test]
fn a_large_logit_beside_nan_ends() {
    // Decoded, packed as a small batch row, and packed as a large one.
    for [queries, keys] in [[9, 33], [40, 33], [160, 33]] {
        let pairs = || (0..keys).flat_map(|large| (0..keys).map(move |nan| (large, nan)));
        for (level, dtype) in Level::available().flat_map(|level| DType::FLOATS.map(|dtype| (level, dtype))) {
            let backend = ChunkedBackend::with_config(ChunkedConfig::default().level(level).threads(1));
            for (large, nan) in pairs() {
                let mut case = common::Case::new(dtype, [1, queries, keys, 1, 1, 1]);
                case.query.fill(100.0);
                case.key[large] = 100.0;
                case.key[nan] = f64::NAN;
                let mask: Vec<bool> = (0..keys).map(|key| key == large || key == nan).collect();
                case.mask = Some((mask, vec![keys]));
                let out = case.run(&backend).out.numbers();
                let at = format!("{level}, {dtype}, {queries} rows: {large} and {nan}");
                assert!(out.iter().all(|x| x.is_nan()), "{at}: {out:?}");
            }
        }
    }
}
