//! The gradient of the bias, for every broadcast: a pass of its own over the parts of `dbias`.
//!
//! A part is a range of elements of `dbias` that no other task writes; its task visits, in order, every block
//! of logits that the bias was broadcast to and adds their gradients. That computes the logits once more, and
//! needs neither a matrix of the size of the logits nor an order among threads.

use std::ops::Range;

use attention_core::{Scalar, ViewMut};
use attention_threads::Team;

use super::bias_parts::{Part, Parts, shape};
use super::block::Pair;
use super::call::Backward;
use super::gradient::GradientOf;
use super::layout::Scratch;
use super::pack::Packing;
use crate::cut::{self, Rows, intersection};
use crate::engine::{Engine, tile_stride};
use crate::paths::Path;
use crate::scratch::Pieces;
use crate::tensor::SharedOutput;
use crate::workers;

/// Computes `dbias`, `[Bb, Nb, Tb, Sb]`, each axis 1 or that of the logits.
pub(super) fn run<E: Engine, Small: Engine>(
    backward: &Backward<'_, E>,
    small: Option<&Backward<'_, Small>>,
    dbias: ViewMut<'_>,
    team: &Team,
    bytes: usize,
    scratch: &mut [u8],
) {
    let problem = backward.problem;
    let (Some(parts), Some(shape)) = (Parts::of(problem), shape(problem)) else {
        unreachable!("the problem has the gradient of the bias")
    };
    let dbias = SharedOutput::new(dbias);
    workers::run(parts.count(), team, scratch, bytes, &|number, memory| {
        let part = &parts.at(number);
        let length = |axis: usize, range: &Range<usize>| if shape[axis] == 1 { 1 } else { range.len() };
        let (rows, columns) = (length(2, &part.queries), length(3, &part.keys));
        let sums = Sums { shape, columns, part };
        // The sums come first in the scratch of every engine.
        Pieces::of(memory).take::<f64>(rows * columns).fill(0.0);
        // Without logits, of any number of batch rows.
        let batches = if cut::has_logits(problem) { part.batches.clone() } else { 0..0 };
        for batch in problem.sequences_with_queries(batches) {
            match small {
                Some(small) if cut::is_small(problem, batch) => sums.add_batch(small, batch, memory),
                _ => sums.add_batch(backward, batch, memory),
            }
        }
        let totals = Pieces::of(memory).take::<f64>(rows * columns);
        let first = |axis: usize, range: &Range<usize>| if shape[axis] == 1 { 0 } else { range.start };
        let (batch, head) = (first(0, &part.batches), first(1, &part.heads));
        let (query, key) = (first(2, &part.queries), first(3, &part.keys));
        for row in 0..rows {
            for column in 0..columns {
                let index = [batch, head, query + row, key + column];
                // SAFETY: the tasks have disjoint parts of the gradient, each task runs once, and this
                // element is in the part of this task, so no other thread writes it.
                unsafe { dbias.write(index, totals[row * columns + column]) };
            }
        }
    });
}

struct Sums<'p> {
    shape: [usize; 4],
    columns: usize,
    part: &'p Part,
}

impl Sums<'_> {
    /// Adds the gradients of all logits of the part that are in one batch row.
    fn add_batch<E: Engine>(&self, backward: &Backward<'_, E>, batch: usize, memory: &mut [u8]) {
        let problem = backward.problem;
        // 0 where there are no query heads, and then no head of a part either.
        let group = problem.dims().group_size().max(1);
        let part = self.part;
        let queries = part.queries.start..part.queries.end.min(problem.query_len(batch));
        let range = intersection(&problem.key_range_of_rows(batch, queries.clone()), &part.keys);
        if range.is_empty() {
            return;
        }
        let mut scratch = backward.layout.scratch::<E>(&mut Pieces::of(memory));
        backward.taken.mark(Path::bias_gradient(self.shape));
        backward.engine.with_state(|| {
            for key_head in part.heads.start / group..part.heads.end.div_ceil(group) {
                let heads = intersection(&(key_head * group..(key_head + 1) * group), &part.heads);
                let rows = Rows { batch, key_head, heads, queries: queries.clone() };
                let pair = Pair { backward, rows: &rows, dq: false, dkv: false };
                // Where sums go over keys, of more than one row perhaps, a block of keys at a time for all
                // rows: the order of the terms, and with it the bits, must not depend on the size of chunks.
                let keys = backward.layout.keys;
                let step = if self.shape[3] == 1 { keys.min(E::BLOCK_KEYS) } else { keys };
                let mut first = range.start / step * step;
                while first < range.end {
                    let keys = first..range.end.min(first + step);
                    pair.pack_keys(&keys, &mut scratch);
                    self.add_keys(&pair, &keys, &range, &mut scratch);
                    first += step;
                }
            }
        });
    }

    /// Adds the gradients of a packed chunk of keys, of those in `range`.
    fn add_keys<E: Engine>(
        &self,
        pair: &Pair<'_, '_, E>,
        keys: &Range<usize>,
        range: &Range<usize>,
        scratch: &mut Scratch<'_, E>,
    ) {
        let (stride, step) = (tile_stride::<E>(), pair.backward.layout.rows);
        for chunk in (0..pair.rows.len()).step_by(step) {
            let chunk = chunk..pair.rows.len().min(chunk + step);
            pair.pack_rows(&chunk, scratch);
            for first in (0..chunk.len()).step_by(E::BLOCK_ROWS) {
                let rows = first..chunk.len().min(first + E::BLOCK_ROWS);
                let block = pair.block(chunk.start, rows);
                for block_keys in Pair::<E>::key_blocks(&block, keys) {
                    if intersection(&block_keys, range).is_empty()
                        || !pair.gradients(
                            GradientOf::Logits,
                            Packing::Later,
                            &block,
                            &block_keys,
                            keys,
                            scratch,
                        )
                    {
                        continue;
                    }
                    let inside = intersection(&block_keys, range);
                    for (index, info) in block.infos().iter().enumerate() {
                        let row = if self.shape[2] == 1 { 0 } else { info.query - self.part.queries.start };
                        let d = &scratch.gradients[index * stride + inside.start - block_keys.start..]
                            [..inside.len()];
                        if self.shape[3] == 1 {
                            scratch.bias[row * self.columns] += d.iter().map(|d| d.to_f64()).sum::<f64>();
                        } else {
                            let first = row * self.columns + inside.start - self.part.keys.start;
                            for (sum, d) in scratch.bias[first..].iter_mut().zip(d) {
                                *sum += d.to_f64();
                            }
                        }
                    }
                }
            }
        }
    }
}
