//! What views that are read and views that are written have in common.

use std::ops::Range;

use super::pointer::Pointer;
use crate::{Device, Dims, Element, InvalidCall, Strides, TensorDesc};

/// A tensor's description, and where its element at index 0 is. Says nothing of who may reach the memory, and
/// for how long: that is the promise of the view around it.
#[derive(Clone, Copy, Debug)]
pub(super) struct RawView {
    pub(super) desc: TensorDesc,
    pub(super) device: Device,
    pub(super) pointer: Pointer,
}

impl RawView {
    /// On host memory of a slice, whose first element is `offset` elements into it. Of a slice that may be
    /// written, the pointer may be written through.
    pub(super) fn on_host<T>(data: *const T, offset: usize, desc: TensorDesc) -> Self {
        // An offset into an empty view has no element to point at.
        let first = data.wrapping_add(if desc.is_empty() { 0 } else { offset });
        Self { desc, device: Device::Cpu, pointer: Pointer::new(first.cast()) }
    }

    /// The lowest address of the view's memory and the one behind its highest, for overlap checks.
    pub(super) fn address_range(&self) -> Range<usize> {
        // The span was checked when the view was made.
        let (low, high) = self.desc.known_span();
        self.at(low).address()..self.at(high.wrapping_add(1)).address()
    }

    pub(super) fn index_error(&self, what: impl FnOnce() -> String) -> InvalidCall {
        InvalidCall::ViewIndex { what: what(), shape: self.desc.shape() }
    }

    /// Where the element is that is this many elements behind the first. Empty views keep their pointer: an
    /// offset into one has no element to point at.
    #[inline]
    pub(super) fn at(&self, elements: isize) -> Pointer {
        self.pointer.offset(elements.wrapping_mul(self.desc.dtype().size() as isize))
    }

    /// Another view of the same memory, whose first element is this many elements behind the first of this
    /// one.
    pub(super) fn with(&self, desc: TensorDesc, elements: isize) -> Self {
        Self { desc, pointer: self.at(elements), ..*self }
    }

    /// The description of the part `range` of `axis`, and the offset of its first element.
    pub(super) fn narrowed(
        &self,
        axis: usize,
        range: &Range<usize>,
    ) -> Result<(TensorDesc, isize), InvalidCall> {
        let shape = self.desc.shape();
        if axis >= shape.rank() || range.start > range.end || range.end > shape[axis] {
            return Err(self.index_error(|| format!("range {range:?} of axis {axis}")));
        }
        Ok(self.part(axis, range))
    }

    /// As `narrowed`, for a range that is inside the axis.
    pub(super) fn part(&self, axis: usize, range: &Range<usize>) -> (TensorDesc, isize) {
        let (mut shape, strides) = (self.desc.shape(), self.desc.strides());
        shape[axis] = range.end - range.start;
        let desc = self.desc.reshaped(shape, strides);
        // An empty part has no element to point at.
        let offset = if desc.is_empty() { 0 } else { range.start as isize * strides[axis] };
        (desc, offset)
    }

    /// The description with axes in another order.
    pub(super) fn permuted(&self, order: &[usize]) -> Result<TensorDesc, InvalidCall> {
        let (shape, strides) = (self.desc.shape(), self.desc.strides());
        let mut sorted = order.to_vec();
        sorted.sort_unstable();
        if !sorted.into_iter().eq(0..shape.rank()) {
            return Err(self.index_error(|| format!("axis order {order:?}")));
        }
        let (mut new_shape, mut new_strides) = (shape, strides);
        for (to, &from) in order.iter().enumerate() {
            (new_shape[to], new_strides[to]) = (shape[from], strides[from]);
        }
        Ok(self.desc.reshaped(new_shape, new_strides))
    }

    /// The description with an axis of size 1 in front.
    pub(super) fn with_leading_axis(&self) -> Result<TensorDesc, InvalidCall> {
        let (rank, max) = (self.desc.rank() + 1, crate::MAX_RANK);
        self.desc.with_leading_axis().ok_or(InvalidCall::RankTooLarge { rank, max })
    }
}

/// Checks that a strided tensor whose first element is `offset` elements into a slice stays inside it.
pub(super) fn check_slice(available: usize, offset: usize, desc: &TensorDesc) -> Result<(), InvalidCall> {
    let (shape, strides) = (desc.shape(), desc.strides());
    let (low, high) = desc.span().ok_or(InvalidCall::Overflow { what: "a view", shape })?;
    if desc.is_empty() {
        return Ok(());
    }
    let first = offset as i128 + low as i128;
    let last = offset as i128 + high as i128;
    if first < 0 || last >= available as i128 {
        return Err(InvalidCall::BufferTooSmall { shape, strides, offset, first, last, available });
    }
    Ok(())
}

/// A dense tensor on a slice of exactly its elements.
pub(super) fn dense_desc<T: Element>(available: usize, shape: Dims) -> Result<TensorDesc, InvalidCall> {
    let desc = TensorDesc::contiguous(T::DTYPE, shape);
    let expected = desc.element_count().ok_or(InvalidCall::Overflow { what: "a view", shape })?;
    if expected != available {
        return Err(InvalidCall::BufferLength { shape, expected, available });
    }
    Ok(desc)
}

pub(super) fn strided_desc<T: Element>(shape: Dims, strides: Strides) -> Result<TensorDesc, InvalidCall> {
    TensorDesc::strided(T::DTYPE, shape, strides)
        .ok_or(InvalidCall::StridesRank { shape: shape.rank(), strides: strides.rank() })
}

/// What a raw pointer must satisfy that can be checked.
pub(super) fn check_pointer(pointer: Pointer, desc: &TensorDesc) -> Result<(), InvalidCall> {
    desc.span().ok_or(InvalidCall::Overflow { what: "a view", shape: desc.shape() })?;
    let (address, dtype, align) = (pointer.address(), desc.dtype(), desc.dtype().size());
    if !desc.is_empty() && (address == 0 || !address.is_multiple_of(align)) {
        return Err(InvalidCall::Pointer { address, dtype, align });
    }
    Ok(())
}

pub(super) fn check_self_overlap(desc: &TensorDesc) -> Result<(), InvalidCall> {
    if desc.may_overlap_itself() {
        return Err(InvalidCall::SelfOverlap { shape: desc.shape(), strides: desc.strides() });
    }
    Ok(())
}
