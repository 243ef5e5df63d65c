//! The scratch of the backward pass.

use attention_core::{Gradients, Problem, Role};
use bytemuck::Pod;

use super::bias_parts;
use crate::cut;
use crate::direct;
use crate::operand::Operand;
use crate::packed::panel_elements;
use crate::scratch::{Carver, piece_bytes};

/// Elements of each piece of a worker's scratch.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Pieces {
    key_panels: usize,
    value_panels: usize,
    keys: usize,
    row: usize,
    dk: usize,
    dv: usize,
    block: BlockPieces,
}

/// Elements of what a block of rows works in.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct BlockPieces {
    query: usize,
    d_out: usize,
    probabilities: usize,
    d_logits: usize,
    capped: usize,
    dq: usize,
}

impl BlockPieces {
    /// For blocks of `rows` rows over `keys` keys; `None` on overflow.
    fn of(problem: &Problem, rows: usize, keys: usize) -> Option<Self> {
        let dims = problem.dims();
        let logits = rows.checked_mul(cut::logits_stride(keys)?)?;
        Some(Self {
            query: rows.checked_mul(dims.head_dim)?,
            d_out: rows.checked_mul(dims.value_head_dim)?,
            probabilities: logits,
            d_logits: logits,
            capped: if problem.softcap().is_some() { logits } else { 0 },
            dq: rows.checked_mul(dims.head_dim)?,
        })
    }

    fn max(self, other: Self) -> Self {
        Self {
            query: self.query.max(other.query),
            d_out: self.d_out.max(other.d_out),
            probabilities: self.probabilities.max(other.probabilities),
            d_logits: self.d_logits.max(other.d_logits),
            capped: self.capped.max(other.capped),
            dq: self.dq.max(other.dq),
        }
    }

    fn counts(&self) -> [usize; 6] {
        [self.query, self.d_out, self.probabilities, self.d_logits, self.capped, self.dq]
    }
}

/// Matrices of a block's logits that are in use at a time.
pub(crate) const MATRICES: usize = 2;

impl Pieces {
    /// Makes room for the tasks of a batch row; `None` on overflow.
    fn make_room(&mut self, problem: &Problem, batch: usize) -> Option<()> {
        let dims = problem.dims();
        let wants = |gradient| problem.gradients().contains(gradient);
        let queries = problem.query_len(batch);
        let keys = problem.key_range_of_rows(batch, 0..queries).len();
        let few = cut::few_rows(dims.group_size().checked_mul(queries)?);
        if few {
            let rows = dims.group_size() * queries;
            self.block = self.block.max(BlockPieces::of(problem, rows, keys)?);
        }
        // The gradient of the bias is computed from packed keys and values, however few rows there are.
        if few && !problem.has(Role::DBias) {
            return Some(());
        }
        self.key_panels = self.key_panels.max(panel_elements(keys, dims.head_dim)?);
        self.value_panels = self.value_panels.max(panel_elements(keys, dims.value_head_dim)?);
        if wants(Gradients::QUERY) {
            self.keys = self.keys.max(keys.checked_mul(dims.head_dim)?);
        }
        if wants(Gradients::KEY) {
            self.dk = self.dk.max(keys.checked_mul(dims.head_dim)?);
        }
        if wants(Gradients::VALUE) {
            self.dv = self.dv.max(keys.checked_mul(dims.value_head_dim)?);
        }
        let rows = queries.min(cut::block_rows(keys, MATRICES));
        self.block = self.block.max(BlockPieces::of(problem, rows, keys)?);
        Some(())
    }

    fn bytes<C>(&self) -> Option<usize> {
        let own = [self.key_panels, self.value_panels, self.keys, self.row, self.dk, self.dv];
        (own.into_iter().chain(self.block.counts()))
            .try_fold(0usize, |bytes, count| bytes.checked_add(piece_bytes::<C>(count)?))
    }
}

/// What a problem takes, read off its batch rows once.
#[derive(Debug)]
pub(crate) struct Sizes {
    /// Large enough for every batch row that is not small.
    pub(crate) pieces: Pieces,
    /// Large enough for every small batch row.
    pub(crate) small_pieces: Pieces,
    /// Bytes of scratch that a task over a part of one batch row works in.
    pub(crate) bytes_per_task: usize,
    /// Bytes of scratch a worker needs: with the sums of a part of the gradient of the bias.
    pub(crate) bytes_per_worker: usize,
    /// How many threads have something to do.
    pub(crate) workers: usize,
}

impl Sizes {
    /// With tasks counted up to `threads`; `None` on overflow.
    pub(crate) fn of<E: Operand>(problem: &Problem, threads: usize) -> Option<Self> {
        let dims = problem.dims();
        let row = dims.head_dim.max(dims.value_head_dim).checked_mul(direct::KEYS)?;
        let empty = Pieces { row, ..Pieces::default() };
        let (mut pieces, mut small_pieces) = (empty, empty);
        for batch in cut::sized_rows(problem) {
            let small = cut::is_small::<E>(problem, batch);
            if small { &mut small_pieces } else { &mut pieces }.make_room(problem, batch)?;
        }
        let bytes = pieces.bytes::<E::Compute>()?;
        let small_bytes = small_pieces.bytes::<<E::Small as Operand>::Compute>()?;
        let bytes_per_task = bytes.max(small_bytes);
        let bytes_per_worker = bytes_per_task.checked_add(bias_parts::sums_bytes(problem)?)?;
        let tasks = dims.batch.saturating_mul(dims.key_heads).max(bias_parts::task_count(problem));
        Some(Self { pieces, small_pieces, bytes_per_task, bytes_per_worker, workers: tasks.min(threads) })
    }
}

/// A worker's scratch.
pub(crate) struct Scratch<'a, C> {
    pub(crate) key_panels: &'a mut [C],
    pub(crate) value_panels: &'a mut [C],
    pub(super) keys: &'a mut [C],
    pub(crate) row: &'a mut [C],
    pub(super) dk: &'a mut [C],
    pub(super) dv: &'a mut [C],
    pub(crate) block: BlockScratch<'a, C>,
}

/// What a block of rows works in.
pub(crate) struct BlockScratch<'a, C> {
    pub(super) query: &'a mut [C],
    pub(super) d_out: &'a mut [C],
    pub(crate) probabilities: &'a mut [C],
    pub(crate) d_logits: &'a mut [C],
    pub(super) capped: &'a mut [C],
    pub(super) dq: &'a mut [C],
}

impl<'a, C: Pod> Scratch<'a, C> {
    pub(crate) fn carve(pieces: &Pieces, bytes: &'a mut [u8]) -> Self {
        let mut carver = Carver::new(bytes);
        Self {
            key_panels: carver.take(pieces.key_panels),
            value_panels: carver.take(pieces.value_panels),
            keys: carver.take(pieces.keys),
            row: carver.take(pieces.row),
            dk: carver.take(pieces.dk),
            dv: carver.take(pieces.dv),
            block: BlockScratch {
                query: carver.take(pieces.block.query),
                d_out: carver.take(pieces.block.d_out),
                probabilities: carver.take(pieces.block.probabilities),
                d_logits: carver.take(pieces.block.d_logits),
                capped: carver.take(pieces.block.capped),
                dq: carver.take(pieces.block.dq),
            },
        }
    }
}
