//! The parts into which the gradient of the bias is cut, and what one of them takes.

use std::ops::Range;

use attention_core::{Problem, Role};

use crate::scratch::piece_bytes;

/// Keys of a part where the bias has an axis of keys.
pub(super) const PART_KEYS: usize = 4096;

/// Queries of a part where the bias has an axis of queries.
pub(super) const PART_QUERIES: usize = 128;

/// The ranges of the logits `[B, N, T, S]` that one part of `dbias` was broadcast to.
#[derive(Clone, Debug)]
pub(super) struct Part {
    pub(super) batches: Range<usize>,
    pub(super) heads: Range<usize>,
    pub(super) queries: Range<usize>,
    pub(super) keys: Range<usize>,
}

/// How an axis of the logits is cut: into single indices or pieces where the bias has the axis, not at all
/// where it does not.
#[derive(Clone, Copy, Debug)]
struct Axis {
    size: usize,
    piece: usize,
}

impl Axis {
    fn of(size: usize, bias_size: usize, piece: usize) -> Self {
        Self { size, piece: if bias_size == 1 { usize::MAX } else { piece } }
    }

    /// How many pieces there are: one where the bias has no such axis, also of nothing.
    fn count(self) -> usize {
        if self.piece == usize::MAX { 1 } else { self.size.div_ceil(self.piece) }
    }

    fn pieces(self) -> impl Iterator<Item = Range<usize>> + Clone + Send {
        (0..self.count()).map(move |index| {
            let start = index * self.piece;
            start..self.size.min(start.saturating_add(self.piece))
        })
    }

    /// Elements of the gradient in the largest piece.
    fn elements(self) -> usize {
        if self.piece == usize::MAX { 1 } else { self.size.min(self.piece) }
    }
}

pub(super) fn bias_shape(problem: &Problem) -> Option<[usize; 4]> {
    let desc = problem.tensor(Role::DBias)?;
    Some(std::array::from_fn(|axis| desc.shape()[axis]))
}

fn axes(problem: &Problem, shape: [usize; 4]) -> [Axis; 4] {
    let [batch, heads, queries, keys] = problem.dims().logits();
    [
        Axis::of(batch, shape[0], 1),
        Axis::of(heads, shape[1], 1),
        Axis::of(queries, shape[2], PART_QUERIES),
        Axis::of(keys, shape[3], PART_KEYS),
    ]
}

/// The parts, in the order of batch rows, heads, queries and keys.
pub(super) fn parts(problem: &Problem, shape: [usize; 4]) -> impl Iterator<Item = Part> + Send {
    let [batches, heads, queries, keys] = axes(problem, shape);
    batches.pieces().flat_map(move |batches| {
        heads.pieces().flat_map(move |heads| {
            let batches = batches.clone();
            queries.pieces().flat_map(move |queries| {
                let (batches, heads) = (batches.clone(), heads.clone());
                keys.pieces().map(move |keys| {
                    let [batches, heads, queries] = [&batches, &heads, &queries].map(Clone::clone);
                    Part { batches, heads, queries, keys }
                })
            })
        })
    })
}

/// How many parts can run side by side.
pub(super) fn task_count(problem: &Problem) -> usize {
    let count =
        |shape| axes(problem, shape).into_iter().fold(1usize, |n, axis| n.saturating_mul(axis.count()));
    bias_shape(problem).map_or(0, count)
}

/// Elements of the sums of the largest part.
fn sums_elements(problem: &Problem, shape: [usize; 4]) -> Option<usize> {
    let [_, _, queries, keys] = axes(problem, shape);
    queries.elements().checked_mul(keys.elements())
}

/// Bytes of the sums of a part: 0 where the gradient is not wanted, `None` on overflow.
pub(super) fn sums_bytes(problem: &Problem) -> Option<usize> {
    let Some(shape) = bias_shape(problem) else { return Some(0) };
    piece_bytes::<f64>(sums_elements(problem, shape)?)
}
