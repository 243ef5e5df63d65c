//! Spreads tasks over threads. Results cannot depend on which thread takes which task.

use std::sync::Mutex;

use attention_core::red_zones;
use attention_threads::Team;

/// Runs `work` on every task, on at most `workers` threads of the team, each with `bytes` of the scratch to
/// itself. Tasks are made as they are taken: a list of all of them would grow with the batch.
///
/// # Panics
/// Where the scratch has less than a piece for each worker.
pub(crate) fn run<T>(
    team: &Team,
    workers: usize,
    tasks: impl Iterator<Item = T> + Send,
    scratch: &mut [u8],
    bytes: usize,
    work: impl Fn(T, &mut [u8]) + Sync,
) {
    let queue = Mutex::new(tasks);
    // Without tasks there is no scratch, and making none of them may write padding.
    let bytes = if workers == 0 { 0 } else { bytes };
    team.run(workers, scratch, bytes, &|scratch| {
        // A worker that panics poisons the lock; the team passes its panic on.
        while let Some(task) = queue.lock().ok().and_then(|mut queue| queue.next()) {
            work(task, scratch);
            red_zones::end_task();
        }
    });
}
