//! Query rows against keys, chunk by chunk: the loops that dq, dk and dv share.

use std::ops::Range;

use attention_core::merge::Accumulator;
use attention_core::{Gradients, Problem, Role};

use super::gradient::{BlockGradient, GradientOf, RowState};
use super::{Backward, Outputs, bias};
use crate::config::Sizes;
use crate::engine::{Before, Engine, GradientPacks, MAX_BLOCK_ROWS, STAGE, Weights, tile_stride};
use crate::float::Float;
use crate::forward::softmax::BlockSoftmax;
use crate::paths::Path;
use crate::plan::{self, Rows};
use crate::scratch::{Pieces, round_up};
use crate::simd::Simd;
use crate::tensor::Floats;
use crate::terms::QueryRow;

/// The sizes of a task's scratch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Layout {
    /// Rows of a chunk, a multiple of the block.
    rows: usize,
    /// Keys of a chunk, a multiple of the block or all of them.
    keys: usize,
    head_dim: usize,
    value_head_dim: usize,
    /// Rows whose dq is summed up at a time.
    dq_rows: usize,
    dk: bool,
    dv: bool,
    /// Elements of a part's sums of the bias gradient.
    bias: usize,
}

/// What a task works in.
pub(crate) struct Scratch<'a, E: Engine> {
    /// The sums of a part of the bias gradient.
    pub(crate) bias: &'a mut [f64],
    stage: &'a mut [E::F],
    queries: &'a mut [E::Packed],
    d_out: &'a mut [E::Packed],
    query_terms: &'a mut [E::Packed],
    d_out_terms: &'a mut [E::Packed],
    keys: &'a mut [E::Packed],
    values: &'a mut [E::Packed],
    key_rows: &'a mut [E::Packed],
    /// Products, then probabilities.
    pub(crate) products: &'a mut [E::F],
    /// Gradients of probabilities, then of products or logits.
    pub(crate) gradients: &'a mut [E::F],
    slopes: &'a mut [E::F],
    /// Gradients of products, as the weights of keys.
    weights: &'a mut [E::Packed],
    /// The same for the sums of keys.
    key_weights: &'a mut [E::Packed],
    /// Probabilities for the sums of values.
    value_weights: &'a mut [E::Packed],
    dq: &'a mut [E::F],
    dk: &'a mut [E::F],
    dv: &'a mut [E::F],
    /// One row, for those that are not finite, and to write gradients from.
    row: &'a mut [E::F],
    /// For each group of staged rows, which are not finite.
    bad_queries: &'a mut [u32],
    bad_d_out: &'a mut [u32],
    bad_keys: &'a mut [u32],
}

impl Layout {
    /// For at most `all_rows` query rows a key/value head.
    pub(crate) fn of<E: Engine>(problem: &Problem, sizes: &Sizes, all_rows: usize, together: bool) -> Self {
        let dims = problem.dims();
        let (head_dim, value_head_dim) = (dims.head_dim, dims.value_head_dim);
        let wanted = problem.gradients();
        let (dk, dv) = (wanted.contains(Gradients::KEY), wanted.contains(Gradients::VALUE));
        let most_keys = plan::most_keys(problem);
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
            keys: keys.min(most_keys.next_multiple_of(STAGE).max(STAGE)),
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
            bias: bias::sums_len(problem),
        }
    }

    /// Keys of a chunk.
    pub(crate) fn keys(&self) -> usize {
        self.keys
    }

    /// Rows of a chunk.
    pub(crate) fn rows(&self) -> usize {
        self.rows
    }

    /// Rows of a chunk, with those that groups are filled up with.
    fn packed_rows(&self) -> usize {
        self.rows.next_multiple_of(STAGE)
    }

    pub(crate) fn scratch<'a, E: Engine>(&self, pieces: &mut Pieces<'a>) -> Scratch<'a, E> {
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
    pub(crate) fn bytes<E: Engine>(&self) -> Option<usize> {
        let mut pieces = Pieces::counting();
        let _ = self.scratch::<E>(&mut pieces);
        pieces.bytes()
    }
}

/// Whether bit `index` of a list of groups is set.
fn is_bad(groups: &[u32], index: usize) -> bool {
    groups[index / STAGE] >> (index % STAGE) & 1 == 1
}

/// Where a block's probabilities and gradients go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Packing {
    /// To the tiles; they are packed afterwards, where the engine packs them.
    Later,
    /// To the tiles, and packed.
    Both,
    /// Packed alone: nobody looks at the tiles.
    Alone,
}

/// Some query rows of a key/value head against its keys.
pub(crate) struct Pair<'s, 'a, E: Engine> {
    pub(crate) backward: &'s Backward<'a, E>,
    pub(crate) rows: &'s Rows,
    /// Which gradients are summed up.
    pub(crate) dq: bool,
    pub(crate) dkv: bool,
}

/// A block of query rows, with the keys that any and all of them can see.
pub(crate) struct Block<F> {
    infos: [QueryRow; MAX_BLOCK_ROWS],
    states: [RowState<F>; MAX_BLOCK_ROWS],
    /// Its rows among those of the chunk.
    pub(crate) rows: Range<usize>,
    any: Range<usize>,
    all: Range<usize>,
}

impl<F> Block<F> {
    pub(crate) fn infos(&self) -> &[QueryRow] {
        &self.infos[..self.rows.len()]
    }
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
        scratch.dq[..self.rows.len() * stride].fill(E::F::ZERO);
        let end = if self.dkv { problem.dims().key_length } else { range.end };
        let first = if self.dkv { 0 } else { range.start / layout.keys * layout.keys };
        for first in (first..end).step_by(layout.keys) {
            // SAFETY: the caller's.
            unsafe { self.keys(first, outputs, scratch) };
        }
        if let Some(dq) = &outputs.dq {
            let (_, factor) = self.backward.terms.gradient_scale();
            for row in 0..self.rows.len() {
                let (head, query) = self.rows.at(row);
                let sums = &scratch.dq[row * stride..][..layout.head_dim];
                // SAFETY: the caller's.
                unsafe { dq.write_row([self.rows.batch, query, head], sums, factor) };
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
        let (batch, key_head) = (self.rows.batch, self.rows.key_head);
        let range = problem.key_range_of_rows(batch, self.rows.queries.clone());
        let all = first..problem.dims().key_length.min(first + layout.keys);
        let keys = first..range.end.min(all.end).max(first);
        let is_seen = !plan::intersection(&keys, &range).is_empty();
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
                    let index = [batch, first + key, key_head];
                    // SAFETY: the caller's.
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

    /// Packs a chunk of keys and values.
    pub(crate) fn pack_keys(&self, keys: &Range<usize>, scratch: &mut Scratch<'_, E>) {
        let Backward { engine, key, value, .. } = self.backward;
        let packed = keys.len().next_multiple_of(STAGE);
        for first in (0..keys.len()).step_by(STAGE) {
            let staged = STAGE.min(keys.len() - first);
            let index = |row: usize| [self.rows.batch, keys.start + first + row, self.rows.key_head];
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
    pub(crate) fn pack_rows(&self, chunk: &Range<usize>, scratch: &mut Scratch<'_, E>) {
        let Backward { engine, layout, query, d_out, terms, .. } = self.backward;
        let packed = layout.packed_rows();
        for first in (0..chunk.len()).step_by(STAGE) {
            let staged = STAGE.min(chunk.len() - first);
            let index = |row: usize| {
                let (head, query) = self.rows.at(chunk.start + first + row);
                [self.rows.batch, query, head]
            };
            let sign = terms.query_sign();
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

    /// The rows `rows` of the chunk that begins at `chunk`.
    pub(crate) fn block(&self, chunk: usize, rows: Range<usize>) -> Block<E::F> {
        let mut block = self.block_without_states(chunk, rows);
        let count = block.rows.len();
        for (info, state) in block.infos[..count].iter().zip(&mut block.states) {
            *state = self.backward.state(info.batch, info.head, info.query);
        }
        block
    }

    /// The same, with the states of rows that attend to nothing.
    pub(crate) fn block_without_states(&self, chunk: usize, rows: Range<usize>) -> Block<E::F> {
        let empty = QueryRow { batch: 0, head: 0, query: 0, begin: 0, end: 0 };
        let mut block = Block {
            infos: [empty; MAX_BLOCK_ROWS],
            states: [RowState::EMPTY; MAX_BLOCK_ROWS],
            rows: rows.clone(),
            any: 0..0,
            all: 0..usize::MAX,
        };
        let (mut begin, mut end) = (usize::MAX, 0);
        for (index, row) in rows.enumerate() {
            let info = self.rows.row(self.backward.problem, chunk + row);
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
    pub(crate) fn key_blocks(
        block: &Block<E::F>,
        keys: &Range<usize>,
    ) -> impl Iterator<Item = Range<usize>> + use<E> {
        let seen = plan::intersection(&block.any, keys);
        // An empty range may lie anywhere.
        let first = if seen.is_empty() { seen.end } else { seen.start / E::BLOCK_KEYS * E::BLOCK_KEYS };
        (first..seen.end).step_by(E::BLOCK_KEYS).map(move |start| {
            start.max(seen.start / E::KEY_STEP * E::KEY_STEP)..seen.end.min(start + E::BLOCK_KEYS)
        })
    }

    /// Computes probabilities and gradients of a block against keys `keys` of the packed `chunk`, in the tiles and as
    /// `packing` says; whether there are any.
    pub(crate) fn gradients(
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
            let rows_at = (block.rows.start, block.rows.len());
            engine.products((left, rows), rows_at, (right, packed), (begin, end), width, out, stride);
        }
        let columns = count.next_multiple_of((2 * lanes).max(E::WEIGHT_STEP));
        let inside = block.all.start <= keys.start && block.all.end >= keys.end;
        let apply = !inside || columns != count || !terms.is_plain() || terms.has_mask();
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
        engine.simd().vectorize(BlockGradient {
            engine: *engine,
            terms,
            of,
            rows: block.infos(),
            states: &block.states,
            first: keys.start,
            columns,
            apply,
            products: scratch.products,
            gradients: scratch.gradients,
            slopes: scratch.slopes,
            stride,
            packs: (packing != Packing::Later)
                .then(|| self.packs(scratch.value_weights, scratch.key_weights, scratch.weights)),
            keep: packing != Packing::Alone,
        });
        true
    }

    /// The largest logits and the sums of weights of a block of rows over all keys that they see, with the products that
    /// [`gradients`](Self::gradients) has; the shifts are -inf and the sums 0 at first.
    pub(crate) fn sums(
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
        for first in (0..rows).step_by(STAGE) {
            let index = |row: usize| {
                let info = &block.infos[first + row];
                [info.batch, info.query, info.head]
            };
            let (count, sign) = (STAGE.min(rows - first), terms.query_sign());
            let (staged, _) = query.stage(*engine, count, &index, sign, false, scratch.stage);
            engine.pack_queries(staged, first, packed_rows, scratch.queries);
        }
        let mut factors = [E::F::ZERO; MAX_BLOCK_ROWS];
        let begin = block.any.start / layout.keys * layout.keys;
        for chunk in (begin..block.any.end).step_by(layout.keys) {
            let chunk = chunk..block.any.end.min(chunk + layout.keys);
            let packed = chunk.len().next_multiple_of(STAGE);
            for first in (0..chunk.len()).step_by(STAGE) {
                let index = |row: usize| [self.rows.batch, chunk.start + first + row, self.rows.key_head];
                let count = STAGE.min(chunk.len() - first);
                let (staged, _) = key.stage(*engine, count, &index, E::F::ONE, false, scratch.stage);
                engine.pack_keys(staged, first, packed, scratch.keys);
            }
            for keys in Self::key_blocks(block, &chunk) {
                let (begin, count) = (keys.start - chunk.start, keys.len());
                let end = (begin + count).next_multiple_of(E::KEY_STEP).min(packed);
                let columns = count.next_multiple_of((2 * lanes).max(E::WEIGHT_STEP));
                engine.products(
                    (scratch.queries, packed_rows),
                    (0, rows),
                    (scratch.keys, packed),
                    (begin, end),
                    layout.head_dim,
                    scratch.products,
                    stride,
                );
                engine.simd().vectorize(BlockSoftmax {
                    engine: *engine,
                    terms,
                    rows: block.infos(),
                    first: keys.start,
                    columns,
                    apply: true,
                    mark: false,
                    tile: scratch.products,
                    stride,
                    packed_columns: E::BLOCK_KEYS,
                    packed: scratch.weights,
                    shifts,
                    sums,
                    factors: &mut factors,
                });
            }
        }
    }

    /// Where a block is packed to.
    fn packs(
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
    fn packing(&self, chunk: &Range<usize>, keys: &Range<usize>, scratch: &Scratch<'_, E>) -> Packing {
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

    /// A chunk of query rows against a packed chunk of keys.
    fn chunk(&self, chunk: &Range<usize>, keys: &Range<usize>, scratch: &mut Scratch<'_, E>) {
        let Backward { engine, layout, .. } = self.backward;
        let stride = tile_stride::<E>();
        let packed = keys.len().next_multiple_of(STAGE);
        let mut packing = None;
        for first in (0..chunk.len()).step_by(E::BLOCK_ROWS) {
            let rows = first..chunk.len().min(first + E::BLOCK_ROWS);
            let block = self.block(chunk.start, rows.clone());
            if plan::intersection(&block.any, keys).is_empty() {
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
                let (begin, count) = (block_keys.start - keys.start, block_keys.len());
                if packing == Packing::Later {
                    self.pack_tiles(rows.len(), count, scratch);
                }
                if self.dkv && layout.dv {
                    engine.add_key_sums(
                        Weights { tile: scratch.products, stride, packed: scratch.value_weights },
                        (rows.start, rows.len()),
                        (scratch.d_out_terms, layout.packed_rows()),
                        begin,
                        count,
                        layout.value_head_dim,
                        (scratch.dv, packed),
                    );
                }
                if self.dkv && layout.dk {
                    engine.add_key_sums(
                        Weights { tile: scratch.gradients, stride, packed: scratch.key_weights },
                        (rows.start, rows.len()),
                        (scratch.query_terms, layout.packed_rows()),
                        begin,
                        count,
                        layout.head_dim,
                        (scratch.dk, packed),
                    );
                }
                if self.dq {
                    let out_stride = E::sum_stride(layout.head_dim);
                    engine.weighted_sums(
                        Weights { tile: scratch.gradients, stride, packed: scratch.weights },
                        rows.len(),
                        (scratch.key_rows, packed),
                        begin,
                        count,
                        layout.head_dim,
                        Before::Kept,
                        &mut scratch.dq[(chunk.start + rows.start) * out_stride..],
                        out_stride,
                    );
                }
                if packing != Packing::Alone {
                    self.add_apart(&block, chunk.start, &block_keys, keys, scratch);
                }
            }
        }
    }

    /// Packs the tiles of a block for all that is summed up.
    fn pack_tiles(&self, rows: usize, keys: usize, scratch: &mut Scratch<'_, E>) {
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

    /// Adds what rows and keys that are not finite contribute: they were packed as zeros, since zero times infinity
    /// would be NaN where they take no part.
    fn add_apart(
        &self,
        block: &Block<E::F>,
        chunk: usize,
        block_keys: &Range<usize>,
        keys: &Range<usize>,
        scratch: &mut Scratch<'_, E>,
    ) {
        let Backward { layout, query, d_out, key, taken, .. } = self.backward;
        let stride = tile_stride::<E>();
        let packed = keys.len().next_multiple_of(STAGE);
        let begin = block_keys.start - keys.start;
        for (index, info) in block.infos().iter().enumerate() {
            let row = block.rows.start + index;
            let at = [info.batch, info.query, info.head];
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
                source.read_row(at, &mut scratch.row[..width]);
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
        for column in (0..block_keys.len()).filter(|column| is_bad(scratch.bad_keys, begin + column)) {
            taken.mark(Path::KeysApart);
            let at = [self.rows.batch, block_keys.start + column, self.rows.key_head];
            key.read_row(at, &mut scratch.row[..layout.head_dim]);
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
