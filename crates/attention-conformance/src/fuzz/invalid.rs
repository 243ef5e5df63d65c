//! Calls that are wrong, which must be refused with a typed error and without a panic.

use std::panic::{AssertUnwindSafe, catch_unwind};

use attention_core::{
    Alignment, AttentionBackend, CallProblem, DType, Dimensions, Dropout, Error, Gradients, InvalidCall,
    OffsetRange, Problem, ProblemBuilder, QueryOffset, Role, TensorDesc,
};

use crate::cases::{Layout, Numbers};
use crate::rng::Rng;
use crate::tensor::HostTensor;

/// What is wrong with a problem, by how it is made so and by the error that says so.
type Mistake = (&'static str, fn(ProblemBuilder, &Dimensions) -> ProblemBuilder, fn(&InvalidCall) -> bool);

fn bias(builder: ProblemBuilder, shape: [usize; 4]) -> ProblemBuilder {
    builder.bias(TensorDesc::contiguous(DType::F32, shape))
}

/// The key and value of a problem with 8 bits, and scales of its keys of this shape.
fn eight_bit(builder: ProblemBuilder, d: &Dimensions, scales: &[usize]) -> ProblemBuilder {
    let desc =
        |width: usize| TensorDesc::contiguous(DType::F8E4M3, [d.batch, d.key_length, d.key_heads, width]);
    let scales = attention_core::Dims::from_slice(scales).expect("at most four axes");
    builder
        .layout(Role::Key, desc(d.head_dim))
        .layout(Role::Value, desc(d.value_head_dim))
        .key_scales(TensorDesc::contiguous(DType::F32, scales))
}

const MISTAKES: [Mistake; 22] = [
    (
        "a key of 8 bits beside a value of more",
        |b, d| {
            b.layout(
                Role::Key,
                TensorDesc::contiguous(DType::F8E5M2, [d.batch, d.key_length, d.key_heads, d.head_dim]),
            )
        },
        |e| matches!(e, InvalidCall::DType { role: Role::Value, .. }),
    ),
    (
        "gradients of keys of 8 bits",
        |b, d| eight_bit(b, d, &[1]).gradients(Gradients::QKV),
        |e| matches!(e, InvalidCall::EightBitGradients { .. }),
    ),
    (
        "scales of another number of heads",
        |b, d| eight_bit(b, d, &[d.key_heads + 1]),
        |e| matches!(e, InvalidCall::Shape { role: Role::KeyScales, .. }),
    ),
    (
        "scales of another number of sequences",
        |b, d| eight_bit(b, d, &[d.batch + 1, d.key_heads]),
        |e| matches!(e, InvalidCall::Shape { role: Role::KeyScales, .. }),
    ),
    (
        "scales of rank 3",
        |b, d| eight_bit(b, d, &[d.batch, d.key_heads, 1]),
        |e| matches!(e, InvalidCall::Rank { role: Role::KeyScales, .. }),
    ),
    (
        "scales of keys of more than 8 bits",
        |b, _| b.key_scales(TensorDesc::contiguous(DType::F32, [1])),
        |e| matches!(e, InvalidCall::ScalesWithoutEightBit { .. }),
    ),
    ("a dropout rate of 1", |b, _| b.dropout_rate(1.0), |e| matches!(e, InvalidCall::DropoutRate { .. })),
    (
        "a negative dropout rate",
        |b, _| b.dropout_rate(-0.1),
        |e| matches!(e, InvalidCall::DropoutRate { .. }),
    ),
    (
        "a dropout rate of NaN",
        |b, _| b.dropout_rate(f64::NAN),
        |e| matches!(e, InvalidCall::DropoutRate { .. }),
    ),
    (
        "too many lengths",
        |b, d| b.layout(Role::KeyValueLengths, TensorDesc::contiguous(DType::I64, [d.batch + 1])),
        |e| matches!(e, InvalidCall::Shape { .. }),
    ),
    (
        "lengths of two axes",
        |b, d| b.layout(Role::QueryLengths, TensorDesc::contiguous(DType::I32, [d.batch, 1])),
        |e| matches!(e, InvalidCall::Rank { .. }),
    ),
    (
        "lengths that are floats",
        |b, _| b.key_value_lengths(DType::F32),
        |e| matches!(e, InvalidCall::DType { .. }),
    ),
    (
        "a seed without dropout",
        |b, _| b.layout(Role::DropoutSeed, TensorDesc::contiguous(DType::I64, [1])),
        |e| matches!(e, InvalidCall::Unexpected { .. }),
    ),
    (
        "a bias that does not broadcast",
        |b, d| bias(b, [1, 1, 1, d.key_length + 2]),
        |e| matches!(e, InvalidCall::NotBroadcastable { .. }),
    ),
    (
        "a mask of floats",
        |b, _| b.mask(TensorDesc::contiguous(DType::F32, [1, 1, 1, 1])),
        |e| matches!(e, InvalidCall::DType { .. }),
    ),
    (
        "a bias of booleans",
        |b, _| b.bias(TensorDesc::contiguous(DType::Bool, [1, 1, 1, 1])),
        |e| matches!(e, InvalidCall::DType { .. }),
    ),
    (
        "sinks of another number of heads",
        |b, d| b.sinks(TensorDesc::contiguous(DType::F32, [d.query_heads + 1])),
        |e| matches!(e, InvalidCall::Shape { .. }),
    ),
    (
        "slopes of rank 3",
        |b, _| b.alibi_slopes(TensorDesc::contiguous(DType::F32, [1, 1, 1])),
        |e| matches!(e, InvalidCall::Rank { .. }),
    ),
    ("no gradient", |b, _| b.gradients(Gradients::NONE), |e| matches!(e, InvalidCall::NoGradient)),
    (
        "the gradient of a bias that is not there",
        |b, _| b.gradients(Gradients::BIAS),
        |e| matches!(e, InvalidCall::GradientWithoutTensor { .. }),
    ),
    (
        "an output of another shape",
        |b, d| b.layout(Role::Out, TensorDesc::contiguous(DType::F32, [d.batch + 1, 1, 1, 1])),
        |e| matches!(e, InvalidCall::Shape { .. } | InvalidCall::DType { .. }),
    ),
    (
        "a value of another number of keys",
        |b, d| b.layout(Role::Value, TensorDesc::contiguous(DType::F32, [d.batch, d.key_length + 1, 1, 1])),
        |e| matches!(e, InvalidCall::Shape { .. } | InvalidCall::DType { .. }),
    ),
];

/// Makes some mistakes in problems of these sizes. The number of them, or the one that was not refused
/// rightly.
pub(super) fn problems(d: &Dimensions, dtype: DType, rng: &mut Rng) -> Result<usize, String> {
    let count = 4;
    for _ in 0..count {
        let (what, make, is_right) = MISTAKES[rng.below(MISTAKES.len())];
        let built = catch_unwind(AssertUnwindSafe(|| make(d.problem(dtype), d).build()));
        match built {
            Ok(Err(error)) if is_right(&error) => {}
            Ok(Err(error)) => return Err(format!("{what} is refused as something else: {error}")),
            Ok(Ok(_)) => return Err(format!("{what} is accepted: {d} {dtype}")),
            Err(_) => return Err(format!("{what} panics: {d} {dtype}")),
        }
    }
    Ok(count)
}

/// What is wrong with the numbers of a call, by the problem that they are wrong for, by how they are made so,
/// and by the error that says so.
type WrongNumbers = (
    &'static str,
    fn(ProblemBuilder, &Dimensions) -> ProblemBuilder,
    fn(&mut Numbers, &Dimensions),
    fn(&InvalidCall) -> bool,
);

/// A tensor of one number for each of `count` batch rows.
fn alike(dtype: DType, count: usize, number: i64) -> Option<HostTensor> {
    Some(HostTensor::from_integers(dtype, [count], Layout::Contiguous, |_| number))
}

fn is_other_data(error: &InvalidCall) -> bool {
    matches!(error, InvalidCall::OtherData { .. })
}

const WRONG_NUMBERS: [WrongNumbers; 30] = [
    (
        "a key scale of NaN",
        |b, d| eight_bit(b, d, &[1]),
        |n, _| {
            n.key_scales = Some(HostTensor::from_values(DType::F32, [1], Layout::Contiguous, |_| f64::NAN))
        },
        |e| matches!(e, InvalidCall::ScaleNotFinite { role: Role::KeyScales, .. }),
    ),
    (
        "no key scales",
        |b, d| eight_bit(b, d, &[1]),
        |_, _| (),
        |e| matches!(e, InvalidCall::Missing { role: Role::KeyScales }),
    ),
    (
        "scales of no problem",
        |b, _| b,
        |n, _| n.value_scales = Some(HostTensor::from_values(DType::F32, [1], Layout::Contiguous, |_| 1.0)),
        |e| matches!(e, InvalidCall::Unexpected { role: Role::ValueScales }),
    ),
    (
        "a scale of NaN",
        |b, _| b.any_scale(true),
        |n, _| n.scale = Some(f64::NAN),
        |e| matches!(e, InvalidCall::NotFinite { .. }),
    ),
    (
        "an infinite scale",
        |b, _| b,
        |n, _| n.scale = Some(f64::NEG_INFINITY),
        |e| matches!(e, InvalidCall::NotFinite { .. }),
    ),
    (
        "a scale of 0 that was not announced",
        |b, _| b,
        |n, _| n.scale = Some(0.0),
        |e| matches!(e, InvalidCall::NotOrdinaryScale { .. }),
    ),
    (
        "a softcap of 0",
        |b, _| b.softcap(true),
        |n, _| n.softcap = Some(0.0),
        |e| matches!(e, InvalidCall::SoftcapNotPositive { .. }),
    ),
    (
        "a negative softcap",
        |b, _| b.softcap(true),
        |n, _| n.softcap = Some(-1.0),
        |e| matches!(e, InvalidCall::SoftcapNotPositive { .. }),
    ),
    (
        "a softcap of NaN",
        |b, _| b.softcap(true),
        |n, _| n.softcap = Some(f64::NAN),
        |e| matches!(e, InvalidCall::NotFinite { .. }),
    ),
    ("a softcap of no problem", |b, _| b, |n, _| n.softcap = Some(1.0), is_other_data),
    ("no softcap", |b, _| b.softcap(true), |_, _| (), is_other_data),
    ("an offset of no problem", |b, _| b, |n, _| n.query_offset = QueryOffset::Fixed(1), is_other_data),
    (
        "another alignment",
        |b, _| b.alignment(Alignment::BottomRight),
        |n, _| n.query_offset = QueryOffset::Fixed(0),
        is_other_data,
    ),
    (
        "bottom-right of an offset",
        |b, _| b.alignment(Alignment::Offset(OffsetRange::Any)),
        |n, _| n.query_offset = QueryOffset::BottomRight,
        is_other_data,
    ),
    (
        "an offset that is too large",
        |b, _| b.alignment(Alignment::Offset(OffsetRange::Near)),
        |n, _| n.query_offset = QueryOffset::Fixed(OffsetRange::NEAR + 1),
        |e| matches!(e, InvalidCall::OffsetOutOfRange { .. }),
    ),
    (
        "an offset that is too small",
        |b, _| b.alignment(Alignment::Offset(OffsetRange::Near)),
        |n, _| n.query_offset = QueryOffset::Fixed(i64::MIN),
        |e| matches!(e, InvalidCall::OffsetOutOfRange { .. }),
    ),
    (
        "an offset of a batch row that is too small",
        |b, _| b.query_offsets(OffsetRange::Near, DType::I64),
        |n, d| n.query_offsets = alike(DType::I64, d.batch, -OffsetRange::NEAR - 1),
        |e| matches!(e, InvalidCall::OffsetOutOfRange { .. }),
    ),
    (
        "no offsets",
        |b, _| b.query_offsets(OffsetRange::Near, DType::I32),
        |_, _| (),
        |e| matches!(e, InvalidCall::Missing { role: Role::QueryOffsets }),
    ),
    (
        "offsets of no problem",
        |b, _| b,
        |n, d| n.query_offsets = alike(DType::I32, d.batch, 0),
        |e| matches!(e, InvalidCall::Unexpected { role: Role::QueryOffsets }),
    ),
    (
        "a length above S",
        |b, _| b.key_value_lengths(DType::U32),
        |n, d| n.key_value_lengths = alike(DType::U32, d.batch, d.key_length as i64 + 1),
        |e| matches!(e, InvalidCall::LengthOutOfRange { .. }),
    ),
    (
        "a length far above T",
        |b, _| b.query_lengths(DType::I64),
        |n, d| n.query_lengths = alike(DType::I64, d.batch, i64::MAX),
        |e| matches!(e, InvalidCall::LengthOutOfRange { .. }),
    ),
    (
        "a negative length of keys",
        |b, _| b.key_value_lengths(DType::I32),
        |n, d| n.key_value_lengths = alike(DType::I32, d.batch, -1),
        |e| matches!(e, InvalidCall::LengthOutOfRange { length: -1, .. }),
    ),
    (
        "a negative length of queries",
        |b, _| b.query_lengths(DType::I64),
        |n, d| n.query_lengths = alike(DType::I64, d.batch, i64::MIN),
        |e| matches!(e, InvalidCall::LengthOutOfRange { .. }),
    ),
    (
        "lengths of another dtype",
        |b, _| b.key_value_lengths(DType::I64),
        |n, d| n.key_value_lengths = alike(DType::I32, d.batch, 0),
        |e| matches!(e, InvalidCall::NotAsInProblem { .. }),
    ),
    (
        "lengths of more batch rows",
        |b, _| b.key_value_lengths(DType::I64),
        |n, d| n.key_value_lengths = alike(DType::I64, d.batch + 1, 0),
        |e| matches!(e, InvalidCall::NotAsInProblem { .. }),
    ),
    (
        "no lengths",
        |b, _| b.query_lengths(DType::I32),
        |_, _| (),
        |e| matches!(e, InvalidCall::Missing { role: Role::QueryLengths }),
    ),
    (
        "lengths of no problem",
        |b, _| b,
        |n, d| n.query_lengths = alike(DType::I64, d.batch, 0),
        |e| matches!(e, InvalidCall::Unexpected { role: Role::QueryLengths }),
    ),
    (
        "another dropout rate",
        |b, _| b.dropout_rate(0.5),
        |n, _| n.dropout = Some(Dropout::new(0.25, 1)),
        is_other_data,
    ),
    ("a dropout of no problem", |b, _| b, |n, _| n.dropout = Some(Dropout::new(0.25, 1)), is_other_data),
    (
        "no seed",
        |b, _| b.dropout_rate(0.5).layout(Role::DropoutSeed, TensorDesc::contiguous(DType::I64, [1])),
        |n, _| n.dropout = Some(Dropout::new(0.5, 1)),
        |e| matches!(e, InvalidCall::Missing { role: Role::DropoutSeed }),
    ),
];

/// Makes some mistakes in the numbers of calls of these sizes. The number of them, or the one that was not
/// refused rightly.
pub(super) fn numbers(d: &Dimensions, dtype: DType, rng: &mut Rng) -> Result<usize, String> {
    // Without batch rows there is no number that could be wrong.
    let d = Dimensions { batch: d.batch.max(1), ..*d };
    let count = 4;
    for _ in 0..count {
        let (what, make, spoil, is_right) = WRONG_NUMBERS[rng.below(WRONG_NUMBERS.len())];
        let problem = make(d.problem(dtype), &d).build();
        let problem = problem.map_err(|error| format!("the fuzzer drew an invalid problem: {error}"))?;
        let mut numbers = Numbers::default();
        spoil(&mut numbers, &d);
        match catch_unwind(AssertUnwindSafe(|| CallProblem::new(&problem, &numbers.data()).map(|_| ()))) {
            Ok(Err(error)) if is_right(&error) => {}
            Ok(Err(error)) => return Err(format!("{what} is refused as something else: {error}")),
            Ok(Ok(())) => return Err(format!("{what} is accepted: {d} {dtype}")),
            Err(_) => return Err(format!("{what} panics: {d} {dtype}")),
        }
    }
    Ok(count)
}

/// Asks a backend about problems that no machine has the memory for, on views of stride 0: whatever it
/// answers, it must not panic. Sizes that a list could be made for are left small, so that an answer takes no
/// time.
pub(super) fn huge(backend: &dyn AttentionBackend, dtype: DType, rng: &mut Rng) -> Result<usize, String> {
    let Some((what, problem)) = huge_problem(dtype, rng) else { return Ok(0) };
    let asked = catch_unwind(AssertUnwindSafe(|| {
        let supported = backend.supports(&problem).is_ok();
        let sized = backend.scratch_bytes(&problem).is_ok();
        // A plan of what is supported may take a library seconds, for a call that nobody can make.
        let refused = supported || matches!(backend.plan(&problem), Err(Error::Unsupported(_)));
        (supported, sized, refused)
    }));
    match asked {
        Ok((false, true, _)) => Err(format!("scratch_bytes accepts what supports refuses: {what}")),
        Ok((_, _, false)) => Err(format!("plan does not refuse what supports refuses: {what}")),
        Ok(_) => Ok(1),
        Err(_) => Err(format!("supports, scratch_bytes or plan panics: {what}")),
    }
}

fn huge_problem(dtype: DType, rng: &mut Rng) -> Option<(String, Problem)> {
    let large = |rng: &mut Rng, most: u32| 1usize << rng.below(most as usize + 1);
    let heads = large(rng, 4);
    let (batch, queries, group) = (large(rng, 6), large(rng, 10), large(rng, 4));
    let (keys, head_dim, value_dim) = (large(rng, 62), large(rng, 62), large(rng, 62));
    let at_rest = |shape: [usize; 4]| TensorDesc::strided(dtype, shape, [0; 4]);
    let (query, key) =
        (at_rest([batch, queries, heads * group, head_dim])?, at_rest([batch, keys, heads, head_dim])?);
    let builder = Problem::builder(query, key, at_rest([batch, keys, heads, value_dim])?);
    let builder = if rng.chance(0.5) { builder } else { builder.gradients(Gradients::QKV) };
    // Outputs of stride 0 would overlap themselves; those that overflow are refused here.
    let builder = builder.causal(rng.chance(0.5));
    let builder = match rng.below(4) {
        0 => builder.key_value_lengths(DType::I32),
        1 => builder.query_offsets(OffsetRange::Any, DType::I64),
        _ => builder,
    };
    let problem = builder.build().ok()?;
    Some((format!("{} {} {}", problem.dims(), dtype, problem.pass()), problem))
}
