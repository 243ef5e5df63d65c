//! Cuts scratch memory into typed pieces.

use attention_core::{SCRATCH_ALIGNMENT, red_zones};
use bytemuck::Pod;

/// Bytes that [`Carver::take`] uses for this many elements; `None` on overflow.
pub(crate) fn piece_bytes<T>(count: usize) -> Option<usize> {
    count
        .checked_mul(size_of::<T>())?
        .checked_next_multiple_of(SCRATCH_ALIGNMENT)?
        .checked_add(red_zones::BYTES)
}

/// Hands out consecutive aligned pieces of scratch memory.
pub(crate) struct Carver<'a> {
    rest: &'a mut [u8],
}

impl<'a> Carver<'a> {
    /// `bytes` must be aligned to [`SCRATCH_ALIGNMENT`].
    pub(crate) fn new(bytes: &'a mut [u8]) -> Self {
        red_zones::recut(bytes);
        Self { rest: bytes }
    }

    /// The next `count` elements, with whatever the memory holds.
    ///
    /// # Panics
    /// Where the memory is used up: the sizes were computed by other rules than the pieces.
    pub(crate) fn take<T: Pod>(&mut self, count: usize) -> &'a mut [T] {
        let bytes = piece_bytes::<T>(count).expect("sizes were checked when the scratch was sized");
        let (piece, rest) = std::mem::take(&mut self.rest).split_at_mut(bytes);
        self.rest = rest;
        let (elements, behind) = piece.split_at_mut(count * size_of::<T>());
        red_zones::guard(behind);
        bytemuck::cast_slice_mut(elements)
    }
}
