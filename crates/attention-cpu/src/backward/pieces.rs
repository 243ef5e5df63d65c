//! The scratch of the backward pass.

use attention_core::{Gradients, Problem, Role};
use bytemuck::Pod;

use super::bias_parts;
use crate::cut::{self, SizedRows};
use crate::direct;
use crate::operand::{Operand, Read};
use crate::packed::panel_elements;
use crate::scratch::{Carver, piece_bytes};
use crate::sequences::{most_with_rows, queries_vary};

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
        Self::with_logits(problem, rows, rows.checked_mul(cut::logits_stride(keys)?)?)
    }

    /// For blocks of up to `rows` rows, whose logits take so many elements.
    fn with_logits(problem: &Problem, rows: usize, logits: usize) -> Option<Self> {
        let dims = problem.dims();
        Some(Self {
            query: rows.checked_mul(dims.head_dim)?,
            d_out: rows.checked_mul(dims.value_head_dim)?,
            probabilities: logits,
            d_logits: logits,
            capped: if problem.has_softcap() { logits } else { 0 },
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
    /// Makes room for the tasks of some batch rows; `None` on overflow.
    fn make_room(&mut self, problem: &Problem, sized: SizedRows) -> Option<()> {
        let dims = problem.dims();
        let wants = |gradient| problem.gradients().contains(gradient);
        let queries = sized.queries;
        let keys = sized.keys_of(problem, queries);
        let rows = dims.group_size().checked_mul(queries)?;
        let few = cut::few_rows(rows);
        if few {
            self.block = self.block.max(BlockPieces::of(problem, rows, keys)?);
        } else if queries_vary(problem) {
            // Batch rows of fewer queries are unpacked, all heads of a group at a time.
            self.block = self.block.max(BlockPieces::of(problem, cut::FEW_ROWS, keys)?);
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
        let block = if problem.rows_vary() {
            // Over fewer keys, blocks have more rows.
            let logits = cut::block_elements(queries, keys, MATRICES)?;
            BlockPieces::with_logits(problem, queries.min(cut::block_rows(0, MATRICES)), logits)?
        } else {
            BlockPieces::of(problem, queries.min(cut::block_rows(keys, MATRICES)), keys)?
        };
        self.block = self.block.max(block);
        Some(())
    }

    fn bytes<C>(&self) -> Option<usize> {
        let own = [self.key_panels, self.value_panels, self.keys, self.row, self.dk, self.dv];
        (own.into_iter().chain(self.block.counts()))
            .try_fold(0usize, |bytes, count| bytes.checked_add(piece_bytes::<C>(count)?))
    }
}

/// What every call of a problem takes.
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
    /// The most threads that have something to do.
    pub(crate) workers: usize,
}

impl Sizes {
    /// With tasks counted up to `threads`; `None` on overflow.
    pub(crate) fn of<E: Operand>(problem: &Problem, threads: usize) -> Option<Self> {
        let dims = problem.dims();
        let row = dims.head_dim.max(dims.value_head_dim).checked_mul(direct::KEYS)?;
        let empty = Pieces { row, ..Pieces::default() };
        let (mut pieces, mut small_pieces) = (empty, empty);
        let rows = (dims.batch > 0).then(|| cut::sized_rows::<E>(problem));
        for sized in rows.into_iter().flatten() {
            let pieces = if sized.are_small { &mut small_pieces } else { &mut pieces };
            pieces.make_room(problem, sized)?;
        }
        let bytes = pieces.bytes::<E::Compute>()?;
        let small_bytes = small_pieces.bytes::<<E::Small as Read>::Compute>()?;
        let bytes_per_task = bytes.max(small_bytes);
        let bytes_per_worker = bytes_per_task.checked_add(bias_parts::sums_bytes(problem)?)?;
        let of_heads = most_with_rows(problem).saturating_mul(dims.key_heads);
        let tasks = of_heads.max(bias_parts::task_count(problem));
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
