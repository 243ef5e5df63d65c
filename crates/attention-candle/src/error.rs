//! Why a call did not run, and how candle says it.

use attention::Role;
use candle_core::{DType, DeviceLocation};

/// Why a call did not run.
///
/// Calls return it inside [`candle_core::Error::WrappedContext`], with its text; [`cause`] takes it out
/// again. Its `Debug` is its text, as that of candle's errors.
#[derive(thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// What the library says: an invalid call, an implementation's refusal, or its failure. Shapes in it are
    /// in the order of the call's axes.
    #[error(transparent)]
    Call(#[from] attention::Error),
    /// A tensor has a dtype that it cannot have.
    #[error("{role} has dtype {}, expected {expected}", dtype.as_str())]
    DType {
        /// Which tensor.
        role: Role,
        /// Its dtype.
        dtype: DType,
        /// What is accepted.
        expected: &'static str,
    },
    /// A tensor has more axes than any tensor of a call.
    #[error("{role} has {rank} axes (shape {shape:?}), no tensor of a call has more than 4")]
    Rank {
        /// Which tensor.
        role: Role,
        /// How many axes it has.
        rank: usize,
        /// Its shape.
        shape: Vec<usize>,
    },
    /// A tensor is on another device than the query, or on the same one with another stream.
    #[error("{role} is on {}, the query on {}{}", place(*.device), place(*.query), same(*.device, *.query))]
    OtherDevice {
        /// Which tensor.
        role: Role,
        /// Where it is.
        device: DeviceLocation,
        /// Where the query is.
        query: DeviceLocation,
    },
    /// New keys or values are on another device than the cache that they are appended to, or on the same one
    /// with another stream.
    #[error("{role} is on {}, the cache on {}{}", place(*.device), place(*.cache), same(*.device, *.cache))]
    CacheDevice {
        /// Which tensor.
        role: Role,
        /// Where it is.
        device: DeviceLocation,
        /// Where the cache is.
        cache: DeviceLocation,
    },
    /// No tensor can be read on this device: Metal, or CUDA without feature `cuda`.
    #[error("{role} is on {}, expected {}", place(*.device), served())]
    Device {
        /// Which tensor.
        role: Role,
        /// Where it is.
        device: DeviceLocation,
    },
}

impl std::fmt::Debug for Error {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        std::fmt::Display::fmt(self, f)
    }
}

impl From<attention::InvalidCall> for Error {
    fn from(error: attention::InvalidCall) -> Self {
        Self::Call(error.into())
    }
}

impl Error {
    /// As an error of candle's, which tells what was called.
    pub(crate) fn in_call(self, what: &str) -> candle_core::Error {
        let context = format!("attention, {what}");
        candle_core::Error::WrappedContext { wrapped: Box::new(self), context }
    }
}

/// The error of this crate inside one of candle's, if there is one.
///
/// # Examples
/// ```
/// use attention_candle::{Attention, Error, cause};
/// use candle_core::{DType, Device, Tensor};
///
/// let x = Tensor::zeros((1, 2, 5, 8), DType::F32, &Device::Cpu)?;
/// let error = Attention::bnth().implementation("abacus").forward(&x, &x, &x).unwrap_err();
/// assert!(error.to_string().starts_with("no implementation is named 'abacus'; there are: "));
/// assert!(matches!(cause(&error), Some(Error::Call(attention::Error::UnknownImplementation { .. }))));
/// # Ok::<(), candle_core::Error>(())
/// ```
pub fn cause(error: &candle_core::Error) -> Option<&Error> {
    match error {
        candle_core::Error::WrappedContext { wrapped, .. } => wrapped.downcast_ref(),
        candle_core::Error::Context { inner, .. }
        | candle_core::Error::WithPath { inner, .. }
        | candle_core::Error::WithBacktrace { inner, .. } => cause(inner),
        _ => None,
    }
}

fn place(device: DeviceLocation) -> String {
    match device {
        DeviceLocation::Cpu => "cpu".to_owned(),
        DeviceLocation::Cuda { gpu_id } => format!("cuda:{gpu_id}"),
        DeviceLocation::Metal { gpu_id } => format!("metal:{gpu_id}"),
    }
}

fn same(device: DeviceLocation, other: DeviceLocation) -> &'static str {
    if device == other { " by another value of candle's Device" } else { "" }
}

fn served() -> &'static str {
    if cfg!(feature = "cuda") { "cpu or cuda" } else { "cpu (feature `cuda` is off)" }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages() {
        let dtype = Error::DType { role: Role::Mask, dtype: DType::F32, expected: "u8" };
        assert_eq!(dtype.to_string(), "mask has dtype f32, expected u8");
        let rank = Error::Rank { role: Role::Query, rank: 5, shape: vec![1, 2, 3, 4, 5] };
        assert_eq!(
            rank.to_string(),
            "query has 5 axes (shape [1, 2, 3, 4, 5]), no tensor of a call has more than 4"
        );
        let other = |device, query| Error::OtherDevice { role: Role::Key, device, query }.to_string();
        let cuda = DeviceLocation::Cuda { gpu_id: 1 };
        assert_eq!(other(DeviceLocation::Cpu, cuda), "key is on cpu, the query on cuda:1");
        assert_eq!(
            other(cuda, cuda),
            "key is on cuda:1, the query on cuda:1 by another value of candle's Device"
        );
        let new = Error::CacheDevice { role: Role::Value, device: DeviceLocation::Cpu, cache: cuda };
        assert_eq!(new.to_string(), "value is on cpu, the cache on cuda:1");
        let metal = Error::Device { role: Role::Query, device: DeviceLocation::Metal { gpu_id: 0 } };
        assert!(metal.to_string().starts_with("query is on metal:0, expected cpu"), "{metal}");
    }

    #[test]
    fn candles_error_has_our_text_and_our_error() {
        let error = || Error::DType { role: Role::Query, dtype: DType::U8, expected: "a float" };
        let wrapped = error().in_call("forward");
        assert_eq!(wrapped.to_string(), "query has dtype u8, expected a float\n\"attention, forward\"");
        let deep = wrapped.context("layer 3").with_path("model.safetensors");
        assert!(matches!(cause(&deep), Some(Error::DType { dtype: DType::U8, .. })));
        assert!(cause(&candle_core::Error::msg("something else")).is_none());
        let wrapped = error().in_call("backward");
        assert_eq!(wrapped.to_string(), "query has dtype u8, expected a float\n\"attention, backward\"");
    }
}
