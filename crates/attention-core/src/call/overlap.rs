//! Whether two strided tensors share an element.

use std::ops::Range;

use crate::{Role, TensorDesc};

/// A tensor and where it lies.
pub(super) struct Placed {
    pub(super) role: Role,
    range: Range<usize>,
    /// The lowest address.
    start: i128,
    element: i128,
    /// `(stride in bytes, size)` of the axes with more than one element, strides made positive.
    axes: Vec<(i128, i128)>,
}

impl Placed {
    /// `range` goes from the lowest address to behind the highest.
    pub(super) fn new(role: Role, range: Range<usize>, desc: TensorDesc) -> Self {
        let element = desc.dtype().size() as i128;
        let axes = (desc.shape().iter().zip(desc.strides().iter()))
            .filter(|&(&size, _)| size > 1)
            .map(|(&size, &stride)| (stride.unsigned_abs() as i128 * element, size as i128))
            .collect();
        Self { role, start: range.start as i128, range, element, axes }
    }

    /// Whether the address ranges meet, gaps included.
    pub(super) fn range_meets(&self, other: &Self) -> bool {
        !self.range.is_empty()
            && !other.range.is_empty()
            && self.range.start < other.range.end
            && other.range.start < self.range.end
    }

    /// Whether an element of one may be an element of the other. Exact for slices of one row-major buffer, such as
    /// the parts of a fused QKV gradient; where a layout is too tangled to tell, the answer is yes.
    pub(super) fn meets(&self, other: &Self) -> bool {
        if !self.range_meets(other) {
            return false;
        }
        let mut strides: Vec<i128> = self.axes.iter().chain(&other.axes).map(|&(stride, _)| stride).collect();
        strides.sort_unstable_by(|a, b| b.cmp(a));
        strides.dedup();
        meet(self, other, &strides, other.start - self.start)
    }

    /// The number of elements along the axis of this stride, and the bytes that one index of it and all smaller
    /// axes reach over. `None` where two axes have the stride.
    fn level(&self, stride: i128) -> Option<(i128, i128)> {
        let mut same = self.axes.iter().filter(|axis| axis.0 == stride);
        let size = same.next().map_or(1, |axis| axis.1);
        same.next().is_none().then_some((size, self.reach(stride - 1)))
    }

    /// The bytes from the first to behind the last that the axes up to this stride reach.
    fn reach(&self, largest: i128) -> i128 {
        let axes = self.axes.iter().filter(|axis| axis.0 <= largest);
        self.element + axes.map(|&(stride, size)| stride * (size - 1)).sum::<i128>()
    }
}

/// Whether `a` and `b`, `delta` bytes behind it, meet in the axes of `strides` (largest first) and the element.
fn meet(a: &Placed, b: &Placed, strides: &[i128], delta: i128) -> bool {
    let Some((&stride, smaller)) = strides.split_first() else {
        return -b.element < delta && delta < a.element;
    };
    // Whole parts that lie one behind the other: rows of another length in one fused buffer, for example.
    if delta >= a.reach(stride) || -delta >= b.reach(stride) {
        return false;
    }
    let (Some((a_size, a_reach)), Some((b_size, b_reach))) = (a.level(stride), b.level(stride)) else {
        return true;
    };
    if stride == 0 || a_reach > stride || b_reach > stride {
        return true;
    }
    // Index i of `a` and j of `b` lie in the same stride-sized block where i - j is `blocks`; the end of `b`'s part
    // may reach into the next block.
    let (blocks, rest) = (delta.div_euclid(stride), delta.rem_euclid(stride));
    let reachable = |difference: i128| -b_size < difference && difference < a_size;
    (reachable(blocks) && meet(a, b, smaller, rest))
        || (reachable(blocks + 1) && meet(a, b, smaller, rest - stride))
}

#[cfg(test)]
mod tests;
