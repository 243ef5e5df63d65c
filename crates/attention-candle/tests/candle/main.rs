//! Attention on candle's tensors: every option through candle's graph against the f64 oracle, and beside
//! candle's own operations.

#![allow(missing_docs)]

mod conformance;
mod device;
mod errors;
mod gradients;
mod kv_cache;
mod numbers;
mod placed;
mod sequences;
mod through;
mod unfused;
