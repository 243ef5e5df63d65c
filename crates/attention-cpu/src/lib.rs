#![doc = include_str!("../README.md")]
#![deny(unsafe_code)]

mod backend;
mod backward;
mod bias;
mod cache;
mod config;
mod cut;
mod direct;
mod elementary;
mod forward;
mod gemm;
mod logits;
mod operand;
mod packed;
mod prefetch;
mod scratch;
mod sequences;
mod simd;
mod softmax;
mod variants;
mod workers;

pub use backend::CpuBackend;
pub use config::CpuConfig;
