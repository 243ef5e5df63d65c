//! What can be checked without a GPU: structure, tiles, plans and refusals.

use std::collections::BTreeSet;

use attention_conformance::cases;
use attention_core::{
    Alignment, AttentionBackend, CallData, CallProblem, DType, Device, Feature, FeatureSet, Gradients,
    OffsetRange, Pass, Problem, ProblemBuilder, Role, TensorDesc, Unsupported, View,
};
use attention_cuda::parameters::{Swizzle, sequences};
use attention_kernels::Features;

use super::launches::{Kernel, Launches, variants};
use super::schedule::SCHEDULE;
use super::tiles::{Machine, Shape};
use super::{ChunkedCudaBackend, ChunkedCudaConfig};

/// The smallest device, and those for data centres of compute capability 8.0 and 9.0.
const SMALL: Machine =
    Machine { shared_bytes: 99 << 10, multiprocessors: 84, warpgroups: false, tf32_split: true };
const AMPERE: Machine =
    Machine { shared_bytes: 163 << 10, multiprocessors: 108, warpgroups: false, tf32_split: true };
const HOPPER: Machine =
    Machine { shared_bytes: 227 << 10, multiprocessors: 132, warpgroups: true, tf32_split: true };

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

#[test]
fn every_kernel_is_compiled_for_the_threads_it_is_launched_with() {
    let (mut merges, mut kernels) = (0, 0);
    for problem in every_kind_of_problem() {
        for machine in [SMALL, AMPERE, HOPPER, Machine { tf32_split: false, warpgroups: false, ..HOPPER }] {
            let plan = Launches::of(&problem, machine).unwrap();
            for kernel in &plan.kernels {
                let threads = kernel.launch_config().block_dim.0;
                let what = format!("{problem} on {machine:?}: {kernel:?}");
                let bound = plan.compiled_as(&problem, kernel).defines().iter().find_map(|define| {
                    define.strip_prefix("BLOCK=").map(|bound| bound.parse::<u32>().unwrap())
                });
                // Both what the source is bounded with, and what any device bears.
                assert!(
                    threads > 0 && bound.is_some_and(|bound| threads <= bound && bound <= 1024),
                    "{what}"
                );
                let source = attention_kernels::source(kernel.source).unwrap();
                assert!(source.entry_points.contains(&kernel.entry_point), "{what}");
                // The backend refuses what does not fit: f64 with the largest heads on the smallest devices.
                let refused = problem.dtype() == DType::F64 && machine.shared_bytes == SMALL.shared_bytes;
                assert!(kernel.shared_bytes <= machine.shared_bytes || refused, "{what}");
                kernels += 1;
                if kernel.entry_point == "attention_merge" {
                    // It has no loaders, so it must not be launched with some.
                    assert_eq!(threads as usize, 32 * kernel.tiles.warps, "{what}");
                    merges += 1;
                }
            }
        }
    }
    assert!(kernels > 1000 && merges > 100, "{kernels} kernels, {merges} merges");
}

#[test]
fn every_variant_that_a_plan_chooses_is_listed() {
    for machine in [SMALL, AMPERE, HOPPER, Machine { tf32_split: false, warpgroups: false, ..HOPPER }] {
        let listed = variants(machine);
        for problem in every_kind_of_problem() {
            let plan = Launches::of(&problem, machine).unwrap();
            // The backend refuses the others.
            if plan.kernels.iter().any(|kernel| kernel.shared_bytes > machine.shared_bytes) {
                continue;
            }
            for kernel in &plan.kernels {
                for name in [kernel.axes(&plan), vec![kernel.variant(&plan)]].concat() {
                    assert!(listed.contains(&name), "{problem} on {machine:?}: {name}");
                }
            }
        }
        assert!((40..900).contains(&listed.len()), "{}: {listed:#?}", listed.len());
    }
}

/// Every kernel's names in the plans of the suite's cases are listed, and every name that is listed is that of
/// some plan: for Hopper in the configurations that docs/gpu-runs/run.sh runs, and for other devices.
#[test]
fn every_variant_that_is_listed_is_chosen_by_a_case_of_the_suite() {
    let plain = Machine { warpgroups: false, tf32_split: false, ..HOPPER };
    let machines = [
        HOPPER,
        Machine { tf32_split: false, ..HOPPER },
        Machine { warpgroups: false, ..HOPPER },
        plain,
        AMPERE,
        SMALL,
        Machine { tf32_split: false, ..SMALL },
    ];
    let backend = ChunkedCudaBackend::default();
    let listed = machines.map(variants);
    let mut missing = listed.clone();
    // What the script runs of the second and the third machine, beside all of the first: these families, in
    // the dtypes that are computed otherwise there.
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/gpu-runs/run.sh");
    let script = std::fs::read_to_string(script).unwrap();
    let families = script.split("for family in ").find(|rest| rest.starts_with("tile/ large/")).unwrap();
    let families: Vec<&str> = families.split(';').next().unwrap().split(' ').collect();
    let is_run = |index: usize, dtype: DType, name: &str| match index {
        0 => true,
        1 => dtype == DType::F32 && families.iter().any(|family| name.contains(family)),
        2 => {
            dtype != DType::F32 && dtype != DType::F64 && families.iter().any(|family| name.contains(family))
        }
        _ => false,
    };
    let mut not_run: BTreeSet<String> = listed[..3].iter().flatten().cloned().collect();
    // The families of magnitudes and bits have much data, and sizes that others have.
    let cases = (cases::all().into_iter())
        .filter(|case| !["magnitude/", "bits/"].iter().any(|family| case.name.starts_with(family)))
        .chain(cases::of_sequences())
        .chain(cases::of_eight_bits())
        .chain(cases::of_batch_invariance());
    for (case, dtype) in cases.flat_map(|case| DType::FLOATS.map(|dtype| (case.clone(), dtype))) {
        let data = case.data(dtype);
        let data = case.laid_out(&data);
        for &pass in case.passes() {
            let problem = on_device(&case.problem(&data, pass, FeatureSet::all()).unwrap());
            if backend.supports(&problem).is_err() {
                continue;
            }
            for (index, machine) in machines.into_iter().enumerate() {
                let Ok(plan) = Launches::of(&problem, machine) else { continue };
                // The backend refuses the others.
                if plan.kernels.iter().any(|kernel| kernel.shared_bytes > machine.shared_bytes) {
                    continue;
                }
                for kernel in &plan.kernels {
                    for name in [kernel.axes(&plan), vec![kernel.variant(&plan)]].concat() {
                        missing[index].remove(&name);
                        if is_run(index, dtype, &case.name) {
                            not_run.remove(&name);
                        }
                        assert!(listed[index].contains(&name), "{} on {machine:?}: {name}", case.name);
                    }
                }
            }
        }
    }
    let missing: Vec<_> = machines.iter().zip(&missing).filter(|(_, names)| !names.is_empty()).collect();
    assert!(missing.is_empty(), "{missing:#?}");
    assert!(not_run.is_empty(), "{not_run:#?}");
}

#[test]
fn tiles_fit_into_shared_memory() {
    for dtype in DType::FLOATS {
        for (head, value) in [(32, 32), (64, 64), (96, 96), (128, 128), (192, 128), (256, 64), (256, 256)] {
            for pass in [Pass::Forward, Pass::Backward] {
                let problem = with_heads(dtype, head, value, pass);
                for machine in [SMALL, AMPERE, HOPPER] {
                    let limit = machine.shared_bytes;
                    let plan = Launches::of(&problem, machine).unwrap();
                    let most = plan.kernels.iter().map(|kernel| kernel.shared_bytes).max().unwrap();
                    // The largest heads of f64 need a device for data centres.
                    let too_small =
                        limit == SMALL.shared_bytes && dtype == DType::F64 && head > 192 && value > 192;
                    let excused = too_small && pass == Pass::Backward;
                    assert!(most <= limit || excused, "{dtype} {pass} {head} {value}: {most} of {limit}");
                }
            }
        }
    }
}

/// A multiprocessor of compute capability 9.0 sets shared memory aside in steps, and the rest is cache; each
/// block has 1 KiB more than it asks for (CUDA C++ Programming Guide, "Shared Memory" of 9.0). What a step
/// costs was below what could be measured (an H200, 1 x 256 and 32 x 512, backward), so this only keeps the
/// cache as large as it can be.
#[test]
fn shared_memory_on_warpgroups_stays_below_the_steps_that_were_measured() {
    let step = |bytes: usize| {
        let steps = [0, 8, 16, 32, 64, 100, 132, 164, 196, 228];
        steps.into_iter().find(|&step| bytes + (1 << 10) <= step << 10).unwrap()
    };
    for dtype in [DType::F16, DType::Bf16] {
        for (head, queries, keys) in [(64, 100, 100), (128, 196, 132)] {
            let problem = with_heads(dtype, head, head, Pass::Backward);
            let plan = Launches::of(&problem, HOPPER).unwrap();
            let step_of = |entry_point: &str| {
                let kernel = plan.kernels.iter().find(|kernel| kernel.entry_point == entry_point).unwrap();
                assert!(kernel.tiles.warpgroups, "{entry_point} of {dtype}, {head}");
                step(kernel.shared_bytes)
            };
            assert_eq!(step_of("attention_gradient_of_queries"), queries, "{dtype}, {head}");
            assert_eq!(step_of("attention_gradient_of_keys"), keys, "{dtype}, {head}");
        }
    }
}

#[test]
fn large_heads_are_for_the_forward_pass_and_shared_among_blocks() {
    for dtype in DType::FLOATS {
        for machine in [SMALL, AMPERE, HOPPER] {
            let problem = with_heads(dtype, 576, 512, Pass::Forward);
            let plan = Launches::of(&problem, machine).unwrap();
            let kernel = &plan.kernels[0];
            let too_small = dtype == DType::F64 && machine.shared_bytes == SMALL.shared_bytes;
            assert!(
                kernel.shared_bytes <= machine.shared_bytes || too_small,
                "{dtype}: {}",
                kernel.shared_bytes
            );
            let defines = plan.compiled_as(&problem, kernel).defines();
            assert!(defines.contains(&"VALUE=256".to_owned()) && defines.contains(&"SLICES=2".to_owned()));
        }
    }
}

#[test]
fn long_f32_is_split_where_that_is_wanted() {
    let splits_with = |machine: Machine, head: usize| {
        let problem = with_heads(DType::F32, head, 128, Pass::Backward);
        let plan = Launches::of(&problem, machine).unwrap();
        plan.kernels.iter().filter(|kernel| kernel.tiles.tf32_split).count()
    };
    // The gradients of queries, and of keys and values.
    assert_eq!([SMALL, AMPERE, HOPPER].map(|machine| splits_with(machine, 64)), [2; 3]);
    assert_eq!([48, 192].map(|head| splits_with(HOPPER, head)), [0; 2]);
    assert_eq!(splits_with(Machine { tf32_split: false, ..HOPPER }, 128), 0);
}

/// The kernels of calls with keys of 8 bits are compiled for these, have room to widen them, and leave to the
/// softmax no scale whose sign it does not know.
#[test]
fn keys_of_8_bits_have_kernels_of_their_own() {
    let query = TensorDesc::contiguous(DType::Bf16, [2, 1, 32, 128]);
    let scales = TensorDesc::contiguous(DType::F32, [2, 8]);
    for (dtype, code) in [(DType::Bf16, None), (DType::F8E4M3, Some(8)), (DType::F8E5M2, Some(9))] {
        let key = TensorDesc::contiguous(dtype, [2, 8192, 8, 128]);
        let builder = Problem::builder(query, key, key).device(Device::Cuda(0));
        let compiled = |problem: &Problem| {
            let plan = Launches::of(problem, HOPPER).unwrap();
            assert_eq!(plan.kernels.len(), 2, "{problem}");
            let of = |kernel| plan.compiled_as(problem, kernel).defines();
            let defines: Vec<Vec<String>> = plan.kernels.iter().map(of).collect();
            for defines in &defines {
                let given = defines.iter().find_map(|define| define.strip_prefix("EIGHT_BIT="));
                assert_eq!(given.map(|given| given.parse().unwrap()), code, "{problem}");
            }
            (plan.kernels[0].shared_bytes, defines[0].contains(&"FEATURES=32".to_owned()))
        };
        // Four query heads share a key/value head: blocks that read bytes have 8 rows, others 16.
        let (row, tile, staged) = (272, 32 * 272, 32 * 256);
        let bytes = if code.is_some() { 8 * row + staged } else { 16 * row + 2 * tile };
        assert_eq!(compiled(&builder.clone().build().unwrap()), (bytes, false));
        if code.is_some() {
            assert_eq!(compiled(&builder.clone().key_scales(scales).build().unwrap()), (bytes, true));
            assert_eq!(compiled(&builder.value_scales(scales).build().unwrap()), (bytes, false));
        }
    }
}

/// The kernel for the gradient of queries sums the rows whose logsumexp is large, whether or not the gradient
/// is wanted.
#[test]
fn rows_are_summed_before_others_need_them_and_without_a_launch_of_their_own() {
    let desc = |width| TensorDesc::contiguous(DType::Bf16, [2, 300, 4, width]);
    let builder = Problem::builder(desc(64), desc(64), desc(64)).device(Device::Cuda(0));
    let bias = TensorDesc::contiguous(DType::Bf16, [1, 4, 300, 300]);
    let builder = builder.bias(bias).sinks(TensorDesc::contiguous(DType::F32, [4]));
    let entry_points = |gradients: Gradients, machine: Machine| -> Vec<&str> {
        let problem = builder.clone().gradients(gradients).build().unwrap();
        let plan = Launches::of(&problem, machine).unwrap();
        let name = |kernel: &super::launches::Kernel| kernel.entry_point.trim_start_matches("attention_");
        plan.kernels.iter().map(name).collect()
    };
    let first = ["prepare_gradients", "gradient_of_queries"];
    for machine in [SMALL, AMPERE, HOPPER] {
        assert_eq!(entry_points(Gradients::QUERY, machine), first);
        assert_eq!(
            entry_points(Gradients::QKV, machine),
            ["prepare_gradients", "gradient_of_queries", "gradient_of_keys"]
        );
        for (gradients, last) in [
            (Gradients::KEY | Gradients::VALUE, "gradient_of_keys"),
            (Gradients::SINKS, "gradient_of_sinks"),
            (Gradients::BIAS, "gradient_of_bias"),
        ] {
            assert_eq!(entry_points(gradients, machine), [first[0], first[1], last]);
        }
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
fn few_rows_share_tiles_and_cut_the_keys() {
    let query = TensorDesc::contiguous(DType::Bf16, [2, 1, 32, 128]);
    let key = TensorDesc::contiguous(DType::Bf16, [2, 8192, 8, 128]);
    let problem = Problem::builder(query, key, key).device(Device::Cuda(0)).build().unwrap();
    let plan = Launches::of(&problem, AMPERE).unwrap();
    assert_eq!((plan.pack_gqa, plan.splits), (4, 32));
    // Per part, an output and two numbers for each row, in f32.
    assert_eq!(plan.scratch_bytes(), 32 * 2 * 32 * (128 + 2) * 4);
    assert_eq!(plan.kernels.len(), 2);
}

/// A call of one sequence has the kernels that it has among others, whatever the lengths and the layout are.
#[test]
fn plans_of_batch_invariant_calls_depend_on_no_length() {
    type Sizes = (usize, usize, usize);
    let sizes: [Sizes; 6] =
        [(1, 1, 1), (1, 300, 300), (1, 1, 5000), (64, 1, 5000), (3, 5000, 129), (2, 40, 1 << 23)];
    let slopes = TensorDesc::contiguous(DType::F32, [8]);
    let options: [fn(ProblemBuilder, TensorDesc) -> ProblemBuilder; 4] = [
        |problem, _| problem,
        |problem, _| problem.causal(true).softcap(true),
        |problem, slopes| problem.alibi_slopes(slopes),
        |problem, slopes| problem.alibi_slopes(slopes).query_offsets(OffsetRange::Any, DType::I64),
    ];
    for (dtype, machine) in DType::FLOATS.into_iter().flat_map(|dtype| [(dtype, AMPERE), (dtype, HOPPER)]) {
        for (width, (index, option)) in [32, 64, 128, 256]
            .into_iter()
            .flat_map(|width| options.iter().enumerate().map(move |o| (width, o)))
        {
            let mut seen = BTreeSet::new();
            for ((batch, queries, keys), packed) in
                sizes.into_iter().flat_map(|sizes| [(sizes, false), (sizes, true)])
            {
                let desc = |length, heads| TensorDesc::contiguous(dtype, [batch, length, heads, width]);
                let rows = |length, heads| TensorDesc::contiguous(dtype, [batch * length, heads, width]);
                let dense = || Problem::builder(desc(queries, 8), desc(keys, 2), desc(keys, 2));
                let tokens = || Problem::builder(rows(queries, 8), rows(keys, 2), rows(keys, 2));
                let builder = match packed {
                    true => tokens().packed_queries(batch, DType::I32).packed_keys(batch, DType::I32),
                    false => dense(),
                };
                let builder = option(builder, slopes).device(Device::Cuda(0)).batch_invariant(true);
                for gradients in [Gradients::NONE, Gradients::QKV] {
                    // What of a backward problem is the same whichever gradients there are is in the forward
                    // one.
                    let builder = builder.clone();
                    let builder = if gradients.is_empty() { builder } else { builder.gradients(gradients) };
                    let problem = builder.build().unwrap();
                    let plan = Launches::of(&problem, machine).unwrap();
                    assert!(!gradients.is_empty() || plan.pack_gqa == 4, "{problem}");
                    // Lists of tiles have no numbers, and the height of the tiles of either pass.
                    let computes = |kernel: &&Kernel| kernel.source != SCHEDULE;
                    for kernel in plan.kernels.iter().filter(computes) {
                        let defines = plan.compiled_as(&problem, kernel).defines();
                        let defines: Vec<_> =
                            defines.into_iter().filter(|define| !define.starts_with("LAYOUT")).collect();
                        seen.insert((kernel.entry_point, kernel.gradients as u32, defines.join(" ")));
                    }
                }
            }
            let mut kernels: Vec<_> = seen.iter().map(|&(name, gradients, _)| (name, gradients)).collect();
            let count = kernels.len();
            kernels.dedup();
            assert_eq!(kernels.len(), count, "{dtype}, {width}, option {index}: {seen:#?}");
            assert!(kernels.contains(&("attention_merge", 0)), "{kernels:?}");
        }
    }
}

/// Few rows share the keys among blocks; many do not, and keep one partial output per row in scratch.
#[test]
fn splits_of_batch_invariant_calls_are_merged_by_one_block_or_by_a_kernel() {
    let launches = |batch: usize, queries: usize, keys: usize| {
        let desc = |length, heads| TensorDesc::contiguous(DType::Bf16, [batch, length, heads, 128]);
        let builder =
            Problem::builder(desc(queries, 32), desc(keys, 8), desc(keys, 8)).device(Device::Cuda(0));
        let plan = Launches::of(&builder.batch_invariant(true).build().unwrap(), HOPPER).unwrap();
        (plan.splits, plan.kernels.len(), plan.scratch_bytes())
    };
    let bytes = |splits: usize, rows: usize| splits * rows * 32 * (128 + 2) * 4;
    assert_eq!(launches(2, 1, 2048), (1, 1, 0));
    assert_eq!(launches(2, 1, 2049), (2, 2, bytes(2, 2)));
    assert_eq!(launches(2, 1, 8192), (4, 2, bytes(4, 2)));
    assert_eq!(launches(64, 1, 8192), (1, 1, bytes(1, 64)));
    assert_eq!(launches(1, 4096, 4096), (1, 1, bytes(1, 4096)));
    // Their partial outputs would have more bytes than the bound.
    assert_eq!(launches(1, 300, 1 << 20), (1, 1, bytes(1, 300)));
}

#[test]
fn options_alone_have_kernels_of_their_own() {
    let mut seen = std::collections::BTreeSet::new();
    for (_, problem) in problems(DType::Bf16, Pass::Forward) {
        seen.extend(Shape::of(&problem).map(|shape| shape.features.bits()));
    }
    // 16 is dropout; 32 stands for logits that are made one by one, which a scale below 0 asks for as well.
    assert_eq!(seen.into_iter().collect::<Vec<_>>(), [0, 1, 16, 32, 33, 34, 36, 40, 48, 63]);
}

/// A problem of two sequences of bf16, with more options.
fn problem_with(options: impl Fn(ProblemBuilder) -> ProblemBuilder) -> Problem {
    sized([2, 300, 4, 64], options)
}

fn sized(shape: [usize; 4], options: impl Fn(ProblemBuilder) -> ProblemBuilder) -> Problem {
    let desc = TensorDesc::contiguous(DType::Bf16, shape);
    options(Problem::builder(desc, desc, desc).device(Device::Cuda(0))).build().unwrap()
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
            assert_eq!(plan.splits > 1, keys == 8192, "{problem}");
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

/// As many blocks as multiprocessors go over the tiles of the forward kernel on warpgroups; elsewhere each
/// tile has a block.
#[test]
fn blocks_on_warpgroups_go_over_all_tiles() {
    let of = |length: usize, machine: Machine| {
        let heads = TensorDesc::contiguous(DType::Bf16, [4, length, 16, 128]);
        let problem = Problem::builder(heads, heads, heads).device(Device::Cuda(0)).build().unwrap();
        let plan = Launches::of(&problem, machine).unwrap();
        (plan.kernels[0].blocks, plan.forward_tiles)
    };
    assert_eq!(of(4096, HOPPER), (132, 4 * 16 * 32));
    assert_eq!(of(4096, Machine { multiprocessors: 1, ..HOPPER }), (1, 4 * 16 * 32));
    // Fewer tiles than multiprocessors.
    assert_eq!(of(100, Machine { multiprocessors: 1000, ..HOPPER }), (4 * 16, 4 * 16));
    assert_eq!(of(4096, Machine { warpgroups: false, ..HOPPER }), (4 * 16 * 32, 0));
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
fn batch_invariance_of_keys_of_8_bits_is_refused() {
    let query = TensorDesc::contiguous(DType::Bf16, [1, 40, 2, 64]);
    let key = TensorDesc::contiguous(DType::F8E4M3, [1, 5000, 2, 64]);
    let builder = Problem::builder(query, key, key).device(Device::Cuda(0));
    let backend = ChunkedCudaBackend::default();
    assert_eq!(backend.supports(&builder.clone().build().unwrap()), Ok(()));
    let refused = backend.supports(&builder.batch_invariant(true).build().unwrap()).unwrap_err();
    assert!(refused.to_string().contains("batch invariance with keys of f8e4m3"), "{refused}");
}

#[test]
fn memory_of_another_device_is_refused() {
    let backend = ChunkedCudaBackend::new(ChunkedCudaConfig::default().device(1));
    let problem = with_heads(DType::F32, 64, 64, Pass::Forward);
    let error = backend.supports(&problem).unwrap_err().to_string();
    assert!(error.contains("cuda:1"), "{error}");
}

/// Each kernel whose blocks have tiles of packed rows follows one that lists tiles of the same height, and
/// scratch has an entry for each of its blocks, on every device.
#[test]
fn tiles_of_packed_rows_are_listed_in_front() {
    use attention_cuda::parameters::SCHEDULED_TILE;
    use attention_kernels::Layout;

    let cases = cases::of_sequences().into_iter().chain(cases::of_batch_invariance());
    let cases = cases.chain(cases::of_eight_bits());
    let (mut listed, mut unlisted) = (0, 0);
    for (case, dtype) in cases.flat_map(|case| DType::FLOATS.map(|dtype| (case.clone(), dtype))) {
        let data = case.data(dtype);
        let data = case.laid_out(&data);
        for &pass in case.passes() {
            let problem = on_device(&case.problem(&data, pass, FeatureSet::all()).unwrap());
            for machine in [SMALL, AMPERE, HOPPER] {
                let plan = Launches::of(&problem, machine)
                    .unwrap_or_else(|refused| panic!("{} {dtype} {pass}: {refused}", case.name));
                let mut before = None;
                for kernel in &plan.kernels {
                    let (name, height) = match kernel.entry_point {
                        "attention_forward" | "attention_gradient_of_queries" => {
                            ("attention_schedule_query_tiles", kernel.tiles.rows)
                        }
                        "attention_gradient_of_keys" => ("attention_schedule_key_tiles", kernel.tiles.keys),
                        other => {
                            before = Some((other, kernel.tiles.rows));
                            continue;
                        }
                    };
                    let what = format!("{} {dtype} {pass} on {machine:?}: {kernel:?}", case.name);
                    if plan.layout == Layout::Packed {
                        listed += 1;
                        assert_eq!(before, Some((name, height)), "{what}");
                        let shares = match kernel.entry_point {
                            "attention_forward" => plan.splits * plan.shape.slices(),
                            _ => 1,
                        };
                        let entries = kernel.blocks as usize / shares;
                        assert!(entries * SCHEDULED_TILE <= plan.schedule.len(), "{what}");
                        assert!(plan.schedule.start.is_multiple_of(SCHEDULED_TILE), "{what}");
                        assert!(plan.schedule.end <= plan.scratch_bytes(), "{what}");
                    } else {
                        unlisted += 1;
                        assert!(plan.schedule.is_empty(), "{what}");
                    }
                    before = None;
                }
            }
        }
    }
    assert!(listed > 100 && unlisted > 100, "{listed} and {unlisted}");
}

/// Packed rows take grids and scratch for the rows that there are, whatever the longest sequence may be.
#[test]
fn packed_rows_are_counted_once() {
    use attention_kernels::Layout;

    let tokens = |rows: usize, heads: usize| TensorDesc::contiguous(DType::Bf16, [rows, heads, 64]);
    let packed = |sequences: usize, rows: usize| {
        let builder = Problem::builder(tokens(rows, 4), tokens(rows, 4), tokens(rows, 4));
        builder
            .device(Device::Cuda(0))
            .packed_queries(sequences, DType::I32)
            .packed_keys(sequences, DType::I32)
    };
    let launches = |builder: ProblemBuilder| {
        let plan = Launches::of(&builder.gradients(Gradients::QKV).build().unwrap(), HOPPER).unwrap();
        assert_eq!(plan.layout, Layout::Packed);
        let blocks: Vec<u32> = plan.kernels.iter().map(|kernel| kernel.blocks).collect();
        (plan.scratch_bytes(), blocks)
    };
    let (few, many) = (launches(packed(1, 4096)), launches(packed(64, 4096)));
    // One number per sequence and head more, up to a multiple of 64 bytes, and one slot for each sequence,
    // with an entry of the schedule for each head.
    assert_eq!(many.0 - few.0, (64 * 4 * 4 - 64) + 63 * 4 * 64);
    assert!(many.1.iter().zip(&few.1).all(|(many, few)| many - few <= 63 * 4), "{many:?}, {few:?}");
    assert_eq!(launches(packed(64, 4096).longest(100, 100)), many);
    // Neither rows nor keys: nothing is launched that has nothing to write.
    assert_eq!(launches(packed(3, 0)).1, [0u32; 0]);
}
