#![doc = include_str!("../README.md")]
#![deny(unsafe_code)]

mod backend;
mod call;
mod capabilities;
pub mod conventions;
mod device;
mod dropout;
mod dtype;
mod error;
mod float_bits;
mod gradients;
pub mod merge;
mod numerics;
mod options;
mod problem;
mod role;
mod shape;
#[cfg(feature = "serde")]
mod stored;
mod variants;
mod view;

pub use backend::AttentionBackend;
pub use call::{BackwardCall, BackwardInputs, BackwardOutputs, ForwardCall, ForwardOutputs, Inputs};
pub use capabilities::{Capabilities, Feature, FeatureSet, LongSums, PassCapabilities, ScratchGrowth};
pub use device::{Device, DeviceKind};
pub use dropout::{Dropout, DropoutStream, dropout_mask, philox4x32_10};
pub use dtype::{DType, Element, Scalar};
pub use error::{BackendFailure, Error, InvalidCall, OutOfMemory, Unavailable, Unsupported};
pub use gradients::Gradients;
pub use numerics::NumericsClass;
pub use options::{Lengths, QueryOffset, Sequences, Window};
pub use problem::{Dimensions, Pass, Problem, ProblemBuilder};
pub use role::Role;
pub use shape::{Axes, Dims, MAX_RANK, Strides, TensorDesc};
pub use variants::{VariantCounter, VariantRuns, Variants};
#[doc(hidden)]
pub use view::red_zones;
pub use view::{
    HostView, HostViewMut, LentScratch, Row, RowMut, SCRATCH_ALIGNMENT, Scratch, ScratchBuffer, View, ViewMut,
};
