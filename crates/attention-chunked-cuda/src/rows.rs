//! How many rows the queries, or the keys, of all sequences have, and into how many tiles they are cut.

use attention_core::{Problem, Role, RowLayout};

/// The query rows, or the keys, of a problem's sequences.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Rows {
    /// Sequences.
    batch: usize,
    /// Rows that a sequence has at most.
    most: usize,
    /// Rows of a head over all sequences, where they are packed.
    pub(crate) packed: Option<usize>,
}

impl Rows {
    pub(crate) fn of_queries(problem: &Problem) -> Self {
        Self::of(problem, Role::Query, problem.query_layout(), problem.dims().query_length)
    }

    /// Those in pages as if they were dense: a sequence has as many at most.
    pub(crate) fn of_keys(problem: &Problem) -> Self {
        Self::of(problem, Role::Key, problem.key_layout(), problem.dims().key_length)
    }

    fn of(problem: &Problem, role: Role, layout: RowLayout, most: usize) -> Self {
        let rows = || problem.tensor(role).map_or(0, |desc| desc.shape()[1]);
        let packed = (layout == RowLayout::Packed).then(rows);
        Self { batch: problem.dims().batch, most, packed }
    }

    /// Rows of a head over all sequences.
    pub(crate) fn count(self) -> usize {
        self.packed.unwrap_or(self.batch.saturating_mul(self.most))
    }

    /// Rows of a sequence, as far as plans can know: those of packed sequences may differ, and their mean
    /// stands for them.
    pub(crate) fn typical(self) -> usize {
        let mean = |rows: usize| rows.div_ceil(self.batch.max(1));
        self.packed.map_or(self.most, |rows| mean(rows).min(self.most))
    }

    /// Rows of the longest sequence there can be where every other one has at least one.
    pub(crate) fn longest(self) -> usize {
        let others = self.batch.saturating_sub(1);
        self.packed.map_or(self.most, |rows| rows.saturating_sub(others).max(rows.min(1)).min(self.most))
    }

    /// Rows of the longest sequence there can be, where others may be empty.
    pub(crate) fn most_of_one(self) -> usize {
        self.packed.map_or(self.most, |rows| rows.min(self.most))
    }

    /// Tiles of this many rows, over all sequences, where `shared` heads share a tile: the blocks of a head,
    /// or of such heads, that a grid has. A grid of packed rows has slots for all tiles that there may be,
    /// `count_of_slots` in `fused/sequence.cuh`.
    pub(crate) fn tiles(self, height: usize, shared: usize) -> usize {
        match self.packed {
            None => self.most.saturating_mul(shared).div_ceil(height).saturating_mul(self.batch),
            Some(0) => 0,
            Some(rows) => (rows.saturating_mul(shared) / height).saturating_add(self.batch).saturating_add(1),
        }
    }

    /// The same without the slots that no tile will have, as far as plans can know.
    pub(crate) fn typical_tiles(self, height: usize, shared: usize) -> usize {
        match self.packed {
            None => self.tiles(height, shared),
            Some(rows) => {
                let sequences = self.batch.clamp(rows.min(1), rows.max(1));
                (rows.saturating_mul(shared) / sequences.max(1)).div_ceil(height).saturating_mul(sequences)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::Rows;

    /// `tile_of_packed` of `fused/sequence.cuh`: the sequence of a slot, and which of its tiles.
    fn tile_of_slot(starts: &[usize], slot: usize, height: usize, shared: usize) -> (usize, usize) {
        let first = |batch: usize| starts[batch] * shared / height + batch;
        let (mut low, mut high) = (0, starts.len() - 1);
        while low < high {
            let middle = low + (high - low).div_ceil(2);
            if first(middle) <= slot { low = middle } else { high = middle - 1 }
        }
        (low, slot - first(low))
    }

    /// `write_schedule` of `fused/schedule.cu` for one chunk of sequences whose rows are these: the sequence
    /// and the tile of each entry of a head.
    fn schedule(lengths: &[usize], height: usize, shared: usize) -> Vec<(usize, usize)> {
        let mut order: Vec<usize> = (0..lengths.len()).collect();
        order.sort_by_key(|&batch| std::cmp::Reverse(lengths[batch]));
        let tiles = |batch: usize| (lengths[batch] * shared).div_ceil(height);
        order.into_iter().flat_map(|batch| (0..tiles(batch)).rev().map(move |tile| (batch, tile))).collect()
    }

    /// Every tile of every sequence, and of the rows behind the last one, is that of one slot.
    #[test]
    fn slots_have_all_tiles_of_packed_rows() {
        let lengths: [&[usize]; 8] =
            [&[], &[0], &[1], &[64, 0, 0, 1], &[63, 65, 64, 129], &[1; 40], &[0, 0, 500, 0], &[7, 300, 2]];
        for lengths in lengths {
            let mut starts = vec![0];
            lengths.iter().for_each(|length| starts.push(starts[starts.len() - 1] + length));
            for (spare, height, shared) in
                [0, 1, 130].into_iter().flat_map(|spare| [(spare, 16, 1), (spare, 64, 8), (spare, 192, 3)])
            {
                let total = starts[starts.len() - 1] + spare;
                let rows = Rows { batch: lengths.len(), most: total, packed: Some(total) };
                let slots = rows.tiles(height, shared);
                assert_eq!(slots == 0, total == 0);
                let mut seen: Vec<_> =
                    (0..slots).map(|slot| tile_of_slot(&starts, slot, height, shared)).collect();
                let count = seen.len();
                seen.sort_unstable();
                seen.dedup();
                assert_eq!(seen.len(), count, "a tile in two slots");
                for (batch, &length) in lengths.iter().chain([&spare]).enumerate() {
                    for tile in 0..(length * shared).div_ceil(height) {
                        assert!(seen.contains(&(batch, tile)), "{lengths:?}, {spare}: {batch}, {tile}");
                    }
                }
                assert!(rows.typical_tiles(height, shared) <= slots);
                // A schedule has no more tiles, so every one of them has an entry.
                let mut scheduled = schedule(&[lengths, &[spare]].concat(), height, shared);
                assert!(scheduled.len() <= slots, "{lengths:?}, {spare}");
                scheduled.sort_unstable();
                assert!(scheduled.iter().all(|tile| seen.binary_search(tile).is_ok()));
            }
        }
    }
}
