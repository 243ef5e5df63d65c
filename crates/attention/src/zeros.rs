//! Memory for results.

use attention_core::{DType, Dims, Element, InvalidCall, TensorDesc};

use crate::tensor::is_usize;
use crate::{Error, Tensor};

impl Tensor {
    /// A tensor of zeros (of `false` for bool).
    ///
    /// # Errors
    /// [`InvalidCall::Overflow`] inside [`Error::Core`]; [`Error::OutOfMemory`].
    pub fn zeros<T: Element>(shape: impl Into<Dims>) -> Result<Self, Error> {
        let zeros = Self::zeros_of(T::DTYPE, shape.into())?;
        Ok(if is_usize::<T>() { zeros.into_usizes() } else { zeros })
    }

    /// As [`zeros`](Self::zeros), for a dtype of a checked problem.
    pub(crate) fn zeros_of(dtype: DType, shape: Dims) -> Result<Self, Error> {
        let desc = TensorDesc::contiguous(dtype, shape);
        let overflow = InvalidCall::Overflow { what: "a tensor", shape };
        desc.span().ok_or_else(|| overflow.clone())?;
        let count = desc.element_count().ok_or(overflow)?;
        Ok(Self::zeroed(dtype, shape, count)?)
    }
}
