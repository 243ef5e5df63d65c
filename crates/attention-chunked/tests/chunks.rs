//! What chunk sizes, levels and layouts may and may not change, beyond the sizes of the conformance suite.

mod common;

use attention_chunked::{ChunkedBackend, ChunkedConfig, Level};
use attention_core::{
    AttentionBackend, BackwardCall, BackwardInputs, BackwardOutputs, CallData, DType, ForwardCall,
    ForwardOutputs, Gradients, Inputs, QueryOffset, ScratchBuffer, TensorDesc, View, ViewMut, Window,
};

/// Numbers that are reproducible and look random.
fn numbers(count: usize, seed: u32) -> Vec<f32> {
    let mut state = seed.wrapping_mul(2_654_435_761).wrapping_add(12345);
    (0..count)
        .map(|_| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / (1 << 23) as f32 - 1.0
        })
        .collect()
}

const SHAPE: [usize; 4] = [1, 700, 4, 40];
const KEYS: [usize; 4] = [1, 1300, 2, 40];

struct Results {
    out: Vec<f32>,
    lse: Vec<f32>,
    dq: Vec<f32>,
    dk: Vec<f32>,
    dv: Vec<f32>,
}

/// Forward and backward of a long grouped call with a window, so that whole blocks are skipped.
fn run(backend: &ChunkedBackend, causal: bool) -> Results {
    let count = |shape: [usize; 4]| shape.iter().product::<usize>();
    let (q, k, v) = (numbers(count(SHAPE), 1), numbers(count(KEYS), 2), numbers(count(KEYS), 3));
    let d_out = numbers(count(SHAPE), 4);
    let view = |data, shape: [usize; 4]| View::from_slice(data, shape).unwrap();
    let data = CallData {
        query_offset: QueryOffset::Fixed(500),
        key_value_lengths: Some(View::from_slice(&[1250i32], [1]).unwrap()),
        ..CallData::default()
    };
    let inputs = Inputs { data, ..Inputs::new(view(&q, SHAPE), view(&k, KEYS), view(&v, KEYS)) };
    let problem = || inputs.problem().causal(causal).window(Window { left: Some(350), right: Some(90) });
    let forward = problem().lse(true).build().unwrap();
    let (mut out, mut lse) = (vec![f32::NAN; count(SHAPE)], vec![f32::NAN; 700 * 4]);
    let outputs = ForwardOutputs {
        out: ViewMut::from_slice(&mut out, SHAPE).unwrap(),
        lse: Some(ViewMut::from_slice(&mut lse, [1, 700, 4]).unwrap()),
    };
    let plan = backend.plan(&forward).unwrap();
    let mut scratch = ScratchBuffer::new(plan.scratch_bytes());
    plan.forward(ForwardCall::new(&forward, inputs, outputs).unwrap(), scratch.scratch()).unwrap();

    let backward = problem().gradients(Gradients::QKV).build().unwrap();
    let mut gradients = [count(SHAPE), count(KEYS), count(KEYS)].map(|count| vec![f32::NAN; count]);
    {
        let saved = BackwardInputs {
            out: view(&out, SHAPE),
            lse: View::from_slice(&lse, [1, 700, 4]).unwrap(),
            d_out: view(&d_out, SHAPE),
            d_lse: None,
        };
        let [dq, dk, dv] = &mut gradients;
        let outputs = BackwardOutputs {
            dq: Some(ViewMut::from_slice(dq, SHAPE).unwrap()),
            dk: Some(ViewMut::from_slice(dk, KEYS).unwrap()),
            dv: Some(ViewMut::from_slice(dv, KEYS).unwrap()),
            ..BackwardOutputs::default()
        };
        let plan = backend.plan(&backward).unwrap();
        let mut scratch = ScratchBuffer::new(plan.scratch_bytes());
        let call = BackwardCall::new(&backward, inputs, saved, outputs).unwrap();
        plan.backward(call, scratch.scratch()).unwrap();
    }
    let [dq, dk, dv] = gradients;
    Results { out, lse, dq, dk, dv }
}

fn assert_same_bits(a: &Results, b: &Results, what: &str) {
    let pairs = [(&a.out, &b.out), (&a.lse, &b.lse), (&a.dq, &b.dq), (&a.dk, &b.dk), (&a.dv, &b.dv)];
    for (index, (a, b)) in pairs.into_iter().enumerate() {
        let differ = a.iter().zip(b).position(|(a, b)| a.to_bits() != b.to_bits());
        assert_eq!(differ, None, "{what}: result {index}");
    }
}

#[test]
fn chunks_and_threads_do_not_change_a_bit() {
    for level in Level::available() {
        for causal in [false, true] {
            let at = |config: ChunkedConfig| run(&ChunkedBackend::with_config(config.level(level)), causal);
            let want = at(ChunkedConfig::default());
            assert!(want.out.iter().chain(&want.dq).chain(&want.dk).all(|x| x.is_finite()));
            for (what, config) in [
                ("one thread", ChunkedConfig::default().threads(1)),
                ("small query chunks", ChunkedConfig::default().query_chunk(1)),
                ("small key chunks", ChunkedConfig::default().key_chunk(1)),
                ("a large budget", ChunkedConfig::default().budget(64 << 20)),
            ] {
                assert_same_bits(&at(config), &want, &format!("{level}, causal {causal}, {what}"));
            }
        }
    }
}

/// An element of the bias is broadcast along queries, keys or both: the order in which the gradients of its
/// logits are summed must not follow the chunks.
#[test]
fn chunks_do_not_change_a_bit_of_a_broadcast_bias_gradient() {
    let [batch, queries, keys, heads] = [2, 150, 600, 2];
    for level in Level::available() {
        for dtype in [DType::F64, DType::F32, DType::Bf16] {
            for shape in [
                [1, 1, 1, 1],
                [batch, heads, 1, 1],
                [1, heads, 1, keys],
                [1, 1, queries, 1],
                [1, 1, queries, keys],
            ] {
                let mut case = common::Case::new(dtype, [batch, queries, keys, heads, 1, 8]);
                case.d_out = common::random(case.query.len(), 5);
                case.bias = Some((dtype, common::random(shape.iter().product(), 6), shape.to_vec()));
                let at = |config: ChunkedConfig| case.run(&ChunkedBackend::with_config(config.level(level)));
                let want = at(ChunkedConfig::default());
                want.assert_finite(level.name());
                for (what, config) in [
                    ("one thread", ChunkedConfig::default().threads(1)),
                    ("small query chunks", ChunkedConfig::default().query_chunk(1)),
                    ("small key chunks", ChunkedConfig::default().key_chunk(1)),
                    ("the smallest budget", ChunkedConfig::default().budget(1)),
                ] {
                    at(config).assert_same(&want, &[], &format!("{level}, {dtype}, bias {shape:?}, {what}"));
                }
            }
        }
    }
}

/// One task a key/value head, or tasks of query rows and of keys: two ways through the backward pass.
#[test]
fn both_ways_to_cut_the_backward_pass_give_the_same_bits() {
    for level in Level::available() {
        let in_pool = |threads: usize| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            let config = ChunkedConfig::default().level(level).pool(std::sync::Arc::new(pool));
            run(&ChunkedBackend::with_config(config), true)
        };
        // Two heads keep one or two threads busy; seven threads take the work apart.
        assert_same_bits(&in_pool(1), &in_pool(7), &level.to_string());
    }
}

#[test]
fn levels_agree_within_rounding() {
    let want = run(&ChunkedBackend::with_config(ChunkedConfig::default().level(Level::Scalar)), true);
    for level in Level::available() {
        let got = run(&ChunkedBackend::with_config(ChunkedConfig::default().level(level)), true);
        for (a, b) in [(&got.out, &want.out), (&got.lse, &want.lse), (&got.dq, &want.dq), (&got.dk, &want.dk)]
        {
            let worst = a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            assert!(worst < 2e-5, "{level}: {worst}");
        }
    }
}

#[test]
fn levels_parse_from_their_names() {
    for level in Level::ALL {
        assert_eq!(level.name().parse(), Ok(level));
    }
    let error = "sse9".parse::<Level>().unwrap_err();
    assert_eq!(error, "unknown level 'sse9'; known are scalar, avx2, avx512, amx");
    assert!(Level::Scalar.is_available() && Level::available().any(|level| level == Level::best()));
}

/// The promise of constant memory: the same scratch for any length, at most 1 MiB a thread forward; backward
/// grows with the states of the rows and one key/value head's dq alone.
#[test]
fn scratch_does_not_grow_with_the_sequences() {
    let problem = |length: usize, dtype: DType, backward: bool| {
        let desc = TensorDesc::contiguous(dtype, [1, length, 1, 64]);
        let builder = attention_core::Problem::builder(desc, desc, desc).causal(true);
        (if backward { builder.gradients(Gradients::QKV) } else { builder }).build().unwrap()
    };
    for level in Level::available() {
        let backend = ChunkedBackend::with_config(ChunkedConfig::default().level(level).threads(1));
        for dtype in [DType::F32, DType::Bf16, DType::F16] {
            let forward = |length| backend.scratch_bytes(&problem(length, dtype, false)).unwrap();
            assert_eq!(forward(1 << 14), forward(1 << 20), "{level} {dtype}");
            assert!(forward(1 << 20) <= 1 << 20, "{level} {dtype}: {} bytes", forward(1 << 20));
            let backward = |length| backend.scratch_bytes(&problem(length, dtype, true)).unwrap();
            // dq of one head in f32, and the shift, gain and row term of each row in f64.
            let per_row = 64 * 4 + 24;
            let grown = backward(1 << 18) - backward(1 << 14);
            assert_eq!(grown, ((1 << 18) - (1 << 14)) * per_row, "{level} {dtype}");
            let constant = backward(1 << 14) - (1 << 14) * per_row;
            assert!(constant <= 4 << 20, "{level} {dtype}: {constant} bytes");
        }
    }
}
