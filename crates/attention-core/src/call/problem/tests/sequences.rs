//! Where the rows of packed and paged sequences are.

use super::PLAIN;
use crate::{
    CallData, CallProblem, DType, Device, Dims, ForwardCall, ForwardOutputs, Inputs, InvalidCall, Problem,
    ProblemBuilder, QueryOffset, Role, RowLayout, RowPlaces, Stretch, TensorDesc, View, ViewMut,
};

fn tokens(shape: &[usize]) -> TensorDesc {
    TensorDesc::contiguous(DType::F32, Dims::from_slice(shape).unwrap())
}

/// Queries `[7, 4, 8]` and keys `[11, 2, 8]` of three sequences.
fn packed() -> ProblemBuilder {
    let builder = Problem::builder(tokens(&[7, 4, 8]), tokens(&[11, 2, 8]), tokens(&[11, 2, 6]));
    builder.packed_queries(3, DType::I32).packed_keys(3, DType::I32)
}

fn starts<'a>(queries: &'a [i32; 4], keys: &'a [i32; 4]) -> CallData<'a> {
    CallData {
        query_starts: Some(View::from_slice(queries, [4]).unwrap()),
        key_value_starts: Some(View::from_slice(keys, [4]).unwrap()),
        ..PLAIN
    }
}

fn all_of(places: RowPlaces<'_>) -> Vec<[usize; 2]> {
    (0..places.rows()).map(|row| places.of(row)).collect()
}

#[test]
fn packed_sequences_have_their_rows_between_their_starts() {
    let problem = packed().build().unwrap();
    let dims = problem.dims();
    assert_eq!((dims.batch, dims.query_length, dims.key_length), (3, 7, 11));
    assert_eq!((problem.query_layout(), problem.key_layout()), (RowLayout::Packed, RowLayout::Packed));
    assert!(problem.rows_vary());
    // One sequence is empty, and there are rows behind the last.
    let (queries, keys) = ([0, 2, 2, 6], [0, 5, 8, 9]);
    let call = CallProblem::new(&problem, &starts(&queries, &keys)).unwrap();
    let rows = |batch: usize| (call.sequence(batch).queries(), call.sequence(batch).keys());
    assert_eq!([rows(0), rows(1), rows(2)], [(2, 5), (0, 3), (4, 1)]);
    assert_eq!(all_of(call.query_places(0)), [[0, 0], [0, 1]]);
    assert_eq!(all_of(call.query_places(1)), [[0; 2]; 0]);
    assert_eq!(all_of(call.query_places(2)), [[0, 2], [0, 3], [0, 4], [0, 5]]);
    assert_eq!(all_of(call.key_places(1)), [[0, 5], [0, 6], [0, 7]]);
    assert_eq!((call.query_rows_of_no_sequence(), call.keys_of_no_sequence()), (6..7, 9..11));
    let stretches: Vec<_> = call.key_places(1).stretches(1..3).collect();
    assert_eq!(stretches, [Stretch { rows: 1..3, first: [0, 6] }]);
    assert_eq!(call.key_places(1).neighbours(), Some(Stretch { rows: 0..3, first: [0, 5] }));
    assert_eq!(call.query_places(1).neighbours(), Some(Stretch { rows: 0..0, first: [0, 2] }));
    assert_eq!(call.key_places(1).stretches(2..2).count(), 0);
    for rows in [0..4, 3..4] {
        assert!(std::panic::catch_unwind(|| call.key_places(1).stretches(rows).count()).is_err());
    }
    assert!(std::panic::catch_unwind(|| call.query_places(1).of(0)).is_err());
}

#[test]
fn a_query_row_is_found_where_its_place_is() {
    let problem = packed().build().unwrap();
    let keys = [0, 5, 8, 9];
    for queries in [[0, 2, 2, 6], [0, 0, 0, 7], [0, 3, 3, 3], [0, 0, 0, 0], [0, 1, 4, 7]] {
        let call = CallProblem::new(&problem, &starts(&queries, &keys)).unwrap();
        let mut found = [None; 7];
        for batch in 0..3 {
            for (row, [_, inner]) in all_of(call.query_places(batch)).into_iter().enumerate() {
                found[inner] = Some((batch, row));
            }
        }
        assert_eq!(std::array::from_fn(|row| call.query_at([0, row])), found, "{queries:?}");
        for batches in [0..3, 1..3, 0..2, 1..2, 2..2, 3..3] {
            let with: Vec<_> = batches.clone().filter(|&batch| call.query_len(batch) > 0).collect();
            assert_eq!(call.sequences_with_queries(batches).collect::<Vec<_>>(), with, "{queries:?}");
        }
    }
    let dense = Problem::builder(tokens(&[2, 3, 4, 8]), tokens(&[2, 5, 2, 8]), tokens(&[2, 5, 2, 8]));
    let lengths = [1i32, 3];
    let data = CallData { query_lengths: Some(View::from_slice(&lengths, [2]).unwrap()), ..PLAIN };
    let problem = dense.data(&data).build().unwrap();
    let call = CallProblem::new(&problem, &data).unwrap();
    let at = |outer: usize| [0, 1, 2].map(|inner| call.query_at([outer, inner]));
    assert_eq!(call.sequences_with_queries(0..2).collect::<Vec<_>>(), [0, 1]);
    assert_eq!(at(0), [Some((0, 0)), None, None]);
    assert_eq!(at(1), [Some((1, 0)), Some((1, 1)), Some((1, 2))]);
    // Without sequences there may be rows all the same.
    let none = Problem::builder(tokens(&[7, 4, 8]), tokens(&[11, 2, 8]), tokens(&[11, 2, 6]));
    let none = none.packed_queries(0, DType::I32).packed_keys(0, DType::I32).build().unwrap();
    let only = [0i32];
    let view = Some(View::from_slice(&only, [1]).unwrap());
    let data = CallData { query_starts: view, key_value_starts: view, ..PLAIN };
    assert_eq!(CallProblem::new(&none, &data).unwrap().query_at([0, 3]), None);
}

#[test]
fn lengths_leave_out_the_last_keys_of_a_packed_sequence() {
    let (queries, keys) = ([0, 3, 5, 7], [0, 5, 8, 9]);
    let (used, more) = ([2u32, 3, 0], [2u32, 4, 0]);
    let data = CallData {
        query_offset: QueryOffset::BottomRight,
        key_value_lengths: Some(View::from_slice(&used, [3]).unwrap()),
        ..starts(&queries, &keys)
    };
    let problem = packed().data(&data).build().unwrap();
    let call = CallProblem::new(&problem, &data).unwrap();
    // Of what takes part, not of what the tensors hold.
    assert_eq!([0, 1, 2].map(|batch| call.offset(batch)), [-1, 1, -2]);
    assert_eq!([0, 1, 2].map(|batch| call.key_value_len(batch)), [2, 3, 0]);
    assert_eq!([0, 1, 2].map(|batch| call.key_places(batch).rows()), [5, 3, 1]);
    let data = CallData { key_value_lengths: Some(View::from_slice(&more, [3]).unwrap()), ..data };
    let error = CallProblem::new(&problem, &data).unwrap_err();
    assert_eq!(error.to_string(), "sequence 1 has room for 3 keys, and its key/value length is 4");
    // One number for all sequences is compared with each of them.
    for (one, refused) in [(1u32, None), (2, Some(2)), (4, Some(1))] {
        let one = [one];
        let data = CallData { key_value_lengths: View::strided(&one, 0, [3], [0]).ok(), ..data };
        let problem = packed().data(&data).build().unwrap();
        let found = match CallProblem::new(&problem, &data) {
            Ok(_) => None,
            Err(InvalidCall::UsedKeysOutOfRange { batch, .. }) => Some(batch),
            Err(error) => panic!("{error}"),
        };
        assert_eq!(found, refused);
    }
}

#[test]
fn a_sequence_has_no_more_keys_than_its_row_of_the_table() {
    let pages = tokens(&[5, 4, 2, 8]);
    for (columns, stride) in [(2, 1), (2, 0), (0, 1)] {
        let table = [0i32, 1];
        let room = 4 * columns;
        let call = |length: usize, longest: Option<usize>| {
            let length = [length];
            let data = CallData {
                block_table: View::strided(&table, 0, [1, columns], [2, stride]).ok(),
                key_value_lengths: View::from_slice(&length, [1]).ok(),
                ..PLAIN
            };
            let problem = Problem::builder(tokens(&[1, 3, 4, 8]), pages, pages).data(&data);
            let problem = problem.longest(None, longest).build().unwrap();
            assert_eq!(CallProblem::at_bounds(&problem).key_value_len(0), room);
            CallProblem::new(&problem, &data).map(|call| call.key_places(0).rows())
        };
        for longest in [None, Some(100)] {
            assert_eq!(call(room, longest), Ok(room));
            let refused = InvalidCall::UsedKeysOutOfRange { batch: 0, length: room as i64 + 1, room };
            assert_eq!(call(room + 1, longest), Err(refused));
        }
    }
}

#[test]
fn one_row_of_a_table_for_all_sequences_is_looked_at_once() {
    // As many sequences as entries: each entry for each sequence would be 2^40 looks.
    let many = 1usize << 20;
    let mut table = vec![0i32; many];
    let lengths = vec![many as i32; many];
    let page = tokens(&[1, 1, 1, 8]);
    let refused = |table: &[i32]| {
        let data = CallData {
            block_table: View::strided(table, 0, [many, many], [0, 1]).ok(),
            key_value_lengths: View::from_slice(&lengths, [many]).ok(),
            ..PLAIN
        };
        let problem = Problem::builder(tokens(&[many, 0, 1, 8]), page, page).data(&data).build().unwrap();
        CallProblem::new(&problem, &data).err()
    };
    assert_eq!(refused(&table), None);
    table[many - 1] = 1;
    assert!(matches!(refused(&table), Some(InvalidCall::NoSuchPage { page: 1, .. })));
}

#[test]
fn keys_in_pages_are_where_the_table_says() {
    let pages = tokens(&[5, 4, 2, 8]);
    let table = [4i64, 1, -7, 1, 3, 0];
    let lengths = [6i32, 9];
    let data = CallData {
        block_table: Some(View::from_slice(&table, [2, 3]).unwrap()),
        key_value_lengths: Some(View::from_slice(&lengths, [2]).unwrap()),
        ..PLAIN
    };
    let query_starts = [0, 1, 6];
    let starts = CallData { query_starts: Some(View::from_slice(&query_starts, [3]).unwrap()), ..data };
    for (query, data) in [(tokens(&[2, 3, 4, 8]), data), (tokens(&[6, 4, 8]), starts)] {
        let problem = Problem::builder(query, pages, pages).data(&data).build().unwrap();
        assert_eq!(problem.dims().key_length, 12);
        assert_eq!(problem.key_layout(), RowLayout::Paged { page_size: 4 });
        let call = CallProblem::new(&problem, &data).unwrap();
        let places = all_of(call.key_places(0));
        assert_eq!(places, [[4, 0], [4, 1], [4, 2], [4, 3], [1, 0], [1, 1]]);
        let stretches: Vec<_> = call.key_places(1).stretches(3..9).collect();
        assert_eq!(
            stretches,
            [
                Stretch { rows: 3..4, first: [1, 3] },
                Stretch { rows: 4..8, first: [3, 0] },
                Stretch { rows: 8..9, first: [0, 0] },
            ]
        );
        assert!(call.keys_of_no_sequence().is_empty());
        assert_eq!([0, 1].map(|batch| call.key_places(batch).neighbours()), [None, None]);
    }
    // Of one page the rows are neighbours; without rows there is no page.
    for (lengths, expected) in
        [([4, 3], [4, 1].map(|page| Some([page, 0]))), ([1, 0], [Some([4, 0]), None]), ([5, 12], [None; 2])]
    {
        let table = [4i64, 1, 0, 1, 3, 0];
        let data = CallData {
            block_table: Some(View::from_slice(&table, [2, 3]).unwrap()),
            key_value_lengths: Some(View::from_slice(&lengths, [2]).unwrap()),
            ..PLAIN
        };
        let problem = Problem::builder(tokens(&[2, 3, 4, 8]), pages, pages).data(&data).build().unwrap();
        let call = CallProblem::new(&problem, &data).unwrap();
        for batch in [0, 1] {
            let rows = 0..lengths[batch] as usize;
            let expected = expected[batch].map(|first| Stretch { rows, first });
            assert_eq!(call.key_places(batch).neighbours(), expected);
        }
    }
}

#[test]
fn the_longest_sequence_is_given_or_that_of_a_mask_or_what_the_tensors_hold() {
    let lengths = |builder: ProblemBuilder| {
        let dims = builder.build().unwrap().dims();
        [dims.query_length, dims.key_length]
    };
    assert_eq!(lengths(packed()), [7, 11]);
    assert_eq!(lengths(packed().longest(3, None)), [3, 11]);
    assert_eq!(lengths(packed().longest(3, 4)), [3, 4]);
    let mask = |shape: &[usize]| TensorDesc::contiguous(DType::Bool, Dims::from_slice(shape).unwrap());
    assert_eq!(lengths(packed().mask(mask(&[3, 1, 5, 6]))), [5, 6]);
    assert_eq!(lengths(packed().mask(mask(&[6]))), [7, 6]);
    assert_eq!(lengths(packed().bias(tokens(&[5, 1])).mask(mask(&[6]))), [5, 6]);
    assert!(packed().longest(4, None).mask(mask(&[5, 1])).build().is_err());
    // What was found is found again, and the same where it was given.
    let problem = packed().mask(mask(&[3, 1, 5, 6])).build().unwrap();
    assert_eq!(problem.to_builder().build().unwrap(), problem);
    assert_eq!(packed().mask(mask(&[3, 1, 5, 6])).longest(5, 6).build().unwrap(), problem);
    // Dense sequences have no longest: one that was given for packed ones is forgotten with their starts.
    let dense = packed().longest(3, 4).data(&PLAIN).layout(Role::Query, tokens(&[3, 5, 4, 8]));
    let dense = dense.layout(Role::Key, tokens(&[3, 7, 2, 8])).layout(Role::Value, tokens(&[3, 7, 2, 6]));
    assert_eq!(lengths(dense), [5, 7]);
}

#[test]
fn packed_tensors_come_with_and_without_the_axis_in_front() {
    let query = vec![0.5f32; 7 * 4 * 8];
    let (key, value) = (vec![0.5f32; 11 * 2 * 8], vec![0.5f32; 11 * 2 * 6]);
    let (queries, keys) = ([0, 2, 2, 6], [0, 5, 8, 9]);
    let (mut out, mut lse) = (vec![0.0f32; 7 * 4 * 6], vec![0.0f32; 7 * 4]);
    let planned = packed().lse(true).build().unwrap();
    assert_eq!(planned.tensor(Role::Out).unwrap().shape(), [1, 7, 4, 6].into());
    assert_eq!(planned.tensor(Role::Lse).unwrap().shape(), [1, 7, 4].into());
    for front in [&[][..], &[1]] {
        let shape = |axes: &[usize]| Dims::from_slice(&[front, axes].concat()).unwrap();
        let inputs = Inputs {
            data: starts(&queries, &keys),
            ..Inputs::new(
                View::from_slice(&query, shape(&[7, 4, 8])).unwrap(),
                View::from_slice(&key, shape(&[11, 2, 8])).unwrap(),
                View::from_slice(&value, shape(&[11, 2, 6])).unwrap(),
            )
        };
        let problem = inputs.problem().lse(true).build().unwrap();
        assert_eq!(problem, planned);
        let outputs = ForwardOutputs {
            out: ViewMut::from_slice(&mut out, shape(&[7, 4, 6])).unwrap(),
            lse: Some(ViewMut::from_slice(&mut lse, shape(&[7, 4])).unwrap()),
        };
        let (call, inputs, outputs) = ForwardCall::new(&problem, inputs, outputs).unwrap().into_parts();
        assert_eq!(call.query_places(2).of(0), [0, 2]);
        assert_eq!(inputs.query.shape(), [1, 7, 4, 8].into());
        assert_eq!(outputs.out.shape(), [1, 7, 4, 6].into());
        assert_eq!(outputs.lse.unwrap().shape(), [1, 7, 4].into());
    }
}

#[test]
fn starts_that_repeat_one_number_are_all_zero() {
    // So many sequences that they cannot be looked at one by one.
    let none = [0i32];
    let sequences = 1usize << 40;
    let data = CallData {
        query_starts: Some(View::strided(&none, 0, [sequences + 1], [0]).unwrap()),
        key_value_starts: Some(View::strided(&none, 0, [sequences + 1], [0]).unwrap()),
        ..PLAIN
    };
    let builder = Problem::builder(tokens(&[7, 4, 8]), tokens(&[11, 2, 8]), tokens(&[11, 2, 6])).data(&data);
    let problem = builder.longest(1, 1).build().unwrap();
    let call = CallProblem::new(&problem, &data).unwrap();
    assert_eq!((call.query_len(sequences - 1), call.key_value_len(0)), (0, 0));
    assert_eq!((call.query_rows_of_no_sequence(), call.keys_of_no_sequence()), (0..7, 0..11));
}

#[test]
fn numbers_in_device_memory_leave_the_host_the_bounds() {
    let problem = packed().device(Device::Cuda(0)).longest(4, 5).build().unwrap();
    let call = CallProblem::at_bounds(&problem);
    assert_eq!((call.query_len(1), call.key_value_len(1)), (4, 5));
    assert!(std::panic::catch_unwind(|| call.query_places(0)).is_err());
}
