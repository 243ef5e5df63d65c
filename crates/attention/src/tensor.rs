//! An owned tensor in host memory.

use std::any::{Any, TypeId};

use attention_core::{DType, Dims, Element, F8E4M3, F8E5M2, InvalidCall, OutOfMemory, View, ViewMut};
use half::{bf16, f16};

/// An owned, row-major tensor in host memory: what the facade returns, and one way to hand it inputs.
///
/// # Examples
/// ```
/// use attention::Tensor;
///
/// let tensor = Tensor::from_vec(vec![1.0f32, 2.0, 3.0, 4.0], [1, 2, 1, 2])?;
/// assert_eq!(tensor.as_slice::<f32>(), Some(&[1.0, 2.0, 3.0, 4.0][..]));
/// assert_eq!(tensor.as_slice::<f64>(), None);
/// # Ok::<(), attention::InvalidCall>(())
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct Tensor {
    shape: Dims,
    data: Data,
}

/// A [`Tensor`] that is not what it was to be turned into: of another element type, or with another number of
/// axes. [`into_tensor`](Self::into_tensor) gives it back, unchanged.
///
/// # Examples
/// ```
/// use attention::Tensor;
///
/// let error = Tensor::from_vec(vec![1.0f32, 2.0], [2])?.into_vec::<f64>().unwrap_err();
/// assert_eq!(error.to_string(), "the tensor is f32 [2], expected f64");
/// assert_eq!(error.into_tensor().into_vec::<f32>()?, [1.0, 2.0]);
/// # Ok::<(), attention::Error>(())
/// ```
#[derive(Clone, PartialEq, thiserror::Error)]
#[error("the tensor is {} {}, expected {expected}", .tensor.element(), .tensor.shape())]
pub struct OtherTensor {
    tensor: Tensor,
    expected: String,
}

impl OtherTensor {
    pub(crate) fn new(tensor: Tensor, expected: impl Into<String>) -> Self {
        Self { tensor, expected: expected.into() }
    }

    /// The tensor, unchanged.
    pub fn into_tensor(self) -> Tensor {
        self.tensor
    }
}

impl std::fmt::Debug for OtherTensor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        std::fmt::Display::fmt(self, f)
    }
}

#[derive(Clone, Debug, PartialEq)]
enum Data {
    F64(Vec<f64>),
    F32(Vec<f32>),
    F16(Vec<f16>),
    Bf16(Vec<bf16>),
    F8E4M3(Vec<F8E4M3>),
    F8E5M2(Vec<F8E5M2>),
    Bool(Vec<bool>),
    I32(Vec<i32>),
    U32(Vec<u32>),
    I64(Vec<i64>),
    /// Of the dtype that has its size.
    Usize(Vec<usize>),
}

/// Runs the same expression on the vector of whichever dtype there is.
macro_rules! with_data {
    ($data:expr, $vec:ident => $expression:expr) => {
        match $data {
            Data::F64($vec) => $expression,
            Data::F32($vec) => $expression,
            Data::F16($vec) => $expression,
            Data::Bf16($vec) => $expression,
            Data::F8E4M3($vec) => $expression,
            Data::F8E5M2($vec) => $expression,
            Data::Bool($vec) => $expression,
            Data::I32($vec) => $expression,
            Data::U32($vec) => $expression,
            Data::I64($vec) => $expression,
            Data::Usize($vec) => $expression,
        }
    };
}

/// A value as another type, where the two are the same type.
fn same_type<A: 'static, B: 'static>(value: A) -> Option<B> {
    let mut slot = Some(value);
    (&mut slot as &mut dyn Any).downcast_mut::<Option<B>>()?.take()
}

/// Whether elements are of the type that shares its dtype with another.
pub(crate) fn is_usize<T: 'static>() -> bool {
    TypeId::of::<T>() == TypeId::of::<usize>()
}

impl Tensor {
    /// A tensor of these elements, in row-major order.
    ///
    /// # Errors
    /// [`InvalidCall::BufferLength`] where the shape has another number of elements,
    /// [`InvalidCall::Overflow`].
    pub fn from_vec<T: Element>(data: Vec<T>, shape: impl Into<Dims>) -> Result<Self, InvalidCall> {
        let shape = shape.into();
        // The view's checks are the tensor's.
        View::from_slice(&data, shape)?;
        let data = match T::DTYPE {
            _ if is_usize::<T>() => same_type(data).map(Data::Usize),
            DType::F64 => same_type(data).map(Data::F64),
            DType::F32 => same_type(data).map(Data::F32),
            DType::F16 => same_type(data).map(Data::F16),
            DType::Bf16 => same_type(data).map(Data::Bf16),
            DType::F8E4M3 => same_type(data).map(Data::F8E4M3),
            DType::F8E5M2 => same_type(data).map(Data::F8E5M2),
            DType::Bool => same_type(data).map(Data::Bool),
            DType::I32 => same_type(data).map(Data::I32),
            DType::U32 => same_type(data).map(Data::U32),
            DType::I64 => same_type(data).map(Data::I64),
            _ => None,
        };
        let Some(data) = data else {
            unreachable!("the element types are a closed set, each with its own dtype but usize");
        };
        Ok(Self { shape, data })
    }

    /// The same elements as usize, of those that have its size.
    pub(crate) fn into_usizes(self) -> Self {
        let data = match self.data {
            Data::I64(data) => {
                bytemuck::try_cast_vec(data).map(Data::Usize).unwrap_or_else(|(_, data)| Data::I64(data))
            }
            Data::U32(data) => {
                bytemuck::try_cast_vec(data).map(Data::Usize).unwrap_or_else(|(_, data)| Data::U32(data))
            }
            other => other,
        };
        Self { data, ..self }
    }

    /// A tensor of zeros with this many elements.
    pub(crate) fn zeroed(dtype: DType, shape: Dims, count: usize) -> Result<Self, OutOfMemory> {
        Ok(Self { shape, data: Data::zeros(dtype, count)? })
    }

    /// The element type.
    pub fn dtype(&self) -> DType {
        match self.data {
            Data::F64(_) => DType::F64,
            Data::F32(_) => DType::F32,
            Data::F16(_) => DType::F16,
            Data::Bf16(_) => DType::Bf16,
            Data::F8E4M3(_) => DType::F8E4M3,
            Data::F8E5M2(_) => DType::F8E5M2,
            Data::Bool(_) => DType::Bool,
            Data::I32(_) => DType::I32,
            Data::U32(_) => DType::U32,
            Data::I64(_) => DType::I64,
            Data::Usize(_) => usize::DTYPE,
        }
    }

    /// The name of the type of the elements.
    fn element(&self) -> &'static str {
        match self.data {
            Data::Usize(_) => "usize",
            _ => self.dtype().name(),
        }
    }

    /// The shape.
    pub fn shape(&self) -> Dims {
        self.shape
    }

    /// The number of elements.
    pub fn len(&self) -> usize {
        with_data!(&self.data, data => data.len())
    }

    /// Whether there are no elements.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The elements in row-major order, or `None` where they are of another type.
    pub fn as_slice<T: Element>(&self) -> Option<&[T]> {
        with_data!(&self.data, data => (data as &dyn Any).downcast_ref::<Vec<T>>()).map(Vec::as_slice)
    }

    /// The elements in row-major order, to be changed, or `None` where they are of another type.
    pub fn as_mut_slice<T: Element>(&mut self) -> Option<&mut [T]> {
        with_data!(&mut self.data, data => (data as &mut dyn Any).downcast_mut::<Vec<T>>())
            .map(Vec::as_mut_slice)
    }

    /// The elements in row-major order, without a copy.
    ///
    /// # Errors
    /// [`OtherTensor`], which has the tensor, where the elements are of another type.
    pub fn into_vec<T: Element>(self) -> Result<Vec<T>, OtherTensor> {
        if self.as_slice::<T>().is_none() {
            return Err(OtherTensor::new(self, if is_usize::<T>() { "usize" } else { T::DTYPE.name() }));
        }
        let Some(data) = with_data!(self.data, data => same_type::<_, Vec<T>>(data)) else {
            unreachable!("the slice is of this type");
        };
        Ok(data)
    }

    /// A view of the whole tensor.
    pub fn view(&self) -> View<'_> {
        with_data!(&self.data, data => View::from_slice(data, self.shape)).expect("checked when it was made")
    }

    /// A view of the whole tensor, to be written.
    pub fn view_mut(&mut self) -> ViewMut<'_> {
        with_data!(&mut self.data, data => ViewMut::from_slice(data, self.shape))
            .expect("checked when it was made")
    }
}

impl Data {
    /// Asks the allocator for zeroed memory, which it maps when it is first touched, and survives a refusal.
    fn zeros(dtype: DType, count: usize) -> Result<Self, OutOfMemory> {
        let data = match dtype {
            DType::F64 => bytemuck::try_zeroed_vec(count).map(Self::F64),
            DType::F32 => bytemuck::try_zeroed_vec(count).map(Self::F32),
            DType::F16 => bytemuck::try_zeroed_vec(count).map(Self::F16),
            DType::Bf16 => bytemuck::try_zeroed_vec(count).map(Self::Bf16),
            DType::F8E4M3 => bytemuck::try_zeroed_vec(count).map(Self::F8E4M3),
            DType::F8E5M2 => bytemuck::try_zeroed_vec(count).map(Self::F8E5M2),
            DType::Bool => bytemuck::try_zeroed_vec(count).map(Self::Bool),
            DType::I32 => bytemuck::try_zeroed_vec(count).map(Self::I32),
            DType::U32 => bytemuck::try_zeroed_vec(count).map(Self::U32),
            DType::I64 => bytemuck::try_zeroed_vec(count).map(Self::I64),
            _ => unreachable!("no problem and no element type has dtype {dtype}"),
        };
        data.map_err(|()| OutOfMemory { what: "a tensor", bytes: count.saturating_mul(dtype.size()) })
    }
}

#[cfg(test)]
mod tests {
    use attention_core::{Float8, TensorDesc};

    use super::*;

    fn round_trip<T: Element + PartialEq + std::fmt::Debug>(values: Vec<T>) {
        let mut tensor = Tensor::from_vec(values.clone(), [values.len()]).unwrap();
        assert_eq!(tensor.dtype(), T::DTYPE);
        assert_eq!(tensor.as_slice::<T>(), Some(&values[..]));
        assert_eq!(tensor.view().desc(), TensorDesc::contiguous(T::DTYPE, [values.len()]));
        assert_eq!(tensor.view_mut().desc(), tensor.view().desc());
        tensor.as_mut_slice::<T>().unwrap()[0] = values[1];
        assert_eq!(tensor.into_vec::<T>().unwrap()[0], values[1]);
    }

    #[test]
    fn every_element_type_goes_in_and_out() {
        round_trip(vec![1.0f64, 2.0]);
        round_trip(vec![1.0f32, 2.0]);
        round_trip(vec![f16::from_f32(1.0), f16::from_f32(2.0)]);
        round_trip(vec![bf16::from_f32(1.0), bf16::from_f32(2.0)]);
        round_trip([1, 2].map(F8E4M3::from_bits).to_vec());
        round_trip([1, 2].map(F8E5M2::from_bits).to_vec());
        round_trip(vec![true, false]);
        round_trip(vec![1i32, -2]);
        round_trip(vec![1u32, 2]);
        round_trip(vec![1i64, -2]);
        round_trip(vec![1usize, 2]);
    }

    #[test]
    fn another_type_gets_nothing() {
        let mut tensor = Tensor::zeros::<f32>([2, 3]).unwrap();
        assert_eq!((tensor.len(), tensor.is_empty(), tensor.shape()), (6, false, [2, 3].into()));
        assert!(tensor.as_slice::<f64>().is_none());
        assert!(tensor.as_mut_slice::<bool>().is_none());
        let lengths = Tensor::from_vec(vec![3usize, 2], [2]).unwrap();
        assert!(lengths.as_slice::<i64>().is_none());
        let error = lengths.into_vec::<i64>().unwrap_err();
        assert_eq!(error.to_string(), "the tensor is usize [2], expected i64");
        let error = Tensor::from_vec(vec![3i64, 2], [2]).unwrap().into_vec::<usize>().unwrap_err();
        assert_eq!(error.to_string(), "the tensor is i64 [2], expected usize");
        assert_eq!(Tensor::zeros::<usize>([2]).unwrap().as_slice(), Some(&[0usize; 2][..]));
        let error = tensor.clone().into_vec::<f64>().unwrap_err();
        assert_eq!(error.to_string(), "the tensor is f32 [2, 3], expected f64");
        assert_eq!(format!("{error:?}"), error.to_string());
        assert_eq!(crate::Error::from(error.clone()).to_string(), error.to_string());
        assert_eq!(error.into_tensor(), tensor);
    }

    #[test]
    fn wrong_sizes_are_errors() {
        let error = Tensor::from_vec(vec![0.0f32; 5], [2, 3]).unwrap_err();
        assert_eq!(error.to_string(), "shape [2, 3] has 6 elements, the slice has 5");
        let error = Tensor::zeros::<f32>([usize::MAX, 2]).unwrap_err();
        assert!(error.to_string().contains("overflows the address space"), "{error}");
        // Fits an address space, and no machine.
        let error = Tensor::zeros::<f64>([1 << 59]).unwrap_err();
        assert_eq!(error.to_string(), "no memory for a tensor of 4611686018427387904 bytes");
    }

    #[test]
    fn empty_tensors_work() {
        let mut tensor = Tensor::zeros::<f32>([2, 0, 4]).unwrap();
        assert!(tensor.is_empty());
        assert!(tensor.view_mut().desc().is_empty());
        assert_eq!(tensor.into_vec::<f32>(), Ok(vec![]));
    }
}
