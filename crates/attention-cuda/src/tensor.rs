//! Tensors in device memory that the host owns: for tests, examples and callers that have none of their own.

use attention_core::{DType, Dims, Element, InvalidCall, Scratch, Strides, TensorDesc, View, ViewMut};
use bytemuck::Pod;
use cudarc::driver::sys::CUresult;
use cudarc::driver::{CudaSlice, DriverError};

use crate::CudaDevice;
use crate::device::device_of;
use crate::owned::Registered;

/// A strided tensor in memory of a device.
///
/// Its memory is freed and written on the stream of the device that it was made with, so calls take it only
/// on that stream ([`Addresses::check_streams`](crate::Addresses::check_streams)).
#[derive(Debug)]
pub struct DeviceTensor {
    device: CudaDevice,
    /// Dropped before the memory.
    registered: Registered,
    memory: CudaSlice<u8>,
    desc: TensorDesc,
    /// Bytes before the element at index 0.
    origin: usize,
}

/// Memory of a device for the scratch of calls on its stream.
#[derive(Debug)]
pub struct DeviceScratch {
    /// Dropped before the memory.
    registered: Registered,
    memory: CudaSlice<u8>,
}

impl DeviceScratch {
    /// So many bytes, which hold anything.
    ///
    /// # Errors
    /// By the driver.
    pub fn new(device: &CudaDevice, bytes: usize) -> Result<Self, DriverError> {
        // SAFETY: the memory is not initialised. It is given out as scratch only, which backends must write
        // before they read it, by the contract of `Plan`.
        let memory = unsafe { device.stream().alloc::<u8>(bytes.max(1)) }?;
        Ok(Self { registered: Registered::new(&memory), memory })
    }

    /// The first `bytes` bytes, for a call on the device and stream that this was made for.
    ///
    /// # Panics
    /// If there are fewer.
    pub fn scratch(&mut self, bytes: usize) -> Scratch<'_> {
        assert!(bytes <= self.memory.len(), "{bytes} bytes of an allocation of {}", self.memory.len());
        scratch_of(&mut self.memory, &self.registered, bytes)
    }
}

/// The first `bytes` bytes of an allocation, or all of a smaller one, as scratch for work on its stream.
pub(crate) fn scratch_of<'a>(
    memory: &'a mut CudaSlice<u8>,
    registered: &Registered,
    bytes: usize,
) -> Scratch<'a> {
    let (bytes, device) = (bytes.min(memory.len()), device_of(memory.context()));
    let pointer = std::ptr::with_exposed_provenance_mut(registered.start() as usize);
    // SAFETY: callers keep an allocation and what it is registered as side by side, so the pointer is the
    // allocation's first byte, and `bytes` is at most its length. It is borrowed exclusively for as long as
    // the scratch lives.
    unsafe { Scratch::from_raw_parts(pointer, bytes, device) }
}

/// Bytes of a tensor from its lowest to its highest element, and how many of them are before the element at
/// index 0.
fn placement(desc: &TensorDesc) -> (usize, usize) {
    let (low, high) = desc.span().unwrap_or((0, -1));
    let size = desc.dtype().size();
    ((high - low + 1).unsigned_abs() * size, low.unsigned_abs() * size)
}

/// The same of a tensor that is to be made, which fits an address space.
fn checked_placement(desc: &TensorDesc) -> Result<(usize, usize), DriverError> {
    let fits = desc.span().is_some() && desc.element_count().is_some();
    if fits { Ok(placement(desc)) } else { Err(DriverError(CUresult::CUDA_ERROR_OUT_OF_MEMORY)) }
}

/// Every byte of a tensor in host memory from its lowest to its highest element.
///
/// # Panics
/// If it is elsewhere.
fn bytes_of<'a>(view: View<'a>) -> &'a [u8] {
    assert_eq!(view.device(), attention_core::Device::Cpu, "a copy from host memory");
    let (bytes, origin) = placement(&view.desc());
    // A pointer to no bytes may be null, which a slice may not be.
    if bytes == 0 {
        return &[];
    }
    // SAFETY: the bytes from `origin` before the pointer on are those from the view's lowest to its highest
    // element, which the invariant of `View` says are initialised for as long as the view's lifetime; it is
    // in host memory, as asserted.
    unsafe { std::slice::from_raw_parts(view.as_ptr().sub(origin), bytes) }
}

impl DeviceTensor {
    /// A tensor of this shape, dtype and strides whose bytes, gaps included, are all `byte`.
    ///
    /// # Errors
    /// By the driver.
    pub fn filled(device: &CudaDevice, desc: TensorDesc, byte: u8) -> Result<Self, DriverError> {
        let (bytes, origin) = checked_placement(&desc)?;
        let memory = device.stream().clone_htod(&vec![byte; bytes.max(1)])?;
        Ok(Self { device: device.clone(), registered: Registered::new(&memory), memory, desc, origin })
    }

    /// A tensor of this shape and dtype, row-major, whose elements are 0: without a copy from the host.
    ///
    /// # Errors
    /// By the driver.
    pub fn zeroed(device: &CudaDevice, dtype: DType, shape: impl Into<Dims>) -> Result<Self, DriverError> {
        let desc = TensorDesc::contiguous(dtype, shape);
        let (bytes, origin) = checked_placement(&desc)?;
        let memory = device.stream().alloc_zeros::<u8>(bytes.max(1))?;
        Ok(Self { device: device.clone(), registered: Registered::new(&memory), memory, desc, origin })
    }

    /// The device, with the stream that the memory belongs to.
    pub fn device(&self) -> &CudaDevice {
        &self.device
    }

    /// A copy of a tensor in host memory, with its strides and what lies between its elements.
    ///
    /// # Errors
    /// By the driver.
    ///
    /// # Panics
    /// If the view is not in host memory.
    pub fn from_host(device: &CudaDevice, view: View<'_>) -> Result<Self, DriverError> {
        let (desc, data) = (view.desc(), bytes_of(view));
        if data.is_empty() {
            return Self::filled(device, desc, 0);
        }
        let memory = device.stream().clone_htod(data)?;
        let (_, origin) = placement(&desc);
        Ok(Self { device: device.clone(), registered: Registered::new(&memory), memory, desc, origin })
    }

    /// Shape, dtype and strides.
    pub fn desc(&self) -> TensorDesc {
        self.desc
    }

    /// The address of the element at index 0.
    pub(crate) fn address(&self) -> u64 {
        self.registered.start() + self.origin as u64
    }

    /// The tensor, for a call on its device.
    ///
    /// # Errors
    /// [`InvalidCall`] as [`View::from_raw_parts`].
    pub fn view(&self) -> Result<View<'_>, InvalidCall> {
        let pointer = std::ptr::with_exposed_provenance(self.address() as usize);
        // SAFETY: the tensor owns the memory from its lowest to its highest element, which was written when
        // it was made, and the view borrows the tensor.
        unsafe { View::from_raw_parts(pointer, self.device.device(), self.desc) }
    }

    /// The tensor, for a call that writes it.
    ///
    /// # Errors
    /// [`InvalidCall`] as [`ViewMut::from_raw_parts`].
    pub fn view_mut(&mut self) -> Result<ViewMut<'_>, InvalidCall> {
        let pointer = std::ptr::with_exposed_provenance_mut(self.address() as usize);
        // SAFETY: the tensor owns the memory from its lowest to its highest element, which was written when
        // it was made, and the view borrows the tensor exclusively.
        unsafe { ViewMut::from_raw_parts(pointer, self.device.device(), self.desc) }
    }

    /// Puts the elements of a tensor in host memory with the same description in the place of this one's, in
    /// the order of the device's stream. The memory stays where it is.
    ///
    /// # Errors
    /// By the driver.
    ///
    /// # Panics
    /// If the view is not in host memory or has another description.
    pub fn replace(&mut self, view: View<'_>) -> Result<(), DriverError> {
        assert_eq!(view.desc(), self.desc, "the same tensor");
        self.device.stream().clone().memcpy_htod(bytes_of(view), &mut self.memory)
    }

    /// The first `bytes` bytes as scratch, in the place of the elements.
    ///
    /// # Panics
    /// If there are fewer.
    #[cfg(feature = "conformance")]
    pub(crate) fn scratch(&mut self, bytes: usize) -> Scratch<'_> {
        assert!(bytes <= self.memory.len(), "{bytes} bytes of an allocation of {}", self.memory.len());
        scratch_of(&mut self.memory, &self.registered, bytes)
    }

    /// Every byte from the lowest to the highest element, after the work on the device's stream is done.
    ///
    /// # Errors
    /// By the driver; also what earlier work on the stream ended with.
    pub fn bytes(&self) -> Result<Vec<u8>, DriverError> {
        let bytes = self.device.stream().clone_dtoh(&self.memory)?;
        self.device.stream().synchronize()?;
        Ok(bytes)
    }

    /// The elements in the order of their indices, the last axis fastest, after the work on the device's
    /// stream is done; `None` where they are of another type.
    ///
    /// # Errors
    /// As [`bytes`](Self::bytes).
    pub fn to_vec<T: Element + Pod>(&self) -> Result<Option<Vec<T>>, DriverError> {
        if self.desc.dtype() != T::DTYPE {
            return Ok(None);
        }
        let bytes = self.bytes()?;
        Ok(Some(elements(&self.desc, self.origin, &bytes)))
    }

    /// Copies the elements to a tensor in host memory with the same shape, dtype and strides, and leaves what
    /// lies between them alone.
    ///
    /// # Errors
    /// As [`bytes`](Self::bytes).
    ///
    /// # Panics
    /// If the view is not in host memory or differs in shape or dtype.
    pub fn copy_to_host(&self, to: &mut ViewMut<'_>) -> Result<(), DriverError> {
        assert_eq!(to.device(), attention_core::Device::Cpu, "a copy to host memory");
        assert!(to.shape() == self.desc.shape() && to.desc().dtype() == self.desc.dtype(), "the same tensor");
        let bytes = self.bytes()?;
        let size = self.desc.dtype().size();
        let strides = to.desc().strides();
        let first = to.as_mut_ptr();
        for_each_index(&self.desc, |index| {
            let from = place(&self.desc, self.origin, index);
            // SAFETY: the index is inside the shape of `to`, which is the same, so the element is inside a
            // view in host memory, as asserted, which is borrowed exclusively; `bytes` is memory of its own,
            // so the two do not overlap.
            unsafe {
                let to = first.offset(offset(index, &strides) * size as isize);
                std::ptr::copy_nonoverlapping(bytes[from..from + size].as_ptr(), to, size);
            }
        });
        Ok(())
    }
}

/// The elements of a tensor among its bytes, from its lowest to its highest element; `T` is its dtype's type.
fn elements<T: Pod>(desc: &TensorDesc, origin: usize, bytes: &[u8]) -> Vec<T> {
    let mut elements = Vec::new();
    for_each_index(desc, |index| {
        let at = place(desc, origin, index);
        elements.push(bytemuck::pod_read_unaligned(&bytes[at..at + size_of::<T>()]));
    });
    elements
}

/// Where an element begins among a tensor's bytes.
fn place(desc: &TensorDesc, origin: usize, index: &[usize]) -> usize {
    (origin as isize + offset(index, &desc.strides()) * desc.dtype().size() as isize) as usize
}

/// The distance of an element from the one at index 0, in elements.
fn offset(index: &[usize], strides: &Strides) -> isize {
    index.iter().zip(strides.iter()).map(|(&index, &stride)| index as isize * stride).sum()
}

/// Calls `visit` with every index of a tensor.
fn for_each_index(desc: &TensorDesc, mut visit: impl FnMut(&[usize])) {
    if desc.is_empty() {
        return;
    }
    let shape = desc.shape();
    let mut index = vec![0; shape.rank()];
    loop {
        visit(&index);
        let mut axis = shape.rank();
        loop {
            if axis == 0 {
                return;
            }
            axis -= 1;
            index[axis] += 1;
            if index[axis] < shape[axis] {
                break;
            }
            index[axis] = 0;
        }
    }
}

#[cfg(test)]
mod tests {
    use attention_core::DType;

    use super::*;

    #[test]
    fn elements_come_in_the_order_of_their_indices() {
        // Columns stored backwards, with a gap of one behind each row of three.
        let desc = TensorDesc::strided(DType::F32, [2, 3], [4, -1]).unwrap();
        let (bytes, origin) = placement(&desc);
        assert_eq!((bytes, origin), (7 * 4, 2 * 4));
        let stored = [3.0f32, 2.0, 1.0, f32::NAN, 6.0, 5.0, 4.0];
        let read: Vec<f32> = elements(&desc, origin, bytemuck::cast_slice(&stored));
        assert_eq!(read, [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]);
        let empty = TensorDesc::contiguous(DType::F32, [2, 0]);
        assert!(elements::<f32>(&empty, 0, &[]).is_empty());
    }
}
