//! Backward: owned and into, with and without a batch axis, from a kept forward and from none.

use attention::core::{BackwardInputs, BackwardOutputs};
use attention::{
    Attention, AxisOrder, Dropout, Error, Gradients, QueryOffset, Registry, Tensor, View, ViewMut, Window,
};

use crate::support::{Toy, numbers, registry};

struct Data {
    registry: Registry,
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    d_out: Vec<f32>,
    d_lse: Vec<f32>,
    bias: Vec<f32>,
    sinks: Vec<f32>,
}

/// T 3, S 5, N 4, K 2, H 8, Hv 6.
fn data() -> Data {
    Data {
        registry: registry([Toy::new("toy").arc()]),
        q: numbers(96, 1),
        k: numbers(80, 2),
        v: numbers(60, 3),
        d_out: numbers(72, 4),
        d_lse: numbers(12, 5),
        bias: numbers(60, 6),
        sinks: numbers(4, 7),
    }
}

type Pair<'a, const RANK: usize> = (&'a [f32], [usize; RANK]);

impl Data {
    fn call(&self) -> Attention<'_> {
        Attention::new()
            .registry(&self.registry)
            .softcap(5.0)
            .causal(true)
            .query_offset(attention::QueryOffset::Fixed(2))
    }

    fn qkv(&self) -> (Pair<'_, 4>, Pair<'_, 4>, Pair<'_, 4>, Pair<'_, 4>) {
        (
            (&self.q, [1, 3, 4, 8]),
            (&self.k, [1, 5, 2, 8]),
            (&self.v, [1, 5, 2, 6]),
            (&self.d_out, [1, 3, 4, 6]),
        )
    }

    fn qkv_without_batch(&self) -> (Pair<'_, 3>, Pair<'_, 3>, Pair<'_, 3>, Pair<'_, 3>) {
        ((&self.q, [3, 4, 8]), (&self.k, [5, 2, 8]), (&self.v, [5, 2, 6]), (&self.d_out, [3, 4, 6]))
    }
}

#[test]
fn gradients_are_those_of_central_differences() {
    let data = data();
    let wide = |x: &[f32]| x.iter().map(|&x| f64::from(x)).collect::<Vec<f64>>();
    let (q, k, v, d_out, d_lse) =
        (wide(&data.q), wide(&data.k), wide(&data.v), wide(&data.d_out), wide(&data.d_lse));
    let (bias, sinks) = (wide(&data.bias), wide(&data.sinks));
    let value = |[q, k, v, bias, sinks]: [&Vec<f64>; 5]| {
        let call = data.call().bias((bias, [4, 3, 5])).sinks((sinks, [4]));
        let forward = call.forward_with_lse((q, [3, 4, 8]), (k, [5, 2, 8]), (v, [5, 2, 6])).unwrap();
        let dot = |a: &Tensor, b: &[f64]| -> f64 {
            a.as_slice::<f64>().unwrap().iter().zip(b).map(|(a, b)| a * b).sum()
        };
        dot(&forward.out, &d_out) + dot(&forward.lse, &d_lse)
    };
    let call = data.call().bias((&bias, [4, 3, 5])).sinks((&sinks, [4])).d_lse((&d_lse, [3, 4]));
    let got = call
        .backward_recompute((&q, [3, 4, 8]), (&k, [5, 2, 8]), (&v, [5, 2, 6]), (&d_out, [3, 4, 6]))
        .unwrap();
    let inputs = [q, k, v, bias, sinks];
    for (which, gradient) in [got.dq, got.dk, got.dv, got.dbias, got.dsinks].into_iter().enumerate() {
        let gradient = gradient.unwrap();
        for (index, &got) in gradient.as_slice::<f64>().unwrap().iter().enumerate() {
            let moved = |step: f64| {
                let mut inputs = inputs.clone();
                inputs[which][index] += step;
                value(inputs.each_ref())
            };
            let want = (moved(1e-5) - moved(-1e-5)) / 2e-5;
            assert!((got - want).abs() < 1e-8, "gradient {which}, element {index}: got {got}, want {want}");
        }
    }
}

#[test]
fn kept_and_recomputed_forward_agree() {
    let data = data();
    let (q, k, v, d_out) = data.qkv();
    let call = data.call();
    let forward = call.forward_with_lse(q, k, v).unwrap();
    let kept = call.backward(q, k, v, &forward, d_out).unwrap();
    assert_eq!(call.backward_recompute(q, k, v, d_out).unwrap(), kept);
    let (dq, dk, dv) = kept.into_qkv().unwrap();
    assert_eq!((dq.shape(), dk.shape(), dv.shape()), (q.1.into(), k.1.into(), v.1.into()));
}

#[test]
fn without_a_batch_axis() {
    let data = data();
    let (q, k, v, d_out) = data.qkv();
    let call = data.call().bias((&data.bias, [4, 3, 5])).sinks((&data.sinks, [4]));
    let with = call.clone().d_lse((&data.d_lse, [1, 3, 4])).backward_recompute(q, k, v, d_out).unwrap();
    let (q, k, v, d_out) = data.qkv_without_batch();
    let call = call.d_lse((&data.d_lse, [3, 4]));
    let forward = call.forward_with_lse(q, k, v).unwrap();
    let without = call.backward(q, k, v, &forward, d_out).unwrap();
    assert_eq!(without, call.backward_recompute(q, k, v, d_out).unwrap());
    // Gradients come back in the shape of what they belong to.
    assert_eq!(without.dbias.as_ref().unwrap().shape(), [4, 3, 5].into());
    assert_eq!(without.dq.as_ref().unwrap().shape(), [3, 4, 8].into());
    for (a, b) in [
        (with.dq, without.dq),
        (with.dk, without.dk),
        (with.dv, without.dv),
        (with.dbias, without.dbias),
        (with.dsinks, without.dsinks),
    ] {
        assert_eq!(a.unwrap().as_slice::<f32>(), b.unwrap().as_slice::<f32>());
    }
}

#[test]
fn every_broadcast_of_the_bias_gets_its_gradient_in_its_shape() {
    let data = data();
    let (q, k, v, d_out) = data.qkv();
    let full = data.call().bias((&data.bias, [4, 3, 5])).backward_recompute(q, k, v, d_out).unwrap();
    let full = full.dbias.unwrap();
    assert_eq!(full.shape(), [4, 3, 5].into());
    let column = vec![0.0f32; 5];
    let small = data.call().bias((&column, [5])).backward_recompute(q, k, v, d_out).unwrap();
    assert_eq!(small.dbias.unwrap().shape(), [5].into());
    let row = vec![0.0f32; 3];
    let small = data.call().bias((&row, [1, 1, 3, 1])).backward_recompute(q, k, v, d_out).unwrap();
    assert_eq!(small.dbias.unwrap().shape(), [1, 1, 3, 1].into());
}

#[test]
fn into_memory_of_the_callers() {
    let data = data();
    let (q, k, v, d_out) = data.qkv_without_batch();
    let call = data.call().bias((&data.bias, [4, 3, 5]));
    let want = call.clone().d_lse((&data.d_lse, [3, 4])).backward_recompute(q, k, v, d_out).unwrap();
    let forward = call.forward_with_lse(q, k, v).unwrap();
    let mut dq = vec![f32::NAN; 96];
    let mut dbias = vec![f32::NAN; 60];
    // Stored with the heads first.
    let dq_view = ViewMut::from_slice(&mut dq, [4, 3, 8]).unwrap().permute([1, 0, 2]).unwrap();
    let d_lse = View::from_slice(&data.d_lse, [3, 4]).unwrap();
    let saved = |d_lse| BackwardInputs {
        out: forward.out.view(),
        lse: forward.lse.view(),
        d_out: View::from_slice(d_out.0, d_out.1).unwrap(),
        d_lse,
    };
    let outputs = BackwardOutputs {
        dq: Some(dq_view),
        dbias: Some(ViewMut::from_slice(&mut dbias, [1, 4, 3, 5]).unwrap()),
        ..Default::default()
    };
    call.backward_into(q, k, v, saved(Some(d_lse)), outputs).unwrap();
    let want_dq = want.dq.unwrap();
    let want_dq = want_dq.view().permute([1, 0, 2]).unwrap();
    let want_dq = want_dq.host::<f32>().unwrap();
    for (index, &got) in dq.iter().enumerate() {
        assert_eq!(got, want_dq.at(&[index / 24, index / 8 % 3, index % 8]));
    }
    assert_eq!(Some(&dbias[..]), want.dbias.as_ref().unwrap().as_slice::<f32>());

    // The builder's d_lse counts where the call has none.
    let mut again = Tensor::zeros::<f32>([4, 3, 5]).unwrap();
    let outputs = BackwardOutputs { dbias: Some(again.view_mut()), ..Default::default() };
    call.clone().d_lse(d_lse).backward_into(q, k, v, saved(None), outputs).unwrap();
    assert_eq!(again, want.dbias.unwrap());

    // What was asked for by name and what there is memory for must agree.
    let outputs = BackwardOutputs { dbias: Some(again.view_mut()), ..Default::default() };
    let error = call.gradients(Gradients::QUERY).backward_into(q, k, v, saved(None), outputs).unwrap_err();
    assert_eq!(error.to_string(), "invalid call: the problem has dq, the call was given none");
}

#[test]
fn incoming_gradients_of_any_strides() {
    let data = data();
    let (q, k, v, d_out) = data.qkv();
    let want = data.call().backward_recompute(q, k, v, d_out).unwrap();
    // The same numbers stored with the last axis first.
    let mut stored = vec![0.0f32; 72];
    for (index, &x) in d_out.0.iter().enumerate() {
        stored[index % 6 * 12 + index / 6] = x;
    }
    let view = View::strided(&stored, 0, [1, 3, 4, 6], [0, 4, 1, 12]).unwrap();
    assert_eq!(data.call().backward_recompute(q, k, v, view).unwrap(), want);
    // The gradient of a sum is one number, repeated.
    let one = View::from_slice(&[1.0f32], [1, 1, 1, 1]).unwrap().expand([1, 3, 4, 6]).unwrap();
    let ones = vec![1.0f32; 72];
    assert_eq!(
        data.call().backward_recompute(q, k, v, one).unwrap(),
        data.call().backward_recompute(q, k, v, (&ones, [1, 3, 4, 6])).unwrap()
    );
}

#[test]
fn a_backward_that_cannot_run_costs_no_forward() {
    let mut toy = Toy::new("toy");
    toy.capabilities.backward = None;
    let toy = toy.arc();
    let registry = registry([toy.clone()]);
    let data = data();
    let (q, k, v, d_out) = data.qkv();
    let call = Attention::new().registry(&registry).implementation("toy");
    let error = call.backward_recompute(q, k, v, d_out).unwrap_err();
    assert_eq!(error.to_string(), "toy has no backward pass");
    assert_eq!(toy.runs(), 0);
}

/// What was given as a list may come back as a tensor of another dtype, and the other way round.
#[test]
fn numbers_are_compared_by_value() {
    let data = data();
    let (q, k, v, d_out) = data.qkv();
    let (lengths, offset, seed, stream) = ([2i32], [2u32], [7i64], [3u32]);
    let lists = data
        .call()
        .query_offsets([2])
        .query_lengths([2])
        .key_value_lengths([4])
        .dropout(Dropout::new(0.25, 7).with_offset(3));
    let tensors = data
        .call()
        .query_offsets((&offset, [1]))
        .query_lengths((&lengths, [1]))
        .key_value_lengths(vec![4i64])
        .dropout(Dropout::new(0.25, 1))
        .dropout_seed((&seed, [1]))
        .dropout_offset((&stream, [1]));
    let (forward, same) =
        (lists.forward_with_lse(q, k, v).unwrap(), tensors.forward_with_lse(q, k, v).unwrap());
    assert_eq!((&forward.out, &forward.lse), (&same.out, &same.lse));
    let gradients = lists.backward(q, k, v, &forward, d_out).unwrap();
    assert_eq!(tensors.backward(q, k, v, &forward, d_out).unwrap(), gradients);
    assert_eq!(lists.backward(q, k, v, &same, d_out).unwrap(), gradients);
    // A default by its number.
    let scale = 1.0 / 8f64.sqrt();
    assert_eq!(lists.clone().scale(scale).backward(q, k, v, &forward, d_out).unwrap(), gradients);
    let refused = |call: Attention<'_>| call.backward(q, k, v, &forward, d_out).unwrap_err().to_string();
    let text = refused(tensors.clone().query_lengths((&[1i32], [1])));
    assert!(text.contains("backward has query lengths [1], its forward had [2]"), "{text}");
    let text = refused(tensors.clone().query_offsets((&[1i32], [1])));
    assert!(text.contains("backward has query offset [1], its forward had [2]"), "{text}");
    let text = refused(tensors.clone().key_value_lengths([3]));
    assert!(text.contains("backward has key/value lengths [3], its forward had [4]"), "{text}");
    let text = refused(tensors.dropout_offset((&[4i64], [1])));
    assert!(
        text.contains("seed 7 and offset 4, its forward had of rate 0.25, seed 7 and offset 3"),
        "{text}"
    );
}

/// Gradients of another call than the forward was are those of neither.
#[test]
fn backward_refuses_the_forward_of_another_call() {
    let data = data();
    let (q, k, v, d_out) = data.qkv();
    let (bias, mask, slopes) = ((&data.bias, [4, 3, 5]), ([true; 15], [3, 5]), [0.5f32; 4]);
    let call = data.call().dropout(Dropout::new(0.25, 7));
    let forward = call.forward_with_lse(q, k, v).unwrap();
    assert!(call.backward(q, k, v, &forward, d_out).is_ok());
    // No change of meaning.
    assert!(call.clone().deterministic(true).backward(q, k, v, &forward, d_out).is_ok());
    assert!(call.clone().gradients(Gradients::KEY).backward(q, k, v, &forward, d_out).is_ok());
    let others = [
        (
            call.clone().dropout(Dropout::new(0.5, 7)),
            "dropout of rate 0.5, seed 7 and offset 0, its forward had of rate 0.25, seed 7 and offset 0",
        ),
        (call.clone().dropout(None), "dropout none, its forward had of rate 0.25, seed 7 and offset 0"),
        (
            call.clone().dropout(Dropout::new(0.25, 7).with_offset(1)),
            "dropout of rate 0.25, seed 7 and offset 1",
        ),
        (call.clone().scale(2.0), "scale 2, its forward had 0.35355"),
        (call.clone().causal(false), "causal false, its forward had true"),
        (call.clone().query_offset(QueryOffset::BottomRight), "query offset bottom-right, its forward had 2"),
        (call.clone().window(Window::new(1, 1)), "window (1, 1), its forward had (unbounded, unbounded)"),
        (call.clone().softcap(None), "softcap none, its forward had 5"),
        (call.clone().query_offset(3), "query offset 3, its forward had 2"),
        (call.clone().query_offsets([2]), "query offset [2], its forward had 2"),
        (call.clone().softcap(6.0), "softcap 6, its forward had 5"),
        (call.clone().dropout_seed((&[8i32], [1])), "dropout of rate 0.25, seed 8 and offset 0"),
        (call.clone().dropout(Dropout::new(0.25, 8)), "dropout of rate 0.25, seed 8 and offset 0"),
        (call.clone().query_lengths([2]), "query lengths [2], its forward had full"),
        (call.clone().key_value_lengths([4]), "key/value lengths [4], its forward had full"),
        (call.clone().bias(bias), "bias of f32 [1, 4, 3, 5], its forward had none"),
        (call.clone().mask((&mask.0, mask.1)), "mask of bool [1, 1, 3, 5], its forward had none"),
        (call.clone().alibi_slopes((&slopes, [4])), "ALiBi slopes of f32 [4], its forward had none"),
        (call.clone().sinks((&data.sinks, [4])), "sinks of f32 [4], its forward had none"),
    ];
    for (other, said) in others {
        let error = other.backward(q, k, v, &forward, d_out).unwrap_err();
        let text = error.to_string();
        assert!(text.starts_with(&format!("invalid call: backward has {said}")), "{text}");
        assert!(text.ends_with(": give backward what forward had"), "{text}");
        assert!(matches!(error, Error::OtherForward { .. }));
    }
    // One key less: outputs have the same shapes, and are those of other keys.
    let (k, v) = ((&k.0[..64], [1, 4, 2, 8]), (&v.0[..48], [1, 4, 2, 6]));
    let text = call.backward(q, k, v, &forward, d_out).unwrap_err().to_string();
    assert!(text.contains("backward has sizes B1 T3 S4") && text.contains("had B1 T3 S5"), "{text}");
    // The other order of axes, where shapes cannot tell.
    let square = (&data.q[..72], [3, 3, 8]);
    let call = data.call();
    let forward = call.forward_with_lse(square, square, square).unwrap();
    let other = call.axis_order(AxisOrder::Bnth);
    let text = other.backward(square, square, square, &forward, square).unwrap_err().to_string();
    assert!(text.contains("order of axes [B, N, T, H], its forward had [B, T, N, H]"), "{text}");
}
