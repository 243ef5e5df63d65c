//! The threads of one call. The crate's only `unsafe`: jobs of a pool live as long as they please, and the
//! work that they are for is borrowed from a call.

#![allow(unsafe_code)]

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::Thread;

use rayon::ThreadPool;

/// Jobs that were handed to pools and have not begun. A pool whose threads are busy for long, or not there,
/// would collect jobs of calls that are long over.
static WAITING: AtomicUsize = AtomicUsize::new(0);

/// The most jobs that wait; calls do without further threads above it. Some hundred bytes each.
const MOST_WAITING: usize = 4096;

/// Forgets the jobs that waited in the pools of a parent of this process.
pub(crate) fn forget_waiting() {
    WAITING.store(0, Ordering::Relaxed);
}

/// The threads that work on a call: the calling one, and some of a pool.
#[derive(Debug)]
pub struct Team {
    source: Source,
    size: usize,
}

#[derive(Debug)]
enum Source {
    /// No pool.
    Alone,
    /// The pool that the calling thread belongs to, else the global one, which has been started.
    Current,
    /// A pool by value.
    Pool(Arc<ThreadPool>),
}

impl Team {
    /// The calling thread alone.
    pub const fn alone() -> Self {
        Self { source: Source::Alone, size: 1 }
    }

    pub(crate) fn of_current_pool(size: usize) -> Self {
        Self { source: Source::Current, size: size.max(1) }
    }

    pub(crate) fn of_pool(pool: Arc<ThreadPool>, size: usize) -> Self {
        Self { source: Source::Pool(pool), size: size.max(1) }
    }

    /// How many threads there are, the calling one included.
    pub fn size(&self) -> usize {
        self.size
    }

    /// Calls `work` on this thread and on up to `workers - 1` others, at most [`size`](Self::size) together,
    /// each with `bytes` bytes of the scratch to itself, and returns when all of these calls have returned.
    ///
    /// `work` is meant to take tasks from a common source until there is none left: a thread that has not
    /// begun by the time that this one is done is not waited for, and does not call `work`. So a pool that is
    /// busy, blocked or dead delays nothing.
    ///
    /// # Panics
    /// Where `work` does, on any thread; and where the scratch is shorter than a piece for each worker.
    pub fn run(&self, workers: usize, scratch: &mut [u8], bytes: usize, work: &(dyn Fn(&mut [u8]) + Sync)) {
        let workers = workers.clamp(1, self.size);
        let needed = bytes.checked_mul(workers);
        assert!(needed.is_some_and(|needed| needed <= scratch.len()), "scratch for {workers} workers");
        if workers == 1 || matches!(self.source, Source::Alone) {
            work(&mut scratch[..bytes]);
            return;
        }
        let pieces = Pieces { first: scratch.as_mut_ptr(), bytes };
        // SAFETY: every index below `workers` is used once: 0 by this thread, the others by the job of that
        // number. The scratch is borrowed until this function returns, and no job is at work then
        // (`Gate::open`).
        let work = |index: usize| work(unsafe { pieces.piece(index) });
        Gate::open(&work, |gate| {
            for index in 1..workers {
                if WAITING.load(Ordering::Relaxed) >= MOST_WAITING {
                    break;
                }
                WAITING.fetch_add(1, Ordering::Relaxed);
                let gate = Arc::clone(gate);
                let job = move || {
                    // Never below 0: a child of a fork forgets jobs that it cannot run.
                    let _ = WAITING.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |n| n.checked_sub(1));
                    gate.enter(index);
                };
                match &self.source {
                    Source::Pool(pool) => pool.spawn(job),
                    _ => rayon::spawn(job),
                }
            }
        });
    }
}

/// Equal pieces of a call's scratch.
struct Pieces {
    first: *mut u8,
    bytes: usize,
}

// SAFETY: the pointer is that of an exclusive slice, whose bytes are reached through `piece` only; its caller
// guarantees that nothing else uses the piece.
unsafe impl Sync for Pieces {}

impl Pieces {
    /// # Safety
    /// The slice has more than `index` pieces and is still borrowed, and nothing else uses this piece while
    /// the result lives.
    #[allow(clippy::mut_from_ref, reason = "the caller vouches for an exclusive piece")]
    unsafe fn piece(&self, index: usize) -> &mut [u8] {
        // SAFETY: the caller guarantees that the slice has this piece, that it is still borrowed, and that
        // nothing else uses the piece.
        unsafe { std::slice::from_raw_parts_mut(self.first.add(index * self.bytes), self.bytes) }
    }
}

/// Lets jobs of a pool at work that is borrowed, until its owner closes the gate.
struct Gate {
    /// How many jobs are inside, and [`CLOSED`].
    state: AtomicUsize,
    /// The work. Only jobs that are inside look at it.
    work: *const (dyn Fn(usize) + Sync),
    /// What the first job that panicked did so with.
    panic: Mutex<Option<Box<dyn Any + Send>>>,
    owner: Thread,
}

/// Set in the state of a gate once no further job may go in.
const CLOSED: usize = 1 << (usize::BITS - 1);

/// How often the owner of a gate looks whether the jobs inside have left before it sleeps, at first at once,
/// then after giving its processor to another thread. The last tasks of a call end within some ten
/// microseconds of each other, and being woken takes as long again: calls of less than 3 ms took 1 to 3 %
/// longer with 256 looks and none after a yield (two threads of an EPYC).
const LOOKS: usize = 256;
const LOOKS_AFTER_A_YIELD: usize = 128;

// SAFETY: the work may be called from any thread (`Sync`), and its pointer is used under the conditions of
// `enter` alone.
unsafe impl Send for Gate {}
// SAFETY: the work may be called from any thread (`Sync`), and its pointer is used under the conditions of
// `enter` alone. The other fields are atomic, behind a lock or immutable.
unsafe impl Sync for Gate {}

impl Gate {
    /// Hands out a gate to `work`, does the part of number 0 on this thread, closes the gate, and waits for
    /// those inside.
    fn open(work: &(dyn Fn(usize) + Sync), hand_out: impl FnOnce(&Arc<Self>)) {
        let borrowed: *const (dyn Fn(usize) + Sync + '_) = work;
        // SAFETY: the lifetime alone changes. The pointer is used by `enter` between its two changes of the
        // state, which `Shut` waits for before this function returns or unwinds, and `work` is borrowed for
        // that long.
        let erased = unsafe {
            std::mem::transmute::<*const (dyn Fn(usize) + Sync + '_), *const (dyn Fn(usize) + Sync + 'static)>(
                borrowed,
            )
        };
        let gate = Arc::new(Self {
            state: AtomicUsize::new(0),
            work: erased,
            panic: Mutex::new(None),
            owner: std::thread::current(),
        });
        {
            let _shut = Shut(&gate);
            hand_out(&gate);
            work(0);
        }
        let panic = gate.panic.lock().ok().and_then(|mut panic| panic.take());
        if let Some(panic) = panic {
            resume_unwind(panic);
        }
    }

    /// Does the part of number `index`, unless the gate is closed.
    fn enter(&self, index: usize) {
        let inside = |state: usize| (state & CLOSED == 0).then_some(state + 1);
        if self.state.fetch_update(Ordering::Acquire, Ordering::Relaxed, inside).is_err() {
            return;
        }
        // SAFETY: the gate was open when this thread went in, so its owner has not returned, and does not
        // before the state says that this thread has left.
        let done = catch_unwind(AssertUnwindSafe(|| unsafe { (*self.work)(index) }));
        if let (Err(reason), Ok(mut panic)) = (done, self.panic.lock()) {
            panic.get_or_insert(reason);
        }
        // The last one out wakes the owner. The gate itself lives as long as this job has a share of it.
        if self.state.fetch_sub(1, Ordering::Release) == CLOSED + 1 {
            self.owner.unpark();
        }
    }
}

/// Closes a gate when dropped, by a panic too, and waits for the jobs inside.
struct Shut<'g>(&'g Gate);

impl Drop for Shut<'_> {
    fn drop(&mut self) {
        let state = &self.0.state;
        state.fetch_or(CLOSED, Ordering::Relaxed);
        let mut looks = 0usize;
        while state.load(Ordering::Acquire) != CLOSED {
            looks += 1;
            if looks <= LOOKS {
                std::hint::spin_loop();
            } else if looks <= LOOKS + LOOKS_AFTER_A_YIELD {
                std::thread::yield_now();
            } else {
                // Woken by the last job inside; by anybody else, it looks again.
                std::thread::park();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Barrier;
    use std::sync::mpsc::channel;

    use super::*;

    fn pool(threads: usize) -> Arc<ThreadPool> {
        Arc::new(rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap())
    }

    /// The tests share the count of waiting jobs, and wait for all of a team.
    fn one_at_a_time() -> std::sync::MutexGuard<'static, ()> {
        static TESTS: Mutex<()> = Mutex::new(());
        TESTS.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    #[test]
    fn every_worker_has_a_piece_of_its_own() {
        let _alone = one_at_a_time();
        let team = Team::of_pool(pool(3), 4);
        for round in 0..200 {
            let (mut scratch, all) = (vec![0u8; 4 * 64 + 7], Barrier::new(4));
            team.run(9, &mut scratch, 64, &|piece| {
                // All four are at work at the same time.
                all.wait();
                assert_eq!(piece.len(), 64);
                piece.iter_mut().for_each(|byte| *byte += 1);
            });
            assert!(scratch[..256].iter().all(|&byte| byte == 1), "round {round}");
            assert!(scratch[256..].iter().all(|&byte| byte == 0), "round {round}");
        }
    }

    #[test]
    fn a_busy_pool_is_not_waited_for() {
        let _alone = one_at_a_time();
        let pool = pool(1);
        let (release, wait) = channel::<()>();
        pool.spawn(move || wait.recv().unwrap());
        let team = Team::of_pool(pool.clone(), 2);
        let calls = AtomicUsize::new(0);
        for _ in 0..2 * MOST_WAITING {
            team.run(2, &mut [], 0, &|_| {
                calls.fetch_add(1, Ordering::Relaxed);
            });
        }
        // Each by the calling thread alone, and what waits is bounded.
        assert_eq!(calls.load(Ordering::Relaxed), 2 * MOST_WAITING);
        assert!(WAITING.load(Ordering::Relaxed) <= MOST_WAITING + 64);
        release.send(()).unwrap();
        // The jobs that waited find their gates closed.
        pool.install(|| ());
        assert_eq!(calls.load(Ordering::Relaxed), 2 * MOST_WAITING);
    }

    #[test]
    fn panics_come_back_from_every_thread_and_nobody_is_left_inside() {
        let _alone = one_at_a_time();
        let team = Team::of_pool(pool(2), 3);
        for who in [0, 1] {
            let (inside, all) = (AtomicUsize::new(0), Barrier::new(3));
            let caller = std::thread::current().id();
            let result = catch_unwind(AssertUnwindSafe(|| {
                team.run(3, &mut [], 0, &|_| {
                    inside.fetch_add(1, Ordering::SeqCst);
                    all.wait();
                    let is_caller = std::thread::current().id() == caller;
                    inside.fetch_sub(1, Ordering::SeqCst);
                    assert!(is_caller != (who == 0), "on purpose");
                });
            }));
            let message = *result.unwrap_err().downcast::<&str>().unwrap();
            assert_eq!((message, inside.load(Ordering::SeqCst)), ("on purpose", 0));
        }
        // And the pool still works.
        team.run(3, &mut [0; 30], 10, &|piece| assert_eq!(piece.len(), 10));
    }

    #[test]
    fn calls_inside_calls_and_inside_the_pool() {
        let _alone = one_at_a_time();
        let pool = pool(3);
        let team = Team::of_pool(pool.clone(), 3);
        let tasks = AtomicUsize::new(0);
        let inner = || {
            Team::of_current_pool(3).run(3, &mut [0; 3], 1, &|_| {
                tasks.fetch_add(1, Ordering::Relaxed);
            });
        };
        pool.install(|| team.run(3, &mut [], 0, &|_| inner()));
        assert!(tasks.load(Ordering::Relaxed) >= 1);
    }
}
