#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]

mod variant;

pub use variant::{
    DTypeCode, Features, Fused, Helper, KEYS_PER_SPLIT, KeyGradients, Layout, Variant, block_threads,
};

use DTypeCode::{Bf16, F8E4M3, F8E5M2, F16, F32, F64};
use KeyGradients::{Key, KeyAndValue};
use Layout::{Packed, Paged};

/// One CUDA source with what can be launched from it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Source {
    /// The file's name in this package, without its folder: what messages and caches call it.
    pub name: &'static str,
    /// The whole text.
    pub text: &'static str,
    /// The names of its `extern "C" __global__` functions.
    pub entry_points: &'static [&'static str],
    /// The variants that `cargo xtask kernels` compiles. Each has every entry point.
    pub variants: &'static [Variant],
}

/// The text of a fused kernel: what all of them share, then its own files, in an order in which each file
/// follows those that it needs.
macro_rules! fused {
    ($($part:literal),*) => {
        concat!(
            include_str!("cuda/common/dtypes.cuh"),
            include_str!("cuda/common/float8.cuh"),
            include_str!("cuda/common/integers.cuh"),
            include_str!("cuda/common/philox.cuh"),
            include_str!("cuda/fused/numbers.cuh"),
            include_str!("cuda/fused/parameters.cuh"),
            include_str!("cuda/fused/sequence.cuh"),
            include_str!("cuda/fused/schedule.cuh"),
            include_str!("cuda/fused/row.cuh"),
            include_str!("cuda/fused/logits.cuh"),
            include_str!("cuda/fused/dropout.cuh"),
            include_str!("cuda/fused/shared_tiles.cuh"),
            include_str!("cuda/fused/fragments.cuh"),
            include_str!("cuda/fused/mma/sm80.cuh"),
            include_str!("cuda/fused/mma/tf32_split.cuh"),
            include_str!("cuda/fused/mma/fma.cuh"),
            include_str!("cuda/fused/mma/sm90.cuh"),
            include_str!("cuda/fused/pipeline.cuh"),
            include_str!("cuda/fused/softmax.cuh"),
            include_str!("cuda/fused/exact.cuh"),
            $(include_str!($part)),*
        )
    };
}

/// Every source of this package, by name.
pub const SOURCES: &[Source] = &[
    Source {
        name: "attention_numbers.cu",
        text: concat!(include_str!("cuda/common/store_numbers.cu")),
        entry_points: &["attention_store_numbers"],
        variants: &[Variant::Helper(Helper::LAUNCHED)],
    },
    Source {
        name: "attention_copy_rows.cu",
        text: concat!(include_str!("cuda/common/copy_rows.cu")),
        entry_points: &["attention_copy_rows"],
        variants: &[Variant::Helper(Helper::LAUNCHED)],
    },
    Source {
        name: "attention_write_numbers.cu",
        text: concat!(include_str!("cuda/common/write_numbers.cu")),
        entry_points: &["attention_write_numbers"],
        variants: &[Variant::Helper(Helper::LAUNCHED)],
    },
    Source {
        name: "attention_rows.cu",
        text: concat!(
            include_str!("cuda/cudnn/strides.cuh"),
            include_str!("cuda/cudnn/intervals.cuh"),
            include_str!("cuda/cudnn/rows.cu")
        ),
        entry_points: &[
            "attention_finish_forward",
            "attention_prepare_backward",
            "attention_clean_rows",
            "attention_clear_gradients",
            "attention_clear_packed",
        ],
        variants: &[Variant::Helper(Helper::LAUNCHED)],
    },
    Source {
        name: "attention_terms.cu",
        text: concat!(
            include_str!("cuda/common/dtypes.cuh"),
            include_str!("cuda/common/float8.cuh"),
            include_str!("cuda/common/integers.cuh"),
            include_str!("cuda/common/philox.cuh"),
            include_str!("cuda/cudnn/strides.cuh"),
            include_str!("cuda/cudnn/intervals.cuh"),
            include_str!("cuda/cudnn/bias.cu")
        ),
        entry_points: &[
            "attention_make_bias",
            "attention_to_floats",
            "attention_keep_mask",
            "attention_sink_gradient",
        ],
        variants: &[Variant::Helper(Helper::LAUNCHED)],
    },
    Source {
        name: "attention_forward.cu",
        text: concat!(
            "#define FORWARD\n",
            fused!(
                "cuda/fused/online_softmax.cuh",
                "cuda/fused/forward/scheduler.cuh",
                "cuda/fused/forward/pages.cuh",
                "cuda/fused/forward/widen.cuh",
                "cuda/fused/forward/byte_fragments.cuh",
                "cuda/fused/forward/producer.cuh",
                "cuda/fused/forward/consumer.cuh",
                "cuda/fused/forward/epilogue.cuh",
                "cuda/fused/forward/splits.cuh",
                "cuda/fused/forward/forward.cu"
            )
        ),
        entry_points: &["attention_forward"],
        variants: &Variant::fused([
            Fused::new(Bf16, 128).tile(128, 128).warps(8).warpgroups(true).stages(1),
            Fused::new(F16, 64).tile(192, 128).warps(12).warpgroups(true).stages(1),
            Fused::new(F16, 256).features(Features::ALL).tile(128, 64).warps(8).warpgroups(true).stages(1),
            Fused::new(Bf16, 128).tile(128, 64).warps(4).stages(1),
            Fused::new(F16, 64).features(Features::ALL).tile(64, 32).warps(4).stages(1),
            Fused::new(F32, 64).tile(64, 64).warps(4).stages(1),
            Fused::new(F32, 64).tile(128, 64).warps(4).stages(1).tf32_split(true),
            Fused::new(F32, 128).features(Features::ALL).tile(64, 32).warps(4).stages(1).tf32_split(true),
            Fused::new(Bf16, 576).value(256).slices(2).tile(64, 32).warps(4).stages(1),
            Fused::new(F64, 64).features(Features::ALL).tile(32, 32).warps(4).stages(1),
            Fused::new(Bf16, 128).tile(128, 128).warps(8).warpgroups(true).stages(1).layout(Packed),
            Fused::new(F16, 64).tile(192, 128).warps(12).warpgroups(true).stages(1).layout(Packed),
            Fused::new(F16, 64).features(Features::ALL).tile(64, 32).warps(4).stages(1).layout(Packed),
            Fused::new(F32, 64).tile(128, 64).warps(4).stages(1).tf32_split(true).layout(Packed),
            Fused::new(Bf16, 128).tile(128, 128).warps(8).warpgroups(true).stages(1).layout(Paged),
            Fused::new(F16, 64).tile(192, 128).warps(12).warpgroups(true).stages(1).layout(Paged),
            Fused::new(F16, 256)
                .features(Features::ALL)
                .tile(128, 64)
                .warps(8)
                .warpgroups(true)
                .stages(1)
                .layout(Paged),
            Fused::new(Bf16, 128).tile(16, 32).warps(1).stages(1).layout(Paged),
            Fused::new(F32, 128).features(Features::ALL).tile(64, 32).warps(4).stages(1).layout(Paged),
            Fused::new(Bf16, 576).value(256).slices(2).tile(64, 32).warps(4).stages(1).layout(Paged),
            Fused::new(F64, 64).features(Features::ALL).tile(32, 32).warps(4).stages(1).layout(Paged),
            Fused::new(Bf16, 128).tile(128, 128).warps(8).warpgroups(true).stages(1).batch_invariant(true),
            Fused::new(F16, 64).tile(192, 128).warps(12).warpgroups(true).stages(1).batch_invariant(true),
            Fused::new(F16, 256)
                .features(Features::ALL)
                .tile(128, 64)
                .warps(8)
                .warpgroups(true)
                .stages(1)
                .layout(Paged)
                .batch_invariant(true),
            Fused::new(F16, 64)
                .features(Features::ALL)
                .tile(64, 32)
                .warps(4)
                .stages(1)
                .layout(Packed)
                .batch_invariant(true),
            Fused::new(F32, 64).tile(128, 64).warps(4).stages(1).tf32_split(true).batch_invariant(true),
            Fused::new(F32, 128).tile(128, 64).warps(8).stages(1).layout(Packed).batch_invariant(true),
            Fused::new(Bf16, 576)
                .value(256)
                .slices(2)
                .tile(64, 32)
                .warps(4)
                .stages(1)
                .layout(Paged)
                .batch_invariant(true),
            Fused::new(F64, 64)
                .features(Features::ALL)
                .tile(32, 32)
                .warps(4)
                .stages(1)
                .layout(Paged)
                .batch_invariant(true),
            Fused::new(Bf16, 128).tile(128, 128).warps(8).warpgroups(true).stages(1).eight_bit(Some(F8E4M3)),
            Fused::new(F16, 64)
                .tile(192, 128)
                .warps(12)
                .warpgroups(true)
                .stages(1)
                .layout(Packed)
                .eight_bit(Some(F8E5M2)),
            Fused::new(F16, 256)
                .features(Features::ALL)
                .tile(128, 64)
                .warps(8)
                .warpgroups(true)
                .stages(1)
                .layout(Paged)
                .eight_bit(Some(F8E4M3)),
            Fused::new(Bf16, 128)
                .features(Features::LOGITS)
                .tile(16, 32)
                .warps(1)
                .stages(1)
                .layout(Paged)
                .eight_bit(Some(F8E4M3)),
            Fused::new(Bf16, 128)
                .features(Features::LOGITS)
                .tile(8, 32)
                .warps(1)
                .stages(1)
                .layout(Paged)
                .eight_bit(Some(F8E4M3)),
            Fused::new(F16, 64)
                .value(192)
                .features(Features::ALL)
                .tile(8, 32)
                .warps(1)
                .stages(1)
                .layout(Packed)
                .eight_bit(Some(F8E5M2)),
            Fused::new(F16, 96).tile(16, 32).warps(1).stages(1).eight_bit(Some(F8E4M3)),
            Fused::new(F16, 96)
                .features(Features::ALL)
                .tile(64, 32)
                .warps(4)
                .stages(1)
                .layout(Paged)
                .eight_bit(Some(F8E5M2)),
            Fused::new(Bf16, 576)
                .value(256)
                .slices(2)
                .features(Features::LOGITS)
                .tile(64, 32)
                .warps(4)
                .stages(1)
                .layout(Paged)
                .eight_bit(Some(F8E4M3)),
            Fused::new(F32, 64).tile(128, 64).warps(4).stages(1).tf32_split(true).eight_bit(Some(F8E4M3)),
            Fused::new(F32, 128)
                .features(Features::LOGITS)
                .tile(128, 64)
                .warps(8)
                .stages(1)
                .layout(Packed)
                .eight_bit(Some(F8E5M2)),
            Fused::new(F64, 32)
                .features(Features::ALL)
                .tile(32, 32)
                .warps(4)
                .stages(1)
                .eight_bit(Some(F8E4M3)),
        ]),
    },
    Source {
        name: "attention_merge.cu",
        text: fused!("cuda/fused/forward/combine.cu"),
        entry_points: &["attention_merge"],
        variants: &Variant::fused([
            Fused::new(Bf16, 128).warps(4),
            Fused::new(F16, 64).warps(1),
            Fused::new(F32, 64).warps(4),
            Fused::new(F64, 576).value(256).slices(2).warps(4),
            Fused::new(Bf16, 128).warps(1).layout(Packed),
            Fused::new(Bf16, 128).warps(1).layout(Paged),
            Fused::new(Bf16, 128).warps(4).batch_invariant(true),
            Fused::new(F32, 64).warps(4).tf32_split(true).batch_invariant(true),
            Fused::new(F64, 576).value(256).slices(2).warps(4).layout(Paged).batch_invariant(true),
            Fused::new(F16, 64).features(Features::LOGITS).warps(4).eight_bit(Some(F8E5M2)),
            Fused::new(Bf16, 128).features(Features::LOGITS).warps(1).layout(Paged).eight_bit(Some(F8E4M3)),
        ]),
    },
    Source {
        name: "attention_backward_rows.cu",
        text: fused!("cuda/fused/backward/gradients.cuh", "cuda/fused/backward/rows.cu"),
        entry_points: &["attention_prepare_gradients", "attention_gradient_of_sinks"],
        variants: &Variant::fused([
            Fused::new(Bf16, 64).warps(8),
            Fused::new(F64, 64).warps(8),
            Fused::new(Bf16, 64).warps(8).layout(Packed),
            Fused::new(Bf16, 64).warps(8).layout(Packed).batch_invariant(true),
        ]),
    },
    Source {
        name: "attention_backward_sums.cu",
        text: fused!(
            "cuda/fused/online_softmax.cuh",
            "cuda/fused/backward/gradients.cuh",
            "cuda/fused/backward/far_rows.cuh",
            "cuda/cudnn/sum_rows.cu"
        ),
        entry_points: &["attention_sum_rows"],
        variants: &Variant::fused([
            Fused::new(Bf16, 128).features(Features::ALL).tile(32, 32).warps(2).stages(1),
            Fused::new(F16, 256)
                .features(Features::BIAS.with(Features::LOGITS))
                .tile(32, 32)
                .warps(2)
                .stages(1),
        ]),
    },
    Source {
        name: "attention_backward_keys.cu",
        text: fused!(
            "cuda/fused/backward/gradients.cuh",
            "cuda/fused/backward/keys/scheduler.cuh",
            "cuda/fused/backward/keys/producer.cuh",
            "cuda/fused/backward/keys/consumer.cuh",
            "cuda/fused/backward/keys/epilogue.cuh",
            "cuda/fused/backward/keys.cu"
        ),
        entry_points: &["attention_gradient_of_keys"],
        variants: &Variant::fused([
            Fused::new(Bf16, 128).tile(64, 128).warps(8).warpgroups(true).stages(2).gradients(KeyAndValue),
            Fused::new(F16, 64).tile(128, 128).warps(8).warpgroups(true).stages(2).gradients(KeyAndValue),
            Fused::new(F16, 256)
                .features(Features::ALL)
                .tile(64, 128)
                .warps(8)
                .warpgroups(true)
                .stages(1)
                .gradients(Key),
            Fused::new(Bf16, 128).tile(64, 64).warps(4).stages(2).gradients(KeyAndValue),
            Fused::new(F16, 64)
                .features(Features::ALL)
                .tile(32, 64)
                .warps(4)
                .stages(2)
                .gradients(KeyAndValue),
            Fused::new(F32, 64).tile(64, 64).warps(4).stages(1).gradients(KeyAndValue),
            Fused::new(F32, 128).tile(32, 128).warps(8).stages(2).gradients(KeyAndValue).tf32_split(true),
            Fused::new(F64, 64)
                .features(Features::ALL)
                .tile(32, 32)
                .warps(4)
                .stages(1)
                .gradients(KeyAndValue),
            Fused::new(Bf16, 128)
                .tile(64, 128)
                .warps(8)
                .warpgroups(true)
                .stages(2)
                .gradients(KeyAndValue)
                .layout(Packed),
            Fused::new(F16, 64)
                .features(Features::ALL)
                .tile(32, 64)
                .warps(4)
                .stages(2)
                .gradients(KeyAndValue)
                .layout(Packed),
            Fused::new(F32, 64).tile(64, 64).warps(4).stages(1).gradients(KeyAndValue).layout(Packed),
        ]),
    },
    Source {
        name: "attention_backward_queries.cu",
        text: fused!(
            "cuda/fused/online_softmax.cuh",
            "cuda/fused/backward/gradients.cuh",
            "cuda/fused/backward/far_rows.cuh",
            "cuda/fused/backward/queries/scheduler.cuh",
            "cuda/fused/backward/queries/producer.cuh",
            "cuda/fused/backward/queries/consumer.cuh",
            "cuda/fused/backward/queries/epilogue.cuh",
            "cuda/fused/backward/queries.cu"
        ),
        entry_points: &["attention_gradient_of_queries"],
        variants: &Variant::fused([
            Fused::new(Bf16, 128).tile(128, 128).warps(8).warpgroups(true).stages(2),
            Fused::new(Bf16, 128).features(Features::MASK).tile(128, 128).warps(8).warpgroups(true).stages(2),
            Fused::new(F16, 256).features(Features::ALL).tile(128, 64).warps(8).warpgroups(true).stages(1),
            Fused::new(Bf16, 128).tile(64, 64).warps(4).stages(2),
            Fused::new(F16, 64).features(Features::ALL).tile(64, 32).warps(4).stages(2),
            Fused::new(F32, 64).tile(64, 64).warps(4).stages(1),
            Fused::new(F32, 128).tile(128, 32).warps(8).stages(2).tf32_split(true),
            Fused::new(F64, 64).features(Features::ALL).tile(32, 32).warps(4).stages(1),
            Fused::new(Bf16, 128).tile(128, 128).warps(8).warpgroups(true).stages(2).layout(Packed),
            Fused::new(F16, 64).features(Features::ALL).tile(64, 32).warps(4).stages(2).layout(Packed),
            Fused::new(F32, 128).tile(128, 32).warps(8).stages(2).tf32_split(true).layout(Packed),
        ]),
    },
    Source {
        name: "attention_backward_bias.cu",
        text: fused!("cuda/fused/backward/gradients.cuh", "cuda/fused/backward/bias.cu"),
        entry_points: &["attention_gradient_of_bias"],
        variants: &Variant::fused([
            Fused::new(Bf16, 64)
                .features(Features::BIAS.with(Features::LOGITS))
                .tile(64, 32)
                .warps(4)
                .stages(1),
            Fused::new(F64, 64).features(Features::ALL).tile(32, 32).warps(4).stages(1),
            Fused::new(Bf16, 64)
                .features(Features::BIAS.with(Features::LOGITS))
                .tile(64, 32)
                .warps(4)
                .stages(1)
                .layout(Packed),
        ]),
    },
    Source {
        name: "attention_schedule.cu",
        text: fused!("cuda/fused/schedule.cu"),
        entry_points: &["attention_schedule_query_tiles", "attention_schedule_key_tiles"],
        variants: &Variant::fused([
            Fused::new(F16, 32).tile(128, 0).warps(8).layout(Packed),
            Fused::new(F16, 32).tile(16, 0).warps(8).layout(Packed),
        ]),
    },
    Source {
        name: "attention_sequences.cu",
        text: fused!("cuda/cudnn/sequences.cu"),
        entry_points: &["attention_sequences", "attention_block_table"],
        variants: &Variant::fused([
            Fused::new(F16, 32).warps(4),
            Fused::new(F16, 32).warps(4).layout(Packed),
            Fused::new(F16, 32).warps(4).layout(Paged),
        ]),
    },
    Source {
        name: "attention_contain_outputs.cu",
        text: fused!("cuda/cudnn/contain.cuh", "cuda/cudnn/contain_outputs.cu"),
        entry_points: &["attention_contain_outputs"],
        variants: &Variant::fused([
            Fused::new(Bf16, 128).features(Features::ALL).tile(64, 32).warps(8).stages(1).group(16),
            Fused::new(F16, 64).value(96).features(Features::ALL).tile(64, 32).warps(8).stages(1),
            Fused::new(Bf16, 128)
                .features(Features::ALL)
                .tile(64, 32)
                .warps(8)
                .stages(1)
                .group(16)
                .layout(Packed),
            Fused::new(F16, 64).features(Features::ALL).tile(64, 32).warps(8).stages(1).layout(Paged),
        ]),
    },
    Source {
        name: "attention_contain_gradients.cu",
        text: fused!(
            "cuda/fused/backward/gradients.cuh",
            "cuda/cudnn/contain.cuh",
            "cuda/cudnn/contain_gradients.cu"
        ),
        entry_points: &["attention_contain_gradients"],
        variants: &Variant::fused([
            Fused::new(Bf16, 128).features(Features::ALL).tile(64, 32).warps(8).stages(1).group(16),
            Fused::new(F16, 64).value(96).features(Features::ALL).tile(64, 32).warps(8).stages(1),
            Fused::new(Bf16, 128)
                .features(Features::ALL)
                .tile(64, 32)
                .warps(8)
                .stages(1)
                .group(16)
                .layout(Packed),
        ]),
    },
];

/// The source of this name.
///
/// ```
/// assert_eq!(attention_kernels::source("missing.cu"), None);
/// ```
pub fn source(name: &str) -> Option<&'static Source> {
    SOURCES.iter().find(|source| source.name == name)
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    /// The declarations of the kernels of a source, up to their bodies, each on one line.
    fn kernels(text: &str) -> impl Iterator<Item = String> {
        text.split("extern \"C\" __global__").skip(1).map(|after| {
            let declaration = after.split('{').next().unwrap_or(after);
            declaration.split_whitespace().collect::<Vec<_>>().join(" ")
        })
    }

    /// What is wrong with a table of sources.
    fn faults(sources: &[Source]) -> Vec<String> {
        let mut faults = Vec::new();
        let (mut names, mut entry_points) = (HashSet::new(), HashSet::new());
        for source in sources {
            if !names.insert(source.name) {
                faults.push(format!("two sources are called {}", source.name));
            }
            if source.entry_points.is_empty() {
                faults.push(format!("{} has no entry point", source.name));
            }
            if source.variants.is_empty() {
                faults.push(format!("{} has no variant", source.name));
            }
            for (index, variant) in source.variants.iter().enumerate() {
                if source.variants[..index].contains(variant) {
                    let defines = variant.defines().join(" ");
                    faults.push(format!("{} lists the variant {defines} twice", source.name));
                }
            }
            for entry_point in source.entry_points {
                if !entry_points.insert(entry_point) {
                    faults.push(format!("two entry points are called {entry_point}"));
                }
                if !kernels(source.text).any(|kernel| kernel.contains(&format!(" {entry_point}("))) {
                    faults.push(format!("{} does not declare {entry_point}", source.name));
                }
            }
        }
        faults
    }

    #[test]
    fn every_entry_point_is_in_its_source_and_no_name_is_taken_twice() {
        assert_eq!(faults(SOURCES), Vec::<String>::new());
    }

    /// Kernels that are declared without a bound on their threads that comes from the host's launch.
    fn unbounded(text: &str) -> Vec<String> {
        let bounded =
            ["__launch_bounds__(BLOCK)", "__launch_bounds__(BLOCK, ", "__launch_bounds__(SUMMING_BLOCK)"];
        kernels(text).filter(|kernel| !bounded.iter().any(|bound| kernel.contains(bound))).collect()
    }

    #[test]
    fn every_kernel_is_bounded_by_the_threads_it_is_launched_with() {
        for source in SOURCES {
            assert_eq!(unbounded(source.text), Vec::<String>::new(), "{}", source.name);
            for variant in source.variants {
                assert!(
                    variant.defines().iter().any(|define| define.starts_with("BLOCK=")),
                    "{}",
                    source.name
                );
            }
        }
        let bound = "extern \"C\" __global__ void __launch_bounds__(THREADS, 1)\n    merge(int x) {";
        assert_eq!(unbounded(bound), ["void __launch_bounds__(THREADS, 1) merge(int x)"]);
    }

    /// Each file of a text says in its first comment which files it needs, and follows them.
    #[test]
    fn every_file_follows_those_that_it_needs() {
        let folder = std::path::Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/src"));
        let table = std::fs::read_to_string(folder.join("lib.rs")).unwrap();
        let paths = |text: &str| -> Vec<String> {
            text.split('"').filter(|part| part.starts_with("cuda/")).map(str::to_owned).collect()
        };
        let (_, after) = table.split_once("macro_rules! fused").unwrap();
        let shared = paths(after.split_once("};").unwrap().0);
        let mut seen = HashSet::new();
        for source in table.split("        text: ").skip(1) {
            let text = source.split_once("entry_points").unwrap().0;
            let own = paths(text);
            let files = if text.contains("fused!(") { [shared.clone(), own].concat() } else { own };
            for (index, file) in files.iter().enumerate() {
                let content = std::fs::read_to_string(folder.join(file)).unwrap();
                let comment = (content.lines().map_while(|line| line.strip_prefix("//")))
                    .map(str::trim)
                    .skip_while(|line| !line.starts_with("Needs: "))
                    .take_while(|line| !line.is_empty())
                    .collect::<Vec<_>>()
                    .join(" ");
                let needs = comment.strip_prefix("Needs: ").and_then(|needs| needs.strip_suffix('.'));
                let needs = needs.unwrap_or_else(|| panic!("{file} does not say what it needs"));
                for needed in needs.split(", ").filter(|&needed| needed != "nothing") {
                    let needed = format!("cuda/{needed}");
                    assert!(files[..index].contains(&needed), "{file} comes before {needed}, which it needs");
                }
                seen.insert(file.clone());
            }
        }
        assert!(seen.len() > 30, "{seen:?}");
    }

    #[test]
    fn the_check_finds_what_it_looks_for() {
        const SMALL: Variant = Variant::Helper(Helper { threads: 32, summing_threads: 64 });
        let text = "extern \"C\" __global__ void forward(float *out) {}";
        let good = Source { name: "a.cu", text, entry_points: &["forward"], variants: &[SMALL] };
        assert_eq!(faults(&[good]), Vec::<String>::new());
        let bad = [good, Source { entry_points: &["forward", "backward"], ..good }];
        assert_eq!(
            faults(&bad),
            [
                "two sources are called a.cu",
                "two entry points are called forward",
                "a.cu does not declare backward"
            ]
        );
        assert_eq!(faults(&[Source { entry_points: &[], ..good }]), ["a.cu has no entry point"]);
        assert_eq!(faults(&[Source { variants: &[], ..good }]), ["a.cu has no variant"]);
        let twice: &[Variant] = &[Variant::Helper(Helper::LAUNCHED), SMALL, SMALL];
        assert_eq!(
            faults(&[Source { variants: twice, ..good }]),
            ["a.cu lists the variant BLOCK=32 SUMMING_BLOCK=64 twice"]
        );
    }
}
