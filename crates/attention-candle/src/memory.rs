//! The memory of candle's tensors as views, and memory for new ones.

use attention::{DType, Element, Role, View, ViewMut, bf16, f16};
use candle_core::op::BackpropOp;
use candle_core::{CpuStorage, Layout, Storage, StorageRef, Tensor};

use crate::Error;
#[cfg(feature = "cuda")]
use crate::cuda::{self, CudaOutput};
use crate::events::{Reads, Writes};
use crate::layout::{axes, expected, is_float};

/// The storages of the tensors of a call, locked against writes for as long as the call runs.
pub(crate) struct Locked<'t> {
    guards: Vec<StorageRef<'t>>,
    /// Each tensor with the place of its guard.
    tensors: Vec<(Role, &'t Tensor, usize)>,
}

impl<'t> Locked<'t> {
    /// Locks every storage once, however many tensors share it, in the order of their addresses, as candle's
    /// own operations in place do: a thread that takes a lock twice waits for ever on a writer in between.
    pub(crate) fn new(tensors: impl IntoIterator<Item = (Role, &'t Tensor)>) -> Self {
        let mut placed: Vec<(usize, Role, &Tensor)> = tensors
            .into_iter()
            .map(|(role, tensor)| {
                let (storage, _) = tensor.storage_and_layout();
                (std::ptr::from_ref::<Storage>(&storage).addr(), role, tensor)
            })
            .collect();
        placed.sort_by_key(|&(address, ..)| address);
        let mut locked = Self { guards: Vec::new(), tensors: Vec::new() };
        let mut last = None;
        for (address, role, tensor) in placed {
            if last != Some(address) {
                locked.guards.push(tensor.storage_and_layout().0);
                last = Some(address);
            }
            locked.tensors.push((role, tensor, locked.guards.len() - 1));
        }
        locked
    }

    /// The view of the tensor of this role, if there is one.
    pub(crate) fn view<'g>(
        &'g self,
        role: Role,
        #[cfg_attr(not(feature = "cuda"), allow(unused_variables))] reads: &mut Reads<'g>,
    ) -> Result<Option<View<'g>>, Error> {
        let Some(&(_, tensor, guard)) = self.tensors.iter().find(|(other, ..)| *other == role) else {
            return Ok(None);
        };
        let layout = tensor.layout();
        let rank = layout.dims().len();
        if rank > 4 {
            return Err(Error::Rank { role, rank, shape: layout.dims().to_vec() });
        }
        match &*self.guards[guard] {
            Storage::Cpu(storage) => host_view(role, storage, layout).map(Some),
            #[cfg(feature = "cuda")]
            Storage::Cuda(storage) => cuda::view(role, storage, layout, reads).map(Some),
            _ => Err(Error::Device { role, device: tensor.device().location() }),
        }
    }
}

fn host_view<'a>(role: Role, storage: &'a CpuStorage, layout: &Layout) -> Result<View<'a>, Error> {
    fn elements<'a, T: Element>(data: &'a [T], layout: &Layout) -> Result<View<'a>, Error> {
        let (shape, strides) = axes(layout);
        Ok(View::strided(data, layout.start_offset(), shape, strides)?)
    }
    match storage {
        CpuStorage::U8(data) if role == Role::Mask => {
            let (shape, strides) = axes(layout);
            Ok(View::strided_mask(data, layout.start_offset(), shape, strides)?)
        }
        CpuStorage::F64(data) if is_float(role) => elements(data, layout),
        CpuStorage::F32(data) if is_float(role) => elements(data, layout),
        CpuStorage::F16(data) if is_float(role) => elements(data, layout),
        CpuStorage::BF16(data) if is_float(role) => elements(data, layout),
        CpuStorage::U32(data) if role.is_data() => elements(data, layout),
        CpuStorage::I32(data) if role.is_data() => elements(data, layout),
        CpuStorage::I64(data) if role.is_data() => elements(data, layout),
        other => {
            let dtype = candle_core::backend::BackendStorage::dtype(other);
            Err(Error::DType { role, dtype, expected: expected(role) })
        }
    }
}

/// Memory for an output of a call, on the device of its operands.
pub(crate) enum Output {
    Host(attention::Tensor),
    #[cfg(feature = "cuda")]
    Cuda(CudaOutput),
}

impl Output {
    /// Memory for a row-major tensor where the query is.
    pub(crate) fn new(query: &Tensor, dtype: DType, shape: &[usize]) -> Result<Self, Error> {
        #[cfg(feature = "cuda")]
        if let candle_core::Device::Cuda(device) = query.device() {
            return cuda::output(device, dtype, shape.iter().product()).map(Self::Cuda);
        }
        if !query.device().is_cpu() {
            return Err(Error::Device { role: Role::Query, device: query.device().location() });
        }
        let shape = attention::Dims::from_slice(shape).expect("a tensor of a call has at most four axes");
        Ok(Self::Host(match dtype {
            DType::F64 => attention::Tensor::zeros::<f64>(shape),
            DType::F16 => attention::Tensor::zeros::<f16>(shape),
            DType::Bf16 => attention::Tensor::zeros::<bf16>(shape),
            // A checked problem has no other dtype.
            _ => attention::Tensor::zeros::<f32>(shape),
        }?))
    }

    /// The memory as a row-major tensor of this shape, which has as many elements.
    pub(crate) fn view_mut<'a>(
        &'a mut self,
        #[cfg_attr(not(feature = "cuda"), allow(unused_variables))] shape: &[usize],
        #[cfg_attr(not(feature = "cuda"), allow(unused_variables))] writes: &mut Writes<'a>,
    ) -> Result<ViewMut<'a>, Error> {
        match self {
            Self::Host(tensor) => Ok(tensor.view_mut()),
            #[cfg(feature = "cuda")]
            Self::Cuda(output) => cuda::view_mut(output, shape, writes),
        }
    }

    /// The memory as candle has it.
    pub(crate) fn into_storage(self) -> Storage {
        fn elements<T: Element>(tensor: attention::Tensor) -> Vec<T> {
            tensor.into_vec().unwrap_or_else(|_| unreachable!("the dtype was compared"))
        }
        match self {
            Self::Host(tensor) => Storage::Cpu(match tensor.dtype() {
                DType::F64 => CpuStorage::F64(elements(tensor)),
                DType::F16 => CpuStorage::F16(elements(tensor)),
                DType::Bf16 => CpuStorage::BF16(elements(tensor)),
                _ => CpuStorage::F32(elements(tensor)),
            }),
            #[cfg(feature = "cuda")]
            Self::Cuda(output) => Storage::Cuda(output.storage),
        }
    }

    /// The memory as a tensor without a history.
    pub(crate) fn into_tensor(self, shape: Vec<usize>) -> Tensor {
        Tensor::from_storage(self.into_storage(), shape, BackpropOp::none(), false)
    }
}
