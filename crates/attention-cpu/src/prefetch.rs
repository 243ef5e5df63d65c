//! Prefetches of rows by address.

#![allow(unsafe_code)]

use attention_core::Row;

/// How many rows ahead of the one that is read others are prefetched: rows of one head are as far apart as
/// all heads together, often a page of memory or more, which no processor's own prefetching bridges.
pub(crate) const AHEAD: usize = 16;

/// Prefetches a row whose elements are neighbours into the second-level cache: more lines can be on their way
/// there at a time than to the first.
#[inline(always)]
pub(crate) fn prefetch<T: Copy>(row: Row<'_, T>) {
    let Some(row) = row.contiguous() else { return };
    let from = row.as_ptr().cast::<u8>();
    let bytes = size_of_val(row);
    for offset in (0..bytes).step_by(64) {
        prefetch_line(from.wrapping_add(offset));
    }
    // One line more where the row does not begin with one.
    prefetch_line(from.wrapping_add(bytes).wrapping_sub(1));
}

/// Prefetches the cache line of an address, where the machine has an instruction for it.
#[inline(always)]
fn prefetch_line(address: *const u8) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
        // SAFETY: every x86-64 processor has the instruction, which reads nothing and never faults.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(address.cast()) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = address;
}
