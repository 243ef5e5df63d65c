#![doc = include_str!("../README.md")]

mod backend;
mod backward;
mod config;
mod cut;
mod engine;
mod engines;
mod float;
mod forward;
mod level;
mod listed;
mod logits;
mod paths;
mod plan;
mod scratch;
mod simd;
mod tensor;
mod workers;

pub use backend::ChunkedBackend;
pub use config::ChunkedConfig;
pub use level::Level;

/// The name of the backend.
const NAME: &str = "chunked";
