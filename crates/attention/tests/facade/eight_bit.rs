//! Keys and values of 8 bits, with scales: what callers give, who serves them, and what is refused.

use attention::core::{Feature, FeatureSet};
use attention::kv_cache::{PagedKvCache, PoolShape, TokenShape};
use attention::{
    Attention, DType, Error, F8E4M3, F8E5M2, Float8, InvalidCall, Overflow, Role, Tensor, View, bf16, f16,
};

use super::support::{Toy, registry};

/// Numbers between -2 and 2, the same for the same seed.
fn numbers(count: usize, seed: u32) -> Vec<f32> {
    let mut state = seed.wrapping_mul(2_654_435_761).wrapping_add(1);
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / (1 << 22) as f32 - 2.0
    };
    (0..count).map(|_| next()).collect()
}

fn narrowed<F: Float8>(numbers: &[f32]) -> Vec<F> {
    let mut bytes = vec![F::default(); numbers.len()];
    F::narrow(numbers, &mut bytes, Overflow::Saturate);
    bytes
}

/// What the bytes `[B, S, 2, H]` stand for.
fn widened<F: Float8>(
    bytes: &[F],
    per_sequence: usize,
    width: usize,
    scale: impl Fn(usize, usize) -> f32,
) -> Vec<f32> {
    let number = |(index, byte): (usize, &F)| scale(index / per_sequence, index / width % 2) * byte.to_f32();
    bytes.iter().enumerate().map(number).collect()
}

fn close(got: &[f32], want: &[f32], bound: f32) {
    assert_eq!(got.len(), want.len());
    for (got, want) in got.iter().zip(want) {
        assert!((got - want).abs() <= bound, "{got} and {want}");
    }
}

/// B = 2, T = 3, S = 5, N = 4, K = 2, H = 8.
const QUERY: [usize; 4] = [2, 3, 4, 8];
const CACHE: [usize; 4] = [2, 5, 2, 8];

#[cfg(feature = "cpu")]
fn every_scale_means_what_it_says<F: Float8>() {
    let query = numbers(QUERY.iter().product(), 1);
    let key: Vec<F> = narrowed(&numbers(CACHE.iter().product(), 2));
    let value: Vec<F> = narrowed(&numbers(CACHE.iter().product(), 3));
    let (one, heads, sequences) = ([0.75f32], [0.5f32, 1.25], [0.5f32, -2.0, 3.0, 0.3]);
    type ScaleOf = fn(&[f32], usize, usize) -> f32;
    let views: [(View<'_>, ScaleOf, &[f32]); 4] = [
        (View::from_slice(&one, []).unwrap(), |scales, _, _| scales[0], &one),
        (View::from_slice(&one, [1]).unwrap(), |scales, _, _| scales[0], &one),
        (View::from_slice(&heads, [2]).unwrap(), |scales, _, head| scales[head], &heads),
        (View::from_slice(&sequences, [2, 2]).unwrap(), |scales, b, head| scales[2 * b + head], &sequences),
    ];
    for (key_scales, of_key, key_numbers) in &views {
        for (value_scales, of_value, value_numbers) in &views {
            let wide_key = widened(&key, 80, 8, |b, head| of_key(key_numbers, b, head));
            let wide_value = widened(&value, 80, 8, |b, head| of_value(value_numbers, b, head));
            let attention = Attention::new().causal(true).implementation("cpu");
            let want = attention
                .clone()
                .forward_with_lse((&query, QUERY), (&wide_key, CACHE), (&wide_value, CACHE))
                .unwrap();
            let scaled = attention.key_scales(key_scales).value_scales(value_scales);
            let got = scaled.forward_with_lse((&query, QUERY), (&key, CACHE), (&value, CACHE)).unwrap();
            close(got.out.as_slice().unwrap(), want.out.as_slice().unwrap(), 1e-5);
            close(got.lse.as_slice().unwrap(), want.lse.as_slice().unwrap(), 1e-5);
            // The output has the dtype of the query.
            let half: Vec<f16> = query.iter().map(|&x| f16::from_f32(x)).collect();
            let out = scaled.forward((&half, QUERY), (&key, CACHE), (&value, CACHE)).unwrap();
            let out: Vec<f32> = out.as_slice::<f16>().unwrap().iter().map(|x| x.to_f32()).collect();
            close(&out, want.out.as_slice().unwrap(), 0.05);
        }
    }
}

#[cfg(feature = "cpu")]
#[test]
fn scales_of_every_shape_are_those_of_their_heads() {
    every_scale_means_what_it_says::<F8E4M3>();
    every_scale_means_what_it_says::<F8E5M2>();
}

/// An automatic choice goes to `chunked`, as for other dtypes, and `cpu` gives the same numbers.
#[cfg(all(feature = "cpu", feature = "chunked"))]
#[test]
fn an_automatic_choice_goes_to_who_serves_them() {
    let query = vec![bf16::ONE; QUERY.iter().product()];
    let key: Vec<F8E4M3> = narrowed(&numbers(CACHE.iter().product(), 2));
    let (query, cache) = ((&query, QUERY), (&key, CACHE));
    let explanation = Attention::new().explain(query, cache, cache).unwrap();
    assert_eq!(explanation.chosen().unwrap().name, "chunked");
    let text = explanation.to_string();
    assert!(text.starts_with("forward bf16 (f8e4m3 keys) B2 T3 S5 N4 K2 H8 on cpu"), "{text}");
    let out = Attention::new().forward(query, cache, cache).unwrap();
    assert_eq!((out.dtype(), out.shape()), (DType::Bf16, QUERY.into()));
    let numbers =
        |out: &Tensor| out.as_slice::<bf16>().unwrap().iter().map(|x| x.to_f32()).collect::<Vec<_>>();
    let named = Attention::new().implementation("cpu").forward(query, cache, cache).unwrap();
    close(&numbers(&out), &numbers(&named), 0.02);
}

/// Calls that differ in their scales alone have one problem, and so one plan.
#[test]
fn scales_are_numbers_of_the_call() {
    let (query, key) = (vec![0.5f32; 192], vec![F8E5M2::from_f32(0.5, Overflow::Nan); 160]);
    let (query, cache) = ((&query, QUERY), (&key, CACHE));
    let problem =
        |scales: &[f32]| Attention::new().key_scales((scales, [2])).problem(query, cache, cache).unwrap();
    assert_eq!(problem(&[0.5, 1.0]), problem(&[2.0, 0.25]));
    assert!(problem(&[0.5, 1.0]).has(Role::KeyScales));
    assert_ne!(problem(&[0.5, 1.0]), Attention::new().problem(query, cache, cache).unwrap());
}

#[cfg(feature = "cpu")]
#[test]
fn packed_paged_and_heads_first_calls_have_them_too() {
    let query = numbers(7 * 4 * 8, 1);
    let key: Vec<F8E4M3> = narrowed(&numbers(7 * 2 * 8, 2));
    let scales = [0.5f32, 2.0, 1.5, -1.0];
    let wide: Vec<f32> = (key.iter().enumerate())
        .map(|(index, byte)| scales[2 * usize::from(index >= 3 * 16) + index / 8 % 2] * byte.to_f32())
        .collect();
    let plain = Attention::new().causal(true).implementation("cpu");
    let scaled = plain.clone().key_scales((&scales, [2, 2])).value_scales((&scales, [2, 2]));
    let (query, cache) = ((&query, [7, 4, 8]), (&key, [7, 2, 8]));
    let want =
        plain.clone().packed([0, 3, 7]).forward(query, (&wide, [7, 2, 8]), (&wide, [7, 2, 8])).unwrap();
    let got = scaled.clone().packed([0, 3, 7]).forward(query, cache, cache).unwrap();
    close(got.as_slice().unwrap(), want.as_slice().unwrap(), 1e-5);
    // Sequences of 3 and 4 keys in pages of one.
    let table = [0i32, 1, 2, -1, 3, 4, 5, 6];
    let paged = scaled.packed_queries([0, 3, 7]).paged((&table, [2, 4]), [3, 4]);
    let pages = (&key, [7, 1, 2, 8]);
    assert_eq!(paged.forward(query, pages, pages).unwrap(), got);
    // [N, T, H] without a batch axis.
    let scale = [0.5f32];
    let one = |attention: Attention<'_>| {
        attention.implementation("cpu").key_scales((&scale, [])).forward(
            (&numbers(4 * 3 * 8, 4), [4, 3, 8]),
            (&key[..2 * 3 * 8], [2, 3, 8]),
            (&key[..2 * 3 * 8], [2, 3, 8]),
        )
    };
    assert_eq!(one(Attention::bnth()).unwrap().shape(), [4, 3, 8].into());
}

#[test]
fn wrong_calls_are_refused_in_words() {
    let (query, key) = (vec![0.5f32; 192], vec![F8E4M3::from_f32(0.5, Overflow::Nan); 160]);
    let other = vec![F8E5M2::default(); 160];
    let (wide, nan) = (vec![0.5f32; 160], [1.0f32, f32::NAN]);
    let (query, cache) = ((&query, QUERY), (&key, CACHE));
    let refused = |result: Result<Tensor, Error>| {
        let error = result.unwrap_err();
        let Error::Core(attention::core::Error::InvalidCall(error)) = error else { panic!("{error}") };
        error
    };
    let attention = Attention::new;
    let error = refused(attention().forward(query, cache, (&other, CACHE)));
    assert!(matches!(error, InvalidCall::DType { role: Role::Value, .. }), "{error}");
    let error = refused(attention().key_scales((&nan, [2])).forward(query, cache, cache));
    assert_eq!(error.to_string(), "key scales have NaN at [1], expected finite numbers");
    let error = refused(attention().value_scales((&nan, [2])).forward(query, (&wide, CACHE), (&wide, CACHE)));
    assert_eq!(error.to_string(), "value scales are for a value of 8 bits, and the value has dtype f32");
    let error = attention().backward_problem(query, cache, cache).unwrap_err();
    assert!(error.to_string().contains("keys and values of f8e4m3 have no backward pass"), "{error}");
    let error = attention().key_scales((&nan, [3])).problem(query, cache, cache).unwrap_err();
    assert!(matches!(error, Error::Input { role: Role::KeyScales, .. }), "{error}");
}

/// An implementation that declares everything there was before them is not given any.
#[test]
fn who_does_not_list_them_is_not_asked() {
    let toy = Toy::new("toy");
    let features = toy.capabilities.forward.features;
    assert_eq!(features.without(Feature::BatchInvariant), FeatureSet::all());
    let registry = registry([toy.arc()]);
    let (query, key) = (vec![0.5f32; 192], vec![F8E4M3::default(); 160]);
    let cache = (&key, CACHE);
    let error = Attention::new().registry(&registry).forward((&query, QUERY), cache, cache).unwrap_err();
    assert!(error.to_string().contains("toy does not support 8-bit keys and values"), "{error}");
}

#[test]
fn tensors_own_them() {
    let bytes: Vec<F8E5M2> = narrowed(&[0.5, -1.5, 3.0]);
    let tensor = Tensor::from_vec(bytes.clone(), [3]).unwrap();
    assert_eq!((tensor.dtype(), tensor.as_slice::<F8E4M3>()), (DType::F8E5M2, None));
    assert_eq!(tensor.into_vec::<F8E5M2>().unwrap(), bytes);
    let zeros = Tensor::zeros::<F8E4M3>([2, 3]).unwrap();
    assert!(zeros.as_slice::<F8E4M3>().unwrap().iter().all(|x| x.to_bits() == 0));
}

/// Bytes are stored as they are given, and a call reads them from the pages.
#[cfg(feature = "cpu")]
#[test]
fn a_cache_holds_them() {
    let (query, bytes) = (numbers(2 * 3 * 4 * 8, 1), narrowed::<F8E4M3>(&numbers(2 * 5 * 2 * 8, 2)));
    let shape = PoolShape { pages: 4, page_size: 3, longest: 6 };
    let mut cache = PagedKvCache::new(TokenShape::new(DType::F8E4M3, 2, 8), shape).unwrap();
    let sequences = [cache.add(), cache.add()];
    cache.append_each(&sequences, (&bytes, CACHE), (&bytes, CACHE)).unwrap();
    let wide = numbers(2 * 5 * 2 * 8, 2);
    let refused = cache.append_each(&sequences, (&wide, CACHE), (&wide, CACHE)).unwrap_err();
    assert_eq!(refused.to_string(), "new tokens: key has dtype f32, expected f8e4m3 as the cache has");
    let scales = [0.5f32, 1.25];
    let attention = Attention::new().implementation("cpu").key_scales((&scales, [2]));
    let want = attention.forward((&query, QUERY), (&bytes, CACHE), (&bytes, CACHE)).unwrap();
    let mut batch = cache.batch(sequences).unwrap();
    let step = cache.inputs(&mut batch).unwrap();
    let paged = attention.clone().paged(step.table, step.lengths);
    assert_eq!(paged.forward((&query, QUERY), step.keys, step.values).unwrap(), want);
}
