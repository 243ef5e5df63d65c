//! Which keys a query row can see by structure alone: lengths, causal masking and windows.

use std::ops::Range;

use super::Problem;
use crate::{QueryOffset, Sequences, Window};

impl Problem {
    /// How many query rows of batch row `batch` are real.
    pub fn query_len(&self, batch: usize) -> usize {
        let Sequences::Dense { query, .. } = &self.spec.sequences;
        query.of(batch, self.dims.query_length)
    }

    /// How many keys of batch row `batch` are real.
    pub fn key_value_len(&self, batch: usize) -> usize {
        let Sequences::Dense { key_value, .. } = &self.spec.sequences;
        key_value.of(batch, self.dims.key_length)
    }

    /// What is added to `t` to give the position of a query row of batch row `batch`.
    pub fn offset(&self, batch: usize) -> i64 {
        match self.spec.query_offset {
            QueryOffset::Fixed(offset) => offset,
            // Lengths are at most isize::MAX, so the difference does not overflow.
            QueryOffset::BottomRight => self.key_value_len(batch) as i64 - self.query_len(batch) as i64,
        }
    }

    /// `pos = t + offset`: where query row `t` of batch row `batch` stands among the keys. Saturates.
    pub fn position(&self, batch: usize, t: usize) -> i64 {
        self.offset(batch).saturating_add(i64::try_from(t).unwrap_or(i64::MAX))
    }

    /// The keys that query row `t` of batch row `batch` may attend to by lengths, causal masking and window;
    /// masks and -inf biases may take more away. Empty for a padded query row.
    pub fn key_range(&self, batch: usize, t: usize) -> Range<usize> {
        if t >= self.query_len(batch) {
            return 0..0;
        }
        let Range { start, end } = self.window_around(batch, t);
        start.min(end)..end
    }

    /// The smallest range that holds [`key_range`](Self::key_range) of every row of `rows`: what a backend has to
    /// look at for a block of rows. Empty if every row's range is.
    pub fn key_range_of_rows(&self, batch: usize, rows: Range<usize>) -> Range<usize> {
        // Padded rows come last and see nothing.
        let rows = rows.start..rows.end.min(self.query_len(batch));
        if rows.is_empty() {
            return 0..0;
        }
        // Both ends grow by at most one from row to row, so the union has no gaps.
        let start = self.window_around(batch, rows.start).start;
        let end = self.window_around(batch, rows.end - 1).end;
        start.min(end)..end
    }

    /// The keys in reach of row `t`. The end is at most the number of keys; the start may lie behind the end where
    /// the window has moved past the last key.
    fn window_around(&self, batch: usize, t: usize) -> Range<usize> {
        let position = self.position(batch, t);
        let reach = |size: usize| i64::try_from(size).unwrap_or(i64::MAX);
        let Window { left, right } = self.spec.window;
        let first = left.map_or(0, |left| position.saturating_sub(reach(left)));
        let mut last = right.map_or(i64::MAX, |right| position.saturating_add(reach(right)));
        if self.spec.causal {
            last = last.min(position);
        }
        let keys = self.key_value_len(batch);
        // `last` is inclusive; before key 0 it gives an end of 0.
        let end = usize::try_from(last.saturating_add(1)).map_or(0, |end| end.min(keys));
        usize::try_from(first).unwrap_or(0)..end
    }
}
