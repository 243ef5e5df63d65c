#![cfg_attr(feature = "cpu", doc = include_str!("../README.md"))]
#![cfg_attr(
    not(feature = "cpu"),
    doc = "Scaled dot-product attention, in a build without implementations: register your own in a [`Registry`]."
)]
#![cfg_attr(not(feature = "dlpack"), forbid(unsafe_code))]
#![cfg_attr(feature = "dlpack", deny(unsafe_code))]

#[cfg(feature = "ndarray")]
pub mod arrays;
mod attention;
mod backward;
#[cfg(feature = "dlpack")]
pub mod dlpack;
mod error;
mod forward;
mod hidden_keys;
mod into_view;
pub mod kv_cache;
mod numbers;
mod operands;
mod options;
mod order;
mod packed;
mod plan;
mod plans;
mod registry;
mod run;
mod scratch;
mod selection;
mod sequences;
mod tensor;
mod zeros;

pub use attention::{Attention, dot_product_attention};
pub use attention_core as core;
pub use attention_core::conventions;
pub use attention_core::{
    AttentionBackend, BackwardInputs, BackwardOutputs, CallData, CallProblem, DType, Device, DeviceKind,
    Dimensions, Dims, Dropout, Element, F8E4M3, F8E5M2, Float8, Gradients, InvalidCall, Lengths,
    NumericsClass, OutOfMemory, Overflow, Pass, Problem, ProblemBuilder, QueryOffset, Role, Scalar, Strides,
    TensorDesc, Unavailable, Unsupported, View, ViewMut, Window, dropout_mask,
};
pub use backward::Backward;
pub use error::{Error, Refusal};
pub use forward::Forward;
pub use into_view::{IntoView, IntoViewMut};
pub use numbers::{IntoNumbers, Numbers};
pub use options::Options;
pub use order::AxisOrder;
pub use plan::AttentionPlan;
pub use registry::Registry;
pub use selection::{Candidate, Cause, Choice, Explanation, Implementation, Reason, Verdict, explain};
pub use tensor::{OtherTensor, Tensor};

/// The memory-efficient CPU implementation of this build, to configure and hand to
/// [`Implementation::Exactly`].
#[cfg(feature = "chunked")]
pub use attention_chunked as chunked;

/// The memory-efficient implementation for NVIDIA GPUs of this build, to configure and hand to
/// [`Implementation::Exactly`].
#[cfg(feature = "cuda")]
pub use attention_chunked_cuda as chunked_cuda;

/// The plain CPU implementation of this build, to configure and hand to [`Implementation::Exactly`].
#[cfg(feature = "cpu")]
pub use attention_cpu as cpu;

/// Devices, streams and tensors in device memory, for those who have none of their own.
///
/// A call on device memory takes outputs of the caller's. Its work is put on the stream of the
/// implementation, which is that of the device's default stream unless a registry holds one [on
/// another](crate::cudnn::CudnnBackend::on).
///
/// # Examples
/// ```no_run
/// use attention::cuda::{CudaDevice, DeviceTensor};
/// use attention::{Attention, DType, TensorDesc};
///
/// let device = CudaDevice::new("example", 0)?;
/// let tokens = TensorDesc::contiguous(DType::Bf16, [4, 4096, 16, 128]);
/// let query = DeviceTensor::filled(&device, tokens, 0)?;
/// let mut out = DeviceTensor::filled(&device, tokens, 0)?;
/// let x = query.view()?;
/// Attention::new().causal(true).forward_into(x, x, x, out.view_mut()?, None)?;
/// device.stream().synchronize()?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[cfg(feature = "cuda")]
pub use attention_cuda as cuda;

/// The cuDNN implementation of this build, to configure and hand to [`Implementation::Exactly`].
#[cfg(feature = "cuda")]
pub use attention_cudnn as cudnn;

/// The half-precision element types.
pub use half::{bf16, f16};
