//! What a user can set about the plain CPU backend.

use std::num::NonZeroUsize;
use std::sync::Arc;

use rayon::ThreadPool;

/// Where and on how many threads a [`CpuBackend`](crate::CpuBackend) works. Results do not depend on it, to the bit.
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
    threads: Option<NonZeroUsize>,
    pool: Option<Arc<ThreadPool>>,
}

impl CpuConfig {
    /// Uses at most this many threads; 0 and the default stand for all threads of the pool.
    #[must_use]
    pub fn threads(self, threads: usize) -> Self {
        Self { threads: NonZeroUsize::new(threads), ..self }
    }

    /// Works in this pool instead of the caller's.
    #[must_use]
    pub fn pool(self, pool: Arc<ThreadPool>) -> Self {
        Self { pool: Some(pool), ..self }
    }

    /// How many threads a call from here may use.
    pub(crate) fn thread_count(&self) -> usize {
        let available = match &self.pool {
            Some(pool) => pool.current_num_threads(),
            None => rayon::current_num_threads(),
        };
        self.threads.map_or(available, |limit| limit.get().min(available)).max(1)
    }

    /// Runs `work` in the configured pool.
    pub(crate) fn install<R: Send>(&self, work: impl FnOnce() -> R + Send) -> R {
        match &self.pool {
            Some(pool) => pool.install(work),
            None => work(),
        }
    }
}
