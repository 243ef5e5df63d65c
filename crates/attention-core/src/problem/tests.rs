//! Problems: what they say of themselves, what is accepted, and how they compare and are stored.
//! What is refused, with which words, is in `error/tests`.

mod accepted;
mod defaults;
mod eight_bit;
mod features;
mod identity;
#[cfg(feature = "serde")]
mod stored;

use crate::{CallData, CallProblem, DType, Dimensions, Dropout, Problem, ProblemBuilder};

/// B = 2, T = 3, S = 5, N = 4, K = 4, H = Hv = 8.
const DIMS: Dimensions = Dimensions {
    batch: 2,
    query_length: 3,
    key_length: 5,
    query_heads: 4,
    key_heads: 4,
    head_dim: 8,
    value_head_dim: 8,
};

fn builder() -> ProblemBuilder {
    DIMS.problem(DType::F32)
}

fn built(builder: ProblemBuilder) -> Problem {
    builder.build().unwrap()
}

/// A call with these numbers, of a problem that has them.
fn called<'c>(problem: &'c Problem, data: &CallData<'c>) -> CallProblem<'c> {
    CallProblem::new(problem, data).unwrap()
}

/// Numbers of a call with nothing but dropout.
fn dropping(dropout: Dropout) -> CallData<'static> {
    CallData { dropout: Some(dropout), ..CallData::default() }
}
