//! Where the keys of a block are: runs of keys at equal distances, so that kernels read keys and values as
//! they lie, whatever the layout is.

use std::ops::Range;

use attention_core::{HeadView, Row, RowPlaces, RowStretch};
use bytemuck::{Pod, Zeroable};

use super::row::AHEAD;
use crate::simd::CacheLevel;

/// Keys that are neighbours along the second axis of their tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub(super) struct Run {
    /// The first two indices of the first key.
    first: [usize; 2],
    /// Those of the key that is prefetched while the first is read. The keys behind both are as far apart.
    ahead: [usize; 2],
    keys: usize,
}

/// The keys of a block: one run, or some for each page.
#[derive(Clone, Copy, Debug)]
pub(super) struct KeyRuns<'r> {
    runs: &'r [Run],
    keys: usize,
    prefetched_into: CacheLevel,
}

impl Run {
    /// Of keys of a contiguous sequence, each of which prefetches the one `ahead` keys behind it.
    pub(super) fn contiguous(places: &RowPlaces<'_>, keys: &Range<usize>, ahead: usize) -> Self {
        let [outer, inner] = places.of(keys.start);
        Self { first: [outer, inner], ahead: [outer, inner + ahead], keys: keys.len() }
    }

    /// Of rows of [`HostView::of_rows`](attention_core::HostView::of_rows), which are in the cache: none is
    /// prefetched.
    pub(super) fn of_rows(keys: usize) -> Self {
        Self { first: [0, 0], ahead: [0, 0], keys }
    }

    /// How many keys there are.
    #[inline(always)]
    pub(super) fn len(&self) -> usize {
        self.keys
    }

    /// The keys of a head, or their values.
    #[inline(always)]
    pub(super) fn rows<'v, T: Copy>(&self, head: HeadView<'v, T>) -> RowStretch<'v, T> {
        head.stretch(self.first, self.keys)
    }

    /// How many elements behind a row the one is that is prefetched with it.
    #[inline(always)]
    pub(super) fn ahead<T: Copy>(&self, head: HeadView<'_, T>) -> isize {
        let strides = head.strides();
        let along = |axis: usize| {
            (self.ahead[axis] as isize).wrapping_sub(self.first[axis] as isize).wrapping_mul(strides[axis])
        };
        along(0).wrapping_add(along(1))
    }
}

impl<'r> KeyRuns<'r> {
    /// Of keys that are one run.
    pub(super) fn one(run: &'r Run) -> Self {
        let runs = std::slice::from_ref(run);
        Self { runs, keys: run.keys, prefetched_into: CacheLevel::First }
    }

    /// Of keys in pages. `room` has a place for each key and for [`AHEAD`] more, which are prefetched.
    pub(super) fn paged(
        places: &RowPlaces<'_>,
        page_size: usize,
        keys: &Range<usize>,
        room: &'r mut [Run],
    ) -> Self {
        // Runs of at most AHEAD keys, so that each prefetches the keys of another one: pages are cut into
        // pieces of one size, and small ones look as many pages ahead.
        let piece = page_size.div_ceil(page_size.div_ceil(AHEAD));
        let (mut count, mut inside) = (0, 0);
        // How far into a piece the first key is.
        let mut into = keys.start % page_size % piece;
        for stretch in places.stretches(keys.start..places.rows().min(keys.end + AHEAD)) {
            let [outer, mut inner] = stretch.first;
            let mut rows = stretch.rows;
            while !rows.is_empty() {
                let mut end = rows.end.min(rows.start + (piece - into));
                if rows.start < keys.end {
                    end = end.min(keys.end);
                    inside = count + 1;
                }
                let first = [outer, inner];
                room[count] = Run { first, ahead: first, keys: end - rows.start };
                count += 1;
                inner += end - rows.start;
                rows.start = end;
                into = 0;
            }
        }
        let pieces_ahead = AHEAD / piece;
        for run in 0..inside {
            room[run].ahead = room[(run + pieces_ahead).min(count - 1)].first;
        }
        Self { runs: &room[..inside], keys: keys.len(), prefetched_into: CacheLevel::Second }
    }

    /// How many keys there are.
    pub(super) fn len(&self) -> usize {
        self.keys
    }

    /// The cache that rows are prefetched into. For pages, whose rows have no pattern, the second-level one:
    /// with the first-level one, decoding from pages of one key took 1.5 (f32) and 1.2 to 1.4 times (bf16) as
    /// long on an AMD EPYC.
    #[inline(always)]
    pub(super) fn prefetched_into(&self) -> CacheLevel {
        self.prefetched_into
    }

    /// The runs, in the order of the keys.
    #[inline(always)]
    pub(super) fn runs(&self) -> &'r [Run] {
        self.runs
    }

    /// The rows of all keys of a head, or of their values. For where time does not matter.
    pub(super) fn rows<'v, T: Copy>(
        &self,
        head: HeadView<'v, T>,
    ) -> impl Iterator<Item = Row<'v, T>> + use<'r, 'v, T> {
        self.rows_ahead(head).map(|(row, _)| row)
    }

    /// The same, each with [`Run::ahead`].
    pub(super) fn rows_ahead<'v, T: Copy>(
        &self,
        head: HeadView<'v, T>,
    ) -> impl Iterator<Item = (Row<'v, T>, isize)> + use<'r, 'v, T> {
        let runs = self.runs;
        runs.iter().flat_map(move |run| {
            let (rows, ahead) = (run.rows(head), run.ahead(head));
            (0..run.keys).map(move |index| (rows.row(index), ahead))
        })
    }
}
