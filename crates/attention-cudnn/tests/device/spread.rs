//! Tensors whose elements are more than 2^31 apart, and the same elements without gaps.

use attention_core::{DType, TensorDesc, View, ViewMut};
use attention_cuda::cudarc::driver::{CudaSlice, DevicePtr};
use attention_cuda::{CudaDevice, DeviceTensor};
use half::bf16;

use crate::Result;
use crate::data::{Data, numbers};

/// Device memory of a tensor whose second batch row begins somewhat more than 2^31 elements after the first.
pub(crate) struct Spread {
    memory: CudaSlice<u8>,
    desc: TensorDesc,
}

/// The distance of batch rows in elements: more than 2^31, and a multiple of 8.
pub(crate) const FAR: usize = (1 << 31) + (1 << 10);

/// A tensor's elements without gaps, as bytes. The first axis has two places.
#[derive(Clone)]
pub(crate) struct Compact {
    pub(crate) dtype: DType,
    pub(crate) shape: [usize; 4],
    pub(crate) bytes: Vec<u8>,
}

impl Compact {
    pub(crate) fn of(shape: [usize; 4], seed: u32) -> Self {
        let count = shape.iter().product();
        let Data::Bf16(data) = Data::repeating(DType::Bf16, &numbers(seed, count), count) else {
            unreachable!("asked for")
        };
        let bytes = data.iter().flat_map(|x| x.to_bits().to_le_bytes()).collect();
        Self { dtype: DType::Bf16, shape, bytes }
    }

    pub(crate) fn zeros(shape: [usize; 4]) -> Self {
        Self { dtype: DType::Bf16, shape, bytes: vec![0; 2 * shape.iter().product::<usize>()] }
    }

    pub(crate) fn halves(&self) -> Vec<bf16> {
        self.bytes.chunks_exact(2).map(|two| bf16::from_le_bytes([two[0], two[1]])).collect()
    }

    pub(crate) fn bools(&self) -> Vec<bool> {
        self.bytes.iter().map(|&byte| byte != 0).collect()
    }

    /// The same elements on a device.
    pub(crate) fn on(&self, device: &CudaDevice) -> Result<DeviceTensor> {
        if self.dtype == DType::Bool {
            return Ok(DeviceTensor::from_host(device, View::from_slice(&self.bools(), self.shape)?)?);
        }
        Ok(DeviceTensor::from_host(device, View::from_slice(&self.halves(), self.shape)?)?)
    }

    /// A mask that lets every row see its first key.
    pub(crate) fn mask(shape: [usize; 4]) -> Self {
        let keys = shape[3];
        let bytes = (0..shape.iter().product())
            .map(|index: usize| u8::from(index.is_multiple_of(keys) || index % 7 < 5));
        Self { dtype: DType::Bool, shape, bytes: bytes.collect() }
    }
}

impl Spread {
    /// With a copy of these elements.
    pub(crate) fn new(device: &CudaDevice, of: &Compact) -> Result<Self> {
        let [_, t, n, h] = of.shape;
        let (size, row) = (of.dtype.size(), of.bytes.len() / 2);
        let stream = device.stream();
        // SAFETY: the memory is not initialised. The copies below write all elements, and nothing reads the
        // gap between the two batch rows.
        let mut memory = unsafe { stream.alloc::<u8>(size * FAR + row) }?;
        for batch in 0..2 {
            let mut part = memory.slice_mut(size * batch * FAR..size * batch * FAR + row);
            stream.memcpy_htod(&of.bytes[batch * row..][..row], &mut part)?;
        }
        let strides = [FAR as isize, (n * h) as isize, h as isize, 1];
        debug_assert_eq!(row, size * t * n * h);
        Ok(Self { memory, desc: TensorDesc::strided(of.dtype, of.shape, strides).ok_or("ranks")? })
    }

    pub(crate) fn pointer(&self, device: &CudaDevice) -> usize {
        self.memory.device_ptr(device.stream()).0 as usize
    }

    pub(crate) fn view(&self, device: &CudaDevice) -> Result<View<'_>> {
        let pointer = std::ptr::with_exposed_provenance(self.pointer(device));
        // SAFETY: `new` allocated the memory from the first element to the last and wrote the elements;
        // kernels do not read the gap. The memory is borrowed, and freed on the stream that all calls here
        // use.
        Ok(unsafe { View::from_raw_parts(pointer, device.device(), self.desc) }?)
    }

    pub(crate) fn view_mut(&mut self, device: &CudaDevice) -> Result<ViewMut<'_>> {
        let pointer = std::ptr::with_exposed_provenance_mut(self.pointer(device));
        // SAFETY: `new` allocated the memory from the first element to the last and wrote the elements. It is
        // borrowed exclusively, and freed on the stream that all calls here use.
        Ok(unsafe { ViewMut::from_raw_parts(pointer, device.device(), self.desc) }?)
    }

    pub(crate) fn elements(&self, device: &CudaDevice) -> Result<Vec<u8>> {
        let size = self.desc.dtype().size();
        let row = size * self.desc.shape()[1..].iter().product::<usize>();
        let mut all = Vec::new();
        for batch in 0..2 {
            let part = self.memory.slice(size * batch * FAR..size * batch * FAR + row);
            all.extend(device.stream().clone_dtoh(&part)?);
        }
        device.stream().synchronize()?;
        Ok(all)
    }
}
