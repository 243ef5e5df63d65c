//! A training step on a device whose memory is guarded, and the numbers of its calls in host or device
//! memory.

use std::sync::Arc;

use attention_core::{
    Alignment, AttentionBackend, BackwardCall, BackwardInputs, BackwardOutputs, CallData, DType, Dims,
    Dropout, ForwardCall, ForwardOutputs, Gradients, Inputs, OffsetRange, Plan, QueryOffset, Scalar, Scratch,
    Strides, TensorDesc, View, ViewMut, Window, philox4x32_10,
};
use attention_cuda::cudarc::driver::CudaGraph;
use attention_cuda::cudarc::driver::sys::{CUgraphInstantiate_flags, CUstreamCaptureMode};
use attention_cuda::{CudaDevice, DeviceTensor};
use half::{bf16, f16};

pub(crate) type Result<T = ()> = std::result::Result<T, Box<dyn std::error::Error + Send + Sync>>;

/// The device on a stream of its own, without cudarc's events: every test orders its work by that stream.
pub(crate) fn device() -> Result<CudaDevice> {
    let device = CudaDevice::new("test", 0)?;
    // SAFETY: without events, cudarc does not order work of several streams on the same memory. These tests
    // use all memory of this device on one stream, the new one below, so there is nothing to order.
    unsafe { device.context().disable_event_tracking() };
    let stream = device.context().new_stream()?;
    Ok(device.with_stream(stream))
}

/// The graph of what `work` puts on the device's stream.
pub(crate) fn graph_of(device: &CudaDevice, work: impl FnOnce() -> Result) -> Result<CudaGraph> {
    let stream = device.stream();
    stream.synchronize()?;
    stream.begin_capture(CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL)?;
    let worked = work();
    let flags = CUgraphInstantiate_flags::CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH;
    let graph = stream.end_capture(flags)?;
    worked?;
    Ok(graph.ok_or("nothing was captured")?)
}

/// Bytes before and behind a tensor that nobody may write, and what they and outputs hold before a call: NaN.
const GUARD: usize = 4096;
pub(crate) const POISON: u8 = 0xff;

/// A tensor without gaps between guards.
pub(crate) struct Guarded {
    device: CudaDevice,
    memory: DeviceTensor,
    desc: TensorDesc,
    bytes: usize,
    /// From the first byte to the element at index 0.
    origin: usize,
}

impl Guarded {
    /// A tensor, which is `bytes` in memory from its lowest to its highest element.
    pub(crate) fn new(device: &CudaDevice, desc: TensorDesc, bytes: &[u8]) -> Result<Self> {
        let (low, _) = desc.span().unwrap_or((0, -1));
        let room = TensorDesc::contiguous(DType::Bool, [bytes.len() + 2 * GUARD]);
        let memory = DeviceTensor::filled(device, room, POISON)?;
        let origin = low.unsigned_abs() * desc.dtype().size();
        let mut tensor = Self { device: device.clone(), memory, desc, bytes: bytes.len(), origin };
        tensor.put(bytes)?;
        Ok(tensor)
    }

    pub(crate) fn put(&mut self, bytes: &[u8]) -> Result {
        assert_eq!(bytes.len(), self.bytes, "the same tensor");
        let guard = [POISON; GUARD];
        let all = [&guard[..], bytes, &guard].concat();
        self.memory.replace(View::strided_mask(&all, 0, [all.len()], [1])?)?;
        Ok(())
    }

    pub(crate) fn poison(&mut self) -> Result {
        self.put(&vec![POISON; self.bytes])
    }

    pub(crate) fn view(&self) -> Result<View<'_>> {
        let pointer = self.memory.view()?.as_ptr().wrapping_add(GUARD + self.origin);
        // SAFETY: the elements are inside the memory, between its guards. This value owns the memory, which
        // was written when it was made, and the view borrows it.
        Ok(unsafe { View::from_raw_parts(pointer, self.device.device(), self.desc) }?)
    }

    pub(crate) fn view_mut(&mut self) -> Result<ViewMut<'_>> {
        let pointer = self.memory.view_mut()?.as_mut_ptr().wrapping_add(GUARD + self.origin);
        // SAFETY: the elements are inside the memory, between its guards. This value owns the memory, which
        // was written when it was made, and the view borrows it exclusively.
        Ok(unsafe { ViewMut::from_raw_parts(pointer, self.device.device(), self.desc) }?)
    }

    pub(crate) fn scratch(&mut self) -> Result<Scratch<'_>> {
        let pointer = self.memory.view_mut()?.as_mut_ptr().wrapping_add(GUARD);
        // SAFETY: the memory has `bytes` bytes between its guards. This value owns it, and the scratch
        // borrows it exclusively.
        Ok(unsafe { Scratch::from_raw_parts(pointer, self.bytes, self.device.device()) })
    }

    /// Copies the tensor's bytes to the host once the work on the stream is done, and checks the guards.
    pub(crate) fn contents(&self) -> Result<Vec<u8>> {
        let all = self.memory.bytes()?;
        let inside = GUARD..GUARD + self.bytes;
        let written = (all.iter().enumerate()).find(|(at, byte)| !inside.contains(at) && **byte != POISON);
        assert!(written.is_none(), "a guard of {:?} was written: {written:?}", self.desc);
        Ok(all[inside].to_vec())
    }
}

/// The sizes of a step.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sizes {
    pub(crate) batch: usize,
    pub(crate) queries: usize,
    pub(crate) keys: usize,
    pub(crate) heads: usize,
    pub(crate) key_heads: usize,
    pub(crate) width: usize,
}

impl Sizes {
    /// Of one batch row.
    pub(crate) fn alone(self) -> Self {
        Self { batch: 1, ..self }
    }

    fn query(self) -> Dims {
        [self.batch, self.queries, self.heads, self.width].into()
    }

    fn key(self) -> Dims {
        [self.batch, self.keys, self.key_heads, self.width].into()
    }
}

/// Numbers in [-1, 1), the same at every run, as bytes of this dtype.
pub(crate) fn noise(dtype: DType, seed: u64, count: usize) -> Vec<u8> {
    let number = |index: usize| {
        let word = philox4x32_10([index as u32, 0, 0, 0], [seed as u32, 5])[0];
        f64::from(word) / f64::from(1u32 << 31) - 1.0
    };
    (0..count)
        .flat_map(|index| match dtype {
            DType::F64 => number(index).to_ne_bytes().to_vec(),
            DType::F32 => (number(index) as f32).to_ne_bytes().to_vec(),
            DType::F16 => <f16 as Scalar>::from_f64(number(index)).to_ne_bytes().to_vec(),
            _ => <bf16 as Scalar>::from_f64(number(index)).to_ne_bytes().to_vec(),
        })
        .collect()
}

/// The tensors of both passes, and the options that are no numbers.
pub(crate) struct Step {
    device: CudaDevice,
    dtype: DType,
    sizes: Sizes,
    pub(crate) causal: bool,
    pub(crate) window: Window,
    /// In the place of the range that the offsets of a call have.
    pub(crate) offset_range: Option<OffsetRange>,
    pub(crate) batch_invariant: bool,
    /// Query, key, value, and the incoming gradient of the output, on the host and on the device.
    data: [Vec<u8>; 4],
    inputs: [Guarded; 4],
    /// Output, logsumexp, and the gradients of query, key and value.
    outputs: [Guarded; 5],
    scratch: Guarded,
}

impl Step {
    pub(crate) fn new(device: &CudaDevice, dtype: DType, sizes: Sizes, seed: u64) -> Result<Self> {
        let (query, key) = (sizes.query(), sizes.key());
        let tensor = |shape: Dims, seed: u64| noise(dtype, seed, shape.iter().product());
        let data =
            [tensor(query, seed), tensor(key, seed + 1), tensor(key, seed + 2), tensor(query, seed + 3)];
        let send =
            |shape: Dims, bytes: &[u8]| Guarded::new(device, TensorDesc::contiguous(dtype, shape), bytes);
        let room = |dtype: DType, shape: Dims| {
            let bytes = shape.iter().product::<usize>() * dtype.size();
            Guarded::new(device, TensorDesc::contiguous(dtype, shape), &vec![POISON; bytes])
        };
        let lse: Dims = [sizes.batch, sizes.queries, sizes.heads].into();
        Ok(Self {
            device: device.clone(),
            dtype,
            sizes,
            causal: false,
            window: Window::UNBOUNDED,
            offset_range: None,
            batch_invariant: false,
            inputs: [
                send(query, &data[0])?,
                send(key, &data[1])?,
                send(key, &data[2])?,
                send(query, &data[3])?,
            ],
            data,
            outputs: [
                room(dtype, query)?,
                room(dtype.accumulator(), lse)?,
                room(dtype, query)?,
                room(dtype, key)?,
                room(dtype, key)?,
            ],
            scratch: room(DType::Bool, [64].into())?,
        })
    }

    fn with_numbers<'a>(&'a self, data: CallData<'a>) -> Result<Inputs<'a>> {
        let [query, key, value, _] = &self.inputs;
        Ok(Inputs { data, ..Inputs::new(query.view()?, key.view()?, value.view()?) })
    }

    /// Both passes, planned for calls with numbers like these. Scratch is made as large as they need it.
    pub(crate) fn plan(
        &mut self,
        backend: &dyn AttentionBackend,
        data: CallData<'_>,
    ) -> Result<[Arc<dyn Plan>; 2]> {
        let mut builder = self.with_numbers(data)?.problem().causal(self.causal).window(self.window);
        builder = builder.batch_invariant(self.batch_invariant);
        if let Some(range) = self.offset_range {
            builder = builder.alignment(Alignment::Offsets(range));
        }
        let wanted = Gradients::QUERY | Gradients::KEY | Gradients::VALUE;
        let forward = backend.plan(&builder.clone().lse(true).build()?)?;
        let backward = backend.plan(&builder.gradients(wanted).build()?)?;
        let bytes = forward.scratch_bytes().max(backward.scratch_bytes());
        if bytes > self.scratch.bytes {
            let room = TensorDesc::contiguous(DType::Bool, [bytes]);
            self.scratch = Guarded::new(&self.device, room, &vec![POISON; bytes])?;
        }
        Ok([forward, backward])
    }

    /// Puts both passes on the stream.
    pub(crate) fn run(&mut self, [forward, backward]: &[Arc<dyn Plan>; 2], data: CallData<'_>) -> Result {
        let [query, key, value, d_out] = &self.inputs;
        let inputs = Inputs { data, ..Inputs::new(query.view()?, key.view()?, value.view()?) };
        let [out, lse, dq, dk, dv] = &mut self.outputs;
        let outputs = ForwardOutputs { out: out.view_mut()?, lse: Some(lse.view_mut()?) };
        let call = ForwardCall::new(forward.problem(), inputs, outputs)?;
        forward.forward(call, self.scratch.scratch()?)?;
        let saved = BackwardInputs { out: out.view()?, lse: lse.view()?, d_out: d_out.view()?, d_lse: None };
        let outputs = BackwardOutputs {
            dq: Some(dq.view_mut()?),
            dk: Some(dk.view_mut()?),
            dv: Some(dv.view_mut()?),
            dbias: None,
            dsinks: None,
        };
        let call = BackwardCall::new(backward.problem(), inputs, saved, outputs)?;
        backward.backward(call, self.scratch.scratch()?)?;
        Ok(())
    }

    /// Fills outputs and scratch with NaN.
    pub(crate) fn poison(&mut self) -> Result {
        self.outputs.iter_mut().chain([&mut self.scratch]).try_for_each(Guarded::poison)
    }

    /// The outputs; every guard is checked.
    pub(crate) fn results(&self) -> Result<Vec<Vec<u8>>> {
        for tensor in self.inputs.iter().chain([&self.scratch]) {
            tensor.contents()?;
        }
        self.outputs.iter().map(Guarded::contents).collect()
    }

    /// Whether any number of these results is NaN.
    pub(crate) fn holds_nan(&self, results: &[Vec<u8>]) -> bool {
        let is_nan = |dtype: DType, bytes: &[u8]| match (dtype, bytes) {
            (DType::F64, &[a, b, c, d, e, f, g, h]) => f64::from_ne_bytes([a, b, c, d, e, f, g, h]).is_nan(),
            (DType::F32, &[a, b, c, d]) => f32::from_ne_bytes([a, b, c, d]).is_nan(),
            (DType::F16, &[a, b]) => f16::from_ne_bytes([a, b]).is_nan(),
            (_, &[a, b]) => bf16::from_ne_bytes([a, b]).is_nan(),
            _ => unreachable!("a float of {dtype}"),
        };
        (self.outputs.iter().zip(results)).any(|(output, bytes)| {
            let dtype = output.desc.dtype();
            bytes.chunks_exact(dtype.size()).any(|number| is_nan(dtype, number))
        })
    }

    /// Takes the inputs of a batch row of another step.
    pub(crate) fn take_row(&mut self, of: &Self, batch: usize) -> Result {
        for ((data, input), whole) in self.data.iter_mut().zip(&mut self.inputs).zip(&of.data) {
            let bytes = whole.len() / of.sizes.batch;
            *data = whole[batch * bytes..][..bytes].to_vec();
            input.put(data)?;
        }
        self.poison()
    }

    /// Takes these bytes as query, key, value, and the incoming gradient of the output.
    pub(crate) fn take(&mut self, data: [Vec<u8>; 4]) -> Result {
        self.data = data;
        self.restore()?;
        self.poison()
    }

    /// Fills the keys and values behind these lengths with NaN.
    pub(crate) fn poison_keys_behind(&mut self, lengths: &[i64]) -> Result {
        let of_key = self.sizes.key_heads * self.sizes.width * self.dtype.size();
        for index in [1, 2] {
            let mut bytes = self.data[index].clone();
            for (row, &length) in bytes.chunks_mut(of_key * self.sizes.keys).zip(lengths) {
                row[length as usize * of_key..].fill(POISON);
            }
            self.inputs[index].put(&bytes)?;
        }
        Ok(())
    }

    /// Brings all inputs back.
    pub(crate) fn restore(&mut self) -> Result {
        self.inputs.iter_mut().zip(&self.data).try_for_each(|(input, data)| input.put(data))
    }
}

/// Where the numbers of a call are: as i64 without gaps in host memory, or with this dtype and stride in
/// device memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    Host,
    Device(DType, isize),
}

/// The numbers of a call that may be tensors.
#[derive(Clone, Debug, Default)]
pub(crate) struct Integers {
    pub(crate) query_lengths: Option<Vec<i64>>,
    pub(crate) key_value_lengths: Option<Vec<i64>>,
    pub(crate) query_offsets: Option<Vec<i64>>,
    /// Where there are no offsets by row.
    pub(crate) query_offset: QueryOffset,
    /// The rate, the seed and the offset of a dropout.
    pub(crate) dropout: Option<(f64, i64, i64)>,
    pub(crate) query_starts: Option<Vec<i64>>,
    pub(crate) key_value_starts: Option<Vec<i64>>,
    /// Row by row, one for each key/value length.
    pub(crate) block_table: Option<Vec<i64>>,
}

impl Integers {
    /// In the order of `Role::DATA` and `Role::SEQUENCES`.
    fn tensors(&self) -> [Option<Vec<i64>>; 8] {
        let one = |number: fn((f64, i64, i64)) -> i64| self.dropout.map(|dropout| vec![number(dropout)]);
        [
            self.query_lengths.clone(),
            self.key_value_lengths.clone(),
            self.query_offsets.clone(),
            one(|(_, seed, _)| seed),
            one(|(_, _, offset)| offset),
            self.query_starts.clone(),
            self.key_value_starts.clone(),
            self.block_table.clone(),
        ]
    }

    /// Those of one batch row.
    pub(crate) fn of_row(&self, batch: usize) -> Self {
        let one = |numbers: &Option<Vec<i64>>| numbers.as_ref().map(|numbers| vec![numbers[batch]]);
        Self {
            query_lengths: one(&self.query_lengths),
            key_value_lengths: one(&self.key_value_lengths),
            query_offsets: one(&self.query_offsets),
            ..self.clone()
        }
    }
}

/// The last of the tensors of numbers, which has two axes.
const BLOCK_TABLE: usize = 7;

/// Numbers in their place.
pub(crate) struct Placed {
    place: Place,
    query_offset: QueryOffset,
    rate: Option<f64>,
    on_host: [Option<Vec<i64>>; 8],
    on_device: [Option<Guarded>; 8],
    /// Entries of the block table for each sequence.
    most_pages: usize,
}

/// The bytes of a tensor of one axis from its lowest to its highest element. What lies between is no number
/// of it.
fn encoded(dtype: DType, stride: isize, numbers: &[i64]) -> Vec<u8> {
    let size = dtype.size();
    let step = stride.unsigned_abs();
    let mut bytes = vec![0xa5; ((numbers.len() - 1) * step + 1) * size];
    for (index, &number) in numbers.iter().enumerate() {
        let place = if stride < 0 { numbers.len() - 1 - index } else { index };
        // The lower bytes of a number are those of the narrower integers.
        let number = match dtype {
            DType::I64 => number.to_ne_bytes().to_vec(),
            _ => (number as u32).to_ne_bytes().to_vec(),
        };
        bytes[place * step * size..][..size].copy_from_slice(&number);
    }
    bytes
}

impl Placed {
    pub(crate) fn new(device: &CudaDevice, place: Place, integers: &Integers) -> Result<Self> {
        let rate = integers.dropout.map(|(rate, ..)| rate);
        let mut placed = Self {
            place,
            query_offset: integers.query_offset,
            rate,
            on_host: Default::default(),
            on_device: Default::default(),
            most_pages: integers
                .block_table
                .as_ref()
                .map_or(0, |table| table.len() / integers.key_value_lengths.as_ref().map_or(1, Vec::len)),
        };
        match place {
            Place::Host => placed.on_host = integers.tensors(),
            Place::Device(dtype, stride) => {
                let most_pages = placed.most_pages;
                for ((index, tensor), numbers) in
                    placed.on_device.iter_mut().enumerate().zip(integers.tensors())
                {
                    let Some(numbers) = numbers else { continue };
                    let desc = if index == BLOCK_TABLE {
                        let shape = [numbers.len() / most_pages, most_pages];
                        TensorDesc::strided(dtype, shape, [stride * most_pages.cast_signed(), stride])
                    } else {
                        TensorDesc::strided(dtype, [numbers.len()], Strides::from([stride]))
                    };
                    let desc = desc.ok_or("too large")?;
                    *tensor = Some(Guarded::new(device, desc, &encoded(dtype, stride, &numbers))?);
                }
            }
        }
        Ok(placed)
    }

    /// Other numbers in the same memory, in the order of the stream.
    pub(crate) fn replace(&mut self, integers: &Integers) -> Result {
        for (own, numbers) in self.on_host.iter_mut().zip(integers.tensors()) {
            if let (Some(own), Some(numbers)) = (own, numbers) {
                own.copy_from_slice(&numbers);
            }
        }
        if let Place::Device(dtype, stride) = self.place {
            for (own, numbers) in self.on_device.iter_mut().zip(integers.tensors()) {
                if let (Some(own), Some(numbers)) = (own, numbers) {
                    own.put(&encoded(dtype, stride, &numbers))?;
                }
            }
        }
        Ok(())
    }

    /// As a call takes them.
    pub(crate) fn data(&self) -> Result<CallData<'_>> {
        let view = |index: usize| -> Result<Option<View<'_>>> {
            match (&self.on_host[index], &self.on_device[index]) {
                (Some(numbers), _) if index == BLOCK_TABLE => {
                    let shape = [numbers.len() / self.most_pages, self.most_pages];
                    Ok(Some(View::from_slice(numbers, shape)?))
                }
                (Some(numbers), _) => Ok(Some(View::from_slice(numbers, [numbers.len()])?)),
                (None, Some(tensor)) => Ok(Some(tensor.view()?)),
                (None, None) => Ok(None),
            }
        };
        Ok(CallData {
            query_offset: self.query_offset,
            query_lengths: view(0)?,
            key_value_lengths: view(1)?,
            query_offsets: view(2)?,
            // The seed is that of the tensor.
            dropout: self.rate.map(|rate| Dropout::new(rate, 99)),
            dropout_seed: view(3)?,
            dropout_offset: view(4)?,
            query_starts: view(5)?,
            key_value_starts: view(6)?,
            block_table: view(BLOCK_TABLE)?,
            ..CallData::default()
        })
    }
}
