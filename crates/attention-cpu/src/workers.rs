//! Spreads tasks over threads. Results cannot depend on which thread takes which task.

use std::sync::Mutex;

use attention_core::red_zones;

/// Cuts scratch into pieces of `bytes` for at most `threads` workers.
pub(crate) fn divide(scratch: &mut [u8], bytes: usize, threads: usize) -> Vec<&mut [u8]> {
    if bytes == 0 {
        return (0..threads).map(|_| [].as_mut_slice()).collect();
    }
    scratch.chunks_exact_mut(bytes).take(threads).collect()
}

/// Runs `work` on every task, on as many threads as there are pieces of scratch, each with a piece of its own.
pub(crate) fn run<T: Send, S: Send>(tasks: Vec<T>, scratch: Vec<S>, work: impl Fn(T, &mut S) + Sync) {
    let mut scratch = scratch.into_iter();
    let Some(mut own) = scratch.next() else {
        assert!(tasks.is_empty(), "tasks without scratch to work in");
        return;
    };
    if tasks.len() <= 1 || scratch.len() == 0 {
        for task in tasks {
            work(task, &mut own);
            red_zones::end_task();
        }
        return;
    }
    let others = scratch.take(tasks.len() - 1);
    let queue = Mutex::new(tasks.into_iter());
    let drain = |scratch: &mut S| {
        // A worker that panics poisons the lock; the scope passes its panic on.
        while let Some(task) = queue.lock().ok().and_then(|mut queue| queue.next()) {
            work(task, scratch);
            red_zones::end_task();
        }
    };
    rayon::scope(|scope| {
        for mut other in others {
            let drain = &drain;
            scope.spawn(move |_| drain(&mut other));
        }
        drain(&mut own);
    });
}
