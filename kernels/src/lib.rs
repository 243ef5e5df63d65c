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
}

/// What the attention kernels are made of: each source is complete in itself, without includes.
macro_rules! attention {
    ($($part:literal),*) => {
        concat!(
            include_str!("cuda/attention/numbers.cuh"),
            include_str!("cuda/attention/parameters.cuh"),
            include_str!("cuda/attention/terms.cuh"),
            include_str!("cuda/attention/staging.cuh"),
            include_str!("cuda/attention/tensor_cores.cuh"),
            include_str!("cuda/attention/cores.cuh"),
            include_str!("cuda/attention/exact.cuh"),
            $(include_str!($part)),*
        )
    };
}

/// Every source of this package, by name.
pub const SOURCES: &[Source] = &[
    Source {
        name: "attention_rows.cu",
        text: include_str!("cuda/attention_rows.cu"),
        entry_points: &["attention_finish_forward", "attention_prepare_backward", "attention_clean_rows"],
    },
    Source {
        name: "attention_forward.cu",
        text: attention!("cuda/attention/forward.cu"),
        entry_points: &["attention_forward", "attention_merge"],
    },
    Source {
        name: "attention_backward_rows.cu",
        text: attention!("cuda/attention/gradients.cuh", "cuda/attention/backward_rows.cu"),
        entry_points: &["attention_prepare_gradients", "attention_gradient_of_sinks"],
    },
    Source {
        name: "attention_backward_keys.cu",
        text: attention!("cuda/attention/gradients.cuh", "cuda/attention/backward_keys.cu"),
        entry_points: &["attention_gradient_of_keys"],
    },
    Source {
        name: "attention_backward_queries.cu",
        text: attention!("cuda/attention/gradients.cuh", "cuda/attention/backward_queries.cu"),
        entry_points: &["attention_gradient_of_queries"],
    },
    Source {
        name: "attention_backward_bias.cu",
        text: attention!("cuda/attention/gradients.cuh", "cuda/attention/backward_bias.cu"),
        entry_points: &["attention_gradient_of_bias"],
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
            for entry_point in source.entry_points {
                if !entry_points.insert(entry_point) {
                    faults.push(format!("two entry points are called {entry_point}"));
                }
                let declares = |line: &str| {
                    line.trim_start().starts_with("extern \"C\" __global__")
                        && line.contains(&format!(" {entry_point}("))
                };
                if !source.text.lines().any(declares) {
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

    #[test]
    fn the_check_finds_what_it_looks_for() {
        let text = "extern \"C\" __global__ void forward(float *out) {}";
        let good = Source { name: "a.cu", text, entry_points: &["forward"] };
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
    }
}
