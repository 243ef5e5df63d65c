//! The scratch of a chunk of query rows: how large chunks are, and what their task works in.

use attention_core::Problem;

use crate::config::Sizes;
use crate::engine::{Engine, STAGE, tile_stride};
use crate::scratch::Pieces;
use crate::tensor::Floats;

/// What a task works in.
pub(super) struct Scratch<'a, E: Engine> {
    pub(super) stage: &'a mut [E::F],
    pub(super) queries: &'a mut [E::Packed],
    pub(super) keys: &'a mut [E::Packed],
    pub(super) values: &'a mut [E::Packed],
    pub(super) tile: &'a mut [E::F],
    pub(super) weights: &'a mut [E::Packed],
    /// The value of each row, unnormalised.
    pub(super) out: &'a mut [E::F],
    pub(super) shifts: &'a mut [E::F],
    pub(super) sums: &'a mut [E::F],
    pub(super) factors: &'a mut [E::F],
    /// The keys that structure lets each row see.
    pub(super) begins: &'a mut [u64],
    pub(super) ends: &'a mut [u64],
    /// For each block of rows, the keys that any and that all of them can see: begin and end of each.
    pub(super) bounds: &'a mut [[u64; 4]],
    /// One value row, for those that are not finite.
    pub(super) row: &'a mut [E::F],
    /// For each group of staged values, which are not finite.
    pub(super) not_finite: &'a mut [u32],
}

/// The sizes of a task's scratch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Layout {
    /// Rows of a chunk, a multiple of what blocks are padded to.
    pub(super) rows: usize,
    /// Keys of a chunk, a multiple of the block.
    pub(super) keys: usize,
    pub(super) head_dim: usize,
    pub(super) value_head_dim: usize,
}

impl Layout {
    /// For problems of these dimensions: chunks as configured, or such that a task stays inside a budget.
    pub(super) fn of<E: Engine>(problem: &Problem, sizes: &Sizes) -> Self {
        let dims = problem.dims();
        let (head_dim, value_head_dim) = (dims.head_dim, dims.value_head_dim);
        let packed = |length: usize| size_of::<E::Packed>().saturating_mul(length) / STAGE;
        let row_bytes = packed(E::queries_len(STAGE, head_dim))
            .saturating_add(size_of::<E::F>().saturating_mul(E::sum_stride(value_head_dim)));
        let key_bytes =
            packed(E::keys_len(STAGE, head_dim).saturating_add(E::values_len(STAGE, value_head_dim)));
        // One block of keys at a time is enough for all rows of a chunk, and the more rows there are, the
        // fewer times keys and values are packed.
        let keys = sizes.keys.map_or(E::BLOCK_KEYS, |keys| keys.get());
        let keys = (keys / E::BLOCK_KEYS * E::BLOCK_KEYS)
            .clamp(E::BLOCK_KEYS, 8 * E::BLOCK_KEYS)
            .min(dims.key_length.next_multiple_of(STAGE).max(STAGE));
        let left = sizes.budget.saturating_sub(keys.saturating_mul(key_bytes)).max(sizes.budget / 4);
        // Whole blocks that fit.
        let within_budget = (left / row_bytes.max(1)).min(1024) / E::BLOCK_ROWS * E::BLOCK_ROWS;
        let group_rows = dims.query_length.saturating_mul(dims.group_size().max(1));
        let rows = sizes.rows.map_or(within_budget, |rows| rows.get());
        let rows = rows.min(group_rows).max(1).next_multiple_of(E::BLOCK_ROWS);
        Self { rows, keys, head_dim, value_head_dim }
    }

    /// For a call of `queries` query rows a head over all batch rows, at most `most_queries` of one batch
    /// row: chunks of no more rows than that, and enough of them for every thread to have a few. Takes no
    /// more scratch.
    pub(super) fn for_queries<E: Engine>(
        self,
        problem: &Problem,
        sizes: &Sizes,
        threads: usize,
        queries: usize,
        most_queries: usize,
    ) -> Self {
        let dims = problem.dims();
        let group_rows = most_queries.saturating_mul(dims.group_size().max(1));
        let mut rows = self.rows;
        if sizes.rows.is_none() {
            let all_rows = queries.saturating_mul(dims.query_heads);
            let fair = (all_rows / threads.saturating_mul(3).max(1)).max(4 * E::BLOCK_ROWS);
            rows = rows.min(fair / E::BLOCK_ROWS * E::BLOCK_ROWS);
        }
        Self { rows: rows.min(group_rows).max(1).next_multiple_of(E::BLOCK_ROWS), ..self }
    }

    pub(super) fn scratch<'a, E: Engine>(&self, pieces: &mut Pieces<'a>) -> Scratch<'a, E> {
        let Self { rows, keys, head_dim, value_head_dim } = *self;
        let width = head_dim.max(value_head_dim);
        Scratch {
            stage: pieces.take(Floats::stage_len(width)),
            queries: pieces.take(E::queries_len(rows.next_multiple_of(STAGE), head_dim)),
            keys: pieces.take(E::keys_len(keys.next_multiple_of(STAGE), head_dim)),
            values: pieces.take(E::values_len(keys.next_multiple_of(STAGE), value_head_dim)),
            tile: pieces.take(E::BLOCK_ROWS * tile_stride::<E>()),
            weights: pieces.take(E::weights_len(E::BLOCK_ROWS, E::BLOCK_KEYS)),
            out: pieces.take(rows.saturating_mul(E::sum_stride(value_head_dim))),
            shifts: pieces.take(rows),
            sums: pieces.take(rows),
            factors: pieces.take(E::BLOCK_ROWS),
            begins: pieces.take(rows),
            ends: pieces.take(rows),
            bounds: pieces.take(rows / E::BLOCK_ROWS),
            row: pieces.take(value_head_dim),
            not_finite: pieces.take(keys.div_ceil(STAGE)),
        }
    }

    /// Bytes of a task's scratch; `None` on overflow.
    pub(super) fn bytes<E: Engine>(&self) -> Option<usize> {
        let mut pieces = Pieces::counting();
        let _ = self.scratch::<E>(&mut pieces);
        pieces.bytes()
    }
}

#[cfg(test)]
mod tests {
    use attention_core::{DType, TensorDesc};

    use super::*;
    use crate::config::ChunkedConfig;

    /// Bytes of a worker's scratch for one head of `head_dim`, on an engine that this machine need not have.
    fn bytes<E: Engine>(dtype: DType, head_dim: usize) -> usize {
        let desc = TensorDesc::contiguous(dtype, [1, 1 << 18, 1, head_dim]);
        let problem = Problem::builder(desc, desc, desc).build().expect("a valid problem");
        Layout::of::<E>(&problem, &ChunkedConfig::default().sizes()).bytes::<E>().expect("no overflow")
    }

    #[test]
    fn a_thread_needs_at_most_a_mebibyte_on_every_engine() {
        use crate::engine::vector::Fused;
        use crate::simd::Scalar;
        for head_dim in [16, 64, 80, 128] {
            let mut all = vec![
                ("scalar f32", bytes::<Fused<f32, Scalar>>(DType::F32, head_dim)),
                ("scalar f64", bytes::<Fused<f64, Scalar>>(DType::F64, head_dim)),
            ];
            #[cfg(target_arch = "x86_64")]
            {
                use crate::engine::amx::Tiles;
                use crate::simd::{Avx2, Avx512};
                all.extend([
                    ("avx2 f32", bytes::<Fused<f32, Avx2>>(DType::F32, head_dim)),
                    ("avx512 f32", bytes::<Fused<f32, Avx512>>(DType::F32, head_dim)),
                    ("avx512 f64", bytes::<Fused<f64, Avx512>>(DType::F64, head_dim)),
                    ("amx bf16", bytes::<Tiles<1>>(DType::Bf16, head_dim)),
                    ("amx f16", bytes::<Tiles<2>>(DType::F16, head_dim)),
                ]);
            }
            for (engine, bytes) in all {
                assert!(bytes <= 1 << 20, "{engine}, H = {head_dim}: {bytes} bytes");
            }
        }
    }
}
