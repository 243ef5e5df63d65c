//! What needs a GPU, of both backends for device memory, on problems that are too many, too large or too far out for the suite: prompts
//! whose keys are split, logits of every magnitude, offsets beyond 2^31 elements, and tensors of another stream. Run with `--ignored`;
//! what cuDNN is needed for says so and is left out where it is not found.

use std::sync::Arc;

use attention_chunked_cuda::{ChunkedCudaBackend, ChunkedCudaConfig};
use attention_core::{
    AttentionBackend, BackwardCall, BackwardInputs, BackwardOutputs, DType, Device, ForwardCall,
    ForwardOutputs, Gradients, Inputs, Scratch, TensorDesc, View, ViewMut, philox4x32_10,
};
use attention_cuda::cudarc::driver::{CudaSlice, DevicePtr};
use attention_cuda::{CudaDevice, DeviceScratch, DeviceTensor, OnHost};
use attention_cudnn::{CudnnBackend, CudnnConfig};
use half::{bf16, f16};

type Result<T = ()> = std::result::Result<T, Box<dyn std::error::Error + Send + Sync>>;

/// Uniform in [-2, 2). After a prime number of them they come again, which no row or head is a multiple of.
fn numbers(seed: u32, count: usize) -> Vec<f64> {
    const PERIOD: usize = 65_537;
    let word = |index: usize| philox4x32_10([index as u32, 0, 0, 0], [seed, 0])[0];
    (0..count.min(PERIOD)).map(|index| f64::from(word(index)) / f64::from(1u32 << 30) - 2.0).collect()
}

/// The first `count` of these numbers, over and over again: copied, since tests may be built without optimisation.
fn repeated<T: Copy>(numbers: &[T], count: usize) -> Vec<T> {
    let mut all = Vec::with_capacity(count + numbers.len());
    while all.len() < count {
        all.extend_from_slice(numbers);
    }
    all.truncate(count);
    all
}

/// A tensor of any dtype in host memory.
#[derive(Clone)]
enum Data {
    F64(Vec<f64>),
    F32(Vec<f32>),
    F16(Vec<f16>),
    Bf16(Vec<bf16>),
}

impl Data {
    fn of(dtype: DType, numbers: &[f64]) -> Self {
        // By way of f32, which halves are rounded from correctly.
        let narrow = || numbers.iter().map(|&x| x as f32);
        match dtype {
            DType::F64 => Self::F64(numbers.to_vec()),
            DType::F32 => Self::F32(narrow().collect()),
            DType::F16 => Self::F16(narrow().map(f16::from_f32).collect()),
            _ => Self::Bf16(narrow().map(bf16::from_f32).collect()),
        }
    }

    /// So many, which repeat these.
    fn repeating(dtype: DType, numbers: &[f64], count: usize) -> Self {
        match Self::of(dtype, numbers) {
            Self::F64(data) => Self::F64(repeated(&data, count)),
            Self::F32(data) => Self::F32(repeated(&data, count)),
            Self::F16(data) => Self::F16(repeated(&data, count)),
            Self::Bf16(data) => Self::Bf16(repeated(&data, count)),
        }
    }

    fn zeros(dtype: DType, count: usize) -> Self {
        Self::repeating(dtype, &[0.0], count)
    }

    fn to_f64(&self) -> Vec<f64> {
        self.part(0..self.len())
    }

    /// The elements of this range.
    fn part(&self, range: std::ops::Range<usize>) -> Vec<f64> {
        match self {
            Self::F64(data) => data[range].to_vec(),
            Self::F32(data) => data[range].iter().map(|&x| f64::from(x)).collect(),
            Self::F16(data) => data[range].iter().map(|&x| f64::from(x.to_f32())).collect(),
            Self::Bf16(data) => data[range].iter().map(|&x| f64::from(x.to_f32())).collect(),
        }
    }

    fn len(&self) -> usize {
        match self {
            Self::F64(data) => data.len(),
            Self::F32(data) => data.len(),
            Self::F16(data) => data.len(),
            Self::Bf16(data) => data.len(),
        }
    }

    fn view(&self, shape: impl Into<attention_core::Dims>) -> Result<View<'_>> {
        Ok(match self {
            Self::F64(data) => View::from_slice(data, shape)?,
            Self::F32(data) => View::from_slice(data, shape)?,
            Self::F16(data) => View::from_slice(data, shape)?,
            Self::Bf16(data) => View::from_slice(data, shape)?,
        })
    }

    fn view_mut(&mut self, shape: impl Into<attention_core::Dims>) -> Result<ViewMut<'_>> {
        Ok(match self {
            Self::F64(data) => ViewMut::from_slice(data, shape)?,
            Self::F32(data) => ViewMut::from_slice(data, shape)?,
            Self::F16(data) => ViewMut::from_slice(data, shape)?,
            Self::Bf16(data) => ViewMut::from_slice(data, shape)?,
        })
    }
}

/// The unit roundoff of what results are rounded to, and of logits.
fn units(dtype: DType) -> (f64, f64) {
    match dtype {
        DType::F64 => (f64::EPSILON, f64::EPSILON),
        DType::F32 => (f64::from(f32::EPSILON), f64::from(f32::EPSILON)),
        DType::F16 => (2f64.powi(-11), f64::from(f32::EPSILON)),
        _ => (2f64.powi(-8), f64::from(f32::EPSILON)),
    }
}

/// Sizes of a call: batch, queries, keys, query heads, key/value heads, head dimension.
type Sizes = [usize; 6];

/// A call on host memory.
struct Call {
    sizes: Sizes,
    dtype: DType,
    causal: bool,
    /// [1, 1, T, S], or [1, 1, 1, S].
    bias: Option<(Data, [usize; 4])>,
    operands: [Data; 4],
}

/// Output, logsumexp, and gradients of queries, keys and values.
struct Results {
    out: Data,
    lse: Data,
    gradients: Option<[Data; 3]>,
}

impl Call {
    fn new(dtype: DType, sizes: Sizes, causal: bool, seed: u32) -> Self {
        let [b, t, s, n, k, h] = sizes;
        let of = |index: u32, count: usize| Data::repeating(dtype, &numbers(seed + index, count), count);
        let operands =
            [of(0, b * t * n * h), of(1, b * s * k * h), of(2, b * s * k * h), of(3, b * t * n * h)];
        Self { sizes, dtype, causal, bias: None, operands }
    }

    fn run(&self, backend: &dyn AttentionBackend, backward: bool) -> Result<Results> {
        let [b, t, s, n, k, h] = self.sizes;
        let (rows, keys, statistics) = ([b, t, n, h], [b, s, k, h], [b, t, n]);
        let [query, key, value, d_out] = &self.operands;
        let mut inputs = Inputs::new(query.view(rows)?, key.view(keys)?, value.view(keys)?);
        inputs.bias = self.bias.as_ref().map(|(bias, shape)| bias.view(*shape)).transpose()?;
        let problem = inputs.problem().causal(self.causal).lse(true).build()?;
        let accumulator = if self.dtype == DType::F64 { DType::F64 } else { DType::F32 };
        let mut out = Data::zeros(self.dtype, b * t * n * h);
        let mut lse = Data::zeros(accumulator, b * t * n);
        let none = || Scratch::none(Device::Cpu);
        let outputs = ForwardOutputs { out: out.view_mut(rows)?, lse: Some(lse.view_mut(statistics)?) };
        backend.plan(&problem)?.forward(ForwardCall::new(&problem, inputs, outputs)?, none())?;
        if !backward {
            return Ok(Results { out, lse, gradients: None });
        }
        let problem = inputs.problem().causal(self.causal).gradients(Gradients::QKV).build()?;
        let mut dq = Data::zeros(self.dtype, b * t * n * h);
        let [mut dk, mut dv] = [(); 2].map(|()| Data::zeros(self.dtype, b * s * k * h));
        let saved = BackwardInputs {
            out: out.view(rows)?,
            lse: lse.view(statistics)?,
            d_out: d_out.view(rows)?,
            d_lse: None,
        };
        let outputs = BackwardOutputs {
            dq: Some(dq.view_mut(rows)?),
            dk: Some(dk.view_mut(keys)?),
            dv: Some(dv.view_mut(keys)?),
            ..BackwardOutputs::default()
        };
        backend.plan(&problem)?.backward(BackwardCall::new(&problem, inputs, saved, outputs)?, none())?;
        Ok(Results { out, lse, gradients: Some([dq, dk, dv]) })
    }

    /// The logits of a row, rounded as a backend has them, of the keys that it may see.
    fn logits(&self, [b, t, n]: [usize; 3]) -> Vec<f64> {
        let [_, queries, keys, heads, key_heads, width] = self.sizes;
        let at = ((b * queries + t) * heads + n) * width;
        let q = self.operands[0].part(at..at + width);
        let visible = if self.causal { keys.min(t + 1) } else { keys };
        let bias = self.bias.as_ref().map(|(bias, shape)| {
            let start = if shape[2] == 1 { 0 } else { t * keys };
            bias.part(start..start + keys)
        });
        let logit = |j: usize| {
            let k = self.key_row(1, [b, j, n / (heads / key_heads)]);
            let product: f64 = q.iter().zip(k).map(|(q, k)| q * k).sum();
            let x = product / (width as f64).sqrt() + bias.as_ref().map_or(0.0, |bias| bias[j]);
            if self.dtype == DType::F64 { x } else { f64::from(x as f32) }
        };
        (0..visible).map(logit).collect()
    }

    /// A row of the keys, which are operand 1, or of the values.
    fn key_row(&self, operand: usize, [b, j, head]: [usize; 3]) -> Vec<f64> {
        let [_, _, keys, _, key_heads, width] = self.sizes;
        let at = ((b * keys + j) * key_heads + head) * width;
        self.operands[operand].part(at..at + width)
    }

    /// The output of a row and its logsumexp.
    fn row(&self, [b, t, n]: [usize; 3]) -> (Vec<f64>, f64) {
        let [_, _, _, heads, key_heads, width] = self.sizes;
        let logits = self.logits([b, t, n]);
        let largest = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let (mut total, mut out) = (0.0, vec![0.0; width]);
        for (j, x) in logits.into_iter().enumerate() {
            let weight = (x - largest).exp();
            total += weight;
            let v = self.key_row(2, [b, j, n / (heads / key_heads)]);
            out.iter_mut().zip(v).for_each(|(out, v)| *out += weight * v);
        }
        out.iter_mut().for_each(|out| *out /= total);
        (out, largest + total.ln())
    }
}

fn chunked(device: &CudaDevice, config: ChunkedCudaConfig) -> OnHost<ChunkedCudaBackend> {
    OnHost::new(ChunkedCudaBackend::on(device.clone(), config), device.clone())
}

/// The backends for this device: ours as it comes and without the products that not every device has, and cuDNN's where it is.
fn backends(device: &CudaDevice) -> Vec<(&'static str, Arc<dyn AttentionBackend>)> {
    let plain = ChunkedCudaConfig::default().warpgroups(false).split_f32(false);
    let mut backends: Vec<(&'static str, Arc<dyn AttentionBackend>)> = vec![
        ("chunked-cuda", Arc::new(chunked(device, ChunkedCudaConfig::default()))),
        ("chunked-cuda, plain", Arc::new(chunked(device, plain))),
    ];
    let cudnn = CudnnBackend::on(device.clone(), CudnnConfig::default());
    match cudnn.available() {
        Ok(()) => backends.push(("cudnn", Arc::new(OnHost::new(cudnn, device.clone())))),
        Err(missing) => println!("left out: {missing}"),
    }
    backends
}

/// Runs each job on a thread of its own, which makes its own backends: most of the time is the compiler's. Their failures together.
fn side_by_side<J: Copy + Send>(
    jobs: impl IntoIterator<Item = J>,
    run: impl Fn(&CudaDevice, J) -> Result<(usize, Vec<String>)> + Sync,
) -> Result {
    let run = &run;
    let (mut calls, mut failures) = (0, Vec::new());
    std::thread::scope(|scope| -> Result {
        let all: Vec<_> = (jobs.into_iter())
            .map(|job| scope.spawn(move || run(&CudaDevice::new("test", 0)?, job)))
            .collect();
        for one in all {
            let (of_job, wrong) = one.join().map_err(|_| "a job panicked")??;
            calls += of_job;
            failures.extend(wrong);
        }
        Ok(())
    })?;
    println!("{calls} calls, {} failures", failures.len());
    assert!(calls > 0 && failures.is_empty(), "{}", failures[..failures.len().min(60)].join("\n"));
    Ok(())
}

/// 108 causal prompts, 65 to 4096 queries over 511 to 5000 keys: those with few blocks have their keys split, and every combination of
/// forward kernel and merge must start and be right.
#[test]
#[ignore = "needs a GPU"]
fn causal_prompts_whose_keys_are_split() -> Result {
    let sizes = [64, 128, 256].into_iter().flat_map(|width| [1, 8, 32].map(|heads| [heads, width]));
    side_by_side(sizes, |device, [heads, width]| {
        let backends = backends(device);
        let (mut calls, mut failures) = (0, Vec::new());
        for queries in [65, 200, 512, 4096] {
            for keys in [511, 1500, 5000] {
                let call = Call::new(DType::Bf16, [1, queries, keys, heads, 1, width], true, 7);
                let rows = [(0, 0), (64.min(queries - 1), heads - 1), (queries - 1, heads / 2)];
                let wanted = rows.map(|(t, n)| call.row([0, t, n]));
                for (name, backend) in &backends {
                    let what = format!("{name} {queries} x {keys}, {heads} heads of {width}");
                    calls += 1;
                    let results = match call.run(&**backend, false) {
                        Ok(results) => results,
                        Err(error) => {
                            failures.push(format!("{what}: {error}"));
                            continue;
                        }
                    };
                    for ((t, n), (out, lse)) in rows.into_iter().zip(&wanted) {
                        let at = t * heads + n;
                        let got = results.out.part(at * width..(at + 1) * width);
                        let most = out.iter().zip(got).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
                        let got = results.lse.part(at..at + 1)[0];
                        if !(most <= 0.02 && (got - lse).abs() <= 1e-4) {
                            failures.push(format!("{what}, row {t}: off by {most}, lse {got} for {lse}"));
                        }
                    }
                }
            }
        }
        Ok((calls, failures))
    })
}

/// A bias of each magnitude: on all keys, on one far above, on all but the last far below, on blocks far below. Probabilities sum to 1
/// in both passes whatever it is.
#[test]
#[ignore = "needs a GPU"]
fn logits_of_every_magnitude() -> Result {
    let dtypes = DType::FLOATS.into_iter();
    // The second number of keys has them split.
    let jobs = dtypes
        .flat_map(|dtype| [152, 600].into_iter().flat_map(move |s| [0, 1, 2].map(|index| (dtype, s, index))));
    side_by_side(jobs, |device, (dtype, s, index)| {
        let (mut calls, mut failures) = (0, Vec::new());
        let Some((name, backend)) = backends(device).into_iter().nth(index) else { return Ok((0, failures)) };
        // Without the products that not every device has, f64 is what it is with them.
        if dtype == DType::F64 && index == 1 {
            return Ok((0, failures));
        }
        // f32 is multiplied in parts from 129 rows and keys on.
        let t = if dtype == DType::F32 && index == 0 { 130 } else { 40 };
        let mut call = Call::new(dtype, [1, t, s, 1, 1, 64], false, 11);
        call.operands[3] = Data::repeating(dtype, &[1.0], t * 64);
        let magnitudes =
            (0..38).map(|exponent| [1.0, 3.0, 7.0][exponent as usize % 3] * 10f64.powi(exponent));
        for size in magnitudes.chain([3e38, f64::from(f32::MAX)]) {
            for kind in ["same", "one above", "last", "blocks"] {
                let of = |j: usize| match (kind, j) {
                    ("same", _) | ("blocks", ..64) => -size,
                    ("one above", 77) => size,
                    ("last", j) if j < s - 1 => -size,
                    ("blocks", ..128) => -0.7 * size,
                    _ => 0.0,
                };
                let bias: Vec<f64> = (0..s).map(of).collect();
                let bias_dtype = if dtype == DType::F64 { DType::F64 } else { DType::F32 };
                call.bias = Some((Data::repeating(bias_dtype, &bias, t * s), [1, 1, t, s]));
                let what = format!("{name} {dtype} {s} keys, {kind} {size:e}");
                let results = match call.run(&*backend, true) {
                    Ok(results) => results,
                    Err(error) if is_refusal(&*error) => continue,
                    Err(error) => {
                        failures.push(format!("{what}: {error}"));
                        continue;
                    }
                };
                calls += 1;
                failures.extend(fault(&call, &results).map(|fault| format!("{what}: {fault}")));
            }
        }
        println!("{name} {dtype}, {s} keys: {calls} calls, {} wrong", failures.len());
        Ok((calls, failures))
    })
}

fn is_refusal(error: &(dyn std::error::Error + Send + Sync + 'static)) -> bool {
    matches!(error.downcast_ref(), Some(attention_core::Error::Unsupported(_)))
}

/// What is wrong with the results of a call whose d_out is 1 everywhere: rows against a softmax in f64 of logits that are rounded as the
/// backend rounds them, as far as one rounding of a logit leaves its weight, and the sum of dv over the keys, which is the number of rows.
fn fault(call: &Call, results: &Results) -> Option<String> {
    let [_, t, s, _, _, width] = call.sizes;
    let (unit, logit_unit) = units(call.dtype);
    for row in [0, t - 1] {
        let (out, lse) = call.row([0, row, 0]);
        let logits = call.logits([0, row, 0]);
        let largest = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        // Logits that have weight, and what one more rounding of them is worth.
        let slack = (4.0 * logit_unit * largest.abs()).exp_m1().min(1.0);
        let got = results.out.part(row * width..(row + 1) * width);
        let most = out.iter().zip(&got).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
        let inside = got.iter().all(|x| x.abs() <= 2.0 * (1.0 + 4.0 * unit));
        if !(most <= 4.0 * slack + 8.0 * unit + 1e-4 * f64::from(u8::from(unit > 1e-12)) && inside) {
            return Some(format!("row {row} is off by {most}"));
        }
        let got = results.lse.part(row..row + 1)[0];
        let close = (got - lse).abs() <= 4.0 * logit_unit * lse.abs() + 1e-5;
        if !close {
            return Some(format!("the logsumexp of row {row} is {got} for {lse}"));
        }
    }
    let [dq, dk, dv] = results.gradients.as_ref()?.each_ref().map(Data::to_f64);
    for column in [0, width - 1] {
        let sum: f64 = (0..s).map(|j| dv[j * width + column]).sum();
        let off = (sum / t as f64 - 1.0).abs();
        let close = off <= 4.0 * unit + 1e-4;
        if !close {
            return Some(format!("dv sums to {sum} for {t}"));
        }
    }
    // At most twice the sum over a value's columns, times a key.
    let most = dq.iter().chain(&dk).map(|x| x.abs()).fold(0.0, f64::max);
    let finite = dq.iter().chain(&dk).chain(&dv).all(|x| x.is_finite());
    (!finite || most > 8.0 * (width * t) as f64).then(|| format!("a gradient of {most}, finite: {finite}"))
}

/// The results of a batch row and head of a causal call as f64 has them, one behind the other, each with what an error of one unit of the
/// numbers that it is made of is worth: the outputs of every query, then the gradients of queries, keys and values.
fn results_of(call: &Call, [b, n]: [usize; 2]) -> [Vec<(f64, f64)>; 4] {
    let [_, t, s, heads, key_heads, width] = call.sizes;
    assert!(call.causal && call.bias.is_none() && heads == key_heads, "what is computed here");
    let row = |operand: usize, length: usize, position: usize| {
        let at = ((b * length + position) * heads + n) * width;
        call.operands[operand].part(at..at + width)
    };
    let dot = |x: &[f64], y: &[f64]| -> (f64, f64) {
        x.iter().zip(y).fold((0.0, 0.0), |(sum, size), (x, y)| (sum + x * y, size + (x * y).abs()))
    };
    let add = |to: &mut [(f64, f64)], factor: (f64, f64), row: &[f64]| {
        for (to, x) in to.iter_mut().zip(row) {
            *to = (to.0 + factor.0 * x, to.1 + factor.1 * x.abs());
        }
    };
    let scale = 1.0 / (width as f64).sqrt();
    let [mut out, mut dq] = [(); 2].map(|()| vec![(0.0, 0.0); t * width]);
    let [mut dk, mut dv] = [(); 2].map(|()| vec![(0.0, 0.0); s * width]);
    for i in 0..t {
        let (query, d_out) = (row(0, t, i), row(3, t, i));
        let logits = call.logits([b, i, n]);
        let largest = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let total: f64 = logits.iter().map(|x| (x - largest).exp()).sum();
        let here = i * width..(i + 1) * width;
        for (j, x) in logits.iter().enumerate() {
            let p = (x - largest).exp() / total;
            add(&mut out[here.clone()], (p, p), &row(2, s, j));
            add(&mut dv[j * width..][..width], (p, p), &d_out);
        }
        let of_row: Vec<f64> = out[here.clone()].iter().map(|&(x, _)| x).collect();
        let delta = dot(&d_out, &of_row);
        for (j, x) in logits.iter().enumerate() {
            let p = scale * (x - largest).exp() / total;
            let incoming = dot(&d_out, &row(2, s, j));
            let change = (p * (incoming.0 - delta.0), p * (incoming.1 + delta.1));
            add(&mut dq[here.clone()], change, &row(1, s, j));
            add(&mut dk[j * width..][..width], change, &query);
        }
    }
    [out, dq, dk, dv]
}

/// As many batch rows, and as many heads, as no grid has blocks along its second axis: those beside the last block of such a grid, and the
/// first and the last.
#[test]
#[ignore = "needs a GPU"]
fn more_batch_rows_or_heads_than_65535() -> Result {
    const MANY: usize = 70_000;
    // Most of the time is the compiler's.
    let jobs = (0..3).flat_map(|backend| [DType::F32, DType::Bf16].map(|dtype| (backend, dtype)));
    side_by_side(jobs, |device, (backend, dtype)| {
        let (mut calls, mut wrong) = (0, Vec::new());
        let Some((name, backend)) = backends(device).into_iter().nth(backend) else {
            return Ok((0, wrong));
        };
        for [b, n] in [[MANY, 1], [1, MANY]] {
            let began = std::time::Instant::now();
            let call = Call::new(dtype, [b, 3, 5, n, n, 32], true, 3);
            let Results { out, gradients, .. } = match call.run(&*backend, true) {
                Err(error) if name == "cudnn" && is_refusal(&*error) => continue,
                other => other?,
            };
            let [dq, dk, dv] = gradients.ok_or("gradients")?;
            let (unit, logit_unit) = units(dtype);
            // What is rounded to the dtype, and the sums of a logit of at most 2 * 2 * sqrt(32), which are of tf32 parts at worst.
            let most = 16.0 * (unit + 32.0 * logit_unit);
            for place in [0, 65_534, 65_535, 65_536, MANY - 1] {
                let [row, head] = if n == 1 { [place, 0] } else { [0, place] };
                let wants = results_of(&call, [row, head]);
                for ((what, got, length), want) in
                    [("out", &out, 3), ("dq", &dq, 3), ("dk", &dk, 5), ("dv", &dv, 5)].into_iter().zip(wants)
                {
                    for (position, want) in want.chunks(32).enumerate() {
                        let at = ((row * length + position) * n + head) * 32;
                        let far = got.part(at..at + 32).iter().zip(want).any(|(got, (want, size))| {
                            let near = (got - want).abs() <= most * size + 1e-30;
                            !near
                        });
                        if far {
                            wrong.push(format!("{name} {dtype} {b} x {n}: {what} of {place}, {position}"));
                        }
                    }
                }
            }
            calls += 1;
            println!("{name} {dtype} {b} x {n}: {:.1} s", began.elapsed().as_secs_f64());
        }
        Ok((calls, wrong))
    })
}

/// Device memory of a tensor whose second batch row begins 2^31 and some elements behind the first.
struct Spread {
    memory: CudaSlice<u8>,
    desc: TensorDesc,
}

/// The distance of batch rows: beyond 2^31, and a multiple of 8.
const FAR: usize = (1 << 31) + (1 << 10);

/// A tensor's elements without gaps, as bytes. The first axis has two places.
#[derive(Clone)]
struct Compact {
    dtype: DType,
    shape: [usize; 4],
    bytes: Vec<u8>,
}

impl Compact {
    fn of(shape: [usize; 4], seed: u32) -> Self {
        let count = shape.iter().product();
        let Data::Bf16(data) = Data::repeating(DType::Bf16, &numbers(seed, count), count) else {
            unreachable!("asked for")
        };
        let bytes = data.iter().flat_map(|x| x.to_bits().to_le_bytes()).collect();
        Self { dtype: DType::Bf16, shape, bytes }
    }

    fn zeros(shape: [usize; 4]) -> Self {
        Self { dtype: DType::Bf16, shape, bytes: vec![0; 2 * shape.iter().product::<usize>()] }
    }

    fn halves(&self) -> Vec<bf16> {
        self.bytes.chunks_exact(2).map(|two| bf16::from_le_bytes([two[0], two[1]])).collect()
    }

    fn bools(&self) -> Vec<bool> {
        self.bytes.iter().map(|&byte| byte != 0).collect()
    }

    /// The same on a device.
    fn on(&self, device: &CudaDevice) -> Result<DeviceTensor> {
        if self.dtype == DType::Bool {
            return Ok(DeviceTensor::from_host(device, View::from_slice(&self.bools(), self.shape)?)?);
        }
        Ok(DeviceTensor::from_host(device, View::from_slice(&self.halves(), self.shape)?)?)
    }

    /// A mask that leaves every row its first key.
    fn mask(shape: [usize; 4]) -> Self {
        let keys = shape[3];
        let bytes = (0..shape.iter().product())
            .map(|index: usize| u8::from(index.is_multiple_of(keys) || index % 7 < 5));
        Self { dtype: DType::Bool, shape, bytes: bytes.collect() }
    }
}

impl Spread {
    /// With a copy of these elements.
    fn new(device: &CudaDevice, of: &Compact) -> Result<Self> {
        let [_, t, n, h] = of.shape;
        let (size, row) = (of.dtype.size(), of.bytes.len() / 2);
        let stream = device.stream();
        // SAFETY: only what is written below is read.
        let mut memory = unsafe { stream.alloc::<u8>(size * FAR + row) }?;
        for batch in 0..2 {
            let mut part = memory.slice_mut(size * batch * FAR..size * batch * FAR + row);
            stream.memcpy_htod(&of.bytes[batch * row..][..row], &mut part)?;
        }
        let strides = [FAR as isize, (n * h) as isize, h as isize, 1];
        debug_assert_eq!(row, size * t * n * h);
        Ok(Self { memory, desc: TensorDesc::strided(of.dtype, of.shape, strides).ok_or("ranks")? })
    }

    fn pointer(&self, device: &CudaDevice) -> usize {
        self.memory.device_ptr(device.stream()).0 as usize
    }

    fn view(&self, device: &CudaDevice) -> Result<View<'_>> {
        let pointer = std::ptr::with_exposed_provenance(self.pointer(device));
        // SAFETY: the memory is the tensor's own, on the stream of every call here; elements are written, and gaps not read.
        Ok(unsafe { View::from_raw_parts(pointer, device.device(), self.desc) }?)
    }

    fn view_mut(&mut self, device: &CudaDevice) -> Result<ViewMut<'_>> {
        let pointer = std::ptr::with_exposed_provenance_mut(self.pointer(device));
        // SAFETY: as in `view`, borrowed exclusively.
        Ok(unsafe { ViewMut::from_raw_parts(pointer, device.device(), self.desc) }?)
    }

    fn elements(&self, device: &CudaDevice) -> Result<Vec<u8>> {
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

/// Bytes that [`offsets_beyond_2_to_the_31_elements`] has on the device: ten tensors of halves and a mask, and what calls take.
const OFFSETS_NEED: usize = 10 * 2 * FAR + FAR + (2 << 30);

/// The same call with tensors whose elements are more than 2^31 apart has the same bits: operands, results and gradients, then a
/// mask, a bias and its gradient too. `cudnn` refuses the gradients of such tensors.
#[test]
#[ignore = "needs a GPU with 48 GB of free memory"]
fn offsets_beyond_2_to_the_31_elements() -> Result {
    let device = CudaDevice::new("test", 0)?;
    let (free, _) = device.context().mem_get_info()?;
    assert!(free >= OFFSETS_NEED, "needs {OFFSETS_NEED} bytes of free device memory, there are {free}");
    let (shape, logits) = ([2, 200, 2, 64], [2, 2, 200, 200]);
    let mut own: Vec<(&str, Box<dyn AttentionBackend>)> = vec![(
        "chunked-cuda",
        Box::new(ChunkedCudaBackend::on(device.clone(), ChunkedCudaConfig::default())),
    )];
    let cudnn = CudnnBackend::on(device.clone(), CudnnConfig::default());
    match cudnn.available() {
        Ok(()) => own.push(("cudnn", Box::new(cudnn))),
        Err(missing) => println!("left out: {missing}"),
    }
    for (name, backend) in own {
        for has_terms in [false, true] {
            // cuDNN has no gradient of the bias.
            let has_dbias = has_terms && name == "chunked-cuda";
            let mut inputs: Vec<Compact> = (0..4).map(|seed| Compact::of(shape, seed)).collect();
            if has_terms {
                inputs.push(Compact::mask([2, 1, 200, 200]));
                inputs.push(Compact::of(logits, 4));
            }
            let mut outputs = vec![Compact::zeros(shape); 4];
            if has_dbias {
                outputs.push(Compact::zeros(logits));
            }
            let near = {
                let make = |of: &Compact| of.on(&device);
                let inputs: Vec<DeviceTensor> = inputs.iter().map(make).collect::<Result<_>>()?;
                let mut outputs: Vec<DeviceTensor> = outputs.iter().map(make).collect::<Result<_>>()?;
                let views: Vec<View<'_>> =
                    inputs.iter().map(|input| Ok(input.view()?)).collect::<Result<_>>()?;
                let (out, gradients) = outputs.split_first_mut().ok_or("outputs")?;
                step(&device, &*backend, &views, out.view_mut()?, None)?;
                let lse = lse_of(&device, &*backend, &views, shape)?;
                let gradients: Vec<ViewMut<'_>> =
                    gradients.iter_mut().map(|gradient| Ok(gradient.view_mut()?)).collect::<Result<_>>()?;
                back(&device, &*backend, &views, (out.view()?, &lse), gradients)?;
                outputs.iter().map(|output| Ok(output.bytes()?)).collect::<Result<Vec<_>>>()?
            };
            let far = {
                let make = |of: &Compact| Spread::new(&device, of);
                let inputs: Vec<Spread> = inputs.iter().map(make).collect::<Result<_>>()?;
                let mut outputs: Vec<Spread> = outputs.iter().map(make).collect::<Result<_>>()?;
                let views: Vec<View<'_>> =
                    inputs.iter().map(|input| input.view(&device)).collect::<Result<_>>()?;
                let (out, gradients) = outputs.split_first_mut().ok_or("outputs")?;
                step(&device, &*backend, &views, out.view_mut(&device)?, None)?;
                let lse = lse_of(&device, &*backend, &views, shape)?;
                let gradients: Vec<ViewMut<'_>> =
                    gradients.iter_mut().map(|gradient| gradient.view_mut(&device)).collect::<Result<_>>()?;
                let ran = back(&device, &*backend, &views, (out.view(&device)?, &lse), gradients);
                if name == "cudnn" {
                    let refusal = ran.err().ok_or("cudnn has no gradients of tensors so far apart")?;
                    assert!(refusal.to_string().contains("2^31 - 1 elements"), "{refusal}");
                    // The output alone.
                    outputs.truncate(1);
                } else {
                    ran?;
                }
                outputs.iter().map(|output| output.elements(&device)).collect::<Result<Vec<_>>>()?
            };
            for (index, (one, other)) in near.iter().zip(&far).enumerate() {
                let what = format!("{name}, terms: {has_terms}, result {index}");
                assert!(one == other, "{what}: other bits");
                let row = other.len() / 2;
                let has_both =
                    other[..row].iter().any(|&byte| byte != 0) && other[row..].iter().any(|&byte| byte != 0);
                assert!(has_both, "{what}: a batch row is zero");
            }
        }
    }
    Ok(())
}

/// Query, key and value, and mask and bias where the views have them, behind d_out.
fn inputs_of<'a>(views: &[View<'a>]) -> Inputs<'a> {
    let mut inputs = Inputs::new(views[0], views[1], views[2]);
    (inputs.mask, inputs.bias) = (views.get(4).copied(), views.get(5).copied());
    inputs
}

/// A causal forward pass.
fn step(
    device: &CudaDevice,
    backend: &dyn AttentionBackend,
    views: &[View<'_>],
    out: ViewMut<'_>,
    lse: Option<ViewMut<'_>>,
) -> Result {
    let inputs = inputs_of(views);
    let builder = inputs.problem().causal(true).lse(lse.is_some());
    let problem = builder.layout(attention_core::Role::Out, out.desc()).build()?;
    let plan = backend.plan(&problem)?;
    let bytes = plan.scratch_bytes();
    let mut scratch = DeviceScratch::new(device, bytes)?;
    let call = ForwardCall::new(plan.problem(), inputs, ForwardOutputs { out, lse })?;
    Ok(plan.forward(call, scratch.scratch(bytes))?)
}

/// Its logsumexp.
fn lse_of(
    device: &CudaDevice,
    backend: &dyn AttentionBackend,
    views: &[View<'_>],
    [b, t, n, h]: [usize; 4],
) -> Result<DeviceTensor> {
    let mut lse = DeviceTensor::filled(device, TensorDesc::contiguous(DType::F32, [b, t, n]), 0)?;
    let mut out = DeviceTensor::filled(device, TensorDesc::contiguous(DType::Bf16, [b, t, n, h]), 0)?;
    step(device, backend, views, out.view_mut()?, Some(lse.view_mut()?))?;
    Ok(lse)
}

/// The backward pass: gradients of query, key and value, and of the bias where there is a fourth.
fn back(
    device: &CudaDevice,
    backend: &dyn AttentionBackend,
    views: &[View<'_>],
    (out, lse): (View<'_>, &DeviceTensor),
    gradients: Vec<ViewMut<'_>>,
) -> Result {
    use attention_core::Role;
    let inputs = inputs_of(views);
    let wants = if gradients.len() > 3 { Gradients::QKV | Gradients::BIAS } else { Gradients::QKV };
    let mut builder = inputs.problem().causal(true).gradients(wants);
    for (role, desc) in [(Role::Out, out.desc()), (Role::DOut, views[3].desc())] {
        builder = builder.layout(role, desc);
    }
    for (role, view) in [Role::DQuery, Role::DKey, Role::DValue, Role::DBias].into_iter().zip(&gradients) {
        builder = builder.layout(role, view.desc());
    }
    let mut gradients = gradients.into_iter();
    let mut next = || gradients.next();
    let (dq, dk, dv, dbias) = (next(), next(), next(), next());
    let outputs = BackwardOutputs { dq, dk, dv, dbias, ..BackwardOutputs::default() };
    let plan = backend.plan(&builder.build()?)?;
    let bytes = plan.scratch_bytes();
    let mut scratch = DeviceScratch::new(device, bytes)?;
    let saved = BackwardInputs { out, lse: lse.view()?, d_out: views[3], d_lse: None };
    let call = BackwardCall::new(plan.problem(), inputs, saved, outputs)?;
    Ok(plan.backward(call, scratch.scratch(bytes))?)
}

/// Safe code could drop a tensor of another stream while its kernel runs, so such a tensor is refused.
#[test]
#[ignore = "needs a GPU"]
fn tensors_of_another_stream_are_refused() -> Result {
    let device = CudaDevice::new("test", 0)?;
    let other = device.with_stream(device.context().new_stream()?);
    let shape = [1, 16, 2, 64];
    let data: Vec<bf16> = numbers(1, 2048).into_iter().map(|x| bf16::from_f32(x as f32)).collect();
    let backend = ChunkedCudaBackend::on(device.clone(), ChunkedCudaConfig::default());
    for (tensors, is_served) in [(&device, true), (&other, false)] {
        let make = || DeviceTensor::from_host(tensors, View::from_slice(&data, shape)?).map_err(Into::into);
        let inputs = [make(), make(), make()].into_iter().collect::<Result<Vec<_>>>()?;
        let views: Vec<View<'_>> = inputs.iter().map(|input| Ok(input.view()?)).collect::<Result<_>>()?;
        let mut out: DeviceTensor = make()?;
        let outcome = step(&device, &backend, &views, out.view_mut()?, None);
        match outcome {
            Ok(()) => assert!(is_served),
            Err(error) => assert!(!is_served && error.to_string().contains("stream"), "{error}"),
        }
    }
    Ok(())
}
