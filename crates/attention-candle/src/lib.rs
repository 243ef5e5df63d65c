#![doc = include_str!("../README.md")]
#![deny(unsafe_code)]

mod attention;
mod call;
#[cfg(feature = "cuda")]
mod cuda;
mod error;
mod events;
mod forward;
mod graph;
pub mod kv_cache;
mod layout;
mod memory;
mod numbers;
mod packed;

pub use self::attention::Attention;
pub use ::attention::{
    AttentionBackend, AxisOrder, Choice, Dropout, Explanation, Implementation, Lengths, NumericsClass,
    Options, QueryOffset, Registry, Window,
};
#[cfg(feature = "cuda")]
pub use cuda::device_of;
pub use error::{Error, cause};
pub use numbers::Numbers;

/// The code of the repository's pages, some of which takes candle as well as the facade.
#[cfg(doctest)]
mod pages {
    #[doc = include_str!("../../../README.md")]
    struct Readme;
    #[doc = include_str!("../../../docs/backends.md")]
    struct Backends;
    #[doc = include_str!("../../../docs/coming-from.md")]
    struct ComingFrom;
}
