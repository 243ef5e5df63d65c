//! Keys and values of a cache as candle's tensors.

use attention::core::{Dims, OutOfMemory};
use attention::kv_cache::{CacheError, CacheMemory, CacheTensor, IntoCacheTensor, PageCopy, Update, Write};
use attention::{Device, Element, Role, View, bf16, f16};
use candle_core::{Storage, Tensor, WithDType};

use super::token::float;
use crate::Error;

/// The keys and values of a cache. No `Clone`, which would share the memory.
#[derive(Debug)]
pub(super) struct TensorMemory {
    keys: Tensor,
    values: Tensor,
    device: Device,
}

/// Keys or values: those of a cache, or new ones, whose device and dtype are known to the library.
#[derive(Clone, Debug)]
pub(super) struct Tokens {
    tensor: Tensor,
    device: Device,
    dtype: attention::DType,
}

impl TensorMemory {
    /// Zeroed memory of these shapes, whose sizes were checked, for a dtype of the library.
    pub(super) fn new(
        dtype: attention::DType,
        device: (Device, &candle_core::Device),
        [keys, values]: [Dims; 2],
    ) -> Result<Self, CacheError> {
        let (place, device) = device;
        let zeros = |shape: Dims| match dtype {
            attention::DType::F64 => zeros::<f64>(shape, device),
            attention::DType::F16 => zeros::<f16>(shape, device),
            attention::DType::Bf16 => zeros::<bf16>(shape, device),
            _ => zeros::<f32>(shape, device),
        };
        Ok(Self { keys: zeros(keys)?, values: zeros(values)?, device: place })
    }

    fn held(&self, tensor: &Tensor) -> Tokens {
        let dtype = float(Role::Key, tensor.dtype());
        let dtype = dtype.unwrap_or_else(|_| unreachable!("a cache of it was refused when it was made"));
        Tokens { tensor: tensor.clone(), device: self.device, dtype }
    }
}

impl Tokens {
    /// New keys and values for the cache that these are of. What the library has no words for is refused
    /// here: another device, and dtypes that no cache has.
    pub(super) fn new_tokens(
        &self,
        what: &str,
        keys: &Tensor,
        values: &Tensor,
    ) -> candle_core::Result<[Self; 2]> {
        let new = |role, tensor: &Tensor| {
            if !tensor.device().same_device(self.tensor.device()) {
                let (device, cache) = (tensor.device().location(), self.tensor.device().location());
                return Err(Error::CacheDevice { role, device, cache });
            }
            let rank = tensor.rank();
            if rank > 4 {
                return Err(Error::Rank { role, rank, shape: tensor.dims().to_vec() });
            }
            Ok(Self { tensor: tensor.detach(), device: self.device, dtype: float(role, tensor.dtype())? })
        };
        let both = new(Role::Key, keys).and_then(|keys| Ok([keys, new(Role::Value, values)?]));
        both.map_err(|error| error.in_call(what))
    }

    pub(super) fn into_tensor(self) -> Tensor {
        self.tensor
    }
}

impl CacheMemory for TensorMemory {
    type Tensor<'a> = Tokens;

    fn device(&self) -> Device {
        self.device
    }

    fn keys(&self) -> Tokens {
        self.held(&self.keys)
    }

    fn values(&self) -> Tokens {
        self.held(&self.values)
    }

    fn update(&mut self, update: &Update<'_, Tokens>) -> Result<(), CacheError> {
        for (memory, tokens) in [(&self.keys, update.keys()), (&self.values, update.values())] {
            apply(memory, &tokens.tensor, update.copies(), update.writes()).map_err(failed)?;
        }
        Ok(())
    }
}

impl CacheTensor for Tokens {
    fn device(&self) -> Device {
        self.device
    }

    fn dtype(&self) -> attention::DType {
        self.dtype
    }

    fn shape(&self) -> Dims {
        Dims::from_slice(self.tensor.dims()).unwrap_or_else(|| unreachable!("the rank was checked"))
    }

    fn unsqueeze(self) -> Result<Self, attention::InvalidCall> {
        let (rank, shape) = (self.tensor.rank(), self.shape());
        let tensor = self.tensor.unsqueeze(0).ok().filter(|_| rank < 4);
        let expected = "3 ([tokens, K, H or Hv])";
        let tensor = tensor.ok_or(attention::InvalidCall::Rank { role: Role::Key, rank, shape, expected })?;
        Ok(Self { tensor, ..self })
    }
}

impl<'a> IntoCacheTensor<'a, TensorMemory> for Tokens {
    fn into_cache_tensor(self) -> Result<Self, attention::InvalidCall> {
        Ok(self)
    }
}

/// Where tensors of this device are, in the library's words.
pub(super) fn place(device: &candle_core::Device) -> Result<Device, Error> {
    let place = match device.location() {
        candle_core::DeviceLocation::Cpu => Some(Device::Cpu),
        candle_core::DeviceLocation::Cuda { gpu_id } if cfg!(feature = "cuda") => {
            u32::try_from(gpu_id).ok().map(Device::Cuda)
        }
        _ => None,
    };
    place.ok_or(Error::Device { role: Role::Key, device: device.location() })
}

/// Zeroed memory.
fn zeros<T: Element + WithDType>(shape: Dims, device: &candle_core::Device) -> Result<Tensor, CacheError> {
    if !device.is_cpu() {
        return Tensor::zeros(&shape[..], <T as WithDType>::DTYPE, device).map_err(failed);
    }
    // By the library, since candle ends the program where the system has no memory.
    let memory = attention::Tensor::zeros::<T>(shape).map_err(|error| match error {
        attention::Error::OutOfMemory { what, bytes } => OutOfMemory { what, bytes }.into(),
        other => failed(other),
    })?;
    let memory = memory.into_vec::<T>().map_err(failed)?;
    Tensor::from_vec(memory, &shape[..], device).map_err(failed)
}

/// Numbers of a cache, a list or a table of i32 in host memory, as a tensor.
pub(super) fn numbers(view: View<'_>) -> candle_core::Result<Tensor> {
    let host = view.host::<i32>().unwrap_or_else(|| unreachable!("tables and lengths are i32"));
    let shape = view.shape();
    let numbers: Vec<i32> = match shape.rank() {
        1 => host.row(&[]).iter().collect(),
        _ => (0..shape[0]).flat_map(|row| host.row(&[row]).iter()).collect(),
    };
    Tensor::from_vec(numbers, &shape[..], &candle_core::Device::Cpu)
}

/// A cache's answer as candle's.
pub(super) fn told<T>(what: &str, answer: Result<T, CacheError>) -> candle_core::Result<T> {
    answer.map_err(|error| Error::Call(error.into()).in_call(what))
}

fn failed(error: impl std::fmt::Display) -> CacheError {
    CacheError::Memory { reason: error.to_string() }
}

/// Changes keys, or values, in place.
fn apply(memory: &Tensor, tokens: &Tensor, copies: &[PageCopy], writes: &[Write]) -> candle_core::Result<()> {
    let (outer, inner, heads, width) = memory.dims4()?;
    // The same memory as a list of tokens.
    let slots = memory.reshape((outer * inner, heads * width))?;
    let slot = |[outer, slot]: [usize; 2]| outer * inner + slot;
    for copy in copies.iter().filter(|copy| copy.slots > 0) {
        // Candle copies inside one memory by way of another one.
        let page = slots.narrow(0, slot([copy.from, 0]), copy.slots)?.force_contiguous()?;
        slots.slice_set(&page, 0, slot([copy.to, 0]))?;
    }
    let count: usize = writes.iter().map(|write| write.count).sum();
    if count == 0 {
        return Ok(());
    }
    let (new_outer, new_inner, ..) = tokens.dims4()?;
    let rows = (new_outer * new_inner, heads * width);
    // A cache's own keys may be appended to it, which are being written while they are read.
    let rows = if same_memory(memory, tokens) { tokens.force_contiguous()? } else { tokens.contiguous()? }
        .reshape(rows)?;
    let stretches = writes.iter().filter(|write| write.count > 0).map(|write| Stretch {
        from: write.from[0] * new_inner + write.from[1],
        to: slot(write.to),
        count: write.count,
    });
    let stretches: Vec<Stretch> = stretches.collect();
    // On a device each stretch is a kernel; a step of decoding has one for each sequence.
    if !memory.device().is_cpu() && stretches.len() >= MANY && count <= SHORT * stretches.len() {
        return scatter(&slots, &rows, &stretches);
    }
    for Stretch { from, to, count } in stretches {
        slots.slice_set(&rows.narrow(0, from, count)?, 0, to)?;
    }
    Ok(())
}

/// Neighbouring tokens, and where they go.
struct Stretch {
    from: usize,
    to: usize,
    count: usize,
}

/// How many stretches are one kernel together, rather than one each.
const MANY: usize = 4;
/// How many tokens they may have on the average: that kernel takes the tokens one after the other.
const SHORT: usize = 4;

/// Writes all stretches by one operation of candle's, which takes a place for each element.
fn scatter(slots: &Tensor, rows: &Tensor, stretches: &[Stretch]) -> candle_core::Result<()> {
    let list = |first: fn(&Stretch) -> usize| {
        let numbers = stretches.iter().flat_map(|stretch| first(stretch)..first(stretch) + stretch.count);
        // Places are below 2^62, the product of two sizes that a cache has.
        let numbers: Vec<i64> = numbers.map(|number| number as i64).collect();
        let count = numbers.len();
        Tensor::from_vec(numbers, count, slots.device())
    };
    let rows = rows.index_select(&list(|stretch| stretch.from)?, 0)?;
    let to = list(|stretch| stretch.to)?.unsqueeze(1)?.broadcast_as(rows.shape())?.contiguous()?;
    slots.scatter_set(&to, &rows, 0)
}

/// Whether two tensors have one storage, which candle locks as a whole.
fn same_memory(a: &Tensor, b: &Tensor) -> bool {
    let address = |tensor: &Tensor| std::ptr::from_ref::<Storage>(&tensor.storage_and_layout().0).addr();
    address(a) == address(b)
}

#[cfg(test)]
mod tests {
    use candle_core::DType;

    use super::*;

    /// What runs on a device runs on the CPU here, for every dtype of a cache.
    #[test]
    fn one_scatter_writes_what_copies_write() -> candle_core::Result<()> {
        let cpu = candle_core::Device::Cpu;
        let stretches =
            [(0, 5, 1), (1, 0, 2), (4, 9, 3), (3, 7, 1)].map(|(from, to, count)| Stretch { from, to, count });
        for dtype in [DType::F64, DType::F32, DType::F16, DType::BF16] {
            let rows = Tensor::arange(1f32, 22f32, &cpu)?.reshape((7, 3))?.to_dtype(dtype)?;
            let [want, got] = [(); 2].map(|()| Tensor::zeros((12, 3), dtype, &cpu));
            let (want, got) = (want?, got?);
            for Stretch { from, to, count } in &stretches {
                want.slice_set(&rows.narrow(0, *from, *count)?, 0, *to)?;
            }
            scatter(&got, &rows, &stretches)?;
            let numbers = |tensor: &Tensor| tensor.to_dtype(DType::F64)?.to_vec2::<f64>();
            assert_eq!(numbers(&got)?, numbers(&want)?, "{dtype:?}");
            assert_eq!(numbers(&got)?[5], [1.0, 2.0, 3.0]);
            assert_eq!(numbers(&got)?[8], [0.0; 3]);
        }
        Ok(())
    }
}
