//! Calls that are wrong, which must be refused with a typed error and without a panic.

use std::panic::{AssertUnwindSafe, catch_unwind};

use attention_core::{
    AttentionBackend, DType, Dimensions, Dropout, Error, Gradients, InvalidCall, Problem, ProblemBuilder,
    Role, TensorDesc,
};

use crate::rng::Rng;

/// What is wrong with a problem, by how it is made so and by the error that says so.
type Mistake = (&'static str, fn(ProblemBuilder, &Dimensions) -> ProblemBuilder, fn(&InvalidCall) -> bool);

fn bias(builder: ProblemBuilder, shape: [usize; 4]) -> ProblemBuilder {
    builder.bias(TensorDesc::contiguous(DType::F32, shape))
}

const MISTAKES: [Mistake; 20] = [
    ("a scale of NaN", |b, _| b.scale(f64::NAN), |e| matches!(e, InvalidCall::NotFinite { .. })),
    ("an infinite scale", |b, _| b.scale(f64::NEG_INFINITY), |e| matches!(e, InvalidCall::NotFinite { .. })),
    ("a softcap of 0", |b, _| b.softcap(0.0), |e| matches!(e, InvalidCall::SoftcapNotPositive { .. })),
    ("a negative softcap", |b, _| b.softcap(-1.0), |e| matches!(e, InvalidCall::SoftcapNotPositive { .. })),
    ("a softcap of NaN", |b, _| b.softcap(f64::NAN), |e| matches!(e, InvalidCall::NotFinite { .. })),
    ("a dropout rate of 1", |b, _| b.dropout(Dropout::new(1.0, 1)), |_| true),
    ("a negative dropout rate", |b, _| b.dropout(Dropout::new(-0.1, 1)), |_| true),
    ("a dropout rate of NaN", |b, _| b.dropout(Dropout::new(f64::NAN, 1)), |_| true),
    (
        "too many lengths",
        |b, d| b.key_value_lengths(vec![0; d.batch + 1]),
        |e| matches!(e, InvalidCall::LengthCount { .. }),
    ),
    (
        "a length above S",
        |b, d| b.key_value_lengths(vec![d.key_length + 1; d.batch.max(1)]),
        |e| matches!(e, InvalidCall::LengthOutOfRange { .. } | InvalidCall::LengthCount { .. }),
    ),
    (
        "a length above T",
        |b, d| b.query_lengths(vec![usize::MAX; d.batch.max(1)]),
        |e| matches!(e, InvalidCall::LengthOutOfRange { .. } | InvalidCall::LengthCount { .. }),
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

/// Makes some mistakes in problems of these sizes. The number of them, or the one that was not refused rightly.
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

/// Asks a backend about problems that no machine has the memory for, on views of stride 0: whatever it answers, it
/// must not panic. Sizes that a list could be made for are left small, so that an answer takes no time.
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
    let problem = builder.causal(rng.chance(0.5)).build().ok()?;
    Some((format!("{} {} {}", problem.dims(), dtype, problem.pass()), problem))
}
