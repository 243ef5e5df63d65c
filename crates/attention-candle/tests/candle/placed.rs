//! Tensors of candle that lie in memory as a view does.

use attention::core::{Scalar, View, ViewMut};
use candle_core::{Result, Tensor, Var, WithDType};

use crate::device::device;

/// A view's elements in memory of candle's, as a contiguous buffer and the way from it to the tensor.
pub(crate) struct Placed {
    /// The buffer, with axes in the order of their strides, the gaps that the view has, and an inner axis for
    /// a stride of the last one.
    pub(crate) buffer: Tensor,
    /// The size of each axis of the buffer that belongs to the tensor.
    sizes: Vec<usize>,
    /// Where each axis of the tensor is among those of the buffer.
    order: Vec<usize>,
}

impl Placed {
    /// With the view's strides where candle can have them: none is negative, each is a multiple of the one
    /// below. Other tensors are contiguous.
    pub(crate) fn new<T: WithDType + Copy>(
        view: &View<'_>,
        at: impl Fn(&[usize]) -> T,
        gap: T,
    ) -> Result<Self> {
        let (shape, strides) = (view.shape(), view.desc().strides());
        let rank = shape.rank();
        // Axes of one element come first, where their strides do not matter.
        let mut order: Vec<usize> = (0..rank).collect();
        order.sort_by_key(|&axis| if shape[axis] == 1 { (0, 0) } else { (1, -strides[axis]) });
        let mut allocated: Vec<usize> = order.iter().map(|&axis| shape[axis]).collect();
        let mut inner = 1;
        let mut fits = !view.desc().is_empty();
        let long: Vec<usize> = (0..rank).filter(|&place| shape[order[place]] > 1).collect();
        for (index, &place) in long.iter().enumerate() {
            let stride = strides[order[place]];
            match index.checked_sub(1).map(|before| strides[order[long[before]]]) {
                _ if stride <= 0 => fits = false,
                None => {}
                Some(outer) if outer % stride == 0 && (outer / stride) as usize >= allocated[place] => {
                    allocated[place] = (outer / stride) as usize;
                }
                Some(_) => fits = false,
            }
            inner = stride.max(1) as usize;
        }
        if !fits {
            order = (0..rank).collect();
            allocated = shape.to_vec();
            inner = 1;
        }
        let sizes: Vec<usize> = order.iter().map(|&axis| shape[axis]).collect();
        allocated.push(inner);

        let mut data = vec![gap; allocated.iter().product()];
        for_each_index(&shape, |index| {
            let offset =
                order.iter().zip(&allocated).fold(0, |offset, (&axis, &size)| offset * size + index[axis]);
            data[offset * inner] = at(index);
        });
        let buffer = Tensor::from_vec(data, allocated, device())?;
        let mut places = vec![0; rank];
        for (place, &axis) in order.iter().enumerate() {
            places[axis] = place;
        }
        Ok(Self { buffer, sizes, order: places })
    }

    /// The same with a buffer that is a variable, which is returned too.
    pub(crate) fn variable(self) -> Result<(Self, Var)> {
        let variable = Var::from_tensor(&self.buffer)?;
        Ok((Self { buffer: variable.as_tensor().clone(), ..self }, variable))
    }

    /// The tensor in a buffer of this shape: the placed one, or its gradient.
    pub(crate) fn of(&self, buffer: &Tensor) -> Result<Tensor> {
        let inner = self.sizes.len();
        let mut tensor = buffer.narrow(inner, 0, 1)?.squeeze(inner)?;
        for (axis, &size) in self.sizes.iter().enumerate() {
            tensor = tensor.narrow(axis, 0, size)?;
        }
        tensor.permute(&self.order[..])
    }

    /// The tensor.
    pub(crate) fn tensor(&self) -> Result<Tensor> {
        self.of(&self.buffer)
    }
}

/// Writes a tensor of candle's to a view of the same shape.
pub(crate) fn write<T: WithDType + Scalar>(tensor: &Tensor, to: ViewMut<'_>) -> Result<()> {
    assert_eq!(tensor.dims(), &to.shape()[..]);
    let values = tensor.flatten_all()?.to_vec1::<T>()?;
    let shape = to.shape();
    let mut to = to.host_mut::<T>().expect("host memory of this dtype");
    let mut values = values.into_iter();
    for_each_index(&shape, |index| to.set(index, values.next().expect("as many elements")));
    Ok(())
}

/// Calls `visit` with every index of a shape, the last axis fastest.
pub(crate) fn for_each_index(shape: &[usize], mut visit: impl FnMut(&[usize])) {
    let mut index = vec![0; shape.len()];
    for flat in 0..shape.iter().product() {
        let mut rest: usize = flat;
        for axis in (0..shape.len()).rev() {
            index[axis] = rest % shape[axis];
            rest /= shape[axis];
        }
        visit(&index);
    }
}
