//! Tensors on NVIDIA GPUs: addresses of candle's memory, and implementations on candle's stream.
//!
//! `docs/unsafe.md` has a row for each block.

#![allow(unsafe_code)]

use std::cell::RefCell;
use std::sync::Arc;

use attention::chunked_cuda::{ChunkedCudaBackend, ChunkedCudaConfig};
use attention::core::BackendFailure;
use attention::cuda::cudarc::driver::{CudaSlice, CudaStream, DevicePtr, DevicePtrMut, DeviceRepr};
use attention::cudnn::{CudnnBackend, CudnnConfig};
use attention::{DType, Device, Registry, Role, TensorDesc, View, ViewMut, bf16, f16};
use candle_core::cuda_backend::{CudaDType, CudaStorageSlice};
use candle_core::{CudaDevice, CudaStorage, Layout};

use crate::Error;
use crate::events::{Reads, Writes};
use crate::layout::{axes, expected, is_float};

/// The device of candle's tensors with the stream that candle puts its work on, for backends with a
/// configuration of your own: `CudnnBackend::on(device_of(device), config)`, in a [`Registry`].
///
/// Candle's stream is by default the one of the calling thread, so a backend on it is for one thread.
pub fn device_of(device: &CudaDevice) -> attention::cuda::CudaDevice {
    attention::cuda::CudaDevice::of_stream(device.cuda_stream())
}

/// The implementations of this build, on the stream of a device.
///
/// Each thread has its own: they keep memory that the calls on a stream use one after the other, and the
/// stream that candle uses by default is another one in each thread.
pub(crate) fn registry(device: &CudaDevice) -> Registry {
    thread_local! {
        static KEPT: RefCell<Vec<(Arc<CudaStream>, Registry)>> = const { RefCell::new(Vec::new()) };
    }
    let stream = device.cuda_stream();
    KEPT.with_borrow_mut(|kept| {
        if let Some((_, registry)) = kept.iter().find(|(other, _)| Arc::ptr_eq(other, &stream)) {
            return registry.clone();
        }
        let here = device_of(device);
        let registry = Registry::default()
            .with(Arc::new(CudnnBackend::on(here.clone(), CudnnConfig::default())))
            .with(Arc::new(ChunkedCudaBackend::on(here, ChunkedCudaConfig::default())));
        kept.push((stream, registry.clone()));
        registry
    })
}

/// The name of the device that a stream is of.
fn name(stream: &Arc<CudaStream>) -> Device {
    attention::cuda::CudaDevice::of_stream(stream.clone()).device()
}

/// A tensor of candle's as a view.
pub(crate) fn view<'g>(
    role: Role,
    storage: &'g CudaStorage,
    layout: &Layout,
    reads: &mut Reads<'g>,
) -> Result<View<'g>, Error> {
    /// The address of the first byte, in the order of the stream that the memory is of.
    fn start<'g, T>(slice: &'g CudaSlice<T>, reads: &mut Reads<'g>) -> (u64, Device) {
        let (address, event) = slice.device_ptr(slice.stream());
        reads.events.push(event);
        (address, name(slice.stream()))
    }
    let (dtype, (address, device)) = match &storage.slice {
        CudaStorageSlice::U8(slice) if role == Role::Mask => (DType::Bool, start(slice, reads)),
        CudaStorageSlice::F64(slice) if is_float(role) => (DType::F64, start(slice, reads)),
        CudaStorageSlice::F32(slice) if is_float(role) => (DType::F32, start(slice, reads)),
        CudaStorageSlice::F16(slice) if is_float(role) => (DType::F16, start(slice, reads)),
        CudaStorageSlice::BF16(slice) if is_float(role) => (DType::Bf16, start(slice, reads)),
        CudaStorageSlice::U32(slice) if role.is_data() => (DType::U32, start(slice, reads)),
        CudaStorageSlice::I32(slice) if role.is_data() => (DType::I32, start(slice, reads)),
        CudaStorageSlice::I64(slice) if role.is_data() => (DType::I64, start(slice, reads)),
        _ => {
            let dtype = candle_core::backend::BackendStorage::dtype(storage);
            return Err(Error::DType { role, dtype, expected: expected(role) });
        }
    };
    let (shape, strides) = axes(layout);
    let desc = TensorDesc::strided(dtype, shape, strides)
        .unwrap_or_else(|| unreachable!("candle has a stride for every axis"));
    // Both are below the size of an allocation.
    let first = address as usize + layout.start_offset() * dtype.size();
    // SAFETY: candle's layout keeps every element inside the storage, which the device has allocated and
    // candle has written in the order of its stream, on which the call runs; the storage is borrowed, locked
    // against writes, for 'g, and freed in the order of the stream.
    Ok(unsafe { View::from_raw_parts(std::ptr::with_exposed_provenance(first), device, desc) }?)
}

/// Memory of a device, with the stream that its work is put on.
pub(crate) struct CudaOutput {
    pub(crate) storage: CudaStorage,
    stream: Arc<CudaStream>,
}

/// Memory for a row-major tensor of `count` elements.
pub(crate) fn output(device: &CudaDevice, dtype: DType, count: usize) -> Result<CudaOutput, Error> {
    fn memory<T: CudaDType + DeviceRepr>(device: &CudaDevice, count: usize) -> Result<CudaStorage, Error> {
        // SAFETY: a call writes every element of its outputs before anything reads them, and a call that
        // fails drops them.
        let slice = unsafe { device.alloc::<T>(count) }.map_err(|error| {
            attention::Error::from(BackendFailure {
                backend: "candle".to_owned(),
                operation: format!("allocating {count} elements for an output"),
                source: error.into(),
            })
        })?;
        Ok(CudaStorage::wrap_cuda_slice(slice, device.clone()))
    }
    let storage = match dtype {
        DType::F64 => memory::<f64>(device, count),
        DType::F16 => memory::<f16>(device, count),
        DType::Bf16 => memory::<bf16>(device, count),
        // A checked problem has no other dtype.
        _ => memory::<f32>(device, count),
    }?;
    Ok(CudaOutput { storage, stream: device.cuda_stream() })
}

/// The memory as a row-major tensor of this shape, which has as many elements.
pub(crate) fn view_mut<'a>(
    output: &'a mut CudaOutput,
    shape: &[usize],
    writes: &mut Writes<'a>,
) -> Result<ViewMut<'a>, Error> {
    let stream: &'a CudaStream = &output.stream;
    /// The address of the first byte, in the order of the stream.
    fn start<'a, T>(slice: &'a mut CudaSlice<T>, stream: &'a CudaStream, writes: &mut Writes<'a>) -> u64 {
        let (address, event) = slice.device_ptr_mut(stream);
        writes.events.push(event);
        address
    }
    let (dtype, address) = match &mut output.storage.slice {
        CudaStorageSlice::F64(slice) => (DType::F64, start(slice, stream, writes)),
        CudaStorageSlice::F32(slice) => (DType::F32, start(slice, stream, writes)),
        CudaStorageSlice::F16(slice) => (DType::F16, start(slice, stream, writes)),
        CudaStorageSlice::BF16(slice) => (DType::Bf16, start(slice, stream, writes)),
        _ => unreachable!("`output` makes no other"),
    };
    let shape = attention::Dims::from_slice(shape)
        .unwrap_or_else(|| unreachable!("a tensor of a call has at most four axes"));
    let desc = TensorDesc::contiguous(dtype, shape);
    let first = std::ptr::with_exposed_provenance_mut(address as usize);
    // SAFETY: an allocation of the stream's device with as many elements as the shape has (`output` was asked
    // for them), borrowed exclusively for 'a.
    Ok(unsafe { ViewMut::from_raw_parts(first, name(&output.stream), desc) }?)
}
