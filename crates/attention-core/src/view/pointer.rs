//! Where a tensor begins.

/// Where the element at index 0 of a tensor is: an address of the host or of a device. What is done with
/// addresses of tensors is done here, so that memory which has none (a buffer of a graphics library, with an
/// offset) has one place to go.
///
/// Whether it may be written through is the promise of the view that holds it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Pointer(*mut u8);

impl Pointer {
    pub(super) fn new(pointer: *const u8) -> Self {
        Self(pointer.cast_mut())
    }

    /// The number of the address, for comparisons.
    #[inline]
    pub(super) fn address(self) -> usize {
        self.0 as usize
    }

    /// The pointer this many bytes behind, with the provenance of this one. Wraps: where there is an element,
    /// the offset was checked.
    #[inline]
    pub(super) fn offset(self, bytes: isize) -> Self {
        Self(self.0.wrapping_offset(bytes))
    }

    #[inline]
    pub(super) fn as_ptr(self) -> *const u8 {
        self.0
    }

    #[inline]
    pub(super) fn as_mut_ptr(self) -> *mut u8 {
        self.0
    }
}
