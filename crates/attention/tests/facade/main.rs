//! The facade: what a user can ask for, what reaches the implementation, and what is said when nothing can.

#![allow(missing_docs)]

#[cfg(feature = "ndarray")]
mod arrays;
mod backward;
#[cfg(all(feature = "cuda", feature = "cpu"))]
mod cuda_cache;
mod device;
#[cfg(feature = "dlpack")]
mod dlpack;
mod eight_bit;
mod errors;
mod inputs;
mod kv_cache;
mod kv_cache_model;
mod options;
mod order;
mod plans;
mod selection;
mod sequences;
#[cfg(feature = "serde")]
mod stored;
mod support;
