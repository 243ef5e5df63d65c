//! Every refusal of a call, with its text.

use attention::{
    Attention, Device, Error, Gradients, InvalidCall, Registry, Role, Tensor, Unsupported, View, ViewMut,
};

use crate::support::{Planning, Toy, numbers, registry};

/// The error of a forward call with these shapes of f32 tensors.
#[track_caller]
fn refused<Q, K, V>(call: Attention<'_>, query: Q, key: K, value: V) -> String
where
    Q: Into<attention::Dims>,
    K: Into<attention::Dims>,
    V: Into<attention::Dims>,
{
    let toy = Toy::new("toy").arc();
    let registry = registry([toy.clone()]);
    let tensor = |shape: attention::Dims| Tensor::zeros::<f32>(shape).unwrap();
    let (query, key, value) = (tensor(query.into()), tensor(key.into()), tensor(value.into()));
    let error = call.registry(&registry).forward_with_lse(&query, &key, &value).unwrap_err();
    assert_eq!(toy.runs(), 0);
    error.to_string()
}

const X: [usize; 4] = [2, 3, 4, 8];

#[test]
fn ranks() {
    assert_eq!(
        refused(Attention::new(), [3, 8], X, X),
        "invalid call: query has rank 2 (shape [3, 8]), expected rank 4 ([B, T, N, H]) or 3 ([T, N, H])"
    );
    assert_eq!(
        refused(Attention::new(), X, X, [8]),
        "invalid call: value has rank 1 (shape [8]), expected rank 4 ([B, T, N, H]) or 3 ([T, N, H])"
    );
    assert_eq!(
        refused(Attention::new(), X, [3, 4, 8], X),
        "invalid call: query [2, 3, 4, 8], key [3, 4, 8] and value [2, 3, 4, 8] have different ranks; all must have \
         4 ([B, T, N, H]) or all 3 ([T, N, H])"
    );
}

#[test]
fn shapes_and_numbers_come_from_the_core() {
    assert_eq!(
        refused(Attention::new(), [2, 3, 5, 8], [2, 2, 4, 8], [2, 2, 4, 8]),
        "invalid call: 5 query heads are not a multiple of 4 key/value heads"
    );
    assert_eq!(
        refused(Attention::new().scale(f64::NAN), X, X, X),
        "invalid call: scale is NaN, which is not finite in f32"
    );
    assert_eq!(
        refused(Attention::new().query_lengths([3, -1]), X, X, X),
        "invalid call: query length -1 of batch row 1 is not between 0 and the tensor's length 3"
    );
    assert_eq!(
        refused(Attention::new().softcap(0.0), X, X, X),
        "invalid call: softcap is 0, expected a number above 0 (leave it out for no softcap)"
    );
    assert_eq!(
        refused(Attention::new().key_value_lengths([3, 4]), X, X, X),
        "invalid call: key/value length 4 of batch row 1 is not between 0 and the tensor's length 3"
    );
    let mask = [true; 2];
    assert_eq!(
        refused(Attention::new().mask((&mask, [2])), X, X, X),
        "invalid call: mask of shape [2] does not broadcast to [2, 4, 3, 3] ([B, N, T, S]): axis 0 must be 1 or 3, is 2"
    );
    // Without a batch axis the batch is one row.
    assert_eq!(
        refused(Attention::new().query_lengths([3, 3]), [3, 4, 8], [3, 4, 8], [3, 4, 8]),
        "invalid call: query lengths has shape [2], expected [1] ([B])"
    );
}

/// A call with wrong numbers is refused before anything is planned or written, whichever way it is made.
#[test]
fn wrong_numbers_plan_nothing() {
    let toy = Toy::new("toy").arc();
    let registry = registry([toy.clone()]);
    let data = numbers(192, 1);
    let x = (&data, X);
    let (floats, negative, short) = ([1f32, 2.0], [1i64, -1], [1u32]);
    let call = Attention::new().registry(&registry);
    for (call, message) in [
        (call.clone().scale(f64::NAN), "scale is NaN, which is not finite in f32"),
        (call.clone().scale(1e39), "scale is 1e39, which is not finite in f32"),
        (call.clone().softcap(f64::INFINITY), "softcap is inf, which is not finite in f32"),
        (call.clone().key_value_lengths([9, 0]), "key/value length 9 of batch row 0 is not between"),
        (call.clone().query_lengths((&negative, [2])), "query length -1 of batch row 1 is not between"),
        (call.clone().query_lengths((&short, [1])), "query lengths has shape [1], expected [2] ([B])"),
        (call.clone().query_offsets([1]), "query offsets has shape [1], expected [2] ([B])"),
        (
            call.clone().key_value_lengths((&floats, [2])),
            "key/value lengths has dtype f32, expected i32, u32 or i64",
        ),
        (call.clone().key_value_lengths((&short, [2])), "key/value lengths: shape [2] has 2 elements"),
        (call.clone().dropout(attention::Dropout::new(1.0, 1)), "dropout rate is 1, expected 0 <= rate"),
        (call.clone().dropout_seed((&short, [1])), "the call was given dropout seed, the problem has none"),
    ] {
        let begins = |error: Error| {
            let text = error.to_string();
            assert!(text.starts_with(&format!("invalid call: {message}")), "{text}");
            assert!(error.invalid_call().is_some());
        };
        let (mut out, shape) = (vec![7.0f32; 192], X);
        begins(call.forward(x, x, x).unwrap_err());
        begins(call.forward_with_lse(x, x, x).unwrap_err());
        begins(call.forward_into(x, x, x, (&mut out, shape), None).unwrap_err());
        begins(call.backward_recompute(x, x, x, x).unwrap_err());
        begins(call.problem(x, x, x).unwrap_err());
        begins(call.backward_problem(x, x, x).unwrap_err());
        begins(call.explain(x, x, x).unwrap_err());
        assert!(out.iter().all(|&out| out == 7.0));
    }
    assert_eq!((toy.plans(), toy.runs()), (0, 0));
}

#[test]
fn slices_that_do_not_fit_are_named() {
    let data = vec![0.0f32; 24];
    let x = (&data, [1, 3, 2, 4]);
    let registry = registry([Toy::new("toy").arc()]);
    let call = Attention::new().registry(&registry);
    let error = call.forward(x, (&data, [1, 3, 2, 5]), x).unwrap_err();
    assert_eq!(error.to_string(), "invalid call: key: shape [1, 3, 2, 5] has 30 elements, the slice has 24");
    let error = call.clone().bias((&data, [5])).sinks((&data, [1])).forward(x, x, x).unwrap_err();
    assert_eq!(error.to_string(), "invalid call: bias: shape [5] has 5 elements, the slice has 24");
    let mut out = vec![7.0f32; 23];
    let error = call.forward_into(x, x, x, (&mut out, [1, 3, 2, 4]), None).unwrap_err();
    assert_eq!(error.to_string(), "invalid call: out: shape [1, 3, 2, 4] has 24 elements, the slice has 23");
    assert!(matches!(error, Error::Input { role: Role::Out, source: InvalidCall::BufferLength { .. } }));
    assert_eq!(out, [7.0; 23]);
}

#[test]
fn outputs_that_do_not_fit_are_refused_before_anything_is_written() {
    let data = numbers(24, 1);
    let x = (&data, [1, 3, 2, 4]);
    let flat = (&data, [3, 2, 4]);
    let registry = registry([Toy::new("toy").arc()]);
    let call = Attention::new().registry(&registry);
    let mut out = vec![7.0f32; 24];
    let mut lse = vec![7.0f32; 6];
    let error = call.forward_into(x, x, x, (&mut out, [1, 2, 3, 4]), None).unwrap_err();
    assert_eq!(
        error.to_string(),
        "invalid call: out has shape [1, 2, 3, 4], expected [1, 3, 2, 4] ([B, T, N, Hv])"
    );
    let error = call.forward_into(x, x, x, (&mut out, [3, 2, 4]), None).unwrap_err();
    assert_eq!(error.to_string(), "invalid call: out has rank 3 (shape [3, 2, 4]), expected rank 4");
    let error = call.forward_into(flat, flat, flat, (&mut out, [1, 3, 2, 4]), None).unwrap_err();
    assert_eq!(
        error.to_string(),
        "invalid call: out has rank 4 (shape [1, 3, 2, 4]), expected rank 3, as the query has no batch axis"
    );
    let error = call
        .forward_into(
            flat,
            flat,
            flat,
            (&mut out, [3, 2, 4]),
            Some(ViewMut::from_slice(&mut lse, [1, 3, 2]).unwrap()),
        )
        .unwrap_err();
    assert_eq!(
        error.to_string(),
        "invalid call: lse has rank 3 (shape [1, 3, 2]), expected rank 2, as the query has no batch axis"
    );
    let mut wide = vec![7.0f64; 24];
    let error = call.forward_into(x, x, x, (&mut wide, [1, 3, 2, 4]), None).unwrap_err();
    assert_eq!(error.to_string(), "invalid call: out has dtype f64, expected f32");
    assert!(out.iter().chain(&lse).all(|&x| x == 7.0));
}

#[test]
fn backward_calls() {
    let data = numbers(24, 1);
    let (x, flat) = ((&data, [1, 3, 2, 4]), (&data, [3, 2, 4]));
    let registry = registry([Toy::new("toy").arc()]);
    let call = Attention::new().registry(&registry);
    let forward = call.forward_with_lse(x, x, x).unwrap();
    let error = call.backward(x, x, x, &forward, (&data, [1, 3, 4, 2])).unwrap_err();
    assert_eq!(
        error.to_string(),
        "invalid call: d_out has shape [1, 3, 4, 2], expected [1, 3, 2, 4] ([B, T, N, Hv])"
    );
    let error = call.backward_recompute(flat, flat, flat, x).unwrap_err();
    assert_eq!(
        error.to_string(),
        "invalid call: d_out has rank 4 (shape [1, 3, 2, 4]), expected rank 3, as the query has no batch axis"
    );
    let error = call.backward(flat, flat, flat, &forward, flat).unwrap_err();
    assert_eq!(
        error.to_string(),
        "invalid call: out has rank 4 (shape [1, 3, 2, 4]), expected rank 3, as the query has no batch axis"
    );
    let error = call.clone().gradients(Gradients::BIAS).backward(x, x, x, &forward, x).unwrap_err();
    assert_eq!(error.to_string(), "invalid call: dbias was asked for, the problem has no bias");
    let error = call.clone().gradients(Gradients::NONE).backward(x, x, x, &forward, x).unwrap_err();
    assert_eq!(error.to_string(), "invalid call: no gradient was asked for");
    let d_lse = [0.0f32; 5];
    let error = call.clone().d_lse((&d_lse, [1, 5, 1])).backward(x, x, x, &forward, x).unwrap_err();
    assert_eq!(error.to_string(), "invalid call: d_lse has shape [1, 5, 1], expected [1, 3, 2] ([B, T, N])");
}

/// A view that claims to be in the memory of a CUDA device. Nothing here looks at its elements.
fn on_cuda(view: View<'_>, ordinal: u32) -> View<'_> {
    // SAFETY: the pointer, lifetime and description are those of a live view, and no backend of these tests
    // takes memory of a device, so nobody follows the pointer.
    unsafe { View::from_raw_parts(view.as_ptr(), Device::Cuda(ordinal), view.desc()) }.unwrap()
}

#[test]
fn devices() {
    let data = Tensor::zeros::<f32>(X).unwrap();
    let host = data.view();
    let device = on_cuda(host, 1);
    let registry = registry([Toy::new("toy").arc()]);
    let call = Attention::new().registry(&registry);
    let error = call.forward(host, device, host).unwrap_err();
    assert_eq!(error.to_string(), "invalid call: key is on cuda:1, the call is on cpu");
    let error = call.forward(device, device, on_cuda(host, 0)).unwrap_err();
    assert_eq!(error.to_string(), "invalid call: value is on cuda:0, the call is on cuda:1");
    let mask = Tensor::zeros::<bool>([1]).unwrap();
    let error = call.clone().mask(&mask).forward(device, device, device).unwrap_err();
    assert_eq!(error.to_string(), "invalid call: mask is on cpu, the call is on cuda:1");
    for error in [
        call.forward(device, device, device).unwrap_err(),
        call.forward_with_lse(device, device, device).unwrap_err(),
    ] {
        assert_eq!(
            error.to_string(),
            "the call is on cuda:1, and outputs are allocated in host memory only: give it memory there with \
             `forward_into`"
        );
    }
    let error = call.backward_recompute(device, device, device, device).unwrap_err();
    assert_eq!(
        error.to_string(),
        "the call is on cuda:1, and outputs are allocated in host memory only: give it memory there with \
         `backward_into`"
    );
    let mut out = Tensor::zeros::<f32>(X).unwrap();
    let error = call.forward_into(device, device, device, &mut out, None).unwrap_err();
    assert_eq!(error.to_string(), "invalid call: out is on cpu, the call is on cuda:1");
}

#[test]
fn an_output_larger_than_any_memory_is_an_error() {
    // One query seen 2^56 times by stride 0: the problem is fine, its output is not.
    let x = [1.0f32; 4];
    let key = (&x, [1, 1, 1, 4]);
    let query = View::from_slice(&x, [1, 1, 1, 4]).unwrap().expand([1, 1 << 56, 1, 4]).unwrap();
    let registry = registry([Toy::new("toy").arc()]);
    let error = Attention::new().registry(&registry).forward(query, key, key).unwrap_err();
    assert_eq!(error.to_string(), "no memory for a tensor of 1152921504606846976 bytes");
}

/// `main` prints an error that it returns with `{:?}`.
#[test]
fn debug_is_the_text() {
    let data = vec![0.0f32; 24];
    let x = (&data, [1, 3, 2, 4]);
    let registry = registry([Toy::new("toy").scratch(100).arc()]);
    let call = Attention::new().registry(&registry);
    let errors = [
        call.forward(x, (&data, [1, 3, 2, 5]), x).unwrap_err(),
        call.clone().scale(f64::NAN).forward(x, x, x).unwrap_err(),
        call.clone().scratch_limit(1).forward(x, x, x).unwrap_err(),
        call.clone().scratch_limit(1).implementation("toy").forward(x, x, x).unwrap_err(),
        call.clone().implementation("abacus").forward(x, x, x).unwrap_err(),
    ];
    for error in errors {
        assert_eq!(format!("{error:?}"), error.to_string());
        if let Error::NoImplementation { refusals, .. } = &error {
            assert_eq!(format!("{:?}", refusals[0]), "toy needs 100 bytes of scratch, the limit is 1");
        }
    }
}

/// A culprit is one step away, however deep it lies.
#[test]
fn culprits_are_found_without_nested_patterns() {
    let data = vec![0.0f32; 24];
    let x = (&data, [1, 3, 2, 4]);
    let registry = registry([
        Toy::new("toy").scratch(100).arc(),
        Toy::new("absent").missing("libtoy is missing", &["libtoy.so"]).arc(),
        Toy::new("broken").planning(Planning::Fails).arc(),
    ]);
    let call = |name: &'static str| Attention::new().registry(&registry).implementation(name);
    let limited = call("toy").scratch_limit(1).forward(x, x, x).unwrap_err();
    assert!(matches!(limited.unsupported(), Some(Unsupported::ScratchLimit { needed: 100, limit: 1, .. })));
    assert!(limited.invalid_call().is_none() && limited.unavailable().is_none());
    let absent = call("absent").forward(x, x, x).unwrap_err();
    assert_eq!(absent.unavailable().unwrap().what, "libtoy is missing");
    let broken = call("broken").forward(x, x, x).unwrap_err();
    assert_eq!(broken.backend_failure().unwrap().operation, "building a plan");
    let invalid = call("toy").scale(f64::NAN).forward(x, x, x).unwrap_err();
    assert!(matches!(invalid.invalid_call(), Some(InvalidCall::NotFinite { what: "scale", .. })));
    // Also of something that is no tensor.
    let no_tensor = call("toy").forward(x, (&data, [5]), x).unwrap_err();
    assert!(matches!(no_tensor.invalid_call(), Some(InvalidCall::BufferLength { .. })));
    assert!(no_tensor.unsupported().is_none() && no_tensor.backend_failure().is_none());
}

#[test]
fn a_build_without_implementations_says_so() {
    let x = Tensor::zeros::<f32>(X).unwrap();
    let call = Attention::new().registry(&Registry::empty());
    assert_eq!(
        call.forward(&x, &x, &x).unwrap_err().to_string(),
        "no implementation serves: forward f32 B2 T3 S3 N4 K4 H8 on cpu (none is registered)"
    );
    let error = call.implementation("abacus").forward(&x, &x, &x).unwrap_err();
    assert_eq!(error.to_string(), "no implementation is named 'abacus'; none is registered");
}

/// Lists as long as a batch may be: what differs is named, and not all of both.
#[cfg(any(feature = "cpu", feature = "chunked"))]
#[test]
fn a_backward_with_other_lengths_is_told_of_the_first_that_differs() {
    let (batch, shape) = (100, [100, 2, 1, 4]);
    let x = vec![0.5f32; batch * 2 * 4];
    let x = (&x, shape);
    let lengths = |at_70: usize| (0..batch).map(move |row| if row == 70 { at_70 } else { 2 });
    let with = |at_70: usize| Attention::new().key_value_lengths(lengths(at_70).collect::<Vec<_>>());
    let forward = with(1).forward_with_lse(x, x, x).unwrap();
    let refused = with(2).backward(x, x, x, &forward, x).unwrap_err().to_string();
    assert!(refused.contains("1 in batch row 70") && refused.contains("2 in batch row 70"), "{refused}");
    assert!(refused.len() < 200, "{refused}");
}

/// An offset that is no i64 is one far away, on the side where it was.
#[cfg(any(feature = "cpu", feature = "chunked"))]
#[test]
fn offsets_beyond_an_i64_keep_their_sign() {
    let (query, keys): (Vec<f32>, Vec<f32>) = (vec![0.0; 4], (0..8).map(|i| i as f32).collect());
    let run = |offset: i128| {
        let attention = Attention::new().causal(true).query_offsets([offset]);
        let keys = (&keys, [1, 8, 1, 1]);
        attention.forward((&query[..1], [1, 1, 1, 1]), keys, keys).unwrap().as_slice::<f32>().unwrap()[0]
    };
    // A row before all keys, and one behind them.
    assert_eq!((run(-(1 << 64)), run(1 << 64)), (0.0, 3.5));
}

/// The number of batch rows says nothing about time where there are no query rows.
#[cfg(any(feature = "cpu", feature = "chunked"))]
#[test]
fn an_empty_call_does_not_walk_over_its_batch_rows() {
    let (batch, none, length) = (1usize << 40, [0.0f32; 4], [0i64]);
    let view = |rows| View::strided(&none, 0, [batch, rows, 1, 4], [0, 0, 0, 1]).unwrap();
    let lengths = View::strided(&length, 0, [batch], [0]).unwrap();
    for attention in [
        Attention::new().key_value_lengths(lengths),
        Attention::new().query_lengths(lengths),
        Attention::new().query_offsets(lengths),
    ] {
        let forward = attention.forward_with_lse(view(0), view(4), view(4)).unwrap();
        assert_eq!(forward.out.shape(), [batch, 0, 1, 4].into());
    }
}
