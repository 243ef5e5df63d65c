//! Descriptors of cuDNN's backend interface, with typed attributes.

use std::ffi::c_void;
use std::ptr;

use crate::library::{Cudnn, CudnnError, Opaque};

/// Types of attribute values, as `cudnnBackendAttributeType_t` of cuDNN's header numbers them.
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

/// A descriptor of cuDNN's backend interface. It is destroyed when this value is dropped.
#[derive(Debug)]
pub(crate) struct Descriptor {
    cudnn: Cudnn,
    raw: Opaque,
}

// SAFETY: a descriptor is memory of cuDNN that is not bound to a thread. `set` and `finalize` take `&mut
// self`, so one thread at a time changes it.
unsafe impl Send for Descriptor {}
// SAFETY: a shared reference gives out the pointer (`raw`) and reads attributes (`integer`, `read_bytes`,
// `read_descriptors`), which does not change the descriptor. cuDNN allows several threads to use one
// finalised descriptor.
unsafe impl Sync for Descriptor {}

impl Drop for Descriptor {
    fn drop(&mut self) {
        // SAFETY: `raw` was created by `new`, is owned by this value, and is destroyed here only. The status
        // is ignored, since `drop` cannot report it.
        unsafe { (self.cudnn.functions.destroy_descriptor)(self.raw) };
    }
}

impl Descriptor {
    pub(crate) fn new(cudnn: &Cudnn, kind: i32) -> Result<Self, CudnnError> {
        let mut raw = ptr::null_mut();
        // SAFETY: cuDNN writes one pointer, to `raw`, which lives here.
        let status = unsafe { (cudnn.functions.create_descriptor)(kind, &raw mut raw) };
        cudnn.check("creating a descriptor", status)?;
        Ok(Self { cudnn: *cudnn, raw })
    }

    pub(crate) fn raw(&self) -> Opaque {
        self.raw
    }

    /// Sets an attribute to these values.
    ///
    /// # Safety
    /// `T` has the size and the layout of the type that `kind` names. With [`kind::VOID_PTR`] and
    /// [`kind::HANDLE`] the conditions of [`pointers`](Self::pointers) apply.
    unsafe fn set<T>(&mut self, attribute: i32, kind: i32, values: &[T]) -> Result<(), CudnnError> {
        let count = values.len() as i64;
        // SAFETY: cuDNN reads `count` values of the type that `kind` names and copies them; the caller
        // promised that `T` is that type, and `values` has `count` of them.
        let status = unsafe {
            (self.cudnn.functions.set_attribute)(self.raw, attribute, kind, count, values.as_ptr().cast())
        };
        self.cudnn.check("setting an attribute", status)
    }

    pub(crate) fn integers(&mut self, attribute: i32, values: &[i64]) -> Result<(), CudnnError> {
        // SAFETY: `INT64` names 64-bit integers, as `i64` is.
        unsafe { self.set(attribute, kind::INT64, values) }
    }

    /// Sets an attribute to a value of an enumeration. All enumerations of cuDNN are 32 bits wide.
    pub(crate) fn enumeration(&mut self, attribute: i32, kind: i32, value: i32) -> Result<(), CudnnError> {
        // SAFETY: enumerations of cuDNN are C enumerations of 32 bits, as `i32` is.
        unsafe { self.set(attribute, kind, &[value]) }
    }

    pub(crate) fn boolean(&mut self, attribute: i32, value: bool) -> Result<(), CudnnError> {
        // SAFETY: `BOOLEAN` names C's `bool` of one byte, 0 or 1, as `u8::from(bool)` is.
        unsafe { self.set(attribute, kind::BOOLEAN, &[u8::from(value)]) }
    }

    pub(crate) fn float(&mut self, attribute: i32, value: f32) -> Result<(), CudnnError> {
        // SAFETY: `FLOAT` names C's `float`, as `f32` is.
        unsafe { self.set(attribute, kind::FLOAT, &[value]) }
    }

    pub(crate) fn double(&mut self, attribute: i32, value: f64) -> Result<(), CudnnError> {
        // SAFETY: `DOUBLE` names C's `double`, as `f64` is.
        unsafe { self.set(attribute, kind::DOUBLE, &[value]) }
    }

    /// Sets an attribute to a text, without a terminating zero.
    pub(crate) fn text(&mut self, attribute: i32, text: &str) -> Result<(), CudnnError> {
        // SAFETY: `CHAR` names bytes, as `u8` is.
        unsafe { self.set(attribute, kind::CHAR, text.as_bytes()) }
    }

    pub(crate) fn descriptors<'d>(
        &mut self,
        attribute: i32,
        values: impl IntoIterator<Item = &'d Descriptor>,
    ) -> Result<(), CudnnError> {
        let raw: Vec<Opaque> = values.into_iter().map(Descriptor::raw).collect();
        // SAFETY: `BACKEND_DESCRIPTOR` names pointers to descriptors. Those of `values` are borrowed, so
        // alive, during the call; cuDNN counts its own references to what it keeps.
        unsafe { self.set(attribute, kind::BACKEND_DESCRIPTOR, &raw) }
    }

    /// Sets an attribute to a handle or an array of addresses.
    ///
    /// # Safety
    /// `kind` is [`kind::HANDLE`] with one handle that this library created, or [`kind::VOID_PTR`] with
    /// addresses that are valid whenever cuDNN uses the descriptor.
    pub(crate) unsafe fn pointers(
        &mut self,
        attribute: i32,
        kind: i32,
        values: &[*mut c_void],
    ) -> Result<(), CudnnError> {
        // SAFETY: `HANDLE` and `VOID_PTR` name pointers, as the values are; the caller promised that they are
        // a handle of this library or addresses that stay valid.
        unsafe { self.set(attribute, kind, values) }
    }

    pub(crate) fn finalize(&mut self, what: &'static str) -> Result<(), CudnnError> {
        // SAFETY: `raw` is a live descriptor that this library created in `new`.
        let status = unsafe { (self.cudnn.functions.finalize)(self.raw) };
        self.cudnn.check(what, status)
    }

    /// Reads an attribute of one integer.
    pub(crate) fn integer(&self, attribute: i32) -> Result<i64, CudnnError> {
        let (mut value, mut count) = (0i64, 0i64);
        // SAFETY: cuDNN writes at most one 64-bit integer to `value` and the count to `count`, which live
        // here.
        let status = unsafe {
            let to = (&raw mut value).cast();
            (self.cudnn.functions.get_attribute)(self.raw, attribute, kind::INT64, 1, &raw mut count, to)
        };
        self.cudnn.check("reading an attribute", status)?;
        Ok(value)
    }

    /// Reads all bytes of an attribute.
    pub(crate) fn read_bytes(&self, attribute: i32) -> Result<Vec<u8>, CudnnError> {
        let mut count = 0i64;
        let get = self.cudnn.functions.get_attribute;
        // SAFETY: with 0 elements requested, cuDNN writes the count to `count` and nothing through the null
        // pointer.
        let status = unsafe { get(self.raw, attribute, kind::CHAR, 0, &raw mut count, ptr::null_mut()) };
        self.cudnn.check("counting bytes", status)?;
        let mut bytes = vec![0u8; usize::try_from(count).unwrap_or(0)];
        let mut filled = 0i64;
        // SAFETY: cuDNN writes at most `count` bytes, the length of `bytes`, and their number to `filled`.
        let status = unsafe {
            get(self.raw, attribute, kind::CHAR, count, &raw mut filled, bytes.as_mut_ptr().cast())
        };
        self.cudnn.check("reading bytes", status)?;
        bytes.truncate(usize::try_from(filled).unwrap_or(0));
        Ok(bytes)
    }

    /// Reads all descriptors of an attribute, which are of the type `of`.
    pub(crate) fn read_descriptors(&self, attribute: i32, of: i32) -> Result<Vec<Descriptor>, CudnnError> {
        let mut count = 0i64;
        let get = self.cudnn.functions.get_attribute;
        // SAFETY: with 0 elements requested, cuDNN writes the count to `count` and nothing through the null
        // pointer.
        let status =
            unsafe { get(self.raw, attribute, kind::BACKEND_DESCRIPTOR, 0, &raw mut count, ptr::null_mut()) };
        self.cudnn.check("counting descriptors", status)?;
        let all: Vec<Descriptor> =
            (0..count).map(|_| Descriptor::new(&self.cudnn, of)).collect::<Result<_, _>>()?;
        let mut raw: Vec<Opaque> = all.iter().map(Descriptor::raw).collect();
        let mut filled = 0i64;
        // SAFETY: `raw` has `count` live descriptors of the type, which cuDNN fills; it writes their number
        // to `filled`.
        let status = unsafe {
            let to = raw.as_mut_ptr().cast();
            get(self.raw, attribute, kind::BACKEND_DESCRIPTOR, count, &raw mut filled, to)
        };
        self.cudnn.check("reading descriptors", status)?;
        let filled = usize::try_from(filled).unwrap_or(0);
        Ok(all.into_iter().take(filled).collect())
    }
}
