//! What the facade takes: slices, tensors and views, with and without a batch axis, of any strides and any
//! size.

use attention::{Attention, Forward, QueryOffset, Registry, Tensor, View, ViewMut, bf16};

use crate::support::{Toy, numbers, registry};

fn toy() -> Registry {
    registry([Toy::new("toy").arc()])
}

#[test]
fn two_keys_by_hand() {
    // Logits 0 and ln 3 (scale 1, a query of 1): probabilities 1/4 and 3/4.
    let registry = toy();
    let call = Attention::new().registry(&registry);
    let (q, k, v) = ([1.0f64], [0.0, 3f64.ln()], [4.0, 8.0]);
    let Forward { out, lse, .. } =
        call.forward_with_lse((&q, [1, 1, 1, 1]), (&k, [1, 2, 1, 1]), (&v, [1, 2, 1, 1])).unwrap();
    assert!((out.as_slice::<f64>().unwrap()[0] - 7.0).abs() < 1e-15);
    assert!((lse.as_slice::<f64>().unwrap()[0] - 4f64.ln()).abs() < 1e-15);
}

#[test]
#[allow(clippy::needless_borrows_for_generic_args, reason = "references are among the ways")]
fn every_way_to_give_a_tensor_is_the_same_tensor() {
    let registry = toy();
    let call = Attention::new().registry(&registry);
    let data = numbers(24, 1);
    let tensor = Tensor::from_vec(data.clone(), [1, 3, 2, 4]).unwrap();
    let view = tensor.view();
    let pair = (&data, [1, 3, 2, 4]);
    let array: [f32; 24] = data.clone().try_into().unwrap();
    let want = call.forward(&tensor, &tensor, &tensor).unwrap();
    assert_eq!(call.forward(view, &view, view).unwrap(), want);
    assert_eq!(call.forward(pair, &pair, (&data[..], [1, 3, 2, 4])).unwrap(), want);
    assert_eq!(
        call.forward((&array, [1, 3, 2, 4]), &(&array, [1, 3, 2, 4]), &(&data[..], view.shape())).unwrap(),
        want
    );
}

#[test]
fn strides_are_honoured() {
    let registry = toy();
    let call = Attention::new().registry(&registry).causal(true);
    // One buffer of fused queries, keys and values: [B, T, 3, N, H], a head dimension of 4.
    let fused = numbers(2 * 5 * 3 * 2 * 4, 2);
    let part = |index: usize| View::strided(&fused, index * 8, [2, 5, 2, 4], [120, 24, 4, 1]).unwrap();
    let dense = |view: View<'_>| {
        let host = view.host::<f32>().unwrap();
        let mut data = Vec::new();
        for b in 0..2 {
            for t in 0..5 {
                for n in 0..2 {
                    data.extend((0..4).map(|h| host.at(&[b, t, n, h])));
                }
            }
        }
        Tensor::from_vec(data, [2, 5, 2, 4]).unwrap()
    };
    let [q, k, v] = [0, 1, 2].map(part);
    let want = call.forward(&dense(q), &dense(k), &dense(v)).unwrap();
    assert_eq!(call.forward(q, k, v).unwrap(), want);

    // Into BNTH storage.
    let mut stored = vec![f32::NAN; 2 * 2 * 5 * 4];
    let out = ViewMut::from_slice(&mut stored, [2, 2, 5, 4]).unwrap().permute([0, 2, 1, 3]).unwrap();
    call.forward_into(q, k, v, out, None).unwrap();
    let transposed = View::from_slice(&stored, [2, 2, 5, 4]).unwrap().permute([0, 2, 1, 3]).unwrap();
    assert_eq!(dense(transposed), want);
}

#[test]
fn without_a_batch_axis() {
    let registry = toy();
    let (q, k, v) = (numbers(3 * 4 * 8, 1), numbers(5 * 2 * 8, 2), numbers(5 * 2 * 6, 3));
    let bias = numbers(4 * 3 * 5, 4);
    let mask = [true, false, true, true, true];
    let call = Attention::new()
        .registry(&registry)
        .bias((&bias, [4, 3, 5]))
        .mask((&mask, [5]))
        .query_lengths([2])
        .key_value_lengths([4])
        .query_offset(QueryOffset::BottomRight);
    let with_batch =
        call.forward_with_lse((&q, [1, 3, 4, 8]), (&k, [1, 5, 2, 8]), (&v, [1, 5, 2, 6])).unwrap();
    let without = call.forward_with_lse((&q, [3, 4, 8]), (&k, [5, 2, 8]), (&v, [5, 2, 6])).unwrap();
    assert_eq!(without.out.shape(), [3, 4, 6].into());
    assert_eq!(without.lse.shape(), [3, 4].into());
    assert_eq!(without.out.as_slice::<f32>(), with_batch.out.as_slice::<f32>());
    assert_eq!(without.lse.as_slice::<f32>(), with_batch.lse.as_slice::<f32>());

    let (mut out, mut lse) = (vec![f32::NAN; 72], Tensor::zeros::<f32>([3, 4]).unwrap());
    let (query, key, value) = ((&q, [3, 4, 8]), (&k, [5, 2, 8]), (&v, [5, 2, 6]));
    let outputs = (ViewMut::from_slice(&mut out, [3, 4, 6]).unwrap(), lse.view_mut());
    call.forward_into(query, key, value, outputs.0, Some(outputs.1)).unwrap();
    assert_eq!(Some(&out[..]), without.out.as_slice::<f32>());
    assert_eq!(lse, without.lse);
}

#[test]
fn into_memory_of_every_kind() {
    let registry = toy();
    let call = Attention::new().registry(&registry);
    let x = numbers(24, 5);
    let x = (&x, [1, 3, 2, 4]);
    let want = call.forward_with_lse(x, x, x).unwrap();
    let mut out = Tensor::zeros::<f32>([1, 3, 2, 4]).unwrap();
    let mut lse = Tensor::zeros::<f32>([1, 3, 2]).unwrap();
    call.forward_into(x, x, x, &mut out, Some(lse.view_mut())).unwrap();
    assert_eq!((&out, &lse), (&want.out, &want.lse));
    let mut array = [f32::NAN; 24];
    call.forward_into(x, x, x, (&mut array, [1, 3, 2, 4]), None).unwrap();
    assert_eq!(Some(&array[..]), want.out.as_slice::<f32>());
    array.fill(f32::NAN);
    call.forward_into(x, x, x, (&mut array[..], [1, 3, 2, 4]), None).unwrap();
    let mut view = ViewMut::from_slice(&mut array, [1, 3, 2, 4]).unwrap();
    call.forward_into(x, x, x, &mut view, None).unwrap();
    assert_eq!(Some(&array[..]), want.out.as_slice::<f32>());
}

#[test]
fn sizes_of_zero() {
    let registry = toy();
    let call = Attention::new().registry(&registry);
    let none: Vec<f32> = vec![];
    let x = vec![1.0f32; 24];
    // No keys: every row is empty.
    let forward =
        call.forward_with_lse((&x, [1, 3, 2, 4]), (&none, [1, 0, 2, 4]), (&none, [1, 0, 2, 5])).unwrap();
    assert_eq!(forward.out, Tensor::zeros::<f32>([1, 3, 2, 5]).unwrap());
    assert_eq!(forward.lse.as_slice::<f32>(), Some(&[f32::NEG_INFINITY; 6][..]));
    // No queries, no batch rows, no heads: empty outputs.
    for (query, key) in
        [([1, 0, 2, 4], [1, 3, 2, 4]), ([0, 3, 2, 4], [0, 3, 2, 4]), ([1, 3, 0, 4], [1, 3, 0, 4])]
    {
        let key_data = &x[..key.iter().product()];
        let forward = call.forward_with_lse((&none, query), (key_data, key), (key_data, key)).unwrap();
        assert_eq!(forward.out.shape(), query.into());
        assert!(forward.out.is_empty() && forward.lse.is_empty());
        let gradients = call
            .backward_recompute((&none, query), (key_data, key), (key_data, key), (&none, query))
            .unwrap();
        let (dq, dk, _) = gradients.into_qkv().unwrap();
        assert!(dq.is_empty());
        assert!(dk.as_slice::<f32>().unwrap().iter().all(|&x| x == 0.0));
    }
    let call = Attention::new().registry(&registry);
    let no_batch = call.forward((&none, [0, 2, 4]), (&x, [3, 2, 4]), (&x, [3, 2, 4])).unwrap();
    assert_eq!(no_batch.shape(), [0, 2, 4].into());
}

#[test]
fn halves_go_through() {
    use attention::{DType, NumericsClass};
    let registry = registry([Toy::new("toy").numerics(&[(DType::Bf16, NumericsClass::HalfF32)]).arc()]);
    let x: Vec<bf16> = numbers(24, 7).into_iter().map(bf16::from_f32).collect();
    let x = (&x, [1, 3, 2, 4]);
    let forward = Attention::new().registry(&registry).forward_with_lse(x, x, x).unwrap();
    assert_eq!((forward.out.dtype(), forward.lse.dtype()), (DType::Bf16, DType::F32));
    assert!(forward.out.as_slice::<bf16>().unwrap().iter().all(|x| x.is_finite()));
}

/// Whatever the default registry holds agrees with the naive backend.
#[test]
#[cfg(feature = "cpu")]
fn the_default_registry_agrees_with_the_naive_backend() {
    let registry = toy();
    let (q, k, v) = (numbers(2 * 7 * 4 * 16, 1), numbers(2 * 9 * 2 * 16, 2), numbers(2 * 9 * 2 * 8, 3));
    let (q, k, v) = ((&q, [2, 7, 4, 16]), (&k, [2, 9, 2, 16]), (&v, [2, 9, 2, 8]));
    let want = Attention::new().registry(&registry).forward(q, k, v).unwrap();
    let got = attention::dot_product_attention(q, k, v).unwrap();
    crate::support::assert_close(got.as_slice().unwrap(), want.as_slice().unwrap());
    let (bias, slopes, sinks) = (numbers(4 * 7 * 9, 5), numbers(4, 6), numbers(4, 7));
    let call = Attention::new()
        .causal(true)
        .key_value_lengths([9, 4])
        .query_lengths([5, 7])
        .query_offset(QueryOffset::BottomRight)
        .bias((&bias, [4, 7, 9]))
        .alibi_slopes((&slopes, [4]))
        .sinks((&sinks, [4]))
        .softcap(3.0)
        .dropout(attention::Dropout::new(0.3, 11));
    let d_out = numbers(2 * 7 * 4 * 8, 4);
    let d_out = (&d_out, [2, 7, 4, 8]);
    let got = call.backward_recompute(q, k, v, d_out).unwrap();
    let want = call.registry(&registry).backward_recompute(q, k, v, d_out).unwrap();
    for (got, want) in [
        (got.dq, want.dq),
        (got.dk, want.dk),
        (got.dv, want.dv),
        (got.dbias, want.dbias),
        (got.dsinks, want.dsinks),
    ] {
        crate::support::assert_close(got.unwrap().as_slice().unwrap(), want.unwrap().as_slice().unwrap());
    }
}
