//! What a user can set about the chunked CPU backend.

use std::ffi::OsString;
use std::num::NonZeroUsize;
use std::sync::Arc;

use attention_threads::{Team, Threads};
use rayon::ThreadPool;

use crate::Level;

/// Bytes that a worker's packed chunks and running values stay inside by default: with tiles and stage a
/// thread takes at most 1 MiB up to head dimension 128, half of the second-level cache of server processors.
const DEFAULT_BUDGET: usize = 704 << 10;

/// Chunk sizes, threads and instruction set of a [`ChunkedBackend`](crate::ChunkedBackend).
///
/// Threads, pool, chunk sizes and budget do not change a bit of a result; the level and `split_f32` do,
/// inside the bounds of the numerics class.
///
/// ```
/// use attention_chunked::{ChunkedBackend, ChunkedConfig};
///
/// // Chunks of 256 query rows and 512 keys, on at most two threads of the caller's rayon pool.
/// let config = ChunkedConfig::default().query_chunk(256).key_chunk(512).threads(2);
/// let backend = ChunkedBackend::with_config(config);
/// # let _ = backend;
/// ```
#[derive(Clone, Debug, Default)]
pub struct ChunkedConfig {
    query_chunk: Option<NonZeroUsize>,
    key_chunk: Option<NonZeroUsize>,
    budget: Option<NonZeroUsize>,
    threads: Threads,
    level: Option<Level>,
    split_f32: bool,
}

/// The sizes of a configuration, as tasks are cut by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Sizes {
    pub(crate) rows: Option<NonZeroUsize>,
    pub(crate) keys: Option<NonZeroUsize>,
    pub(crate) budget: usize,
}

impl ChunkedConfig {
    /// Query rows (of all heads that share a key/value head) that go over the keys together. Rounded up to
    /// whole blocks of the engine; 0 stands for a size chosen from the budget.
    #[must_use]
    pub fn query_chunk(self, rows: usize) -> Self {
        Self { query_chunk: NonZeroUsize::new(rows), ..self }
    }

    /// Keys and values that are packed together. Rounded down to whole blocks of 256, between one and eight;
    /// 0 stands for one block forward, which leaves the budget to query rows, and for as many as the budget
    /// allows backward.
    #[must_use]
    pub fn key_chunk(self, keys: usize) -> Self {
        Self { key_chunk: NonZeroUsize::new(keys), ..self }
    }

    /// About how many bytes of scratch a thread may use for its chunks, where their sizes are not given; 0
    /// stands for the default, 704 KiB. What a call takes exactly, `scratch_bytes` says.
    #[must_use]
    pub fn budget(self, bytes: usize) -> Self {
        Self { budget: NonZeroUsize::new(bytes), ..self }
    }

    /// Uses at most this many threads, the calling one included, and asks for scratch for as many. 0 and the
    /// default stand for all threads of the configured pool, else for those of rayon's global pool by default
    /// (`RAYON_NUM_THREADS`, or what the machine runs side by side).
    ///
    /// With 1 no pool is looked at or started.
    #[must_use]
    pub fn threads(self, threads: usize) -> Self {
        Self { threads: self.threads.limit(threads), ..self }
    }

    /// Works on the calling thread and on threads of this pool, instead of those of the caller's pool.
    #[must_use]
    pub fn pool(self, pool: Arc<ThreadPool>) -> Self {
        Self { threads: self.threads.pool(pool), ..self }
    }

    /// Uses this instruction set; the backend is unavailable where the machine lacks it. By default the one
    /// that `ATTENTION_CPU_LEVEL` names, else the fastest of the machine.
    #[must_use]
    pub fn level(self, level: Level) -> Self {
        Self { level: Some(level), ..self }
    }

    /// At [`Level::Amx`], multiplies f32 operands as sums of three bf16 parts on the matrix unit. Still of
    /// class `F32`: it passes the whole conformance suite inside the same bounds. Numbers above 3.38e38,
    /// which no bf16 holds, become NaN. Off by default, since it is not faster on every machine
    /// (docs/performance/results.md); at other levels it does nothing.
    #[must_use]
    pub fn split_f32(self, split: bool) -> Self {
        Self { split_f32: split, ..self }
    }

    /// Whether f32 is split.
    pub(crate) fn splits_f32(&self) -> bool {
        self.split_f32
    }

    /// The level to use, or what is wrong with the one that was asked for.
    pub(crate) fn chosen_level(&self) -> Result<Level, String> {
        if let Some(level) = self.level {
            return level.check().map(|()| level).map_err(|reason| format!("level {level}: {reason}"));
        }
        level_named(std::env::var_os(Level::VARIABLE))
    }

    /// The sizes.
    pub(crate) fn sizes(&self) -> Sizes {
        Sizes {
            rows: self.query_chunk,
            keys: self.key_chunk,
            budget: self.budget.map_or(DEFAULT_BUDGET, NonZeroUsize::get),
        }
    }

    /// How many threads calls are planned and scratch is asked for.
    pub(crate) fn planned_threads(&self) -> usize {
        self.threads.planned()
    }

    /// The threads of a call that has work for `workers` of them, and its needs on fewer threads than were
    /// planned, which `of` computes for a number of threads; `None` where there are as many as planned. No
    /// pool is started where there is work for one thread.
    pub(crate) fn team<N: Needs>(
        &self,
        workers: usize,
        scratch: usize,
        of: impl FnOnce(usize) -> Option<N>,
    ) -> (Option<N>, Team) {
        if workers <= 1 {
            return (None, Team::alone());
        }
        let team = self.threads.team();
        if team.size() == self.planned_threads() {
            return (None, team);
        }
        // Fewer threads than planned, in a smaller pool: larger chunks keep each of them busier.
        let fewer = of(team.size()).filter(|fewer| fewer.scratch().is_some_and(|bytes| bytes <= scratch));
        (fewer, team)
    }
}

/// What calls of a pass take.
pub(crate) trait Needs {
    /// Bytes of scratch; `None` on overflow.
    fn scratch(&self) -> Option<usize>;
}

/// The level that the value of the variable names, or the best one without a value. An empty value is none,
/// as for other programs.
fn level_named(value: Option<OsString>) -> Result<Level, String> {
    let Some(name) = value.filter(|value| !value.is_empty()) else { return Ok(Level::best()) };
    let level: Level =
        name.to_string_lossy().parse().map_err(|error| format!("{}: {error}", Level::VARIABLE))?;
    level.check().map(|()| level).map_err(|reason| format!("{} asks for {level}: {reason}", Level::VARIABLE))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_empty_variable_is_as_none() {
        assert_eq!(level_named(None), Ok(Level::best()));
        assert_eq!(level_named(Some(OsString::new())), Ok(Level::best()));
        assert_eq!(level_named(Some("scalar".into())), Ok(Level::Scalar));
        let error = level_named(Some("sse".into())).unwrap_err();
        assert!(error.starts_with("ATTENTION_CPU_LEVEL: ") && error.contains("sse"), "{error}");
    }
}
