#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]

mod assert;
pub mod cases;
pub mod fuzz;
pub mod golden;
mod on_host;
pub mod oracle;
pub mod report;
mod rng;
mod run;
mod subject;
pub mod suite;
pub mod tensor;
pub mod tolerance;
#[cfg(feature = "libtest")]
mod trials;

pub use assert::assert_conforms;
pub use on_host::{DeviceMemory, OnHost, TensorOnDevice};
#[cfg(feature = "libtest")]
pub use trials::{trial_where, trials};
