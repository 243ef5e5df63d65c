//! Descriptors of cuDNN's backend interface, with typed attributes.

use std::ffi::c_void;
use std::ptr;

use crate::library::{Cudnn, CudnnError, Opaque};

/// Types of attribute values.
pub(crate) mod kind {
    pub(crate) const HANDLE: i32 = 0;
    pub(crate) const DATA_TYPE: i32 = 1;
    pub(crate) const BOOLEAN: i32 = 2;
    pub(crate) const INT64: i32 = 3;
    pub(crate) const FLOAT: i32 = 4;
    pub(crate) const DOUBLE: i32 = 5;
    pub(crate) const VOID_PTR: i32 = 6;
    pub(crate) const HEUR_MODE: i32 = 8;
    pub(crate) const POINTWISE_MODE: i32 = 14;
    pub(crate) const BACKEND_DESCRIPTOR: i32 = 15;
    pub(crate) const REDUCTION_OPERATOR: i32 = 18;
    pub(crate) const CHAR: i32 = 24;
    pub(crate) const RNG_DISTRIBUTION: i32 = 29;
}

/// A descriptor; destroyed when dropped.
#[derive(Debug)]
pub(crate) struct Descriptor {
    cudnn: Cudnn,
    raw: Opaque,
}

// SAFETY: a descriptor belongs to no thread. While it is built, one thread owns it; once finalised it does not change,
// and cuDNN allows plans and graphs to be shared.
unsafe impl Send for Descriptor {}
// SAFETY: as above: nothing of it is reached through a shared reference but its pointer, once finalised.
unsafe impl Sync for Descriptor {}

impl Drop for Descriptor {
    fn drop(&mut self) {
        // SAFETY: made by `new` and destroyed once. There is nobody to tell about a failure.
        unsafe { (self.cudnn.functions.destroy_descriptor)(self.raw) };
    }
}

impl Descriptor {
    pub(crate) fn new(cudnn: &Cudnn, kind: i32) -> Result<Self, CudnnError> {
        let mut raw = ptr::null_mut();
        // SAFETY: writes one pointer.
        let status = unsafe { (cudnn.functions.create_descriptor)(kind, &raw mut raw) };
        cudnn.check("creating a descriptor", status)?;
        Ok(Self { cudnn: *cudnn, raw })
    }

    pub(crate) fn raw(&self) -> Opaque {
        self.raw
    }

    /// Sets an attribute to some values.
    ///
    /// # Safety
    /// The values are of the type that `kind` names.
    unsafe fn set<T>(&mut self, attribute: i32, kind: i32, values: &[T]) -> Result<(), CudnnError> {
        let count = values.len() as i64;
        // SAFETY: cuDNN reads `count` values of the type, which the caller vouches for, and copies them.
        let status = unsafe {
            (self.cudnn.functions.set_attribute)(self.raw, attribute, kind, count, values.as_ptr().cast())
        };
        self.cudnn.check("setting an attribute", status)
    }

    pub(crate) fn integers(&mut self, attribute: i32, values: &[i64]) -> Result<(), CudnnError> {
        // SAFETY: 64-bit integers.
        unsafe { self.set(attribute, kind::INT64, values) }
    }

    /// An enumeration: all of cuDNN's are 32 bits wide.
    pub(crate) fn enumeration(&mut self, attribute: i32, kind: i32, value: i32) -> Result<(), CudnnError> {
        // SAFETY: 32 bits, as all enumerations of the library.
        unsafe { self.set(attribute, kind, &[value]) }
    }

    pub(crate) fn boolean(&mut self, attribute: i32, value: bool) -> Result<(), CudnnError> {
        // SAFETY: a boolean is one byte.
        unsafe { self.set(attribute, kind::BOOLEAN, &[u8::from(value)]) }
    }

    pub(crate) fn float(&mut self, attribute: i32, value: f32) -> Result<(), CudnnError> {
        // SAFETY: one float.
        unsafe { self.set(attribute, kind::FLOAT, &[value]) }
    }

    pub(crate) fn double(&mut self, attribute: i32, value: f64) -> Result<(), CudnnError> {
        // SAFETY: one double.
        unsafe { self.set(attribute, kind::DOUBLE, &[value]) }
    }

    /// Text, without a closing zero.
    pub(crate) fn text(&mut self, attribute: i32, text: &str) -> Result<(), CudnnError> {
        // SAFETY: bytes, as many as are said.
        unsafe { self.set(attribute, kind::CHAR, text.as_bytes()) }
    }

    pub(crate) fn descriptors<'d>(
        &mut self,
        attribute: i32,
        values: impl IntoIterator<Item = &'d Descriptor>,
    ) -> Result<(), CudnnError> {
        let raw: Vec<Opaque> = values.into_iter().map(Descriptor::raw).collect();
        // SAFETY: descriptors, alive for the call; cuDNN counts its own references.
        unsafe { self.set(attribute, kind::BACKEND_DESCRIPTOR, &raw) }
    }

    /// Sets a handle or an array of addresses.
    ///
    /// # Safety
    /// With [`kind::HANDLE`] one handle of this library; with [`kind::VOID_PTR`] addresses that cuDNN may keep until the
    /// descriptor is used.
    pub(crate) unsafe fn pointers(
        &mut self,
        attribute: i32,
        kind: i32,
        values: &[*mut c_void],
    ) -> Result<(), CudnnError> {
        // SAFETY: the caller's.
        unsafe { self.set(attribute, kind, values) }
    }

    pub(crate) fn finalize(&mut self, what: &'static str) -> Result<(), CudnnError> {
        // SAFETY: a descriptor of this library.
        let status = unsafe { (self.cudnn.functions.finalize)(self.raw) };
        self.cudnn.check(what, status)
    }

    /// Reads one integer.
    pub(crate) fn integer(&self, attribute: i32) -> Result<i64, CudnnError> {
        let (mut value, mut count) = (0i64, 0i64);
        // SAFETY: room for one 64-bit integer, and for the count.
        let status = unsafe {
            let to = (&raw mut value).cast();
            (self.cudnn.functions.get_attribute)(self.raw, attribute, kind::INT64, 1, &raw mut count, to)
        };
        self.cudnn.check("reading an attribute", status)?;
        Ok(value)
    }

    /// Reads bytes: as many as there are.
    pub(crate) fn read_bytes(&self, attribute: i32) -> Result<Vec<u8>, CudnnError> {
        let mut count = 0i64;
        let get = self.cudnn.functions.get_attribute;
        // SAFETY: asks for the count alone.
        let status = unsafe { get(self.raw, attribute, kind::CHAR, 0, &raw mut count, ptr::null_mut()) };
        self.cudnn.check("counting bytes", status)?;
        let mut bytes = vec![0u8; usize::try_from(count).unwrap_or(0)];
        let mut filled = 0i64;
        // SAFETY: room for `count` bytes.
        let status = unsafe {
            get(self.raw, attribute, kind::CHAR, count, &raw mut filled, bytes.as_mut_ptr().cast())
        };
        self.cudnn.check("reading bytes", status)?;
        bytes.truncate(usize::try_from(filled).unwrap_or(0));
        Ok(bytes)
    }

    /// Reads descriptors of a kind: as many as there are.
    pub(crate) fn read_descriptors(&self, attribute: i32, of: i32) -> Result<Vec<Descriptor>, CudnnError> {
        let mut count = 0i64;
        let get = self.cudnn.functions.get_attribute;
        // SAFETY: asks for the count alone.
        let status =
            unsafe { get(self.raw, attribute, kind::BACKEND_DESCRIPTOR, 0, &raw mut count, ptr::null_mut()) };
        self.cudnn.check("counting descriptors", status)?;
        let all: Vec<Descriptor> =
            (0..count).map(|_| Descriptor::new(&self.cudnn, of)).collect::<Result<_, _>>()?;
        let mut raw: Vec<Opaque> = all.iter().map(Descriptor::raw).collect();
        let mut filled = 0i64;
        // SAFETY: `count` descriptors of the kind, which cuDNN fills.
        let status = unsafe {
            let to = raw.as_mut_ptr().cast();
            get(self.raw, attribute, kind::BACKEND_DESCRIPTOR, count, &raw mut filled, to)
        };
        self.cudnn.check("reading descriptors", status)?;
        let filled = usize::try_from(filled).unwrap_or(0);
        Ok(all.into_iter().take(filled).collect())
    }
}
