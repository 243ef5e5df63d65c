//! `cargo xtask bench --suite gpu`: the backends for NVIDIA GPUs and, in turn, PyTorch's paths.

mod call;
pub(super) mod case;
mod measured;
mod peer;
pub(super) mod record;
pub(super) mod sequences;

use std::path::Path;
use std::sync::Arc;

use attention_chunked_cuda::{ChunkedCudaBackend, ChunkedCudaConfig};
use attention_core::{AttentionBackend, DType, Dimensions};
use attention_cuda::CudaDevice;
use attention_cudnn::{CudnnBackend, CudnnConfig};

use super::row;
use crate::{machine, reporting};
use call::{Call, Data};
use case::{CallOption, Case, cases};
use measured::{Row, Times};
use peer::Peer;

/// PyTorch's fused paths.
const PATHS: [&str; 3] = ["cudnn", "flash", "efficient"];

/// Where rows are written besides.
pub(super) struct Files<'a> {
    pub(super) json: Option<&'a Path>,
    pub(super) record: Option<&'a Path>,
}

/// Which cases are measured: those of these dtypes and shapes, of all where there are none.
pub(super) struct Wanted<'a> {
    pub(super) dtypes: &'a [DType],
    pub(super) shapes: &'a [Dimensions],
}

impl Wanted<'_> {
    /// The cases, in the order of the suite, or that it has no such case.
    fn cases(&self) -> crate::Result<Vec<Case>> {
        let cases = cases();
        if let Some(&missing) =
            self.shapes.iter().find(|&&shape| cases.iter().all(|case| case.shape() != shape))
        {
            return Err(format!("the suite for GPUs has no case of {}", row::shape(missing)).into());
        }
        let is_wanted = |case: &Case| {
            (self.dtypes.is_empty() || self.dtypes.contains(&case.dtype))
                && (self.shapes.is_empty() || self.shapes.contains(&case.shape()))
        };
        Ok(cases.into_iter().filter(is_wanted).collect())
    }
}

/// Measures the cases that are wanted, and prints a table.
pub(super) fn run(
    backends: &[String],
    wanted: &Wanted<'_>,
    peer: Option<&Path>,
    repeats: usize,
    files: &Files<'_>,
) -> crate::Result<bool> {
    let cases = wanted.cases()?;
    let device = CudaDevice::new("cudnn", 0)?;
    let backends: Vec<(&str, Arc<dyn AttentionBackend>)> = on_device(&device)
        .into_iter()
        .filter(|(_, backend)| backends.is_empty() || backends.iter().any(|name| name == backend.name()))
        .collect();
    for (_, backend) in &backends {
        backend.available()?;
    }
    let mut peer = match peer.map(Peer::start).transpose() {
        Ok(peer) => peer,
        Err(error) => {
            eprintln!("peer torch skipped: {error}");
            None
        }
    };
    let name = device.context().name()?;
    println!("{name}");
    if let Some(peer) = &peer {
        println!("peer: {}", peer.versions);
    }
    println!(
        "TFLOP/s on the device (decoding: TB/s of keys and values), and microseconds on the host, by implementation"
    );
    let mut rows = Vec::new();
    for case in cases {
        let mut data = Data::new(&device, &case)?;
        let mut measured: Vec<(String, Vec<Times>)> = Vec::new();
        let mut add = |name: &str, times: Times| match measured.iter_mut().find(|(of, _)| of == name) {
            Some((_, all)) => all.push(times),
            None => measured.push((name.to_owned(), vec![times])),
        };
        for _ in 0..repeats {
            for (name, backend) in &backends {
                let differs = match *name {
                    OWN_DROPOUT => case.terms == CallOption::Dropout,
                    FINITE => case.causal,
                    _ => true,
                };
                if differs && backend.supports(data.problem()).is_ok() {
                    add(name, Call::new(&mut data, &**backend)?.time(case.calls)?);
                }
            }
            for path in PATHS {
                if let Some(peer) = &mut peer
                    && let Ok(times) = peer.ask(&case, path)?
                {
                    add(&format!("torch-{path}"), times);
                }
            }
        }
        let times =
            measured.iter().filter_map(|(name, times)| Some((name.clone(), median(times)?))).collect();
        let flops = data.problem().flops() * if case.causal { 0.5 } else { 1.0 };
        let row = Row { case, flops, times };
        println!("{}", line(&row));
        rows.push(row);
    }
    if let Some(path) = files.json {
        reporting::write_asked_for(path, &serde_json::to_string_pretty(&rows)?)?;
    }
    if let Some(path) = files.record {
        let driver = record::driver_version().map(|version| format!("driver {version}"));
        let cudnn = CudnnBackend::on(device, CudnnConfig::default());
        let cudnn = cudnn.available().is_ok().then(|| cudnn.target().to_string());
        let peer = peer.map(|peer| format!("peer {}", peer.versions));
        let versions =
            [Some(machine::today()), Some(name), driver, cudnn, peer].into_iter().flatten().collect();
        reporting::write_asked_for(path, &record::csv(&rows, &record::Source { versions, repeats })?)?;
    }
    Ok(true)
}

/// cuDNN with its own dropout, as torch's path has it: measured where there is dropout.
const OWN_DROPOUT: &str = "cudnn-own-dropout";

/// cuDNN without a look at what its causal calls gave, as torch's path is.
const FINITE: &str = "cudnn-finite-operands";

/// The backends for memory of a device, and what they are called here.
fn on_device(device: &CudaDevice) -> Vec<(&'static str, Arc<dyn AttentionBackend>)> {
    let cudnn = CudnnConfig::default().rounds_group_gradients(true).finite_bias(true);
    let own_dropout = cudnn.clone().own_dropout(true);
    let finite = cudnn.clone().finite_operands(true);
    vec![
        ("cudnn", Arc::new(CudnnBackend::on(device.clone(), cudnn))),
        (FINITE, Arc::new(CudnnBackend::on(device.clone(), finite))),
        (OWN_DROPOUT, Arc::new(CudnnBackend::on(device.clone(), own_dropout))),
        ("chunked-cuda", Arc::new(ChunkedCudaBackend::on(device.clone(), ChunkedCudaConfig::default()))),
    ]
}

fn line(row: &Row) -> String {
    let Case { b, t, s, n, k, h, dtype, causal, backward, terms, .. } = row.case;
    let shape = if t == s { format!("{b},{t},{n}/{k},{h}") } else { format!("{b},{t}x{s},{n}/{k},{h}") };
    let mut what = format!("{dtype} {}", if backward { "bwd" } else { "fwd" });
    if causal {
        what += " causal";
    }
    if terms != CallOption::Plain {
        what += &format!(" {terms:?}").to_lowercase();
    }
    let mut line = format!("{shape:18} {what:17}");
    for (name, times) in &row.times {
        let rate = if t == 1 {
            (2 * b * s * k * h * dtype.size()) as f64 / times.device_us / 1e6
        } else {
            row.flops / times.device_us / 1e6
        };
        line += &format!(" {name} {rate:.*} ({:.0})", if rate < 10.0 { 2 } else { 0 }, times.host_us);
    }
    line
}

fn median(times: &[Times]) -> Option<Times> {
    let of =
        |part: fn(&Times) -> f64| super::measure::median(&mut times.iter().map(part).collect::<Vec<_>>());
    (!times.is_empty())
        .then(|| Times { device_us: of(|times| times.device_us), host_us: of(|times| times.host_us) })
}

#[cfg(test)]
mod tests {
    use attention_benches::parse_shape;

    use super::*;

    #[test]
    fn shapes_and_dtypes_choose_cases() -> crate::Result<()> {
        let count = |dtypes: &[DType], shapes: &[Dimensions]| -> crate::Result<usize> {
            Ok(Wanted { dtypes, shapes }.cases()?.len())
        };
        let (small, large) = (parse_shape("1,256,256,4,4,64")?, parse_shape("4,4096,4096,16,16,128")?);
        assert_eq!(count(&[], &[])?, cases().len());
        // Both passes, full and causal.
        assert_eq!(count(&[], &[small])?, 4);
        assert_eq!(count(&[DType::F32], &[small])?, 0);
        // Besides, both passes of three options, and in f32.
        assert_eq!(count(&[], &[small, large])?, 4 + 4 + 6 + 2);
        assert_eq!(count(&[DType::F32], &[small, large])?, 2);
        Ok(())
    }

    #[test]
    fn a_shape_that_is_not_there_is_named() -> crate::Result<()> {
        let shapes = [parse_shape("1,256,256,4,4,64")?, parse_shape("1,255,256,4,2,64")?];
        let Err(error) = (Wanted { dtypes: &[], shapes: &shapes }).cases() else {
            panic!("a shape of no case was taken");
        };
        assert_eq!(error.to_string(), "the suite for GPUs has no case of 1,255,256,4,2,64");
        Ok(())
    }
}
