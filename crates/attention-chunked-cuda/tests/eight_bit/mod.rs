//! Keys and values of 8 bits: what each byte is widened to, in every kind of kernel, and on architectures
//! without an instruction for it.

use attention_chunked_cuda::{ChunkedCudaBackend, ChunkedCudaConfig};
use attention_core::{
    AttentionBackend, CallData, DType, F8E4M3, F8E5M2, Float8, ForwardCall, ForwardOutputs, Inputs, Role,
    Scalar, View,
};
use attention_cuda::cudarc::driver::{DevicePtr, LaunchConfig};
use attention_cuda::cudarc::nvrtc::Ptx;
use attention_cuda::{CudaDevice, DeviceTensor, Nvrtc, launch};
use attention_kernels::{DTypeCode, Fused, Source, Variant};
use half::{bf16, f16};

use crate::support::{Result, device};

/// What a byte stands for.
fn value_of(dtype: DType, byte: u8) -> f64 {
    match dtype {
        DType::F8E4M3 => F8E4M3::from_bits(byte).to_f64(),
        _ => F8E5M2::from_bits(byte).to_f64(),
    }
}

/// Numbers that are the same, or both NaN.
fn same(got: f64, want: f64) -> bool {
    got == want || got.is_nan() && want.is_nan()
}

/// A tensor of bytes.
fn of_bytes(device: &CudaDevice, dtype: DType, shape: [usize; 4], bytes: &[u8]) -> Result<DeviceTensor> {
    fn tensor<T: Float8>(device: &CudaDevice, shape: [usize; 4], bytes: &[u8]) -> Result<DeviceTensor> {
        let numbers: Vec<T> = bytes.iter().map(|&byte| T::from_bits(byte)).collect();
        Ok(DeviceTensor::from_host(device, View::from_slice(&numbers, shape)?)?)
    }
    match dtype {
        DType::F8E4M3 => tensor::<F8E4M3>(device, shape, bytes),
        _ => tensor::<F8E5M2>(device, shape, bytes),
    }
}

/// Output and logsumexp of a call.
fn run<T: Scalar>(
    backend: &ChunkedCudaBackend,
    device: &CudaDevice,
    inputs: Inputs<'_>,
) -> Result<[Vec<f64>; 2]> {
    let problem = inputs.problem().lse(true).build()?;
    let room = |role: Role| -> Result<DeviceTensor> {
        Ok(DeviceTensor::filled(device, *problem.tensor(role).ok_or("an output")?, 0xff)?)
    };
    let (mut out, mut lse) = (room(Role::Out)?, room(Role::Lse)?);
    let plan = backend.plan(&problem)?;
    let outputs = ForwardOutputs { out: out.view_mut()?, lse: Some(lse.view_mut()?) };
    let mut scratch = plan.lend_scratch()?;
    plan.forward(ForwardCall::new(plan.problem(), inputs, outputs)?, scratch.scratch())?;
    let out = out.to_vec::<T>()?.ok_or("another dtype")?;
    let lse = match lse.desc().dtype() {
        DType::F64 => lse.to_vec::<f64>()?.ok_or("another dtype")?,
        _ => lse.to_vec::<f32>()?.ok_or("another dtype")?.into_iter().map(f64::from).collect(),
    };
    Ok([out.into_iter().map(Scalar::to_f64).collect(), lse])
}

/// One key has the weight 1 where its logit is 0, as of a query of zeros, so the output is its value; and the
/// logsumexp is its logit, which of a query with a single 1 is a number of the key.
fn check_bytes<T: Scalar>(device: &CudaDevice, backend: &ChunkedCudaBackend) -> Result {
    for eight_bit in DType::EIGHT_BIT {
        for (width, queries) in
            [32, 64, 96, 128, 192, 256].into_iter().flat_map(|width| [(width, 1), (width, 40), (width, 300)])
        {
            let what = format!("{eight_bit} for {} of {width}, {queries} queries", T::DTYPE);
            let heads = 256usize.div_ceil(width);
            let bytes: Vec<u8> = (0..heads * width).map(|index| index as u8).collect();
            // A number that is not finite would hide the others of its key.
            let finite: Vec<u8> = bytes
                .iter()
                .map(|&byte| if value_of(eight_bit, byte).is_finite() { byte } else { 0 })
                .collect();
            let query = |one: f64| -> Result<DeviceTensor> {
                let is_one = |index: usize| index / (heads * width) % width == index % width;
                let of = |index| T::from_f64(if is_one(index) { one } else { 0.0 });
                let query: Vec<T> = (0..queries * heads * width).map(of).collect();
                Ok(DeviceTensor::from_host(device, View::from_slice(&query, [1, queries, heads, width])?)?)
            };
            let shape = [1, 1, heads, width];
            let key = of_bytes(device, eight_bit, shape, &finite)?;
            let value = of_bytes(device, eight_bit, shape, &bytes)?;
            let (of_keys, of_values) = ([-2.0f32], [0.5f32]);
            let data = CallData {
                scale: Some(1.0),
                key_scales: Some(View::from_slice(&of_keys, [1])?),
                value_scales: Some(View::from_slice(&of_values, [1])?),
                ..CallData::default()
            };
            let (zeros, ones) = (query(0.0)?, query(1.0)?);
            let inputs = |query: &DeviceTensor| -> Result<_> {
                let [out, lse] = run::<T>(
                    backend,
                    device,
                    Inputs { data, ..Inputs::new(query.view()?, key.view()?, value.view()?) },
                )?;
                Ok((out, lse))
            };
            let ((out, _), (_, lse)) = (inputs(&zeros)?, inputs(&ones)?);
            for (index, &got) in out.iter().enumerate() {
                let byte = bytes[index % (heads * width)];
                let want = 0.5 * value_of(eight_bit, byte);
                assert!(same(got, want), "{what}: {byte:#04x} gave {got}, not {want}");
            }
            for (index, &got) in lse.iter().enumerate() {
                let byte = finite[index % heads * width + index / heads % width];
                let want = -2.0 * value_of(eight_bit, byte);
                assert!(
                    (got - want).abs() <= 1e-6 * (1.0 + want.abs()),
                    "{what}: {byte:#04x} gave {got}, not {want}"
                );
            }
        }
    }
    Ok(())
}

#[test]
#[ignore = "needs a GPU"]
fn every_byte_is_widened_exactly() -> Result {
    let device = device()?;
    for config in [ChunkedCudaConfig::default(), ChunkedCudaConfig::default().warpgroups(false)] {
        let backend = ChunkedCudaBackend::on(device.clone(), config);
        check_bytes::<bf16>(&device, &backend)?;
        check_bytes::<f16>(&device, &backend)?;
    }
    let backend = ChunkedCudaBackend::on(device.clone(), ChunkedCudaConfig::default());
    check_bytes::<f32>(&device, &backend)?;
    check_bytes::<f64>(&device, &backend)
}

/// Each thread widens four bytes, the first of which is four times its number, to f16.
const WIDEN_ALL: &str = "
extern \"C\" __global__ void __launch_bounds__(BLOCK) widen_all(unsigned *to) {
    const unsigned four = 4 * threadIdx.x * 0x01010101u + 0x03020100u;
    to[2 * threadIdx.x] = f16_pair_of_bytes<EIGHT_BIT, false>(four);
    to[2 * threadIdx.x + 1] = f16_pair_of_bytes<EIGHT_BIT, true>(four);
}
";

/// Compiled for compute capability 8.0, which has no instruction for it, and for the device's own.
#[test]
#[ignore = "needs a GPU"]
fn architectures_without_an_instruction_widen_alike() -> Result {
    let device = device()?;
    let nvrtc = Nvrtc::open(&[]).map_err(|missing| format!("no NVRTC: {}", missing.what))?;
    let text = attention_kernels::source("attention_forward.cu").ok_or("no such source")?.text;
    let (major, minor) = device.compute_capability()?;
    for (dtype, code) in DType::EIGHT_BIT.into_iter().zip([DTypeCode::F8E4M3, DTypeCode::F8E5M2]) {
        for arch in ["compute_80".to_owned(), format!("compute_{major}{minor}")] {
            let source = Source {
                name: "widen_all.cu",
                text: String::leak([text, WIDEN_ALL].concat()),
                entry_points: &["widen_all"],
                variants: &[],
            };
            let fused = Fused::new(DTypeCode::F16, 64).tile(64, 32).warps(2).stages(1).eight_bit(Some(code));
            let compiled = nvrtc.compile(&source, &arch, &Variant::Fused(fused).defines())?;
            let function =
                device.context().load_module(Ptx::from_src(compiled.ptx))?.load_function("widen_all")?;
            let stream = device.stream();
            let to = stream.alloc_zeros::<u32>(128)?;
            let config = LaunchConfig { grid_dim: (1, 1, 1), block_dim: (64, 1, 1), shared_mem_bytes: 0 };
            let address = to.device_ptr(stream).0;
            // SAFETY: the kernel takes one address, to which its 64 threads write two words each, and there
            // are 128.
            unsafe { launch(stream, &function, &address, config) }?;
            for (index, pair) in stream.clone_dtoh(&to)?.into_iter().enumerate() {
                for (byte, bits) in [(2 * index, pair as u16), (2 * index + 1, (pair >> 16) as u16)] {
                    let (got, want) = (f16::from_bits(bits).to_f64(), value_of(dtype, byte as u8));
                    let signs = got.is_nan() || got.is_sign_negative() == want.is_sign_negative();
                    assert!(
                        same(got, want) && signs,
                        "{dtype} for {arch}: {byte:#04x} gave {got}, not {want}"
                    );
                }
            }
        }
    }
    Ok(())
}

/// Scales of heads mean the same in host and in device memory, whatever their strides are; those that are not
/// finite reach the rows of their heads, and no row without keys.
#[test]
#[ignore = "needs a GPU"]
fn scales_are_read_wherever_they_are() -> Result {
    const SIZES: [usize; 4] = [3, 700, 2, 64];
    let device = device()?;
    let backend = ChunkedCudaBackend::on(device.clone(), ChunkedCudaConfig::default());
    let [batch, keys, heads, width] = SIZES;
    let bytes: Vec<u8> = (0..batch * keys * heads * width).map(|index| (index * 37 % 0x58) as u8).collect();
    let key = of_bytes(&device, DType::F8E4M3, SIZES, &bytes)?;
    let lengths = [700i32, 0, 5];
    for queries in [1, 150] {
        let query: Vec<bf16> = (0..batch * queries * 4 * width)
            .map(|index| bf16::from_f32((index * 29 % 64) as f32 / 640.0 - 0.05))
            .collect();
        let query = DeviceTensor::from_host(&device, View::from_slice(&query, [batch, queries, 4, width])?)?;
        for wild in [None, Some(f32::NAN), Some(0.0), Some(-0.5), Some(f32::MAX), Some(1e-44)] {
            let mut scales = [0.5f32, 0.25, 1.0, 2.0, 0.125, 1.5];
            if let Some(wild) = wild {
                scales[1] = wild;
            }
            // The same with gaps, backwards.
            let mut strided = [f32::NAN; 18];
            scales.iter().enumerate().for_each(|(index, &scale)| strided[17 - 3 * index] = scale);
            let host = View::from_slice(&scales, [batch, heads])?;
            let contiguous = DeviceTensor::from_host(&device, host)?;
            let backwards =
                DeviceTensor::from_host(&device, View::strided(&strided, 17, [batch, heads], [-6, -3])?)?;
            let mut first: Option<[Vec<f64>; 2]> = None;
            for (place, view) in
                [("device", contiguous.view()?), ("strided", backwards.view()?), ("host", host)]
            {
                if place == "host" && wild.is_some_and(f32::is_nan) {
                    continue;
                }
                let data = CallData {
                    key_scales: Some(view),
                    value_scales: Some(view),
                    key_value_lengths: Some(View::from_slice(&lengths, [batch])?),
                    ..CallData::default()
                };
                let inputs = Inputs { data, ..Inputs::new(query.view()?, key.view()?, key.view()?) };
                let results = run::<bf16>(&backend, &device, inputs)?;
                let bits = |results: &[Vec<f64>; 2]| {
                    results.each_ref().map(|of| of.iter().map(|x| x.to_bits()).collect::<Vec<_>>())
                };
                let first = first.get_or_insert_with(|| results.clone());
                assert!(bits(&results) == bits(first), "{wild:?} at {place}, {queries} queries");
                let row = 4 * width;
                for (index, &x) in results[0].iter().enumerate() {
                    let (sequence, head) = (index / (queries * row), index % row / width);
                    let is_wild = sequence == 0 && head / 2 == 1;
                    let what = format!("{wild:?} at {place}, {queries} queries: {x} at {index}");
                    match wild {
                        _ if sequence == 1 => assert!(x == 0.0 && x.is_sign_positive(), "{what}"),
                        Some(scale) if is_wild && scale.is_nan() => assert!(x.is_nan(), "{what}"),
                        Some(0.0) if is_wild => assert!(x == 0.0 && x.is_sign_positive(), "{what}"),
                        Some(scale) if is_wild && scale < 0.0 => assert!(x <= 0.0, "{what}"),
                        Some(f32::MAX) if is_wild => {}
                        _ => assert!(x.is_finite() && x >= 0.0, "{what}"),
                    }
                }
            }
        }
    }
    Ok(())
}
