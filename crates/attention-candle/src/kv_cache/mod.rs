//! Caches of keys and values for decoding whose memory is candle's tensors: contiguous ([`KvCache`]) and in
//! pages ([`PagedKvCache`]), on the CPU and on CUDA.
//!
//! They are those of [`attention::kv_cache`], where sequences, pages and forks are explained; here new tokens
//! are candle's tensors, and what calls take is too.
//!
//! Appends change the memory in place. The tensors that a cache gives out are its memory, not copies: they
//! have every later append, and a call over them must be made before the tokens that it reads are replaced. A
//! cache has no gradients: what is appended is cut off its history, as candle's own operations in place do.
//!
//! What is appended is checked first and written then: an append that fails changes nothing, whether it is of
//! one sequence or of many.
//!
//! # Examples
//! A decoder that appends a token and attends to all so far:
//! ```
//! use attention_candle::kv_cache::{PagedKvCache, PoolShape, TokenShape};
//! use attention_candle::{Attention, QueryOffset};
//! use candle_core::{DType, Device, Tensor};
//!
//! let device = Device::Cpu;
//! // 2 heads of 16 in f32; 8 pages of 4 tokens; sequences of at most 20 tokens.
//! let token = TokenShape::new(DType::F32, 2, 16);
//! let mut cache = PagedKvCache::new(token, PoolShape { pages: 8, page_size: 4, longest: 20 }, &device)?;
//!
//! // A prompt of 6 tokens, and a second sequence that goes on from it: they share its pages.
//! let first = cache.add();
//! let prompt = Tensor::randn(0f32, 1f32, (6, 2, 16), &device)?;
//! cache.append(first, &prompt, &prompt)?;
//! let second = cache.fork(first)?;
//! assert_eq!(cache.used_pages(), 2);
//!
//! let attention = Attention::btnh().causal(true).query_offset(QueryOffset::BottomRight);
//! let mut batch = cache.batch([first, second])?;
//! for _ in 0..10 {
//!     // What the model computes for the new token of each sequence: 8 query heads on 2.
//!     let query = Tensor::randn(0f32, 1f32, (2, 1, 8, 16), &device)?;
//!     let new = Tensor::randn(0f32, 1f32, (2, 1, 2, 16), &device)?;
//!     cache.append_each(batch.sequences(), &new, &new)?;
//!     let step = cache.inputs(&mut batch)?;
//!     let attention = attention.clone().paged(&step.table, &step.lengths);
//!     let out = attention.forward(&query, &step.keys, &step.values)?;
//!     assert_eq!(out.dims(), [2, 1, 8, 16]);
//! }
//! assert_eq!(cache.len(second)?, 16);
//! # Ok::<(), candle_core::Error>(())
//! ```

mod contiguous;
mod memory;
mod paged;
mod token;

pub use ::attention::kv_cache::{CacheError, PagedBatch, PoolShape, Sequence};
pub use contiguous::KvCache;
pub use paged::{PagedInputs, PagedKvCache};
pub use token::TokenShape;
