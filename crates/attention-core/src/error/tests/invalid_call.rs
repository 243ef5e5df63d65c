//! [`InvalidCall`]: every variant through the public API.

#![allow(unsafe_code)]

use std::collections::HashSet;

use super::{assert_all_seen, variants};
use crate::{
    Alignment, BackwardCall, BackwardInputs, BackwardOutputs, CallData, CallProblem, DType, Device, Dims,
    Dropout, Error, ForwardCall, ForwardOutputs, Gradients, Inputs, InvalidCall, OffsetRange, Plan, Problem,
    ProblemBuilder, QueryOffset, Role, Scratch, ScratchBuffer, Strides, TensorDesc, View, ViewMut,
};

variants!(
    InvalidCall, NAMES, name_of:
    Rank, RankTooLarge, StridesRank, Shape, NotBroadcastable, DType, HeadsNotDivisible, ZeroHeadDim,
    NotFinite, SoftcapNotPositive, DropoutRate, DropoutCounter, NotOrdinaryScale, OffsetOutOfRange, OtherData,
    LengthOutOfRange, Sequences, StartOutOfRange, SequenceTooLong, UsedKeysOutOfRange, NoSuchPage,
    EightBitGradients, ScalesWithoutEightBit, ScaleNotFinite, Overflow,
    BufferTooSmall, BufferLength, Pointer, ViewIndex, SelfOverlap, Overlap, Device, Missing, Unexpected,
    NotAsInProblem, WrongPass, OtherProblem, GradientWithoutTensor, NoGradient, ScratchTooSmall,
    ScratchMisaligned, ScratchDevice,
);

type Case = (InvalidCall, &'static str);

fn desc(shape: impl Into<Dims>) -> TensorDesc {
    TensorDesc::contiguous(DType::F32, shape)
}

fn typed(dtype: DType, shape: impl Into<Dims>) -> TensorDesc {
    TensorDesc::contiguous(dtype, shape)
}

/// B = 2, T = 3, S = 5, N = 4, K = 2, H = 8, Hv = 6.
fn problem() -> ProblemBuilder {
    Problem::builder(desc([2, 3, 4, 8]), desc([2, 5, 2, 8]), desc([2, 5, 2, 6]))
}

fn refused(builder: ProblemBuilder) -> InvalidCall {
    builder.build().unwrap_err()
}

fn of(query: TensorDesc, key: TensorDesc, value: TensorDesc) -> InvalidCall {
    refused(Problem::builder(query, key, value))
}

/// Query, key and value that fit.
fn fitting() -> [TensorDesc; 3] {
    [desc([2, 3, 4, 8]), desc([2, 5, 2, 8]), desc([2, 5, 2, 6])]
}

fn of_ranks_and_shapes() -> Vec<Case> {
    let [query, key, value] = fitting();
    vec![
        (of(desc([3, 4, 8]), key, value), "query has rank 3 (shape [3, 4, 8]), expected rank 4"),
        (of(query, desc([5, 8]), value), "key has rank 2 (shape [5, 8]), expected rank 4"),
        (of(query, key, desc([])), "value has rank 0 (shape []), expected rank 4"),
        (refused(problem().sinks(desc([1, 4]))), "sinks has rank 2 (shape [1, 4]), expected rank 1"),
        (
            refused(problem().alibi_slopes(desc([2, 4, 1]))),
            "ALiBi slopes has rank 3 (shape [2, 4, 1]), expected rank 1 or 2",
        ),
        (refused(problem().bias(desc([]))), "bias has rank 0 (shape []), expected rank 1 to 4"),
        (
            refused(problem().layout(Role::Out, desc([3, 4, 6]))),
            "out has rank 3 (shape [3, 4, 6]), expected rank 4",
        ),
        (
            refused(problem().lse(true).layout(Role::Lse, desc([2, 3, 4, 1]))),
            "lse has rank 4 (shape [2, 3, 4, 1]), expected rank 3",
        ),
        (
            of(query, desc([1, 5, 2, 8]), value),
            "key has shape [1, 5, 2, 8], expected [2, 5, 2, 8] ([B, S, K, H]; B and H of the query)",
        ),
        (
            of(query, desc([2, 5, 2, 7]), value),
            "key has shape [2, 5, 2, 7], expected [2, 5, 2, 8] ([B, S, K, H]; B and H of the query)",
        ),
        (
            of(query, key, desc([2, 4, 2, 6])),
            "value has shape [2, 4, 2, 6], expected [2, 5, 2, 6] ([B, S, K, Hv]; B, S and K of the key)",
        ),
        (refused(problem().sinks(desc([3]))), "sinks has shape [3], expected [4] ([N])"),
        (refused(problem().alibi_slopes(desc([2]))), "ALiBi slopes has shape [2], expected [4] ([N])"),
        (
            refused(problem().alibi_slopes(desc([1, 4]))),
            "ALiBi slopes has shape [1, 4], expected [2, 4] ([B, N])",
        ),
        (
            refused(problem().layout(Role::Out, query)),
            "out has shape [2, 3, 4, 8], expected [2, 3, 4, 6] ([B, T, N, Hv])",
        ),
        (
            refused(problem().gradients(Gradients::KEY).layout(Role::DKey, query)),
            "dk has shape [2, 3, 4, 8], expected [2, 5, 2, 8] (that of the key)",
        ),
        (
            refused(problem().mask(typed(DType::Bool, [2, 4, 3, 4]))),
            "mask of shape [2, 4, 3, 4] does not broadcast to [2, 4, 3, 5] ([B, N, T, S]): \
             axis 3 must be 1 or 5, is 4",
        ),
        (
            refused(problem().bias(desc([2, 1, 5]))),
            "bias of shape [2, 1, 5] does not broadcast to [2, 4, 3, 5] ([B, N, T, S]): \
             axis 0 must be 1 or 4, is 2",
        ),
        (
            refused(Problem::builder(desc([2, 1, 4, 8]), key, value).bias(desc([7, 5]))),
            "bias of shape [7, 5] does not broadcast to [2, 4, 1, 5] ([B, N, T, S]): axis 0 must be 1, is 7",
        ),
        (of(desc([2, 3, 5, 8]), key, value), "5 query heads are not a multiple of 2 key/value heads"),
        (
            of(query, desc([2, 5, 0, 8]), desc([2, 5, 0, 6])),
            "4 query heads are not a multiple of 0 key/value heads",
        ),
        (of(desc([2, 3, 1, 8]), key, value), "1 query head is not a multiple of 2 key/value heads"),
        (
            of(desc([2, 3, 4, 0]), desc([2, 5, 2, 0]), value),
            "query has head dimension 0 (shape [2, 3, 4, 0]), expected at least 1",
        ),
        (
            of(query, key, desc([2, 5, 2, 0])),
            "value has head dimension 0 (shape [2, 5, 2, 0]), expected at least 1",
        ),
    ]
}

/// Keys and values of 8 bits, and their scales.
fn of_eight_bits() -> Vec<Case> {
    let [query, key, value] = fitting();
    let [key8, value8] = [[2, 5, 2, 8], [2, 5, 2, 6]].map(|shape| typed(DType::F8E4M3, shape));
    let problem8 = || Problem::builder(query, key8, value8);
    let with = |shape: &[usize]| refused(problem8().key_scales(desc(Dims::from_slice(shape).unwrap())));
    let numbers = [1.0f32, f32::NAN];
    let data = CallData { key_scales: View::from_slice(&numbers, [2]).ok(), ..CallData::default() };
    let scaled = problem8().key_scales(desc([2])).build().unwrap();
    vec![
        (of(query, key8, value), "value has dtype f32, expected f8e4m3 as the key has"),
        (of(query, key, value8), "value has dtype f8e4m3, expected f32 as the query has"),
        (
            of(query, key8, typed(DType::F8E5M2, [2, 5, 2, 6])),
            "value has dtype f8e5m2, expected f8e4m3 as the key has",
        ),
        (refused(problem8().gradients(Gradients::QUERY)), "keys and values of f8e4m3 have no backward pass"),
        (
            refused(problem().value_scales(desc([1]))),
            "value scales are for a value of 8 bits, and the value has dtype f32",
        ),
        (
            refused(problem8().value_scales(typed(DType::F16, [1]))),
            "value scales has dtype f16, expected f32",
        ),
        (
            with(&[3]),
            "key scales has shape [3], expected [2] ([K], one for each key/value head; or [1], [B, K])",
        ),
        (
            with(&[2, 1]),
            "key scales has shape [2, 1], expected [2, 2] ([B, K], one for each head of each sequence; or [1], [K])",
        ),
        (with(&[2, 2, 1]), "key scales has rank 3 (shape [2, 2, 1]), expected rank 0, 1 or 2"),
        (
            CallProblem::new(&scaled, &data).unwrap_err(),
            "key scales have NaN at [1], expected finite numbers",
        ),
        (
            CallProblem::new(&scaled, &CallData::default()).unwrap_err(),
            "the problem has key scales, the call was given none",
        ),
        (
            CallProblem::new(&problem8().build().unwrap(), &data).unwrap_err(),
            "the call was given key scales, the problem has none: build it from the inputs that have it (`Inputs::problem`)",
        ),
    ]
}

fn of_dtypes() -> Vec<Case> {
    let [query, key, value] = fitting();
    vec![
        (
            of(typed(DType::F8E4M3, [2, 3, 4, 8]), key, value),
            "query has dtype f8e4m3, expected f64, f32, f16 or bf16",
        ),
        (
            of(query, typed(DType::F16, [2, 5, 2, 8]), value),
            "key has dtype f16, expected f32 as the query has",
        ),
        (
            of(query, key, typed(DType::F64, [2, 5, 2, 6])),
            "value has dtype f64, expected f32 as the query has",
        ),
        (
            refused(problem().mask(desc([3, 5]))),
            "mask has dtype f32, expected bool, true where a key takes part (an additive mask of floats is a bias: give it as \
             one, or make booleans of finite minimum values with `conventions`; numbers that say 1 or 0 are compared with 0 first)",
        ),
        (
            refused(problem().bias(typed(DType::Bool, [3, 5]))),
            "bias has dtype bool, expected f64, f32, f16 or bf16",
        ),
        (
            refused(problem().alibi_slopes(typed(DType::Bool, [4]))),
            "ALiBi slopes has dtype bool, expected f64, f32, f16 or bf16",
        ),
        (
            refused(problem().sinks(typed(DType::F8E5M2, [4]))),
            "sinks has dtype f8e5m2, expected f64, f32, f16 or bf16",
        ),
        (
            refused(problem().layout(Role::Out, typed(DType::F16, [2, 3, 4, 6]))),
            "out has dtype f16, expected f32",
        ),
        (
            refused(problem().lse(true).layout(Role::Lse, typed(DType::F64, [2, 3, 4]))),
            "lse has dtype f64, expected f32",
        ),
    ]
}

fn of_options() -> Vec<Case> {
    let row = |length: usize| desc([1, length, 1, 1]);
    let many = desc([1 << 16, 1, 1, 1]);
    let huge = 1 << 40;
    vec![
        (
            refused(problem().dropout_rate(1.0)),
            "dropout rate is 1, expected 0 <= rate < 1 - 2^-17 (it is applied in steps of 1/65536)",
        ),
        (
            refused(problem().dropout_rate(f64::NAN)),
            "dropout rate is NaN, expected 0 <= rate < 1 - 2^-17 (it is applied in steps of 1/65536)",
        ),
        (
            refused(Problem::builder(row(1 << 32), row(1), row(1)).dropout_rate(0.5)),
            "dropout numbers query rows T with 32 bits, 4294967296 does not fit",
        ),
        (
            refused(Problem::builder(row(1), row(1 << 32), row(1 << 32)).dropout_rate(0.5)),
            "dropout numbers keys S with 32 bits, 4294967296 does not fit",
        ),
        (
            refused(Problem::builder(desc([1 << 16, 0, 1 << 16, 1]), many, many).dropout_rate(0.5)),
            "dropout numbers batch rows times heads B*N with 32 bits, 4294967296 does not fit",
        ),
        (
            refused(problem().layout(Role::QueryLengths, typed(DType::I32, [1]))),
            "query lengths has shape [1], expected [2] ([B])",
        ),
        (
            refused(problem().layout(Role::KeyValueLengths, typed(DType::I64, [3]))),
            "key/value lengths has shape [3], expected [2] ([B])",
        ),
        (
            refused(problem().dropout_rate(0.5).layout(Role::DropoutSeed, typed(DType::I64, [2]))),
            "dropout seed has shape [2], expected [1] ([1])",
        ),
        (
            refused(problem().layout(Role::QueryLengths, typed(DType::I32, []))),
            "query lengths has rank 0 (shape []), expected rank 1",
        ),
        (
            refused(problem().layout(Role::KeyValueLengths, typed(DType::U32, [1, 2]))),
            "key/value lengths has rank 2 (shape [1, 2]), expected rank 1",
        ),
        (
            refused(problem().query_lengths(DType::F32)),
            "query lengths has dtype f32, expected i32, u32 or i64",
        ),
        (
            refused(problem().alignment(Alignment::Offsets(OffsetRange::Near))),
            "the problem has query offsets, the call was given none",
        ),
        (
            refused(problem().layout(Role::QueryOffsets, typed(DType::I32, [2]))),
            "the call was given query offsets, the problem has none: build it from the inputs that have it \
             (`Inputs::problem`)",
        ),
        (
            refused(problem().layout(Role::DropoutOffset, typed(DType::I32, [1]))),
            "the call was given dropout offset, the problem has none: build it from the inputs that have it \
             (`Inputs::problem`)",
        ),
        (
            of(row(huge), row(huge), row(huge)),
            "the logits [B, N, T, S] of shape [1, 1, 1099511627776, 1099511627776] overflows the address space",
        ),
        (
            of(desc([1, huge, 1, huge]), desc([1, 1, 1, huge]), row(1)),
            "query of shape [1, 1099511627776, 1, 1099511627776] overflows the address space",
        ),
        (refused(problem().gradients(Gradients::BIAS)), "dbias was asked for, the problem has no bias"),
        (
            refused(problem().gradients(Gradients::QKV | Gradients::SINKS)),
            "dsinks was asked for, the problem has no sinks",
        ),
        (refused(problem().gradients(Gradients::NONE)), "no gradient was asked for"),
        (
            refused(
                problem().layout(
                    Role::Out,
                    TensorDesc::strided(DType::F32, [2, 3, 4, 6], [72, 24, 0, 1]).unwrap(),
                ),
            ),
            "output of shape [2, 3, 4, 6] and strides [72, 24, 0, 1] overlaps itself",
        ),
    ]
}

/// What is refused of packed and paged sequences.
fn of_sequences() -> Vec<Case> {
    let tokens = |shape: &[usize]| desc(Dims::from_slice(shape).unwrap());
    let dense = || Problem::builder(tokens(&[2, 3, 4, 8]), tokens(&[2, 5, 2, 8]), tokens(&[2, 5, 2, 8]));
    let packed = || {
        let builder = Problem::builder(tokens(&[6, 4, 8]), tokens(&[9, 2, 8]), tokens(&[9, 2, 8]));
        builder.packed_queries(2, DType::I32).packed_keys(2, DType::I32)
    };
    let pages = |size: usize| {
        let pages = tokens(&[7, size, 2, 8]);
        Problem::builder(tokens(&[2, 3, 4, 8]), pages, pages)
    };
    let refused = |builder: ProblemBuilder| builder.build().unwrap_err();
    let call = |builder: ProblemBuilder, queries: [i32; 3], keys: [i32; 3]| {
        let data = CallData {
            query_starts: Some(View::from_slice(&queries, [3]).unwrap()),
            key_value_starts: Some(View::from_slice(&keys, [3]).unwrap()),
            ..CallData::default()
        };
        CallProblem::new(&builder.build().unwrap(), &data).unwrap_err()
    };
    let paged = |table: [i32; 6], lengths: [i32; 2]| {
        let data = CallData {
            block_table: Some(View::from_slice(&table, [2, 3]).unwrap()),
            key_value_lengths: Some(View::from_slice(&lengths, [2]).unwrap()),
            ..CallData::default()
        };
        CallProblem::new(&pages(4).paged(2, 3, DType::I32).build().unwrap(), &data).unwrap_err()
    };
    vec![
        (refused(dense().packed_keys(2, DType::I32)), "packed keys need packed queries"),
        (
            refused(packed().paged(2, 3, DType::I32)),
            "keys are packed (key/value starts) or in pages (block table), not both",
        ),
        (
            refused(packed().query_lengths(DType::I32)),
            "packed queries have no query lengths, their starts say how long a sequence is",
        ),
        (
            refused(pages(4).layout(Role::BlockTable, TensorDesc::contiguous(DType::I32, [2, 3]))),
            "keys in pages need key/value lengths",
        ),
        (
            refused(pages(4).paged(2, 3, DType::I32).gradients(Gradients::QKV)),
            "keys in pages have no backward pass: sequences may share a page",
        ),
        (refused(pages(0).paged(2, 3, DType::I32)), "a page has at least one row"),
        (
            refused(dense().longest(3, None)),
            "only packed queries have a longest sequence, others have their tensor's length",
        ),
        (
            refused(dense().longest(None, 5)),
            "only packed or paged keys have a longest sequence, others have their tensor's length",
        ),
        (
            refused(pages(4).paged(2, usize::MAX / 2, DType::I32)),
            "keys of a sequence of shape [9223372036854775807, 4] overflows the address space",
        ),
        (
            refused(packed().layout(Role::Key, tokens(&[2, 9, 2, 8]))),
            "key has rank 4 (shape [2, 9, 2, 8]), expected rank 3",
        ),
        (
            refused(packed().layout(Role::Value, tokens(&[8, 2, 8]))),
            "value has shape [1, 8, 2, 8], expected [1, 9, 2, 8] ([1, total, K, Hv]; total and K of the key)",
        ),
        (
            refused(pages(4).paged(3, 3, DType::I32)),
            "query has shape [2, 3, 4, 8], expected [3, 3, 4, 8] ([B, T, N, H]; B of the block table)",
        ),
        (
            refused(packed().layout(Role::KeyValueStarts, TensorDesc::contiguous(DType::I32, [4]))),
            "key/value starts has shape [4], expected [3] ([B + 1]; B of the query starts)",
        ),
        (
            refused(packed().layout(Role::QueryStarts, TensorDesc::contiguous(DType::I32, [0]))),
            "query starts has shape [0], expected [1] ([B + 1])",
        ),
        (
            refused(packed().layout(Role::Out, tokens(&[7, 4, 8]))),
            "out has shape [1, 7, 4, 8], expected [1, 6, 4, 8] ([1, total, N, Hv])",
        ),
        (
            call(packed(), [1, 3, 6], [0, 4, 9]),
            "query start 0 is 1, expected 0 to 0: starts rise from 0 to at most the rows of the tensor",
        ),
        (
            call(packed(), [0, 3, 6], [0, 4, 3]),
            "key/value start 2 is 3, expected 4 to 9: starts rise from 0 to at most the rows of the tensor",
        ),
        (
            call(packed(), [0, 3, 7], [0, 4, 9]),
            "query start 2 is 7, expected 3 to 6: starts rise from 0 to at most the rows of the tensor",
        ),
        (
            call(packed().longest(3, 5), [0, 3, 6], [0, 3, 9]),
            "sequence 1 has 6 keys, and the problem was made for at most 5 (`longest`)",
        ),
        (
            call(packed().longest(2, 5), [0, 3, 6], [0, 3, 9]),
            "sequence 0 has 3 query rows, and the problem was made for at most 2 (`longest`)",
        ),
        (
            paged([0, 6, 1, 2, 7, 3], [9, 5]),
            "block table entry 1 of sequence 1 is 7, which is none of 7 pages",
        ),
        (
            paged([0, 6, -1, 2, 2, 3], [9, 5]),
            "block table entry 2 of sequence 0 is -1, which is none of 7 pages",
        ),
        (paged([0; 6], [12, 13]), "sequence 1 has room for 12 keys, and its key/value length is 13"),
        (
            refused(
                Problem::builder(tokens(&[6, 4, 8]), tokens(&[2, 5, 2, 8]), tokens(&[2, 5, 2, 8]))
                    .packed_queries(2, DType::I32),
            ),
            "packed queries with dense keys need key/value lengths",
        ),
        (
            refused(
                Problem::builder(tokens(&[6, 4, 8]), tokens(&[3, 5, 2, 8]), tokens(&[3, 5, 2, 8]))
                    .packed_queries(2, DType::I32)
                    .key_value_lengths(DType::I32),
            ),
            "key has shape [3, 5, 2, 8], expected [2, 5, 2, 8] ([B, S, K, H]; B of the starts, H of the query)",
        ),
        (
            refused(
                pages(4)
                    .paged(2, 3, DType::I32)
                    .layout(Role::BlockTable, TensorDesc::strided(DType::I32, [2, 3], [1, 1]).unwrap()),
            ),
            "rows of a block table may be one, with stride 0, and may not overlap otherwise",
        ),
    ]
}

/// What is refused of the numbers of a call, by problems that were built from them or from others.
fn of_numbers() -> Vec<Case> {
    let plain = CallData::default();
    let call = |builder: ProblemBuilder, data: CallData<'_>| {
        CallProblem::new(&builder.build().unwrap(), &data).unwrap_err()
    };
    let own = |data: CallData<'_>| call(problem().data(&data), data);
    let scaled = |scale: f64| CallData { scale: Some(scale), ..plain };
    let capped = |softcap: f64| CallData { softcap: Some(softcap), ..plain };
    let at = |offset: i64| CallData { query_offset: QueryOffset::Fixed(offset), ..plain };
    let bottom_right = CallData { query_offset: QueryOffset::BottomRight, ..plain };
    let dropping = |rate: f64| CallData { dropout: Some(Dropout::new(rate, 0)), ..plain };
    let (queries, keys, negative) = ([3i32, 4], [6usize, 5], [0i64, -1]);
    let view = |data| View::from_slice(data, [2]).unwrap();
    let near = || problem().alignment(Alignment::Offset(OffsetRange::Near));
    let far = [0i64, -(OffsetRange::NEAR + 1)];
    let offsets = CallData { query_offsets: Some(View::from_slice(&far, [2]).unwrap()), ..plain };
    vec![
        (own(scaled(f64::NAN)), "scale is NaN, which is not finite in f32"),
        (own(scaled(f64::NEG_INFINITY)), "scale is -inf, which is not finite in f32"),
        (
            call(problem(), scaled(-0.5)),
            "scale is -0.5, and the problem was made for scales from 1e-37 to 2e38 (`any_scale` takes others)",
        ),
        (own(capped(f64::INFINITY)), "softcap is inf, which is not finite in f32"),
        (own(capped(0.0)), "softcap is 0, expected a number above 0 (leave it out for no softcap)"),
        (own(capped(-30.0)), "softcap is -30, expected a number above 0 (leave it out for no softcap)"),
        (call(problem(), capped(30.0)), "softcap of the call: given; of its problem: not given"),
        (call(problem().softcap(true), plain), "softcap of the call: not given; of its problem: given"),
        (
            own(CallData { query_lengths: Some(View::from_slice(&queries, [2]).unwrap()), ..plain }),
            "query length 4 of batch row 1 is not between 0 and the tensor's length 3",
        ),
        (
            own(CallData { key_value_lengths: Some(View::from_slice(&keys, [2]).unwrap()), ..plain }),
            "key/value length 6 of batch row 0 is not between 0 and the tensor's length 5",
        ),
        (
            own(CallData { key_value_lengths: Some(view(&negative)), ..plain }),
            "key/value length -1 of batch row 1 is not between 0 and the tensor's length 5",
        ),
        (
            call(near(), at(OffsetRange::NEAR + 1)),
            "query offset is 4194305, and the problem was made for offsets from -4194304 to 4194304",
        ),
        (
            call(problem().query_offsets(OffsetRange::Near, DType::I64), offsets),
            "query offset is -4194305, and the problem was made for offsets from -4194304 to 4194304",
        ),
        (call(problem(), at(7)), "query offset of the call: 7; of its problem: top-left"),
        (call(problem(), bottom_right), "query offset of the call: bottom-right; of its problem: top-left"),
        (
            call(near(), bottom_right),
            "query offset of the call: bottom-right; of its problem: an offset of at most 4194304",
        ),
        (
            call(problem().alignment(Alignment::Offset(OffsetRange::Any)), bottom_right),
            "query offset of the call: bottom-right; of its problem: an offset",
        ),
        (
            call(problem().alignment(Alignment::BottomRight), plain),
            "query offset of the call: top-left; of its problem: bottom-right",
        ),
        (call(problem(), dropping(0.5)), "dropout rate of the call: 0.5; of its problem: none"),
        (call(problem().dropout_rate(0.5), plain), "dropout rate of the call: none; of its problem: 0.5"),
        (
            call(problem().dropout_rate(0.5), dropping(0.25)),
            "dropout rate of the call: 0.25; of its problem: 0.5",
        ),
        (
            call(problem().query_lengths(DType::I32), plain),
            "the problem has query lengths, the call was given none",
        ),
        (
            call(
                problem(),
                CallData { query_lengths: Some(View::from_slice(&queries, [2]).unwrap()), ..plain },
            ),
            "the call was given query lengths, the problem has none: build it from the inputs that have it \
             (`Inputs::problem`)",
        ),
        (
            call(
                problem().query_lengths(DType::I64),
                CallData { query_lengths: Some(View::from_slice(&queries, [2]).unwrap()), ..plain },
            ),
            "query lengths is i32 [2], the problem says i64 [2]",
        ),
    ]
}

/// What the constructors of views and scratch refuse.
fn of_views() -> Vec<Case> {
    let mut data = [0f32; 12];
    let mut bytes = [0u8; 256];
    let raw = |address: usize, device: Device| {
        // SAFETY: each address is refused, so there is no view through which anything is read.
        unsafe { View::from_raw_parts(std::ptr::without_provenance(address), device, desc([2])).unwrap_err() }
    };
    // SAFETY: nothing reads or writes the memory: the scratch is given to a check of its address alone.
    let misaligned =
        unsafe { Scratch::from_raw_parts(std::ptr::without_provenance_mut(0x1020), 128, Device::Cpu) };
    let split = ViewMut::from_slice(&mut data, [3, 4]).unwrap().split(0, [1, 1]).unwrap_err();
    let overlap = ViewMut::strided(&mut data, 0, [3, 4], [3, 1]).unwrap_err();
    let view = View::from_slice(&data, [3, 4]).unwrap();
    let strided = |offset, strides: [isize; 2]| View::strided(&data, offset, [3, 4], strides).unwrap_err();
    vec![
        (
            View::from_slice(&data, [1, 3, 4, 1]).unwrap().unsqueeze().unwrap_err(),
            "rank 5 is above the largest supported rank of 4",
        ),
        (View::strided(&data, 0, [3, 4], [1]).unwrap_err(), "shape has 2 axes and strides have 1"),
        (
            strided(1, [4, 1]),
            "a view of shape [3, 4] and strides [4, 1] from offset 1 needs elements 1 to 12, the slice has 12",
        ),
        (
            strided(3, [-4, 1]),
            "a view of shape [3, 4] and strides [-4, 1] from offset 3 needs elements -5 to 6, the slice has 12",
        ),
        (View::from_slice(&data, [3, 5]).unwrap_err(), "shape [3, 5] has 15 elements, the slice has 12"),
        (
            View::from_slice(&data, [usize::MAX, 2]).unwrap_err(),
            "a view of shape [18446744073709551615, 2] overflows the address space",
        ),
        (
            view.narrow(0, 0..1).unwrap().expand([usize::MAX, 4]).unwrap_err(),
            "a view of shape [18446744073709551615, 4] overflows the address space",
        ),
        (raw(0, Device::Cpu), "pointer 0x0 is null or not aligned to the 4 bytes of f32"),
        (raw(0x1006, Device::Cuda(0)), "pointer 0x1006 is null or not aligned to the 4 bytes of f32"),
        (
            view.narrow(1, 2..5).unwrap_err(),
            "range 2..5 of axis 1 is out of range for a view of shape [3, 4]",
        ),
        (view.index_axis(0, 3).unwrap_err(), "index 3 of axis 0 is out of range for a view of shape [3, 4]"),
        (view.permute([0, 0]).unwrap_err(), "axis order [0, 0] is out of range for a view of shape [3, 4]"),
        (view.expand([3, 8]).unwrap_err(), "expansion to [3, 8] is out of range for a view of shape [3, 4]"),
        (split, "split of axis 0 into [1, 1] is out of range for a view of shape [3, 4]"),
        (overlap, "output of shape [3, 4] and strides [3, 1] overlaps itself"),
        (
            Scratch::host(&mut bytes).check(Device::Cpu, 257).unwrap_err(),
            "scratch of 256 bytes is too small, 257 are needed",
        ),
        (misaligned.check(Device::Cpu, 1).unwrap_err(), "scratch at 0x1020 is not aligned to 64 bytes"),
        (
            Scratch::none(Device::Cpu).check(Device::Cuda(2), 1).unwrap_err(),
            "scratch is on cpu, the call is on cuda:2",
        ),
    ]
}

/// What the constructors of calls refuse.
fn of_calls() -> Vec<Case> {
    let mut data = vec![0f32; 256];
    let (mut out_data, mut lse_data) = (vec![0f32; 144], vec![0f32; 24]);
    // SAFETY: the memory is allocated, and the call that gets this output is refused.
    let dv = unsafe { ViewMut::from_raw_parts(data.as_mut_ptr().cast(), Device::Cpu, desc([2, 5, 2, 6])) }
        .unwrap();
    let inputs = Inputs::new(
        View::from_slice(&data[..192], [2, 3, 4, 8]).unwrap(),
        View::from_slice(&data[..160], [2, 5, 2, 8]).unwrap(),
        View::from_slice(&data[..120], [2, 5, 2, 6]).unwrap(),
    );
    let plain = inputs.problem().build().unwrap();
    let with_lse = inputs.problem().lse(true).build().unwrap();
    let on_gpu = inputs.problem().device(Device::Cuda(1)).build().unwrap();
    let backward = inputs.problem().gradients(Gradients::VALUE).build().unwrap();
    let mut forward = |problem: &Problem, inputs, lse: bool| {
        let out = ViewMut::from_slice(&mut out_data, [2, 3, 4, 6]).unwrap();
        let lse = lse.then(|| ViewMut::from_slice(&mut lse_data, [2, 3, 4]).unwrap());
        ForwardCall::new(problem, inputs, ForwardOutputs { out, lse }).unwrap_err()
    };
    let slopes = Inputs { alibi_slopes: Some(View::from_slice(&data[..4], [4]).unwrap()), ..inputs };
    let stored_bnth = View::from_slice(&data[..160], [2, 2, 5, 8]).unwrap().permute([0, 2, 1, 3]).unwrap();
    let out = View::from_slice(&data[..144], [2, 3, 4, 6]).unwrap();
    let lse = View::from_slice(&data[..24], [2, 3, 4]).unwrap();
    let saved = BackwardInputs { out, lse, d_out: out, d_lse: None };
    let call = |problem: &Problem, dv| {
        BackwardCall::new(problem, inputs, saved, BackwardOutputs { dv, ..Default::default() }).unwrap_err()
    };
    vec![
        (
            forward(&plain, slopes, false),
            "the call was given ALiBi slopes, the problem has none: build it from the inputs that have it \
             (`Inputs::problem`)",
        ),
        (
            forward(&plain, inputs, true),
            "the call was given lse, the problem has none: build it with `.lse(true)`",
        ),
        (forward(&with_lse, inputs, false), "the problem has lse, the call was given none"),
        (
            forward(&plain, Inputs { key: stored_bnth, ..inputs }, false),
            "key is f32 [2, 5, 2, 8] strides [80, 8, 40, 1], the problem says f32 [2, 5, 2, 8]",
        ),
        (forward(&on_gpu, inputs, false), "query is on cpu, the call is on cuda:1"),
        (forward(&backward, inputs, false), "the problem is a backward problem, this is a forward call"),
        (call(&plain, None), "the problem is a forward problem, this is a backward call"),
        (call(&backward, None), "the problem has dv, the call was given none"),
        (call(&backward, Some(dv)), "dv and query overlap in memory"),
    ]
}

/// A plan of a problem that takes 64 bytes of scratch.
#[derive(Debug)]
struct Planned(Problem);

impl Plan for Planned {
    fn backend(&self) -> &str {
        "planned"
    }
    fn problem(&self) -> &Problem {
        &self.0
    }
    fn scratch_bytes(&self) -> usize {
        64
    }
    fn forward(&self, call: ForwardCall<'_>, scratch: Scratch<'_>) -> Result<(), Error> {
        Ok(self.admit(call.problem(), &scratch)?)
    }
    fn backward(&self, call: BackwardCall<'_>, scratch: Scratch<'_>) -> Result<(), Error> {
        Ok(self.admit(call.problem(), &scratch)?)
    }
}

fn of_plans() -> Vec<Case> {
    let plan = Planned(problem().build().unwrap());
    let refused = |problem: ProblemBuilder, bytes: usize| {
        let mut scratch = ScratchBuffer::new(bytes);
        plan.admit(&problem.build().unwrap(), &scratch.scratch()).unwrap_err()
    };
    let mut scratch = ScratchBuffer::new(64);
    assert_eq!(plan.admit(plan.problem(), &scratch.scratch()), Ok(()));
    assert_eq!(plan.admit(&problem().build().unwrap(), &scratch.scratch()), Ok(()));
    let strided = TensorDesc::strided(DType::F32, [2, 3, 4, 8], [96, 8, 24, 1]).unwrap();
    vec![
        (
            refused(problem().causal(true), 64),
            "the plan is of `forward f32 B2 T3 S5 N4 K2 H8 Hv6 on cpu, grouped heads, value head dim != head dim`, the call is \
             of `forward f32 B2 T3 S5 N4 K2 H8 Hv6 on cpu, grouped heads, value head dim != head dim, causal`",
        ),
        (
            refused(Problem::builder(strided, fitting()[1], fitting()[2]), 64),
            "the plan is of `forward f32 B2 T3 S5 N4 K2 H8 Hv6 on cpu, grouped heads, value head dim != head dim`, the call is \
             of one with the same sizes and options on tensors of another layout",
        ),
        (refused(problem(), 63), "scratch of 63 bytes is too small, 64 are needed"),
    ]
}

#[test]
fn every_variant_is_provoked_and_says_what_is_wrong() {
    let cases = [
        of_ranks_and_shapes(),
        of_dtypes(),
        of_eight_bits(),
        of_options(),
        of_numbers(),
        of_sequences(),
        of_views(),
        of_calls(),
        of_plans(),
    ];
    let mut seen = HashSet::new();
    for (error, message) in cases.into_iter().flatten() {
        assert_eq!(error.to_string(), message);
        // What a `main` prints that returns the error.
        assert_eq!(format!("{error:?}"), message);
        seen.insert(name_of(&error));
    }
    assert_all_seen(NAMES, &seen);
}

#[test]
fn ranks_above_the_limit_are_no_shape() {
    assert_eq!(Dims::from_slice(&[1; 5]), None);
    assert_eq!(Strides::from_slice(&[1; 300]), None);
    assert_eq!(Dims::try_from(vec![1; 5]), Err("rank 5 is above 4".to_owned()));
}
