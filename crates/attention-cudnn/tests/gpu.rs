//! Tests that need a GPU with cuDNN: calls in captured graphs and calls from several threads on several
//! streams, of both backends for device memory; and cuDNN's plans, faults and dropout. Run with `--ignored`.

mod common;

use std::sync::Arc;

use attention_core::{
    AttentionBackend, BackwardCall, BackwardInputs, BackwardOutputs, CallData, DType, Dropout, Error,
    ForwardCall, ForwardOutputs, Gradients, Inputs, Plan, Problem, ProblemBuilder, TensorDesc, Unsupported,
    View,
};
use attention_cuda::cudarc::driver::sys::{CUgraphInstantiate_flags, CUstreamCaptureMode};
use attention_cuda::{CudaDevice, DeviceTensor};
use attention_cudnn::{CudnnBackend, CudnnConfig};
use common::{Result, backends, device, numbers};
use half::bf16;

/// The tensors of a training step.
struct Step {
    forward: Problem,
    backward: Problem,
    inputs: [DeviceTensor; 4],
    out: DeviceTensor,
    lse: DeviceTensor,
    gradients: [DeviceTensor; 3],
    /// The data of every call.
    dropout: Option<Dropout>,
}

impl Step {
    fn new(device: &CudaDevice, shape: [usize; 4], causal: bool, seed: u64) -> Result<Self> {
        Self::with(device, shape, |problem| problem.causal(causal), None, seed)
    }

    fn with(
        device: &CudaDevice,
        shape: [usize; 4],
        options: impl Fn(ProblemBuilder) -> ProblemBuilder,
        dropout: Option<Dropout>,
        seed: u64,
    ) -> Result<Self> {
        let desc = TensorDesc::contiguous(DType::Bf16, shape);
        let [b, t, n, _] = shape;
        let lse = TensorDesc::contiguous(DType::F32, [b, t, n]);
        let problem = || {
            let problem = Problem::builder(desc, desc, desc).device(device.device());
            options(problem.dropout_rate(dropout.map(|dropout| dropout.rate)))
        };
        let forward = problem().lse(true).build()?;
        let wanted = Gradients::QUERY | Gradients::KEY | Gradients::VALUE;
        let backward = problem().gradients(wanted).build()?;
        let send = |index: u64| -> Result<DeviceTensor> {
            let data = numbers(seed + index, shape.iter().product());
            Ok(DeviceTensor::from_host(device, View::from_slice(&data, shape)?)?)
        };
        let filled = |desc| DeviceTensor::filled(device, desc, 0xff);
        Ok(Self {
            forward,
            backward,
            inputs: [send(0)?, send(1)?, send(2)?, send(3)?],
            out: filled(desc)?,
            lse: filled(lse)?,
            gradients: [filled(desc)?, filled(desc)?, filled(desc)?],
            dropout,
        })
    }

    /// Writes other numbers to the same memory.
    fn replace(&mut self, shape: [usize; 4], seed: u64) -> Result {
        for (index, input) in self.inputs.iter_mut().enumerate() {
            let data = numbers(seed + index as u64, shape.iter().product());
            input.replace(View::from_slice(&data, shape)?)?;
        }
        Ok(())
    }

    /// Both passes, planned.
    fn plan(&self, backend: &dyn AttentionBackend) -> Result<[Arc<dyn Plan>; 2]> {
        Ok([backend.plan(&self.forward)?, backend.plan(&self.backward)?])
    }

    /// Plans both passes and enqueues them on the backend's stream.
    fn run(&mut self, backend: &dyn AttentionBackend) -> Result {
        let plans = self.plan(backend)?;
        self.run_planned(&plans)
    }

    /// Enqueues both passes on the stream of their plans.
    fn run_planned(&mut self, [forward, backward]: &[Arc<dyn Plan>; 2]) -> Result {
        let [query, key, value, d_out] = &self.inputs;
        let data = CallData { dropout: self.dropout, ..CallData::default() };
        let inputs = Inputs { data, ..Inputs::new(query.view()?, key.view()?, value.view()?) };
        let outputs = ForwardOutputs { out: self.out.view_mut()?, lse: Some(self.lse.view_mut()?) };
        let call = ForwardCall::new(forward.problem(), inputs, outputs)?;
        forward.forward(call, forward.lend_scratch()?.scratch())?;
        let saved = BackwardInputs {
            out: self.out.view()?,
            lse: self.lse.view()?,
            d_out: d_out.view()?,
            d_lse: None,
        };
        let [dq, dk, dv] = &mut self.gradients;
        let outputs = BackwardOutputs {
            dq: Some(dq.view_mut()?),
            dk: Some(dk.view_mut()?),
            dv: Some(dv.view_mut()?),
            dbias: None,
            dsinks: None,
        };
        let call = BackwardCall::new(backward.problem(), inputs, saved, outputs)?;
        backward.backward(call, backward.lend_scratch()?.scratch())?;
        Ok(())
    }

    /// Output, then gradients.
    fn results(&self) -> Result<Vec<Vec<bf16>>> {
        std::iter::once(&self.out)
            .chain(&self.gradients)
            .map(|tensor| Ok(tensor.to_vec::<bf16>()?.ok_or("bf16")?))
            .collect()
    }
}

/// The largest difference, as a fraction of the largest number: the order in which gradients of queries are
/// summed varies.
fn distance(one: &[bf16], other: &[bf16]) -> f32 {
    let largest = one.iter().map(|x| x.to_f32().abs()).fold(f32::MIN_POSITIVE, f32::max);
    let apart = one.iter().zip(other).map(|(a, b)| (a.to_f32() - b.to_f32()).abs());
    // A number that is not one counts as apart.
    apart.map(|apart| if apart.is_finite() { apart } else { f32::INFINITY }).fold(0.0, f32::max) / largest
}

fn assert_same(got: &[Vec<bf16>], want: &[Vec<bf16>], what: &str) {
    assert_eq!(got[0], want[0], "{what}: output");
    for (index, (got, want)) in got.iter().zip(want).enumerate().skip(1) {
        let distance = distance(want, got);
        assert!(distance < 0.01, "{what}: gradient {index} is {distance} apart");
    }
}

#[test]
#[ignore = "needs a GPU with cuDNN"]
fn a_captured_graph_computes_with_the_data_that_is_there_when_it_is_launched() -> Result {
    let device = device()?;
    let cases = backends(&device)
        .into_iter()
        .flat_map(|backend| [false, true].map(|causal| (backend.clone(), causal)));
    for (backend, causal) in cases {
        let shape = [2, 192, 4, 64];
        let mut step = Step::new(&device, shape, causal, 1)?;
        // Plans, kernels and workspaces are made before the capture, and the plans live for as long as the
        // graph.
        let plans = step.plan(&*backend)?;
        step.run_planned(&plans)?;
        let before = step.results()?;
        let stream = device.stream();
        stream.begin_capture(CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL)?;
        let refused = backend.plan(&step.forward);
        step.run_planned(&plans)?;
        let flags = CUgraphInstantiate_flags::CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH;
        let graph = stream.end_capture(flags)?.ok_or("nothing was captured")?;
        let refused = refused.err().ok_or("planned while the stream was captured")?;
        assert!(refused.to_string().contains("a stream that is being captured"), "{refused}");
        step.replace(shape, 100)?;
        graph.launch()?;
        let replayed = step.results()?;
        step.run_planned(&plans)?;
        let called = step.results()?;
        assert_same(&replayed, &called, &format!("{}, replayed", backend.name()));
        assert_ne!(replayed[0], before[0], "the data changed");
    }
    Ok(())
}

#[test]
#[ignore = "needs a GPU with cuDNN"]
fn threads_and_streams_do_not_disturb_each_other() -> Result {
    let shapes = [[1, 64, 2, 64], [2, 130, 3, 128], [1, 257, 4, 64], [3, 96, 2, 96]];
    let devices = [device()?, device()?];
    let shared: Vec<_> =
        devices.iter().flat_map(|device| backends(device).map(|backend| (device, backend))).collect();
    let worker = |index: usize| -> Result {
        let (device, backend) = &shared[index % 4];
        let shape = shapes[index / 4];
        let mut step = Step::new(device, shape, index.is_multiple_of(3), 1000 * index as u64)?;
        step.run(&**backend)?;
        let want = step.results()?;
        for round in 0..30 {
            step.run(&**backend)?;
            let what = format!("{}, thread {index}, round {round}", backend.name());
            assert_same(&step.results()?, &want, &what);
        }
        Ok(())
    };
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..16).map(|index| scope.spawn(move || worker(index))).collect();
        threads.into_iter().try_for_each(|thread| match thread.join() {
            Ok(result) => result,
            Err(panic) => std::panic::resume_unwind(panic),
        })
    })
}

#[test]
#[ignore = "needs a GPU with cuDNN"]
fn plans_from_disk_compute_the_same_and_damaged_ones_are_built_again() -> Result {
    let device = device()?;
    let folder = std::env::temp_dir().join(format!("attention-cudnn-plans-{}", std::process::id()));
    let _ = std::fs::remove_dir_all(&folder);
    let run = || -> Result<Vec<Vec<bf16>>> {
        let backend = CudnnBackend::on(device.clone(), CudnnConfig::default().plan_folder(&folder));
        let mut step = Step::new(&device, [2, 130, 3, 64], true, 1)?;
        for problem in [&step.forward, &step.backward] {
            let started = std::time::Instant::now();
            backend.plan(problem)?;
            println!("{}: planned in {:?}", problem.pass(), started.elapsed());
        }
        step.run(&backend)?;
        step.results()
    };
    let files = || -> Result<Vec<std::path::PathBuf>> {
        let mut files: Vec<_> =
            std::fs::read_dir(&folder)?.map(|entry| Ok(entry?.path())).collect::<Result<_>>()?;
        files.sort();
        Ok(files)
    };
    let built = run()?;
    let kept = files()?;
    assert_eq!(kept.len(), 2, "{kept:?}");
    let texts = || kept.iter().map(std::fs::read).collect::<std::io::Result<Vec<_>>>();
    let whole = texts()?;
    assert_same(&run()?, &built, "loaded");
    assert_eq!(texts()?, whole, "loading writes nothing");
    for (file, text) in kept.iter().zip(&whole) {
        std::fs::write(file, &text[..text.len() / 2])?;
    }
    assert_same(&run()?, &built, "built again");
    assert_eq!(files()?, kept);
    assert!(texts()?.iter().zip(&whole).all(|(now, then)| now.len() == then.len()), "kept again");
    std::fs::remove_dir_all(&folder)?;
    Ok(())
}

/// What a call failed with.
fn error_of(result: Result) -> Result<Error> {
    match result {
        Ok(()) => Err("it succeeded".into()),
        Err(error) => Ok(*error.downcast::<Error>()?),
    }
}

#[test]
#[ignore = "needs a GPU with cuDNN"]
fn faults_are_errors_and_later_calls_work() -> Result {
    let device = device()?;
    let backend = CudnnBackend::on(device.clone(), CudnnConfig::default());
    let shape = [1, 64, 2, 64];
    let mut step = Step::new(&device, shape, false, 1)?;
    step.run(&backend)?;
    let want = step.results()?;

    let limited = CudnnBackend::on(device.clone(), CudnnConfig::default().workspace_limit(0));
    let error = error_of(step.run(&limited))?;
    assert!(matches!(error, Error::Unsupported(Unsupported::ScratchLimit { limit: 0, .. })), "{error}");

    let greedy = attention_cuda::Workspaces::new(usize::MAX);
    let error = greedy.lend("greedy", &device, 1 << 46).err().ok_or("64 TB were lent")?;
    assert!(matches!(error, Error::Backend(_)), "{error}");

    // The query begins eight bytes after the tensor's first one, so it has one row less.
    let desc = TensorDesc::contiguous(DType::Bf16, [1, 63, 2, 64]);
    let problem = Problem::builder(desc, desc, desc).device(device.device()).build()?;
    let [query, key, value] = [0, 1, 2].map(|index| {
        let pointer = step.inputs[index].view().map(|view| view.as_ptr())?;
        let pointer = if index == 0 { pointer.wrapping_add(8) } else { pointer };
        // SAFETY: the description has a row less than the tensor, and the pointer is at most 8 bytes after
        // its first element, so the view is inside the tensor's memory. That outlives the call and is only
        // read.
        unsafe { View::from_raw_parts(pointer, device.device(), desc) }
    });
    let mut out = DeviceTensor::filled(&device, desc, 0xff)?;
    let outputs = ForwardOutputs { out: out.view_mut()?, lse: None };
    let call = ForwardCall::new(&problem, Inputs::new(query?, key?, value?), outputs)?;
    let error = backend.plan(&problem)?.forward(call, attention_core::Scratch::none(device.device()));
    let error = error.err().ok_or("a misaligned call ran")?;
    assert!(error.to_string().contains("a multiple of 16 bytes"), "{error}");
    assert!(out.bytes()?.iter().all(|&byte| byte == 0xff), "nothing was written");

    let elsewhere = step.forward.to_builder().device(attention_core::Device::Cuda(7)).build()?;
    let error = backend.supports(&elsewhere).err().ok_or("another device")?;
    assert!(error.to_string().contains("cuda:7"), "{error}");

    step.run(&backend)?;
    assert_same(&step.results()?, &want, "after the faults");
    Ok(())
}

/// A kernel that reads an address without memory ends the context for the whole process, so this test runs
/// the call in a child process.
#[test]
#[ignore = "needs a GPU with cuDNN"]
fn a_lost_context_is_an_error() -> Result {
    const CHILD: &str = "ATTENTION_TEST_LOSES_ITS_CONTEXT";
    if std::env::var_os(CHILD).is_none() {
        let this = ["--ignored", "--exact", "a_lost_context_is_an_error", "--nocapture"];
        let child =
            std::process::Command::new(std::env::current_exe()?).args(this).env(CHILD, "1").output()?;
        let said = String::from_utf8_lossy(&child.stderr);
        assert!(child.status.success() && !said.contains("panicked"), "{}: {said}", child.status);
        return Ok(());
    }
    let device = device()?;
    let backend = CudnnBackend::on(device.clone(), CudnnConfig::default());
    let mut step = Step::new(&device, [1, 64, 2, 64], false, 1)?;
    step.run(&backend)?;
    let desc = step.inputs[0].desc();
    let nowhere = std::ptr::with_exposed_provenance(1 << 20);
    // SAFETY: the contract is broken on purpose: there is no memory at this address, since the test needs a
    // device fault. The host does not follow a pointer to device memory, and the fault ends the context of
    // this child process only.
    let query = unsafe { View::from_raw_parts(nowhere, device.device(), desc) }?;
    let problem = step.forward.to_builder().lse(false).build()?;
    let outputs = ForwardOutputs { out: step.out.view_mut()?, lse: None };
    let inputs = Inputs::new(query, step.inputs[1].view()?, step.inputs[2].view()?);
    let started = backend.plan(&problem)?.forward(
        ForwardCall::new(&problem, inputs, outputs)?,
        attention_core::Scratch::none(device.device()),
    );
    println!("the call itself: {started:?}");
    let lost = device.stream().synchronize();
    assert!(lost.is_err(), "reading address 2^20 went well");
    let error = error_of(step.run(&backend))?;
    assert!(matches!(error, Error::Backend(_)), "{error}");
    println!("afterwards: {error}");
    Ok(())
}

/// Rows of a matrix `[T, H]` of one head in a tensor `[1, T, N, H]`, in f64.
fn head(data: &[bf16], [_, length, heads, width]: [usize; 4], head: usize) -> Vec<Vec<f64>> {
    let row = |t: usize| &data[(t * heads + head) * width..][..width];
    (0..length).map(|t| row(t).iter().map(|x| x.to_f64()).collect()).collect()
}

fn dot(one: &[f64], other: &[f64]) -> f64 {
    one.iter().zip(other).map(|(a, b)| a * b).sum()
}

/// `sum over j of weights[j] * rows[j]`.
fn combined(weights: impl Iterator<Item = f64>, rows: &[Vec<f64>]) -> Vec<f64> {
    let mut sum = vec![0.0; rows[0].len()];
    for (weight, row) in weights.zip(rows) {
        sum.iter_mut().zip(row).for_each(|(sum, x)| *sum += weight * x);
    }
    sum
}

/// Softmax of scaled products.
fn probabilities(query: &[Vec<f64>], key: &[Vec<f64>]) -> Vec<Vec<f64>> {
    let scale = 1.0 / (query[0].len() as f64).sqrt();
    let row = |q: &Vec<f64>| {
        let powers: Vec<f64> = key.iter().map(|k| (scale * dot(q, k)).exp()).collect();
        let sum: f64 = powers.iter().sum();
        powers.iter().map(|power| power / sum).collect()
    };
    query.iter().map(row).collect()
}

/// cuDNN does not say which probabilities its own generator keeps. With the identity matrix as values, the
/// output is the probabilities, so it shows which are kept. The gradients must then be those of just these
/// probabilities.
#[test]
#[ignore = "needs a GPU with cuDNN"]
fn own_dropout_keeps_the_same_in_both_passes() -> Result {
    let device = device()?;
    let backend = CudnnBackend::on(device.clone(), CudnnConfig::default().own_dropout(true));
    // As many keys as the values are wide.
    let (shape, rate) = ([1, 64, 2, 64], 0.25);
    let [_, length, heads, width] = shape;
    let step = |seed, offset, data| {
        let dropout = Dropout::new(rate, seed).with_offset(offset);
        Step::with(&device, shape, |problem| problem, Some(dropout), data)
    };
    let identity =
        |index: usize| bf16::from_f32(if index / (heads * width) == index % width { 1.0 } else { 0.0 });
    let identity: Vec<bf16> = (0..length * heads * width).map(identity).collect();
    let weights = |seed, offset| -> Result<Vec<bf16>> {
        let mut step = step(seed, offset, 1)?;
        step.inputs[2].replace(View::from_slice(&identity, shape)?)?;
        step.run(&backend)?;
        Ok(step.results()?.swap_remove(0))
    };
    let dropped = |weights: &[bf16]| weights.iter().map(|x| x.to_f32() == 0.0).collect::<Vec<bool>>();
    let seen = weights(5, 0)?;
    let mask = dropped(&seen);
    let share =
        |bits: &mut dyn Iterator<Item = bool>| bits.filter(|&bit| bit).count() as f64 / mask.len() as f64;
    // Within five standard deviations of 8192 draws.
    let lost = share(&mut mask.iter().copied());
    assert!((lost - rate).abs() < 0.024, "{lost} are dropped");
    assert_eq!(weights(5, 0)?, seen, "the same call");
    for (seed, offset) in [(5, 1), (6, 0)] {
        let other = dropped(&weights(seed, offset)?);
        let apart = share(&mut mask.iter().zip(&other).map(|(a, b)| a != b));
        assert!(
            (apart - 2.0 * rate * (1.0 - rate)).abs() < 0.027,
            "seed {seed}, offset {offset}: {apart} differ"
        );
    }

    let mut step = step(5, 0, 1)?;
    step.run(&backend)?;
    let results = step.results()?;
    let inputs: Vec<Vec<bf16>> = step
        .inputs
        .iter()
        .map(|tensor| Ok(tensor.to_vec::<bf16>()?.ok_or("bf16")?))
        .collect::<Result<_>>()?;
    for n in 0..heads {
        let [query, key, value, d_out] = [0, 1, 2, 3].map(|index| head(&inputs[index], shape, n));
        let p = probabilities(&query, &key);
        let kept =
            |t: usize, s: usize| if mask[(t * heads + n) * width + s] { 0.0 } else { 1.0 / (1.0 - rate) };
        let shown = head(&seen, shape, n);
        for (t, row) in p.iter().enumerate() {
            for (s, p) in row.iter().enumerate() {
                let want = kept(t, s) * p;
                assert!(
                    (shown[t][s] - want).abs() <= 0.01 * want + 1e-6,
                    "{t}, {s}: {} for {want}",
                    shown[t][s]
                );
            }
        }
        let out: Vec<_> =
            (0..length).map(|t| combined((0..length).map(|s| kept(t, s) * p[t][s]), &value)).collect();
        let gradient: Vec<Vec<f64>> = (0..length)
            .map(|t| {
                let delta = dot(&d_out[t], &out[t]);
                (0..length).map(|s| p[t][s] * (kept(t, s) * dot(&d_out[t], &value[s]) - delta)).collect()
            })
            .collect();
        let scale = 1.0 / (width as f64).sqrt();
        let scaled = |rows: Vec<Vec<f64>>| -> Vec<Vec<f64>> {
            rows.into_iter().map(|row| row.into_iter().map(|x| x * scale).collect()).collect()
        };
        let dq = (0..length).map(|t| combined(gradient[t].iter().copied(), &key)).collect();
        let dk = (0..length).map(|s| combined((0..length).map(|t| gradient[t][s]), &query)).collect();
        let dv = (0..length).map(|s| combined((0..length).map(|t| kept(t, s) * p[t][s]), &d_out)).collect();
        let wanted = [("output", out), ("dq", scaled(dq)), ("dk", scaled(dk)), ("dv", dv)];
        for ((what, want), got) in wanted.into_iter().zip(&results) {
            let got = head(got, shape, n);
            let largest = want.iter().flatten().fold(0.0, |most: f64, x| most.max(x.abs()));
            let apart = want.iter().flatten().zip(got.iter().flatten()).map(|(a, b)| (a - b).abs());
            // A number that is not one counts as apart.
            let apart = apart.fold(0.0, |most: f64, x| if x <= most { most } else { x });
            assert!(apart < 0.02 * largest, "{what} of head {n} is {apart} apart, of {largest}");
        }
    }
    Ok(())
}
