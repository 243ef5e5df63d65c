//! Packed and paged calls that are wrong, which must be refused with a typed error before anything runs.

use std::panic::{AssertUnwindSafe, catch_unwind};

use attention_core::{
    CallProblem, DType, Dimensions, Gradients, InvalidCall, Problem, ProblemBuilder, Role, TensorDesc,
};

use crate::cases::{Layout, Numbers};
use crate::rng::Rng;
use crate::tensor::HostTensor;

/// The rows of the packed queries, and of the packed keys.
const ROWS: usize = 6;
/// The pages, and the slots of each.
const PAGES: usize = 3;
const PAGE_SIZE: usize = 4;
/// The sequences.
const BATCH: usize = 2;

fn integers(dtype: DType, numbers: &[i64]) -> Option<HostTensor> {
    Some(HostTensor::from_integers(dtype, [numbers.len()], Layout::Contiguous, |index| numbers[index]))
}

fn table(dtype: DType, entries: [i64; 4]) -> Option<HostTensor> {
    Some(HostTensor::from_integers(dtype, [BATCH, 2], Layout::Contiguous, |index| entries[index]))
}

/// Two sequences, whose queries and keys are packed, and their numbers.
fn packed(dtype: DType) -> (ProblemBuilder, Numbers) {
    let d = Dimensions { query_heads: 2, key_heads: 1, ..crate::cases::dims([1, ROWS, ROWS, 2, 1, 4]) };
    let builder = d.problem(dtype).packed_queries(BATCH, DType::I64).packed_keys(BATCH, DType::I64);
    let starts = || integers(DType::I64, &[0, 2, 5]);
    (builder, Numbers { query_starts: starts(), key_value_starts: starts(), ..Numbers::default() })
}

/// Two sequences with keys in pages, and their numbers.
fn paged(dtype: DType) -> (ProblemBuilder, Numbers) {
    let query = TensorDesc::contiguous(dtype, [BATCH, 3, 2, 4]);
    let pages = TensorDesc::contiguous(dtype, [PAGES, PAGE_SIZE, 1, 4]);
    let builder = Problem::builder(query, pages, pages).paged(BATCH, 2, DType::I32);
    let numbers = Numbers {
        block_table: table(DType::I32, [2, 0, 1, -1]),
        key_value_lengths: integers(DType::I32, &[7, 3]),
        ..Numbers::default()
    };
    (builder, numbers)
}

type Call = (ProblemBuilder, Numbers);
/// What is wrong with a call, by the call that it is made of, by how it is made so, and by the error that
/// says so.
type Mistake = (&'static str, fn(DType) -> Call, fn(Call) -> Call, fn(&InvalidCall) -> bool);

/// With other starts of the queries.
fn starting((builder, mut numbers): Call, starts: &[i64]) -> Call {
    numbers.query_starts = integers(DType::I64, starts);
    (builder, numbers)
}

/// With lengths of the keys, of this dtype.
fn of_lengths((builder, mut numbers): Call, dtype: DType, lengths: &[i64]) -> Call {
    numbers.key_value_lengths = integers(dtype, lengths);
    (builder.layout(Role::KeyValueLengths, TensorDesc::contiguous(dtype, [BATCH])), numbers)
}

/// With another problem.
fn built((builder, numbers): Call, build: impl FnOnce(ProblemBuilder) -> ProblemBuilder) -> Call {
    (build(builder), numbers)
}

fn with_table((builder, mut numbers): Call, entries: [i64; 4]) -> Call {
    numbers.block_table = table(DType::I32, entries);
    (builder, numbers)
}

fn is_start(error: &InvalidCall) -> bool {
    matches!(error, InvalidCall::StartOutOfRange { .. })
}

fn is_used(error: &InvalidCall) -> bool {
    matches!(error, InvalidCall::UsedKeysOutOfRange { .. })
}

fn is_combination(error: &InvalidCall) -> bool {
    matches!(error, InvalidCall::Sequences { .. })
}

fn is_shape(error: &InvalidCall) -> bool {
    matches!(error, InvalidCall::Shape { .. })
}

const MISTAKES: [Mistake; 32] = [
    ("starts that fall", packed, |call| starting(call, &[0, 3, 2]), is_start),
    ("a first start above 0", packed, |call| starting(call, &[1, 2, 5]), is_start),
    ("a first start below 0", packed, |call| starting(call, &[-1, 2, 5]), is_start),
    ("a negative start", packed, |call| starting(call, &[0, -2, 5]), is_start),
    ("a start behind the last row", packed, |call| starting(call, &[0, 2, ROWS as i64 + 1]), is_start),
    ("a start far behind the last row", packed, |call| starting(call, &[0, i64::MAX, i64::MAX]), is_start),
    ("the least start", packed, |call| starting(call, &[0, i64::MIN, 5]), is_start),
    (
        "starts of keys that fall",
        packed,
        |(builder, mut numbers)| {
            numbers.key_value_starts = integers(DType::I64, &[0, 4, 3]);
            (builder, numbers)
        },
        is_start,
    ),
    (
        "a sequence that is too long",
        packed,
        |call| built(call, |builder| builder.longest(2, None)),
        |error| matches!(error, InvalidCall::SequenceTooLong { .. }),
    ),
    (
        "keys of a sequence that is too long",
        packed,
        |call| built(call, |builder| builder.longest(None, 1)),
        |error| matches!(error, InvalidCall::SequenceTooLong { .. }),
    ),
    (
        "more starts than announced",
        packed,
        |call| starting(call, &[0, 2, 5, 5]),
        |error| matches!(error, InvalidCall::NotAsInProblem { role: Role::QueryStarts, .. }),
    ),
    (
        "starts of another dtype",
        packed,
        |(builder, mut numbers)| {
            numbers.query_starts = integers(DType::I32, &[0, 2, 5]);
            (builder, numbers)
        },
        |error| matches!(error, InvalidCall::NotAsInProblem { role: Role::QueryStarts, .. }),
    ),
    (
        "no starts",
        packed,
        |(builder, mut numbers)| {
            numbers.query_starts = None;
            (builder, numbers)
        },
        |error| matches!(error, InvalidCall::Missing { role: Role::QueryStarts }),
    ),
    (
        "no starts of keys",
        packed,
        |(builder, mut numbers)| {
            numbers.key_value_starts = None;
            (builder, numbers)
        },
        |error| matches!(error, InvalidCall::Missing { role: Role::KeyValueStarts }),
    ),
    ("a length above a sequence's keys", packed, |call| of_lengths(call, DType::I32, &[3, 3]), is_used),
    ("a length below 0", packed, |call| of_lengths(call, DType::I32, &[1, -1]), is_used),
    ("a length far above all keys", packed, |call| of_lengths(call, DType::I64, &[1, i64::MAX]), is_used),
    (
        "lengths of no problem",
        packed,
        |(builder, mut numbers)| {
            numbers.key_value_lengths = integers(DType::I32, &[1, 1]);
            (builder, numbers)
        },
        |error| matches!(error, InvalidCall::Unexpected { role: Role::KeyValueLengths }),
    ),
    (
        "starts of other numbers of sequences",
        packed,
        |call| built(call, |b| b.packed_keys(3, DType::I64)),
        is_shape,
    ),
    (
        "starts that are floats",
        packed,
        |call| built(call, |builder| builder.packed_queries(BATCH, DType::F32)),
        |error| matches!(error, InvalidCall::DType { role: Role::QueryStarts, .. }),
    ),
    (
        "starts of two axes",
        packed,
        |call| {
            let starts = TensorDesc::contiguous(DType::I64, [BATCH + 1, 1]);
            built(call, |builder| builder.layout(Role::QueryStarts, starts))
        },
        |error| matches!(error, InvalidCall::Rank { role: Role::QueryStarts, .. }),
    ),
    (
        "query lengths of packed queries",
        packed,
        |call| built(call, |builder| builder.query_lengths(DType::I32)),
        is_combination,
    ),
    (
        "keys that are packed and in pages",
        packed,
        |call| built(call, |builder| builder.paged(BATCH, 2, DType::I32)),
        is_combination,
    ),
    (
        "packed keys with dense queries",
        |dtype| {
            let d = crate::cases::dims([1, ROWS, ROWS, 2, 1, 4]);
            (d.problem(dtype).packed_keys(1, DType::I64), Numbers::default())
        },
        |call| call,
        is_combination,
    ),
    (
        "packed queries with dense keys of no lengths",
        |dtype| {
            let d = crate::cases::dims([1, ROWS, ROWS, 2, 1, 4]);
            (d.problem(dtype).packed_queries(1, DType::I64), Numbers::default())
        },
        |call| call,
        is_combination,
    ),
    (
        "a page behind the last",
        paged,
        |call| with_table(call, [2, PAGES as i64, 1, -1]),
        |error| matches!(error, InvalidCall::NoSuchPage { batch: 0, index: 1, page: 3, pages: PAGES }),
    ),
    (
        "a needed page of -1",
        paged,
        |call| with_table(call, [2, 0, -1, 1]),
        |error| matches!(error, InvalidCall::NoSuchPage { batch: 1, index: 0, page: -1, .. }),
    ),
    ("a length above the table", paged, |call| of_lengths(call, DType::I32, &[9, 3]), is_used),
    ("a negative length in pages", paged, |call| of_lengths(call, DType::I32, &[7, -3]), is_used),
    (
        "no table",
        paged,
        |(builder, mut numbers)| {
            numbers.block_table = None;
            (builder, numbers)
        },
        |error| matches!(error, InvalidCall::Missing { role: Role::BlockTable }),
    ),
    ("a table of other sequences", paged, |call| built(call, |b| b.paged(3, 2, DType::I32)), is_shape),
    (
        "gradients of keys in pages",
        paged,
        |call| built(call, |builder| builder.gradients(Gradients::QKV)),
        is_combination,
    ),
];

/// Makes some mistakes in calls of packed and paged sequences. The number of them, or the one that was not
/// refused rightly.
pub(super) fn calls(dtype: DType, rng: &mut Rng) -> Result<usize, String> {
    let count = 4;
    (0..count).try_for_each(|_| refused(&MISTAKES[rng.below(MISTAKES.len())], dtype)).map(|()| count)
}

/// Makes every mistake.
#[cfg(test)]
pub(super) fn all(dtype: DType) -> Result<(), String> {
    for call in [packed, paged] {
        let (builder, numbers) = call(dtype);
        let problem = builder.build().map_err(|error| error.to_string())?;
        CallProblem::new(&problem, &numbers.data()).map_err(|error| error.to_string())?;
    }
    MISTAKES.iter().try_for_each(|mistake| refused(mistake, dtype))
}

fn refused((what, call, spoil, is_right): &Mistake, dtype: DType) -> Result<(), String> {
    let attempt = || {
        let (builder, numbers) = spoil(call(dtype));
        let problem = builder.build()?;
        CallProblem::new(&problem, &numbers.data()).map(|_| ())
    };
    match catch_unwind(AssertUnwindSafe(attempt)) {
        Ok(Err(error)) if is_right(&error) => Ok(()),
        Ok(Err(error)) => Err(format!("{what} is refused as something else: {error}")),
        Ok(Ok(())) => Err(format!("{what} is accepted in {dtype}")),
        Err(_) => Err(format!("{what} panics in {dtype}")),
    }
}
