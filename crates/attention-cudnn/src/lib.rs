#![doc = include_str!("../README.md")]

mod backend;
mod config;
mod descriptor;
mod graph;
mod key;
mod library;
mod pattern;
mod plan;
mod rows;
mod runtime;
mod support;

pub use backend::CudnnBackend;
pub use config::CudnnConfig;
pub use support::Target;
