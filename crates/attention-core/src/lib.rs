#![doc = include_str!("../README.md")]
#![deny(unsafe_code)]

mod backend;
mod call;
mod capabilities;
pub mod conventions;
mod data;
mod delegate;
mod device;
mod dropout;
mod dropout_mask;
mod dtype;
mod error;
mod features;
mod float8;
mod float_bits;
mod gradients;
pub mod merge;
mod numerics;
mod options;
mod pass;
mod plan;
mod problem;
mod role;
mod row_layout;
mod sequence;
mod shape;
#[cfg(feature = "serde")]
mod stored;
mod variants;
mod view;

pub use backend::AttentionBackend;
pub use call::{
    BackwardCall, BackwardInputs, BackwardOutputs, CallProblem, ForwardCall, ForwardOutputs, Inputs,
};
pub use capabilities::{Capabilities, LongSums, PassCapabilities, ScratchGrowth, SumLimit};
pub use data::CallData;
pub use delegate::{Delegate, DelegatePlan};
pub use device::{Device, DeviceKind};
pub use dropout::{Dropout, DropoutStream, philox4x32_10};
pub use dropout_mask::dropout_mask;
pub use dtype::{DType, Element, Scalar};
pub use error::{BackendFailure, Error, InvalidCall, OutOfMemory, Unavailable, Unsupported};
pub use features::{Feature, FeatureSet};
pub use float8::{F8E4M3, F8E5M2, Float8, Overflow};
pub use gradients::Gradients;
pub use numerics::NumericsClass;
pub use options::{Alignment, Lengths, OffsetRange, QueryOffset, Window};
pub use pass::Pass;
pub use plan::Plan;
pub use problem::{Dimensions, Problem, ProblemBuilder};
pub use role::Role;
pub use row_layout::RowLayout;
pub use sequence::{RowPlaces, SequenceRows, Stretch, Stretches};
pub use shape::{Axes, Dims, MAX_RANK, Strides, TensorDesc};
pub use variants::{VariantCounter, VariantRuns, Variants};
#[doc(hidden)]
pub use view::red_zones;
pub use view::{
    HeadView, HostView, HostViewMut, LentScratch, Row, RowMut, RowRun, RowStretch, SCRATCH_ALIGNMENT,
    Scratch, ScratchBuffer, View, ViewMut,
};
