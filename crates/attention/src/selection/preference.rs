//! The order in which an automatic choice asks: the registry's, corrected by measured crossover points.

use std::sync::Arc;

use attention_core::{AttentionBackend, Pass, Problem};

/// A size below which one implementation is faster than another, as measured.
pub(crate) struct Crossover {
    /// Faster below.
    pub(crate) small: &'static str,
    /// Faster from there on.
    pub(crate) large: &'static str,
    /// The pass that it holds for.
    pub(crate) pass: Pass,
    /// `T * S` at the crossover.
    pub(crate) logits_per_head: usize,
}

/// Each entry names the benchmark record that it was read from, in a comment above it.
pub(crate) const CROSSOVERS: &[Crossover] = &[];

/// Orders candidates for a problem: where a crossover applies, its winner moves right before its loser.
pub(crate) fn order(backends: &mut Vec<Arc<dyn AttentionBackend>>, problem: &Problem, table: &[Crossover]) {
    let dims = problem.dims();
    let logits = dims.query_length.saturating_mul(dims.key_length);
    for rule in table.iter().filter(|rule| rule.pass == problem.pass()) {
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
