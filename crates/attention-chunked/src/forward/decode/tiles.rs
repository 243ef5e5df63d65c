//! Products and sums of keys and values of 8 bits: a tile of rows at a time is widened into scratch that
//! stays in the first-level cache, and the kernels for keys and values as they lie run on it. What it is
//! divided by ([`Operands::unit_of_tile`]), the scale of the products and the rows of the result make up for.

use attention_core::HostView;

use super::layout::{MAX_ROWS, TILE_KEYS};
use super::products::Dots;
use super::runs::{KeyRuns, Run};
use super::sums::WeightedSums;
use crate::simd::Simd;
use crate::tensor::{EightBit, OnView, Operands};

/// Calls `work` with keys of a head, or their values, [`TILE_KEYS`] at a time from the first on, wherever
/// they are: with the number of the first and the widened rows, which are in `room`.
fn for_each_tile<F: Operands, S: Simd<F>>(
    simd: S,
    bytes: &EightBit<'_>,
    key_head: usize,
    keys: KeyRuns<'_>,
    room: &mut [F::Tile],
    mut work: impl FnMut(usize, &HostView<'_, F::Tile>, Run),
) {
    let head = bytes.view().head(key_head);
    let width = head.width();
    let mut rows = keys.rows_ahead(head);
    for first in (0..keys.len()).step_by(TILE_KEYS) {
        let count = TILE_KEYS.min(keys.len() - first);
        let tile = &mut room[..count * width];
        F::tile(simd, bytes, rows.by_ref().take(count), tile);
        work(first, &HostView::of_rows(tile, width), Run::of_rows(count));
    }
}

impl<F: Operands, S: Simd<F>> Dots<'_, F, S> {
    /// The products with keys of 8 bits, of which `room` has [`TILE_KEYS`] rows.
    pub(super) fn run_on_tiles(self, bytes: &EightBit<'_>, room: &mut [F::Tile]) {
        let Self { simd, key_head, keys, rows, queries, queries_stride, tile } = self;
        for_each_tile(simd, bytes, key_head, keys, room, |first, view, run| {
            let (keys, tile) = (KeyRuns::one(&run), &mut tile[first..]);
            let work = Dots { simd, key_head: 0, keys, rows, queries, queries_stride, tile };
            simd.vectorize(OnView { view, work });
        });
    }
}

impl<F: Operands, S: Simd<F>> WeightedSums<'_, F, S> {
    /// The sums of values of 8 bits, of which `room` has [`TILE_KEYS`] rows.
    pub(super) fn run_on_tiles(self, bytes: &EightBit<'_>, room: &mut [F::Tile]) {
        let Self { simd, key_head, keys, rows, weights, factors, totals, values, taken } = self;
        let ones = [F::ONE; MAX_ROWS];
        for_each_tile(simd, bytes, key_head, keys, room, |first, view, run| {
            let work = WeightedSums {
                simd,
                key_head: 0,
                keys: KeyRuns::one(&run),
                rows,
                weights: &weights[first..],
                // Sums are rescaled once a block.
                factors: if first == 0 { factors } else { &ones },
                totals,
                values: &mut *values,
                taken,
            };
            simd.vectorize(OnView { view, work });
        });
    }
}
