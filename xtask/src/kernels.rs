//! `cargo xtask kernels`: every CUDA source compiled for every architecture, on a machine that needs no GPU.

use std::path::PathBuf;

use attention_cuda::{Compiled, KernelError, Nvrtc};
use attention_kernels::{SOURCES, Source};
use rayon::prelude::*;

use crate::reporting;

/// Compiles every variant of every CUDA source with NVRTC, which needs no GPU
#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// An architecture, as NVRTC names it
    #[arg(long, value_delimiter = ',', default_values = ["sm_80", "sm_90a", "sm_100"], value_name = "ARCH")]
    arch: Vec<String>,
    /// A site-packages folder in whose wheels NVRTC is looked for, where the loader does not find it
    #[arg(long, value_name = "DIR")]
    wheel_root: Vec<PathBuf>,
    /// Fail where NVRTC is missing
    #[arg(long)]
    require: bool,
}

/// One thing to compile.
struct Job<'a> {
    source: &'a Source,
    defines: Vec<String>,
    arch: &'a str,
}

/// Runs the command.
pub(crate) fn run(arguments: &Arguments) -> crate::Result {
    let jobs = jobs(SOURCES, &arguments.arch);
    let nvrtc = match Nvrtc::open(&arguments.wheel_root) {
        Ok(nvrtc) => nvrtc,
        Err(missing) => {
            println!("NVRTC was not found ({}); looked for:", missing.what);
            reporting::print_lines(missing.looked_for.iter().map(|place| format!("  {place}")));
            println!("{}", closing(0, 0, jobs.len()));
            return Ok(!arguments.require);
        }
    };
    let (major, minor) = nvrtc.version();
    println!("NVRTC {major}.{minor}, {}", nvrtc.place());

    let (mut rows, mut remarks, mut failed) = (Vec::new(), Vec::new(), 0);
    // Jobs take from a fraction of a second to some seconds, so the threads take them one by one.
    let outcomes: Vec<_> = jobs.par_iter().with_max_len(1).map(|job| job.compile(&nvrtc)).collect();
    for (job, outcome) in jobs.iter().zip(outcomes) {
        let [ms, bytes] = match &outcome {
            Ok(Compiled { ptx, time, .. }) => {
                [format!("{:.0}", time.as_secs_f64() * 1e3), ptx.len().to_string()]
            }
            Err(_) => ["-".to_owned(), "FAILED".to_owned()],
        };
        rows.push(vec![job.source.name.to_owned(), job.defines.join(" "), job.arch.to_owned(), ms, bytes]);
        match outcome {
            Ok(Compiled { log, .. }) if log.is_empty() => {}
            Ok(Compiled { log, .. }) => remarks.push(format!("{}: {log}", job.label())),
            Err(message) => {
                failed += 1;
                remarks.push(format!("{}: {message}", job.label()));
            }
        }
    }
    reporting::print_cells(&["source", "macros", "arch", "ms", "PTX bytes"].map(str::to_owned), &rows);
    reporting::print_lines(remarks);
    println!("{}", closing(jobs.len() - failed, failed, 0));
    Ok(failed == 0)
}

impl Job<'_> {
    fn label(&self) -> String {
        format!("{} {} {}", self.source.name, self.defines.join(" "), self.arch)
    }

    /// Compiles it; what is wrong with it otherwise.
    fn compile(&self, nvrtc: &Nvrtc) -> Result<Compiled, String> {
        let Self { source, defines, arch } = self;
        let compiled = nvrtc.compile(source, arch, defines).map_err(|error| match error {
            KernelError::Compile { message, .. } => message,
            error => error.to_string(),
        })?;
        let missing = missing(source, &compiled.ptx);
        if !missing.is_empty() {
            return Err(format!("the PTX has no entry point {}", missing.join(", ")));
        }
        let unbounded = unbounded(source, defines, &compiled.ptx);
        if !unbounded.is_empty() {
            return Err(format!("no BLOCK among the macros bounds the threads of {}", unbounded.join(", ")));
        }
        Ok(compiled)
    }
}

/// Every variant of every source, for every architecture.
fn jobs<'a>(sources: &'a [Source], archs: &'a [String]) -> Vec<Job<'a>> {
    (sources.iter())
        .flat_map(|source| source.variants.iter().map(move |variant| (source, variant)))
        .flat_map(|(source, variant)| {
            archs.iter().map(move |arch| Job { source, defines: variant.defines(), arch })
        })
        .collect()
}

/// What the PTX has behind the name of an entry point where it declares it.
fn after_entry<'a>(ptx: &'a str, name: &str) -> Option<&'a str> {
    let entries = ptx.split(".entry ").skip(1);
    entries.filter_map(|after| after.strip_prefix(name)).find(|rest| rest.starts_with('('))
}

/// The entry points of a source that its PTX lacks.
fn missing(source: &Source, ptx: &str) -> Vec<&'static str> {
    source.entry_points.iter().copied().filter(|name| after_entry(ptx, name).is_none()).collect()
}

/// The entry points whose bound on the threads of a block is not that of a macro `BLOCK=` or `.._BLOCK=`,
/// with which the host launches them: a kernel with another bound might not start.
fn unbounded(source: &Source, defines: &[String], ptx: &str) -> Vec<&'static str> {
    let blocks: Vec<&str> = (defines.iter())
        .filter_map(|define| define.split_once('='))
        .filter(|(name, _)| name.ends_with("BLOCK"))
        .map(|(_, threads)| threads)
        .collect();
    let is_bounded = |name: &str| {
        let head = after_entry(ptx, name).and_then(|after| after.split_once('{')).map(|(head, _)| head);
        let bound = head.and_then(|head| head.split_once(".maxntid ")).map(|(_, bound)| bound);
        let threads = bound.and_then(|bound| bound.split([',', '\n', ' ']).next());
        threads.is_some_and(|threads| blocks.contains(&threads.trim()))
    };
    source.entry_points.iter().copied().filter(|name| !is_bounded(name)).collect()
}

/// The line that `.ci/run` reads.
fn closing(passed: usize, failed: usize, skipped: usize) -> String {
    format!("{passed} passed, {failed} failed, {skipped} skipped")
}

#[cfg(test)]
mod tests {
    use attention_kernels::{Helper, Variant};

    use super::*;

    const SOURCE: Source = Source {
        name: "a.cu",
        text: "",
        entry_points: &["forward", "backward"],
        variants: &[
            Variant::Helper(Helper::LAUNCHED),
            Variant::Helper(Helper { threads: 32, summing_threads: 64 }),
        ],
    };

    #[test]
    fn every_variant_is_compiled_for_every_architecture() {
        let archs = ["sm_80".to_owned(), "sm_90a".to_owned()];
        let labels: Vec<_> = jobs(&[SOURCE], &archs).iter().map(Job::label).collect();
        assert_eq!(
            labels,
            [
                "a.cu BLOCK=128 SUMMING_BLOCK=256 sm_80",
                "a.cu BLOCK=128 SUMMING_BLOCK=256 sm_90a",
                "a.cu BLOCK=32 SUMMING_BLOCK=64 sm_80",
                "a.cu BLOCK=32 SUMMING_BLOCK=64 sm_90a"
            ]
        );
    }

    #[test]
    fn the_bound_of_a_kernel_is_what_it_is_launched_with() {
        let of = |threads: &str| {
            let entry = |name: &str| {
                format!(".visible .entry {name}(\n.param .u64 a\n)\n.maxntid {threads}\n{{\n}}\n")
            };
            unbounded(
                &SOURCE,
                &["ROWS=64", "BLOCK=384"].map(str::to_owned),
                &(entry("forward") + &entry("backward")),
            )
        };
        assert_eq!(of("384, 1, 1"), Vec::<&str>::new());
        assert_eq!(of("384"), Vec::<&str>::new());
        // As the kernel that merged parts of keys had it.
        assert_eq!(of("256, 1, 1"), ["forward", "backward"]);
        let ptx = ".visible .entry forward(\n)\n{\n}\n.visible .entry backward(\n)\n.maxntid 384\n{\n}";
        assert_eq!(unbounded(&SOURCE, &["BLOCK=384".to_owned()], ptx), ["forward"]);
    }

    #[test]
    fn every_entry_point_is_in_the_ptx() {
        let ptx = ".visible .entry forward(\n.param .u64 a\n)\n.visible .entry backward_of_another(\n)";
        assert_eq!(missing(&SOURCE, ptx), ["backward"]);
        assert_eq!(missing(&SOURCE, &ptx.replace("_of_another", "")), Vec::<&str>::new());
    }

    #[test]
    fn the_closing_line_is_that_of_the_suites() {
        let totals = attention_conformance::report::Totals { passed: 3, failed: 0, skipped: 1 };
        assert_eq!(closing(3, 0, 1), totals.to_string());
    }
}
