//! Where the rows of a sequence are, and which keys a row can see by structure alone: lengths, causal masking
//! and windows.

use std::ops::Range;

use crate::Window;
use crate::data::Integers;

/// The rows of one sequence, and which keys each of them sees. Kernels have a struct of the same name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SequenceRows {
    pub(crate) queries: usize,
    pub(crate) keys: usize,
    pub(crate) offset: i64,
    pub(crate) window: Window,
    pub(crate) causal: bool,
}

impl SequenceRows {
    /// How many query rows are real.
    pub fn queries(&self) -> usize {
        self.queries
    }

    /// How many keys are real.
    pub fn keys(&self) -> usize {
        self.keys
    }

    /// What is added to `t` to give the position of a query row.
    pub fn offset(&self) -> i64 {
        self.offset
    }

    /// `pos = t + offset`: where query row `t` stands among the keys. Saturates.
    pub fn position(&self, t: usize) -> i64 {
        self.offset.saturating_add(i64::try_from(t).unwrap_or(i64::MAX))
    }

    /// What row `t` sees of keys without end and beginning: the keys from `t + low` to before `t + high`,
    /// where `None` is no bound.
    pub fn reach(&self) -> (Option<i128>, Option<i128>) {
        // In 128 bits no offset, row or window overflows.
        let offset = i128::from(self.offset);
        let low = self.window.left.map(|left| offset - left as i128);
        let right = self.window.right.map(|right| offset + right as i128 + 1);
        let high = match right {
            Some(right) if self.causal => Some(right.min(offset + 1)),
            None if self.causal => Some(offset + 1),
            right => right,
        };
        (low, high)
    }

    /// The keys that query row `t` may attend to by lengths, causal masking and window; masks and -inf biases
    /// may take more away. Empty for a padded query row.
    #[inline]
    pub fn key_range(&self, t: usize) -> Range<usize> {
        if t >= self.queries { 0..0 } else { self.window_around(t) }
    }

    /// The smallest range that holds [`key_range`](Self::key_range) of every row of `rows`: what a backend
    /// has to look at for a block of rows. Empty if every row's range is.
    pub fn key_range_of_rows(&self, rows: Range<usize>) -> Range<usize> {
        // Padded rows come last and see nothing.
        let rows = rows.start..rows.end.min(self.queries);
        if rows.is_empty() {
            return 0..0;
        }
        // Both ends grow by at most one from row to row, so the union has no gaps.
        self.window_around(rows.start).start..self.window_around(rows.end - 1).end
    }

    /// The keys in reach of row `t`. The start is never behind the end: a window holds at least `pos` itself,
    /// and both ends are brought into the range of the keys.
    fn window_around(&self, t: usize) -> Range<usize> {
        let (low, high) = self.reach();
        let keys = self.keys as i128;
        let start = low.map_or(0, |low| (t as i128 + low).clamp(0, keys));
        let end = high.map_or(keys, |high| (t as i128 + high).clamp(0, keys));
        start as usize..end as usize
    }
}

/// Where the rows of one sequence are in a tensor of tokens, whose first two axes are `[B, length]`,
/// `[1, total]` or `[pages, page size]`: algorithms count rows inside the sequence, and ask here for the two
/// indices, whatever the layout is.
#[derive(Clone, Copy, Debug)]
pub struct RowPlaces<'c>(Places<'c>);

#[derive(Clone, Copy, Debug)]
enum Places<'c> {
    /// Row `r` is at `[outer, first + r]`.
    Contiguous { outer: usize, first: usize, rows: usize },
    /// Row `r` is at `[pages[r / page_size], r % page_size]`.
    Paged { pages: Integers<'c>, page_size: usize, rows: usize },
}

/// Rows of a sequence that are neighbours in the second axis of their tensor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stretch {
    /// Which rows, counted inside the sequence.
    pub rows: Range<usize>,
    /// The first two indices of the first of them; the others follow along the second axis.
    pub first: [usize; 2],
}

impl<'c> RowPlaces<'c> {
    pub(crate) fn contiguous(outer: usize, rows: Range<usize>) -> Self {
        Self(Places::Contiguous { outer, first: rows.start, rows: rows.len() })
    }

    /// Of entries that are pages, as far as `rows` needs them.
    pub(crate) fn paged(pages: Integers<'c>, page_size: usize, rows: usize) -> Self {
        Self(Places::Paged { pages, page_size, rows })
    }

    /// How many rows the tensor has for this sequence, padding included.
    #[inline]
    pub fn rows(&self) -> usize {
        match self.0 {
            Places::Contiguous { rows, .. } | Places::Paged { rows, .. } => rows,
        }
    }

    /// The first two indices of row `row`.
    ///
    /// # Panics
    /// Where the tensor has no such row for this sequence.
    #[inline]
    pub fn of(&self, row: usize) -> [usize; 2] {
        assert!(row < self.rows(), "row {row} of a sequence of {}", self.rows());
        match self.0 {
            Places::Contiguous { outer, first, .. } => [outer, first + row],
            Places::Paged { pages, page_size, .. } => [pages.at(row / page_size) as usize, row % page_size],
        }
    }

    /// All rows as one stretch, which may be empty; `None` where they are in several pages, or in none.
    pub fn neighbours(&self) -> Option<Stretch> {
        match self.0 {
            Places::Contiguous { outer, first, rows } => {
                Some(Stretch { rows: 0..rows, first: [outer, first] })
            }
            Places::Paged { page_size, rows, .. } => {
                (1..=page_size).contains(&rows).then(|| Stretch { rows: 0..rows, first: self.of(0) })
            }
        }
    }

    /// How many rows are neighbours at most: those of a page, or `None` where all are.
    #[inline]
    pub fn page_size(&self) -> Option<usize> {
        match self.0 {
            Places::Contiguous { .. } => None,
            Places::Paged { page_size, .. } => Some(page_size),
        }
    }

    /// `rows` cut where neighbours are not neighbours in the tensor: in one piece, or in a piece for each
    /// page.
    ///
    /// # Panics
    /// As [`of`](Self::of).
    #[inline]
    pub fn stretches(&self, rows: Range<usize>) -> Stretches<'c> {
        assert!(rows.end <= self.rows(), "rows {rows:?} of a sequence of {}", self.rows());
        let index = match self.0 {
            Places::Contiguous { .. } => 0,
            Places::Paged { page_size, .. } => rows.start / page_size,
        };
        Stretches { places: self.0, rows, index }
    }
}

/// The [stretches](RowPlaces::stretches) of some rows, in order.
#[derive(Clone, Debug)]
pub struct Stretches<'c> {
    places: Places<'c>,
    /// Those that are left.
    rows: Range<usize>,
    /// Which entry of the table the next page is, so that no page takes a division.
    index: usize,
}

impl Iterator for Stretches<'_> {
    type Item = Stretch;

    #[inline]
    fn next(&mut self) -> Option<Stretch> {
        if self.rows.is_empty() {
            return None;
        }
        let start = self.rows.start;
        let (end, first) = match self.places {
            Places::Contiguous { outer, first, .. } => (self.rows.end, [outer, first + start]),
            Places::Paged { pages, page_size, .. } => {
                let of_page = self.index * page_size;
                let place = [pages.at(self.index) as usize, start - of_page];
                // Of the last page, rows behind the sequence may be more than can be counted.
                (of_page.saturating_add(page_size).min(self.rows.end), place)
            }
        };
        self.index += 1;
        self.rows.start = end;
        Some(Stretch { rows: start..end, first })
    }
}

#[cfg(test)]
mod tests;
