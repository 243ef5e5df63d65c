//! Tensors in memory that somebody else owns: type-erased, strided, tagged with their device.
//!
//! This module holds the crate's only `unsafe`: a view is a pointer, and the three ways of making one decide
//! what it may be used for. From a slice (safe, checked against the slice), from a part of another view
//! (safe), from a raw pointer (`unsafe`, the caller vouches for the memory).

#![allow(unsafe_code)]

mod host;
mod pointer;
mod raw;
#[doc(hidden)]
pub mod red_zones;
mod scratch;

use std::marker::PhantomData;
use std::ops::Range;

pub use host::{HeadView, HostView, HostViewMut, Row, RowMut, RowRun, RowStretch};
pub use scratch::{LentScratch, SCRATCH_ALIGNMENT, Scratch, ScratchBuffer};

use self::pointer::Pointer;
use self::raw::{RawView, check_pointer, check_self_overlap, check_slice, dense_desc, strided_desc};
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
    // For a host view, the span of the description around the pointer lies in memory that is initialised and
    // not written during 'a.
    raw: RawView,
    memory: PhantomData<&'a [u8]>,
}

// SAFETY: a View is a shared reference to plain data: every byte of its span is readable by any thread during
// 'a.
unsafe impl Send for View<'_> {}
// SAFETY: a View is Copy and has no interior mutability, so two threads with one can only read what a Send of
// a copy would let them read.
unsafe impl Sync for View<'_> {}

/// A tensor that is written.
///
/// No two indices reach the same element, and nothing else reaches its elements during `'a`; what lies
/// between the elements of a strided view may belong to others.
#[derive(Debug)]
pub struct ViewMut<'a> {
    // As in View, with the elements (not the gaps between them) exclusive during 'a, and a pointer that may
    // be written through.
    raw: RawView,
    memory: PhantomData<&'a mut [u8]>,
}

// SAFETY: a ViewMut is an exclusive reference to plain data and can move to another thread as one.
unsafe impl Send for ViewMut<'_> {}
// SAFETY: through a shared ViewMut only its description can be read.
unsafe impl Sync for ViewMut<'_> {}

impl<'a> View<'a> {
    /// Dtype, shape and strides.
    #[inline]
    pub fn desc(&self) -> TensorDesc {
        self.raw.desc
    }

    /// The shape.
    #[inline]
    pub fn shape(&self) -> Dims {
        self.raw.desc.shape()
    }

    /// Where the memory is.
    #[inline]
    pub fn device(&self) -> Device {
        self.raw.device
    }

    /// [`desc`](Self::desc) where it lies.
    #[inline]
    pub(crate) fn desc_ref(&self) -> &TensorDesc {
        &self.raw.desc
    }

    /// The lowest address of the view's memory and the one behind its highest, for overlap checks.
    pub(crate) fn address_range(&self) -> Range<usize> {
        self.raw.address_range()
    }

    /// A row-major tensor on a slice that holds exactly its elements.
    ///
    /// # Errors
    /// [`InvalidCall::BufferLength`] where the slice has another number of elements,
    /// [`InvalidCall::Overflow`].
    pub fn from_slice<T: Element>(data: &'a [T], shape: impl Into<Dims>) -> Result<Self, InvalidCall> {
        let desc = dense_desc::<T>(data.len(), shape.into())?;
        Ok(Self { raw: RawView::on_host(data.as_ptr(), 0, desc), memory: PhantomData })
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
        Ok(Self { raw: RawView::on_host(data.as_ptr(), offset, desc), memory: PhantomData })
    }

    /// A strided mask on bytes, as other libraries store booleans: zero is `false`, everything else is
    /// `true`. As [`strided`](Self::strided) otherwise.
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
        Ok(Self { raw: RawView::on_host(data.as_ptr(), offset, desc), memory: PhantomData })
    }

    /// A view of memory that Rust does not know: of another library, or of a device.
    ///
    /// # Errors
    /// [`InvalidCall::Pointer`] where the pointer is null or misaligned, [`InvalidCall::Overflow`].
    ///
    /// # Safety
    /// `pointer` is the element at index 0. During `'a` the memory from the lowest to the highest element is
    /// allocated on `device`, initialised if on the host, and not written by anybody. In device memory all of
    /// this holds until the work of every call that was given the view has ended on its stream, which may be
    /// after `'a`: a call returns when its kernels are launched.
    pub unsafe fn from_raw_parts(
        pointer: *const u8,
        device: Device,
        desc: TensorDesc,
    ) -> Result<Self, InvalidCall> {
        let pointer = Pointer::new(pointer);
        check_pointer(pointer, &desc)?;
        Ok(Self { raw: RawView { desc, device, pointer }, memory: PhantomData })
    }

    /// The pointer to the element at index 0.
    pub fn as_ptr(&self) -> *const u8 {
        self.raw.pointer.as_ptr()
    }

    fn with(&self, desc: TensorDesc, offset: isize) -> Self {
        Self { raw: self.raw.with(desc, offset), memory: PhantomData }
    }

    /// The part `range` of `axis`.
    ///
    /// # Errors
    /// [`InvalidCall::ViewIndex`].
    pub fn narrow(&self, axis: usize, range: Range<usize>) -> Result<Self, InvalidCall> {
        let (desc, offset) = self.raw.narrowed(axis, &range)?;
        Ok(self.with(desc, offset))
    }

    /// The tensor at `index` of `axis`, without that axis.
    ///
    /// # Errors
    /// [`InvalidCall::ViewIndex`].
    pub fn index_axis(&self, axis: usize, index: usize) -> Result<Self, InvalidCall> {
        let out_of_range = || self.raw.index_error(|| format!("index {index} of axis {axis}"));
        let end = index.checked_add(1).ok_or_else(out_of_range)?;
        let (desc, offset) = self.raw.narrowed(axis, &(index..end)).map_err(|_| out_of_range())?;
        Ok(self.with(desc.without_axis(axis), offset))
    }

    /// The same elements with the axes in another order: `permute([0, 2, 1, 3])` makes BTNH of BNTH storage.
    ///
    /// # Errors
    /// [`InvalidCall::ViewIndex`] where `order` is no permutation of the axes.
    pub fn permute(&self, order: impl AsRef<[usize]>) -> Result<Self, InvalidCall> {
        Ok(self.with(self.raw.permuted(order.as_ref())?, 0))
    }

    /// The same with an axis of size 1 in front: a batch of one.
    ///
    /// # Errors
    /// [`InvalidCall::RankTooLarge`].
    pub fn unsqueeze(&self) -> Result<Self, InvalidCall> {
        Ok(self.with(self.raw.with_leading_axis()?, 0))
    }

    /// The same elements repeated along axes of size 1, with stride 0.
    ///
    /// # Errors
    /// [`InvalidCall::ViewIndex`] where an axis of another size would have to change, or the ranks differ.
    pub fn expand(&self, shape: impl Into<Dims>) -> Result<Self, InvalidCall> {
        let (from, to) = (self.shape(), shape.into());
        let mut strides = self.raw.desc.strides();
        if from.rank() != to.rank() || from.iter().zip(to.iter()).any(|(&old, &new)| old != new && old != 1) {
            return Err(self.raw.index_error(|| format!("expansion to {to}")));
        }
        for axis in (0..from.rank()).filter(|&axis| from[axis] != to[axis]) {
            strides[axis] = 0;
        }
        let desc = self.raw.desc.reshaped(to, strides);
        desc.span().ok_or(InvalidCall::Overflow { what: "a view", shape: to })?;
        Ok(self.with(desc, 0))
    }
}

impl<'a> ViewMut<'a> {
    /// Dtype, shape and strides.
    #[inline]
    pub fn desc(&self) -> TensorDesc {
        self.raw.desc
    }

    /// The shape.
    #[inline]
    pub fn shape(&self) -> Dims {
        self.raw.desc.shape()
    }

    /// Where the memory is.
    #[inline]
    pub fn device(&self) -> Device {
        self.raw.device
    }

    /// [`desc`](Self::desc) where it lies.
    #[inline]
    pub(crate) fn desc_ref(&self) -> &TensorDesc {
        &self.raw.desc
    }

    /// The lowest address of the view's memory and the one behind its highest, for overlap checks.
    pub(crate) fn address_range(&self) -> Range<usize> {
        self.raw.address_range()
    }

    /// A row-major tensor on a slice that holds exactly its elements.
    ///
    /// # Errors
    /// [`InvalidCall::BufferLength`] where the slice has another number of elements,
    /// [`InvalidCall::Overflow`].
    pub fn from_slice<T: Element>(data: &'a mut [T], shape: impl Into<Dims>) -> Result<Self, InvalidCall> {
        let desc = dense_desc::<T>(data.len(), shape.into())?;
        Ok(Self { raw: RawView::on_host(data.as_mut_ptr(), 0, desc), memory: PhantomData })
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
        Ok(Self { raw: RawView::on_host(data.as_mut_ptr(), offset, desc), memory: PhantomData })
    }

    /// A view of memory that Rust does not know: of another library, or of a device.
    ///
    /// # Errors
    /// As [`View::from_raw_parts`], and [`InvalidCall::SelfOverlap`].
    ///
    /// # Safety
    /// `pointer` is the element at index 0. During `'a` every element is allocated on `device`, initialised
    /// if on the host, and neither read nor written through anything but this view; in device memory until
    /// the work of every call that was given the view has ended on its stream, as for
    /// [`View::from_raw_parts`]. The gaps between elements may belong to others.
    pub unsafe fn from_raw_parts(
        pointer: *mut u8,
        device: Device,
        desc: TensorDesc,
    ) -> Result<Self, InvalidCall> {
        let pointer = Pointer::new(pointer);
        check_pointer(pointer, &desc)?;
        check_self_overlap(&desc)?;
        Ok(Self { raw: RawView { desc, device, pointer }, memory: PhantomData })
    }

    /// The pointer to the element at index 0.
    pub fn as_mut_ptr(&mut self) -> *mut u8 {
        self.raw.pointer.as_mut_ptr()
    }

    // Not public: the result has the lifetime of the whole, so two overlapping ones could be made of it.
    fn with(&self, desc: TensorDesc, offset: isize) -> Self {
        Self { raw: self.raw.with(desc, offset), memory: PhantomData }
    }

    /// The same view for a shorter time.
    pub fn reborrow(&mut self) -> ViewMut<'_> {
        ViewMut { raw: self.raw, memory: PhantomData }
    }

    /// The part `range` of `axis`.
    ///
    /// # Errors
    /// [`InvalidCall::ViewIndex`].
    pub fn narrow(self, axis: usize, range: Range<usize>) -> Result<Self, InvalidCall> {
        let (desc, offset) = self.raw.narrowed(axis, &range)?;
        Ok(self.with(desc, offset))
    }

    /// The same elements with the axes in another order.
    ///
    /// # Errors
    /// [`InvalidCall::ViewIndex`] where `order` is no permutation of the axes.
    pub fn permute(self, order: impl AsRef<[usize]>) -> Result<Self, InvalidCall> {
        let desc = self.raw.permuted(order.as_ref())?;
        Ok(self.with(desc, 0))
    }

    /// The same with an axis of size 1 in front: a batch of one.
    ///
    /// # Errors
    /// [`InvalidCall::RankTooLarge`].
    pub fn unsqueeze(self) -> Result<Self, InvalidCall> {
        let desc = self.raw.with_leading_axis()?;
        Ok(self.with(desc, 0))
    }

    /// Cuts the view along `axis` into consecutive parts: the gradients of a fused QKV buffer `[B, T, N + 2K,
    /// H]` are its parts of sizes `N`, `K` and `K` along axis 2.
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
            return Err(self.raw.index_error(|| format!("split of axis {axis} into {sizes:?}")));
        }
        let mut start = 0;
        Ok(sizes.map(|size| {
            let range = start..start + size;
            start = range.end;
            let (desc, offset) = self.raw.part(axis, &range);
            // The ranges are disjoint and no two indices of the whole meet, so the parts are exclusive.
            self.with(desc, offset)
        }))
    }

    /// Cuts the view along `axis` into parts of `size`, the last one shorter where it does not divide. Empty
    /// where the view has no such axis; a `size` of 0 counts as 1.
    pub fn into_chunks(self, axis: usize, size: usize) -> impl ExactSizeIterator<Item = ViewMut<'a>> {
        let (length, size) = (self.shape().get(axis).copied().unwrap_or(0), size.max(1));
        (0..length.div_ceil(size)).map(move |index| {
            let start = index * size;
            let (desc, offset) = self.raw.part(axis, &(start..length.min(start.saturating_add(size))));
            // As in `split`: the ranges are disjoint and visited once each.
            self.with(desc, offset)
        })
    }

    /// Cuts the view into one tensor for each index of `axis`, without that axis: the way to hand parts of an
    /// output to several threads. Empty where the view has no such axis.
    pub fn into_axis(self, axis: usize) -> impl ExactSizeIterator<Item = ViewMut<'a>> {
        let size = self.shape().get(axis).copied().unwrap_or(0);
        (0..size).map(move |index| {
            let (desc, offset) = self.raw.part(axis, &(index..index + 1));
            // As in `split`: indices are visited once each.
            self.with(desc.without_axis(axis), offset)
        })
    }
}

#[cfg(test)]
mod tests;
