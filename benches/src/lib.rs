#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]

mod buffer;
mod sequences;
mod shapes;
mod workload;

pub use sequences::{Layout, Places, Sequences};
pub use shapes::{SHAPES, Shape, parse_shape};
pub use workload::{Mask, Plans, Work, Workload};
