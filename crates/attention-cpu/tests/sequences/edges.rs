//! Calls without sequences, without rows, and with more empty sequences than can be looked at.

use std::time::{Duration, Instant};

use attention_core::{CallData, Inputs, Problem, Scalar, View};
use attention_cpu::CpuBackend;

use super::store::{Layout, Results, Store, both, forward};

/// Both passes over packed rows `[rows, 2, 4]`, with a bias for each head and sinks.
fn packed(rows: [usize; 2], starts: [View<'_>; 2]) -> Results<f32, f32> {
    let [queries, keys] = rows;
    let tensor = |rows: usize| Store::of([rows, 2, 4], Layout::Contiguous, &vec![0.5f32; rows * 8]);
    let (query, key, value, d_out) = (tensor(queries), tensor(keys), tensor(keys), tensor(queries));
    let bias = Store::of([1, 2, 1, 1], Layout::Contiguous, &[0.25f64, 0.5]);
    let sinks = Store::of([2], Layout::Contiguous, &[0.5f64, 1.0]);
    let [query_starts, key_value_starts] = starts.map(Some);
    let inputs = Inputs {
        bias: Some(bias.view()),
        sinks: Some(sinks.view()),
        data: CallData { query_starts, key_value_starts, ..CallData::default() },
        ..Inputs::new(query.view(), key.view(), value.view())
    };
    let problem = inputs.problem().lse(true).build().unwrap();
    both(&CpuBackend::new(), inputs, &problem, Layout::Contiguous, (&d_out, None), |_, _| ())
}

fn all_are<T: Scalar>(numbers: &[T], value: f64) {
    assert!(numbers.iter().all(|number| number.to_f64() == value));
}

/// Nothing of a call has a value but what stands for no row.
fn is_empty(results: &Results<f32, f32>) {
    let Results { out, lse, dq, dk, dv, dbias, dsinks } = results;
    for tensor in [out, dq, dk, dv] {
        all_are(&tensor.read(0, tensor.shape[0]), 0.0);
    }
    all_are(&lse.read(0, lse.shape[0]), f64::NEG_INFINITY);
    for tensor in [dbias, dsinks].into_iter().flatten() {
        all_are(&tensor.read(0, tensor.shape[0]), 0.0);
    }
}

#[test]
fn without_sequences_all_rows_belong_to_none() {
    let start = [0i32];
    let starts = View::from_slice(&start, [1]).unwrap();
    for rows in [[0, 0], [3, 0], [0, 5], [3, 5]] {
        is_empty(&packed(rows, [starts; 2]));
    }
}

#[test]
fn of_empty_sequences_all_rows_belong_to_none() {
    let zeros = [0i64; 4];
    let starts = View::from_slice(&zeros, [4]).unwrap();
    for rows in [[0, 0], [3, 0], [0, 5], [3, 5]] {
        is_empty(&packed(rows, [starts; 2]));
    }
    // Queries without keys see their sink alone, which has no weight on anything that has a gradient.
    let some = [0i64, 1, 1, 3];
    let found = packed([3, 5], [View::from_slice(&some, [4]).unwrap(), starts]);
    all_are(&found.out.read(0, 3), 0.0);
    assert_eq!(found.lse.read(0, 3), [0.5, 1.0].repeat(3));
    for gradient in [&found.dq, &found.dk, &found.dv] {
        all_are(&gradient.read(0, gradient.shape[0]), 0.0);
    }
    // Keys without queries have gradients of 0.
    is_empty(&packed([0, 5], [starts, View::from_slice(&some, [4]).unwrap()]));
}

/// The time of a call grows with the rows that there are, not with the sequences.
#[test]
fn empty_sequences_cost_nothing() {
    let begin = Instant::now();
    let zero = [0i32];
    let starts = View::strided(&zero, 0, [(1 << 40) + 1], [0]).unwrap();
    is_empty(&packed([3, 5], [starts; 2]));
    assert!(begin.elapsed() < Duration::from_secs(1), "2^40 sequences took {:?}", begin.elapsed());

    // Three sequences of a row among a million without: first, in the middle, and last.
    let count = 1 << 20;
    let at = [0, count / 2, count - 1];
    let mut starts = vec![0i32];
    for batch in 0..count {
        starts.push(starts[batch] + i32::from(at.contains(&batch)));
    }
    let view = View::from_slice(&starts, [count + 1]).unwrap();
    let begin = Instant::now();
    let many = packed([4, 4], [view; 2]);
    // 6 passes over the starts of both sides, each of some milliseconds.
    assert!(begin.elapsed() < Duration::from_secs(2), "a million sequences took {:?}", begin.elapsed());
    let few = [0i32, 1, 2, 3];
    let view = View::from_slice(&few, [4]).unwrap();
    let few = packed([4, 4], [view; 2]);
    for (many, few) in [(&many.out, &few.out), (&many.dq, &few.dq), (&many.dk, &few.dk), (&many.dv, &few.dv)]
    {
        assert_eq!(many.read(0, 4), few.read(0, 4));
    }
    assert_eq!(many.lse.read(0, 4), few.lse.read(0, 4));
    assert_eq!(many.dbias.unwrap().read(0, 1), few.dbias.unwrap().read(0, 1));
    assert_eq!(many.dsinks.unwrap().read(0, 2), few.dsinks.unwrap().read(0, 2));
}

#[test]
fn without_pages_rows_see_nothing() {
    let query = Store::of([2, 3, 2, 4], Layout::Contiguous, &[0.5f32; 48]);
    let lengths = [0i32; 2];
    for (pages, columns) in [(0, 0), (0, 2), (1, 0), (1, 2)] {
        let page = Store::<f32>::new([pages, 5, 1, 4], Layout::Contiguous);
        let table = vec![-1i32; 2 * columns];
        let data = CallData {
            block_table: Some(View::from_slice(&table, [2, columns]).unwrap()),
            key_value_lengths: Some(View::from_slice(&lengths, [2]).unwrap()),
            ..CallData::default()
        };
        let inputs = Inputs { data, ..Inputs::new(query.view(), page.view(), page.view()) };
        let problem: Problem = inputs.problem().lse(true).causal(true).build().unwrap();
        let (out, lse) = forward::<f32, f32>(&CpuBackend::new(), inputs, &problem, Layout::Contiguous);
        all_are(&out.read(0, 2), 0.0);
        all_are(&lse.read(0, 2), f64::NEG_INFINITY);
    }
}
