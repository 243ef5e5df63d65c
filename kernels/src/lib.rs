#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]

mod backward_sources;
mod common_sources;
mod cudnn_sources;
mod forward_sources;
mod fused;
mod sources;
#[cfg(test)]
mod tests;
mod variant;

pub use sources::SOURCES;
pub use variant::{
    DTypeCode, Features, Fused, Helper, KEYS_PER_SPLIT, KeyGradients, Layout, Variant, block_threads,
};

/// One CUDA source with what can be launched from it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Source {
    /// The file's name in this package, without its folder: what messages and caches call it.
    pub name: &'static str,
    /// The whole text.
    pub text: &'static str,
    /// The names of its `extern "C" __global__` functions.
    pub entry_points: &'static [&'static str],
    /// The variants that `cargo xtask kernels` compiles. Each has every entry point.
    pub variants: &'static [Variant],
}

/// The source of this name.
///
/// ```
/// assert_eq!(attention_kernels::source("missing.cu"), None);
/// ```
pub fn source(name: &str) -> Option<&'static Source> {
    SOURCES.iter().find(|source| source.name == name)
}
