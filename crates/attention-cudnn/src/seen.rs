//! Which rows see a key, and which keys a row sees, by structure: lengths, causal masking and windows.

use std::ops::Range;

use attention_core::{Problem, Role, SequenceRows};

/// Whether calls give lengths, or starts of packed sequences, so that batch rows may differ.
pub(crate) fn has_lengths(problem: &Problem) -> bool {
    [Role::QueryLengths, Role::KeyValueLengths, Role::QueryStarts, Role::KeyValueStarts]
        .into_iter()
        .any(|role| problem.has(role))
}

/// The rows of a sequence that see a key. They are consecutive, since both ends of the keys that a row sees
/// move by one per row. The kernel `attention_sequences` computes the same.
pub(crate) fn seen_rows(sequence: &SequenceRows) -> Range<usize> {
    let (low, high) = sequence.reach();
    let (queries, keys) = (sequence.queries() as i128, sequence.keys() as i128);
    // Row t sees a key where t + high > 0 and t + low < keys, since low < high.
    let first = high.map_or(0, |high| (1 - high).max(0));
    let end = low.map_or(queries, |low| (keys - low).min(queries));
    if keys > 0 && first < end { first as usize..end as usize } else { 0..0 }
}

/// The keys that any row of a sequence sees.
pub(crate) fn seen_keys(sequence: &SequenceRows) -> Range<usize> {
    sequence.key_range_of_rows(0..sequence.queries())
}

#[cfg(test)]
mod tests {
    use attention_core::{CallData, CallProblem, DType, Device, QueryOffset, TensorDesc, View, Window};

    use super::*;

    /// The rows that see a key, by the definition: each row is asked.
    fn rows_one_by_one(sequence: &SequenceRows) -> Range<usize> {
        let sees = |&row: &usize| !sequence.key_range(row).is_empty();
        let rows = 0..sequence.queries();
        match (rows.clone().find(sees), rows.rev().find(sees)) {
            (Some(first), Some(last)) => first..last + 1,
            _ => 0..0,
        }
    }

    /// The rows and keys as the kernel computes them, where `low` and `high` are far away if there is no
    /// bound.
    fn as_in_the_kernel(sequence: &SequenceRows) -> (Range<i64>, Range<i64>) {
        const FAR: i64 = 1 << 40;
        let (low, high) = sequence.reach();
        let low = low.map_or(-FAR, |low| low as i64);
        let high = high.map_or(FAR, |high| high as i64);
        let (queries, keys) = (sequence.queries() as i64, sequence.keys() as i64);
        let (first, end) = (0.max(1 - high), queries.min(keys - low));
        let rows = if keys > 0 && first < end { first..end } else { 0..0 };
        let seen = if queries > 0 { low.clamp(0, keys)..(queries - 1 + high).clamp(0, keys) } else { 0..0 };
        (rows, seen)
    }

    #[test]
    fn rows_and_keys_are_those_of_the_definition_for_all_small_sizes() {
        const MOST: usize = 5;
        let desc = TensorDesc::contiguous(DType::F16, [1, MOST, 1, 8]);
        let offsets = (-7..=7).map(QueryOffset::Fixed).chain([QueryOffset::BottomRight]);
        let bounds = || [None, Some(0), Some(1), Some(3), Some(9)].into_iter();
        let mut count = 0;
        for query_offset in offsets {
            for (left, right) in bounds().flat_map(|left| bounds().map(move |right| (left, right))) {
                for causal in [false, true] {
                    for (queries, keys) in (0..=MOST).flat_map(|q| (0..=MOST).map(move |k| (q, k))) {
                        let (query, key) = ([queries as i32], [keys as i32]);
                        let view = |of| View::from_slice(of, [1]).expect("one number");
                        let (query_lengths, key_value_lengths) = (Some(view(&query)), Some(view(&key)));
                        let data = CallData {
                            query_offset,
                            query_lengths,
                            key_value_lengths,
                            ..CallData::default()
                        };
                        let builder = Problem::builder(desc, desc, desc).device(Device::Cpu).data(&data);
                        let problem =
                            builder.causal(causal).window(Window { left, right }).build().expect("valid");
                        let call = CallProblem::new(&problem, &data).expect("valid");
                        let sequence = call.sequence(0);
                        let what = format!("{query_offset:?} {left:?} {right:?} {causal} {queries} {keys}");
                        let rows = rows_one_by_one(&sequence);
                        assert_eq!(seen_rows(&sequence), rows, "{what}");
                        let (kernel_rows, kernel_keys) = as_in_the_kernel(&sequence);
                        assert_eq!(kernel_rows, rows.start as i64..rows.end as i64, "{what}");
                        let seen = seen_keys(&sequence);
                        assert_eq!(kernel_keys, seen.start as i64..seen.end as i64, "{what}");
                        // It includes the keys of every row, and its ends are the first and the last of
                        // those.
                        let all: Vec<_> = rows.map(|row| sequence.key_range(row)).collect();
                        let first = all.iter().map(|keys| keys.start).min();
                        let end = all.iter().map(|keys| keys.end).max();
                        if let (Some(first), Some(end)) = (first, end) {
                            assert_eq!(seen, first..end, "{what}");
                        } else {
                            assert!(seen.is_empty(), "{what}");
                        }
                        count += 1;
                    }
                }
            }
        }
        assert_eq!(count, 16 * 25 * 2 * 36);
    }
}
