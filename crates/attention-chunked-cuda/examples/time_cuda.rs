//! Device time of calls on a GPU, forward and backward: `cargo run --release --example time_cuda`.

use attention_chunked_cuda::{ChunkedCudaBackend, ChunkedCudaConfig};
use attention_core::{
    AttentionBackend, BackwardCall, BackwardInputs, BackwardOutputs, DType, Dims, F8E4M3, F8E5M2, Float8,
    ForwardCall, ForwardOutputs, Gradients, Inputs, Overflow, Role, TensorDesc, View,
};
use attention_cuda::cudarc::driver::sys::CUevent_flags;
use attention_cuda::{CudaDevice, DeviceScratch, DeviceTensor};

type Result<T = ()> = std::result::Result<T, Box<dyn std::error::Error>>;

/// Calls whose time is taken together.
const CALLS: usize = 10;

/// What is added to a plain call.
#[derive(Clone, Copy, PartialEq, Debug)]
enum Extra {
    None,
    Causal,
    Mask,
    Bias,
    Alibi,
    Softcap,
    Dropout,
    /// Full key/value lengths, which cost what reading them does.
    HostLengths,
    DeviceLengths,
    /// Keys and values in pages in no order, with full lengths; forward only.
    Pages,
    /// Keys and values of 8 bits with scales of each head, dense and in pages; forward only.
    EightBit(DType),
    EightBitPages(DType),
}

impl Extra {
    fn cached(self) -> Option<DType> {
        match self {
            Extra::EightBit(dtype) | Extra::EightBitPages(dtype) => Some(dtype),
            _ => None,
        }
    }

    fn is_paged(self) -> bool {
        matches!(self, Extra::Pages | Extra::EightBitPages(_))
    }
}

/// Rows of a page.
const PAGE: usize = 16;

/// `[batch, queries, keys, heads, key heads, head dim]`.
struct Case(&'static str, DType, [usize; 6], Extra);

/// Numbers in [-1, 1), the same at every run.
fn noise(device: &CudaDevice, dtype: DType, shape: &[usize]) -> Result<DeviceTensor> {
    let count: usize = shape.iter().product();
    let mut state = 0x9E37_79B9_7F4A_7C15u64;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    };
    // Some of it over and over: a bias is too large to draw every element of.
    let drawn: Vec<u8> = (0..count.min(1 << 16))
        .flat_map(|_| match dtype {
            DType::F64 => f64::from(next()).to_ne_bytes().to_vec(),
            DType::F32 => next().to_ne_bytes().to_vec(),
            DType::F16 => half::f16::from_f32(next()).to_ne_bytes().to_vec(),
            DType::Bf16 => half::bf16::from_f32(next()).to_ne_bytes().to_vec(),
            DType::F8E4M3 => vec![F8E4M3::from_f32(next(), Overflow::Saturate).to_bits()],
            DType::F8E5M2 => vec![F8E5M2::from_f32(next(), Overflow::Saturate).to_bits()],
            _ => vec![u8::from(next() > -0.5)],
        })
        .collect();
    let bytes: Vec<u8> = drawn.into_iter().cycle().take(count * dtype.size()).collect();
    let shape = Dims::from_slice(shape).ok_or("at most four axes")?;
    let desc = TensorDesc::contiguous(dtype, shape);
    // SAFETY: `bytes` has the bytes of all elements of the description, which has no gaps. It outlives the
    // view, and nothing writes it.
    let view =
        unsafe { attention_core::View::from_raw_parts(bytes.as_ptr(), attention_core::Device::Cpu, desc)? };
    Ok(DeviceTensor::from_host(device, view)?)
}

fn time(device: &CudaDevice, mut call: impl FnMut() -> Result) -> Result<f64> {
    let stream = device.stream();
    call()?;
    stream.synchronize()?;
    let mut times = Vec::new();
    for _ in 0..3 {
        let event = || device.context().new_event(Some(CUevent_flags::CU_EVENT_DEFAULT));
        let (start, end) = (event()?, event()?);
        start.record(stream)?;
        for _ in 0..CALLS {
            call()?;
        }
        end.record(stream)?;
        times.push(f64::from(start.elapsed_ms(&end)?) / CALLS as f64);
    }
    times.sort_by(f64::total_cmp);
    Ok(times[1])
}

fn run(device: &CudaDevice, backend: &ChunkedCudaBackend, case: &Case) -> Result {
    let Case(name, dtype, [b, t, s, n, k, h], extra) = *case;
    let query = noise(device, dtype, &[b, t, n, h])?;
    let cached = extra.cached().unwrap_or(dtype);
    let rows = if extra.is_paged() { [b * s / PAGE, PAGE, k, h] } else { [b, s, k, h] };
    let (key, value) = (noise(device, cached, &rows)?, noise(device, cached, &rows)?);
    let scales = DeviceTensor::from_host(device, View::from_slice(&vec![0.75f32; k], [k])?)?;
    // Every page once, far from those beside it.
    let pages: Vec<i32> = (0..b * s / PAGE).map(|page| (page * 7919 % (b * s / PAGE)) as i32).collect();
    let table = DeviceTensor::from_host(device, View::from_slice(&pages[..b * (s / PAGE)], [b, s / PAGE])?)?;
    let d_out = noise(device, dtype, &[b, t, n, h])?;
    let mask = noise(device, DType::Bool, &if extra == Extra::Mask { [b, 1, t, s] } else { [1; 4] })?;
    let bias = noise(device, dtype, &if extra == Extra::Bias { [1, n, t, s] } else { [1; 4] })?;
    let slopes = noise(device, DType::F32, &[n])?;
    let mut inputs = Inputs::new(query.view()?, key.view()?, value.view()?);
    inputs.mask = (extra == Extra::Mask).then(|| mask.view()).transpose()?;
    inputs.bias = (extra == Extra::Bias).then(|| bias.view()).transpose()?;
    inputs.alibi_slopes = (extra == Extra::Alibi).then(|| slopes.view()).transpose()?;
    inputs.data.softcap = (extra == Extra::Softcap).then_some(30.0);
    inputs.data.dropout = (extra == Extra::Dropout).then(|| attention_core::Dropout::new(0.125, 1));
    let filled = vec![s as i32; b];
    let lengths = DeviceTensor::from_host(device, View::from_slice(&filled, [b])?)?;
    inputs.data.key_value_lengths = match extra {
        Extra::HostLengths => Some(View::from_slice(&filled, [b])?),
        Extra::DeviceLengths | Extra::Pages | Extra::EightBitPages(_) => Some(lengths.view()?),
        _ => None,
    };
    inputs.data.block_table = extra.is_paged().then(|| table.view()).transpose()?;
    if extra.cached().is_some() {
        (inputs.data.key_scales, inputs.data.value_scales) = (Some(scales.view()?), Some(scales.view()?));
    }
    let problem = inputs.problem().causal(extra == Extra::Causal).lse(true).build()?;
    let mut out = DeviceTensor::filled(device, *problem.tensor(Role::Out).ok_or("out")?, 0)?;
    let mut lse = DeviceTensor::filled(device, *problem.tensor(Role::Lse).ok_or("lse")?, 0)?;
    let forward_plan = backend.plan(&problem)?;
    let bytes = forward_plan.scratch_bytes();
    let mut scratch = DeviceScratch::new(device, bytes)?;
    let share = if extra == Extra::Causal { 0.5 } else { 1.0 };
    let forward_ms = time(device, || {
        let outputs = ForwardOutputs { out: out.view_mut()?, lse: Some(lse.view_mut()?) };
        let scratch = scratch.scratch(bytes);
        Ok(forward_plan.forward(ForwardCall::new(forward_plan.problem(), inputs, outputs)?, scratch)?)
    })?;
    print!("{name:24} {dtype} {extra:?}: forward {forward_ms:.3} ms");
    print!(" {:.1} TFLOP/s", problem.flops() * share / forward_ms / 1e9);
    if t == 1 {
        let read = (2 * b * s * k * h * cached.size()) as f64;
        println!(", {:.2} TB/s", read / forward_ms / 1e9);
        return Ok(());
    }
    if extra.is_paged() || extra.cached().is_some() {
        println!();
        return Ok(());
    }
    let backward = problem.to_builder().gradients(Gradients::QKV).build()?;
    let room = |role| -> Result<DeviceTensor> {
        let desc = backward.tensor(role).ok_or("a gradient")?;
        Ok(DeviceTensor::filled(device, *desc, 0)?)
    };
    let backward_plan = backend.plan(&backward)?;
    let bytes = backward_plan.scratch_bytes();
    let mut scratch = DeviceScratch::new(device, bytes)?;
    let [mut dq, mut dk, mut dv] = [room(Role::DQuery)?, room(Role::DKey)?, room(Role::DValue)?];
    let backward_ms = time(device, || {
        let saved = BackwardInputs { out: out.view()?, lse: lse.view()?, d_out: d_out.view()?, d_lse: None };
        let outputs = BackwardOutputs {
            dq: Some(dq.view_mut()?),
            dk: Some(dk.view_mut()?),
            dv: Some(dv.view_mut()?),
            ..BackwardOutputs::default()
        };
        let scratch = scratch.scratch(bytes);
        let call = BackwardCall::new(backward_plan.problem(), inputs, saved, outputs)?;
        Ok(backward_plan.backward(call, scratch)?)
    })?;
    println!(", backward {backward_ms:.3} ms {:.1} TFLOP/s", backward.flops() * share / backward_ms / 1e9);
    Ok(())
}

fn main() -> Result {
    let device = CudaDevice::new("chunked-cuda", 0)?;
    println!("{}", device.context().name()?);
    let folder = std::env::temp_dir().join("attention-kernels");
    let backend = ChunkedCudaBackend::on(device.clone(), ChunkedCudaConfig::default().kernel_folder(folder));
    let long = [4, 4096, 4096, 16, 16, 128];
    let cases = [
        Case("h128", DType::Bf16, long, Extra::None),
        Case("h128", DType::Bf16, long, Extra::Causal),
        Case("h64", DType::Bf16, [4, 4096, 4096, 32, 32, 64], Extra::None),
        Case("h64", DType::Bf16, [4, 4096, 4096, 32, 32, 64], Extra::Causal),
        Case("h256", DType::Bf16, [4, 4096, 4096, 8, 8, 256], Extra::None),
        Case("grouped 32/8", DType::Bf16, [4, 4096, 4096, 32, 8, 128], Extra::None),
        Case("t512", DType::Bf16, [32, 512, 512, 16, 16, 128], Extra::None),
        Case("h128", DType::Bf16, long, Extra::Mask),
        Case("h128", DType::Bf16, long, Extra::Bias),
        Case("h128", DType::Bf16, long, Extra::Alibi),
        Case("h128", DType::Bf16, long, Extra::Softcap),
        Case("h128", DType::Bf16, long, Extra::Dropout),
        Case("decode b32 s8192", DType::Bf16, [32, 1, 8192, 32, 8, 128], Extra::None),
        Case("decode b32 s8192", DType::Bf16, [32, 1, 8192, 32, 8, 128], Extra::HostLengths),
        Case("decode b32 s8192", DType::Bf16, [32, 1, 8192, 32, 8, 128], Extra::DeviceLengths),
        Case("decode b128 s2048", DType::Bf16, [128, 1, 2048, 32, 8, 128], Extra::HostLengths),
        Case("decode b1 s8192", DType::Bf16, [1, 1, 8192, 32, 8, 128], Extra::None),
        Case("decode b32 s8192", DType::Bf16, [32, 1, 8192, 32, 8, 128], Extra::Pages),
        Case("decode b32 s8192", DType::Bf16, [32, 1, 8192, 32, 8, 128], Extra::EightBitPages(DType::F8E4M3)),
        Case("decode b32 s8192", DType::Bf16, [32, 1, 8192, 32, 8, 128], Extra::EightBitPages(DType::F8E5M2)),
        Case("decode b32 s8192", DType::F16, [32, 1, 8192, 32, 8, 128], Extra::EightBitPages(DType::F8E4M3)),
        Case("decode b32 s8192", DType::Bf16, [32, 1, 8192, 32, 8, 128], Extra::EightBit(DType::F8E4M3)),
        Case("decode b1 s8192", DType::Bf16, [1, 1, 8192, 32, 8, 128], Extra::EightBit(DType::F8E4M3)),
        Case("grouped 32/8", DType::Bf16, [4, 4096, 4096, 32, 8, 128], Extra::EightBit(DType::F8E4M3)),
        Case("grouped 32/8", DType::Bf16, [4, 4096, 4096, 32, 8, 128], Extra::Pages),
        Case("grouped 32/8", DType::Bf16, [4, 4096, 4096, 32, 8, 128], Extra::EightBitPages(DType::F8E4M3)),
        Case("grouped 32/8 h64", DType::F16, [4, 4096, 4096, 32, 8, 64], Extra::EightBit(DType::F8E4M3)),
        Case("h64", DType::F32, [4, 4096, 4096, 16, 16, 64], Extra::None),
        Case("h128", DType::F32, long, Extra::None),
        Case("h64", DType::F64, [1, 2048, 2048, 16, 16, 64], Extra::None),
    ];
    let wanted = std::env::args().nth(1).unwrap_or_default();
    for case in cases.iter().filter(|case| format!("{} {} {:?}", case.0, case.1, case.3).contains(&wanted)) {
        run(&device, &backend, case)?;
    }
    Ok(())
}
