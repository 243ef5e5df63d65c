//! The scratch of a task: how large chunks of rows and keys are, and what their task works in.

use attention_core::{Gradients, Problem, Role};

use super::bias_parts;
use crate::config::Sizes;
use crate::engine::{Engine, STAGE, tile_stride};
use crate::scratch::{Pieces, round_up};
use crate::tensor::Floats;

/// The sizes of a task's scratch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Layout {
    /// Rows of a chunk, a multiple of the block.
    pub(super) rows: usize,
    /// Keys of a chunk, a multiple of the block or all of them.
    pub(super) keys: usize,
    pub(super) head_dim: usize,
    pub(super) value_head_dim: usize,
    /// Rows whose dq is summed up at a time.
    pub(super) dq_rows: usize,
    pub(super) dk: bool,
    pub(super) dv: bool,
    /// Elements of a part's sums of the bias gradient.
    pub(super) bias: usize,
}

/// What a task works in.
pub(super) struct Scratch<'a, E: Engine> {
    /// The sums of a part of the bias gradient.
    pub(super) bias: &'a mut [f64],
    pub(super) stage: &'a mut [E::F],
    pub(super) queries: &'a mut [E::Packed],
    pub(super) d_out: &'a mut [E::Packed],
    pub(super) query_terms: &'a mut [E::Packed],
    pub(super) d_out_terms: &'a mut [E::Packed],
    pub(super) keys: &'a mut [E::Packed],
    pub(super) values: &'a mut [E::Packed],
    pub(super) key_rows: &'a mut [E::Packed],
    /// Products, then probabilities.
    pub(super) products: &'a mut [E::F],
    /// Gradients of probabilities, then of products or logits.
    pub(super) gradients: &'a mut [E::F],
    pub(super) slopes: &'a mut [E::F],
    /// Gradients of products, as the weights of keys.
    pub(super) weights: &'a mut [E::Packed],
    /// The same for the sums of keys.
    pub(super) key_weights: &'a mut [E::Packed],
    /// Probabilities for the sums of values.
    pub(super) value_weights: &'a mut [E::Packed],
    pub(super) dq: &'a mut [E::F],
    pub(super) dk: &'a mut [E::F],
    pub(super) dv: &'a mut [E::F],
    /// One row, for those that are not finite, and to write gradients from.
    pub(super) row: &'a mut [E::F],
    /// For each group of staged rows, which are not finite.
    pub(super) bad_queries: &'a mut [u32],
    pub(super) bad_d_out: &'a mut [u32],
    pub(super) bad_keys: &'a mut [u32],
}

impl Layout {
    /// For at most `all_rows` query rows a key/value head.
    pub(super) fn of<E: Engine>(problem: &Problem, sizes: &Sizes, all_rows: usize, together: bool) -> Self {
        let dims = problem.dims();
        let (head_dim, value_head_dim) = (dims.head_dim, dims.value_head_dim);
        let wanted = problem.gradients();
        let (dk, dv) = (wanted.contains(Gradients::KEY), wanted.contains(Gradients::VALUE));
        let packed = size_of::<E::Packed>();
        let sum = |lengths: &[usize]| lengths.iter().fold(0usize, |sum, &length| sum.saturating_add(length));
        let of_keys = sum(&[
            E::keys_len(STAGE, head_dim),
            E::keys_len(STAGE, value_head_dim),
            E::values_len(STAGE, head_dim),
        ]);
        let of_sums = sum(&[E::key_sums_len(STAGE, head_dim), E::key_sums_len(STAGE, value_head_dim)]);
        let of_rows = sum(&[
            E::queries_len(STAGE, head_dim),
            E::queries_len(STAGE, value_head_dim),
            E::terms_len(STAGE, head_dim),
            E::terms_len(STAGE, value_head_dim),
        ]);
        let key_bytes =
            sum(&[packed.saturating_mul(of_keys), size_of::<E::F>().saturating_mul(of_sums)]) / STAGE;
        let row_bytes = packed.saturating_mul(of_rows) / STAGE;
        // Query rows are packed once for each chunk of keys, so keys have the larger part.
        let keys = sizes.keys.map_or(sizes.budget / key_bytes.max(1), |keys| keys.get());
        let keys = (keys / E::BLOCK_KEYS * E::BLOCK_KEYS).clamp(E::BLOCK_KEYS, 8 * E::BLOCK_KEYS);
        let rows = sizes.rows.map_or((sizes.budget / 2 / row_bytes.max(1)).min(512), |rows| rows.get());
        let rows = rows.min(all_rows).max(1).next_multiple_of(E::BLOCK_ROWS);
        let dq = problem.has(Role::DQuery);
        Self {
            rows,
            keys: keys.min(dims.key_length.next_multiple_of(STAGE).max(STAGE)),
            head_dim,
            value_head_dim,
            dq_rows: if !dq {
                0
            } else if together {
                all_rows.max(1)
            } else {
                rows
            },
            dk,
            dv,
            bias: bias_parts::sums_len(problem),
        }
    }

    /// Rows of a chunk, with those that groups are filled up with.
    pub(super) fn packed_rows(&self) -> usize {
        self.rows.next_multiple_of(STAGE)
    }

    pub(super) fn scratch<'a, E: Engine>(&self, pieces: &mut Pieces<'a>) -> Scratch<'a, E> {
        let Self { keys, head_dim, value_head_dim, .. } = *self;
        let (rows, keys) = (self.packed_rows(), keys.next_multiple_of(STAGE));
        let width = head_dim.max(value_head_dim);
        let tile = E::BLOCK_ROWS * tile_stride::<E>();
        let some = |wanted: bool, len: usize| if wanted { len } else { 0 };
        Scratch {
            // First, so that it is in the same place for every engine.
            bias: pieces.take(self.bias),
            stage: pieces.take(Floats::stage_len(width)),
            queries: pieces.take(E::queries_len(rows, head_dim)),
            d_out: pieces.take(E::queries_len(rows, value_head_dim)),
            query_terms: pieces.take(some(self.dk, E::terms_len(rows, head_dim))),
            d_out_terms: pieces.take(some(self.dv, E::terms_len(rows, value_head_dim))),
            keys: pieces.take(E::keys_len(keys, head_dim)),
            values: pieces.take(E::keys_len(keys, value_head_dim)),
            key_rows: pieces.take(some(self.dq_rows > 0, E::values_len(keys, head_dim))),
            products: pieces.take(tile),
            gradients: pieces.take(tile),
            slopes: pieces.take(tile_stride::<E>()),
            weights: pieces.take(E::weights_len(E::BLOCK_ROWS, E::BLOCK_KEYS)),
            key_weights: pieces.take(E::gradients_len(E::BLOCK_ROWS, E::BLOCK_KEYS)),
            value_weights: pieces.take(E::gradients_len(E::BLOCK_ROWS, E::BLOCK_KEYS)),
            dq: pieces.take(round_up(self.dq_rows, STAGE).saturating_mul(E::sum_stride(head_dim))),
            dk: pieces.take(some(self.dk, E::key_sums_len(keys, head_dim))),
            dv: pieces.take(some(self.dv, E::key_sums_len(keys, value_head_dim))),
            row: pieces.take(width),
            bad_queries: pieces.take(rows / STAGE),
            bad_d_out: pieces.take(rows / STAGE),
            bad_keys: pieces.take(keys / STAGE),
        }
    }

    /// Bytes of a task's scratch; `None` on overflow.
    pub(super) fn bytes<E: Engine>(&self) -> Option<usize> {
        let mut pieces = Pieces::counting();
        let _ = self.scratch::<E>(&mut pieces);
        pieces.bytes()
    }
}
