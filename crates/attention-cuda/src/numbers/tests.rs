use attention_core::{Alignment, CallData, DType, Device, OffsetRange, ProblemBuilder, TensorDesc, View};

use super::*;
use crate::layout::assert_laid_out;

fn builder(batch: usize) -> ProblemBuilder {
    let tokens = TensorDesc::contiguous(DType::Bf16, [batch, 8, 2, 32]);
    Problem::builder(tokens, tokens, tokens).device(Device::Cuda(0))
}

fn one(lengths: View<'_>) -> CallData<'_> {
    CallData { key_value_lengths: Some(lengths), ..CallData::default() }
}

fn both(lengths: View<'_>) -> CallData<'_> {
    CallData { query_lengths: Some(lengths), ..one(lengths) }
}

fn all(numbers: View<'_>) -> CallData<'_> {
    CallData { query_offsets: Some(numbers), ..both(numbers) }
}

fn with_numbers(batch: usize, data: &CallData<'_>) -> Problem {
    builder(batch).data(data).build().unwrap()
}

#[test]
fn the_argument_is_laid_out_as_in_the_kernel() {
    let text = attention_kernels::source(SOURCE).unwrap().text;
    assert_laid_out!(text, StoreNumbers: to, count, numbers);
}

#[test]
fn lengths_of_many_rows_and_offsets_by_row_are_stored() {
    let bytes = |problem: &Problem| StoredNumbers::of(problem).bytes().unwrap();
    let of = |batch: usize, by_row: fn(View<'_>) -> CallData<'_>| {
        let numbers = vec![3i64; batch];
        bytes(&with_numbers(batch, &by_row(View::from_slice(&numbers, [batch]).unwrap())))
    };
    assert_eq!([0, 1, 64, 65, 100].map(|batch| of(batch, one)), [0, 0, 0, 65 * 8, 100 * 8]);
    assert_eq!([64, 65].map(|batch| of(batch, both)), [0, 65 * 16]);
    assert_eq!([0, 1, 2, 64, 65].map(|batch| of(batch, all)), [0, 0, 2 * 8, 64 * 8, 65 * 24]);
    // What is in device memory is read there, and one number for all rows is a part of the parameters.
    let on_device = builder(100).query_lengths(DType::I32).key_value_lengths(DType::I64);
    let on_device = on_device.query_offsets(OffsetRange::Any, DType::U32).build().unwrap();
    assert_eq!(bytes(&on_device), 0);
    assert_eq!(bytes(&builder(100).alignment(Alignment::Offset(OffsetRange::Any)).build().unwrap()), 0);
    assert_eq!(bytes(&builder(100).alignment(Alignment::BottomRight).build().unwrap()), 0);
}

#[test]
fn numbers_follow_each_other_in_as_many_launches_as_they_need() {
    let lengths: Vec<i32> = (0..300).map(|batch| batch % 9).collect();
    let offsets: Vec<i64> = (0..300).map(|batch| 10 * batch - 5).collect();
    let data = CallData {
        key_value_lengths: Some(View::from_slice(&lengths, [300]).unwrap()),
        query_offsets: Some(View::from_slice(&offsets, [300]).unwrap()),
        ..CallData::default()
    };
    let problem = with_numbers(300, &data);
    let call = CallProblem::new(&problem, &data).unwrap();
    let stored = StoredNumbers::of(&problem);
    let places: Vec<(Role, u64)> = stored.places(64).collect();
    assert_eq!(places, [(Role::KeyValueLengths, 64), (Role::QueryOffsets, 64 + 2400)]);
    let launches = stored.launches(&call, 64);
    let heads: Vec<(u64, i64)> = launches.iter().map(|launch| (launch.to, launch.count)).collect();
    assert_eq!(heads, [(64, 256), (64 + 2048, 256), (64 + 4096, 88)]);
    let all: Vec<i64> =
        launches.iter().flat_map(|launch| launch.numbers[..launch.count as usize].to_vec()).collect();
    let expected: Vec<i64> = lengths.iter().map(|&length| length.into()).chain(offsets).collect();
    assert_eq!(all, expected);
    assert_eq!(all.len() * 8, stored.bytes().unwrap());
}

#[test]
fn numbers_that_are_alike_are_not_stored() {
    let lengths = [5i32; 100];
    let data =
        CallData { query_lengths: Some(View::from_slice(&lengths, [100]).unwrap()), ..CallData::default() };
    let problem = with_numbers(100, &data);
    let call = CallProblem::new(&problem, &data).unwrap();
    // The plan has room for those of a call that differ.
    assert_eq!(StoredNumbers::of(&problem).bytes(), Some(800));
    assert!(StoredNumbers::of(&problem).launches(&call, 0).is_empty());
}

/// Scales of heads are stored whether or not batch rows differ, and that of all heads is a part of the
/// parameters.
#[test]
fn scales_of_heads_are_stored() {
    let query = TensorDesc::contiguous(DType::Bf16, [3, 8, 4, 32]);
    let key = TensorDesc::contiguous(DType::F8E4M3, [3, 8, 2, 32]);
    let (of_all, of_heads, of_each) = ([3.5f32], [0.5f32, -2.0], [1.0f32, 2.0, 3.0, 4.0, 5.0, 6.0]);
    let bits = |scales: &[f32]| scales.iter().map(|scale| i64::from(scale.to_bits())).collect::<Vec<_>>();
    for lengths in [[8i32; 3], [0, 1, 2]] {
        let data = CallData {
            key_scales: Some(View::from_slice(&of_each, [3, 2]).unwrap()),
            value_scales: Some(View::from_slice(&of_heads, [2]).unwrap()),
            key_value_lengths: Some(View::from_slice(&lengths, [3]).unwrap()),
            ..CallData::default()
        };
        let problem = Problem::builder(query, key, key).device(Device::Cuda(0)).data(&data).build().unwrap();
        let call = CallProblem::new(&problem, &data).unwrap();
        let stored = StoredNumbers::of(&problem);
        assert_eq!(stored.bytes(), Some((6 + 2) * 8));
        let places: Vec<(Role, u64)> = stored.places(64).collect();
        assert_eq!(places, [(Role::KeyScales, 64), (Role::ValueScales, 64 + 48)]);
        let launches = stored.launches(&call, 64);
        assert_eq!(launches.len(), 1);
        let all = &launches[0].numbers[..launches[0].count as usize];
        assert_eq!(all, [bits(&of_each), bits(&of_heads)].concat());
    }
    let data = CallData { key_scales: Some(View::from_slice(&of_all, [1]).unwrap()), ..CallData::default() };
    let problem = Problem::builder(query, key, key).device(Device::Cuda(0)).data(&data).build().unwrap();
    assert_eq!(StoredNumbers::of(&problem).bytes(), Some(0));
}

#[test]
fn starts_and_the_entries_that_keys_need_are_stored() {
    let (starts, lengths) = ([0i64, 2, 2, 5], [5i32, 0, 8]);
    let table = [1i32, 3, -1, -1, -1, -1, 0, 2, -1];
    let query = TensorDesc::contiguous(DType::F16, [7, 4, 16]);
    let pages = TensorDesc::contiguous(DType::F16, [4, 4, 2, 16]);
    let data = CallData {
        query_starts: Some(View::from_slice(&starts, [4]).unwrap()),
        key_value_lengths: Some(View::from_slice(&lengths, [3]).unwrap()),
        block_table: Some(View::from_slice(&table, [3, 3]).unwrap()),
        ..CallData::default()
    };
    let problem = Problem::builder(query, pages, pages).device(Device::Cuda(0)).data(&data).build().unwrap();
    let call = CallProblem::new(&problem, &data).unwrap();
    let stored = StoredNumbers::of(&problem);
    assert_eq!(stored.bytes(), Some((4 + 9) * 8));
    let places: Vec<(Role, u64)> = stored.places(64).collect();
    assert_eq!(places, [(Role::QueryStarts, 64), (Role::BlockTable, 64 + 32)]);
    let launches = stored.launches(&call, 64);
    let numbers = &launches[0].numbers[..launches[0].count as usize];
    assert_eq!(numbers, [0, 2, 2, 5, 1, 3, 0, 0, 0, 0, 0, 2, 0]);
    assert_eq!(launches.len(), 1);
}
