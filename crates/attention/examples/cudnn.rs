//! Attention on a GPU, on real input: the queries, keys and values of the example `minilm`, rounded to bf16
//! and sent to the device, through the facade to cuDNN, compared with the stored output of an f64
//! implementation.
//!
//! ```text
//! cargo run --release -p attention --features cuda --example cudnn [FILE]
//! ```
//!
//! Needs an NVIDIA GPU, its driver, cuDNN 9 and NVRTC; says what it looked for where one is missing.

mod support;

use std::error::Error;
use std::process::ExitCode;
use std::sync::Arc;

use attention::cuda::{CudaDevice, DeviceTensor};
use attention::cudnn::{CudnnBackend, CudnnConfig};
use attention::{Attention, AttentionBackend, Dims, Registry, Role, Tensor, View, bf16};

use support::{LAYERS, RUNS, Recording, compare, largest, timed};

fn main() -> ExitCode {
    support::main(run)
}

/// Prints everything; false where an element is out of its bound.
fn run(bytes: &[u8]) -> Result<bool, Box<dyn Error>> {
    let recording = Recording::read(bytes)?;
    let device = CudaDevice::new("cudnn", 0)?;
    // On the stream that the tensors are sent on.
    let backend = Arc::new(CudnnBackend::on(device.clone(), CudnnConfig::default()));
    backend.available()?;
    println!("{}: {}\n", device.device(), backend.target());
    let registry = Registry::default().with(backend);
    recording.introduce();

    let on_host = Attention::new().key_value_lengths(&recording.lengths);
    let attention = on_host.clone().registry(&registry);
    let mut agrees = true;
    for (index, layer) in LAYERS.into_iter().enumerate() {
        let [query, key, value] = recording.operands(layer)?;
        let rounded = [Rounded::new(&query)?, Rounded::new(&key)?, Rounded::new(&value)?];
        let [query, key, value] = rounded.each_ref().map(|tensor| tensor.send(&device));
        let (query, key, value) = (query?, key?, value?);
        let (query, key, value) = (query.view()?, key.view()?, value.view()?);
        let problem = attention.problem(query, key, value)?;
        let out = problem.tensor(Role::Out).ok_or("a forward problem has an output")?;
        // NaN in every element that the call does not write.
        let mut out = DeviceTensor::filled(&device, *out, 0xff)?;
        if index == 0 {
            println!("{}\n", attention.explain_planned(&problem));
            let selection = attention.plan(&problem)?;
            println!("{} runs it: {}\n", selection.backend().name(), selection.reason());
            println!(
                "layer  time (median of {RUNS})  max abs error  its bound  of the largest output  by rounding the inputs"
            );
        }
        let ((), time) = timed(|| -> Result<(), Box<dyn Error>> {
            attention.forward_into(query, key, value, out.view_mut()?, None)?;
            // The call returns before the device is done.
            Ok(device.stream().synchronize()?)
        })?;
        let got = out.to_vec::<bf16>()?.ok_or("the output of bf16 queries is bf16")?;
        let got: Vec<f64> = got.into_iter().map(f64::from).collect();

        let stored = recording.output(layer)?;
        let (error, relative) = compare(&got, &stored)?;
        let Bounds { by_rounding, bounds } = Bounds::new(&on_host, &rounded, &stored)?;
        let errors = got.iter().zip(&stored).map(|(got, stored)| (got - stored).abs());
        let errors: Vec<(f64, &f64)> = errors.zip(&bounds).collect();
        let bound = errors.iter().find(|(other, _)| *other == error).map_or(0.0, |(_, bound)| **bound);
        // Written so that NaN disagrees.
        let good = errors.iter().all(|(error, bound)| error <= bound);
        agrees &= good;
        println!(
            "{layer:5}  {:>19}  {error:13.2e}  {bound:9.2e}  {relative:21.2e}  {by_rounding:22.2e}  {}",
            format!("{time:.1?}"),
            if good { "every element agrees" } else { "DOES NOT AGREE" }
        );
    }
    Ok(agrees)
}

/// A tensor in bf16.
struct Rounded {
    elements: Vec<bf16>,
    shape: Dims,
}

impl Rounded {
    fn new(tensor: &Tensor) -> Result<Self, Box<dyn Error>> {
        let elements = tensor.as_slice::<f32>().ok_or("recorded operands are f32")?;
        let elements = elements.iter().map(|&x| bf16::from_f32(x)).collect();
        Ok(Self { elements, shape: tensor.shape() })
    }

    fn send(&self, device: &CudaDevice) -> Result<DeviceTensor, Box<dyn Error>> {
        Ok(DeviceTensor::from_host(device, View::from_slice(&self.elements, self.shape)?)?)
    }

    /// The same numbers in f64, through a function.
    fn wide(&self, of: fn(f64) -> f64) -> Result<Tensor, Box<dyn Error>> {
        let elements = self.elements.iter().map(|&x| of(f64::from(x))).collect();
        Ok(Tensor::from_vec(elements, self.shape)?)
    }

    /// The largest norm of a row: of what the last axis holds.
    fn largest_norm(&self) -> f64 {
        let width = self.shape.last().copied().unwrap_or(1).max(1);
        let norm = |row: &[bf16]| row.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>().sqrt();
        largest(self.elements.chunks(width).map(norm))
    }
}

/// How far from the stored output each element may be.
struct Bounds {
    /// The largest difference that rounding the operands to bf16 makes alone.
    by_rounding: f64,
    bounds: Vec<f64>,
}

impl Bounds {
    /// What rounding the operands changed, computed in f64 on the host, and beside it what class `HalfF32`
    /// allows on the rounded ones: docs/numerics.md, "Forward", with the largest possible logit in the place
    /// of each.
    fn new(on_host: &Attention<'_>, operands: &[Rounded; 3], stored: &[f64]) -> Result<Self, Box<dyn Error>> {
        /// Unit roundoffs of f32, in which the class accumulates, and of bf16.
        const ACCUMULATED: f64 = 1.0 / (1u64 << 24) as f64;
        const ROUNDED: f64 = 1.0 / (1u64 << 8) as f64;

        let [query, key, value] = operands;
        let [_, keys, _, width] = key.shape[..] else { return Err("keys must have four axes".into()) };
        let doubles = |out: &Tensor| -> Result<Vec<f64>, Box<dyn Error>> {
            Ok(out.as_slice::<f64>().ok_or("the output of f64 queries is f64")?.to_vec())
        };
        let (wide_query, wide_key) = (query.wide(|x| x)?, key.wide(|x| x)?);
        let exact = doubles(&on_host.forward(&wide_query, &wide_key, &value.wide(|x| x)?)?)?;
        // With absolute values, the output is the sum of |p v|.
        let weighted = doubles(&on_host.forward(&wide_query, &wide_key, &value.wide(f64::abs)?)?)?;
        let (by_rounding, _) = compare(&exact, stored)?;

        // By Cauchy and Schwarz, no |scale| * sum |q k| is larger.
        let logit = query.largest_norm() * key.largest_norm() / (width as f64).sqrt();
        let exponential = ((width as f64 + 4.0 + 2.0 * 3.0) * logit + 8.0) * ACCUMULATED;
        let sum = (keys as f64 + 6.0) * ACCUMULATED;
        let relative = 2.0 * exponential.exp_m1() + 2.0 * sum + ROUNDED;
        let bounds = (exact.iter().zip(&weighted).zip(stored))
            .map(|((exact, weighted), stored)| {
                relative * weighted + ROUNDED * exact.abs() + (exact - stored).abs()
            })
            .collect();
        Ok(Self { by_rounding, bounds })
    }
}
