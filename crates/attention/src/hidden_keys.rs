//! Causal calls that hide keys from every query row, which a caller with a cache of keys rarely means.

use std::sync::atomic::{AtomicBool, Ordering};

use attention_core::{Problem, QueryOffset, Sequences};

/// That a causal call at offset 0 has keys which no query row may see, with the two ways out; `None` where it has none.
pub(crate) fn hidden_keys(problem: &Problem) -> Option<String> {
    if !problem.causal() || problem.query_offset() != QueryOffset::TOP_LEFT {
        return None;
    }
    let (dims, Sequences::Dense { query, key_value }) = (problem.dims(), problem.sequences()) else {
        return None;
    };
    let hidden = |batch: usize| {
        let queries = query.of(batch, dims.query_length);
        let keys = key_value.of(batch, dims.key_length);
        // Without query rows, nothing is hidden from them.
        if queries == 0 { 0 } else { keys.saturating_sub(queries) }
    };
    // Without lengths every batch row is like the first.
    let rows = if query.is_full() && key_value.is_full() { dims.batch.min(1) } else { dims.batch };
    let hidden = (0..rows).map(hidden).max().filter(|&hidden| hidden > 0)?;
    let (queries, keys) = (dims.query_length, dims.key_length);
    let last = if hidden == 1 { "key".to_owned() } else { format!("{hidden} keys") };
    Some(format!(
        "the call is causal with T = {queries}, S = {keys} and query offset 0 (top-left), which hides the last {last} from every \
         query row; for queries behind cached keys set `query_offset` to `QueryOffset::Fixed(number of cached keys)` or to \
         `QueryOffset::BottomRight`"
    ))
}

/// Tells of hidden keys: at warn level once in a process, since the next thousand layers and steps mean the same, and at debug
/// level from then on.
pub(crate) fn tell(problem: &Problem) {
    static TOLD: AtomicBool = AtomicBool::new(false);
    if !tracing::enabled!(target: "attention", tracing::Level::WARN) {
        return;
    }
    let Some(note) = hidden_keys(problem) else { return };
    if TOLD.swap(true, Ordering::Relaxed) {
        tracing::debug!(target: "attention", "{note}");
    } else {
        tracing::warn!(target: "attention", "{note} (said once in a process)");
    }
}

#[cfg(test)]
mod tests {
    use attention_core::{DType, Dimensions, ProblemBuilder};

    use super::*;

    fn causal(batch: usize, query_length: usize, key_length: usize) -> ProblemBuilder {
        let dims = Dimensions {
            batch,
            query_length,
            key_length,
            query_heads: 1,
            key_heads: 1,
            head_dim: 4,
            value_head_dim: 4,
        };
        dims.problem(DType::F32).causal(true)
    }

    fn note(builder: ProblemBuilder) -> Option<String> {
        hidden_keys(&builder.build().unwrap())
    }

    #[test]
    fn one_query_over_a_cache_is_told_of_what_it_does_not_see() {
        let told = note(causal(1, 1, 12)).unwrap();
        assert!(told.contains("T = 1, S = 12"), "{told}");
        assert!(told.contains("hides the last 11 keys from every query row"), "{told}");
        assert!(told.contains("QueryOffset::Fixed") && told.contains("QueryOffset::BottomRight"), "{told}");
        let told = note(causal(1, 4, 5)).unwrap();
        assert!(told.contains("hides the last key from"), "{told}");
    }

    #[test]
    fn calls_that_say_where_their_queries_stand_or_hide_nothing_are_not_told() {
        assert_eq!(note(causal(1, 12, 12)), None);
        assert_eq!(note(causal(1, 13, 12)), None);
        assert_eq!(note(causal(1, 1, 12).causal(false)), None);
        assert_eq!(note(causal(1, 1, 12).query_offset(QueryOffset::Fixed(3))), None);
        assert_eq!(note(causal(1, 1, 12).query_offset(QueryOffset::BottomRight)), None);
        assert_eq!(note(causal(0, 1, 12)), None);
        assert_eq!(note(causal(1, 0, 12)), None);
    }

    #[test]
    fn lengths_count() {
        // A cache that has space for 12 keys and holds as many as there are queries.
        assert_eq!(note(causal(2, 4, 12).key_value_lengths([4, 3])), None);
        let told = note(causal(2, 4, 12).key_value_lengths([4, 9])).unwrap();
        assert!(told.contains("hides the last 5 keys"), "{told}");
        let told = note(causal(2, 4, 12).key_value_lengths([4, 9]).query_lengths([2, 4])).unwrap();
        assert!(told.contains("hides the last 5 keys"), "{told}");
        assert_eq!(note(causal(1, 4, 12).query_lengths([0])), None);
    }
}
