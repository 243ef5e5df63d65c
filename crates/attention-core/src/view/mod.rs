//! Tensors in memory that somebody else owns: type-erased, strided, tagged with their device.
//!
//! This module holds the crate's only `unsafe`: a view is a pointer, and the three ways of making one decide what
//! it may be used for. From a slice (safe, checked against the slice), from a part of another view (safe), from a
//! raw pointer (`unsafe`, the caller vouches for the memory).

#![allow(unsafe_code)]

mod host;
#[doc(hidden)]
pub mod red_zones;
mod scratch;

use std::marker::PhantomData;

pub use host::{HostView, HostViewMut, Row, RowMut};
pub use scratch::{LentScratch, SCRATCH_ALIGNMENT, Scratch, ScratchBuffer};

use crate::{Device, Dims, Element, InvalidCall, Strides, TensorDesc};

/// A tensor that is read. The crate `attention` has it as `attention::View`.
///
/// # Examples
/// ```
/// use attention_core::View; // or `attention::View`, which is the same
///
/// // A query [B, T, N, H] of ones, and the same memory seen as BNTH storage.
/// let data = vec![1.0f32; 2 * 3 * 4 * 8];
/// let query = View::from_slice(&data, [2, 3, 4, 8])?;
/// let stored_bnth = View::from_slice(&data, [2, 4, 3, 8])?.permute([0, 2, 1, 3])?;
/// assert_eq!(stored_bnth.shape(), query.shape());
/// # Ok::<(), attention_core::InvalidCall>(())
/// ```
#[derive(Clone, Copy, Debug)]
pub struct View<'a> {
    desc: TensorDesc,
    device: Device,
    // The element at index 0 on every axis. For a host view, the span of `desc` around it lies in memory that is
    // initialised and not written during 'a.
    pointer: *const u8,
    memory: PhantomData<&'a [u8]>,
}

// SAFETY: a View is a shared reference to plain data: every byte of its span is readable by any thread during 'a.
unsafe impl Send for View<'_> {}
// SAFETY: as above; a View has no interior mutability.
unsafe impl Sync for View<'_> {}

/// A tensor that is written.
///
/// No two indices reach the same element, and nothing else reaches its elements during `'a`; what lies between the
/// elements of a strided view may belong to others.
#[derive(Debug)]
pub struct ViewMut<'a> {
    desc: TensorDesc,
    device: Device,
    // As in View, with the elements (not the gaps between them) exclusive during 'a.
    pointer: *mut u8,
    memory: PhantomData<&'a mut [u8]>,
}

// SAFETY: a ViewMut is an exclusive reference to plain data and can move to another thread as one.
unsafe impl Send for ViewMut<'_> {}
// SAFETY: through a shared ViewMut only its description can be read.
unsafe impl Sync for ViewMut<'_> {}

/// Checks that a strided tensor whose first element is `offset` elements into a slice stays inside it.
fn check_slice(available: usize, offset: usize, desc: &TensorDesc) -> Result<(), InvalidCall> {
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
fn dense_desc<T: Element>(available: usize, shape: Dims) -> Result<TensorDesc, InvalidCall> {
    let desc = TensorDesc::contiguous(T::DTYPE, shape);
    let expected = desc.element_count().ok_or(InvalidCall::Overflow { what: "a view", shape })?;
    if expected != available {
        return Err(InvalidCall::BufferLength { shape, expected, available });
    }
    Ok(desc)
}

fn strided_desc<T: Element>(shape: Dims, strides: Strides) -> Result<TensorDesc, InvalidCall> {
    TensorDesc::strided(T::DTYPE, shape, strides)
        .ok_or(InvalidCall::StridesRank { shape: shape.rank(), strides: strides.rank() })
}

/// What a raw pointer must satisfy that can be checked.
fn check_pointer(address: usize, desc: &TensorDesc) -> Result<(), InvalidCall> {
    desc.span().ok_or(InvalidCall::Overflow { what: "a view", shape: desc.shape() })?;
    let (dtype, align) = (desc.dtype(), desc.dtype().size());
    if !desc.is_empty() && (address == 0 || !address.is_multiple_of(align)) {
        return Err(InvalidCall::Pointer { address, dtype, align });
    }
    Ok(())
}

fn check_self_overlap(desc: &TensorDesc) -> Result<(), InvalidCall> {
    if desc.may_overlap_itself() {
        return Err(InvalidCall::SelfOverlap { shape: desc.shape(), strides: desc.strides() });
    }
    Ok(())
}

macro_rules! shared_accessors {
    () => {
        /// Dtype, shape and strides.
        pub fn desc(&self) -> TensorDesc {
            self.desc
        }

        /// The shape.
        pub fn shape(&self) -> Dims {
            self.desc.shape()
        }

        /// Where the memory is.
        pub fn device(&self) -> Device {
            self.device
        }

        /// The lowest address of the view's memory and the one behind its highest, for overlap checks.
        pub(crate) fn address_range(&self) -> std::ops::Range<usize> {
            let first = self.pointer as usize;
            let size = self.desc.dtype().size() as isize;
            // The span was checked when the view was made.
            let (low, high) = self.desc.span().unwrap_or((0, -1));
            let at = |offset: isize| first.wrapping_add_signed(offset.wrapping_mul(size));
            at(low)..at(high.wrapping_add(1))
        }

        fn index_error(&self, what: impl FnOnce() -> String) -> InvalidCall {
            InvalidCall::ViewIndex { what: what(), shape: self.shape() }
        }

        /// The pointer to an element, by its offset from the first. Empty views keep their pointer: an offset into
        /// one has no element to point at.
        fn offset_pointer(&self, elements: isize) -> usize {
            (self.pointer as usize)
                .wrapping_add_signed(elements.wrapping_mul(self.desc.dtype().size() as isize))
        }

        /// The description of the part `range` of `axis`, and the offset of its first element.
        fn narrowed(
            &self,
            axis: usize,
            range: &std::ops::Range<usize>,
        ) -> Result<(TensorDesc, isize), InvalidCall> {
            let shape = self.desc.shape();
            if axis >= shape.rank() || range.start > range.end || range.end > shape[axis] {
                return Err(self.index_error(|| format!("range {range:?} of axis {axis}")));
            }
            Ok(self.part(axis, range))
        }

        /// As `narrowed`, for a range that is inside the axis.
        fn part(&self, axis: usize, range: &std::ops::Range<usize>) -> (TensorDesc, isize) {
            let (mut shape, strides) = (self.desc.shape(), self.desc.strides());
            shape[axis] = range.end - range.start;
            let desc = self.desc.reshaped(shape, strides);
            // An empty part has no element to point at.
            let offset = if desc.is_empty() { 0 } else { range.start as isize * strides[axis] };
            (desc, offset)
        }

        /// The description with axes in another order.
        fn permuted(&self, order: &[usize]) -> Result<TensorDesc, InvalidCall> {
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
        fn with_leading_axis(&self) -> Result<TensorDesc, InvalidCall> {
            let (shape, strides) = (self.desc.shape(), self.desc.strides());
            let (rank, max) = (shape.rank() + 1, crate::MAX_RANK);
            let too_large = InvalidCall::RankTooLarge { rank, max };
            let shape = Dims::from_slice(&[&[1], &shape[..]].concat()).ok_or_else(|| too_large.clone())?;
            let strides = Strides::from_slice(&[&[0], &strides[..]].concat()).ok_or(too_large)?;
            Ok(self.desc.reshaped(shape, strides))
        }
    };
}

impl<'a> View<'a> {
    shared_accessors!();

    /// A row-major tensor on a slice that holds exactly its elements.
    ///
    /// # Errors
    /// [`InvalidCall::BufferLength`] where the slice has another number of elements, [`InvalidCall::Overflow`].
    pub fn from_slice<T: Element>(data: &'a [T], shape: impl Into<Dims>) -> Result<Self, InvalidCall> {
        let desc = dense_desc::<T>(data.len(), shape.into())?;
        Ok(Self { desc, device: Device::Cpu, pointer: data.as_ptr().cast(), memory: PhantomData })
    }

    /// A strided tensor on a slice: strides in elements, the first element `offset` elements into the slice.
    ///
    /// # Errors
    /// [`InvalidCall::BufferTooSmall`] where an element lies outside the slice, [`InvalidCall::StridesRank`],
    /// [`InvalidCall::Overflow`].
    pub fn strided<T: Element>(
        data: &'a [T],
        offset: usize,
        shape: impl Into<Dims>,
        strides: impl Into<Strides>,
    ) -> Result<Self, InvalidCall> {
        let desc = strided_desc::<T>(shape.into(), strides.into())?;
        check_slice(data.len(), offset, &desc)?;
        let pointer = data.as_ptr().wrapping_add(if desc.is_empty() { 0 } else { offset }).cast();
        Ok(Self { desc, device: Device::Cpu, pointer, memory: PhantomData })
    }

    /// A strided mask on bytes, as other libraries store booleans: zero is `false`, everything else is `true`. As
    /// [`strided`](Self::strided) otherwise.
    ///
    /// # Errors
    /// As [`strided`](Self::strided).
    ///
    /// # Examples
    /// ```
    /// use attention_core::{DType, View}; // or of `attention`, which are the same
    ///
    /// let mask = View::strided_mask(&[1u8, 0, 255, 0], 0, [2, 2], [2, 1])?;
    /// assert_eq!(mask.desc().dtype(), DType::Bool);
    /// # Ok::<(), attention_core::InvalidCall>(())
    /// ```
    pub fn strided_mask(
        data: &'a [u8],
        offset: usize,
        shape: impl Into<Dims>,
        strides: impl Into<Strides>,
    ) -> Result<Self, InvalidCall> {
        // Booleans are read as bytes (`host_mask`), so every byte is one.
        let desc = strided_desc::<bool>(shape.into(), strides.into())?;
        check_slice(data.len(), offset, &desc)?;
        let pointer = data.as_ptr().wrapping_add(if desc.is_empty() { 0 } else { offset });
        Ok(Self { desc, device: Device::Cpu, pointer, memory: PhantomData })
    }

    /// A view of memory that Rust does not know: of another library, or of a device.
    ///
    /// # Errors
    /// [`InvalidCall::Pointer`] where the pointer is null or misaligned, [`InvalidCall::Overflow`].
    ///
    /// # Safety
    /// `pointer` is the element at index 0. During `'a` the memory from the lowest to the highest element is
    /// allocated on `device`, initialised, and not written by anybody.
    pub unsafe fn from_raw_parts(
        pointer: *const u8,
        device: Device,
        desc: TensorDesc,
    ) -> Result<Self, InvalidCall> {
        check_pointer(pointer as usize, &desc)?;
        Ok(Self { desc, device, pointer, memory: PhantomData })
    }

    /// The pointer to the element at index 0.
    pub fn as_ptr(&self) -> *const u8 {
        self.pointer
    }

    fn with(&self, desc: TensorDesc, offset: isize) -> Self {
        let pointer = self.pointer.with_addr(self.offset_pointer(offset));
        Self { desc, pointer, ..*self }
    }

    /// The part `range` of `axis`.
    ///
    /// # Errors
    /// [`InvalidCall::ViewIndex`].
    pub fn narrow(&self, axis: usize, range: std::ops::Range<usize>) -> Result<Self, InvalidCall> {
        let (desc, offset) = self.narrowed(axis, &range)?;
        Ok(self.with(desc, offset))
    }

    /// The tensor at `index` of `axis`, without that axis.
    ///
    /// # Errors
    /// [`InvalidCall::ViewIndex`].
    pub fn index_axis(&self, axis: usize, index: usize) -> Result<Self, InvalidCall> {
        let out_of_range = || self.index_error(|| format!("index {index} of axis {axis}"));
        let end = index.checked_add(1).ok_or_else(out_of_range)?;
        let (desc, offset) = self.narrowed(axis, &(index..end)).map_err(|_| out_of_range())?;
        Ok(self.with(desc.without_axis(axis), offset))
    }

    /// The same elements with the axes in another order: `permute([0, 2, 1, 3])` makes BTNH of BNTH storage.
    ///
    /// # Errors
    /// [`InvalidCall::ViewIndex`] where `order` is no permutation of the axes.
    pub fn permute(&self, order: impl AsRef<[usize]>) -> Result<Self, InvalidCall> {
        Ok(self.with(self.permuted(order.as_ref())?, 0))
    }

    /// The same with an axis of size 1 in front: a batch of one.
    ///
    /// # Errors
    /// [`InvalidCall::RankTooLarge`].
    pub fn unsqueeze(&self) -> Result<Self, InvalidCall> {
        Ok(self.with(self.with_leading_axis()?, 0))
    }

    /// The same elements repeated along axes of size 1, with stride 0.
    ///
    /// # Errors
    /// [`InvalidCall::ViewIndex`] where an axis of another size would have to change, or the ranks differ.
    pub fn expand(&self, shape: impl Into<Dims>) -> Result<Self, InvalidCall> {
        let (from, to) = (self.shape(), shape.into());
        let mut strides = self.desc.strides();
        if from.rank() != to.rank() || from.iter().zip(to.iter()).any(|(&old, &new)| old != new && old != 1) {
            return Err(self.index_error(|| format!("expansion to {to}")));
        }
        for axis in (0..from.rank()).filter(|&axis| from[axis] != to[axis]) {
            strides[axis] = 0;
        }
        let desc = self.desc.reshaped(to, strides);
        desc.span().ok_or(InvalidCall::Overflow { what: "a view", shape: to })?;
        Ok(self.with(desc, 0))
    }
}

impl<'a> ViewMut<'a> {
    shared_accessors!();

    /// A row-major tensor on a slice that holds exactly its elements.
    ///
    /// # Errors
    /// [`InvalidCall::BufferLength`] where the slice has another number of elements, [`InvalidCall::Overflow`].
    pub fn from_slice<T: Element>(data: &'a mut [T], shape: impl Into<Dims>) -> Result<Self, InvalidCall> {
        let desc = dense_desc::<T>(data.len(), shape.into())?;
        Ok(Self { desc, device: Device::Cpu, pointer: data.as_mut_ptr().cast(), memory: PhantomData })
    }

    /// A strided tensor on a slice: strides in elements, the first element `offset` elements into the slice.
    ///
    /// # Errors
    /// As [`View::strided`], and [`InvalidCall::SelfOverlap`] where two indices may reach the same element.
    pub fn strided<T: Element>(
        data: &'a mut [T],
        offset: usize,
        shape: impl Into<Dims>,
        strides: impl Into<Strides>,
    ) -> Result<Self, InvalidCall> {
        let desc = strided_desc::<T>(shape.into(), strides.into())?;
        check_slice(data.len(), offset, &desc)?;
        check_self_overlap(&desc)?;
        let pointer = data.as_mut_ptr().wrapping_add(if desc.is_empty() { 0 } else { offset }).cast();
        Ok(Self { desc, device: Device::Cpu, pointer, memory: PhantomData })
    }

    /// A view of memory that Rust does not know: of another library, or of a device.
    ///
    /// # Errors
    /// As [`View::from_raw_parts`], and [`InvalidCall::SelfOverlap`].
    ///
    /// # Safety
    /// `pointer` is the element at index 0. During `'a` every element is allocated on `device`, initialised if on the
    /// host, and neither read nor written through anything but this view. The gaps between elements may belong to
    /// others.
    pub unsafe fn from_raw_parts(
        pointer: *mut u8,
        device: Device,
        desc: TensorDesc,
    ) -> Result<Self, InvalidCall> {
        check_pointer(pointer as usize, &desc)?;
        check_self_overlap(&desc)?;
        Ok(Self { desc, device, pointer, memory: PhantomData })
    }

    /// The pointer to the element at index 0.
    pub fn as_mut_ptr(&mut self) -> *mut u8 {
        self.pointer
    }

    // Not public: the result has the lifetime of the whole, so two overlapping ones could be made of it.
    fn with(&self, desc: TensorDesc, offset: isize) -> Self {
        let pointer = self.pointer.with_addr(self.offset_pointer(offset));
        Self { desc, pointer, ..*self }
    }

    /// The same view for a shorter time.
    pub fn reborrow(&mut self) -> ViewMut<'_> {
        ViewMut { ..*self }
    }

    /// The part `range` of `axis`.
    ///
    /// # Errors
    /// [`InvalidCall::ViewIndex`].
    pub fn narrow(self, axis: usize, range: std::ops::Range<usize>) -> Result<Self, InvalidCall> {
        let (desc, offset) = self.narrowed(axis, &range)?;
        Ok(self.with(desc, offset))
    }

    /// The same elements with the axes in another order.
    ///
    /// # Errors
    /// [`InvalidCall::ViewIndex`] where `order` is no permutation of the axes.
    pub fn permute(self, order: impl AsRef<[usize]>) -> Result<Self, InvalidCall> {
        let desc = self.permuted(order.as_ref())?;
        Ok(self.with(desc, 0))
    }

    /// The same with an axis of size 1 in front: a batch of one.
    ///
    /// # Errors
    /// [`InvalidCall::RankTooLarge`].
    pub fn unsqueeze(self) -> Result<Self, InvalidCall> {
        let desc = self.with_leading_axis()?;
        Ok(self.with(desc, 0))
    }

    /// Cuts the view along `axis` into consecutive parts: the gradients of a fused QKV buffer `[B, T, N + 2K, H]`
    /// are its parts of sizes `N`, `K` and `K` along axis 2.
    ///
    /// # Errors
    /// [`InvalidCall::ViewIndex`] where the sizes do not add up to the axis.
    pub fn split<const PARTS: usize>(
        self,
        axis: usize,
        sizes: [usize; PARTS],
    ) -> Result<[ViewMut<'a>; PARTS], InvalidCall> {
        let total = sizes.iter().try_fold(0usize, |sum, &size| sum.checked_add(size));
        if self.shape().get(axis).copied() != total || total.is_none() {
            return Err(self.index_error(|| format!("split of axis {axis} into {sizes:?}")));
        }
        let mut start = 0;
        Ok(sizes.map(|size| {
            let range = start..start + size;
            start = range.end;
            let (desc, offset) = self.part(axis, &range);
            // The ranges are disjoint and no two indices of the whole meet, so the parts are exclusive.
            self.with(desc, offset)
        }))
    }

    /// Cuts the view along `axis` into parts of `size`, the last one shorter where it does not divide. Empty where
    /// the view has no such axis; a `size` of 0 counts as 1.
    pub fn into_chunks(self, axis: usize, size: usize) -> impl ExactSizeIterator<Item = ViewMut<'a>> {
        let (length, size) = (self.shape().get(axis).copied().unwrap_or(0), size.max(1));
        (0..length.div_ceil(size)).map(move |index| {
            let start = index * size;
            let (desc, offset) = self.part(axis, &(start..length.min(start.saturating_add(size))));
            // As in `split`: the ranges are disjoint and visited once each.
            self.with(desc, offset)
        })
    }

    /// Cuts the view into one tensor for each index of `axis`, without that axis: the way to hand parts of an
    /// output to several threads. Empty where the view has no such axis.
    pub fn into_axis(self, axis: usize) -> impl ExactSizeIterator<Item = ViewMut<'a>> {
        let size = self.shape().get(axis).copied().unwrap_or(0);
        (0..size).map(move |index| {
            let (desc, offset) = self.part(axis, &(index..index + 1));
            // As in `split`: indices are visited once each.
            self.with(desc.without_axis(axis), offset)
        })
    }
}

#[cfg(test)]
mod tests;
