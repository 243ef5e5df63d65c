//! A chunk of query rows against its keys, block by block: products, online softmax, weighted sums of values.

use std::ops::Range;

use attention_core::merge::Accumulator;

use super::call::{Forward, Outputs};
use super::layout::{Layout, Scratch};
use super::softmax::{BlockSoftmax, PackedWeightsMut, SoftmaxStates};
use crate::cut::{self, Rows};
use crate::engine::{Accumulate, Engine, MAX_BLOCK_ROWS, PackedRows, STAGE, TileMut, Weights, tile_stride};
use crate::float::Float;
use crate::logits::{QueryRow, TileShape};
use crate::paths::Path;
use crate::scratch::Pieces;
use crate::simd::Simd;

impl<'a, E: Engine> Forward<'a, E> {
    /// Computes the rows of a task.
    ///
    /// # Safety
    /// No other thread writes these rows of the outputs.
    pub(super) unsafe fn task(&self, rows: &Rows, outputs: &Outputs<'a>, memory: &mut [u8]) {
        let scaled = self.scaled(rows.batch, rows.key_head, 1.0);
        // SAFETY: the caller guarantees that no other thread writes these rows of the outputs.
        unsafe { scaled.as_ref().unwrap_or(self).rows(rows, outputs, memory) };
    }

    /// The same, with the scales of the head.
    ///
    /// # Safety
    /// As [`task`](Self::task).
    unsafe fn rows(&self, rows: &Rows, outputs: &Outputs<'a>, memory: &mut [u8]) {
        self.taken.mark(Path::Chunk);
        if self.key.is_eight_bit() {
            self.taken.mark(Path::EightBit);
        }
        let mut scratch = self.layout.scratch::<E>(&mut Pieces::of(memory));
        let range = self.problem.key_range_of_rows(rows.batch, rows.queries.clone());
        self.engine.with_state(|| {
            self.begin(rows, &mut scratch);
            let mut chunk = range.start / self.layout.keys * self.layout.keys;
            while chunk < range.end {
                let keys = chunk..range.end.min(chunk + self.layout.keys);
                let all_finite = self.pack(rows, &keys, range.start, &mut scratch);
                // A block of keys and values stays in the first cache levels while all rows pass it.
                for start in keys.clone().step_by(E::BLOCK_KEYS) {
                    let block_keys = start..keys.end.min(start + E::BLOCK_KEYS);
                    for first in (0..rows.len()).step_by(E::BLOCK_ROWS) {
                        let block = first..rows.len().min(first + E::BLOCK_ROWS);
                        self.rows_and_keys(rows, block, &block_keys, &keys, all_finite, &mut scratch);
                    }
                }
                chunk += self.layout.keys;
            }
        });
        // SAFETY: the caller guarantees that no other thread writes these rows of the outputs.
        unsafe { self.finish(rows, outputs, &mut scratch) };
    }

    /// Packs the queries and sets every row to the value of no keys.
    fn begin(&self, rows: &Rows, scratch: &mut Scratch<'_, E>) {
        let count = rows.len();
        let index = rows.query_index(self.problem);
        for first in (0..count).step_by(STAGE) {
            let index = |row: usize| index(first + row);
            let factor = self.terms.query_factor();
            let staged = STAGE.min(count - first);
            let (staged, _) = self.query.stage(self.engine, staged, &index, factor, false, scratch.stage);
            let packed = self.layout.rows.next_multiple_of(STAGE);
            self.engine.pack_queries(staged, first, packed, scratch.queries);
        }
        let sequence = self.problem.sequence(rows.batch);
        for query in rows.queries.clone() {
            let keys = sequence.key_range(query);
            for head in 0..rows.heads.len() {
                let row = head * rows.queries.len() + query - rows.queries.start;
                (scratch.begins[row], scratch.ends[row]) = (keys.start as u64, keys.end as u64);
            }
        }
        for (index, bounds) in scratch.bounds[..count.div_ceil(E::BLOCK_ROWS)].iter_mut().enumerate() {
            let block = index * E::BLOCK_ROWS..count.min((index + 1) * E::BLOCK_ROWS);
            *bounds = [u64::MAX, 0, 0, u64::MAX];
            for (&begin, &end) in scratch.begins[block.clone()].iter().zip(&scratch.ends[block]) {
                if begin < end {
                    (bounds[0], bounds[1]) = (bounds[0].min(begin), bounds[1].max(end));
                }
                (bounds[2], bounds[3]) = (bounds[2].max(begin), bounds[3].min(end));
            }
            bounds[0] = bounds[0].min(bounds[1]);
        }
        let stride = E::sum_stride(self.layout.value_head_dim);
        scratch.out[..count * stride].fill(E::F::ZERO);
        scratch.shifts[..count].fill(E::F::NEG_INFINITY);
        scratch.sums[..count].fill(E::F::ZERO);
    }

    /// Packs the keys and values of a chunk from `needed` on; whether all of the values are finite.
    fn pack(&self, rows: &Rows, keys: &Range<usize>, needed: usize, scratch: &mut Scratch<'_, E>) -> bool {
        let packed = keys.len().next_multiple_of(STAGE);
        let skipped = needed.saturating_sub(keys.start) / E::BLOCK_KEYS * E::BLOCK_KEYS;
        let index = rows.key_index(self.problem, keys.start);
        let mut all = 0;
        for first in (skipped..keys.len()).step_by(STAGE) {
            let staged = STAGE.min(keys.len() - first);
            let index = |row: usize| index(first + row);
            let (rows, _) = self.key.stage(self.engine, staged, &index, false, scratch.stage);
            self.engine.pack_keys(rows, first, packed, scratch.keys);
            let (rows, not_finite) = self.value.stage(self.engine, staged, &index, true, scratch.stage);
            self.engine.pack_values(rows, first, packed, scratch.values);
            scratch.not_finite[first / STAGE] = not_finite;
            all |= not_finite;
        }
        all == 0
    }

    /// A block of rows against those keys of a block that any of them can see.
    fn rows_and_keys(
        &self,
        rows: &Rows,
        block: Range<usize>,
        keys: &Range<usize>,
        chunk: &Range<usize>,
        all_finite: bool,
        scratch: &mut Scratch<'_, E>,
    ) {
        let [any_begin, any_end, all_begin, all_end] =
            scratch.bounds[block.start / E::BLOCK_ROWS].map(|bound| bound as usize);
        let seen = cut::intersection(&(any_begin..any_end), keys);
        if seen.is_empty() {
            return;
        }
        let keys = keys.start.max(seen.start / E::KEY_STEP * E::KEY_STEP)..seen.end;
        let inside = all_begin <= keys.start && all_end >= keys.end;
        let mut room = [QueryRow { batch: 0, head: 0, query: 0, begin: 0, end: 0 }; MAX_BLOCK_ROWS];
        let infos = &mut room[..block.len()];
        let apply = !inside || self.terms.change_products() || self.terms.has_dropout();
        // Only what masks or adds something asks for more than the first row.
        let needed = if apply { infos.len() } else { 1 };
        for (info, row) in infos[..needed].iter_mut().zip(block.clone()) {
            let (head, query) = rows.at(row);
            let (begin, end) = (scratch.begins[row] as usize, scratch.ends[row] as usize);
            *info = QueryRow { batch: rows.batch, head, query, begin, end };
        }
        if self.terms.has_mask() && self.terms.masks_all(infos, keys.clone()) {
            self.taken.mark(Path::MaskedBlock);
            return;
        }
        self.block(rows, &block, infos, chunk, keys, apply, all_finite, scratch);
    }

    /// A block of rows against a block of keys.
    #[allow(clippy::too_many_arguments, reason = "what the loops around it know")]
    fn block(
        &self,
        rows: &Rows,
        block: &Range<usize>,
        infos: &[QueryRow],
        chunk: &Range<usize>,
        keys: Range<usize>,
        apply: bool,
        all_finite: bool,
        scratch: &mut Scratch<'_, E>,
    ) {
        let Layout { head_dim, value_head_dim, .. } = self.layout;
        let engine = self.engine;
        let stride = tile_stride::<E>();
        let pair = 2 * <E::S as Simd<E::F>>::LANES;
        let packed = chunk.len().next_multiple_of(STAGE);
        let (begin, count) = (keys.start - chunk.start, keys.len());
        let end = (begin + count).next_multiple_of(E::KEY_STEP).min(packed);
        engine.products(
            PackedRows { data: scratch.queries, len: self.layout.rows.next_multiple_of(STAGE) },
            block.clone(),
            PackedRows { data: scratch.keys, len: packed },
            begin..end,
            head_dim,
            TileMut { data: scratch.tile, stride },
        );
        let columns = count.next_multiple_of(pair.max(E::WEIGHT_STEP));
        if columns != count && !apply {
            // Columns behind the last key of the block: all rows end where it ends, or see more keys behind
            // it.
            for row in 0..block.len() {
                scratch.tile[row * stride + count..row * stride + columns].fill(E::F::NEG_INFINITY);
            }
        }
        let rescaled = engine.simd().vectorize(BlockSoftmax {
            engine,
            terms: &self.terms,
            shape: TileShape { rows: infos, first_key: keys.start, columns, stride, apply },
            tile: scratch.tile,
            mark: !all_finite,
            packed: PackedWeightsMut { data: scratch.weights, columns: E::BLOCK_KEYS },
            states: SoftmaxStates {
                shifts: &mut scratch.shifts[block.clone()],
                sums: &mut scratch.sums[block.clone()],
                factors: scratch.factors,
            },
        });
        self.taken.mark(Path::softmax(&self.terms, apply));
        if self.terms.has_dropout() {
            self.taken.mark(Path::Dropout);
        }
        if rescaled {
            self.taken.mark(Path::Rescaled);
        }
        let out_stride = E::sum_stride(value_head_dim);
        let out = &mut scratch.out[block.start * out_stride..];
        engine.weighted_sums(
            Weights { rows: block.len(), tile: scratch.tile, stride, packed: scratch.weights },
            PackedRows { data: scratch.values, len: packed },
            begin..begin + count,
            value_head_dim,
            if rescaled { Accumulate::ScaleAdd(scratch.factors) } else { Accumulate::Add },
            TileMut { data: &mut *out, stride: out_stride },
        );
        if !all_finite {
            let index = rows.key_index(self.problem, chunk.start);
            let groups = begin / STAGE..(begin + count).div_ceil(STAGE);
            for group in groups {
                let bits = scratch.not_finite[group];
                for key in (0..STAGE).filter(|key| bits >> key & 1 == 1).map(|key| group * STAGE + key) {
                    if !(begin..begin + count).contains(&key) {
                        continue;
                    }
                    self.taken.mark(Path::ValuesApart);
                    self.value.read_row(index(key), scratch.row);
                    add_apart(scratch.row, scratch.tile, stride, key - begin, infos.len(), out, out_stride);
                }
            }
        }
    }
}

/// Adds a value row that is not finite to the rows in which its key takes part.
fn add_apart<F: Float>(
    value: &[F],
    weights: &[F],
    stride: usize,
    column: usize,
    rows: usize,
    out: &mut [F],
    out_stride: usize,
) {
    for row in 0..rows {
        let weight = weights[row * stride + column];
        if !weight.is_disallowed() {
            for (out, &value) in out[row * out_stride..].iter_mut().zip(value) {
                *out += weight * value;
            }
        }
    }
}
