//! Feature `ndarray`: arrays of [`ndarray`] as inputs and outputs, of any strides.
//!
//! They are arrays of ndarray 0.17. Those of another version, such as 0.16, are other types to Rust, and end
//! in errors that a trait is not implemented: `View::strided` takes their memory, shape and strides as they
//! are.

use attention_core::{Dims, Element, InvalidCall, Role, Strides, View, ViewMut};
use ndarray::{Array, ArrayView, ArrayViewD, ArrayViewMut, Axis, Dimension, IxDyn};

use crate::{Attention, Error, IntoView, OtherTensor, Tensor};

/// An array as an input of a call: query, key, value, bias, and all others.
///
/// Made of an [`ArrayView`] or a reference to an [`Array`], of any strides. One whose elements fill their
/// memory is used as it lies, also with permuted, reversed or broadcast axes. One with gaps, such as every
/// second head, is copied, since `ndarray` lets others write to what lies between its elements meanwhile.
///
/// # Examples
/// ```
/// # #[cfg(feature = "cpu")] {
/// use attention::Attention;
/// use attention::arrays::Operand;
/// use ndarray::Array4;
///
/// // Stored [B, N, T, H].
/// let stored = Array4::<f32>::ones((1, 2, 5, 4));
/// let x = Operand::from(stored.view().permuted_axes([0, 2, 1, 3]));
/// assert!(!x.is_copied());
/// let out = Attention::new().causal(true).forward(&x, &x, &x)?;
/// let out: Array4<f32> = out.into_array()?;
/// assert_eq!(out.dim(), (1, 5, 2, 4));
/// # }
/// # Ok::<(), attention::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Operand<'a>(Memory<'a>);

#[derive(Clone, Debug)]
enum Memory<'a> {
    Borrowed(View<'a>),
    Copied(Tensor),
    /// More axes than any tensor of a call has.
    Refused(InvalidCall),
}

impl Operand<'_> {
    /// Whether the elements were copied, since there are gaps between them.
    pub fn is_copied(&self) -> bool {
        matches!(self.0, Memory::Copied(_))
    }
}

impl<'a, T: Element, D: Dimension> From<ArrayView<'a, T, D>> for Operand<'a> {
    fn from(array: ArrayView<'a, T, D>) -> Self {
        let array = array.into_dyn();
        let memory = match borrowed(array.clone()) {
            Ok(Some(view)) => Ok(Memory::Borrowed(view)),
            Ok(None) => copied(&array).map(Memory::Copied),
            Err(error) => Err(error),
        };
        Self(memory.unwrap_or_else(Memory::Refused))
    }
}

impl<'a, T: Element, D: Dimension> From<&'a Array<T, D>> for Operand<'a> {
    fn from(array: &'a Array<T, D>) -> Self {
        array.view().into()
    }
}

impl<'a> IntoView<'a> for &'a Operand<'_> {
    fn into_view(self) -> Result<View<'a>, InvalidCall> {
        match &self.0 {
            Memory::Borrowed(view) => Ok(*view),
            Memory::Copied(tensor) => Ok(tensor.view()),
            Memory::Refused(error) => Err(error.clone()),
        }
    }
}

/// The shape, or an error where no tensor of a call has as many axes.
fn dims(shape: &[usize]) -> Result<Dims, InvalidCall> {
    let (rank, max) = (shape.len(), attention_core::MAX_RANK);
    Dims::from_slice(shape).ok_or(InvalidCall::RankTooLarge { rank, max })
}

/// Strides, and how far the first element is from the lowest, for elements that fill their memory.
fn placed(shape: &[usize], strides: &[isize]) -> Result<(Strides, usize), InvalidCall> {
    let rank_error = InvalidCall::StridesRank { shape: shape.len(), strides: strides.len() };
    let offset = (shape.iter().zip(strides))
        .filter(|&(&size, &stride)| stride < 0 && size > 1)
        .map(|(&size, &stride)| (size - 1) * stride.unsigned_abs())
        .sum();
    Ok((Strides::from_slice(strides).ok_or(rank_error)?, offset))
}

/// The array's memory, or `None` where there are gaps in it.
fn borrowed<T: Element>(mut array: ArrayViewD<'_, T>) -> Result<Option<View<'_>>, InvalidCall> {
    let whole = dims(array.shape())?;
    // One element for all indices of an axis fills memory like one of a single index.
    for axis in (0..array.ndim()).map(Axis) {
        if array.stride_of(axis) == 0 && array.len_of(axis) > 1 {
            array.collapse_axis(axis, 0);
        }
    }
    let (shape, (strides, offset)) = (dims(array.shape())?, placed(array.shape(), array.strides())?);
    let Some(slice) = array.to_slice_memory_order() else { return Ok(None) };
    View::strided(slice, offset, shape, strides)?.expand(whole).map(Some)
}

fn copied<T: Element>(array: &ArrayViewD<'_, T>) -> Result<Tensor, InvalidCall> {
    Tensor::from_vec(array.iter().copied().collect(), dims(array.shape())?)
}

impl Tensor {
    /// The tensor as an array, without a copy: `Array4` for results with a batch axis, `Array3` without.
    ///
    /// # Errors
    /// [`OtherTensor`], which has the tensor, where its elements are of another type or it has another number
    /// of axes.
    pub fn into_array<T: Element, D: Dimension>(self) -> Result<Array<T, D>, OtherTensor> {
        let shape = self.shape();
        if let Some(axes) = D::NDIM.filter(|&axes| axes != shape.rank()) {
            let axes = format!("{} with {axes} {}", T::DTYPE, if axes == 1 { "axis" } else { "axes" });
            return Err(OtherTensor::new(self, axes));
        }
        let array = Array::from_shape_vec(IxDyn(&shape), self.into_vec::<T>()?);
        let array = array.unwrap_or_else(|_| unreachable!("a tensor has the elements of its shape"));
        Ok(array.into_dimensionality().unwrap_or_else(|_| unreachable!("the axes were compared")))
    }
}

impl Attention<'_> {
    /// As [`forward_into`](Self::forward_into), into an array of any strides. Where its elements do not fill
    /// their memory, the output is computed elsewhere and copied there.
    ///
    /// # Errors
    /// As [`forward_into`](Self::forward_into).
    ///
    /// # Examples
    /// ```
    /// # #[cfg(feature = "cpu")] {
    /// use attention::Attention;
    /// use attention::arrays::Operand;
    /// use ndarray::{Array4, s};
    ///
    /// let x = Array4::<f64>::ones((1, 3, 2, 4));
    /// let x = Operand::from(&x);
    /// // Rows 1 to 3 of an array of 5.
    /// let mut out = Array4::<f64>::zeros((1, 5, 2, 4));
    /// Attention::new().forward_into_array(&x, &x, &x, out.slice_mut(s![.., 1..4, .., ..]))?;
    /// assert_eq!(out.sum(), 3.0 * 2.0 * 4.0);
    /// # }
    /// # Ok::<(), attention::Error>(())
    /// ```
    pub fn forward_into_array<'b, T: Element, D: Dimension>(
        &self,
        query: impl IntoView<'b>,
        key: impl IntoView<'b>,
        value: impl IntoView<'b>,
        out: ArrayViewMut<'_, T, D>,
    ) -> Result<(), Error> {
        let input = |source| Error::Input { role: Role::Out, source };
        let mut out = out.into_dyn();
        let shape = dims(out.shape()).map_err(input)?;
        let (strides, offset) = placed(out.shape(), out.strides()).map_err(input)?;
        if let Some(slice) = out.as_slice_memory_order_mut() {
            let view = ViewMut::strided(slice, offset, shape, strides).map_err(input)?;
            return self.forward_into(query, key, value, view, None);
        }
        let mut elsewhere = Tensor::zeros::<T>(shape)?;
        self.forward_into(query, key, value, &mut elsewhere, None)?;
        let Ok(elsewhere) = elsewhere.into_array::<T, IxDyn>() else {
            unreachable!("a tensor of this type was made")
        };
        out.assign(&elsewhere);
        Ok(())
    }
}
