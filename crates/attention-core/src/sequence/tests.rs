//! Structural key ranges against the definition in `docs/semantics.md`, one key at a time.

use std::ops::Range;

use proptest::prelude::*;

use crate::{Alignment, CallData, CallProblem, DType, Dimensions, Problem, QueryOffset, View, Window};

#[derive(Clone, Debug)]
struct Structure {
    query_length: usize,
    key_length: usize,
    query_lens: Option<Vec<usize>>,
    key_lens: Option<Vec<usize>>,
    offset: QueryOffset,
    /// In the place of `offset`, by batch row.
    offsets: Option<Vec<i64>>,
    window: Window,
    causal: bool,
}

impl Structure {
    const BATCH: usize = 2;

    fn problem(&self) -> Problem {
        let dims = Dimensions {
            batch: Self::BATCH,
            query_length: self.query_length,
            key_length: self.key_length,
            query_heads: 1,
            key_heads: 1,
            head_dim: 1,
            value_head_dim: 1,
        };
        let builder = dims.problem(DType::F32).window(self.window).causal(self.causal);
        builder.data(&self.data()).build().unwrap()
    }

    fn data(&self) -> CallData<'_> {
        fn view(lengths: &[usize]) -> View<'_> {
            View::from_slice(lengths, [Structure::BATCH]).unwrap()
        }
        CallData {
            query_offset: self.offset,
            query_offsets: self
                .offsets
                .as_ref()
                .map(|offsets| View::from_slice(offsets, [Self::BATCH]).unwrap()),
            query_lengths: self.query_lens.as_deref().map(view),
            key_value_lengths: self.key_lens.as_deref().map(view),
            ..CallData::default()
        }
    }

    fn query_len(&self, batch: usize) -> usize {
        self.query_lens.as_ref().map_or(self.query_length, |lengths| lengths[batch])
    }

    fn key_len(&self, batch: usize) -> usize {
        self.key_lens.as_ref().map_or(self.key_length, |lengths| lengths[batch])
    }

    /// Rules 1 and 3 of the semantics, in integers that cannot overflow.
    fn offset(&self, batch: usize) -> i128 {
        if let Some(offsets) = &self.offsets {
            return offsets[batch].into();
        }
        match self.offset {
            QueryOffset::Fixed(offset) => offset.into(),
            QueryOffset::BottomRight => self.key_len(batch) as i128 - self.query_len(batch) as i128,
        }
    }

    fn allowed(&self, batch: usize, t: usize, j: usize) -> bool {
        let pos = t as i128 + self.offset(batch);
        let key = j as i128;
        t < self.query_len(batch) && j < self.key_len(batch) && self.in_reach(pos, key)
    }

    /// Whether a row at `pos` reaches `key`, whatever the lengths are.
    fn in_reach(&self, pos: i128, key: i128) -> bool {
        (!self.causal || key <= pos)
            && self.window.left.is_none_or(|left| pos - left as i128 <= key)
            && self.window.right.is_none_or(|right| key <= pos + right as i128)
    }

    /// The smallest range that holds every allowed key of these rows.
    fn smallest(&self, batch: usize, rows: Range<usize>) -> Range<usize> {
        let seen = |&j: &usize| rows.clone().any(|t| self.allowed(batch, t, j));
        let first = (0..self.key_length).find(seen);
        let last = (0..self.key_length).rfind(seen);
        first.map_or(0..0, |first| first..last.unwrap() + 1)
    }
}

fn structure() -> impl Strategy<Value = Structure> {
    let extreme = || prop_oneof![Just(i64::MIN), Just(i64::MIN + 3), Just(i64::MAX), Just(i64::MAX - 3)];
    let offset = prop_oneof![
        6 => (-14i64..14).prop_map(QueryOffset::Fixed),
        2 => extreme().prop_map(QueryOffset::Fixed),
        3 => Just(QueryOffset::BottomRight),
    ];
    let side = || {
        let huge = i64::MAX as usize;
        let size = prop_oneof![
            6 => 0usize..14,
            1 => Just(usize::MAX),
            1 => huge - 6..huge + 6,
            1 => huge.saturating_mul(2) - 6..usize::MAX,
        ];
        proptest::option::of(size)
    };
    (0usize..12, 0usize..12).prop_flat_map(move |(query_length, key_length)| {
        let lengths = |max: usize| proptest::option::of(proptest::collection::vec(0..=max, Structure::BATCH));
        let sides = (side(), side());
        let one = prop_oneof![6 => -14i64..14, 2 => extreme()];
        let offsets = proptest::option::weighted(0.3, proptest::collection::vec(one, Structure::BATCH));
        let offsets = (offset.clone(), offsets);
        (lengths(query_length), lengths(key_length), offsets, sides, any::<bool>()).prop_map(
            move |(query_lens, key_lens, (offset, offsets), (left, right), causal)| Structure {
                query_length,
                key_length,
                query_lens,
                key_lens,
                offset,
                offsets,
                window: Window { left, right },
                causal,
            },
        )
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4000))]

    #[test]
    fn rows_see_exactly_the_allowed_keys(structure in structure()) {
        let planned = structure.problem();
        let problem = CallProblem::new(&planned, &structure.data()).unwrap();
        for batch in 0..Structure::BATCH {
            let sequence = problem.sequence(batch);
            prop_assert_eq!(sequence.queries(), structure.query_len(batch));
            prop_assert_eq!(sequence.keys(), structure.key_len(batch));
            prop_assert_eq!(sequence.offset(), problem.offset(batch));
            prop_assert_eq!(problem.query_len(batch), structure.query_len(batch));
            prop_assert_eq!(problem.key_value_len(batch), structure.key_len(batch));
            prop_assert_eq!(i128::from(problem.offset(batch)), structure.offset(batch));
            for t in 0..structure.query_length + 2 {
                let exact = structure.offset(batch) + t as i128;
                let clamped = exact.clamp(i64::MIN.into(), i64::MAX.into());
                prop_assert_eq!(i128::from(problem.position(batch, t)), clamped);
                prop_assert_eq!(sequence.position(t), problem.position(batch, t));
                let range = problem.key_range(batch, t);
                prop_assert_eq!(sequence.key_range(t), range.clone());
                let (low, high) = sequence.reach();
                for j in (-3..structure.key_length as i128 + 3).chain([exact - 1, exact, exact + 1]) {
                    let (low, high) = (low.map(|low| t as i128 + low), high.map(|high| t as i128 + high));
                    let reached = low.is_none_or(|low| low <= j) && high.is_none_or(|high| j < high);
                    prop_assert_eq!(reached, structure.in_reach(exact, j), "row {} key {}", t, j);
                }
                prop_assert!(range.start <= range.end && range.end <= structure.key_length);
                for j in 0..structure.key_length + 1 {
                    prop_assert_eq!(range.contains(&j), structure.allowed(batch, t, j), "row {} key {}", t, j);
                }
            }
        }
    }

    #[test]
    fn blocks_see_the_smallest_range_around_their_rows(
        structure in structure(),
        start in 0usize..14,
        size in 0usize..14,
    ) {
        let planned = structure.problem();
        let problem = CallProblem::new(&planned, &structure.data()).unwrap();
        for batch in 0..Structure::BATCH {
            let rows = start..start + size;
            let range = problem.key_range_of_rows(batch, rows.clone());
            prop_assert_eq!(problem.sequence(batch).key_range_of_rows(rows.clone()), range.clone());
            prop_assert!(range.start <= range.end && range.end <= structure.key_length);
            let want = structure.smallest(batch, rows);
            // An empty range may stand anywhere.
            prop_assert!(range == want || (range.is_empty() && want.is_empty()), "{:?} {:?}", range, want);
        }
    }
}

#[test]
fn a_reversed_block_of_rows_is_empty() {
    let dims = Dimensions {
        batch: 1,
        query_length: 4,
        key_length: 4,
        query_heads: 1,
        key_heads: 1,
        head_dim: 1,
        value_head_dim: 1,
    };
    let problem = dims.problem(DType::F32).build().unwrap();
    let problem = CallProblem::at_bounds(&problem);
    assert!(problem.key_range_of_rows(0, Range { start: 3, end: 1 }).is_empty());
    assert!(problem.key_range_of_rows(0, usize::MAX - 1..usize::MAX).is_empty());
    assert_eq!(problem.key_range(0, usize::MAX), 0..0);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    /// What a planner sizes by: of lengths, and where offsets follow from them, no call sees more.
    #[test]
    fn no_call_has_more_rows_and_keys_than_the_bounds(structure in structure()) {
        let planned = structure.problem();
        let call = CallProblem::new(&planned, &structure.data()).unwrap();
        let bounds = CallProblem::at_bounds(&planned);
        prop_assert_eq!(bounds.scale(), planned.default_scale());
        let all = |problem: &CallProblem<'_>, batch| {
            let sequence = problem.sequence(batch);
            sequence.key_range_of_rows(0..sequence.queries()).len()
        };
        for batch in 0..Structure::BATCH {
            prop_assert_eq!(bounds.query_len(batch), structure.query_length);
            prop_assert_eq!(bounds.key_value_len(batch), structure.key_length);
            prop_assert!(call.query_len(batch) <= bounds.query_len(batch));
            prop_assert!(call.key_value_len(batch) <= bounds.key_value_len(batch));
            if !matches!(planned.alignment(), Alignment::Offset(_) | Alignment::Offsets(_)) {
                prop_assert!(all(&call, batch) <= all(&bounds, batch));
            }
            if !planned.rows_vary() {
                prop_assert_eq!(call.sequence(batch), bounds.sequence(batch));
            }
        }
    }
}
