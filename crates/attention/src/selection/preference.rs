//! The order in which an automatic choice asks: the registry's, corrected by measured crossover points.

use std::sync::Arc;

use attention_core::{AttentionBackend, Feature, Pass, Problem};

/// A size below which one implementation is faster than another, as measured.
pub(crate) struct Crossover {
    /// Faster below.
    pub(crate) small: &'static str,
    /// Faster from there on.
    pub(crate) large: &'static str,
    /// The pass that it holds for.
    pub(crate) pass: Pass,
    /// A feature without which it does not hold.
    pub(crate) with: Option<Feature>,
    /// A feature with which it does not hold.
    pub(crate) without: Option<Feature>,
    /// `T * S` at the crossover.
    pub(crate) logits_per_head: usize,
}

/// Each entry names the benchmark record that it was read from, or says that there is none, in a comment
/// above it. If several apply, the later one decides.
pub(crate) const CROSSOVERS: &[Crossover] = &[
    // benches/record/2026-11-25-gpu-h100.csv: 256 x 256 was faster by a sixth, 512 x 512 slower by half.
    Crossover {
        small: "chunked-cuda",
        large: "cudnn",
        pass: Pass::Backward,
        with: None,
        without: None,
        logits_per_head: 256 * 256 + 1,
    },
    // benches/record/2026-11-25-gpu-h200.csv, 4096 x 4096 tokens, TFLOP/s. cuDNN reads masks, biases and the
    // keep bits of the published stream as tensors, which kernels of ours make for it first; chunked-cuda
    // reads or computes them in place.
    always("chunked-cuda", "cudnn", Pass::Forward, Feature::Mask),
    always("chunked-cuda", "cudnn", Pass::Backward, Feature::Mask),
    always("chunked-cuda", "cudnn", Pass::Forward, Feature::Bias),
    always("chunked-cuda", "cudnn", Pass::Backward, Feature::Bias),
    always("chunked-cuda", "cudnn", Pass::Forward, Feature::Dropout),
    always("chunked-cuda", "cudnn", Pass::Backward, Feature::Dropout),
    // Not measured yet: cuDNN is asked for packed sequences and pages only if chunked-cuda refuses them.
    always("chunked-cuda", "cudnn", Pass::Forward, Feature::PackedQueries),
    always("chunked-cuda", "cudnn", Pass::Backward, Feature::PackedQueries),
    always("chunked-cuda", "cudnn", Pass::Forward, Feature::PagedKeys),
    // cuDNN has ALiBi under a causal mask alone. Elsewhere it reads a bias that a kernel of ours makes for it
    // first, and reading one takes it to 308 and 280 (benches/record/2026-11-28-gpu-h200-2.csv), where
    // chunked-cuda has ALiBi at 531 and 399 (benches/record/2026-11-25-gpu-h200-chunked-cuda.csv).
    Crossover {
        without: Some(Feature::Causal),
        ..always("chunked-cuda", "cudnn", Pass::Forward, Feature::Alibi)
    },
    Crossover {
        without: Some(Feature::Causal),
        ..always("chunked-cuda", "cudnn", Pass::Backward, Feature::Alibi)
    },
];

/// One that is faster at every size, where there is such a feature.
const fn always(faster: &'static str, slower: &'static str, pass: Pass, with: Feature) -> Crossover {
    Crossover {
        small: faster,
        large: slower,
        pass,
        with: Some(with),
        without: None,
        logits_per_head: usize::MAX,
    }
}

/// Orders candidates for a problem: where a crossover applies, its winner moves right before its loser.
pub(crate) fn order(backends: &mut Vec<Arc<dyn AttentionBackend>>, problem: &Problem, table: &[Crossover]) {
    let dims = problem.dims();
    let logits = dims.query_length.saturating_mul(dims.key_length);
    let features = problem.features();
    let applies = |rule: &&Crossover| {
        rule.pass == problem.pass()
            && rule.with.is_none_or(|feature| features.contains(feature))
            && !rule.without.is_some_and(|feature| features.contains(feature))
    };
    for rule in table.iter().filter(applies) {
        let (winner, loser) =
            if logits < rule.logits_per_head { (rule.small, rule.large) } else { (rule.large, rule.small) };
        let place = |name: &str| backends.iter().position(|backend| backend.name() == name);
        if let (Some(winner), Some(loser)) = (place(winner), place(loser))
            && loser < winner
        {
            let backend = backends.remove(winner);
            backends.insert(loser, backend);
        }
    }
}
