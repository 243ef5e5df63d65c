//! Which pool there is: rayon's global one, or after a fork one that is made in the child.

use std::error::Error;
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use rayon::{ThreadPool, ThreadPoolBuilder};

use crate::Team;

/// The process in which the global pool was found to work; 0 before that.
static STARTED_IN: AtomicU32 = AtomicU32::new(0);

/// The process in which it was found not to start; 0 before that.
static FAILED_IN: AtomicU32 = AtomicU32::new(0);

/// The pool of a child of a fork, with the process it was made in; no pool where none could be made.
static OF_CHILD: Mutex<Option<(u32, Option<Arc<ThreadPool>>)>> = Mutex::new(None);

/// The threads that rayon's global pool has unless the program sets another number.
pub(crate) fn default_threads() -> usize {
    // Looking takes microseconds. Not a OnceLock: a child of a fork would wait for a thread that was at it.
    static KNOWN: AtomicUsize = AtomicUsize::new(0);
    let known = KNOWN.load(Ordering::Relaxed);
    if known > 0 {
        return known;
    }
    let named = |name: &str| std::env::var(name).ok()?.parse().ok().filter(|&threads: &usize| threads > 0);
    let threads = named("RAYON_NUM_THREADS")
        .or_else(|| named("RAYON_RS_NUM_CPUS"))
        .unwrap_or_else(|| std::thread::available_parallelism().map_or(1, usize::from))
        .min(rayon::max_num_threads());
    KNOWN.store(threads, Ordering::Relaxed);
    threads
}

/// Threads of the global pool, which is started where nothing has started it.
pub(crate) fn global(process: u32, planned: usize) -> Team {
    match STARTED_IN.load(Ordering::Acquire) {
        started if started == process => {}
        0 => {
            if FAILED_IN.load(Ordering::Acquire) == process || !start(process) {
                return Team::alone();
            }
        }
        // Of a parent of this process: its threads are not here.
        _ => return of_child(process, planned),
    }
    Team::of_current_pool(rayon::current_num_threads().min(planned))
}

/// Starts the global pool; whether there is one now.
fn start(process: u32) -> bool {
    // Where the platform has no threads, rayon's own start falls back to the calling thread; there is nothing
    // to gain.
    let failure = if cfg!(target_family = "wasm") {
        Some("no threads on this platform".to_owned())
    } else {
        match ThreadPoolBuilder::new().build_global() {
            Ok(()) => None,
            Err(error) => match error.source() {
                Some(reason) => Some(reason.to_string()),
                // Somebody else has started it, or failed to, which rayon tells by a panic alone.
                None => std::panic::catch_unwind(rayon::current_num_threads)
                    .err()
                    .map(|_| "it failed to start before".to_owned()),
            },
        }
    };
    let Some(reason) = failure else {
        STARTED_IN.store(process, Ordering::Release);
        return true;
    };
    if FAILED_IN.swap(process, Ordering::AcqRel) != process {
        tracing::warn!(target: "attention", %reason, "no thread pool: calls run on the calling thread");
    }
    false
}

/// Threads of a pool that is made in this process, a child of the one whose pool was to be used.
pub(crate) fn of_child(process: u32, planned: usize) -> Team {
    // A child of the child finds the lock as it was at the fork, maybe taken for ever: it does not wait for
    // long.
    let mut guard = None;
    for _ in 0..1000 {
        match OF_CHILD.try_lock() {
            Ok(locked) => {
                guard = Some(locked);
                break;
            }
            Err(_) => std::thread::yield_now(),
        }
    }
    let Some(mut made) = guard else { return Team::alone() };
    if made.as_ref().is_none_or(|(of, _)| *of != process) {
        let pool = ThreadPoolBuilder::new().num_threads(default_threads()).build();
        if let Err(reason) = &pool {
            tracing::warn!(target: "attention", %reason, "no thread pool after a fork: calls run on the calling thread");
        }
        // The pool of a parent of this process is left as it is: dropping it would talk to threads that are
        // not here.
        std::mem::forget(made.replace((process, pool.ok().map(Arc::new))));
        crate::team::forget_waiting();
    }
    match made.as_ref().and_then(|(_, pool)| pool.clone()) {
        Some(pool) => {
            let threads = pool.current_num_threads().min(planned);
            Team::of_pool(pool, threads)
        }
        None => Team::alone(),
    }
}
