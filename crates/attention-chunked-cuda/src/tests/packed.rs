//! Plans of packed sequences.

use attention_conformance::cases;
use attention_core::{DType, Device, FeatureSet, Gradients, Problem, ProblemBuilder, TensorDesc};

use super::{AMPERE, HOPPER, SMALL, on_device};
use crate::launches::Launches;

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
                        "attention_gradient_of_keys" | "attention_gradients" => {
                            ("attention_schedule_key_tiles", kernel.tiles.keys)
                        }
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

/// One tile of keys passes no sum on; more may be of one sequence, whatever the number of sequences is.
#[test]
fn sums_of_the_gradient_of_queries_have_room_for_a_sequence_among_empty_ones() {
    use crate::one_pass::OnePassScratch;
    use crate::tiles::Shape;

    for (sequences, rows, has_sums) in [(3, 128, false), (3, 130, true), (200, 300, true)] {
        let tokens = TensorDesc::contiguous(DType::Bf16, [rows, 4, 64]);
        let builder = Problem::builder(tokens, tokens, tokens).device(Device::Cuda(0));
        let builder = builder.packed_queries(sequences, DType::I32).packed_keys(sequences, DType::I32);
        let problem = builder.gradients(Gradients::QKV).build().unwrap();
        let shape = Shape::of(&problem).unwrap();
        let bytes = OnePassScratch::of(shape, &problem, 0).unwrap().end();
        // Tiles of all heads, sums of 128 rows and 64 columns.
        let tiles = (rows / 128 + sequences + 1) * 4;
        let sums = if has_sums { tiles * 128 * 64 * 4 } else { 0 };
        assert_eq!(bytes, sums + (2 * tiles + 1) * 4, "{sequences} sequences, {rows} rows");
    }
}
