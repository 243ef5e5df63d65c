//! What a user can set about the plain CPU backend.

use std::sync::Arc;

use attention_threads::{Team, Threads};
use rayon::ThreadPool;

/// Where and on how many threads a [`CpuBackend`](crate::CpuBackend) works. Results do not depend on it, to
/// the bit.
///
/// ```
/// use attention_cpu::{CpuBackend, CpuConfig};
///
/// // At most two threads of the caller's rayon pool.
/// let backend = CpuBackend::with_config(CpuConfig::default().threads(2));
/// # let _ = backend;
/// ```
#[derive(Clone, Debug, Default)]
pub struct CpuConfig {
    threads: Threads,
}

impl CpuConfig {
    /// Uses at most this many threads, the calling one included, and asks for scratch for as many. 0 and the
    /// default stand for all threads of the configured pool, else for those of rayon's global pool by default
    /// (`RAYON_NUM_THREADS`, or what the machine runs side by side).
    ///
    /// With 1 no pool is looked at or started.
    #[must_use]
    pub fn threads(self, threads: usize) -> Self {
        Self { threads: self.threads.limit(threads) }
    }

    /// Works on the calling thread and on threads of this pool, instead of those of the caller's pool.
    #[must_use]
    pub fn pool(self, pool: Arc<ThreadPool>) -> Self {
        Self { threads: self.threads.pool(pool) }
    }

    /// How many threads scratch is asked for.
    pub(crate) fn planned_threads(&self) -> usize {
        self.threads.planned()
    }

    /// The threads for a call that has work for so many; no pool is started for one.
    pub(crate) fn team(&self, workers: usize) -> Team {
        if workers > 1 { self.threads.team() } else { Team::alone() }
    }
}
