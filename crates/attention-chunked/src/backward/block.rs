//! Query rows of a key/value head, and the blocks that they meet its keys in.

use std::ops::Range;

use super::call::Backward;
use super::gradient::RowState;
use crate::cut::{self, Rows};
use crate::engine::{Engine, MAX_BLOCK_ROWS};
use crate::logits::QueryRow;

/// Some query rows of a key/value head against its keys.
pub(super) struct Pair<'s, 'a, E: Engine> {
    pub(super) backward: &'s Backward<'a, E>,
    pub(super) rows: &'s Rows,
    /// Which gradients are summed up.
    pub(super) dq: bool,
    pub(super) dkv: bool,
}

/// A block of query rows, with the keys that any and all of them can see.
pub(super) struct Block<F> {
    pub(super) infos: [QueryRow; MAX_BLOCK_ROWS],
    pub(super) states: [RowState<F>; MAX_BLOCK_ROWS],
    /// Its rows among those of the chunk.
    pub(super) rows: Range<usize>,
    pub(super) any: Range<usize>,
    pub(super) all: Range<usize>,
}

impl<F> Block<F> {
    pub(super) fn infos(&self) -> &[QueryRow] {
        &self.infos[..self.rows.len()]
    }
}

impl<E: Engine> Pair<'_, '_, E> {
    /// The rows `rows` of the chunk that begins at `chunk`.
    pub(super) fn block(&self, chunk: usize, rows: Range<usize>) -> Block<E::F> {
        let mut block = self.block_without_states(chunk, rows);
        let (first, count) = (chunk + block.rows.start, block.rows.len());
        let index = self.rows.query_index(self.backward.problem);
        for (row, state) in block.states[..count].iter_mut().enumerate() {
            *state = self.backward.state(index(first + row));
        }
        block
    }

    /// The same, with the states of rows that attend to nothing.
    pub(super) fn block_without_states(&self, chunk: usize, rows: Range<usize>) -> Block<E::F> {
        let empty = QueryRow { batch: 0, head: 0, query: 0, begin: 0, end: 0 };
        let mut block = Block {
            infos: [empty; MAX_BLOCK_ROWS],
            states: [RowState::EMPTY; MAX_BLOCK_ROWS],
            rows: rows.clone(),
            any: 0..0,
            all: 0..usize::MAX,
        };
        let (mut begin, mut end) = (usize::MAX, 0);
        let sequence = self.backward.problem.sequence(self.rows.batch);
        for (index, row) in rows.enumerate() {
            let info = self.rows.row(&sequence, chunk + row);
            block.infos[index] = info;
            block.all = block.all.start.max(info.begin)..block.all.end.min(info.end);
            if info.begin < info.end {
                (begin, end) = (begin.min(info.begin), end.max(info.end));
            }
        }
        block.any = begin.min(end)..end;
        block
    }

    /// The blocks of keys of a packed chunk that a block of rows meets.
    pub(super) fn key_blocks(
        block: &Block<E::F>,
        keys: &Range<usize>,
    ) -> impl Iterator<Item = Range<usize>> + use<E> {
        let seen = cut::intersection(&block.any, keys);
        // An empty range may lie anywhere.
        let first = if seen.is_empty() { seen.end } else { seen.start / E::BLOCK_KEYS * E::BLOCK_KEYS };
        (first..seen.end).step_by(E::BLOCK_KEYS).map(move |start| {
            start.max(seen.start / E::KEY_STEP * E::KEY_STEP)..seen.end.min(start + E::BLOCK_KEYS)
        })
    }
}
