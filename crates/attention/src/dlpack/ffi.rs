//! The structs of DLPack (`dlpack.h`, version 1.1), as C has them.

use std::ffi::c_void;

/// The version of the structs that are written here.
pub const VERSION: Version = Version { major: 1, minor: 1 };

/// The bit of [`ManagedTensorVersioned::flags`] that forbids writing.
pub const READ_ONLY: u64 = 1;

/// `DLPackVersion`. Another major version has other structs.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Version {
    /// Changes with the structs.
    pub major: u32,
    /// Changes with what numbers may stand in them.
    pub minor: u32,
}

/// `DLDevice`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Device {
    /// 1 host memory, 2 CUDA, 3 pinned host memory, 13 managed CUDA memory.
    pub device_type: i32,
    /// The ordinal.
    pub device_id: i32,
}

/// `DLDataType`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DataType {
    /// 0 signed integer, 1 unsigned, 2 IEEE float, 4 bfloat, 6 boolean.
    pub code: u8,
    /// Bits of an element.
    pub bits: u8,
    /// Elements of a vector; 1.
    pub lanes: u16,
}

/// `DLTensor`: a tensor that somebody else owns.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Tensor {
    /// The memory.
    pub data: *mut c_void,
    /// Where it is.
    pub device: Device,
    /// The number of axes.
    pub ndim: i32,
    /// The type of an element.
    pub dtype: DataType,
    /// As many sizes as axes.
    pub shape: *mut i64,
    /// As many strides, in elements; null for row-major without gaps.
    pub strides: *mut i64,
    /// Bytes from `data` to the element at index 0.
    pub byte_offset: u64,
}

/// `DLManagedTensor`: what a capsule without a version holds, `dltensor` in Python.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct ManagedTensor {
    /// The tensor.
    pub dl_tensor: Tensor,
    /// The owner's.
    pub manager_ctx: *mut c_void,
    /// Gives the tensor back to its owner.
    pub deleter: Option<unsafe extern "C" fn(*mut ManagedTensor)>,
}

/// `DLManagedTensorVersioned`: what a capsule with a version holds, `dltensor_versioned` in Python.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct ManagedTensorVersioned {
    /// Of the structs.
    pub version: Version,
    /// The owner's.
    pub manager_ctx: *mut c_void,
    /// Gives the tensor back to its owner.
    pub deleter: Option<unsafe extern "C" fn(*mut ManagedTensorVersioned)>,
    /// Bits, [`READ_ONLY`] among them.
    pub flags: u64,
    /// The tensor.
    pub dl_tensor: Tensor,
}

#[cfg(target_pointer_width = "64")]
const _: () = {
    assert!(size_of::<Tensor>() == 48 && std::mem::offset_of!(Tensor, byte_offset) == 40);
    assert!(size_of::<ManagedTensor>() == 64 && std::mem::offset_of!(ManagedTensor, deleter) == 56);
    assert!(size_of::<ManagedTensorVersioned>() == 80);
    assert!(std::mem::offset_of!(ManagedTensorVersioned, dl_tensor) == 32);
};
