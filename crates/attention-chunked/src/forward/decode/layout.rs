//! The sizes of decoding: of the splits of keys, and of what its tasks work in and leave.

use std::ops::Range;

use attention_core::{Problem, Role, RowLayout};

use super::row::AHEAD;
use super::runs::Run;
use crate::cut::Rows;
use crate::engine::STAGE;
use crate::float::Float;
use crate::scratch::Pieces;
use crate::tensor::{Floats, Operands};

/// The most query rows per key/value head: more have products enough to pay for packing keys and values.
pub(in crate::forward) const MAX_ROWS: usize = 8;

/// Keys whose logits are held at a time.
pub(super) const BLOCK_KEYS: usize = 256;

/// Keys or values of 8 bits that are widened at a time: 8 KiB of a head dimension of 128, which stays in the
/// first-level cache.
pub(super) const TILE_KEYS: usize = STAGE;

/// The distance between rows of logits.
pub(super) const STRIDE: usize = BLOCK_KEYS + 16;

/// The fewest keys of a split, and the most splits.
const SPLIT_KEYS: usize = 1024;
const MAX_SPLITS: usize = 64;

/// Bytes that neighbouring heads of one key have in a page of memory: heads that share pages are worked on
/// together, since finding a page takes longer than reading a row of it.
const PAGE: usize = 4096;

/// The most heads that are worked on together.
pub(in crate::forward) const MAX_HEADS: usize = 8;

/// The sizes of a decoding task.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::forward) struct DecodeLayout {
    /// Key/value heads that are worked on together.
    pub(in crate::forward) heads: usize,
    /// Rows of each.
    rows: usize,
    pub(super) head_dim: usize,
    value_head_dim: usize,
    /// Runs that the keys of a block may have; 0 where they are always one.
    runs: usize,
    /// Elements of the widest row of widened keys or values; 0 where they are not of 8 bits.
    widened: usize,
}

impl DecodeLayout {
    /// For at most `queries` query rows a head in each of `decoded` batch rows: as many heads at a time as
    /// leave every thread some tasks. Fewer query rows and batch rows take no more scratch; bits do not
    /// depend on it.
    pub(in crate::forward) fn of(problem: &Problem, queries: usize, decoded: usize, threads: usize) -> Self {
        let dims = problem.dims();
        let enough = decoded.saturating_mul(tasks(problem)) / threads.saturating_mul(4).max(1);
        let cached = problem.dtype_of(Role::Key).unwrap_or(problem.dtype());
        let row_bytes = cached.size() * dims.head_dim.min(dims.value_head_dim).max(1);
        let widened = if cached.is_eight_bit() { dims.head_dim.max(dims.value_head_dim) } else { 0 };
        let heads = (PAGE / row_bytes).min(enough).clamp(1, MAX_HEADS);
        let rows = queries * dims.group_size();
        let runs =
            if matches!(problem.key_layout(), RowLayout::Paged { .. }) { BLOCK_KEYS + AHEAD } else { 0 };
        Self { heads, rows, head_dim: dims.head_dim, value_head_dim: dims.value_head_dim, runs, widened }
    }

    /// The most batch rows for which there are `heads` heads at a time or fewer, where more are possible.
    pub(in crate::forward) fn most_decoded(problem: &Problem, heads: usize, threads: usize) -> usize {
        let more = threads.saturating_mul(4).max(1).saturating_mul(heads + 1);
        (more - 1) / tasks(problem).max(1)
    }

    pub(super) fn scratch<'a, F: Operands>(&self, pieces: &mut Pieces<'a>) -> Scratch<'a, F> {
        Scratch {
            stage: pieces.take((self.heads * MAX_ROWS).saturating_mul(Floats::stage_stride(self.head_dim))),
            tile: pieces.take(MAX_ROWS * STRIDE),
            factors: pieces.take(MAX_ROWS),
            runs: pieces.take(self.runs),
            widened: pieces.take(self.widened.saturating_mul(TILE_KEYS)),
            split: self.partial(pieces),
            running: self.partial(pieces),
        }
    }

    pub(super) fn partial<'a, F: Float>(&self, pieces: &mut Pieces<'a>) -> Partial<'a, F> {
        let rows = self.heads * self.rows;
        Partial {
            width: self.value_head_dim,
            shifts: pieces.take(rows),
            sums: pieces.take(rows),
            values: pieces.take(rows.saturating_mul(self.value_head_dim)),
        }
    }

    /// Bytes of a task's scratch; `None` on overflow.
    pub(in crate::forward) fn bytes<F: Operands>(&self) -> Option<usize> {
        let mut pieces = Pieces::counting();
        let _ = self.scratch::<F>(&mut pieces);
        pieces.bytes()
    }

    /// Bytes of a partial result that is kept; `None` on overflow.
    pub(in crate::forward) fn partial_bytes<F: Float>(&self) -> Option<usize> {
        let mut pieces = Pieces::counting();
        let _ = self.partial::<F>(&mut pieces);
        pieces.bytes()
    }

    /// The rows of head `head` of a task among those of a partial result.
    pub(super) fn rows_of(&self, head: usize, rows: &Rows) -> Range<usize> {
        head * self.rows..head * self.rows + rows.len()
    }
}

/// What a decoding task works in.
pub(super) struct Scratch<'a, F: Operands> {
    pub(super) stage: &'a mut [F],
    pub(super) tile: &'a mut [F],
    pub(super) factors: &'a mut [F],
    pub(super) runs: &'a mut [Run],
    /// [`TILE_KEYS`] rows of keys or values of 8 bits.
    pub(super) widened: &'a mut [F::Tile],
    pub(super) split: Partial<'a, F>,
    /// The splits so far.
    pub(super) running: Partial<'a, F>,
}

/// The result of some keys for each row of some heads.
pub(super) struct Partial<'a, F> {
    pub(super) width: usize,
    /// In units of the call.
    pub(super) shifts: &'a mut [F],
    pub(super) sums: &'a mut [F],
    /// Unnormalised, rows of the value head dimension.
    pub(super) values: &'a mut [F],
}

impl<F: Float> Partial<'_, F> {
    pub(super) fn clear(&mut self) {
        self.shifts.fill(F::NEG_INFINITY);
        self.sums.fill(F::ZERO);
        self.values.fill(F::ZERO);
    }

    /// Adds the result of further keys to some rows; `unit` is the size of their shifts' unit.
    pub(super) fn merge(&mut self, rows: Range<usize>, split: &Partial<'_, F>, unit: F) {
        let width = self.width;
        for row in rows {
            let shifts = [self.shifts[row], split.shifts[row]];
            // A NaN on either side becomes the shift and stays it.
            let shift = if shifts[1] > shifts[0] || shifts[1].is_nan() { shifts[1] } else { shifts[0] };
            let [old, new] =
                shifts.map(
                    |before| {
                        if before == F::NEG_INFINITY { F::ZERO } else { ((before - shift) * unit).exp() }
                    },
                );
            self.shifts[row] = shift;
            self.sums[row] = self.sums[row] * old + split.sums[row] * new;
            let values = &mut self.values[row * width..][..width];
            for (value, &from) in values.iter_mut().zip(&split.values[row * width..]) {
                *value = *value * old + from * new;
            }
        }
    }
}

/// Tasks of a batch row that is decoded a head and a split at a time.
fn tasks(problem: &Problem) -> usize {
    let dims = problem.dims();
    dims.key_heads.saturating_mul(splits(&(0..dims.key_length)).len().max(1))
}

/// The splits that the keys of some rows are cut into.
pub(in crate::forward) fn splits(keys: &Range<usize>) -> impl ExactSizeIterator<Item = Range<usize>> + use<> {
    let size = SPLIT_KEYS.max(keys.len().div_ceil(MAX_SPLITS).next_multiple_of(BLOCK_KEYS));
    let keys = keys.clone();
    (0..keys.len().div_ceil(size)).map(move |split| {
        let start = keys.start + split * size;
        start..keys.end.min(start + size)
    })
}

/// The most splits that at most `keys` keys are cut into.
pub(in crate::forward) fn most_splits(keys: usize) -> usize {
    keys.div_ceil(SPLIT_KEYS).min(MAX_SPLITS)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Fewer keys may be cut into more splits: 65536 into 64, one more into 52.
    #[test]
    fn there_are_no_more_splits_than_the_most() {
        let mut most = 0;
        for keys in (0..1 << 18).step_by(61).chain([65536, 65537]) {
            most = most.max(splits(&(7..7 + keys)).len());
            assert!(splits(&(7..7 + keys)).len() <= most_splits(keys), "{keys}");
        }
        assert_eq!((most, splits(&(0..65537)).len(), most_splits(65537)), (64, 52, 64));
    }
}
