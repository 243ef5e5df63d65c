//! The pieces of a worker's scratch memory: their sizes are computed by the code that hands them out.

use attention_core::{SCRATCH_ALIGNMENT, red_zones};
use bytemuck::Pod;

/// Hands out consecutive aligned pieces of memory, or counts what they would take.
pub(crate) struct Pieces<'a> {
    rest: Option<&'a mut [u8]>,
    bytes: Option<usize>,
}

impl<'a> Pieces<'a> {
    /// Counts alone: every piece is empty.
    pub(crate) const fn counting() -> Self {
        Self { rest: None, bytes: Some(0) }
    }

    /// Hands out pieces of `memory`, which is aligned to [`SCRATCH_ALIGNMENT`].
    pub(crate) fn of(memory: &'a mut [u8]) -> Self {
        red_zones::recut(memory);
        Self { rest: Some(memory), bytes: Some(0) }
    }

    /// The next `count` elements, with whatever the memory holds.
    ///
    /// # Panics
    /// Where the memory is used up: it was sized with other numbers.
    pub(crate) fn take<T: Pod>(&mut self, count: usize) -> &'a mut [T] {
        // A piece without elements has no red zone either.
        let red_zone = if count == 0 { 0 } else { red_zones::BYTES };
        let bytes = (count.checked_mul(size_of::<T>()))
            .and_then(|bytes| bytes.checked_next_multiple_of(SCRATCH_ALIGNMENT)?.checked_add(red_zone));
        self.bytes = self.bytes.zip(bytes).and_then(|(sum, bytes)| sum.checked_add(bytes));
        let Some(rest) = &mut self.rest else { return &mut [] };
        if count == 0 {
            // Memory without bytes need not be aligned.
            return &mut [];
        }
        let bytes = bytes.expect("sizes were checked when the scratch was sized");
        let (piece, rest_of_it) = std::mem::take(rest).split_at_mut(bytes);
        *rest = rest_of_it;
        let (elements, behind) = piece.split_at_mut(count * size_of::<T>());
        red_zones::guard(behind);
        bytemuck::cast_slice_mut(elements)
    }

    /// Bytes of all pieces so far; `None` on overflow.
    pub(crate) const fn bytes(&self) -> Option<usize> {
        self.bytes
    }
}
