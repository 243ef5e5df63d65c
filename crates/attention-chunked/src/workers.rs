//! Spreads tasks over threads. Results cannot depend on which thread takes which task.

use std::sync::atomic::{AtomicUsize, Ordering};

use attention_core::red_zones;
use attention_threads::Team;

/// Runs `work(index, scratch)` for every index below `tasks`, in no particular order, on as many threads of
/// the team as the scratch has pieces of `bytes` for, each with one to itself.
///
/// Without a whole piece, none of the indices is a task: the scratch was sized for at least one.
pub(crate) fn run(
    tasks: usize,
    team: &Team,
    scratch: &mut [u8],
    bytes: usize,
    work: &(dyn Fn(usize, &mut [u8]) + Sync),
) {
    let pieces = scratch.len().checked_div(bytes).unwrap_or(usize::MAX);
    let workers = tasks.min(pieces);
    if workers == 0 {
        return;
    }
    let next = AtomicUsize::new(0);
    team.run(workers, scratch, bytes, &|scratch| {
        loop {
            let index = next.fetch_add(1, Ordering::Relaxed);
            if index >= tasks {
                return;
            }
            work(index, scratch);
            red_zones::end_task();
        }
    });
    // Of what this thread cut for all workers, such as the states of rows.
    red_zones::end_task();
}
