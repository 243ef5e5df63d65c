//! Tests of both backends for device memory that need a GPU, on problems that are too many, too large or too
//! unusual for the suite: prompts whose keys are split, logits of every magnitude, offsets beyond 2^31
//! elements, and tensors of another stream. Run with `--ignored`. Tests of the cuDNN backend are skipped,
//! with a message, if cuDNN is not found.

mod call;
mod data;
mod reference;
mod spread;
mod steps;

use std::sync::Arc;

use attention_chunked_cuda::{ChunkedCudaBackend, ChunkedCudaConfig};
use attention_conformance::OnHost;
use attention_core::{AttentionBackend, DType, View, ViewMut};
use attention_cuda::{CudaDevice, DeviceTensor};
use attention_cudnn::{CudnnBackend, CudnnConfig};
use half::bf16;

use crate::call::{Call, Results};
use crate::data::{Data, numbers, units};
use crate::reference::{fault, results_of};
use crate::spread::{Compact, FAR, Spread};
use crate::steps::{back, lse_of, step};

type Result<T = ()> = std::result::Result<T, Box<dyn std::error::Error + Send + Sync>>;

fn chunked(device: &CudaDevice, config: ChunkedCudaConfig) -> OnHost<ChunkedCudaBackend, CudaDevice> {
    OnHost::new(ChunkedCudaBackend::on(device.clone(), config), device.clone())
}

/// The backends for this device: `chunked-cuda` with its defaults, `chunked-cuda` without the matrix
/// instructions that not every device has, and `cudnn` if cuDNN is found.
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

/// Runs each job on a thread of its own with its own backends, since the kernel compiler takes most of the
/// time. Returns the failures of all jobs together.
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

fn is_refusal(error: &(dyn std::error::Error + Send + Sync + 'static)) -> bool {
    matches!(error.downcast_ref(), Some(attention_core::Error::Unsupported(_)))
}

/// 108 causal prompts, 65 to 4096 queries over 511 to 5000 keys. Those with a small number of blocks split
/// their keys, and every combination of forward and combine kernel must start and compute the right results.
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

/// A bias of each magnitude: on all keys, on one key far above the others, on all keys but the last far below
/// it, and on blocks of keys far below. Probabilities must sum to 1 in both passes.
#[test]
#[ignore = "needs a GPU"]
fn logits_of_every_magnitude() -> Result {
    let dtypes = DType::FLOATS.into_iter();
    // With the second number of keys, the keys are split.
    let jobs = dtypes
        .flat_map(|dtype| [152, 600].into_iter().flat_map(move |s| [0, 1, 2].map(|index| (dtype, s, index))));
    side_by_side(jobs, |device, (dtype, s, index)| {
        let (mut calls, mut failures) = (0, Vec::new());
        let Some((name, backend)) = backends(device).into_iter().nth(index) else { return Ok((0, failures)) };
        // f64 does not use the matrix instructions that not every device has, so one backend is enough.
        if dtype == DType::F64 && index == 1 {
            return Ok((0, failures));
        }
        // From 129 rows and keys on, f32 is multiplied as sums of tf32 numbers.
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

/// More batch rows, and more heads, than a grid has blocks along its second axis. The test checks those
/// around the last block of such a grid, the first ones and the last ones.
#[test]
#[ignore = "needs a GPU"]
fn more_batch_rows_or_heads_than_65535() -> Result {
    const MANY: usize = 70_000;
    // The kernel compiler takes most of the time.
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
            // The error of rounding to the dtype, and that of a logit of at most 2 * 2 * sqrt(32), whose
            // products are of tf32 numbers at worst.
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

/// The device memory in bytes that [`offsets_beyond_2_to_the_31_elements`] needs: ten tensors of 2-byte
/// elements and a mask, plus the scratch of calls.
const OFFSETS_NEED: usize = 10 * 2 * FAR + FAR + (2 << 30);

/// The same call with tensors whose elements are more than 2^31 apart has the same bits: operands, results
/// and gradients, then a mask, a bias and its gradient too. `cudnn` refuses the gradients of such tensors.
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

/// Safe code could drop a tensor of another stream while a kernel reads it, so the backends refuse such a
/// tensor.
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
