//! Which of two implementations is faster, by device and call, with the record of each answer.

use attention_core::{Feature, Pass, Problem, Role, RowLayout};

use super::devices::DeviceClass::{self, Blackwell, Hopper, Other};

/// One implementation comes before another, for some calls on some devices.
#[derive(Debug)]
pub(crate) struct Crossover {
    /// The one that comes first.
    pub(crate) faster: &'static str,
    pub(crate) slower: &'static str,
    pub(crate) devices: &'static [DeviceClass],
    /// Whether it holds for a problem.
    pub(crate) applies: fn(&Problem) -> bool,
    /// The calls that it holds for, in words.
    pub(crate) calls: &'static str,
    /// What decided: times of a call, of the faster one first, or that nothing was measured.
    pub(crate) figures: &'static str,
    /// The benchmark record that they were read from.
    pub(crate) record: Option<&'static str>,
}

impl Crossover {
    /// Whether it is about this implementation.
    pub(crate) fn is_of(&self, name: &str) -> bool {
        self.faster == name || self.slower == name
    }
}

impl std::fmt::Display for Crossover {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} on {}: {}", self.calls, Listed(self.devices), self.figures)?;
        self.record.map_or(Ok(()), |record| write!(f, " ({record})"))
    }
}

struct Listed(&'static [DeviceClass]);

impl std::fmt::Display for Listed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        for (index, class) in self.0.iter().enumerate() {
            write!(f, "{}{class}", if index > 0 { " and " } else { "" })?;
        }
        Ok(())
    }
}

/// cuDNN is faster.
const CUDNN: Crossover = Crossover {
    faster: "cudnn",
    slower: "chunked-cuda",
    devices: &[Hopper],
    applies: |_| true,
    calls: "",
    figures: "",
    record: None,
};

/// This library's kernels are faster.
const OURS: Crossover = Crossover { faster: "chunked-cuda", slower: "cudnn", ..CUDNN };

/// Forward of `chunked-cuda` and, through torch, of cuDNN.
const FORWARD: Option<&str> = Some("benches/record/2026-12-01-gpu-h200-forward.csv");
/// Both backends in one run, with kernels of the forward pass before those of [`FORWARD`].
const BOTH: Option<&str> = Some("benches/record/2026-11-30-gpu-h200-3.csv");
/// Both backends of packed and paged calls, in one run.
const SEQUENCES: Option<&str> = Some("benches/record/2026-12-01-gpu-h200-sequences.csv");
/// `chunked-cuda` alone, of the same calls with later kernels.
const SEQUENCES_LATER: Option<&str> = Some("benches/record/2026-12-01-gpu-h200-sequences-2.csv");

fn forward(problem: &Problem) -> bool {
    problem.pass() == Pass::Forward
}

fn has(problem: &Problem, feature: Feature) -> bool {
    problem.features().contains(feature)
}

/// Logits of a head.
fn logits(problem: &Problem) -> usize {
    let dims = problem.dims();
    dims.query_length.saturating_mul(dims.key_length)
}

/// Forward calls as large as the largest that were measured, whose work is not cut down by a window.
fn is_large_forward(problem: &Problem) -> bool {
    let windowed = [Feature::WindowLeft, Feature::WindowRight].iter().any(|&side| has(problem, side));
    forward(problem) && !windowed && problem.dims().query_length >= 4096 && logits(problem) >= 4096 * 4096
}

fn is_packed(problem: &Problem) -> bool {
    problem.query_layout() == RowLayout::Packed
}

/// Whether calls say how long the longest of several sequences is: without it cuDNN builds a plan for every
/// number of rows.
fn longest_is_known(problem: &Problem) -> bool {
    let rows = problem.tensor(Role::Query).map_or(0, |query| query.shape()[1]);
    problem.dims().query_length < rows
}

/// Microseconds of bf16 calls on an H200, of the medians of the record. Of several entries that apply, the
/// last one decides.
pub(crate) const CROSSOVERS: &[Crossover] = &[
    Crossover {
        devices: &[Other],
        calls: "all calls",
        figures: "nothing was measured, and this library's kernels come first until a record says otherwise",
        ..OURS
    },
    Crossover {
        devices: &[Blackwell],
        calls: "all calls",
        figures: "nothing was measured, and cuDNN has kernels for the tensor cores of these devices, which \
                  chunked-cuda has not",
        ..CUDNN
    },
    Crossover {
        applies: |problem| problem.pass() == Pass::Backward,
        calls: "backward",
        figures: "509 us beside 650 (32 x 512 tokens), 2537 beside 3252 (4 x 4096, heads of 128), 3103 beside \
                  3849 (of 64), 3466 beside 5159 (of 256)",
        record: BOTH,
        ..CUDNN
    },
    // Causal, the device takes 26.1 us beside 24.1; either way the host takes longer than the difference.
    Crossover {
        applies: |problem| problem.pass() == Pass::Backward && logits(problem) <= 256 * 256,
        calls: "backward up to 256 x 256 logits a head",
        figures: "23.3 us beside 24.2, and of the host 13.4 beside 20.5",
        record: BOTH,
        ..OURS
    },
    Crossover {
        applies: forward,
        calls: "forward",
        figures: "128 us beside 161 (32 x 512 tokens), 229 beside 254 (16 x 1024)",
        record: FORWARD,
        ..CUDNN
    },
    Crossover {
        applies: |problem| forward(problem) && problem.dims().query_length <= 16,
        calls: "forward of up to 16 query rows",
        figures: "239 us beside 271 (32 x 8192 keys), 15.6 beside 19.9 (8192 keys)",
        record: BOTH,
        ..CUDNN
    },
    Crossover {
        applies: is_large_forward,
        calls: "forward from 4096 x 4096 logits a head",
        figures: "826 us beside 831, causal 462 beside 495 (heads of 128); 746 beside 759, causal 404 beside \
                  466 (of 256); 1677 beside 1704, causal 913 beside 1013 (grouped)",
        record: FORWARD,
        ..OURS
    },
    // Without a causal mask 1154 us beside 1149.
    Crossover {
        applies: |problem| is_large_forward(problem) && problem.causal() && problem.dims().head_dim <= 64,
        calls: "causal forward from 4096 x 4096 logits a head, heads up to 64",
        figures: "637 us beside 687",
        record: FORWARD,
        ..CUDNN
    },
    // Values are copied for cuDNN, and it goes over the rows of padding.
    Crossover {
        applies: |problem| {
            let lengths = [Feature::QueryLengths, Feature::KeyValueLengths];
            forward(problem) && lengths.iter().any(|&lengths| has(problem, lengths))
        },
        calls: "forward with lengths",
        figures: "1031 us beside 2065, causal 746 beside 1829 (32 sequences of 1 to 2048 in a rectangle)",
        record: SEQUENCES,
        ..OURS
    },
    // Calls of fewer tokens are shorter than the 27 us that the host takes for cuDNN.
    Crossover {
        applies: is_packed,
        calls: "packed sequences",
        figures: "272.0 us beside 272.3 (16 x 1024 tokens), and of the host 11 beside 27 (cudnn's of \
                  benches/record/2026-12-01-gpu-h200-sequences.csv)",
        record: SEQUENCES_LATER,
        ..OURS
    },
    // With the later kernels, 198 and 745 us of the causal calls below and 993 of the full backward one.
    Crossover {
        applies: |problem| {
            is_packed(problem)
                && problem.key_layout() == RowLayout::Packed
                && longest_is_known(problem)
                && problem.dims().query_length >= 1024
        },
        calls: "packed sequences, the longest of 1024 tokens or more",
        figures: "741 us beside 894, causal 453 beside 609 (32 of 1 to 2048); 189 beside 247 (16 x 1024, \
                  causal); backward 2581 beside 2829, causal 1847 beside 1919 and 714 beside 764",
        record: SEQUENCES,
        ..CUDNN
    },
    // Of 32 full caches of 8192 keys cuDNN takes 266 us beside 276, and on the host 41 beside 14, which counts
    // as soon as caches are shorter than their bound.
    Crossover {
        applies: |problem| has(problem, Feature::PagedKeys),
        calls: "keys in pages",
        figures: "24.0 us beside 38.7 (one query row, 8192 keys), 775 beside 1131 (prefill, pages of one key)",
        record: SEQUENCES,
        ..OURS
    },
    Crossover {
        applies: |problem| {
            let dims = problem.dims();
            let enough = dims.batch >= 8 && dims.query_length >= 512;
            let many = matches!(problem.key_layout(), RowLayout::Paged { page_size } if page_size >= 16);
            enough && many && (!is_packed(problem) || longest_is_known(problem))
        },
        calls: "keys in pages of 16 or more, from 8 sequences of 512 query rows",
        figures: "511 us beside 722 (8 x 512 query rows, 4096 keys each)",
        record: SEQUENCES,
        ..CUDNN
    },
    // cuDNN reads masks, biases and the keep bits of the published stream as tensors, which kernels of ours
    // make for it first; chunked-cuda reads or computes them in place. All at 4 x 4096 tokens.
    Crossover {
        applies: |problem| has(problem, Feature::Mask),
        calls: "masks",
        figures: "1222 us beside 1796, backward 3605 beside 5270",
        record: BOTH,
        ..OURS
    },
    Crossover {
        applies: |problem| has(problem, Feature::Bias),
        calls: "biases",
        figures: "1349 us beside 1652, backward 3726 beside 5167",
        record: BOTH,
        ..OURS
    },
    Crossover {
        applies: |problem| has(problem, Feature::Dropout),
        calls: "dropout",
        figures: "1764 us beside 2036, backward 4936 beside 13984",
        record: BOTH,
        ..OURS
    },
    // cuDNN has ALiBi under a causal mask alone. Elsewhere it reads a bias that a kernel of ours makes for it
    // first. That was measured of biases; of ALiBi only chunked-cuda.
    Crossover {
        applies: |problem| has(problem, Feature::Alibi) && !problem.causal(),
        calls: "ALiBi without a causal mask",
        figures: "1083 us, where cudnn reads a bias, beside 1652 of such a call \
                  (benches/record/2026-11-30-gpu-h200-3.csv)",
        record: FORWARD,
        ..OURS
    },
];
