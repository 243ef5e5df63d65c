//! `cargo xtask fuzz`: random calls of every kind on the CPU backends, checked in every way that the suite
//! knows.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use attention_chunked::{ChunkedBackend, ChunkedConfig, Level};
use attention_conformance::fuzz::{Counts, Fault, Fuzz};
use attention_conformance::suite::Subject;
use attention_core::{AttentionBackend, DType, Pass};
use attention_cpu::CpuBackend;

use crate::backends::{InPool, Labelled};
use crate::reporting;

/// Faults that are printed; a run that finds more has found one of them many times.
const SHOWN: usize = 40;

/// Runs random calls on the CPU backends, at every level of the machine, and prints each fault as a test
#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// How long to run
    #[arg(long, default_value_t = 60, value_name = "N")]
    seconds: u64,
    /// The first seed; a run goes through those that follow it
    #[arg(long, default_value_t = 0, value_name = "S")]
    seed: u64,
    /// Stop after this many seeds, if the time is not up before
    #[arg(long, value_name = "N")]
    seeds: Option<u64>,
    /// A backend to run, cpu or chunked; both by default
    #[arg(long, value_name = "NAME")]
    backend: Vec<String>,
    /// A level to run the chunked backend at; every level of the machine by default
    #[arg(long, value_delimiter = ',', value_name = "L")]
    level: Vec<Level>,
    /// Numbers of threads on which every result must be bitwise the same
    #[arg(long, value_delimiter = ',', default_value = "1,2,3", value_name = "N,..")]
    threads: Vec<usize>,
    /// Seeds that run at the same time; as many as the machine has processors by default
    #[arg(long, value_name = "N")]
    jobs: Option<usize>,
}

/// A backend, and others that must give the same bits.
struct Configured {
    backend: Arc<dyn AttentionBackend>,
    same: Vec<(String, Arc<dyn AttentionBackend>)>,
}

impl Configured {
    fn new(backend: Arc<dyn AttentionBackend>, threads: &[usize]) -> crate::Result<Self> {
        let same = (threads.iter().filter(|&&count| count > 0))
            .map(|&count| {
                let pool: Arc<dyn AttentionBackend> = Arc::new(InPool::new(backend.clone(), count)?);
                Ok((format!("{count} threads"), pool))
            })
            .collect::<crate::Result<Vec<_>>>()?;
        Ok(Self { backend, same })
    }

    fn subject(&self) -> Subject<'_> {
        let subject = Subject::new(&*self.backend);
        self.same.iter().fold(subject, |subject, (label, other)| subject.same_as(label.clone(), &**other))
    }
}

/// Runs the command.
pub(crate) fn run(arguments: &Arguments) -> crate::Result {
    let backends = backends(arguments)?;
    let names: Vec<&str> = backends.iter().map(|configured| configured.backend.name()).collect();
    println!("Fuzzing {} from seed {}", names.join(", "), arguments.seed);
    let processors = std::thread::available_parallelism().map_or(1, usize::from);
    let jobs = arguments.jobs.unwrap_or(processors).max(1);
    let end = Instant::now() + Duration::from_secs(arguments.seconds);
    let last = arguments.seeds.map_or(u64::MAX, |count| arguments.seed.saturating_add(count));
    let next = AtomicU64::new(arguments.seed);
    let work = || {
        let mut fuzz = Fuzz::new(backends.iter().map(Configured::subject).collect());
        let mut faults: Vec<Fault> = Vec::new();
        while Instant::now() < end {
            let seed = next.fetch_add(1, Ordering::Relaxed);
            if seed >= last {
                break;
            }
            for fault in fuzz.seed(seed) {
                println!("\n{fault}");
                faults.push(fault);
                if faults.len() == SHOWN {
                    return (fuzz.counts().clone(), faults);
                }
            }
        }
        (fuzz.counts().clone(), faults)
    };
    let done: Vec<(Counts, Vec<Fault>)> = std::thread::scope(|scope| {
        let workers: Vec<_> = (0..jobs).map(|_| scope.spawn(work)).collect();
        workers.into_iter().map(|worker| worker.join().expect("faults are caught, not unwound")).collect()
    });
    let mut counts = Counts::default();
    done.iter().for_each(|(part, _)| counts.add(part));
    print_counts(&counts);
    let mut seeds: Vec<u64> = done.iter().flat_map(|(_, faults)| faults).map(Fault::seed).collect();
    seeds.sort_unstable();
    seeds.dedup();
    if !seeds.is_empty() {
        println!("Seeds with faults: {}", seeds.iter().map(u64::to_string).collect::<Vec<_>>().join(", "));
    }
    println!("{counts}");
    Ok(counts.faults() == 0)
}

fn backends(arguments: &Arguments) -> crate::Result<Vec<Configured>> {
    if let Some(name) = arguments.backend.iter().find(|name| !["cpu", "chunked"].contains(&name.as_str())) {
        return Err(format!("unknown backend '{name}'; possible are cpu and chunked").into());
    }
    let wanted = |name: &str| arguments.backend.is_empty() || arguments.backend.iter().any(|one| one == name);
    let mut backends = Vec::new();
    if wanted("cpu") && arguments.level.is_empty() {
        backends.push(Configured::new(Arc::new(CpuBackend::new()), &arguments.threads)?);
    }
    let levels = if arguments.level.is_empty() { &Level::ALL[..] } else { &arguments.level };
    for &level in levels.iter().filter(|_| wanted("chunked")) {
        if let Err(reason) = level.check() {
            println!("chunked at {level}: skipped, {reason}");
            continue;
        }
        let config = || ChunkedConfig::default().level(level);
        let labelled = |config: ChunkedConfig| -> Arc<dyn AttentionBackend> {
            let backend = Arc::new(ChunkedBackend::with_config(config));
            Arc::new(Labelled { label: format!("chunked at {level}"), backend })
        };
        let mut configured = Configured::new(labelled(config()), &arguments.threads)?;
        let smallest = labelled(config().query_chunk(1).budget(1));
        configured.same.push(("the smallest chunks".to_owned(), smallest));
        backends.push(configured);
    }
    if backends.is_empty() {
        return Err("no backend is left by these options".into());
    }
    Ok(backends)
}

fn print_counts(counts: &Counts) {
    let header = ["dtype", "pass", "cases", "refused", "elements", "bitwise", "faults"].map(str::to_owned);
    let rows: Vec<Vec<String>> = (DType::FLOATS.into_iter())
        .flat_map(|dtype| [Pass::Forward, Pass::Backward].map(|pass| (dtype, pass)))
        .map(|(dtype, pass)| {
            let count = counts.get(dtype, pass);
            vec![
                dtype.to_string(),
                pass.to_string(),
                count.cases.to_string(),
                count.skipped.to_string(),
                count.elements.to_string(),
                count.bitwise.to_string(),
                count.faults.to_string(),
            ]
        })
        .collect();
    reporting::print_cells(&header, &rows);
}
