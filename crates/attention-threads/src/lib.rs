#![doc = include_str!("../README.md")]
#![deny(unsafe_code)]

mod pool;
mod team;

use std::num::NonZeroUsize;
use std::sync::Arc;

use rayon::ThreadPool;

pub use team::Team;

/// Where and on how many threads a backend works.
#[derive(Clone, Debug, Default)]
pub struct Threads {
    limit: Option<NonZeroUsize>,
    pool: Option<Given>,
}

/// A pool of the caller's, with the process that it was given in: after a fork its threads are not there.
#[derive(Clone, Debug)]
struct Given {
    pool: Arc<ThreadPool>,
    process: u32,
}

impl Threads {
    /// At most this many threads; 0 and the default stand for all of the pool.
    #[must_use]
    pub fn limit(self, threads: usize) -> Self {
        Self { limit: NonZeroUsize::new(threads), ..self }
    }

    /// Threads of this pool instead of the caller's.
    #[must_use]
    pub fn pool(self, pool: Arc<ThreadPool>) -> Self {
        Self { pool: Some(Given { pool, process: std::process::id() }), ..self }
    }

    /// How many threads calls are planned and their scratch is sized for: the limit, at most the threads of
    /// the configured pool; without either, the threads that rayon's global pool has by default
    /// (`RAYON_NUM_THREADS`, else what the machine can run side by side).
    ///
    /// Depends on nothing else, the pool of the asking thread included, and starts no pool.
    pub fn planned(&self) -> usize {
        match (self.limit, &self.pool) {
            (Some(limit), Some(given)) => limit.get().min(given.pool.current_num_threads()),
            (Some(limit), None) => limit.get(),
            (None, Some(given)) => given.pool.current_num_threads(),
            (None, None) => pool::default_threads(),
        }
        .max(1)
    }

    /// The threads for a call that begins now on this thread, at most [`planned`](Self::planned).
    ///
    /// Starts rayon's global pool where that is the one to use and nothing has started it, unless the plan is
    /// for one thread.
    pub fn team(&self) -> Team {
        let planned = self.planned();
        if planned == 1 {
            return Team::alone();
        }
        let process = std::process::id();
        match &self.pool {
            Some(given) if given.process == process => {
                Team::of_pool(given.pool.clone(), given.pool.current_num_threads().min(planned))
            }
            Some(_) => pool::of_child(process, planned),
            // Of whatever pool this is a worker of: asking does not start the global one.
            None if rayon::current_thread_index().is_some() => {
                Team::of_current_pool(rayon::current_num_threads().min(planned))
            }
            None => pool::global(process, planned),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pool(threads: usize) -> Arc<ThreadPool> {
        Arc::new(rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap())
    }

    #[test]
    fn the_plan_does_not_depend_on_the_pool_that_asks() {
        let default = Threads::default();
        let (three, planned) = (pool(3), default.planned());
        for threads in [default.clone(), default.clone().limit(0)] {
            assert_eq!(three.install(|| threads.planned()), planned);
        }
        let limited = Threads::default().limit(5);
        assert_eq!((limited.planned(), three.install(|| limited.planned())), (5, 5));
        assert_eq!(three.install(|| limited.team().size()), 3);
        let both = Threads::default().limit(5).pool(three.clone());
        assert_eq!((both.planned(), both.team().size()), (3, 3));
        let fewer = Threads::default().limit(2).pool(three);
        assert_eq!((fewer.planned(), fewer.team().size()), (2, 2));
        assert_eq!(Threads::default().limit(1).team().size(), 1);
    }
}
