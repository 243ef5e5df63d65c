//! Feature `dlpack`: tensors of other libraries as views, and tensors of this one for them, through
//! [DLPack](https://dmlc.github.io/dlpack/latest/).
//!
//! [`view`] and [`view_mut`] borrow a `DLTensor`, in host or CUDA memory. [`Import`] owns what a capsule
//! holds, of either kind, and gives it back when it is dropped. [`Export`] is a [`Tensor`](crate::Tensor) of
//! this library on its way out.
//!
//! # Examples
//! ```
//! # #[cfg(feature = "cpu")] {
//! use attention::dlpack::{Export, Import};
//! use attention::{Attention, Tensor};
//!
//! // What another library would hand over.
//! let capsule = Export::from(Tensor::from_vec(vec![1.0f32; 24], [1, 3, 2, 4])?).into_versioned();
//!
//! // SAFETY: the capsule was just made, and nobody else has it.
//! let x = unsafe { Import::from_versioned(capsule) }?;
//! let out = Attention::new().forward(x.view()?, x.view()?, x.view()?)?;
//! assert_eq!(out.as_slice::<f32>(), Some(&[1.0; 24][..]));
//! # }
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

#![allow(unsafe_code)]

mod export;
pub mod ffi;

use std::ptr::NonNull;

use attention_core::{DType, Device, Dims, InvalidCall, MAX_RANK, Strides, TensorDesc, View, ViewMut};

pub use export::Export;

/// Why a tensor of another library is none for this one. `Debug` is the text.
#[derive(Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A capsule without a tensor.
    #[error("the capsule holds null")]
    Null,
    /// Structs of another version.
    #[error("the capsule has DLPack {}.{}, expected {}.x", .version.major, .version.minor, ffi::VERSION.major)]
    Version {
        /// The capsule's version.
        version: ffi::Version,
    },
    /// Memory that no implementation here works on.
    #[error("the tensor is on DLPack device type {}, number {}; expected 1 or 3 (host) or 2 or 13 (CUDA)", .device.device_type, .device.device_id)]
    Device {
        /// Where the tensor is.
        device: ffi::Device,
    },
    /// Elements that no tensor of a call has.
    #[error(
        "the tensor has {}; expected a float of 64, 32 or 16 bits, a bfloat of 16, e4m3fn or e5m2 for keys and values, a \
         boolean of 8, or for lengths, offsets and seeds a signed integer of 64 or 32 bits or an unsigned one of 32{}",
        elements(.dtype),
        integers_as_masks(.dtype)
    )]
    DType {
        /// The type of its elements.
        dtype: ffi::DataType,
    },
    /// More axes than any tensor of a call has, or fewer than none.
    #[error("the tensor has {ndim} axes, expected 0 to {MAX_RANK}")]
    Rank {
        /// How many axes it has.
        ndim: i32,
    },
    /// Axes without sizes.
    #[error("the tensor has {ndim} axes and no shape")]
    NoShape {
        /// How many axes it has.
        ndim: i32,
    },
    /// A size below zero or a number too large for this machine.
    #[error("axis {axis} of the tensor has size {size} and stride {stride}")]
    Axis {
        /// The axis.
        axis: usize,
        /// Its size.
        size: i64,
        /// Its stride.
        stride: i64,
    },
    /// Memory that must not be written.
    #[error("the tensor is read-only")]
    ReadOnly,
    /// No view can be made: a pointer that is null or misaligned, strides that overlap.
    #[error(transparent)]
    View(#[from] InvalidCall),
}

impl std::fmt::Debug for Error {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        std::fmt::Display::fmt(self, f)
    }
}

/// The type of elements in words.
fn elements(dtype: &ffi::DataType) -> String {
    let ffi::DataType { code, bits, lanes } = dtype;
    let s = |count: u32| if count == 1 { "" } else { "s" };
    let name = match code {
        0 => "signed integer",
        1 => "unsigned integer",
        2 => "float",
        4 => "bfloat",
        5 => "complex",
        6 => "boolean",
        7..=14 => "float of 8 bits",
        _ => "unknown",
    };
    let (bit, lane) = (s(u32::from(*bits)), s(u32::from(*lanes)));
    format!("DLPack elements of code {code} ({name}), {bits} bit{bit}, {lanes} lane{lane}")
}

/// What a mask of integers is elsewhere, since no two libraries agree.
fn integers_as_masks(dtype: &ffi::DataType) -> &'static str {
    match dtype.code {
        0 | 1 => {
            " (a mask of integers is added to the logits in MLX and tinygrad, selects where it is not 0 in Keras, and is \
             refused by torch and JAX: make it boolean with `mask != 0`, or floats for a bias)"
        }
        _ => "",
    }
}

/// A `DLTensor` as a view.
///
/// # Errors
/// [`Error`] where its device, dtype or axes are none of a call's, or its pointer is null or misaligned.
///
/// # Safety
/// `shape` points to as many sizes as there are axes, `strides` is null or points to as many strides. During
/// `'a` the memory from the tensor's lowest to its highest element is allocated where it says, initialised,
/// and not written by anybody; in CUDA memory, in the order of the stream that the call's implementation is
/// on.
pub unsafe fn view<'a>(tensor: &ffi::Tensor) -> Result<View<'a>, Error> {
    // SAFETY: the caller promised that shape and strides point to as many numbers as there are axes.
    let (device, desc) = unsafe { describe(tensor) }?;
    let pointer = tensor.data.cast::<u8>().wrapping_add(offset(tensor)?);
    // SAFETY: the caller promised that the memory of all elements is allocated on this device, initialised,
    // and not written during `'a`.
    Ok(unsafe { View::from_raw_parts(pointer, device, desc) }?)
}

/// A `DLTensor` as a view that is written.
///
/// # Errors
/// As [`view`], and where two indices reach the same element.
///
/// # Safety
/// `shape` and `strides` are as [`view`] asks. During `'a` the elements are allocated where the tensor says,
/// initialised, and neither read nor written through anything but the view; the memory between them may be.
/// In CUDA memory, this is in the order of the stream that the call's implementation is on.
pub unsafe fn view_mut<'a>(tensor: &ffi::Tensor) -> Result<ViewMut<'a>, Error> {
    // SAFETY: the caller promised that shape and strides point to as many numbers as there are axes.
    let (device, desc) = unsafe { describe(tensor) }?;
    let pointer = tensor.data.cast::<u8>().wrapping_add(offset(tensor)?);
    // SAFETY: the caller promised that all elements are allocated on this device, initialised, and neither
    // read nor written through anything else during `'a`.
    Ok(unsafe { ViewMut::from_raw_parts(pointer, device, desc) }?)
}

fn offset(tensor: &ffi::Tensor) -> Result<usize, Error> {
    usize::try_from(tensor.byte_offset)
        .map_err(|_| InvalidCall::Overflow { what: "a byte offset", shape: Dims::from([]) }.into())
}

/// Where a tensor is, and its dtype, shape and strides.
///
/// # Safety
/// `shape` points to as many sizes as there are axes, and `strides` is null or points to as many strides.
unsafe fn describe(tensor: &ffi::Tensor) -> Result<(Device, TensorDesc), Error> {
    let ffi::Device { device_type, device_id } = tensor.device;
    let device = match (device_type, u32::try_from(device_id)) {
        (1 | 3, _) => Device::Cpu,
        (2 | 13, Ok(ordinal)) => Device::Cuda(ordinal),
        _ => return Err(Error::Device { device: tensor.device }),
    };
    let dtype = match (tensor.dtype.code, tensor.dtype.bits, tensor.dtype.lanes) {
        (2, 64, 1) => DType::F64,
        (2, 32, 1) => DType::F32,
        (2, 16, 1) => DType::F16,
        (4, 16, 1) => DType::Bf16,
        // Not their neighbours, which are other formats of 8 bits, e4m3fnuz (11) and e5m2fnuz (13) among them.
        (10, 8, 1) => DType::F8E4M3,
        (12, 8, 1) => DType::F8E5M2,
        (6, 8, 1) => DType::Bool,
        (0, 64, 1) => DType::I64,
        (0, 32, 1) => DType::I32,
        (1, 32, 1) => DType::U32,
        _ => return Err(Error::DType { dtype: tensor.dtype }),
    };
    let ndim = tensor.ndim;
    let rank = usize::try_from(ndim).ok().filter(|&rank| rank <= MAX_RANK).ok_or(Error::Rank { ndim })?;
    if rank > 0 && tensor.shape.is_null() {
        return Err(Error::NoShape { ndim });
    }
    let (mut shape, mut strides) = ([0usize; MAX_RANK], [0isize; MAX_RANK]);
    for axis in 0..rank {
        // SAFETY: the caller promised as many sizes as axes; the axis is one of them, and the pointer is not
        // null.
        let size = unsafe { tensor.shape.add(axis).read() };
        let stride = match tensor.strides.is_null() {
            true => 0,
            // SAFETY: the caller promised as many strides as axes; the axis is one of them, and the pointer
            // is not null.
            false => unsafe { tensor.strides.add(axis).read() },
        };
        let wrong = Error::Axis { axis, size, stride };
        shape[axis] = usize::try_from(size).map_err(|_| wrong.clone())?;
        strides[axis] = isize::try_from(stride).map_err(|_| wrong)?;
    }
    let shape = Dims::from_slice(&shape[..rank]).ok_or(Error::Rank { ndim })?;
    let desc = if tensor.strides.is_null() {
        TensorDesc::contiguous(dtype, shape)
    } else {
        let strides = Strides::from_slice(&strides[..rank]).ok_or(Error::Rank { ndim })?;
        TensorDesc::strided(dtype, shape, strides).ok_or(Error::Rank { ndim })?
    };
    Ok((device, desc))
}

/// A tensor of another library, taken out of its capsule, and given back to its owner when dropped.
#[derive(Debug)]
pub struct Import(Managed);

#[derive(Debug)]
enum Managed {
    Unversioned(NonNull<ffi::ManagedTensor>),
    Versioned(NonNull<ffi::ManagedTensorVersioned>),
}

// SAFETY: the caller of the constructor promised that the deleter may be called from any thread; all else in
// the structs is plain data that stays as it is until then.
unsafe impl Send for Import {}

impl Import {
    /// What a capsule without a version holds, `dltensor` in Python.
    ///
    /// # Errors
    /// [`Error::Null`].
    ///
    /// # Safety
    /// The pointer is null or to a managed tensor that the caller owns and hands over: nobody else calls its
    /// deleter, which may be called from any thread. Until then its structs stay as they are, and its memory
    /// is as [`view`] asks.
    pub unsafe fn from_unversioned(managed: *mut ffi::ManagedTensor) -> Result<Self, Error> {
        Ok(Self(Managed::Unversioned(NonNull::new(managed).ok_or(Error::Null)?)))
    }

    /// What a capsule with a version holds, `dltensor_versioned` in Python.
    ///
    /// # Errors
    /// [`Error::Null`]; [`Error::Version`], with the tensor given back.
    ///
    /// # Safety
    /// The pointer is null or to a managed tensor that the caller owns and hands over: nobody else calls its
    /// deleter, which may be called from any thread. Until then its structs stay as they are, and its memory
    /// is as [`view`] asks.
    pub unsafe fn from_versioned(managed: *mut ffi::ManagedTensorVersioned) -> Result<Self, Error> {
        let managed = NonNull::new(managed).ok_or(Error::Null)?;
        // Dropped where the version is another one: the deleter is where it always is.
        let import = Self(Managed::Versioned(managed));
        // SAFETY: the caller promised a managed tensor; the version is its first field in every version.
        let version = unsafe { (*managed.as_ptr()).version };
        if version.major != ffi::VERSION.major {
            return Err(Error::Version { version });
        }
        Ok(import)
    }

    fn tensor(&self) -> &ffi::Tensor {
        match &self.0 {
            // SAFETY: the caller of the constructor promised that the structs stay as they are until the
            // deleter is called, which takes this value.
            Managed::Unversioned(managed) => unsafe { &(*managed.as_ptr()).dl_tensor },
            // SAFETY: the caller of the constructor promised that the structs stay as they are until the
            // deleter is called, which takes this value.
            Managed::Versioned(managed) => unsafe { &(*managed.as_ptr()).dl_tensor },
        }
    }

    /// Whether the owner forbids writing, which a capsule without a version cannot say.
    pub fn is_read_only(&self) -> bool {
        match &self.0 {
            Managed::Unversioned(_) => false,
            // SAFETY: the caller of the constructor promised that the structs stay as they are until the
            // deleter is called, which takes this value.
            Managed::Versioned(managed) => unsafe { (*managed.as_ptr()).flags & ffi::READ_ONLY != 0 },
        }
    }

    /// The tensor.
    ///
    /// # Errors
    /// As [`view`].
    pub fn view(&self) -> Result<View<'_>, Error> {
        // SAFETY: the caller of the constructor promised that shape, strides and memory are as `view` asks
        // until the deleter is called, which takes this value, so for as long as the borrow of it.
        unsafe { view(self.tensor()) }
    }

    /// The tensor, to be written.
    ///
    /// # Errors
    /// As [`view_mut`], and [`Error::ReadOnly`].
    ///
    /// # Safety
    /// Nobody else reads or writes the elements while the view lives: the owner may still have the tensor.
    pub unsafe fn view_mut(&mut self) -> Result<ViewMut<'_>, Error> {
        if self.is_read_only() {
            return Err(Error::ReadOnly);
        }
        // SAFETY: the caller of the constructor promised that shape, strides and memory are as `view` asks
        // until the deleter is called; the caller of this method promised that nothing else reads or writes
        // the elements while the view lives.
        unsafe { view_mut(self.tensor()) }
    }
}

impl Drop for Import {
    fn drop(&mut self) {
        match &self.0 {
            Managed::Unversioned(managed) => {
                // SAFETY: the caller of the constructor promised that the structs are there until the deleter
                // is called, and that only this value calls it, which it does here, once.
                unsafe {
                    if let Some(deleter) = (*managed.as_ptr()).deleter {
                        deleter(managed.as_ptr());
                    }
                }
            }
            Managed::Versioned(managed) => {
                // SAFETY: the caller of the constructor promised that the structs are there until the deleter
                // is called, and that only this value calls it, which it does here, once. The deleter is in
                // the same place in every version.
                unsafe {
                    if let Some(deleter) = (*managed.as_ptr()).deleter {
                        deleter(managed.as_ptr());
                    }
                }
            }
        }
    }
}
