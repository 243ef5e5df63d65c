//! Red zones between the pieces of a worker's scratch memory, for tests under a memory-error detector.
//!
//! Scratch is one allocation, so a kernel that runs over the end of one piece lands in the next, where
//! neither a detector nor a guard behind the allocation sees it. Built with `--cfg attention_red_zones` and
//! the address sanitizer (`cargo xtask sanitize`), backends leave [`BYTES`] bytes behind each piece, which
//! are poisoned for the sanitizer while a task runs, and hold canaries for what it does not see, such as
//! stores of inline assembly. Without the flag there are none, and everything here is empty.

/// Bytes behind each piece, a multiple of [`SCRATCH_ALIGNMENT`](crate::SCRATCH_ALIGNMENT).
pub const BYTES: usize = if cfg!(attention_red_zones) { super::scratch::SCRATCH_ALIGNMENT } else { 0 };

/// Ends the red zones that this thread made in `memory`, checked: it is about to be cut anew.
///
/// # Panics
/// Where something was written to one.
#[inline]
pub fn recut(memory: &mut [u8]) {
    #[cfg(attention_red_zones)]
    zones::end(|start| memory.as_ptr_range().contains(&(start as *const u8)));
    let _ = memory;
}

/// Makes what is left of a piece behind its elements, and the [`BYTES`] behind it, a red zone.
#[inline]
pub fn guard(zone: &mut [u8]) {
    #[cfg(attention_red_zones)]
    zones::begin(zone);
    let _ = zone;
}

/// Ends every red zone that this thread made, checked: its task is done, and others may use the memory.
///
/// # Panics
/// Where something was written to one.
#[inline]
pub fn end_task() {
    #[cfg(attention_red_zones)]
    zones::end(|_| true);
}

#[cfg(attention_red_zones)]
mod zones {
    use std::cell::RefCell;
    use std::ffi::c_void;

    const CANARY: u8 = 0x5A;

    // Of the run-time library of the address sanitizer, with which everything is linked that is built with
    // the flag.
    unsafe extern "C" {
        fn __asan_poison_memory_region(address: *const c_void, size: usize);
        fn __asan_unpoison_memory_region(address: *const c_void, size: usize);
    }

    thread_local! {
        /// Address and length. Those of a task that panicked are ended by the next one of its thread.
        static ZONES: RefCell<Vec<(usize, usize)>> = const { RefCell::new(Vec::new()) };
    }

    pub(super) fn begin(zone: &mut [u8]) {
        zone.fill(CANARY);
        // SAFETY: marks memory that is allocated, and which the caller lends to this zone until it is ended.
        unsafe { __asan_poison_memory_region(zone.as_ptr().cast(), zone.len()) };
        ZONES.with_borrow_mut(|zones| zones.push((zone.as_mut_ptr().expose_provenance(), zone.len())));
    }

    pub(super) fn end(is_over: impl Fn(usize) -> bool) {
        ZONES.with_borrow_mut(|zones| {
            zones.retain(|&(start, len)| {
                if is_over(start) {
                    check(start, len);
                }
                !is_over(start)
            });
        });
    }

    fn check(start: usize, len: usize) {
        let pointer = std::ptr::with_exposed_provenance::<u8>(start);
        // SAFETY: the memory outlives the zone: it is scratch of a call that has not returned.
        let zone = unsafe {
            __asan_unpoison_memory_region(pointer.cast(), len);
            std::slice::from_raw_parts(pointer, len)
        };
        let stray = zone.iter().position(|&byte| byte != CANARY);
        assert!(stray.is_none(), "a write {stray:?} bytes behind the end of a piece of scratch");
    }
}
