//! What the facade takes as a tensor.

use attention_core::{Dims, Element, InvalidCall, View, ViewMut};

use crate::Tensor;

/// Anything that the facade takes as an input: a [`View`], a reference to a [`Tensor`], or a slice with its
/// shape.
///
/// Crates of tensors join by implementing it for their own types.
///
/// # Examples
/// ```
/// use attention::{IntoView, Tensor};
///
/// let data = vec![0.0f32; 24];
/// let from_slice = (&data, [1, 2, 3, 4]).into_view()?;
/// let tensor = Tensor::from_vec(data.clone(), [1, 2, 3, 4])?;
/// assert_eq!((&tensor).into_view()?.desc(), from_slice.desc());
/// # Ok::<(), attention::InvalidCall>(())
/// ```
pub trait IntoView<'a> {
    /// The tensor as a view.
    ///
    /// # Errors
    /// [`InvalidCall`] where there is no such view: a slice whose length does not fit its shape.
    fn into_view(self) -> Result<View<'a>, InvalidCall>;
}

/// Anything that the facade takes as memory to write to: a [`ViewMut`], a mutable reference to a [`Tensor`],
/// or a mutable slice with its shape.
pub trait IntoViewMut<'a> {
    /// The tensor as a view that is written.
    ///
    /// # Errors
    /// As [`IntoView::into_view`].
    fn into_view_mut(self) -> Result<ViewMut<'a>, InvalidCall>;
}

impl<'a> IntoView<'a> for View<'a> {
    fn into_view(self) -> Result<View<'a>, InvalidCall> {
        Ok(self)
    }
}

impl<'a> IntoView<'a> for &View<'a> {
    fn into_view(self) -> Result<View<'a>, InvalidCall> {
        Ok(*self)
    }
}

impl<'a> IntoView<'a> for &'a Tensor {
    fn into_view(self) -> Result<View<'a>, InvalidCall> {
        Ok(self.view())
    }
}

impl<'a> IntoViewMut<'a> for ViewMut<'a> {
    fn into_view_mut(self) -> Result<ViewMut<'a>, InvalidCall> {
        Ok(self)
    }
}

impl<'a> IntoViewMut<'a> for &'a mut ViewMut<'_> {
    fn into_view_mut(self) -> Result<ViewMut<'a>, InvalidCall> {
        Ok(self.reborrow())
    }
}

impl<'a> IntoViewMut<'a> for &'a mut Tensor {
    fn into_view_mut(self) -> Result<ViewMut<'a>, InvalidCall> {
        Ok(self.view_mut())
    }
}

/// Pairs of something that holds a slice, and a shape; by value and by reference.
macro_rules! pairs {
    ($(($holder:ty, $($const_name:ident)?),)*) => {$(
        impl<'a, T: Element, S: Into<Dims>, $(const $const_name: usize)?> IntoView<'a> for (&'a $holder, S) {
            fn into_view(self) -> Result<View<'a>, InvalidCall> {
                View::from_slice(&self.0[..], self.1)
            }
        }

        impl<'a, T: Element, S: Into<Dims> + Copy, $(const $const_name: usize)?> IntoView<'a>
            for &(&'a $holder, S)
        {
            fn into_view(self) -> Result<View<'a>, InvalidCall> {
                View::from_slice(&self.0[..], self.1)
            }
        }

        impl<'a, T: Element, S: Into<Dims>, $(const $const_name: usize)?> IntoViewMut<'a>
            for (&'a mut $holder, S)
        {
            fn into_view_mut(self) -> Result<ViewMut<'a>, InvalidCall> {
                ViewMut::from_slice(&mut self.0[..], self.1)
            }
        }
    )*};
}

pairs! {
    ([T],),
    (Vec<T>,),
    ([T; LEN], LEN),
}
