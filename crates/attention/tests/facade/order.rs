//! Heads before the sequence: inputs, outputs, gradients, and what is said of shapes.

use attention::core::{BackwardInputs, BackwardOutputs};
use attention::{Attention, AxisOrder, Dims, Error, InvalidCall, Registry, Role, Tensor, View, ViewMut};

use crate::support::{Toy, numbers, registry};

fn toy() -> Registry {
    registry([Toy::new("toy").arc()])
}

/// A tensor with two axes swapped, in memory too.
fn swapped(tensor: &Tensor, order: &[usize]) -> Tensor {
    let view = tensor.view().permute(order).unwrap();
    let (shape, host) = (view.shape(), view.host::<f32>().unwrap());
    let count: usize = shape.iter().product();
    let element = |index: usize| {
        let mut rest = index;
        let mut at = vec![0; shape.rank()];
        for axis in (0..shape.rank()).rev() {
            (at[axis], rest) = (rest % shape[axis], rest / shape[axis]);
        }
        host.at(&at)
    };
    Tensor::from_vec((0..count).map(element).collect(), shape).unwrap()
}

fn tensor(shape: impl Into<Dims>, seed: u64) -> Tensor {
    let shape = shape.into();
    Tensor::from_vec(numbers(shape.iter().product(), seed), shape).unwrap()
}

/// With and without a batch axis: query, key, value, d_out, d_lse, how operands and how rows are swapped.
fn cases() -> Vec<([Tensor; 5], &'static [usize], &'static [usize])> {
    let batched = [
        tensor([2, 3, 4, 8], 1),
        tensor([2, 5, 2, 8], 2),
        tensor([2, 5, 2, 6], 3),
        tensor([2, 3, 4, 6], 4),
        tensor([2, 3, 4], 5),
    ];
    let flat = [
        tensor([3, 4, 8], 1),
        tensor([5, 2, 8], 2),
        tensor([5, 2, 6], 3),
        tensor([3, 4, 6], 4),
        tensor([3, 4], 5),
    ];
    vec![(batched, &[0, 2, 1, 3], &[0, 2, 1]), (flat, &[1, 0, 2], &[1, 0])]
}

#[test]
fn outputs_and_gradients_have_the_order_of_the_inputs() {
    let registry = toy();
    let bias = tensor([4, 3, 5], 6);
    for ([q, k, v, d_out, d_lse], operand, rows) in cases() {
        let call = Attention::btnh().registry(&registry).causal(true).bias(&bias).d_lse(&d_lse);
        let want = call.forward_with_lse(&q, &k, &v).unwrap();
        let want_gradients = call.backward(&q, &k, &v, &want, &d_out).unwrap();

        let [q, k, v, d_out] = [q, k, v, d_out].map(|tensor| swapped(&tensor, operand));
        let d_lse = swapped(&d_lse, rows);
        let call = Attention::bnth().registry(&registry).causal(true).bias(&bias).d_lse(&d_lse);
        let got = call.forward_with_lse(&q, &k, &v).unwrap();
        assert_eq!(got.out, swapped(&want.out, operand));
        assert_eq!(got.lse, swapped(&want.lse, rows));
        assert_eq!(call.forward(&q, &k, &v).unwrap(), got.out);
        // By the builder, in the place of the constructor.
        let built = Attention::new().axis_order(AxisOrder::Bnth).registry(&registry).causal(true).bias(&bias);
        assert_eq!(built.forward(&q, &k, &v).unwrap(), got.out);

        let gradients = call.backward(&q, &k, &v, &got, &d_out).unwrap();
        assert_eq!(gradients, call.backward_recompute(&q, &k, &v, &d_out).unwrap());
        for (got, want) in [
            (&gradients.dq, &want_gradients.dq),
            (&gradients.dk, &want_gradients.dk),
            (&gradients.dv, &want_gradients.dv),
        ] {
            assert_eq!(got.as_ref().unwrap(), &swapped(want.as_ref().unwrap(), operand));
        }
        assert_eq!(gradients.dbias, want_gradients.dbias);
        assert_eq!(gradients.dq.as_ref().unwrap().shape(), q.shape());

        // Into memory of the caller's, in the same order.
        let (mut out, mut lse) = (Tensor::zeros::<f32>(got.out.shape()).unwrap(), got.lse.clone());
        call.forward_into(&q, &k, &v, &mut out, Some(lse.view_mut())).unwrap();
        assert_eq!((&out, &lse), (&got.out, &got.lse));
        let mut dk = Tensor::zeros::<f32>(k.shape()).unwrap();
        let saved = BackwardInputs { out: out.view(), lse: lse.view(), d_out: d_out.view(), d_lse: None };
        let outputs = BackwardOutputs { dk: Some(dk.view_mut()), ..Default::default() };
        call.backward_into(&q, &k, &v, saved, outputs).unwrap();
        assert_eq!(Some(dk), gradients.dk);
    }
}

/// What runs and what is asked about beforehand is one problem, contiguous in the order of the caller.
#[test]
fn the_problem_has_the_strides_of_the_order() {
    let toy = Toy::new("toy").arc();
    let registry = registry([toy.clone()]);
    let x = tensor([2, 4, 3, 8], 1);
    let call = Attention::bnth().registry(&registry);
    let problem = call.problem(&x, &x, &x).unwrap();
    assert_eq!(problem.dims().query_heads, 4);
    for role in [Role::Query, Role::Out] {
        let desc = problem.tensor(role).unwrap();
        assert_eq!((desc.shape(), desc.strides()), ([2, 3, 4, 8].into(), [96, 8, 24, 1].into()), "{role}");
    }
    call.forward(&x, &x, &x).unwrap();
    assert_eq!(toy.last(), problem);
    let forward = call.forward_with_lse(&x, &x, &x).unwrap();
    let lse = *toy.last().tensor(Role::Lse).unwrap();
    assert_eq!((lse.shape(), lse.strides()), ([2, 3, 4].into(), [12, 1, 3].into()));
    assert_eq!(toy.last(), problem.to_builder().lse(true).layout(Role::Lse, lse).build().unwrap());
    assert_eq!(forward.problem(), &toy.last());
    call.backward(&x, &x, &x, &forward, &x).unwrap();
    let mut backward = call.backward_problem(&x, &x, &x).unwrap();
    assert_eq!(toy.last(), backward);
    backward = Attention::btnh().backward_problem(&x, &x, &x).unwrap();
    assert_eq!(backward.tensor(Role::DQuery).unwrap().strides(), [96, 24, 8, 1].into());
}

/// The error of a forward call with these shapes.
#[track_caller]
fn refused(call: Attention<'_>, query: &[usize], key: &[usize], value: &[usize]) -> Error {
    let registry = toy();
    let tensor = |shape: &[usize]| Tensor::zeros::<f32>(Dims::from_slice(shape).unwrap()).unwrap();
    let (query, key, value) = (tensor(query), tensor(key), tensor(value));
    call.registry(&registry).forward_with_lse(&query, &key, &value).unwrap_err()
}

#[test]
fn errors_have_shapes_in_the_order_of_the_caller() {
    let text = |query: &[usize], key: &[usize], value: &[usize]| {
        refused(Attention::bnth(), query, key, value).to_string()
    };
    assert_eq!(
        text(&[2, 4, 3, 8], &[1, 2, 5, 8], &[1, 2, 5, 8]),
        "invalid call: key has shape [1, 2, 5, 8], expected [2, 2, 5, 8] ([B, K, S, H]; B and H of the query)"
    );
    assert_eq!(
        text(&[2, 4, 3, 8], &[2, 2, 5, 8], &[2, 2, 6, 8]),
        "invalid call: value has shape [2, 2, 6, 8], expected [2, 2, 5, 8] ([B, K, S, Hv]; B, S and K of the key)"
    );
    assert_eq!(
        text(&[2, 4, 3, 0], &[2, 2, 5, 0], &[2, 2, 5, 8]),
        "invalid call: query has head dimension 0 (shape [2, 4, 3, 0]), expected at least 1"
    );
    assert_eq!(
        text(&[3, 8], &[3, 8], &[3, 8]),
        "invalid call: query has rank 2 (shape [3, 8]), expected rank 4 ([B, N, T, H]) or 3 ([N, T, H])"
    );
    assert_eq!(
        text(&[4, 3, 8], &[1, 2, 5, 8], &[1, 2, 5, 8]),
        "invalid call: query [4, 3, 8], key [1, 2, 5, 8] and value [1, 2, 5, 8] have different ranks; all must have 4 \
         ([B, N, T, H]) or all 3 ([N, T, H])"
    );

    let (registry, x) = (toy(), tensor([2, 4, 3, 8], 1));
    let call = Attention::bnth().registry(&registry);
    let mut wrong = vec![0.0f32; 192];
    let error = call.forward_into(&x, &x, &x, (&mut wrong, [2, 3, 4, 8]), None).unwrap_err();
    assert_eq!(
        error.to_string(),
        "invalid call: out has shape [2, 3, 4, 8], expected [2, 4, 3, 8] ([B, N, T, Hv])"
    );
    let (mut out, mut lse) = (vec![0.0f32; 192], vec![0.0f32; 24]);
    let lse = ViewMut::from_slice(&mut lse, [2, 3, 4]).unwrap();
    let error = call.forward_into(&x, &x, &x, (&mut out, [2, 4, 3, 8]), Some(lse)).unwrap_err();
    assert_eq!(error.to_string(), "invalid call: lse has shape [2, 3, 4], expected [2, 4, 3] ([B, N, T])");
    let flat = tensor([4, 3, 8], 1);
    let error = call.forward_into(&flat, &flat, &flat, (&mut out, [2, 4, 3, 8]), None).unwrap_err();
    assert_eq!(
        error.to_string(),
        "invalid call: out has rank 4 (shape [2, 4, 3, 8]), expected rank 3, as the query has no batch axis"
    );
}

/// Shapes that are wrong in the order of the call and right in the other one.
#[test]
fn shapes_that_fit_the_other_order_are_told_so() {
    // 8 heads of 5 tokens on 2 heads of 12, stored [B, N, T, H].
    let (q, kv) = ([1, 8, 5, 4], [1, 2, 12, 4]);
    let error = refused(Attention::new(), &q, &kv, &kv);
    assert_eq!(
        error.to_string(),
        "invalid call: 5 query heads are not a multiple of 12 key/value heads; query [1, 8, 5, 4], key [1, 2, 12, 4] and value \
         [1, 2, 12, 4] were read as [B, T, N, H]: if they are [B, N, T, H], which would fit, say so with `Attention::bnth()`"
    );
    assert!(matches!(error.invalid_call(), Some(InvalidCall::HeadsNotDivisible { .. })));
    let registry = toy();
    let (query, key) = (tensor(q, 1), tensor(kv, 2));
    assert!(Attention::bnth().registry(&registry).forward(&query, &key, &key).is_ok());

    let text = refused(Attention::bnth(), &[1, 5, 8, 4], &[1, 12, 2, 4], &[1, 12, 2, 4]).to_string();
    assert!(
        text.ends_with("if they are [B, T, N, H], which would fit, say so with `Attention::btnh()`"),
        "{text}"
    );
    assert!(text.contains("query [1, 5, 8, 4], key [1, 12, 2, 4]"), "{text}");

    // A mask of queries by keys shows it where all three have one shape; so do sinks, one a head.
    let mask = Tensor::zeros::<bool>([5, 5]).unwrap();
    let text = refused(Attention::new().mask(&mask), &[1, 8, 5, 4], &[1, 8, 5, 4], &[1, 8, 5, 4]).to_string();
    assert!(
        text.contains("does not broadcast") && text.ends_with("say so with `Attention::bnth()`"),
        "{text}"
    );
    let sinks = Tensor::zeros::<f32>([8]).unwrap();
    let text = refused(Attention::new().sinks(&sinks), &[8, 5, 4], &[8, 5, 4], &[8, 5, 4]).to_string();
    assert!(text.starts_with("invalid call: sinks has shape [8], expected [5]"), "{text}");
    assert!(text.contains("query [8, 5, 4]") && text.contains("were read as [B, T, N, H]"), "{text}");

    // What fits in neither order is told what is wrong alone.
    let text = refused(Attention::new(), &[1, 3, 5, 4], &[1, 2, 4, 4], &[1, 2, 4, 4]).to_string();
    assert_eq!(text, "invalid call: 5 query heads are not a multiple of 4 key/value heads");
}

/// Strides are no matter: an input is what its shape says.
#[test]
fn views_of_the_other_storage_are_taken() {
    let registry = toy();
    let x = tensor([1, 3, 2, 4], 1);
    let permuted: View<'_> = x.view().permute([0, 2, 1, 3]).unwrap();
    let want = Attention::btnh().registry(&registry).forward(&x, &x, &x).unwrap();
    let got = Attention::bnth().registry(&registry).forward(permuted, permuted, permuted).unwrap();
    assert_eq!(got, swapped(&want, &[0, 2, 1, 3]));
}
