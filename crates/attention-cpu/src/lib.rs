#![doc = include_str!("../README.md")]
#![deny(unsafe_code)]

mod backend;
mod backward;
mod bias;
mod bias_gradient;
mod config;
mod direct;
mod elementary;
mod forward;
mod gemm;
mod logits;
mod operand;
mod packed;
mod plan;
mod scratch;
mod simd;
mod sink_gradient;
mod softmax;
mod variants;
mod workers;

pub use backend::CpuBackend;
pub use config::CpuConfig;
