//! Tiles, their shared memory, and the kernels that are compiled for them.

use attention_core::{DType, Device, Gradients, Pass, Problem, TensorDesc};

use super::{AMPERE, HOPPER, SMALL, every_kind_of_problem, with_heads};
use crate::launches::Launches;
use crate::tiles::Machine;

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
            let step_of = |entry_point: &str| {
                let gradients = match entry_point {
                    "attention_gradient_of_queries" => Gradients::QUERY,
                    _ => Gradients::KEY | Gradients::VALUE,
                };
                let problem = problem.to_builder().gradients(gradients).build().unwrap();
                let plan = Launches::of(&problem, HOPPER).unwrap();
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

#[test]
fn few_rows_share_tiles_and_cut_the_keys() {
    let query = TensorDesc::contiguous(DType::Bf16, [2, 1, 32, 128]);
    let key = TensorDesc::contiguous(DType::Bf16, [2, 8192, 8, 128]);
    let problem = Problem::builder(query, key, key).device(Device::Cuda(0)).build().unwrap();
    let plan = Launches::of(&problem, AMPERE).unwrap();
    assert_eq!((plan.pack_gqa, plan.splits), (4, 37));
    // Per part, an output and two numbers for each row, in f32; for as many parts as any device may have.
    assert_eq!(plan.scratch_bytes(), 64 * 2 * 32 * (128 + 2) * 4);
    assert_eq!(plan.kernels.len(), 2);
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
