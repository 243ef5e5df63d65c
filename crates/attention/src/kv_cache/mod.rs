//! Caches of keys and values for decoding: contiguous ([`KvCache`]) and in pages ([`PagedKvCache`]).
//!
//! | | [`KvCache`] | [`PagedKvCache`] |
//! |---|---|---|
//! | tensors of a call | `[B, capacity, K, H]`, `[B, capacity, K, Hv]` | `[pages, page_size, K, H]`, `[pages, page_size, K, Hv]` |
//! | sequences | as many as batch rows, with room for `capacity` tokens each | any number, which share the pages of a pool |
//! | a call | [`key_value_lengths`](crate::Attention::key_value_lengths) | [`paged`](crate::Attention::paged) |
//! | memory | for every sequence's longest | for the tokens that there are, rounded up to pages |
//! | prefixes | copied | shared by [`fork`](PagedKvCache::fork), copied where one of them goes on |
//!
//! A cache holds the keys and values of one layer. Layers that see the same appends, truncations and forks
//! have the same tables and lengths. Elements are stored as they are given: in the dtype of the cache,
//! without a change.
//!
//! Caches are in host memory, in memory of an NVIDIA GPU (`PagedKvCache::on_cuda` and `KvCache::on_cuda`,
//! with the feature `cuda`), or in [memory of another kind](CacheMemory): `attention-candle` has both caches
//! in candle's tensors, on the CPU and on CUDA.
//!
//! What is appended is checked first and written then: an append that fails changes nothing, whether it is of
//! one sequence or of many. Calls over a cache that grows have one [plan](crate::Attention::plan).
//!
//! # Examples
//! A decoder that appends a token and attends to all so far:
//! ```
//! # #[cfg(feature = "cpu")] {
//! use attention::kv_cache::{PagedKvCache, PoolShape, TokenShape};
//! use attention::{Attention, DType, QueryOffset};
//!
//! // 2 heads of 16 in f32; 8 pages of 4 tokens; sequences of at most 20 tokens.
//! let token = TokenShape::new(DType::F32, 2, 16);
//! let mut cache = PagedKvCache::new(token, PoolShape { pages: 8, page_size: 4, longest: 20 })?;
//!
//! // A prompt of 6 tokens, and a second sequence that goes on from it: they share its pages.
//! let first = cache.add();
//! cache.append(first, (&[0.5f32; 6 * 2 * 16], [6, 2, 16]), (&[0.25f32; 6 * 2 * 16], [6, 2, 16]))?;
//! let second = cache.fork(first)?;
//! assert_eq!(cache.used_pages(), 2);
//!
//! let attention = Attention::new().causal(true).query_offset(QueryOffset::BottomRight);
//! let mut batch = cache.batch([first, second])?;
//! for _ in 0..10 {
//!     // What the model computes for the new token of each sequence: 8 query heads on 2.
//!     let (query, key, value) = ([0.1f32; 2 * 8 * 16], [0.2f32; 2 * 2 * 16], [0.3f32; 2 * 2 * 16]);
//!     cache.append_each(batch.sequences(), (&key, [2, 1, 2, 16]), (&value, [2, 1, 2, 16]))?;
//!     let step = cache.inputs(&mut batch)?;
//!     let attention = attention.clone().paged(step.table, step.lengths);
//!     let out = attention.forward((&query, [2, 1, 8, 16]), step.keys, step.values)?;
//!     assert_eq!(out.shape(), [2, 1, 8, 16].into());
//! }
//! assert_eq!(cache.len(second)?, 16);
//! cache.free(second)?;
//! // A handle of a sequence that was freed is an error, whoever has its pages by now.
//! assert!(cache.len(second).is_err());
//! # }
//! # Ok::<(), attention::Error>(())
//! ```

mod batch;
mod contiguous;
#[cfg(feature = "cuda")]
mod cuda;
mod error;
mod handle;
mod memory;
mod paged;
mod pool;
mod sequences;
mod store;
mod token;

pub use batch::{PagedBatch, PagedInputs};
pub use contiguous::KvCache;
#[cfg(feature = "cuda")]
pub use cuda::{CudaMemory, CudaTables};
pub use error::CacheError;
pub use handle::Sequence;
pub use memory::{CacheMemory, CacheTensor, HostMemory, IntoCacheTensor, PageCopy, Update, Write};
pub use paged::{PagedKvCache, PoolShape};
pub use token::TokenShape;
