//! Caches in memory of an NVIDIA GPU.

use attention_core::{DType, Device, Dims, InvalidCall, View};
use attention_cuda::{CudaDevice, DeviceTensor, KernelCache, NumberWriter, RowCopier, RowRun};

use super::batch::{NO_PAGE, PagedInputs};
use super::contiguous::KvCache;
use super::error::{CacheError, reserved};
use super::memory::{CacheMemory, IntoCacheTensor, Update};
use super::paged::{PagedKvCache, PoolShape};
use super::token::TokenShape;
use crate::IntoView;

/// Memory of an NVIDIA GPU, allocated by the library. An append is one kernel for keys and values together,
/// put on the stream of the device that the cache was made with; one more goes before it where sequences get
/// copies of pages that they shared, and one for each 150 pieces where there are more: a piece is a run of
/// tokens of one sequence in one page. Nothing is copied through the host, and nothing waits.
///
/// New tokens are views of the same device, ready on that stream, as are the calls that read the cache:
/// tensors of `attention::cuda` that belong to another stream are refused.
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

/// The table and lengths of a batch in memory of a device, with room for a number of sequences: what calls
/// read there without a copy of the whole table at each step, and what a captured graph reads when it is
/// launched. Rows behind the sequences of a batch are empty sequences.
///
/// # Examples
/// One graph for all steps, captured from the second call on:
/// ```no_run
/// use std::sync::Arc;
///
/// use attention::chunked_cuda::{ChunkedCudaBackend, ChunkedCudaConfig};
/// use attention::cuda::{CudaDevice, DeviceTensor};
/// use attention::kv_cache::{CudaTables, PagedKvCache, PoolShape, TokenShape};
/// use attention::{Attention, DType, QueryOffset, Registry};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// // A stream of its own: the default one cannot be captured.
/// let device = CudaDevice::new("decoder", 0)?;
/// let device = device.with_stream(device.context().new_stream()?);
/// let mut registry = Registry::empty();
/// registry.register(Arc::new(ChunkedCudaBackend::on(device.clone(), ChunkedCudaConfig::default())));
/// let shape = PoolShape { pages: 4096, page_size: 16, longest: 8192 };
/// let mut cache = PagedKvCache::on_cuda(TokenShape::new(DType::Bf16, 8, 128), shape, &device)?;
/// let sequence = cache.add();
/// let mut batch = cache.batch([sequence])?;
/// let mut tables = CudaTables::new(&cache, 32)?;
/// # let (query, key): (DeviceTensor, DeviceTensor) = todo!();
/// # let mut out: DeviceTensor = todo!();
/// // At each step, outside of the graph: the new token, and what it changes in table and lengths.
/// cache.append_each(batch.sequences(), key.view()?, key.view()?)?;
/// tables.update(&cache.inputs(&mut batch)?)?;
/// // To be captured, or called: the tensors stay where they are.
/// let attention = Attention::new().causal(true).query_offset(QueryOffset::BottomRight);
/// let attention = attention.registry(&registry).paged(tables.table(), tables.lengths());
/// attention.forward_into(query.view()?, cache.keys(), cache.values(), out.view_mut()?, None)?;
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct CudaTables {
    /// Which cache they are of.
    cache: u64,
    writer: NumberWriter,
    table: DeviceTensor,
    lengths: DeviceTensor,
    /// What both hold once the work on the stream is done.
    held: [Vec<i32>; 2],
}

impl CudaTables {
    /// For batches of up to so many sequences of a cache, on its device and stream.
    ///
    /// # Errors
    /// [`CacheError::Memory`] where the kernel does not compile, or the device has no room;
    /// [`CacheError::Cache`] where a table of these sizes overflows.
    pub fn new(cache: &PagedKvCache<CudaMemory>, sequences: usize) -> Result<Self, CacheError> {
        Self::with_kernels(cache, sequences, &KernelCache::new(None))
    }

    /// As [`new`](Self::new), with a kernel of these.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn with_kernels(
        cache: &PagedKvCache<CudaMemory>,
        sequences: usize,
        kernels: &KernelCache,
    ) -> Result<Self, CacheError> {
        let (device, most) = (cache.memory().cuda_device(), cache.most_pages());
        let shape = Dims::from([sequences, most]);
        let overflow = || CacheError::Cache(InvalidCall::Overflow { what: "a block table", shape });
        let count =
            sequences.checked_mul(most).filter(|&count| count <= i32::MAX as usize).ok_or_else(overflow)?;
        let writer = NumberWriter::new(device, kernels).map_err(failed)?;
        let (mut table, mut lengths) = (reserved("a block table", count)?, reserved("lengths", sequences)?);
        table.resize(count, NO_PAGE);
        lengths.resize(sequences, 0);
        let of = |numbers: &[i32], shape: Dims| {
            DeviceTensor::from_host(device, View::from_slice(numbers, shape)?).map_err(failed)
        };
        Ok(Self {
            cache: cache.id(),
            table: of(&table, shape)?,
            lengths: of(&lengths, [sequences].into())?,
            held: [table, lengths],
            writer,
        })
    }

    /// Brings both up to date with a batch: what differs from before is written by one kernel for each 480
    /// numbers, in the order of the stream.
    ///
    /// # Errors
    /// [`CacheError::Count`] for more sequences than there is room for; [`CacheError::OtherCache`] for a
    /// batch of another cache; [`CacheError::Memory`] by the driver.
    pub fn update(&mut self, inputs: &PagedInputs<'_>) -> Result<(), CacheError> {
        let (Some(table), Some(lengths)) = (inputs.table.host::<i32>(), inputs.lengths.host::<i32>()) else {
            return Err(CacheError::Memory {
                reason: "the table of a batch is not in host memory".to_owned(),
            });
        };
        let (&[sequences, most], room) = (&inputs.table.shape()[..], self.held[1].len()) else {
            unreachable!("a table has two axes")
        };
        if sequences > room {
            let what = "rows of tables in device memory";
            return Err(CacheError::Count { sequences, what, given: room });
        }
        if most != self.most() || inputs.cache != self.cache {
            return Err(CacheError::OtherCache { what: "the batch".to_owned() });
        }
        let mut changed = [Vec::new(), Vec::new()];
        for index in 0..room {
            let held = &self.held[0][index * most..][..most];
            for (page, &held) in held.iter().enumerate() {
                let new = if index < sequences { table.at(&[index, page]) } else { NO_PAGE };
                if held != new {
                    changed[0].push((index * most + page, new));
                }
            }
            let new = if index < sequences { lengths.at(&[index]) } else { 0 };
            if self.held[1][index] != new {
                changed[1].push((index, new));
            }
        }
        let [pages, numbers] = &changed;
        let written =
            self.writer.write([&mut self.table, &mut self.lengths], [pages, numbers]).map_err(failed);
        for (held, changed) in self.held.iter_mut().zip(&changed) {
            // Behind an error some of them are written: all are written again, since none is this number.
            changed
                .iter()
                .for_each(|&(index, new)| held[index] = if written.is_ok() { new } else { i32::MIN });
        }
        written
    }

    /// Entries of a row.
    fn most(&self) -> usize {
        self.table.desc().shape()[1]
    }

    /// `[sequences, most]` of i32, on the device; -1 where a sequence has no page.
    pub fn table(&self) -> View<'_> {
        view(&self.table)
    }

    /// `[sequences]` of i32, on the device.
    pub fn lengths(&self) -> View<'_> {
        view(&self.lengths)
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
    /// An empty cache of `batch` sequences with room for `capacity` tokens each, in memory of a device, with
    /// work on its stream.
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
