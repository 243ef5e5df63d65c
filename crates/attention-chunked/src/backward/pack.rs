//! Packing for the products of a pair: keys and rows before them, probabilities and gradients behind them.

use std::ops::Range;

use super::block::Pair;
use super::call::Backward;
use super::layout::Scratch;
use crate::engine::{Engine, GradientPacks, STAGE, tile_stride};
use crate::float::Float;

/// Where a block's probabilities and gradients go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Packing {
    /// To the tiles; they are packed afterwards, where the engine packs them.
    Later,
    /// To the tiles, and packed.
    Both,
    /// Packed alone: no later step reads the tiles.
    Alone,
}

impl<E: Engine> Pair<'_, '_, E> {
    /// Packs a chunk of keys and values.
    pub(super) fn pack_keys(&self, keys: &Range<usize>, scratch: &mut Scratch<'_, E>) {
        let Backward { engine, key, value, .. } = self.backward;
        let packed = keys.len().next_multiple_of(STAGE);
        let index = self.rows.key_index(self.backward.problem, keys.start);
        for first in (0..keys.len()).step_by(STAGE) {
            let staged = STAGE.min(keys.len() - first);
            let index = |row: usize| index(first + row);
            let (rows, _) = value.stage(*engine, staged, &index, E::F::ONE, false, scratch.stage);
            engine.pack_keys(rows, first, packed, scratch.values);
            let (mut rows, bad) = key.stage(*engine, staged, &index, E::F::ONE, false, scratch.stage);
            engine.pack_keys(rows, first, packed, scratch.keys);
            scratch.bad_keys[first / STAGE] = bad;
            if self.dq {
                if bad != 0 {
                    (rows, _) = key.stage(*engine, staged, &index, E::F::ONE, true, scratch.stage);
                }
                engine.pack_values(rows, first, packed, scratch.key_rows);
            }
        }
    }

    /// Packs a chunk of query rows.
    pub(super) fn pack_rows(&self, chunk: &Range<usize>, scratch: &mut Scratch<'_, E>) {
        let Backward { engine, layout, query, d_out, terms, .. } = self.backward;
        let packed = layout.packed_rows();
        let index = self.rows.query_index(self.backward.problem);
        for first in (0..chunk.len()).step_by(STAGE) {
            let staged = STAGE.min(chunk.len() - first);
            let index = |row: usize| index(chunk.start + first + row);
            let sign = terms.query_factor();
            let (mut rows, bad) = query.stage(*engine, staged, &index, sign, false, scratch.stage);
            scratch.bad_queries[first / STAGE] = bad;
            engine.pack_queries(rows, first, packed, scratch.queries);
            if self.dkv && layout.dk {
                if bad != 0 || sign != E::F::ONE {
                    (rows, _) = query.stage(*engine, staged, &index, E::F::ONE, true, scratch.stage);
                }
                engine.pack_terms(rows, first, packed, scratch.query_terms);
            }
            let (mut rows, bad) = d_out.stage(*engine, staged, &index, E::F::ONE, false, scratch.stage);
            scratch.bad_d_out[first / STAGE] = bad;
            engine.pack_queries(rows, first, packed, scratch.d_out);
            if self.dkv && layout.dv {
                if bad != 0 {
                    (rows, _) = d_out.stage(*engine, staged, &index, E::F::ONE, true, scratch.stage);
                }
                engine.pack_terms(rows, first, packed, scratch.d_out_terms);
            }
        }
    }

    /// Where a block is packed to.
    pub(super) fn packs(
        &self,
        value_weights: &mut [E::Packed],
        key_weights: &mut [E::Packed],
        weights: &mut [E::Packed],
    ) -> GradientPacks<E::Packed> {
        let layout = self.backward.layout;
        let for_keys = E::gradients_len(E::BLOCK_ROWS, E::BLOCK_KEYS);
        assert!(value_weights.len() >= for_keys && key_weights.len() >= for_keys);
        assert!(weights.len() >= E::weights_len(E::BLOCK_ROWS, E::BLOCK_KEYS));
        let some = |wanted: bool, to: &mut [E::Packed]| {
            if wanted { to.as_mut_ptr() } else { std::ptr::null_mut() }
        };
        GradientPacks {
            for_values: some(self.dkv && layout.dv, value_weights),
            for_keys: some(self.dkv && layout.dk, key_weights),
            as_weights: some(self.dq, weights),
        }
    }

    /// How the blocks of a packed chunk of rows are packed against a packed chunk of keys.
    pub(super) fn packing(
        &self,
        chunk: &Range<usize>,
        keys: &Range<usize>,
        scratch: &Scratch<'_, E>,
    ) -> Packing {
        let terms = &self.backward.terms;
        if !E::PACKS_GRADIENTS || terms.has_softcap() || terms.has_dropout() {
            return Packing::Later;
        }
        let rows = chunk.len().div_ceil(STAGE);
        let all_finite = [
            &scratch.bad_queries[..rows],
            &scratch.bad_d_out[..rows],
            &scratch.bad_keys[..keys.len().div_ceil(STAGE)],
        ]
        .iter()
        .all(|groups| groups.iter().all(|&bad| bad == 0));
        if all_finite { Packing::Alone } else { Packing::Both }
    }

    /// Packs the tiles of a block for all that is summed up.
    pub(super) fn pack_tiles(&self, rows: usize, keys: usize, scratch: &mut Scratch<'_, E>) {
        let Backward { engine, layout, .. } = self.backward;
        let stride = tile_stride::<E>();
        if self.dkv && layout.dv {
            let to = Some(&mut *scratch.value_weights);
            engine.pack_gradients(scratch.products, stride, rows, keys, None, to);
        }
        engine.pack_gradients(
            scratch.gradients,
            stride,
            rows,
            keys,
            self.dq.then_some(&mut *scratch.weights),
            (self.dkv && layout.dk).then_some(&mut *scratch.key_weights),
        );
    }
}
