//! Which keys a query row can see by structure alone: lengths, causal masking and windows.

use std::ops::Range;

use super::Problem;
use crate::{QueryOffset, Sequences, Window};

impl Problem {
    /// How many query rows of batch row `batch` are real.
    ///
    /// # Panics
    /// Where lengths were given and `batch` is not below `B`.
    pub fn query_len(&self, batch: usize) -> usize {
        let Sequences::Dense { query, .. } = &self.spec.sequences;
        query.of(batch, self.dims.query_length)
    }

    /// How many keys of batch row `batch` are real.
    ///
    /// # Panics
    /// As [`query_len`](Self::query_len).
    pub fn key_value_len(&self, batch: usize) -> usize {
        let Sequences::Dense { key_value, .. } = &self.spec.sequences;
        key_value.of(batch, self.dims.key_length)
    }

    /// What is added to `t` to give the position of a query row of batch row `batch`.
    ///
    /// # Panics
    /// As [`query_len`](Self::query_len).
    pub fn offset(&self, batch: usize) -> i64 {
        match self.spec.query_offset {
            QueryOffset::Fixed(offset) => offset,
            // Lengths are at most isize::MAX, so the difference does not overflow.
            QueryOffset::BottomRight => self.key_value_len(batch) as i64 - self.query_len(batch) as i64,
        }
    }

    /// `pos = t + offset`: where query row `t` of batch row `batch` stands among the keys. Saturates.
    ///
    /// # Panics
    /// As [`query_len`](Self::query_len).
    pub fn position(&self, batch: usize, t: usize) -> i64 {
        self.offset(batch).saturating_add(i64::try_from(t).unwrap_or(i64::MAX))
    }

    /// The keys that query row `t` of batch row `batch` may attend to by lengths, causal masking and window;
    /// masks and -inf biases may take more away. Empty for a padded query row.
    ///
    /// # Panics
    /// As [`query_len`](Self::query_len).
    pub fn key_range(&self, batch: usize, t: usize) -> Range<usize> {
        if t >= self.query_len(batch) {
            return 0..0;
        }
        self.window_around(batch, t)
    }

    /// The smallest range that holds [`key_range`](Self::key_range) of every row of `rows`: what a backend has to
    /// look at for a block of rows. Empty if every row's range is.
    ///
    /// # Panics
    /// As [`query_len`](Self::query_len).
    pub fn key_range_of_rows(&self, batch: usize, rows: Range<usize>) -> Range<usize> {
        // Padded rows come last and see nothing.
        let rows = rows.start..rows.end.min(self.query_len(batch));
        if rows.is_empty() {
            return 0..0;
        }
        // Both ends grow by at most one from row to row, so the union has no gaps.
        let start = self.window_around(batch, rows.start).start;
        let end = self.window_around(batch, rows.end - 1).end;
        start..end
    }

    /// The keys in reach of row `t`. The start is never behind the end: a window holds at least `pos` itself, and
    /// both ends are brought into the range of the keys.
    fn window_around(&self, batch: usize, t: usize) -> Range<usize> {
        // In 128 bits no offset, row or window overflows.
        let position = i128::from(self.offset(batch)) + t as i128;
        let Window { left, right } = self.spec.window;
        let first = left.map_or(0, |left| position - left as i128);
        let mut last = right.map_or(i128::MAX - 1, |right| position + right as i128);
        if self.spec.causal {
            last = last.min(position);
        }
        let keys = self.key_value_len(batch) as i128;
        // `last` is inclusive; before key 0 it gives an end of 0. Both ends are between 0 and `keys` now.
        let (start, end) = (first.clamp(0, keys), (last + 1).clamp(0, keys));
        start as usize..end as usize
    }
}
