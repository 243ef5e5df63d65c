//! What is served, which kernels run in which order, and scratch.

use attention_conformance::cases;
use attention_core::{
    Alignment, AttentionBackend, CallData, CallProblem, DType, Device, Feature, FeatureSet, Gradients,
    OffsetRange, Pass, Problem, Role, TensorDesc, Unsupported, View,
};
use attention_cuda::parameters::{Swizzle, sequences};
use attention_kernels::Features;

use super::{AMPERE, HOPPER, SMALL, problem_with, problems, with_heads};
use crate::launches::Launches;
use crate::tiles::{Machine, Shape};
use crate::{ChunkedCudaBackend, ChunkedCudaConfig};

#[test]
fn rows_see_the_keys_that_the_problem_says() {
    for case in cases::all() {
        let (name, data) = (&case.name, case.data(DType::F32));
        let problem = case.problem(&data, Pass::Forward, FeatureSet::all()).unwrap();
        let problem = CallProblem::new(&problem, &data.inputs().data).unwrap();
        let dims = problem.dims();
        let rows = sequences(&problem);
        for batch in 0..dims.batch {
            let row = if rows.len() == 1 { rows[0] } else { rows[batch] };
            for t in 0..dims.query_length {
                let (got, want) = (row.keys_of(t), problem.key_range(batch, t));
                assert!(
                    got == want || (got.is_empty() && want.is_empty()),
                    "{name} row {t}: {got:?}, {want:?}"
                );
            }
        }
    }
}

#[test]
fn everything_but_large_heads_is_served() {
    let backend = ChunkedCudaBackend::new(ChunkedCudaConfig::default());
    for dtype in DType::FLOATS {
        for pass in [Pass::Forward, Pass::Backward] {
            for (name, problem) in problems(dtype, pass) {
                match backend.supports(&problem) {
                    Ok(()) => {
                        let most = if pass == Pass::Forward { 576 } else { 256 };
                        assert!(problem.dims().head_dim <= most, "{name}");
                    }
                    Err(Unsupported::Limit { value, .. }) => {
                        assert!(
                            pass == Pass::Backward
                                && ["257", "448", "512", "300", "576"].contains(&value.as_str()),
                            "{name}"
                        );
                    }
                    Err(error) => panic!("{name}: {error}"),
                }
            }
        }
    }
}

/// The kernel for the gradient of queries sums the rows whose logsumexp is large, whether or not the gradient
/// is wanted, or another kernel has it.
#[test]
fn rows_are_summed_before_others_need_them_and_without_a_launch_of_their_own() {
    let desc = |width| TensorDesc::contiguous(DType::Bf16, [2, 300, 4, width]);
    let builder = Problem::builder(desc(64), desc(64), desc(64)).device(Device::Cuda(0));
    let bias = TensorDesc::contiguous(DType::Bf16, [1, 4, 300, 300]);
    let builder = builder.bias(bias).sinks(TensorDesc::contiguous(DType::F32, [4]));
    let entry_points = |gradients: Gradients, machine: Machine| -> Vec<&str> {
        let problem = builder.clone().gradients(gradients).build().unwrap();
        let plan = Launches::of(&problem, machine).unwrap();
        let name = |kernel: &crate::launches::Kernel| kernel.entry_point.trim_start_matches("attention_");
        plan.kernels.iter().map(name).collect()
    };
    let first = ["prepare_gradients", "gradient_of_queries"];
    for machine in [SMALL, AMPERE, HOPPER] {
        assert_eq!(entry_points(Gradients::QUERY, machine), first);
        let all: &[&str] = match machine.warpgroups {
            true => &["prepare_gradients", "gradient_of_queries", "gradients", "finish_queries"],
            false => &["prepare_gradients", "gradient_of_queries", "gradient_of_keys"],
        };
        assert_eq!(entry_points(Gradients::QKV, machine), all);
        for (gradients, last) in [
            (Gradients::KEY | Gradients::VALUE, "gradient_of_keys"),
            (Gradients::SINKS, "gradient_of_sinks"),
            (Gradients::BIAS, "gradient_of_bias"),
        ] {
            assert_eq!(entry_points(gradients, machine), [first[0], first[1], last]);
        }
    }
}

/// The kernel in front of it sets to 0 what its blocks tell each other: without query rows, none does.
#[test]
fn all_gradients_have_one_kernel_where_there_are_query_rows() {
    let launches = |rows: usize, keys: usize| {
        let desc = |length| TensorDesc::contiguous(DType::Bf16, [2, length, 4, 64]);
        let builder = Problem::builder(desc(rows), desc(keys), desc(keys)).device(Device::Cuda(0));
        let plan = Launches::of(&builder.gradients(Gradients::QKV).build().unwrap(), HOPPER).unwrap();
        plan.kernels.iter().map(|kernel| kernel.entry_point).collect::<Vec<_>>()
    };
    assert_eq!(launches(0, 300), ["attention_gradient_of_keys"]);
    // Rows without keys are zeros, which the second one writes.
    assert_eq!(launches(300, 0), ["attention_prepare_gradients", "attention_gradient_of_queries"]);
    assert_eq!(launches(300, 300)[2..], ["attention_gradients", "attention_finish_queries"]);
    // Of grouped heads with structure, and of batch-invariant calls, two kernels have them.
    let desc = |heads| TensorDesc::contiguous(DType::Bf16, [2, 300, heads, 64]);
    let grouped =
        Problem::builder(desc(4), desc(2), desc(2)).device(Device::Cuda(0)).gradients(Gradients::QKV);
    for (builder, has_one) in [
        (grouped.clone(), true),
        (grouped.clone().causal(true), false),
        (grouped.clone().batch_invariant(true), false),
        (grouped.gradients(Gradients::QUERY | Gradients::KEY), false),
    ] {
        let problem = builder.build().unwrap();
        let plan = Launches::of(&problem, HOPPER).unwrap();
        let has = plan.kernels.iter().any(|kernel| kernel.entry_point == "attention_gradients");
        assert_eq!(has, has_one, "{problem}");
    }
}

#[test]
fn scratch_does_not_depend_on_the_device() {
    for pass in [Pass::Forward, Pass::Backward] {
        for (name, problem) in problems(DType::Bf16, pass) {
            let Ok(plan) = Launches::of(&problem, Machine::ANY) else { continue };
            for machine in [SMALL, AMPERE, HOPPER] {
                let other = Launches::of(&problem, machine).unwrap();
                assert_eq!(plan.scratch_bytes(), other.scratch_bytes(), "{name}");
            }
        }
    }
}

#[test]
fn kernels_are_chosen_by_what_a_problem_says_of_its_calls_numbers() {
    let features = |problem: &Problem| Shape::of(problem).unwrap().features;
    let slopes = TensorDesc::contiguous(DType::F32, [4]);
    let (alibi, all) = (Features::ALIBI.with(Features::LOGITS), Features::ALL);
    assert_eq!(features(&problem_with(|problem| problem)), Features::NONE);
    assert_eq!(features(&problem_with(|problem| problem.any_scale(true))), Features::LOGITS);
    assert_eq!(
        features(&problem_with(|problem| problem.softcap(true))),
        Features::SOFTCAP.with(Features::LOGITS)
    );
    assert_eq!(features(&problem_with(|problem| problem.dropout_rate(0.5))), Features::DROPOUT);
    // Less than one of 65536 is none.
    assert_eq!(features(&problem_with(|problem| problem.dropout_rate(1e-6))), Features::NONE);
    for (alignment, expected) in [
        (Alignment::TopLeft, alibi),
        (Alignment::BottomRight, alibi),
        (Alignment::Offset(OffsetRange::Near), alibi),
        (Alignment::Offset(OffsetRange::Any), all),
    ] {
        let problem = problem_with(|problem| problem.alibi_slopes(slopes).alignment(alignment));
        assert_eq!(features(&problem), expected, "{alignment}");
    }
    for (range, expected) in [(OffsetRange::Near, alibi), (OffsetRange::Any, all)] {
        let problem = problem_with(|problem| problem.alibi_slopes(slopes).query_offsets(range, DType::I64));
        assert_eq!(features(&problem), expected, "{range:?}");
    }
    // Positions of rows, and distances to keys, are numbers of f32 up to these lengths.
    for (queries, keys, expected) in
        [(1 << 22, 1 << 23, alibi), ((1 << 22) + 1, 1, all), (1, (1 << 23) + 1, all)]
    {
        let desc = |length| TensorDesc::contiguous(DType::Bf16, [1, length, 4, 64]);
        let builder = Problem::builder(desc(queries), desc(keys), desc(keys)).device(Device::Cuda(0));
        let problem = builder.alibi_slopes(slopes).build().unwrap();
        assert_eq!(features(&problem), expected, "{queries} and {keys}");
    }
}

#[test]
fn scratch_has_room_for_the_numbers_of_many_batch_rows_in_host_memory() {
    let launches = |problem: &Problem| Launches::of(problem, Machine::ANY).unwrap();
    let of = |batch: usize, keys: usize, data: CallData<'_>, backward: bool| {
        let desc = |length| TensorDesc::contiguous(DType::Bf16, [batch, length, 2, 64]);
        let builder = Problem::builder(desc(1), desc(keys), desc(keys)).device(Device::Cuda(0)).data(&data);
        if backward { builder.gradients(Gradients::QKV).build() } else { builder.build() }.unwrap()
    };
    let lengths = vec![1i32; 100];
    for (batch, numbers) in [(64, 0), (65, 65 * 8), (100, 100 * 8)] {
        let data = CallData {
            key_value_lengths: Some(View::from_slice(&lengths[..batch], [batch]).unwrap()),
            ..CallData::default()
        };
        for (keys, backward) in [(8, false), (8192, false), (8, true)] {
            let plain = launches(&of(batch, keys, CallData::default(), backward)).scratch_bytes();
            let problem = of(batch, keys, data, backward);
            let plan = launches(&problem);
            assert_eq!(plan.numbers.len(), numbers, "{problem}");
            assert!(plan.numbers.start.is_multiple_of(8) && (numbers == 0 || plan.numbers.start >= plain));
            assert_eq!(plan.scratch_bytes(), if numbers == 0 { plain } else { plan.numbers.end });
            let splits = Launches::of(&problem, HOPPER).unwrap().splits;
            assert_eq!(splits > 1, keys == 8192, "{problem}");
            // In device memory they need none.
            let on_device =
                problem.to_builder().in_host_memory(Role::KeyValueLengths, false).build().unwrap();
            assert_eq!(launches(&on_device).scratch_bytes(), plain, "{on_device}");
        }
    }
}

#[test]
fn numbers_in_device_memory_are_served() {
    let backend = ChunkedCudaBackend::new(ChunkedCudaConfig::default());
    for dtype in DType::INTEGERS {
        let one = TensorDesc::contiguous(dtype, [1]);
        let problem = problem_with(|problem| {
            problem
                .query_lengths(dtype)
                .layout(Role::KeyValueLengths, TensorDesc::strided(dtype, [2], [-3]).unwrap())
                .query_offsets(OffsetRange::Any, dtype)
                .dropout_rate(0.1)
                .layout(Role::DropoutSeed, one)
                .layout(Role::DropoutOffset, one)
        });
        assert!(problem.features().contains(Feature::DeviceData));
        assert!(problem.features().contains(Feature::QueryOffsets));
        backend.supports(&problem).unwrap();
        assert_eq!(backend.scratch_bytes(&problem), backend.scratch_bytes(&problem_with(|problem| problem)));
    }
}

#[test]
fn blocks_that_read_the_same_mask_or_bias_are_scheduled_round_robin() {
    let of = |role: Role, shape: [usize; 4]| {
        let heads = TensorDesc::contiguous(DType::Bf16, [4, 300, 6, 64]);
        let builder = Problem::builder(heads, heads, heads).device(Device::Cuda(0));
        let problem = match role {
            Role::Mask => builder.mask(TensorDesc::contiguous(DType::Bool, shape)).build(),
            _ => builder.bias(TensorDesc::contiguous(DType::Bf16, shape)).build(),
        };
        Swizzle::of(&problem.unwrap())
    };
    assert_eq!(of(Role::Mask, [4, 1, 300, 300]), Swizzle { count: 3, batch: false });
    assert_eq!(of(Role::Bias, [1, 6, 300, 300]), Swizzle { count: 4, batch: true });
    // Nothing is read twice, or what is read is short.
    assert_eq!(of(Role::Bias, [4, 6, 300, 300]), Swizzle { count: 1, batch: false });
    assert_eq!(of(Role::Mask, [4, 1, 1, 300]), Swizzle { count: 1, batch: false });
}

#[test]
fn memory_of_another_device_is_refused() {
    let backend = ChunkedCudaBackend::new(ChunkedCudaConfig::default().device(1));
    let problem = with_heads(DType::F32, 64, 64, Pass::Forward);
    let error = backend.supports(&problem).unwrap_err().to_string();
    assert!(error.contains("cuda:1"), "{error}");
}
