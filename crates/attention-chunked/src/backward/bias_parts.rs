//! The parts that the gradient of the bias is computed in, and the sums of one.

use std::ops::Range;

use attention_core::{Problem, Role};

use crate::scratch::Pieces;

/// Keys of a part where the bias has an axis of keys: a multiple of every engine's block.
const PART_KEYS: usize = 512;

/// Queries of a part where the bias has an axis of queries.
const PART_QUERIES: usize = 64;

/// The ranges of the logits `[B, N, T, S]` that one part of `dbias` was broadcast to.
#[derive(Clone, Debug)]
pub(super) struct Part {
    pub(super) batches: Range<usize>,
    pub(super) heads: Range<usize>,
    pub(super) queries: Range<usize>,
    pub(super) keys: Range<usize>,
}

/// The shape of the gradient, if it is wanted.
pub(super) fn shape(problem: &Problem) -> Option<[usize; 4]> {
    let desc = problem.tensor(Role::DBias)?;
    Some(std::array::from_fn(|axis| desc.shape()[axis]))
}

/// The parts of the gradient: found by their number. Single indices or pieces along an axis that the bias
/// has, all of an axis that it does not have.
#[derive(Clone, Copy, Debug)]
pub(super) struct Parts {
    logits: [usize; 4],
    pieces: [usize; 4],
    counts: [usize; 4],
}

impl Parts {
    /// `None` where the gradient is not wanted.
    pub(super) fn of(problem: &Problem) -> Option<Self> {
        let shape = shape(problem)?;
        let logits = problem.dims().logits();
        let mut pieces = [1, 1, PART_QUERIES, PART_KEYS];
        let mut counts = [1; 4];
        for axis in 0..4 {
            if shape[axis] == 1 {
                pieces[axis] = logits[axis];
            } else {
                counts[axis] = logits[axis].div_ceil(pieces[axis]);
            }
        }
        Some(Self { logits, pieces, counts })
    }

    /// How many there are. No overflow: each has an element of the gradient.
    pub(super) fn count(&self) -> usize {
        if self.counts.contains(&0) { 0 } else { self.counts.iter().product() }
    }

    /// Part `number`.
    pub(super) fn at(&self, number: usize) -> Part {
        let (mut rest, mut ranges) = (number, [const { 0..0 }; 4]);
        for axis in (0..4).rev() {
            let start = rest % self.counts[axis] * self.pieces[axis];
            rest /= self.counts[axis];
            ranges[axis] = start..self.logits[axis].min(start.saturating_add(self.pieces[axis]));
        }
        let [batches, heads, queries, keys] = ranges;
        Part { batches, heads, queries, keys }
    }
}

/// Elements of the sums of the largest part.
pub(super) fn sums_len(problem: &Problem) -> usize {
    let Some(shape) = shape(problem) else { return 0 };
    let dims = problem.dims();
    let queries = if shape[2] == 1 { 1 } else { dims.query_length.min(PART_QUERIES) };
    let keys = if shape[3] == 1 { 1 } else { dims.key_length.min(PART_KEYS) };
    queries * keys
}

/// Bytes of the sums of the largest part; `None` on overflow.
pub(super) fn sums_bytes(problem: &Problem) -> Option<usize> {
    let mut pieces = Pieces::counting();
    let _ = pieces.take::<f64>(sums_len(problem));
    pieces.bytes()
}
