//! Plans of batch-invariant calls.

use std::collections::BTreeSet;

use attention_core::{
    AttentionBackend, DType, Device, Gradients, OffsetRange, Problem, ProblemBuilder, TensorDesc,
};

use super::{AMPERE, HOPPER};
use crate::ChunkedCudaBackend;
use crate::launches::{Kernel, Launches};
use crate::schedule::SCHEDULE;

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
fn batch_invariance_of_keys_of_8_bits_is_refused() {
    let query = TensorDesc::contiguous(DType::Bf16, [1, 40, 2, 64]);
    let key = TensorDesc::contiguous(DType::F8E4M3, [1, 5000, 2, 64]);
    let builder = Problem::builder(query, key, key).device(Device::Cuda(0));
    let backend = ChunkedCudaBackend::default();
    assert_eq!(backend.supports(&builder.clone().build().unwrap()), Ok(()));
    let refused = backend.supports(&builder.batch_invariant(true).build().unwrap()).unwrap_err();
    assert!(refused.to_string().contains("batch invariance with keys of f8e4m3"), "{refused}");
}
