#![doc = include_str!("../README.md")]

mod arguments;
mod backend;
mod call;
mod config;
mod descriptor;
mod execution_plan;
mod failure;
mod far;
mod graph;
mod key;
mod large;
mod launch;
mod layout;
mod library;
mod long_sums;
mod nan_isolation;
mod numbers;
mod offline;
mod pattern;
mod places;
mod plan;
mod planned;
mod runtime;
mod seen;
mod sequences;
mod slot;
mod support;
mod variant_packs;

pub use backend::CudnnBackend;
pub use config::CudnnConfig;
pub use offline::{Answer, Offline};
pub use support::Target;

/// The name of the backend.
const NAME: &str = "cudnn";
