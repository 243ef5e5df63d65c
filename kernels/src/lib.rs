#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]

/// One CUDA source with what can be launched from it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Source {
    /// The file's name in this package, without its folder: what messages and caches call it.
    pub name: &'static str,
    /// The whole text.
    pub text: &'static str,
    /// The names of its `extern "C" __global__` functions.
    pub entry_points: &'static [&'static str],
    /// The sets of macros that it is compiled with, each macro as `NAME` or `NAME=VALUE`. Each set gives every entry point;
    /// the empty set is the source as it stands.
    pub variants: &'static [&'static [&'static str]],
}

/// The text of a fused kernel: what all of them share, then its own files, in an order in which each file follows
/// those that it needs.
macro_rules! fused {
    ($($part:literal),*) => {
        concat!(
            include_str!("cuda/common/dtypes.cuh"),
            include_str!("cuda/common/philox.cuh"),
            include_str!("cuda/fused/numbers.cuh"),
            include_str!("cuda/fused/parameters.cuh"),
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

/// The macro for the threads of a block, of a number of warps, without or with those that load for warpgroups.
macro_rules! block {
    (1, 0) => {
        "BLOCK=32"
    };
    (2, 0) => {
        "BLOCK=64"
    };
    (4, 0) => {
        "BLOCK=128"
    };
    (8, 0) => {
        "BLOCK=256"
    };
    (8, 1) => {
        "BLOCK=384"
    };
    (12, 1) => {
        "BLOCK=512"
    };
}

/// Macros of an attention kernel: the operands' dtype (0 for f64, 1 for f32, 2 for f16, 3 for bf16), padded head dimensions,
/// features, tile of rows and keys, warps, tiles that are streamed ahead, gradients, warpgroups, and whatever else.
macro_rules! variant {
    ($dtype:literal, $head:literal, $value:literal, $features:literal, $rows:literal, $keys:literal, $warps:tt,
     $stages:literal, $wanted:literal, $warpgroups:tt $(, $more:literal)*) => {
        &[
            concat!("DTYPE=", $dtype),
            concat!("HEAD=", $head),
            concat!("VALUE=", $value),
            concat!("FEATURES=", $features),
            "BIAS_DTYPE=4",
            "TERM_STRIDE=-1",
            concat!("ROWS=", $rows),
            concat!("KEYS=", $keys),
            concat!("WARPS=", $warps),
            concat!("STAGES=", $stages),
            concat!("WANTED=", $wanted),
            concat!("WARPGROUPS=", $warpgroups),
            block!($warps, $warpgroups),
            $($more),*
        ]
    };
}

/// Every source of this package, by name.
pub const SOURCES: &[Source] = &[
    Source {
        name: "attention_rows.cu",
        text: include_str!("cuda/cudnn/rows.cu"),
        entry_points: &["attention_finish_forward", "attention_prepare_backward", "attention_clean_rows"],
        variants: &[&["BLOCK=128", "SUMMING_BLOCK=256"]],
    },
    Source {
        name: "attention_terms.cu",
        text: concat!(
            include_str!("cuda/common/dtypes.cuh"),
            include_str!("cuda/common/philox.cuh"),
            include_str!("cuda/cudnn/bias.cu")
        ),
        entry_points: &[
            "attention_make_bias",
            "attention_to_floats",
            "attention_keep_mask",
            "attention_sink_gradient",
        ],
        variants: &[&["BLOCK=128", "SUMMING_BLOCK=256"]],
    },
    Source {
        name: "attention_forward.cu",
        text: fused!(
            "cuda/fused/online_softmax.cuh",
            "cuda/fused/forward/scheduler.cuh",
            "cuda/fused/forward/producer.cuh",
            "cuda/fused/forward/consumer.cuh",
            "cuda/fused/forward/epilogue.cuh",
            "cuda/fused/forward/forward.cu"
        ),
        entry_points: &["attention_forward"],
        variants: &[
            variant!(3, 128, 128, 0, 128, 128, 8, 1, 0, 1),
            variant!(2, 64, 64, 0, 192, 128, 12, 1, 0, 1),
            variant!(2, 256, 256, 63, 128, 64, 8, 1, 0, 1),
            variant!(3, 128, 128, 0, 128, 64, 4, 1, 0, 0),
            variant!(2, 64, 64, 63, 64, 32, 4, 1, 0, 0),
            variant!(1, 64, 64, 0, 64, 64, 4, 1, 0, 0),
            variant!(1, 64, 64, 0, 128, 64, 4, 1, 0, 0, "SPLIT=1"),
            variant!(1, 128, 128, 63, 64, 32, 4, 1, 0, 0, "SPLIT=1"),
            variant!(3, 576, 256, 0, 64, 32, 4, 1, 0, 0, "SLICES=2"),
            variant!(0, 64, 64, 63, 32, 32, 4, 1, 0, 0),
        ],
    },
    Source {
        name: "attention_merge.cu",
        text: fused!("cuda/fused/forward/combine.cu"),
        entry_points: &["attention_merge"],
        variants: &[
            variant!(3, 128, 128, 0, 0, 0, 4, 0, 0, 0),
            variant!(2, 64, 64, 0, 0, 0, 1, 0, 0, 0),
            variant!(1, 64, 64, 0, 0, 0, 4, 0, 0, 0),
            variant!(0, 576, 256, 0, 0, 0, 4, 0, 0, 0, "SLICES=2"),
        ],
    },
    Source {
        name: "attention_backward_rows.cu",
        text: fused!("cuda/fused/backward/gradients.cuh", "cuda/fused/backward/rows.cu"),
        entry_points: &["attention_prepare_gradients", "attention_gradient_of_sinks"],
        variants: &[variant!(3, 64, 64, 0, 0, 0, 8, 0, 0, 0), variant!(0, 64, 64, 0, 0, 0, 8, 0, 0, 0)],
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
        variants: &[
            variant!(3, 128, 128, 63, 32, 32, 2, 1, 0, 0, "GROUP=1"),
            variant!(2, 256, 256, 34, 32, 32, 2, 1, 0, 0, "GROUP=1"),
        ],
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
        variants: &[
            variant!(3, 128, 128, 0, 64, 128, 8, 2, 3, 1),
            variant!(2, 64, 64, 0, 128, 128, 8, 2, 3, 1),
            variant!(2, 256, 256, 63, 64, 128, 8, 1, 1, 1),
            variant!(3, 128, 128, 0, 64, 64, 4, 2, 3, 0),
            variant!(2, 64, 64, 63, 32, 64, 4, 2, 3, 0),
            variant!(1, 64, 64, 0, 64, 64, 4, 1, 3, 0),
            variant!(1, 128, 128, 0, 32, 128, 8, 2, 3, 0, "SPLIT=1"),
            variant!(0, 64, 64, 63, 32, 32, 4, 1, 3, 0),
        ],
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
        variants: &[
            variant!(3, 128, 128, 0, 128, 128, 8, 2, 0, 1),
            variant!(3, 128, 128, 1, 128, 128, 8, 2, 0, 1),
            variant!(2, 256, 256, 63, 128, 64, 8, 1, 0, 1),
            variant!(3, 128, 128, 0, 64, 64, 4, 2, 0, 0),
            variant!(2, 64, 64, 63, 64, 32, 4, 2, 0, 0),
            variant!(1, 64, 64, 0, 64, 64, 4, 1, 0, 0),
            variant!(1, 128, 128, 0, 128, 32, 8, 2, 0, 0, "SPLIT=1"),
            variant!(0, 64, 64, 63, 32, 32, 4, 1, 0, 0),
        ],
    },
    Source {
        name: "attention_backward_bias.cu",
        text: fused!("cuda/fused/backward/gradients.cuh", "cuda/fused/backward/bias.cu"),
        entry_points: &["attention_gradient_of_bias"],
        variants: &[variant!(3, 64, 64, 34, 64, 32, 4, 1, 0, 0), variant!(0, 64, 64, 63, 32, 32, 4, 1, 0, 0)],
    },
    Source {
        name: "attention_contain_outputs.cu",
        text: fused!("cuda/cudnn/contain.cuh", "cuda/cudnn/contain_outputs.cu"),
        entry_points: &["attention_contain_outputs"],
        variants: &[
            variant!(3, 128, 128, 63, 64, 32, 8, 1, 0, 0, "GROUP=16"),
            variant!(2, 64, 96, 63, 64, 32, 8, 1, 0, 0),
        ],
    },
    Source {
        name: "attention_contain_gradients.cu",
        text: fused!(
            "cuda/fused/backward/gradients.cuh",
            "cuda/cudnn/contain.cuh",
            "cuda/cudnn/contain_gradients.cu"
        ),
        entry_points: &["attention_contain_gradients"],
        variants: &[
            variant!(3, 128, 128, 63, 64, 32, 8, 1, 0, 0, "GROUP=16"),
            variant!(2, 64, 96, 63, 64, 32, 8, 1, 0, 0),
        ],
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
            for (index, defines) in source.variants.iter().enumerate() {
                if source.variants[..index].contains(defines) {
                    faults.push(format!("{} lists the variant {defines:?} twice", source.name));
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
            for defines in source.variants {
                assert!(defines.iter().any(|define| define.starts_with("BLOCK=")), "{}", source.name);
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
            let files = if text.starts_with("fused!") { [shared.clone(), own].concat() } else { own };
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
        let text = "extern \"C\" __global__ void forward(float *out) {}";
        let good = Source { name: "a.cu", text, entry_points: &["forward"], variants: &[&[]] };
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
        let twice: &[&[&str]] = &[&[], &["HEAD_DIM=64"], &["HEAD_DIM=64"]];
        assert_eq!(
            faults(&[Source { variants: twice, ..good }]),
            ["a.cu lists the variant [\"HEAD_DIM=64\"] twice"]
        );
    }
}
