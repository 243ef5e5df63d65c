#![doc = include_str!("../README.md")]

mod axes;
mod backend;
mod config;
mod features;
mod launches;
mod limits;
mod one_pass;
mod plan;
mod rows;
mod runtime;
mod schedule;
mod splits;
#[cfg(test)]
mod tests;
mod tiles;
mod variants;

pub use backend::ChunkedCudaBackend;
pub use config::ChunkedCudaConfig;

/// The name of the backend.
const NAME: &str = "chunked-cuda";
