//! Tensors of this library for others.

use std::ffi::c_void;

use attention_core::{DType, MAX_RANK};

use super::ffi;
use crate::Tensor;

/// A [`Tensor`] on its way to another library, which gets its memory without a copy.
///
/// Made of a tensor; [`into_unversioned`](Self::into_unversioned) and
/// [`into_versioned`](Self::into_versioned) give what a capsule holds. Its deleter frees the tensor.
#[derive(Debug)]
pub struct Export(Tensor);

impl From<Tensor> for Export {
    fn from(tensor: Tensor) -> Self {
        Self(tensor)
    }
}

/// What an exported tensor points into: moved nowhere while it is out.
struct Owner<M> {
    managed: M,
    tensor: Tensor,
    shape: [i64; MAX_RANK],
    strides: [i64; MAX_RANK],
}

impl<M> Owner<M> {
    /// Puts the owner on the heap, and gives it with its description.
    fn new(tensor: Tensor, empty: M) -> (*mut Self, ffi::Tensor) {
        let mut owner =
            Box::new(Self { managed: empty, tensor, shape: [0; MAX_RANK], strides: [0; MAX_RANK] });
        let mut view = owner.tensor.view_mut();
        let (desc, data) = (view.desc(), view.as_mut_ptr());
        // A tensor fits an address space, so its sizes and strides do.
        for axis in 0..desc.rank() {
            owner.shape[axis] = desc.shape()[axis] as i64;
            owner.strides[axis] = desc.strides()[axis] as i64;
        }
        let (code, bits) = match desc.dtype() {
            DType::F64 => (2, 64),
            DType::F32 => (2, 32),
            DType::F16 => (2, 16),
            DType::Bf16 => (4, 16),
            DType::F8E4M3 => (10, 8),
            DType::F8E5M2 => (12, 8),
            DType::Bool => (6, 8),
            DType::I64 => (0, 64),
            DType::I32 => (0, 32),
            DType::U32 => (1, 32),
            other => unreachable!("no tensor has dtype {other}"),
        };
        let owner = Box::into_raw(owner);
        // SAFETY: the pointer was just made of a box, so it points to a live owner; the addresses of its
        // fields are taken, and nothing is read.
        let (shape, strides) = unsafe { (&raw mut (*owner).shape, &raw mut (*owner).strides) };
        let description = ffi::Tensor {
            data: if desc.is_empty() { std::ptr::null_mut() } else { data.cast::<c_void>() },
            device: ffi::Device { device_type: 1, device_id: 0 },
            ndim: desc.rank() as i32,
            dtype: ffi::DataType { code, bits, lanes: 1 },
            shape: shape.cast(),
            strides: strides.cast(),
            byte_offset: 0,
        };
        (owner, description)
    }
}

impl Export {
    /// What a capsule without a version holds, `dltensor` in Python. Whoever gets it calls its deleter, once.
    pub fn into_unversioned(self) -> *mut ffi::ManagedTensor {
        /// Frees an owner.
        ///
        /// # Safety
        /// The pointer is null or one that `into_unversioned` gave, and this is the only call with it.
        unsafe extern "C" fn delete(managed: *mut ffi::ManagedTensor) {
            if managed.is_null() {
                return;
            }
            // SAFETY: the caller guarantees that `into_unversioned` gave the pointer, which put the box of
            // the owner into `manager_ctx`, and that this is the only call with it.
            let owner = unsafe { Box::from_raw((*managed).manager_ctx.cast::<Owner<ffi::ManagedTensor>>()) };
            drop(owner);
        }
        let empty = ffi::ManagedTensor {
            dl_tensor: NOTHING,
            manager_ctx: std::ptr::null_mut(),
            deleter: Some(delete),
        };
        let (owner, dl_tensor) = Owner::new(self.0, empty);
        // SAFETY: the owner was just put on the heap, and nobody else has its address.
        unsafe {
            (*owner).managed =
                ffi::ManagedTensor { dl_tensor, manager_ctx: owner.cast(), deleter: Some(delete) };
            &raw mut (*owner).managed
        }
    }

    /// What a capsule with a version holds, `dltensor_versioned` in Python. Whoever gets it calls its
    /// deleter, once.
    pub fn into_versioned(self) -> *mut ffi::ManagedTensorVersioned {
        /// Frees an owner.
        ///
        /// # Safety
        /// The pointer is null or one that `into_versioned` gave, and this is the only call with it.
        unsafe extern "C" fn delete(managed: *mut ffi::ManagedTensorVersioned) {
            if managed.is_null() {
                return;
            }
            // SAFETY: the caller guarantees that `into_versioned` gave the pointer, which put the box of the
            // owner into `manager_ctx`, and that this is the only call with it.
            let owner =
                unsafe { Box::from_raw((*managed).manager_ctx.cast::<Owner<ffi::ManagedTensorVersioned>>()) };
            drop(owner);
        }
        let empty = ffi::ManagedTensorVersioned {
            version: ffi::VERSION,
            manager_ctx: std::ptr::null_mut(),
            deleter: Some(delete),
            flags: 0,
            dl_tensor: NOTHING,
        };
        let (owner, dl_tensor) = Owner::new(self.0, empty);
        // SAFETY: the owner was just put on the heap, and nobody else has its address.
        unsafe {
            (*owner).managed = ffi::ManagedTensorVersioned { manager_ctx: owner.cast(), dl_tensor, ..empty };
            &raw mut (*owner).managed
        }
    }
}

/// Until the owner has an address.
const NOTHING: ffi::Tensor = ffi::Tensor {
    data: std::ptr::null_mut(),
    device: ffi::Device { device_type: 1, device_id: 0 },
    ndim: 0,
    dtype: ffi::DataType { code: 2, bits: 32, lanes: 1 },
    shape: std::ptr::null_mut(),
    strides: std::ptr::null_mut(),
    byte_offset: 0,
};
