//! What the conformance suite does not look at: shapes of several blocks and tasks, padding, and
//! configuration.

use attention_conformance::oracle::Oracle;
use attention_core::{
    AttentionBackend, BackwardCall, BackwardInputs, BackwardOutputs, CallData, Error, ForwardCall,
    ForwardOutputs, Gradients, Inputs, InvalidCall, Plan, Problem, ScratchBuffer, View, ViewMut, Window,
};
use attention_cpu::{CpuBackend, CpuConfig};

/// Numbers in [-1, 1), a pure function of the seed.
fn numbers(count: usize, seed: u32) -> Vec<f32> {
    let mut state = seed;
    (0..count)
        .map(|_| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / (1 << 23) as f32 - 1.0
        })
        .collect()
}

/// Query, key, value and the gradient of the output, for `[B, T, S, N, K, H]`.
struct Data {
    dims: [usize; 6],
    query: Vec<f32>,
    key: Vec<f32>,
    value: Vec<f32>,
    d_out: Vec<f32>,
}

/// What a forward and a backward call give.
#[derive(Debug, PartialEq)]
struct Results {
    out: Vec<f32>,
    lse: Vec<f32>,
    gradients: [Vec<f32>; 3],
}

impl Data {
    fn new(dims: [usize; 6]) -> Self {
        let [b, t, s, n, k, h] = dims;
        Self {
            dims,
            query: numbers(b * t * n * h, 1),
            key: numbers(b * s * k * h, 2),
            value: numbers(b * s * k * h, 3),
            d_out: numbers(b * t * n * h, 4),
        }
    }

    fn inputs(&self) -> Inputs<'_> {
        let [b, t, s, n, k, h] = self.dims;
        Inputs::new(
            View::from_slice(&self.query, [b, t, n, h]).unwrap(),
            View::from_slice(&self.key, [b, s, k, h]).unwrap(),
            View::from_slice(&self.value, [b, s, k, h]).unwrap(),
        )
    }

    /// Runs both passes of the forward problem `problem`, in scratch and outputs full of NaN.
    fn run(&self, backend: &CpuBackend, problem: &Problem) -> Results {
        self.run_with(backend, problem, CallData::default())
    }

    /// As [`run`](Self::run), with the numbers of the calls.
    fn run_with(&self, backend: &CpuBackend, problem: &Problem, data: CallData<'_>) -> Results {
        let inputs = Inputs { data, ..self.inputs() };
        let [b, t, s, n, k, h] = self.dims;
        let scratch_for = |plan: &dyn Plan| {
            let mut scratch = ScratchBuffer::new(plan.scratch_bytes());
            scratch.bytes_mut().fill(0xFF);
            scratch
        };
        let (mut out, mut lse) = (vec![f32::NAN; b * t * n * h], vec![f32::NAN; b * t * n]);
        let outputs = ForwardOutputs {
            out: ViewMut::from_slice(&mut out, [b, t, n, h]).unwrap(),
            lse: Some(ViewMut::from_slice(&mut lse, [b, t, n]).unwrap()),
        };
        let call = ForwardCall::new(problem, inputs, outputs).unwrap();
        let plan = backend.plan(problem).unwrap();
        plan.forward(call, scratch_for(&*plan).scratch()).unwrap();

        let backward = problem.to_builder().gradients(Gradients::QKV).build().unwrap();
        let mut gradients =
            [vec![f32::NAN; b * t * n * h], vec![f32::NAN; b * s * k * h], vec![f32::NAN; b * s * k * h]];
        let [dq, dk, dv] = &mut gradients;
        let saved = BackwardInputs {
            out: View::from_slice(&out, [b, t, n, h]).unwrap(),
            lse: View::from_slice(&lse, [b, t, n]).unwrap(),
            d_out: View::from_slice(&self.d_out, [b, t, n, h]).unwrap(),
            d_lse: None,
        };
        let outputs = BackwardOutputs {
            dq: Some(ViewMut::from_slice(dq, [b, t, n, h]).unwrap()),
            dk: Some(ViewMut::from_slice(dk, [b, s, k, h]).unwrap()),
            dv: Some(ViewMut::from_slice(dv, [b, s, k, h]).unwrap()),
            ..BackwardOutputs::default()
        };
        let call = BackwardCall::new(&backward, inputs, saved, outputs).unwrap();
        let plan = backend.plan(&backward).unwrap();
        plan.backward(call, scratch_for(&*plan).scratch()).unwrap();
        Results { out, lse, gradients }
    }
}

fn one_thread() -> CpuBackend {
    CpuBackend::with_config(CpuConfig::default().threads(1))
}

/// Several tasks (512 rows) of several blocks (128 rows), several panels (64 keys) and chunks (256 keys),
/// none of them whole.
#[test]
fn shapes_of_several_tasks_agree_with_the_oracle() {
    let data = Data::new([1, 601, 333, 2, 1, 24]);
    for (causal, window) in [(true, Window::UNBOUNDED), (false, Window::new(70, 20))] {
        let problem = data.inputs().problem().lse(true).causal(causal).window(window).build().unwrap();
        let got = data.run(&CpuBackend::new(), &problem);
        let oracle = Oracle::new(&problem, &data.inputs());
        let (out, lse) = (oracle.out(), oracle.lse());
        // Averages of numbers below 1, from logits below 5: a few dozen units in the last place.
        for (got, want) in got.out.iter().zip(&out).chain(got.lse.iter().zip(&lse)) {
            assert!(f64::from(*got) == *want || (f64::from(*got) - want).abs() < 4e-6, "{got} {want}");
        }
        assert_eq!(got, data.run(&one_thread(), &problem));
    }
}

/// Padding behind the lengths changes no bit of what is in front of it.
#[test]
fn padding_changes_no_bit() {
    let (queries, keys) = (130, 70);
    let short = Data::new([1, queries, keys, 2, 2, 16]);
    let problem = short.inputs().problem().lse(true).build().unwrap();
    let want = short.run(&CpuBackend::new(), &problem);

    let mut long = Data::new([1, 700, 300, 2, 2, 16]);
    for (long, short) in [
        (&mut long.query, &short.query),
        (&mut long.key, &short.key),
        (&mut long.value, &short.value),
        (&mut long.d_out, &short.d_out),
    ] {
        long.fill(f32::NAN);
        long[..short.len()].copy_from_slice(short);
    }
    let (queries, keys) = ([queries], [keys]);
    let data = CallData {
        query_lengths: Some(View::from_slice(&queries, [1]).unwrap()),
        key_value_lengths: Some(View::from_slice(&keys, [1]).unwrap()),
        ..CallData::default()
    };
    let padded = Inputs { data, ..long.inputs() }.problem().lse(true).build().unwrap();
    let got = long.run_with(&CpuBackend::new(), &padded, data);

    assert_eq!(got.out[..want.out.len()], want.out);
    assert!(got.out[want.out.len()..].iter().all(|&x| x == 0.0));
    assert_eq!(got.lse[..want.lse.len()], want.lse);
    assert!(got.lse[want.lse.len()..].iter().all(|&x| x == f32::NEG_INFINITY));
    for (got, want) in got.gradients.iter().zip(&want.gradients) {
        assert_eq!(got[..want.len()], *want);
        assert!(got[want.len()..].iter().all(|&x| x == 0.0));
    }
}

/// Backward on parts of the keys, with the whole row's output and logsumexp, adds up to backward on the
/// whole.
#[test]
fn gradients_of_parts_of_the_keys_add_up() {
    // The whole and one part are above the size of small batch rows, one part is below.
    let (queries, keys) = (80, 96);
    let data = Data::new([1, queries, keys, 2, 2, 16]);
    let problem = data.inputs().problem().lse(true).build().unwrap();
    let whole = data.run(&CpuBackend::new(), &problem);

    let row = 2 * 16;
    let mut dq = vec![0.0f32; whole.gradients[0].len()];
    let (mut dk, mut dv) = (Vec::new(), Vec::new());
    for part in [0..32, 32..96] {
        let count = part.len();
        let slice = part.start * row..part.end * row;
        let inputs = Inputs::new(
            View::from_slice(&data.query, [1, queries, 2, 16]).unwrap(),
            View::from_slice(&data.key[slice.clone()], [1, count, 2, 16]).unwrap(),
            View::from_slice(&data.value[slice], [1, count, 2, 16]).unwrap(),
        );
        let problem = inputs.problem().gradients(Gradients::QKV).build().unwrap();
        let saved = BackwardInputs {
            out: View::from_slice(&whole.out, [1, queries, 2, 16]).unwrap(),
            lse: View::from_slice(&whole.lse, [1, queries, 2]).unwrap(),
            d_out: View::from_slice(&data.d_out, [1, queries, 2, 16]).unwrap(),
            d_lse: None,
        };
        let (mut part_dq, mut part_dk, mut part_dv) =
            (vec![f32::NAN; dq.len()], vec![f32::NAN; count * row], vec![f32::NAN; count * row]);
        let outputs = BackwardOutputs {
            dq: Some(ViewMut::from_slice(&mut part_dq, [1, queries, 2, 16]).unwrap()),
            dk: Some(ViewMut::from_slice(&mut part_dk, [1, count, 2, 16]).unwrap()),
            dv: Some(ViewMut::from_slice(&mut part_dv, [1, count, 2, 16]).unwrap()),
            ..BackwardOutputs::default()
        };
        let plan = CpuBackend::new().plan(&problem).unwrap();
        let mut scratch = ScratchBuffer::new(plan.scratch_bytes());
        let call = BackwardCall::new(&problem, inputs, saved, outputs).unwrap();
        plan.backward(call, scratch.scratch()).unwrap();
        dq.iter_mut().zip(&part_dq).for_each(|(sum, part)| *sum += part);
        dk.extend(part_dk);
        dv.extend(part_dv);
    }
    for (name, got, want) in
        [("dq", &dq, &whole.gradients[0]), ("dk", &dk, &whole.gradients[1]), ("dv", &dv, &whole.gradients[2])]
    {
        for (got, want) in got.iter().zip(want) {
            assert!((got - want).abs() < 2e-6, "{name}: {got} {want}");
        }
    }
}

#[test]
fn scratch_that_does_not_fit_is_refused() {
    let data = Data::new([1, 20, 20, 1, 1, 8]);
    let problem = data.inputs().problem().build().unwrap();
    let plan = one_thread().plan(&problem).unwrap();
    let needed = plan.scratch_bytes();
    let mut out = vec![7.0f32; 20 * 8];
    let mut scratch = ScratchBuffer::new(needed - 1);
    let outputs = ForwardOutputs { out: ViewMut::from_slice(&mut out, [1, 20, 1, 8]).unwrap(), lse: None };
    let call = ForwardCall::new(&problem, data.inputs(), outputs).unwrap();
    let error = plan.forward(call, scratch.scratch()).unwrap_err();
    let Error::InvalidCall(InvalidCall::ScratchTooSmall { needed: named, given }) = error else {
        panic!("{error}");
    };
    assert_eq!((named, given), (needed, needed - 1));
    assert!(out.iter().all(|&x| x == 7.0), "a refused call writes nothing");
}

/// The scratch of a long row grows with its length, not with its square, and a window bounds it.
#[test]
fn scratch_grows_with_the_keys_a_task_sees() {
    let dims = |length| attention_core::Dimensions {
        batch: 1,
        query_length: length,
        key_length: length,
        query_heads: 1,
        key_heads: 1,
        head_dim: 64,
        value_head_dim: 64,
    };
    let bytes = |length, window| {
        let problem = dims(length).problem(attention_core::DType::F32).window(window).build().unwrap();
        one_thread().scratch_bytes(&problem).unwrap()
    };
    let (short, long) = (bytes(1 << 14, Window::UNBOUNDED), bytes(1 << 15, Window::UNBOUNDED));
    assert!(long < 21 * short / 10, "{short} {long}");
    assert_eq!(bytes(1 << 14, Window::new(512, 0)), bytes(1 << 15, Window::new(512, 0)));
}
