//! `cargo xtask bench`: backends on the shared shapes, against other libraries.

mod case;
mod gpu;
mod measure;
mod memory;
mod peer;
pub(crate) mod plot;
mod row;
mod sequences;

use std::path::PathBuf;
use std::sync::Arc;

use attention_benches::{Mask, SHAPES, Shape, Work, Workload, parse_shape};
use attention_core::{AttentionBackend, DType, Dimensions, ScratchGrowth};

use crate::backends::{self, InPool, parse_dtype};
use crate::{machine, reporting};
use case::Case;
use peer::Peer;
use row::Row;

/// Measures backends, and other libraries on the same shapes in turn
#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// A backend to measure; all by default
    #[arg(long, value_name = "NAME")]
    backend: Vec<String>,
    /// A shape, B,T,S,N,K,H or B,T,S,N,K,H,Hv; the shared list by default. With --suite, one of its shapes
    #[arg(long, value_parser = parse_shape, value_name = "B,T,S,N,K,H[,Hv]")]
    shape: Vec<Dimensions>,
    /// Only the short part of the shared list
    #[arg(long, conflicts_with = "shape")]
    quick: bool,
    /// A dtype: f64, f32, f16 or bf16; those of the shared list by default, f32 for other shapes
    #[arg(long, value_parser = parse_dtype, value_delimiter = ',', value_name = "D")]
    dtype: Vec<DType>,
    /// forward, or both for forward and backward together; one after the other by default
    #[arg(long)]
    pass: Option<Work>,
    /// Causal calls instead of full ones; leaves the decoding steps out of the shared list
    #[arg(long)]
    causal: bool,
    /// What masks the logits: none, bool (of shape B,1,T,S) or bias (of shape 1,N,T,S)
    #[arg(long, default_value = "none")]
    mask: Mask,
    /// How many threads both sides have; all cores by default
    #[arg(long, value_name = "N", value_parser = positive)]
    threads: Option<usize>,
    /// Another library to measure in turn with the backend: torch, jax or candle (its attention for packed
    /// tensors; built from this workspace)
    #[arg(long, value_name = "torch|jax|candle", value_parser = ["torch", "jax", "candle"])]
    peer: Vec<String>,
    /// The peer's implementation: math materialises the logits, default is what its users get. Without this,
    /// backends that materialise logits are measured against math, others against default
    #[arg(long, value_parser = ["math", "default", "fused"])]
    peer_path: Option<String>,
    /// The Python that has torch or jax
    #[arg(long, env = "ATTENTION_PYTHON", default_value = "python3", value_name = "PATH")]
    peer_python: PathBuf,
    /// Print memory beyond inputs and outputs for one head of 2^8 to 2^20 tokens instead, next to the
    /// paper's tables
    #[arg(long)]
    memory: bool,
    /// With --memory: run calls of up to this many tokens; longer ones are asked for their scratch alone
    #[arg(long, default_value_t = 1 << 14, value_name = "N")]
    run_up_to: usize,
    /// Another list of cases: gpu measures the backends for NVIDIA GPUs and, with --peer torch, PyTorch's
    /// paths; sequences measures packed and paged calls on the CPU beside what one would do without them, and
    /// gpu-sequences does so on a GPU, with keys of 8 bits too
    #[arg(
        long,
        value_parser = ["gpu", "sequences", "gpu-sequences"],
        value_name = "gpu|sequences|gpu-sequences",
        conflicts_with_all = ["quick", "pass", "causal", "mask", "threads", "peer_path", "memory", "run_up_to"]
    )]
    suite: Option<String>,
    /// With --suite gpu-sequences: only the sequences whose name has this part
    #[arg(long, requires = "suite", value_name = "TEXT")]
    filter: Option<String>,
    /// How many turns each side has; as many as fit into some seconds by default
    #[arg(long, value_name = "N", value_parser = positive)]
    repeats: Option<usize>,
    /// Write the rows to this file as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Write the rows to this file as CSV, with the machine and the versions on top
    #[arg(long, value_name = "FILE")]
    record: Option<PathBuf>,
    /// Draw the figures of docs/performance/results.md from benches/record instead; nothing is measured
    #[arg(long)]
    plot: bool,
    /// With --plot: compare with the figures that are there instead, and fail where they differ
    #[arg(long, requires = "plot")]
    check: bool,
}

fn positive(text: &str) -> Result<usize, String> {
    text.parse().ok().filter(|&number| number > 0).ok_or_else(|| "expected a number above 0".to_owned())
}

/// Runs the command.
pub(crate) fn run(arguments: &Arguments) -> crate::Result {
    if arguments.plot {
        return plot::run(arguments.check);
    }
    // Before minutes of work whose result could not be written.
    reporting::make_folders_of(
        [&arguments.json, &arguments.record].into_iter().flatten().map(PathBuf::as_path),
    )?;
    if arguments.filter.is_some() && arguments.suite.as_deref() != Some("gpu-sequences") {
        return Err("only the suite gpu-sequences is filtered by name".into());
    }
    if arguments.suite.as_deref() == Some("sequences") {
        if !arguments.shape.is_empty() {
            return Err("the suite of sequences has shapes of its own".into());
        }
        return sequences::run(&sequences::Wanted {
            backends: &arguments.backend,
            dtypes: &arguments.dtype,
            peers: &arguments.peer,
            python: &arguments.peer_python,
            turns: arguments.repeats,
            json: arguments.json.as_deref(),
            record: arguments.record.as_deref(),
        });
    }
    if arguments.suite.as_deref() == Some("gpu-sequences") {
        if !arguments.shape.is_empty() || !arguments.dtype.is_empty() || !arguments.peer.is_empty() {
            return Err("the suite gpu-sequences has shapes and dtypes of its own, and no peer".into());
        }
        return gpu::sequences::run(&gpu::sequences::Wanted {
            backends: &arguments.backend,
            filter: arguments.filter.as_deref().unwrap_or(""),
            repeats: arguments.repeats.unwrap_or(3),
            json: arguments.json.as_deref(),
            record: arguments.record.as_deref(),
        });
    }
    if arguments.suite.is_some() {
        let peer =
            arguments.peer.iter().any(|peer| peer == "torch").then_some(arguments.peer_python.as_path());
        let repeats = arguments.repeats.unwrap_or(3);
        let files = gpu::Files { json: arguments.json.as_deref(), record: arguments.record.as_deref() };
        let wanted = gpu::Wanted { dtypes: &arguments.dtype, shapes: &arguments.shape };
        return gpu::run(&arguments.backend, &wanted, peer, repeats, &files);
    }
    let threads = if arguments.memory { 1 } else { arguments.threads.unwrap_or_else(machine::cores) };
    let backends = (backends::named(&arguments.backend)?.into_iter())
        .map(|backend| Ok(Arc::new(InPool::new(backend, threads)?) as Arc<dyn AttentionBackend>))
        .collect::<crate::Result<Vec<_>>>()?;
    if arguments.memory {
        let dtype = arguments.dtype.first().copied().unwrap_or(DType::F32);
        return memory::run(&backends, arguments.run_up_to, dtype);
    }
    let mut peers = peer::start_all(&arguments.peer, &arguments.peer_python, threads);
    println!("{}, {}, {threads} threads", machine::description(), machine::level());

    let cases = cases(arguments);
    let names: Vec<&str> = backends.iter().map(|backend| backend.name()).collect();
    let columns = row::Columns::new(&names, &cases);
    println!("{}", columns.header());
    let bar = reporting::Bar::new("bench");
    let mut rows = Vec::new();
    for (index, case) in cases.iter().enumerate() {
        for backend in &backends {
            bar.say(index, cases.len(), backend.name());
            let new = measure_case(case, &**backend, &mut peers, arguments, threads)?;
            // As they come: a whole list takes minutes.
            bar.aside(|| new.iter().for_each(|row| println!("{}", columns.line(row))));
            rows.extend(new);
        }
    }
    drop(bar);
    if let Some(path) = &arguments.json {
        reporting::write_asked_for(path, &row::json(&rows)?)?;
    }
    if let Some(path) = &arguments.record {
        let versions: Vec<_> = peers.iter().map(|peer| (peer.name.clone(), peer.version.clone())).collect();
        reporting::write_asked_for(path, &row::csv(&rows, &versions)?)?;
    }
    Ok(true)
}

/// Everything that the options ask for, in the order of the rows.
fn cases(arguments: &Arguments) -> Vec<Case> {
    let listed =
        |shape: &&Shape| (shape.quick || !arguments.quick) && !(arguments.causal && shape.is_decode());
    let shapes: Vec<(Dimensions, &[DType])> = if arguments.shape.is_empty() {
        SHAPES.iter().filter(listed).map(|shape| (shape.dims, shape.dtypes)).collect()
    } else {
        arguments.shape.iter().map(|&dims| (dims, &[DType::F32][..])).collect()
    };
    let works = arguments.pass.map_or_else(|| vec![Work::Forward, Work::Both], |work| vec![work]);
    let mut cases = Vec::new();
    for (dims, dtypes) in shapes {
        let dtypes = if arguments.dtype.is_empty() { dtypes } else { &arguments.dtype };
        for &dtype in dtypes {
            for &work in &works {
                cases.push(Case { dims, dtype, work, causal: arguments.causal, mask: arguments.mask });
            }
        }
    }
    cases
}

/// The peer's implementation that is of a backend's kind.
fn like(backend: &dyn AttentionBackend) -> &'static str {
    match backend.capabilities().scratch {
        ScratchGrowth::RowBlock | ScratchGrowth::Logits => "math",
        _ => "default",
    }
}

/// One row for each peer that serves the case, or one without a peer.
fn measure_case(
    case: &Case,
    backend: &dyn AttentionBackend,
    peers: &mut [Peer],
    arguments: &Arguments,
    threads: usize,
) -> crate::Result<Vec<Row>> {
    let mut workload = Workload::new(case.dims, case.dtype, case.work, case.causal, case.mask)?;
    let plans = match workload.plan(backend) {
        Ok(plans) => plans,
        Err(refusal) => {
            eprintln!("backend {} skipped: {refusal}", backend.name());
            return Ok(Vec::new());
        }
    };
    let path = arguments.peer_path.as_deref().unwrap_or_else(|| like(backend));
    let turns = arguments.repeats;
    let mut rows = Vec::new();
    for peer in peers {
        match peer.prepare(case, path) {
            Err(reason) => eprintln!("peer {} skipped: {reason}", peer.name),
            Ok(path) => {
                let times = measure::measure(&mut workload, &plans, Some(peer), turns)?;
                if times.peer_median_ms.is_some() {
                    rows.push((times, Some((peer.name.clone(), path))));
                }
            }
        }
    }
    if rows.is_empty() {
        rows.push((measure::measure(&mut workload, &plans, None, turns)?, None));
    }
    let Dimensions { batch, query_length, key_length, query_heads, key_heads, head_dim, value_head_dim } =
        case.dims;
    let row = |(times, peer): (measure::Times, Option<(String, String)>)| {
        let (peer, peer_path) = peer.unzip();
        Row {
            backend: backend.name().to_owned(),
            dtype: case.dtype.to_string(),
            pass: case.work.to_string(),
            b: batch,
            t: query_length,
            s: key_length,
            n: query_heads,
            k: key_heads,
            h: head_dim,
            hv: value_head_dim,
            causal: case.causal,
            mask: case.mask.to_string(),
            median_ms: times.median_ms,
            gflops: 1e-6 * workload.flops() / times.median_ms,
            scratch_bytes: plans.scratch_bytes(),
            peer,
            peer_median_ms: times.peer_median_ms,
            ratio: times.peer_median_ms.map(|ms| ms / times.median_ms),
            level: machine::level().to_owned(),
            threads,
            machine: machine::description(),
            peer_path: peer_path.unwrap_or_default(),
            peak_bytes: times.peak_bytes,
        }
    };
    Ok(rows.into_iter().map(row).collect())
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        arguments: Arguments,
    }

    fn cases_of(line: &str) -> Vec<Case> {
        cases(&Line::parse_from(["bench"].into_iter().chain(line.split_whitespace())).arguments)
    }

    #[test]
    fn the_suite_for_gpus_takes_no_option_that_it_would_ignore() {
        let parses =
            |line: &str| Line::try_parse_from(["bench"].into_iter().chain(line.split_whitespace())).is_ok();
        assert!(parses(
            "--suite gpu --dtype f32,bf16 --shape 1,256,256,4,4,64 --backend cudnn --peer torch --repeats 2 --json a \
             --record b"
        ));
        for ignored in
            ["--run-up-to 64", "--causal", "--quick", "--memory", "--pass both", "--mask bool", "--threads 1"]
        {
            assert!(!parses(&format!("--suite gpu {ignored}")), "{ignored}");
        }
    }

    #[test]
    fn options_narrow_the_shared_list() {
        let all = cases_of("");
        assert!(cases_of("--quick").len() < all.len());
        assert_eq!(cases_of("--pass forward").len() * 2, all.len());
        assert!(cases_of("--causal").iter().all(|case| case.causal && case.dims.query_length > 1));
        assert!(cases_of("--dtype f64").iter().all(|case| case.dtype == DType::F64));
    }

    #[test]
    fn shapes_of_ones_own_are_f32_unless_said_otherwise() {
        let own = cases_of("--shape 1,2,3,4,4,5 --pass both --mask bool");
        assert_eq!(own.len(), 1);
        assert_eq!((own[0].dtype, own[0].work, own[0].mask), (DType::F32, Work::Both, Mask::Bool));
        assert_eq!(cases_of("--shape 1,2,3,4,4,5 --shape 1,1,1,1,1,1 --dtype f32,bf16").len(), 8);
    }
}
