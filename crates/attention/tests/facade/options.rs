//! Every option of the builder reaches the problem that the backend gets.

use attention::core::Sequences;
use attention::{
    Attention, DType, Dropout, Gradients, Lengths, NumericsClass, Options, Problem, QueryOffset, Role,
    Tensor, TensorDesc, Window,
};

use crate::support::{Toy, numbers, registry};

const QUERY: [usize; 4] = [2, 3, 4, 8];
const KEY: [usize; 4] = [2, 5, 2, 8];
const VALUE: [usize; 4] = [2, 5, 2, 6];

/// The problem that the backend gets from a forward call.
fn run(call: Attention<'_>) -> Problem {
    let toy = Toy::new("toy").arc();
    let (q, k, v) = (numbers(192, 1), numbers(160, 2), numbers(120, 3));
    let registry = registry([toy.clone()]);
    call.registry(&registry).forward((&q, QUERY), (&k, KEY), (&v, VALUE)).unwrap();
    toy.last()
}

#[test]
fn defaults() {
    let problem = run(Attention::new());
    let desc = |shape: [usize; 4]| TensorDesc::contiguous(DType::F32, shape);
    assert_eq!(problem, Problem::builder(desc(QUERY), desc(KEY), desc(VALUE)).build().unwrap());
    assert!(!problem.has(Role::Lse));
}

#[test]
fn every_option_reaches_the_problem() {
    let mask = Tensor::from_vec(vec![true; 15], [3, 5]).unwrap();
    let bias = Tensor::from_vec(vec![0.0f64; 4], [4, 1, 1]).unwrap();
    let slopes = vec![0.5f32; 8];
    let sinks = [0.0f32; 4];
    assert_eq!(run(Attention::new().scale(-0.25)).scale(), -0.25);
    assert_eq!(run(Attention::new().scale(2.0).scale(None)).scale(), 1.0 / 8f64.sqrt());
    assert!(run(Attention::new().causal(true)).causal());
    let offset = QueryOffset::Fixed(-2);
    assert_eq!(run(Attention::new().query_offset(offset)).query_offset(), offset);
    let window = Window { left: Some(1), right: None };
    assert_eq!(run(Attention::new().window(window)).window(), window);
    assert_eq!(run(Attention::new().softcap(30.0)).softcap(), Some(30.0));
    let with_mask = run(Attention::new().mask(&mask));
    assert_eq!(with_mask.tensor(Role::Mask).unwrap().shape(), [1, 1, 3, 5].into());
    let with_bias = run(Attention::new().bias(&bias));
    let desc = with_bias.tensor(Role::Bias).unwrap();
    assert_eq!((desc.dtype(), desc.shape()), (DType::F64, [1, 4, 1, 1].into()));
    let with_slopes = run(Attention::new().alibi_slopes((&slopes, [2, 4])));
    assert_eq!(with_slopes.tensor(Role::AlibiSlopes).unwrap().shape(), [2, 4].into());
    let with_sinks = run(Attention::new().sinks((&sinks, [4])));
    assert_eq!(with_sinks.tensor(Role::Sinks).unwrap().shape(), [4].into());
    let lengths = run(Attention::new().query_lengths([3, 1]).key_value_lengths(vec![0, 5]));
    let expected = Sequences::Dense { query: Lengths::from([3, 1]), key_value: Lengths::from([0, 5]) };
    assert_eq!(lengths.sequences(), &expected);
    let dropout = Dropout::new(0.5, 7).with_offset(3);
    assert_eq!(run(Attention::new().dropout(dropout)).dropout(), Some(dropout));
    assert!(run(Attention::new().deterministic(true)).deterministic());
    assert_eq!(run(Attention::new().numerics(NumericsClass::F32)), run(Attention::new()));
}

#[test]
fn options_as_data_are_those_of_the_methods() {
    let options = Options {
        scale: Some(0.5),
        causal: true,
        query_offset: QueryOffset::BottomRight,
        window: Window::new(3, 0),
        softcap: Some(20.0),
        query_lengths: Lengths::from([3, 2]),
        key_value_lengths: Lengths::from([5, 4]),
        dropout: Some(Dropout::new(0.25, 1)),
        deterministic: true,
    };
    let by_methods = Attention::new()
        .scale(0.5)
        .causal(true)
        .query_offset(QueryOffset::BottomRight)
        .window(Window::new(3, 0))
        .softcap(20.0)
        .query_lengths([3, 2])
        .key_value_lengths([5, 4])
        .dropout(Dropout::new(0.25, 1))
        .deterministic(true);
    assert_eq!(run(Attention::new().options(options)), run(by_methods));
}

#[test]
fn the_logsumexp_is_asked_for_only_where_wanted() {
    let toy = Toy::new("toy").arc();
    let registry = registry([toy.clone()]);
    let x = numbers(24, 1);
    let x = (&x, [1, 3, 2, 4]);
    let forward = Attention::new().registry(&registry).forward_with_lse(x, x, x).unwrap();
    assert_eq!(toy.last().tensor(Role::Lse), Some(&TensorDesc::contiguous(DType::F32, [1, 3, 2])));
    assert_eq!(forward.lse.shape(), [1, 3, 2].into());
    let wide = vec![0.5f64; 24];
    let wide = (&wide, [1, 3, 2, 4]);
    let forward = Attention::new().registry(&registry).forward_with_lse(wide, wide, wide).unwrap();
    assert_eq!((forward.out.dtype(), forward.lse.dtype()), (DType::F64, DType::F64));
}

#[test]
fn backward_problems_have_the_wanted_gradients() {
    let toy = Toy::new("toy").arc();
    let registry = registry([toy.clone()]);
    let x = numbers(24, 1);
    let x = (&x, [1, 3, 2, 4]);
    let bias = vec![0.0f32; 9];
    let sinks = [0.0f32; 2];
    let d_lse = vec![1.0f32; 6];
    let plain = Attention::new().registry(&registry);
    let full = plain.clone().bias((&bias, [3, 3])).sinks((&sinks, [2]));
    let gradients = |call: &Attention<'_>| call.backward_problem(x, x, x).unwrap().gradients();
    assert_eq!(gradients(&plain), Gradients::QKV);
    assert_eq!(gradients(&full), Gradients::QKV | Gradients::BIAS | Gradients::SINKS);
    assert_eq!(gradients(&full.clone().gradients(Gradients::VALUE)), Gradients::VALUE);

    let result = full.clone().d_lse((&d_lse, [1, 3, 2])).backward_recompute(x, x, x, x).unwrap();
    assert_eq!(toy.last(), full.clone().d_lse((&d_lse, [1, 3, 2])).backward_problem(x, x, x).unwrap());
    assert!(toy.last().has(Role::DLse));
    assert!(result.dbias.is_some() && result.dsinks.is_some());
    let result = full.gradients(Gradients::QUERY | Gradients::SINKS).backward_recompute(x, x, x, x).unwrap();
    assert!(result.dq.is_some() && result.dsinks.is_some());
    assert!(result.dk.is_none() && result.dv.is_none() && result.dbias.is_none());
    assert_eq!(result.into_qkv(), None);
}
