//! Whether two strided tensors share an element.

use std::ops::Range;

use crate::TensorDesc;

/// Where a tensor lies: its lowest address, and the one behind its highest. Without bytes by default.
#[derive(Clone, Copy, Default)]
pub(super) struct Extent {
    first: usize,
    end: usize,
}

impl From<Range<usize>> for Extent {
    fn from(Range { start: first, end }: Range<usize>) -> Self {
        Self { first, end }
    }
}

impl Extent {
    pub(super) fn has_bytes(self) -> bool {
        self.first < self.end
    }

    /// Whether two have an address in common, gaps between elements included.
    pub(super) fn meets(self, other: Self) -> bool {
        let have_bytes = self.has_bytes() && other.has_bytes();
        have_bytes && self.first < other.end && other.first < self.end
    }
}

/// Whether an element of one tensor may be an element of the other. Exact for slices of one row-major buffer,
/// such as the parts of a fused QKV gradient; where a layout is too tangled to tell, the answer is yes.
pub(super) fn elements_meet(one: (Extent, &TensorDesc), other: (Extent, &TensorDesc)) -> bool {
    one.0.meets(other.0) && {
        let (a, b) = (Lattice::of(one.1), Lattice::of(other.1));
        let mut strides: Vec<i128> = a.axes.iter().chain(&b.axes).map(|&(stride, _)| stride).collect();
        strides.sort_unstable_by(|a, b| b.cmp(a));
        strides.dedup();
        meet(&a, &b, &strides, other.0.first as i128 - one.0.first as i128)
    }
}

/// The addresses of a tensor's elements, from its lowest on.
struct Lattice {
    /// Bytes of an element.
    element: i128,
    /// `(stride in bytes, size)` of the axes with more than one element, strides made positive.
    axes: Vec<(i128, i128)>,
}

impl Lattice {
    fn of(desc: &TensorDesc) -> Self {
        let element = desc.dtype().size() as i128;
        let axes = (desc.shape().iter().zip(desc.strides().iter()))
            .filter(|&(&size, _)| size > 1)
            .map(|(&size, &stride)| (stride.unsigned_abs() as i128 * element, size as i128))
            .collect();
        Self { element, axes }
    }

    /// The number of elements along the axis of this stride, and the bytes that one index of it and all
    /// smaller axes reach over. `None` where two axes have the stride.
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

/// Whether `a` and `b`, `delta` bytes behind it, meet in the axes of `strides` (largest first) and the
/// element.
fn meet(a: &Lattice, b: &Lattice, strides: &[i128], delta: i128) -> bool {
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
    // Index i of `a` and j of `b` lie in the same stride-sized block where i - j is `blocks`; the end of
    // `b`'s part may reach into the next block.
    let (blocks, rest) = (delta.div_euclid(stride), delta.rem_euclid(stride));
    let reachable = |difference: i128| -b_size < difference && difference < a_size;
    (reachable(blocks) && meet(a, b, smaller, rest))
        || (reachable(blocks + 1) && meet(a, b, smaller, rest - stride))
}

#[cfg(test)]
mod tests;
