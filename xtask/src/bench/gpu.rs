//! `cargo xtask bench --suite gpu`: cuDNN through this library and, in turn, through PyTorch.

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::Arc;
use std::time::Instant;

use attention_core::{
    AttentionBackend, BackwardCall, BackwardInputs, BackwardOutputs, DType, ForwardCall, ForwardOutputs,
    Gradients, Inputs, Problem, Role, TensorDesc,
};
use attention_cuda::cudarc::driver::{CudaSlice, sys::CUevent_flags};
use attention_cuda::{CudaDevice, DeviceTensor, scratch_of};
use attention_cudnn::{CudnnBackend, CudnnConfig};
use serde::{Deserialize, Serialize};

use crate::{cargo, reporting};

/// A shape of the suite, in bf16.
#[derive(Clone, Copy, Debug, Serialize)]
struct Case {
    b: usize,
    t: usize,
    n: usize,
    k: usize,
    h: usize,
    causal: bool,
    backward: bool,
    /// Calls that are timed together.
    calls: usize,
}

/// The shapes of the design's table: 16384 tokens in all, and one so small that the host is what is measured.
fn cases() -> Vec<Case> {
    let shapes = [
        (1, 256, 4, 4, 64, 200),
        (32, 512, 16, 16, 128, 50),
        (16, 1024, 16, 16, 128, 30),
        (4, 4096, 16, 16, 128, 10),
        (1, 16384, 16, 16, 128, 4),
        (4, 4096, 32, 32, 64, 10),
        (4, 4096, 8, 8, 256, 10),
        (4, 4096, 32, 8, 128, 6),
    ];
    let mut all = Vec::new();
    for (b, t, n, k, h, calls) in shapes {
        for causal in [false, true] {
            for backward in [false, true] {
                all.push(Case { b, t, n, k, h, causal, backward, calls });
            }
        }
    }
    all
}

/// Microseconds of a call.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
struct Times {
    /// On the device.
    device_us: f64,
    /// Until the call returns.
    host_us: f64,
}

#[derive(Serialize)]
struct Row {
    #[serde(flatten)]
    case: Case,
    tflops: f64,
    ours: Times,
    peer: Option<Times>,
}

/// Measures every case, and prints a table.
pub(super) fn run(peer: Option<&Path>, repeats: usize, json: Option<&Path>) -> crate::Result<bool> {
    let device = CudaDevice::new("cudnn", 0)?;
    let config = CudnnConfig::default().rounds_group_gradients(true);
    let backend = CudnnBackend::on(device.clone(), config);
    backend.available()?;
    println!("{}, {}", device.context().name()?, backend.target());
    let mut peer = match peer.map(Peer::start).transpose() {
        Ok(peer) => peer,
        Err(error) => {
            eprintln!("peer torch skipped: {error}");
            None
        }
    };
    if let Some(peer) = &peer {
        println!("peer: {}", peer.versions);
    }
    let mut rows = Vec::new();
    println!(
        "b,t,n,k,h            pass      device us  TFLOP/s  host us   torch: device us  host us   ratio of device times"
    );
    for case in cases() {
        let mut call = Call::new(&device, &backend, &case)?;
        let (mut ours, mut theirs) = (Vec::new(), Vec::new());
        for _ in 0..repeats {
            ours.push(call.time(&device, &backend, case.calls)?);
            if let Some(peer) = &mut peer {
                theirs.extend(peer.ask(&case)?);
            }
        }
        let ours = median(&ours).ok_or("nothing was measured")?;
        let peer = median(&theirs);
        let row = Row { case, tflops: call.flops / ours.device_us / 1e6, ours, peer };
        println!("{}", line(&row));
        rows.push(row);
    }
    if let Some(path) = json {
        reporting::write(path, &serde_json::to_string_pretty(&rows)?)?;
    }
    Ok(true)
}

fn line(row: &Row) -> String {
    let Case { b, t, n, k, h, causal, backward, .. } = row.case;
    let pass = format!("{}{}", if backward { "bwd" } else { "fwd" }, if causal { " causal" } else { "" });
    let Times { device_us, host_us } = row.ours;
    let peer = row.peer.map_or_else(
        || "-".to_owned(),
        |peer| format!("{:16.1}  {:7.1}   {:.3}", peer.device_us, peer.host_us, device_us / peer.device_us),
    );
    format!(
        "{:20} {pass:10} {device_us:9.1} {:8.1} {host_us:8.1}   {peer}",
        format!("{b},{t},{n},{k},{h}"),
        row.tflops
    )
}

fn median(times: &[Times]) -> Option<Times> {
    let of =
        |part: fn(&Times) -> f64| super::measure::median(&mut times.iter().map(part).collect::<Vec<_>>());
    (!times.is_empty())
        .then(|| Times { device_us: of(|times| times.device_us), host_us: of(|times| times.host_us) })
}

/// A call with its memory.
struct Call {
    problem: Arc<Problem>,
    flops: f64,
    inputs: [DeviceTensor; 3],
    out: DeviceTensor,
    lse: DeviceTensor,
    /// The incoming gradient and room for those of query, key and value, in backward.
    gradients: Option<[DeviceTensor; 4]>,
    scratch: CudaSlice<u8>,
    scratch_bytes: usize,
}

impl Call {
    fn new(device: &CudaDevice, backend: &CudnnBackend, case: &Case) -> crate::Result<Self> {
        let Case { b, t, n, k, h, causal, backward, .. } = *case;
        let desc = |heads| TensorDesc::contiguous(DType::Bf16, [b, t, heads, h]);
        let random = |desc: TensorDesc, seed: u32| -> crate::Result<DeviceTensor> {
            let count = desc.element_count().ok_or("too large")?;
            let mut state = seed;
            let data: Vec<attention::bf16> = (0..count)
                .map(|_| {
                    state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                    attention::bf16::from_f32((state >> 8) as f32 / (1 << 23) as f32 - 1.0)
                })
                .collect();
            Ok(DeviceTensor::from_host(device, attention_core::View::from_slice(&data, desc.shape())?)?)
        };
        let inputs = [random(desc(n), 1)?, random(desc(k), 2)?, random(desc(k), 3)?];
        let zeros = |desc: TensorDesc| DeviceTensor::filled(device, desc, 0);
        let out = zeros(desc(n))?;
        let lse = zeros(TensorDesc::contiguous(DType::F32, [b, t, n]))?;
        let builder = Problem::builder(desc(n), desc(k), desc(k)).device(device.device()).causal(causal);
        let forward = builder.clone().build()?;
        let problem = if backward {
            builder.gradients(Gradients::QUERY | Gradients::KEY | Gradients::VALUE).build()?
        } else {
            forward.clone()
        };
        let gradients = if backward {
            Some([random(desc(n), 4)?, zeros(desc(n))?, zeros(desc(k))?, zeros(desc(k))?])
        } else {
            None
        };
        let scratch_bytes = backend.scratch_bytes(&problem)?.max(backend.scratch_bytes(&forward)?);
        let scratch = device.stream().clone_htod(&vec![0u8; scratch_bytes.max(1)])?;
        let mut call = Self {
            flops: problem.flops() * if causal { 0.5 } else { 1.0 },
            problem: Arc::new(problem),
            inputs,
            out,
            lse,
            gradients,
            scratch,
            scratch_bytes,
        };
        if backward {
            // A real output and logsumexp to go back from.
            let with_lse = forward.to_builder().lse(true).build()?;
            call.forward(device, backend, &with_lse)?;
        }
        Ok(call)
    }

    fn forward(&mut self, device: &CudaDevice, backend: &CudnnBackend, problem: &Problem) -> crate::Result {
        let [query, key, value] = &self.inputs;
        let inputs = Inputs::new(query.view()?, key.view()?, value.view()?);
        let lse = problem.has(Role::Lse).then(|| self.lse.view_mut()).transpose()?;
        let call = ForwardCall::new(problem, inputs, ForwardOutputs { out: self.out.view_mut()?, lse })?;
        backend.forward(call, scratch_of(device, &mut self.scratch, self.scratch_bytes))?;
        Ok(true)
    }

    fn once(&mut self, device: &CudaDevice, backend: &CudnnBackend) -> crate::Result {
        let problem = Arc::clone(&self.problem);
        let Some([d_out, dq, dk, dv]) = &mut self.gradients else {
            return self.forward(device, backend, &problem);
        };
        let [query, key, value] = &self.inputs;
        let inputs = Inputs::new(query.view()?, key.view()?, value.view()?);
        let saved = BackwardInputs {
            out: self.out.view()?,
            lse: self.lse.view()?,
            d_out: d_out.view()?,
            d_lse: None,
        };
        let outputs = BackwardOutputs {
            dq: Some(dq.view_mut()?),
            dk: Some(dk.view_mut()?),
            dv: Some(dv.view_mut()?),
            ..BackwardOutputs::default()
        };
        let call = BackwardCall::new(&problem, inputs, saved, outputs)?;
        backend.backward(call, scratch_of(device, &mut self.scratch, self.scratch_bytes))?;
        Ok(true)
    }

    /// Device and host time of a call: of many on the stream, and of a few that wait for nothing.
    fn time(&mut self, device: &CudaDevice, backend: &CudnnBackend, calls: usize) -> crate::Result<Times> {
        let stream = device.stream();
        self.once(device, backend)?;
        stream.synchronize()?;
        let event = || device.context().new_event(Some(CUevent_flags::CU_EVENT_DEFAULT));
        let (start, end) = (event()?, event()?);
        start.record(stream)?;
        for _ in 0..calls {
            self.once(device, backend)?;
        }
        end.record(stream)?;
        end.synchronize()?;
        let device_us = f64::from(start.elapsed_ms(&end)?) * 1e3 / calls as f64;
        let begin = Instant::now();
        for _ in 0..20 {
            self.once(device, backend)?;
        }
        let host_us = begin.elapsed().as_secs_f64() * 1e6 / 20.0;
        stream.synchronize()?;
        Ok(Times { device_us, host_us })
    }
}

/// PyTorch in a process of its own.
struct Peer {
    process: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
    versions: String,
}

impl Peer {
    fn start(python: &Path) -> crate::Result<Self> {
        let script = cargo::root().join("benches/peers/gpu.py");
        let mut process =
            Command::new(python).arg(script).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
        let input = process.stdin.take().ok_or("no input")?;
        let mut output = BufReader::new(process.stdout.take().ok_or("no output")?);
        let mut versions = String::new();
        output.read_line(&mut versions)?;
        if versions.is_empty() {
            return Err("torch does not start".into());
        }
        Ok(Self { process, input, output, versions: versions.trim().to_owned() })
    }

    /// The peer's times, or nothing where it refuses, which is printed.
    fn ask(&mut self, case: &Case) -> crate::Result<Option<Times>> {
        writeln!(self.input, "{}", serde_json::to_string(case)?)?;
        let mut line = String::new();
        self.output.read_line(&mut line)?;
        match serde_json::from_str(&line) {
            Ok(times) => Ok(Some(times)),
            Err(_) => {
                eprintln!("torch: {}", line.trim());
                Ok(None)
            }
        }
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}
