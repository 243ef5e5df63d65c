//! What can be checked without a GPU: structure, tiles, plans and refusals.

mod batch_invariance;
mod packed;
mod plans;
mod tiles;
mod variants;

use attention_conformance::cases;
use attention_core::{DType, Device, FeatureSet, Gradients, Pass, Problem, ProblemBuilder, Role, TensorDesc};

use crate::tiles::Machine;

/// The smallest device, and those for data centres of compute capability 8.0 and 9.0.
const SMALL: Machine = Machine {
    shared_bytes: 99 << 10,
    multiprocessors: 84,
    all_multiprocessors: 84,
    warpgroups: false,
    tf32_split: true,
};
const AMPERE: Machine = Machine {
    shared_bytes: 163 << 10,
    multiprocessors: 108,
    all_multiprocessors: 108,
    warpgroups: false,
    tf32_split: true,
};
const HOPPER: Machine = Machine {
    shared_bytes: 227 << 10,
    multiprocessors: 132,
    all_multiprocessors: 132,
    warpgroups: true,
    tf32_split: true,
};

fn on_device(problem: &Problem) -> Problem {
    problem.to_builder().device(Device::Cuda(0)).build().unwrap()
}

/// Every generated problem of a dtype and pass, on a device.
fn problems(dtype: DType, pass: Pass) -> impl Iterator<Item = (String, Problem)> {
    cases::all().into_iter().map(move |case| {
        let data = case.data(dtype);
        let problem = case.problem(&data, pass, FeatureSet::all()).unwrap();
        (case.name, on_device(&problem))
    })
}

/// A problem with heads of this size.
fn with_heads(dtype: DType, head: usize, value: usize, pass: Pass) -> Problem {
    let desc = |width| TensorDesc::contiguous(dtype, [1, 300, 2, width]);
    let builder = Problem::builder(desc(head), desc(head), desc(value)).device(Device::Cuda(0));
    match pass {
        Pass::Forward => builder.build().unwrap(),
        Pass::Backward => builder.gradients(Gradients::QKV).build().unwrap(),
    }
}

/// Problems whose plans differ: every head dimension, every option alone and all of them, few and many rows,
/// keys and heads.
fn every_kind_of_problem() -> Vec<Problem> {
    let mut problems = Vec::new();
    let heads =
        [(32, 32), (64, 64), (96, 96), (128, 128), (192, 128), (256, 64), (256, 256), (576, 512), (320, 384)];
    for dtype in DType::FLOATS {
        for (head, value) in heads {
            for (queries, keys, group) in
                [(1, 1, 1), (1, 9000, 8), (40, 600, 1), (256, 4096, 1), (300, 300, 2), (5000, 5000, 1)]
            {
                let desc = |length, heads, width| TensorDesc::contiguous(dtype, [1, length, heads, width]);
                let builder = || {
                    let (query, key) = (desc(queries, 2 * group, head), desc(keys, 2, head));
                    Problem::builder(query, key, desc(keys, 2, value)).device(Device::Cuda(0))
                };
                let eight_bit = || {
                    let of_keys = |width| TensorDesc::contiguous(DType::F8E5M2, [1, keys, 2, width]);
                    let (query, key) = (desc(queries, 2 * group, head), of_keys(head));
                    Problem::builder(query, key, of_keys(value)).device(Device::Cuda(0))
                };
                let scales = TensorDesc::contiguous(DType::F32, [2]);
                problems.push(eight_bit().build().unwrap());
                problems.push(eight_bit().key_scales(scales).value_scales(scales).build().unwrap());
                problems.push(eight_bit().dropout_rate(0.5).softcap(true).build().unwrap());
                let (mask, bias) = (
                    TensorDesc::contiguous(DType::Bool, [1, 1, queries, keys]),
                    TensorDesc::contiguous(dtype, [1, 2 * group, queries, keys]),
                );
                let options = [
                    builder(),
                    builder().causal(true),
                    builder().mask(mask),
                    builder().bias(bias),
                    builder().softcap(true),
                    builder().dropout_rate(0.5),
                    builder().mask(mask).bias(bias).softcap(true),
                ];
                for builder in options {
                    problems.push(builder.clone().build().unwrap());
                    problems.push(builder.clone().batch_invariant(true).build().unwrap());
                    let with_bias = builder.clone().build().unwrap().has(Role::Bias);
                    if head.max(value) <= 256 {
                        let bias = if with_bias { Gradients::BIAS } else { Gradients::QUERY };
                        let backward = builder.gradients(Gradients::QKV | bias);
                        problems.push(backward.clone().build().unwrap());
                        problems.push(backward.batch_invariant(true).build().unwrap());
                    }
                }
            }
        }
    }
    problems
}

/// A problem of two sequences of bf16, with more options.
fn problem_with(options: impl Fn(ProblemBuilder) -> ProblemBuilder) -> Problem {
    sized([2, 300, 4, 64], options)
}

fn sized(shape: [usize; 4], options: impl Fn(ProblemBuilder) -> ProblemBuilder) -> Problem {
    let desc = TensorDesc::contiguous(DType::Bf16, shape);
    options(Problem::builder(desc, desc, desc).device(Device::Cuda(0))).build().unwrap()
}
