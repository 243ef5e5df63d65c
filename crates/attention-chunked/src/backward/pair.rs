//! Query rows against keys, chunk by chunk: the loops that dq, dk and dv share.

use std::ops::Range;

use attention_core::merge::Accumulator;

use super::block::{Block, Pair};
use super::call::{Backward, Outputs};
use super::gradient::{BlockGradient, Destination, GradientOf, GradientTiles};
use super::layout::Scratch;
use super::pack::Packing;
use crate::cut;
use crate::engine::{
    Accumulate, Engine, KeySumsMut, MAX_BLOCK_ROWS, PackedRows, STAGE, TileMut, Weights, tile_stride,
};
use crate::float::Float;
use crate::forward::softmax::{BlockSoftmax, PackedWeightsMut, SoftmaxStates};
use crate::logits::TileShape;
use crate::paths::Path;
use crate::simd::Simd;

/// Whether bit `index` of a list of groups is set.
fn is_bad(groups: &[u32], index: usize) -> bool {
    groups[index / STAGE] >> (index % STAGE) & 1 == 1
}

impl<'a, E: Engine> Pair<'_, 'a, E> {
    /// All rows against all keys.
    ///
    /// # Safety
    /// No other thread writes the gradients of these rows, and with `dkv` of these keys.
    pub(super) unsafe fn all(&self, outputs: &Outputs<'a>, scratch: &mut Scratch<'_, E>) {
        let layout = self.backward.layout;
        let problem = self.backward.problem;
        let range = problem.key_range_of_rows(self.rows.batch, self.rows.queries.clone());
        let stride = E::sum_stride(layout.head_dim);
        // Rows that see no key need no sums, and there may be more of them than there is scratch for.
        let any_seen = !range.is_empty();
        if any_seen {
            scratch.dq[..self.rows.len() * stride].fill(E::F::ZERO);
        }
        let end = if self.dkv { problem.key_places(self.rows.batch).rows() } else { range.end };
        let first = if self.dkv { 0 } else { range.start / layout.keys * layout.keys };
        for first in (first..end).step_by(layout.keys) {
            // SAFETY: the caller guarantees that no other thread writes the gradients of these keys.
            unsafe { self.keys(first, outputs, scratch) };
        }
        if let Some(dq) = &outputs.dq {
            let (_, factor) = self.backward.terms.gradient_scale();
            let index = self.rows.query_index(problem);
            for row in 0..self.rows.len() {
                let index = index(row);
                // SAFETY: the caller guarantees that no other thread writes the gradients of these rows.
                unsafe {
                    if any_seen {
                        dq.write_row(index, &scratch.dq[row * stride..][..layout.head_dim], factor);
                    } else {
                        dq.zero_row(index);
                    }
                }
            }
        }
    }

    /// All rows against the chunk of keys that begins at `first`.
    ///
    /// # Safety
    /// No other thread writes the gradients of these keys.
    pub(super) unsafe fn keys(&self, first: usize, outputs: &Outputs<'a>, scratch: &mut Scratch<'_, E>) {
        let layout = self.backward.layout;
        let problem = self.backward.problem;
        let range = problem.key_range_of_rows(self.rows.batch, self.rows.queries.clone());
        let all = first..problem.key_places(self.rows.batch).rows().min(first + layout.keys);
        let keys = first..range.end.min(all.end).max(first);
        let is_seen = !cut::intersection(&keys, &range).is_empty();
        if is_seen {
            self.pack_keys(&keys, scratch);
            scratch.dk.fill(E::F::ZERO);
            scratch.dv.fill(E::F::ZERO);
            for chunk in (0..self.rows.len()).step_by(layout.rows) {
                let chunk = chunk..self.rows.len().min(chunk + layout.rows);
                self.chunk(&chunk, &keys, scratch);
            }
        }
        if !self.dkv {
            return;
        }
        let (_, scale) = self.backward.terms.gradient_scale();
        let index = self.rows.key_index(problem, first);
        let capacity = keys.len().next_multiple_of(STAGE);
        let gradients = [
            (&outputs.dk, &*scratch.dk, layout.head_dim, scale),
            (&outputs.dv, &*scratch.dv, layout.value_head_dim, E::F::ONE),
        ];
        for (output, sums, width, factor) in gradients {
            let Some(output) = output else { continue };
            for group in (0..all.len()).step_by(STAGE) {
                let here = keys.len().saturating_sub(group).min(STAGE);
                let (sums, stride) = if is_seen && here > 0 {
                    self.backward.engine.key_sum_rows(sums, capacity, width, group, scratch.stage)
                } else {
                    (sums, 0)
                };
                for key in group..all.len().min(group + STAGE) {
                    let index = index(key);
                    // SAFETY: the caller guarantees that no other thread writes the gradients of these keys.
                    unsafe {
                        if is_seen && key < keys.len() {
                            output.write_row(index, &sums[(key - group) * stride..][..width], factor);
                        } else {
                            output.zero_row(index);
                        }
                    }
                }
            }
        }
    }

    /// Computes probabilities and gradients of a block against keys `keys` of the packed `chunk`, in the
    /// tiles and as `packing` says; whether there are any.
    pub(super) fn gradients(
        &self,
        of: GradientOf,
        packing: Packing,
        block: &Block<E::F>,
        keys: &Range<usize>,
        chunk: &Range<usize>,
        scratch: &mut Scratch<'_, E>,
    ) -> bool {
        let Backward { engine, layout, terms, taken, .. } = self.backward;
        if terms.has_mask() && terms.masks_all(block.infos(), keys.clone()) {
            taken.mark(Path::GradientMaskedBlock);
            return false;
        }
        let stride = tile_stride::<E>();
        let lanes = <E::S as Simd<E::F>>::LANES;
        let (rows, packed) = (layout.packed_rows(), chunk.len().next_multiple_of(STAGE));
        let (begin, count) = (keys.start - chunk.start, keys.len());
        let end = (begin + count).next_multiple_of(E::KEY_STEP).min(packed);
        let sides = [
            (&*scratch.queries, &*scratch.keys, layout.head_dim, &mut *scratch.products),
            (&*scratch.d_out, &*scratch.values, layout.value_head_dim, &mut *scratch.gradients),
        ];
        for (left, right, width, out) in sides {
            engine.products(
                PackedRows { data: left, len: rows },
                block.rows.clone(),
                PackedRows { data: right, len: packed },
                begin..end,
                width,
                TileMut { data: out, stride },
            );
        }
        let columns = count.next_multiple_of((2 * lanes).max(E::WEIGHT_STEP));
        let inside = block.all.start <= keys.start && block.all.end >= keys.end;
        let apply = !inside || columns != count || terms.change_products();
        taken.mark(Path::gradient(terms, apply));
        taken.mark(match packing {
            Packing::Later => Path::PackedLater,
            Packing::Both => Path::PackedAndKept,
            Packing::Alone => Path::PackedAlone,
        });
        if terms.has_dropout() {
            taken.mark(Path::GradientDropout);
        }
        if of == GradientOf::Products && terms.gradient_scale().0 != E::F::ONE {
            taken.mark(Path::GradientLargeScale);
        }
        let mut packs = || self.packs(scratch.value_weights, scratch.key_weights, scratch.weights);
        let destination = match packing {
            Packing::Later => Destination::Tiles,
            Packing::Both => Destination::TilesAndPacks(packs()),
            Packing::Alone => Destination::Packs(packs()),
        };
        engine.simd().vectorize(BlockGradient {
            engine: *engine,
            terms,
            of,
            shape: TileShape { rows: block.infos(), first_key: keys.start, columns, stride, apply },
            states: &block.states,
            tiles: GradientTiles {
                products: scratch.products,
                gradients: scratch.gradients,
                slopes: scratch.slopes,
            },
            destination,
        });
        true
    }

    /// The largest logits and the sums of weights of a block of rows over all keys that they see, with the
    /// products that [`gradients`](Self::gradients) has; the shifts are -inf and the sums 0 at first.
    pub(super) fn sums(
        &self,
        block: &Block<E::F>,
        shifts: &mut [E::F; MAX_BLOCK_ROWS],
        sums: &mut [E::F; MAX_BLOCK_ROWS],
        scratch: &mut Scratch<'_, E>,
    ) {
        let Backward { engine, layout, query, key, terms, .. } = self.backward;
        let stride = tile_stride::<E>();
        let lanes = <E::S as Simd<E::F>>::LANES;
        let (rows, packed_rows) = (block.rows.len(), layout.packed_rows());
        let index = self.rows.query_index(self.backward.problem);
        for first in (0..rows).step_by(STAGE) {
            let index = |row: usize| index(block.rows.start + first + row);
            let (count, sign) = (STAGE.min(rows - first), terms.query_factor());
            let (staged, _) = query.stage(*engine, count, &index, sign, false, scratch.stage);
            engine.pack_queries(staged, first, packed_rows, scratch.queries);
        }
        let mut factors = [E::F::ZERO; MAX_BLOCK_ROWS];
        let begin = block.any.start / layout.keys * layout.keys;
        for chunk in (begin..block.any.end).step_by(layout.keys) {
            let chunk = chunk..block.any.end.min(chunk + layout.keys);
            let packed = chunk.len().next_multiple_of(STAGE);
            let index = self.rows.key_index(self.backward.problem, chunk.start);
            for first in (0..chunk.len()).step_by(STAGE) {
                let index = |row: usize| index(first + row);
                let count = STAGE.min(chunk.len() - first);
                let (staged, _) = key.stage(*engine, count, &index, E::F::ONE, false, scratch.stage);
                engine.pack_keys(staged, first, packed, scratch.keys);
            }
            for keys in Self::key_blocks(block, &chunk) {
                let (begin, count) = (keys.start - chunk.start, keys.len());
                let end = (begin + count).next_multiple_of(E::KEY_STEP).min(packed);
                let columns = count.next_multiple_of((2 * lanes).max(E::WEIGHT_STEP));
                engine.products(
                    PackedRows { data: scratch.queries, len: packed_rows },
                    0..rows,
                    PackedRows { data: scratch.keys, len: packed },
                    begin..end,
                    layout.head_dim,
                    TileMut { data: scratch.products, stride },
                );
                engine.simd().vectorize(BlockSoftmax {
                    engine: *engine,
                    terms,
                    shape: TileShape {
                        rows: block.infos(),
                        first_key: keys.start,
                        columns,
                        stride,
                        apply: true,
                    },
                    tile: scratch.products,
                    mark: false,
                    packed: PackedWeightsMut { data: scratch.weights, columns: E::BLOCK_KEYS },
                    states: SoftmaxStates { shifts, sums, factors: &mut factors },
                });
            }
        }
    }

    /// A chunk of query rows against a packed chunk of keys.
    fn chunk(&self, chunk: &Range<usize>, keys: &Range<usize>, scratch: &mut Scratch<'_, E>) {
        let Backward { engine, layout, .. } = self.backward;
        let stride = tile_stride::<E>();
        let packed = keys.len().next_multiple_of(STAGE);
        let mut packing = None;
        for first in (0..chunk.len()).step_by(E::BLOCK_ROWS) {
            let rows = first..chunk.len().min(first + E::BLOCK_ROWS);
            let block = self.block(chunk.start, rows.clone());
            if cut::intersection(&block.any, keys).is_empty() {
                continue;
            }
            let packing = *packing.get_or_insert_with(|| {
                self.pack_rows(chunk, scratch);
                self.packing(chunk, keys, scratch)
            });
            for block_keys in Self::key_blocks(&block, keys) {
                if !self.gradients(GradientOf::Products, packing, &block, &block_keys, keys, scratch) {
                    continue;
                }
                let here = block_keys.start - keys.start..block_keys.end - keys.start;
                let count = rows.len();
                if packing == Packing::Later {
                    self.pack_tiles(count, here.len(), scratch);
                }
                if self.dkv && layout.dv {
                    engine.add_key_sums(
                        Weights {
                            rows: count,
                            tile: scratch.products,
                            stride,
                            packed: scratch.value_weights,
                        },
                        PackedRows { data: scratch.d_out_terms, len: layout.packed_rows() },
                        rows.start,
                        here.clone(),
                        layout.value_head_dim,
                        KeySumsMut { data: scratch.dv, keys: packed },
                    );
                }
                if self.dkv && layout.dk {
                    engine.add_key_sums(
                        Weights { rows: count, tile: scratch.gradients, stride, packed: scratch.key_weights },
                        PackedRows { data: scratch.query_terms, len: layout.packed_rows() },
                        rows.start,
                        here.clone(),
                        layout.head_dim,
                        KeySumsMut { data: scratch.dk, keys: packed },
                    );
                }
                if self.dq {
                    let out_stride = E::sum_stride(layout.head_dim);
                    engine.weighted_sums(
                        Weights { rows: count, tile: scratch.gradients, stride, packed: scratch.weights },
                        PackedRows { data: scratch.key_rows, len: packed },
                        here.clone(),
                        layout.head_dim,
                        Accumulate::Add,
                        TileMut {
                            data: &mut scratch.dq[(chunk.start + rows.start) * out_stride..],
                            stride: out_stride,
                        },
                    );
                }
                if packing != Packing::Alone {
                    self.add_apart(&block, chunk.start, &block_keys, keys, scratch);
                }
            }
        }
    }

    /// Adds what rows and keys that are not finite contribute: they were packed as zeros, since zero times
    /// infinity would be NaN where they take no part.
    fn add_apart(
        &self,
        block: &Block<E::F>,
        chunk: usize,
        block_keys: &Range<usize>,
        keys: &Range<usize>,
        scratch: &mut Scratch<'_, E>,
    ) {
        let Backward { layout, problem, query, d_out, key, taken, .. } = self.backward;
        let stride = tile_stride::<E>();
        let packed = keys.len().next_multiple_of(STAGE);
        let begin = block_keys.start - keys.start;
        let query_index = self.rows.query_index(problem);
        for index in 0..block.rows.len() {
            let row = block.rows.start + index;
            let sides = [
                (
                    self.dkv && layout.dk,
                    &*scratch.bad_queries,
                    query,
                    &*scratch.gradients,
                    &mut *scratch.dk,
                    layout.head_dim,
                ),
                (
                    self.dkv && layout.dv,
                    &*scratch.bad_d_out,
                    d_out,
                    &*scratch.products,
                    &mut *scratch.dv,
                    layout.value_head_dim,
                ),
            ];
            for (wanted, bad, source, weights, sums, width) in sides {
                if !wanted || !is_bad(bad, row) {
                    continue;
                }
                taken.mark(Path::RowsApart);
                source.read_row(query_index(chunk + row), &mut scratch.row[..width]);
                for column in 0..block_keys.len() {
                    let tile = index * stride + column;
                    if scratch.products[tile].is_disallowed() {
                        continue;
                    }
                    for (at, &x) in scratch.row[..width].iter().enumerate() {
                        sums[E::key_sum_at(packed, width, begin + column, at)] += weights[tile] * x;
                    }
                }
            }
        }
        if !self.dq {
            return;
        }
        let out_stride = E::sum_stride(layout.head_dim);
        let key_index = self.rows.key_index(problem, block_keys.start);
        for column in (0..block_keys.len()).filter(|column| is_bad(scratch.bad_keys, begin + column)) {
            taken.mark(Path::KeysApart);
            key.read_row(key_index(column), &mut scratch.row[..layout.head_dim]);
            for index in 0..block.rows.len() {
                let tile = index * stride + column;
                if scratch.products[tile].is_disallowed() {
                    continue;
                }
                let weight = scratch.gradients[tile];
                let sums = &mut scratch.dq[(chunk + block.rows.start + index) * out_stride..];
                for (sum, &x) in sums.iter_mut().zip(&scratch.row[..layout.head_dim]) {
                    *sum += weight * x;
                }
            }
        }
    }
}
