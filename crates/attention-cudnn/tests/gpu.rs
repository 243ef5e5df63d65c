//! What needs a GPU with cuDNN: calls in captured graphs, and calls from several threads on several streams. Run with
//! `--ignored`.

use std::sync::Arc;

use attention_core::{
    AttentionBackend, BackwardCall, BackwardInputs, BackwardOutputs, DType, ForwardCall, ForwardOutputs,
    Gradients, Inputs, Problem, TensorDesc, View, philox4x32_10,
};
use attention_cuda::cudarc::driver::sys::{CUgraphInstantiate_flags, CUstreamCaptureMode};
use attention_cuda::{CudaDevice, DeviceTensor};
use attention_cudnn::{CudnnBackend, CudnnConfig};
use half::bf16;

type Result<T = ()> = std::result::Result<T, Box<dyn std::error::Error + Send + Sync>>;

/// The device on a stream of its own, without cudarc's events: everything here is ordered by streams.
fn device() -> Result<CudaDevice> {
    let device = CudaDevice::new("test", 0)?;
    // SAFETY: no memory is used on two streams.
    unsafe { device.context().disable_event_tracking() };
    let stream = device.context().new_stream()?;
    Ok(device.with_stream(stream))
}

fn numbers(seed: u64, count: usize) -> Vec<bf16> {
    let word = |index: usize| philox4x32_10([index as u32, 0, 0, 0], [seed as u32, 0])[0];
    (0..count).map(|index| bf16::from_f64(f64::from(word(index)) / f64::from(1u32 << 30) - 2.0)).collect()
}

/// The tensors of a training step.
struct Step {
    forward: Problem,
    backward: Problem,
    inputs: [DeviceTensor; 4],
    out: DeviceTensor,
    lse: DeviceTensor,
    gradients: [DeviceTensor; 3],
}

impl Step {
    fn new(device: &CudaDevice, shape: [usize; 4], causal: bool, seed: u64) -> Result<Self> {
        let desc = TensorDesc::contiguous(DType::Bf16, shape);
        let [b, t, n, _] = shape;
        let lse = TensorDesc::contiguous(DType::F32, [b, t, n]);
        let forward =
            Problem::builder(desc, desc, desc).device(device.device()).causal(causal).lse(true).build()?;
        let wanted = Gradients::QUERY | Gradients::KEY | Gradients::VALUE;
        let backward = Problem::builder(desc, desc, desc)
            .device(device.device())
            .causal(causal)
            .gradients(wanted)
            .build()?;
        let send = |index: u64| -> Result<DeviceTensor> {
            let data = numbers(seed + index, shape.iter().product());
            Ok(DeviceTensor::from_host(device, View::from_slice(&data, shape)?)?)
        };
        let room = |desc| DeviceTensor::filled(device, desc, 0xff);
        Ok(Self {
            forward,
            backward,
            inputs: [send(0)?, send(1)?, send(2)?, send(3)?],
            out: room(desc)?,
            lse: room(lse)?,
            gradients: [room(desc)?, room(desc)?, room(desc)?],
        })
    }

    /// Other numbers in the same memory.
    fn replace(&mut self, shape: [usize; 4], seed: u64) -> Result {
        for (index, input) in self.inputs.iter_mut().enumerate() {
            let data = numbers(seed + index as u64, shape.iter().product());
            input.replace(View::from_slice(&data, shape)?)?;
        }
        Ok(())
    }

    /// Puts both passes on the backend's stream.
    fn run(&mut self, backend: &CudnnBackend) -> Result {
        let [query, key, value, d_out] = &self.inputs;
        let inputs = Inputs::new(query.view()?, key.view()?, value.view()?);
        let outputs = ForwardOutputs { out: self.out.view_mut()?, lse: Some(self.lse.view_mut()?) };
        let mut scratch = backend.lend_scratch(&self.forward, backend.scratch_bytes(&self.forward)?)?;
        backend.forward(ForwardCall::new(&self.forward, inputs, outputs)?, scratch.scratch())?;
        drop(scratch);
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
        let mut scratch = backend.lend_scratch(&self.backward, backend.scratch_bytes(&self.backward)?)?;
        backend.backward(BackwardCall::new(&self.backward, inputs, saved, outputs)?, scratch.scratch())?;
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

/// The largest difference, as a fraction of the largest number: gradients of queries are summed in any order.
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
    let backend = CudnnBackend::on(device.clone(), CudnnConfig::default());
    for causal in [false, true] {
        let shape = [2, 192, 4, 64];
        let mut step = Step::new(&device, shape, causal, 1)?;
        // Plans, kernels and workspaces are made before the capture.
        step.run(&backend)?;
        let before = step.results()?;
        let stream = device.stream();
        stream.begin_capture(CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL)?;
        step.run(&backend)?;
        let flags = CUgraphInstantiate_flags::CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH;
        let graph = stream.end_capture(flags)?.ok_or("nothing was captured")?;
        step.replace(shape, 100)?;
        graph.launch()?;
        let replayed = step.results()?;
        step.run(&backend)?;
        let called = step.results()?;
        assert_same(&replayed, &called, "replayed");
        assert_ne!(replayed[0], before[0], "the data changed");
    }
    Ok(())
}

#[test]
#[ignore = "needs a GPU with cuDNN"]
fn threads_and_streams_do_not_disturb_each_other() -> Result {
    let shapes = [[1, 64, 2, 64], [2, 130, 3, 128], [1, 257, 4, 64], [3, 96, 2, 96]];
    let (one, other) = (device()?, device()?);
    let shared = [
        (one.clone(), Arc::new(CudnnBackend::on(one, CudnnConfig::default()))),
        (other.clone(), Arc::new(CudnnBackend::on(other, CudnnConfig::default()))),
    ];
    let worker = |index: usize| -> Result {
        let (device, backend) = &shared[index % 2];
        let shape = shapes[index / 2];
        let mut step = Step::new(device, shape, index.is_multiple_of(3), 1000 * index as u64)?;
        step.run(backend)?;
        let want = step.results()?;
        for round in 0..30 {
            step.run(backend)?;
            assert_same(&step.results()?, &want, &format!("thread {index}, round {round}"));
        }
        Ok(())
    };
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..8).map(|index| scope.spawn(move || worker(index))).collect();
        threads.into_iter().try_for_each(|thread| match thread.join() {
            Ok(result) => result,
            Err(panic) => std::panic::resume_unwind(panic),
        })
    })
}
