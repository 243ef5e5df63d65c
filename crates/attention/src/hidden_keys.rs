//! Causal calls that hide keys from every query row, which a caller with a cache of keys rarely means.

use std::sync::atomic::{AtomicBool, Ordering};

use attention_core::{Alignment, CallData, CallProblem, Device, Problem, Role, RowLayout};

/// Whether calls of a problem may have keys that no query row sees.
fn may_hide(problem: &Problem) -> bool {
    problem.causal() && problem.alignment() == Alignment::TopLeft
}

/// The numbers that say how many rows and keys a sequence has.
const LENGTHS: [Role; 4] =
    [Role::QueryLengths, Role::KeyValueLengths, Role::QueryStarts, Role::KeyValueStarts];

/// That a causal call at offset 0 has keys which no query row may see, with the two ways out; `None` where it
/// has none, and where lengths or starts are in device memory: the host has their bounds then, which say
/// nothing of how many keys a sequence has more than query rows.
pub(crate) fn hidden_keys(call: &CallProblem<'_>) -> Option<String> {
    let unknown = |role| call.has(role) && call.device_of(role) != Device::Cpu;
    if !may_hide(call) || LENGTHS.into_iter().any(unknown) {
        return None;
    }
    let dims = call.dims();
    let has_sequences = call.query_layout() != RowLayout::Dense || call.key_layout() != RowLayout::Dense;
    // Without query rows, nothing is hidden from them: only sequences that have some are asked.
    let hidden = |batch: usize| {
        let rows = call.sequence(batch);
        rows.keys().saturating_sub(rows.queries())
    };
    // Where no length is its own, every batch row is like the first, and there may be any number of them.
    let alike = |role| call.tensor(role).is_none_or(|desc| desc.strides().first() == Some(&0));
    let rows = if LENGTHS.into_iter().all(alike) { dims.batch.min(1) } else { dims.batch };
    let (hidden, sequence) = call
        .sequences_with_queries(0..rows)
        .map(|row| (hidden(row), row))
        .max_by_key(|&(hidden, _)| hidden)
        .filter(|most| most.0 > 0)?;
    let last = if hidden == 1 { "key".to_owned() } else { format!("{hidden} keys") };
    // Of sequences, T and S are bounds that no caller gave.
    let (of, queries, keys) = if has_sequences {
        let rows = call.sequence(sequence);
        (format!(" of sequence {sequence}"), rows.queries(), rows.keys())
    } else {
        (String::new(), dims.query_length, dims.key_length)
    };
    Some(format!(
        "the call is causal with T = {queries}, S = {keys}{of} and query offset 0 (top-left), which hides the last {last} from \
         every query row; for queries behind cached keys set `query_offset` to `QueryOffset::Fixed(number of cached keys)` or to \
         `QueryOffset::BottomRight`"
    ))
}

/// That every call of a problem hides keys; `None` where that is for the lengths of each call to say.
pub(crate) fn always_hidden_keys(problem: &Problem) -> Option<String> {
    if problem.rows_vary() { None } else { hidden_keys(&CallProblem::at_bounds(problem)) }
}

/// Tells of keys that every call of a problem hides. Called where it is planned.
pub(crate) fn tell_of_problem(problem: &Problem) {
    if may_hide(problem) && enabled() {
        tell(always_hidden_keys(problem));
    }
}

/// Tells of keys that a call hides by its lengths. Called before each.
pub(crate) fn tell_of_lengths<'c>(problem: &'c Problem, data: &CallData<'c>) {
    if may_hide(problem) && problem.rows_vary() && enabled() {
        // What is wrong with the call is its error.
        tell(CallProblem::new(problem, data).ok().and_then(|call| hidden_keys(&call)));
    }
}

/// Whether a process has been told at warn level.
static TOLD: AtomicBool = AtomicBool::new(false);

/// Whether anybody listens at the level of the next event.
fn enabled() -> bool {
    if TOLD.load(Ordering::Relaxed) {
        tracing::enabled!(target: "attention", tracing::Level::DEBUG)
    } else {
        tracing::enabled!(target: "attention", tracing::Level::WARN)
    }
}

/// Tells of hidden keys: at warn level once in a process, since the next thousand layers and steps mean the
/// same, and at debug level from then on.
fn tell(note: Option<String>) {
    let Some(note) = note else { return };
    if TOLD.swap(true, Ordering::Relaxed) {
        tracing::debug!(target: "attention", "{note}");
    } else {
        tracing::warn!(target: "attention", "{note} (said once in a process)");
    }
}

#[cfg(test)]
mod tests {
    use attention_core::{
        DType, Dimensions, Dims, Lengths, OffsetRange, ProblemBuilder, QueryOffset, TensorDesc, View,
    };

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
        note_of(builder, CallData::default())
    }

    fn note_of(builder: ProblemBuilder, data: CallData<'_>) -> Option<String> {
        let problem = builder.data(&data).build().unwrap();
        let note = hidden_keys(&CallProblem::new(&problem, &data).unwrap());
        assert_eq!(always_hidden_keys(&problem), note.clone().filter(|_| !problem.rows_vary()));
        note
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
        for query_offset in [QueryOffset::Fixed(3), QueryOffset::BottomRight] {
            assert_eq!(note_of(causal(1, 1, 12), CallData { query_offset, ..CallData::default() }), None);
        }
        let query_offsets = View::from_slice(&[0i32], [1]).ok();
        assert_eq!(note_of(causal(1, 1, 12), CallData { query_offsets, ..CallData::default() }), None);
        assert_eq!(note(causal(0, 1, 12)), None);
        assert_eq!(note(causal(1, 0, 12)), None);
    }

    #[test]
    fn lengths_count() {
        let of = |queries: &Lengths, keys: &Lengths, call: [usize; 3]| {
            let (query_lengths, key_value_lengths) = (queries.view(), keys.view());
            let [batch, query_length, key_length] = call;
            let data = CallData { query_lengths, key_value_lengths, ..CallData::default() };
            note_of(causal(batch, query_length, key_length), data)
        };
        // A cache that has space for 12 keys and holds as many as there are queries.
        assert_eq!(of(&Lengths::Full, &Lengths::from([4, 3]), [2, 4, 12]), None);
        let told = of(&Lengths::Full, &Lengths::from([4, 9]), [2, 4, 12]).unwrap();
        assert!(told.contains("hides the last 5 keys"), "{told}");
        let told = of(&Lengths::from([2, 4]), &Lengths::from([4, 9]), [2, 4, 12]).unwrap();
        assert!(told.contains("hides the last 5 keys"), "{told}");
        assert_eq!(of(&Lengths::from([0]), &Lengths::Full, [1, 4, 12]), None);
    }

    fn tensors(query: &[usize], key: &[usize]) -> ProblemBuilder {
        let of = |shape: &[usize]| TensorDesc::contiguous(DType::F32, Dims::from_slice(shape).unwrap());
        Problem::builder(of(query), of(key), of(key)).causal(true)
    }

    #[test]
    fn sequences_count_and_are_named() {
        let starts = |list: &'static [i32]| View::from_slice(list, [list.len()]).ok();
        let of = |queries, keys| CallData {
            query_starts: starts(queries),
            key_value_starts: starts(keys),
            ..CallData::default()
        };
        let packed = || tensors(&[9, 1, 4], &[20, 1, 4]);
        assert_eq!(note_of(packed(), of(&[0, 4, 9], &[0, 4, 8])), None);
        let told = note_of(packed(), of(&[0, 4, 5], &[0, 5, 13])).unwrap();
        assert!(told.contains("T = 1, S = 8 of sequence 1 and"), "{told}");
        assert!(told.contains("hides the last 7 keys from every query row"), "{told}");
        // A cache in pages: one row over as many keys as its length says.
        let (table, lengths) = ([0i32, 1, 2, -1], [7i32, 3]);
        let data = CallData {
            block_table: View::from_slice(&table, [2, 2]).ok(),
            key_value_lengths: View::from_slice(&lengths, [2]).ok(),
            ..CallData::default()
        };
        let told = note_of(tensors(&[2, 1, 1, 4], &[3, 4, 1, 4]), data).unwrap();
        assert!(told.contains("T = 1, S = 7 of sequence 0") && told.contains("last 6 keys"), "{told}");
        let data = CallData { query_offset: QueryOffset::BottomRight, ..data };
        assert_eq!(note_of(tensors(&[2, 1, 1, 4], &[3, 4, 1, 4]), data), None);
    }

    /// One number for all of them takes no memory, so there may be more than could be counted.
    #[test]
    fn any_number_of_sequences_is_looked_at_once() {
        let many = 1 << 50;
        let all = |number: &'static [i32], count: usize| View::strided(number, 0, [count], [0]).ok();
        let starts = all(&[0], many + 1);
        let data = CallData { query_starts: starts, key_value_starts: starts, ..CallData::default() };
        assert_eq!(note_of(tensors(&[2, 1, 4], &[3, 1, 4]), data), None);
        let lengths = CallData { key_value_lengths: all(&[3], many), ..CallData::default() };
        assert_eq!(note_of(causal(many, 3, 4), lengths), None);
        let told = note_of(causal(many, 2, 4), lengths).unwrap();
        assert!(told.contains("hides the last key from"), "{told}");
        // Of sequences that have numbers of their own, those without queries hide nothing.
        let starts = |list: &'static [i32]| View::from_slice(list, [list.len()]).ok();
        let data = CallData {
            query_starts: starts(&[0, 0, 2, 2, 3]),
            key_value_starts: starts(&[0, 9, 11, 19, 20]),
            ..CallData::default()
        };
        assert_eq!(note_of(tensors(&[3, 1, 4], &[20, 1, 4]), data), None);
    }

    /// One query row at most and many keys at most: the sequences of the call may still have one of each.
    #[test]
    fn starts_in_device_memory_say_nothing() {
        let packed = tensors(&[2, 1, 4], &[20, 1, 4]).device(Device::Cuda(0));
        let packed = packed.packed_queries(2, DType::I32).packed_keys(2, DType::I32).longest(1, 16);
        for in_host_memory in [None, Some(Role::QueryStarts), Some(Role::KeyValueStarts)] {
            let problem = match in_host_memory {
                Some(role) => packed.clone().in_host_memory(role, true),
                None => packed.clone(),
            };
            let problem = problem.build().unwrap();
            assert_eq!(hidden_keys(&CallProblem::at_bounds(&problem)), None);
            assert_eq!(always_hidden_keys(&problem), None);
        }
    }

    #[test]
    fn lengths_in_device_memory_say_nothing() {
        let problem = causal(2, 4, 12).device(Device::Cuda(0)).key_value_lengths(DType::I32).build().unwrap();
        assert_eq!(hidden_keys(&CallProblem::at_bounds(&problem)), None);
        assert_eq!(always_hidden_keys(&problem), None);
        let offset = causal(2, 4, 12).alignment(Alignment::Offset(OffsetRange::Near)).build().unwrap();
        assert_eq!(hidden_keys(&CallProblem::at_bounds(&offset)), None);
    }
}
