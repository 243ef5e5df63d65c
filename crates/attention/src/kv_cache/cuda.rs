//! Caches in memory of an NVIDIA GPU.

use attention_core::{DType, Device, Dims, InvalidCall, View};
use attention_cuda::{CudaDevice, DeviceTensor, KernelCache, RowCopier, RowRun};

use super::contiguous::KvCache;
use super::error::CacheError;
use super::memory::{CacheMemory, IntoCacheTensor, Update};
use super::paged::{PagedKvCache, PoolShape};
use super::token::TokenShape;
use crate::IntoView;

/// Memory of an NVIDIA GPU, allocated by the library. An append is one kernel for keys and values together, put
/// on the stream of the device that the cache was made with; one more goes before it where sequences get copies
/// of pages that they shared, and one for each 150 pieces where there are more: a piece is a run of tokens of one
/// sequence in one page. Nothing is copied through the host, and nothing waits.
///
/// New tokens are views of the same device, ready on that stream, as are the calls that read the cache: tensors
/// of `attention::cuda` that belong to another stream are refused.
#[derive(Debug)]
pub struct CudaMemory {
    copier: RowCopier,
    keys: DeviceTensor,
    values: DeviceTensor,
}

impl CudaMemory {
    /// Zeroed memory of these shapes, as `with_memory` of a cache asks for it, whose kernel comes from these
    /// kernels: to be given where a folder for compiled kernels, or one with NVRTC, is set by the program.
    ///
    /// # Errors
    /// [`CacheError::Memory`] where the kernel does not compile, or the device has no room.
    pub fn new(
        device: &CudaDevice,
        kernels: &KernelCache,
        dtype: DType,
        [keys, values]: [Dims; 2],
    ) -> Result<Self, CacheError> {
        let copier = RowCopier::new(device, kernels).map_err(failed)?;
        let of = |shape: Dims| DeviceTensor::zeroed(device, dtype, shape).map_err(failed);
        Ok(Self { copier, keys: of(keys)?, values: of(values)? })
    }

    /// The device, with the stream that everything is put on.
    pub fn cuda_device(&self) -> &CudaDevice {
        self.copier.device()
    }
}

fn failed(error: impl std::fmt::Display) -> CacheError {
    CacheError::Memory { reason: error.to_string() }
}

fn view(tensor: &DeviceTensor) -> View<'_> {
    // The shape was checked before the memory was made.
    tensor.view().unwrap_or_else(|error: InvalidCall| unreachable!("a cache's own tensor: {error}"))
}

impl CacheMemory for CudaMemory {
    type Tensor<'a> = View<'a>;

    fn device(&self) -> Device {
        self.copier.device().device()
    }

    fn keys(&self) -> View<'_> {
        view(&self.keys)
    }

    fn values(&self) -> View<'_> {
        view(&self.values)
    }

    fn update(&mut self, update: &Update<'_, View<'_>>) -> Result<(), CacheError> {
        let (inner, new) = (self.keys.desc().shape()[1], update.keys.shape()[1]);
        let copies = update.copies.iter().map(|copy| RowRun {
            from: copy.from * inner,
            to: copy.to * inner,
            count: copy.slots,
        });
        let copies: Vec<RowRun> = copies.collect();
        if !copies.is_empty() {
            self.copier.copy_within([&mut self.keys, &mut self.values], &copies).map_err(failed)?;
        }
        let writes = update.writes.iter().map(|write| RowRun {
            from: write.from[0] * new + write.from[1],
            to: write.to[0] * inner + write.to[1],
            count: write.count,
        });
        let writes: Vec<RowRun> = writes.collect();
        let (from, to) = ([update.keys, update.values], [&mut self.keys, &mut self.values]);
        self.copier.copy(from, to, &writes).map_err(failed)
    }
}

impl<'a, T: IntoView<'a>> IntoCacheTensor<'a, CudaMemory> for T {
    fn into_cache_tensor(self) -> Result<View<'a>, InvalidCall> {
        self.into_view()
    }
}

impl PagedKvCache<CudaMemory> {
    /// A cache without sequences, in memory of a device, with work on its stream.
    ///
    /// # Errors
    /// As [`new`](PagedKvCache::new), and those of [`CudaMemory::new`].
    pub fn on_cuda(token: TokenShape, shape: PoolShape, device: &CudaDevice) -> Result<Self, CacheError> {
        let make = |shapes| CudaMemory::new(device, &KernelCache::new(None), token.dtype, shapes);
        Self::with_memory(token, shape, make)
    }
}

impl KvCache<CudaMemory> {
    /// An empty cache of `batch` sequences with room for `capacity` tokens each, in memory of a device, with work
    /// on its stream.
    ///
    /// # Errors
    /// As [`new`](KvCache::new), and those of [`CudaMemory::new`].
    pub fn on_cuda(
        token: TokenShape,
        batch: usize,
        capacity: usize,
        device: &CudaDevice,
    ) -> Result<Self, CacheError> {
        let make = |shapes| CudaMemory::new(device, &KernelCache::new(None), token.dtype, shapes);
        Self::with_memory(token, batch, capacity, make)
    }
}
