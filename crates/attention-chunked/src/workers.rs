//! Spreads tasks over threads. Results cannot depend on which thread takes which task.

use std::sync::atomic::{AtomicUsize, Ordering};

use attention_core::red_zones;

/// Runs `work(index, scratch)` for every index below `tasks`, in no particular order, on `threads` threads of the
/// current pool, each with `bytes` of the scratch to itself.
///
/// # Panics
/// Where the scratch is shorter than `threads` pieces.
pub(crate) fn run(
    tasks: usize,
    threads: usize,
    scratch: &mut [u8],
    bytes: usize,
    work: impl Fn(usize, &mut [u8]) + Sync,
) {
    if tasks == 0 {
        return;
    }
    let workers = threads.min(tasks).max(1);
    let mut pieces = scratch;
    let mut next_piece = || {
        let (piece, rest) = std::mem::take(&mut pieces).split_at_mut(bytes);
        pieces = rest;
        piece
    };
    let next = AtomicUsize::new(0);
    let drain = |scratch: &mut [u8]| {
        loop {
            let index = next.fetch_add(1, Ordering::Relaxed);
            if index >= tasks {
                return;
            }
            work(index, scratch);
            red_zones::end_task();
        }
    };
    let own = next_piece();
    if workers == 1 {
        drain(own);
        return;
    }
    rayon::scope(|scope| {
        for _ in 1..workers {
            let (drain, piece) = (&drain, next_piece());
            scope.spawn(move |_| drain(piece));
        }
        drain(own);
    });
}
