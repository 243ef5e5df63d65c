//! Decoding: at most [`MAX_ROWS`] query rows per key/value head, where reading keys and values is all the
//! work.
//!
//! Keys and values are read once, as they lie, for all rows of the group. The keys are cut into splits by
//! their number alone (split-KV); each split gives a partial result, and the splits are combined in order, so
//! that a single row can use every thread and gives the same bits on one.

mod layout;
mod products;
mod row;
mod runs;
mod sums;
mod tiles;

use std::ops::Range;

use attention_core::Scalar as _;

use self::layout::{BLOCK_KEYS, Partial, STRIDE, Scratch, TILE_KEYS};
use self::products::Dots;
use self::row::AHEAD;
use self::runs::{KeyRuns, Run};
use self::sums::WeightedSums;
use super::call::{Forward, Outputs};
use super::finish::normalise;
use super::softmax::{BlockSoftmax, PackedWeightsMut, SoftmaxStates};
use crate::cut::Rows;
use crate::engine::Engine;
use crate::engine::vector::Fused;
use crate::float::Float;
use crate::logits::{QueryRow, TileShape};
use crate::paths::Path;
use crate::scratch::Pieces;
use crate::simd::Simd;
use crate::tensor::{Cached, Floats, Operands};

pub(super) use self::layout::{DecodeLayout, MAX_HEADS, MAX_ROWS, most_splits, splits};

/// The rows of some heads of one batch row: the same queries of each.
type Heads = [Rows];

impl<'a, E: Engine> Forward<'a, E> {
    /// All keys of some rows.
    ///
    /// # Safety
    /// No other thread writes these rows of the outputs.
    pub(super) unsafe fn decode(&self, heads: &Heads, outputs: &Outputs<'a>, memory: &mut [u8]) {
        self.taken.mark(Path::DecodeWhole);
        let mut scratch = self.decode.scratch::<E::F>(&mut Pieces::of(memory));
        let scaled = self.scaled_heads(heads);
        scratch.running.clear();
        self.stage_heads(heads, &scaled, scratch.stage);
        let keys = self.problem.key_range_of_rows(heads[0].batch, heads[0].queries.clone());
        for split in splits(&keys) {
            self.split(heads, &scaled, split, &mut scratch);
            self.merge(heads, &scaled, &mut scratch.running, &scratch.split);
        }
        // SAFETY: the caller guarantees that no other thread writes these rows of the outputs.
        unsafe { self.finish_decode(heads, &scaled, &mut scratch.running, outputs) };
    }

    /// One split of the keys of some rows, into memory of [`DecodeLayout::partial_bytes`].
    pub(super) fn decode_split(&self, heads: &Heads, keys: Range<usize>, to: &mut [u8], memory: &mut [u8]) {
        self.taken.mark(Path::DecodeSplit);
        let mut scratch = self.decode.scratch::<E::F>(&mut Pieces::of(memory));
        scratch.split = self.decode.partial(&mut Pieces::of(to));
        let scaled = self.scaled_heads(heads);
        self.stage_heads(heads, &scaled, scratch.stage);
        self.split(heads, &scaled, keys, &mut scratch);
    }

    /// Combines the splits of some rows, each in `bytes` of the memory, and writes the rows.
    ///
    /// # Safety
    /// No other thread writes these rows of the outputs.
    pub(super) unsafe fn combine_splits(
        &self,
        heads: &Heads,
        splits: &mut [u8],
        bytes: usize,
        outputs: &Outputs<'a>,
        memory: &mut [u8],
    ) {
        let mut scratch = self.decode.scratch::<E::F>(&mut Pieces::of(memory));
        scratch.running.clear();
        let scaled = self.scaled_heads(heads);
        for split in splits.chunks_exact_mut(bytes) {
            self.merge(heads, &scaled, &mut scratch.running, &self.decode.partial(&mut Pieces::of(split)));
        }
        // SAFETY: the caller guarantees that no other thread writes these rows of the outputs.
        unsafe { self.finish_decode(heads, &scaled, &mut scratch.running, outputs) };
    }

    /// The call with the scales of each head, or of all; empty where it is the same.
    fn scaled_heads(&self, heads: &Heads) -> Vec<Self> {
        let heads = if self.has_scales() { heads } else { &heads[..1] };
        let unit = self.key.unit_of_tile::<E::F>();
        heads.iter().filter_map(|rows| self.scaled(rows.batch, rows.key_head, unit)).collect()
    }

    /// The call with the scales of head `index`.
    fn of_head<'s>(&'s self, scaled: &'s [Self], index: usize) -> &'s Self {
        scaled.get(index).or(scaled.first()).unwrap_or(self)
    }

    fn stage_heads(&self, heads: &Heads, scaled: &[Self], stage: &mut [E::F]) {
        let room = MAX_ROWS * Floats::stage_stride(self.decode.head_dim);
        for (head, (rows, stage)) in heads.iter().zip(stage.chunks_exact_mut(room)).enumerate() {
            let index = rows.query_index(self.problem);
            let factor = self.of_head(scaled, head).terms.query_factor();
            self.query.stage_floats(self.engine.plain(), rows.len(), &index, factor, false, stage);
        }
    }

    /// Adds a partial result of further keys to another.
    fn merge(
        &self,
        heads: &Heads,
        scaled: &[Self],
        running: &mut Partial<'_, E::F>,
        split: &Partial<'_, E::F>,
    ) {
        for (head, rows) in heads.iter().enumerate() {
            let unit = self.of_head(scaled, head).terms.unit();
            running.merge(self.decode.rows_of(head, rows), split, unit);
        }
    }

    /// # Safety
    /// No other thread writes these rows of the outputs.
    unsafe fn finish_decode(
        &self,
        heads: &Heads,
        scaled: &[Self],
        result: &mut Partial<'_, E::F>,
        outputs: &Outputs<'a>,
    ) {
        let width = result.width;
        let unit = E::F::from_f64(self.value.unit_of_tile::<E::F>());
        for (index, rows) in heads.iter().enumerate() {
            let Self { terms, value_scale, .. } = self.of_head(scaled, index);
            let at = rows.query_index(self.problem);
            for (row, place) in self.decode.rows_of(index, rows).enumerate() {
                let [outer, inner, head] = at(row);
                let sink = self.sinks.as_ref().map(|sinks| sinks.at(&[head]));
                let values = &mut result.values[place * width..][..width];
                let (shift, sum) = (result.shifts[place], result.sums[place]);
                let lse = normalise(shift, sum, terms.unit(), sink, values);
                if unit != E::F::ONE {
                    // Before the scale, with which the unit may overflow.
                    values.iter_mut().for_each(|value| *value = *value * unit);
                }
                // SAFETY: the caller guarantees that no other thread writes these rows of the outputs.
                unsafe {
                    outputs.out.write_row([outer, inner, head], values, *value_scale);
                    if let Some(to) = &outputs.lse {
                        to.write([outer, inner, head, 0], lse);
                    }
                }
            }
        }
    }

    /// Computes a split: a block of keys for all heads, then the next.
    fn split(&self, heads: &Heads, scaled: &[Self], keys: Range<usize>, scratch: &mut Scratch<'_, E::F>) {
        if self.key.is_strided() || self.value.is_strided() {
            self.taken.mark(Path::DecodeStrided);
        }
        scratch.split.clear();
        let places = self.problem.key_places(heads[0].batch);
        let page_size = places.page_size();
        if page_size.is_some() {
            self.taken.mark(Path::DecodePages);
        }
        if self.key.is_eight_bit() {
            self.taken.mark(Path::DecodeEightBit);
        }
        // A tile prefetches the next one: nothing is while kernels run on it.
        let ahead = if self.key.is_eight_bit() { TILE_KEYS } else { AHEAD };
        let room = std::mem::take(&mut scratch.runs);
        for first in keys.clone().step_by(BLOCK_KEYS) {
            let block = first..keys.end.min(first + BLOCK_KEYS);
            // Found once for all heads.
            let run;
            let runs = match page_size {
                Some(page_size) => KeyRuns::paged(&places, page_size, &block, room),
                None => {
                    run = Run::contiguous(&places, &block, ahead);
                    KeyRuns::one(&run)
                }
            };
            for (index, rows) in heads.iter().enumerate() {
                self.of_head(scaled, index).decode_block(index, rows, block.clone(), runs, scratch);
            }
        }
        scratch.runs = room;
    }

    fn decode_block(
        &self,
        index: usize,
        rows: &Rows,
        keys: Range<usize>,
        runs: KeyRuns<'_>,
        scratch: &mut Scratch<'_, E::F>,
    ) {
        let simd = self.engine.plain();
        let (batch, key_head) = (rows.batch, rows.key_head);
        let mut infos = [QueryRow { batch: 0, head: 0, query: 0, begin: 0, end: 0 }; MAX_ROWS];
        let infos = &mut infos[..rows.len()];
        let sequence = self.problem.sequence(batch);
        for (row, info) in infos.iter_mut().enumerate() {
            *info = rows.row(&sequence, row);
        }
        let queries_stride = Floats::stage_stride(self.decode.head_dim);
        let queries = &scratch.stage[index * MAX_ROWS * queries_stride..][..MAX_ROWS * queries_stride];
        let dots = Dots {
            simd,
            key_head,
            keys: runs,
            rows: rows.len(),
            queries,
            queries_stride,
            tile: scratch.tile,
        };
        match &self.key {
            Cached::Floats(key) => E::F::vectorize(key, simd, dots),
            Cached::EightBit(key) => dots.run_on_tiles(key, scratch.widened),
        }
        let columns = keys.len().next_multiple_of(2 * <E::Plain as Simd<E::F>>::LANES);
        let inside = infos.iter().all(|row| row.begin <= keys.start && row.end >= keys.end);
        let apply = !inside || columns != keys.len() || self.terms.change_products();
        self.taken.mark(Path::decode(rows.len()));
        if apply {
            self.taken.mark(Path::DecodeAdded);
        }
        let place = self.decode.rows_of(index, rows);
        let width = scratch.split.width;
        let split = &mut scratch.split;
        simd.vectorize(BlockSoftmax {
            engine: Fused::<E::F, E::Plain>::new(simd),
            terms: &self.terms,
            shape: TileShape { rows: infos, first_key: keys.start, columns, stride: STRIDE, apply },
            tile: scratch.tile,
            // Values that are not finite are told by it from those that take no part.
            mark: true,
            packed: PackedWeightsMut { data: &mut [], columns: BLOCK_KEYS },
            states: SoftmaxStates {
                shifts: &mut split.shifts[place.clone()],
                sums: &mut split.sums[place.clone()],
                factors: scratch.factors,
            },
        });
        let values = &mut split.values[place.start * width..place.end * width];
        let sums = &split.sums[place];
        let weighted_sums = WeightedSums {
            simd,
            key_head,
            keys: runs,
            rows: rows.len(),
            weights: scratch.tile,
            factors: scratch.factors,
            totals: sums,
            values,
            taken: self.taken,
        };
        match &self.value {
            Cached::Floats(value) => E::F::vectorize(value, simd, weighted_sums),
            Cached::EightBit(value) => weighted_sums.run_on_tiles(value, scratch.widened),
        }
    }
}
