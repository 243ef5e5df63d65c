//! Every option of the builder reaches the problem that the backend gets.

use std::sync::Arc;

use attention::core::{Alignment, OffsetRange};
use attention::{
    Attention, CallData, CallProblem, DType, Dropout, Gradients, IntoNumbers, Lengths, NumericsClass,
    Options, Problem, QueryOffset, Role, Tensor, TensorDesc, View, Window,
};

use crate::support::{Seen, Toy, numbers, registry};

const QUERY: [usize; 4] = [2, 3, 4, 8];
const KEY: [usize; 4] = [2, 5, 2, 8];
const VALUE: [usize; 4] = [2, 5, 2, 6];

/// The problem that the backend gets from a forward call.
fn run(call: Attention<'_>) -> Problem {
    seen(call).problem
}

/// The problem and the numbers that the backend gets from a forward call.
fn seen(call: Attention<'_>) -> Seen {
    let toy = Toy::new("toy").arc();
    let (q, k, v) = (numbers(192, 1), numbers(160, 2), numbers(120, 3));
    let registry = registry([toy.clone()]);
    call.registry(&registry).forward((&q, QUERY), (&k, KEY), (&v, VALUE)).unwrap();
    toy.last_call()
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
    let negative = seen(Attention::new().scale(-0.25));
    assert_eq!((negative.scale, negative.problem.any_scale()), (-0.25, true));
    assert_eq!(seen(Attention::new().scale(2.0).scale(None)).scale, 1.0 / 8f64.sqrt());
    assert!(run(Attention::new().causal(true)).causal());
    let offset = QueryOffset::Fixed(-2);
    let with_offset = seen(Attention::new().query_offset(offset));
    assert_eq!(with_offset.rows.iter().map(|rows| rows.offset()).collect::<Vec<_>>(), [-2, -2]);
    assert_eq!(with_offset.problem.alignment(), Alignment::Offset(OffsetRange::Near));
    assert_eq!(seen(Attention::new().query_offset(-2)), with_offset);
    let bottom_right = seen(Attention::new().query_offset(QueryOffset::BottomRight));
    assert_eq!(bottom_right.rows[1].offset(), 2);
    assert_eq!(bottom_right.problem.alignment(), Alignment::BottomRight);
    let window = Window { left: Some(1), right: None };
    assert_eq!(run(Attention::new().window(window)).window(), window);
    let softcap = seen(Attention::new().softcap(30.0));
    assert_eq!((softcap.softcap, softcap.problem.has_softcap()), (Some(30.0), true));
    let with_mask = run(Attention::new().mask(&mask));
    assert_eq!(with_mask.tensor(Role::Mask).unwrap().shape(), [1, 1, 3, 5].into());
    let with_bias = run(Attention::new().bias(&bias));
    let desc = with_bias.tensor(Role::Bias).unwrap();
    assert_eq!((desc.dtype(), desc.shape()), (DType::F64, [1, 4, 1, 1].into()));
    let with_slopes = run(Attention::new().alibi_slopes((&slopes, [2, 4])));
    assert_eq!(with_slopes.tensor(Role::AlibiSlopes).unwrap().shape(), [2, 4].into());
    let with_sinks = run(Attention::new().sinks((&sinks, [4])));
    assert_eq!(with_sinks.tensor(Role::Sinks).unwrap().shape(), [4].into());
    let lengths = seen(Attention::new().query_lengths([3, 1]).key_value_lengths(vec![0, 5]));
    assert_eq!(
        lengths.rows.iter().map(|rows| (rows.queries(), rows.keys())).collect::<Vec<_>>(),
        [(3, 0), (1, 5)]
    );
    assert!(lengths.problem.has(Role::QueryLengths) && lengths.problem.has(Role::KeyValueLengths));
    let dropout = Dropout::new(0.5, 7).with_offset(3);
    let with_dropout = seen(Attention::new().dropout(dropout));
    assert_eq!(with_dropout.dropout, dropout.stream().ok());
    assert_eq!(with_dropout.problem.dropout_rate(), Some(0.5));
    assert!(run(Attention::new().deterministic(true)).deterministic());
    assert_eq!(run(Attention::new().numerics(NumericsClass::F32)), run(Attention::new()));
}

#[test]
fn options_as_data_are_those_of_the_methods() {
    let options = Options {
        scale: Some(0.5),
        causal: true,
        query_offset: QueryOffset::BottomRight,
        query_offsets: Some(Arc::new([2, -1])),
        window: Window::new(3, 0),
        softcap: Some(20.0),
        query_lengths: Lengths::from([3, 2]),
        key_value_lengths: Lengths::from([5, 4]),
        query_starts: None,
        key_value_starts: None,
        longest_query: None,
        longest_key: None,
        dropout: Some(Dropout::new(0.25, 1)),
        deterministic: true,
        batch_invariant: true,
    };
    let by_methods = Attention::new()
        .scale(0.5)
        .causal(true)
        .query_offset(QueryOffset::BottomRight)
        .query_offsets([2, -1])
        .window(Window::new(3, 0))
        .softcap(20.0)
        .query_lengths([3, 2])
        .key_value_lengths([5, 4])
        .dropout(Dropout::new(0.25, 1))
        .deterministic(true)
        .batch_invariant(true);
    assert_eq!(by_methods.data().query_offset, QueryOffset::BottomRight);
    assert_eq!(seen(Attention::new().options(options)), seen(by_methods));
}

/// The rows of a call as (query length, key/value length, offset).
fn rows(call: Attention<'_>) -> Vec<(usize, usize, i64)> {
    seen(call).rows.iter().map(|rows| (rows.queries(), rows.keys(), rows.offset())).collect()
}

#[test]
fn numbers_are_lists_or_tensors_of_any_integers() {
    fn given<'a>(numbers: impl IntoNumbers<'a> + Clone) {
        let call = Attention::new()
            .query_lengths(numbers.clone())
            .key_value_lengths(numbers.clone())
            .query_offsets(numbers);
        assert_eq!(rows(call), [(3, 3, 3), (1, 1, 1)]);
    }
    given([3, 1]);
    given([3u8, 1]);
    given(&[3u32, 1]);
    given(&[3i64, 1][..]);
    given(vec![3usize, 1]);
    given(&vec![3u64, 1]);
    given(Arc::<[usize]>::from([3, 1]));
    given(Box::<[i32]>::from([3, 1]));
    given(Lengths::from([3, 1]));
    given(&Lengths::from([3, 1]));
    given(&Tensor::from_vec(vec![3u32, 1], [2]).unwrap());
    given(&Tensor::from_vec(vec![3usize, 1], [2]).unwrap());
    given((&[3i64, 1], [2]));
    let numbers = [1i32, 0, 3];
    given(View::strided(&numbers, 2, [2], [-2]).unwrap());
}

#[test]
fn the_last_way_to_say_a_number_counts() {
    let tensor = [2i32, 2];
    let tensor = View::from_slice(&tensor, [2]).unwrap();
    let call = Attention::new().query_lengths([1, 1]).query_lengths(tensor);
    assert_eq!(rows(call.clone()), [(2, 5, 0); 2]);
    assert_eq!(rows(call.clone().query_lengths([3, 3])), [(3, 5, 0); 2]);
    assert_eq!(rows(call.clone().query_lengths(Lengths::Full)), [(3, 5, 0); 2]);
    let problem = run(call.clone().query_lengths(Lengths::Full));
    assert_eq!(problem, run(Attention::new()));
    // Options are no tensors, and leave them.
    assert_eq!(rows(call.options(Options::default())), [(2, 5, 0); 2]);
    let call = Attention::new().query_offset(4).query_offsets(tensor);
    assert_eq!(rows(call.clone()), [(3, 5, 2); 2]);
    assert_eq!(rows(call.clone().query_offset(QueryOffset::BottomRight)), [(3, 5, 2); 2]);
    assert_eq!(rows(call.clone().query_offset(4)), [(3, 5, 4); 2]);
    assert_eq!(rows(call.query_offsets([-1, 7])), [(3, 5, -1), (3, 5, 7)]);
}

#[test]
fn seeds_and_offsets_of_dropout_may_be_tensors() {
    let (seed, offset) = ([-2i64], [9u32]);
    let (seed, offset) = (View::from_slice(&seed, [1]).unwrap(), View::from_slice(&offset, [1]).unwrap());
    let call = Attention::new().dropout(Dropout::new(0.5, 7).with_offset(3));
    let stream = |seed, offset| Dropout::new(0.5, seed).with_offset(offset).stream().ok();
    assert_eq!(seen(call.clone().dropout_seed(seed)).dropout, stream(u64::MAX - 1, 3));
    assert_eq!(seen(call.clone().dropout_offset(offset)).dropout, stream(7, 9));
    let scalar = Tensor::from_vec(vec![4u32], []).unwrap();
    assert_eq!(seen(call.clone().dropout_seed(&scalar)).dropout, stream(4, 3));
    assert_eq!(seen(call.dropout_seed(seed).dropout_offset(offset)).dropout, stream(u64::MAX - 1, 9));
}

/// What a planned call takes.
#[test]
fn the_data_of_a_call_is_what_its_problem_announces() {
    let lengths = [3u32, 1];
    let call = Attention::new()
        .scale(0.5)
        .softcap(4.0)
        .query_lengths((&lengths, [2]))
        .key_value_lengths([5, 4])
        .query_offset(1)
        .dropout(Dropout::new(0.5, 7));
    let (q, k, v) = (numbers(192, 1), numbers(160, 2), numbers(120, 3));
    let problem = call.problem((&q, QUERY), (&k, KEY), (&v, VALUE)).unwrap();
    let data: CallData<'_> = call.data();
    let checked = CallProblem::new(&problem, &data).unwrap();
    let of_backend = seen(call.clone());
    assert_eq!(of_backend.problem, problem);
    assert_eq!((of_backend.scale, of_backend.softcap), (checked.scale(), checked.softcap()));
    assert_eq!(of_backend.rows, [checked.sequence(0), checked.sequence(1)]);
    assert_eq!(problem.dtype_of(Role::QueryLengths), Some(DType::U32));
    assert_eq!(problem.dtype_of(Role::KeyValueLengths), Some(DType::I64));
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
