//! The pieces of a worker's scratch memory: their sizes are computed by the code that hands them out.

use attention_core::{SCRATCH_ALIGNMENT, red_zones};
use bytemuck::Pod;

/// The next multiple, or the largest number where there is none: as a length it is one that no memory has.
pub(crate) const fn round_up(length: usize, multiple: usize) -> usize {
    match length.checked_next_multiple_of(multiple) {
        Some(length) => length,
        None => usize::MAX,
    }
}

/// Elements from the first of `rows` rows, `stride` apart, to the last of `width` in the last row; saturates,
/// so that a comparison with the length of a buffer holds for every argument.
pub(crate) const fn extent(rows: usize, stride: usize, width: usize) -> usize {
    if rows == 0 { 0 } else { (rows - 1).saturating_mul(stride).saturating_add(width) }
}

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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lengths_saturate() {
        assert_eq!((round_up(33, 16), round_up(32, 16), round_up(usize::MAX, 16)), (48, 32, usize::MAX));
        assert_eq!((extent(3, 10, 4), extent(0, 10, 4), extent(8, 1 << 61, 1 << 61)), (24, 0, usize::MAX));
        let mut pieces = Pieces::counting();
        let _ = pieces.take::<u8>(usize::MAX);
        assert_eq!(pieces.bytes(), None);
    }
}
