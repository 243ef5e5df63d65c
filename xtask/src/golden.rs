//! `cargo xtask golden`: stored cases with results of other implementations.

use std::path::{Path, PathBuf};
use std::process::Command;

use attention_conformance::golden::{GoldenSet, own_sets};
use attention_core::DType;

use crate::backends::{self, parse_dtype};
use crate::{cargo, reporting};

/// Runs golden sets, or regenerates the project's own and compares
#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// A directory with a manifest.json; the project's own sets by default
    #[arg(long, value_name = "DIR", conflicts_with = "check")]
    dir: Vec<PathBuf>,
    /// A backend to run; all by default
    #[arg(long, value_name = "NAME", conflicts_with = "check")]
    backend: Vec<String>,
    /// A dtype to run: f64, f32, f16 or bf16; all by default
    #[arg(long, value_parser = parse_dtype, value_delimiter = ',', value_name = "D", conflicts_with = "check")]
    dtype: Vec<DType>,
    /// Only cases whose name contains this
    #[arg(long, value_name = "S", conflicts_with = "check")]
    filter: Option<String>,
    /// Make the project's own sets anew with Python and compare them with the stored ones
    #[arg(long)]
    check: bool,
    /// The Python that --check runs
    #[arg(long, env = "ATTENTION_PYTHON", default_value = "python3", value_name = "PATH")]
    python: PathBuf,
}

/// Runs the command.
pub(crate) fn run(arguments: &Arguments) -> crate::Result {
    if arguments.check {
        return check(&arguments.python);
    }
    let backends = backends::at_every_level(backends::named(&arguments.backend)?);
    let dtypes = if arguments.dtype.is_empty() { &DType::FLOATS[..] } else { &arguments.dtype };
    let dirs = if arguments.dir.is_empty() { own_sets() } else { arguments.dir.clone() };
    // Opened before anything runs: an unknown key in the last one should not cost a run of the others.
    let sets =
        (dirs.into_iter()).map(|dir| Ok((GoldenSet::open(&dir)?, dir))).collect::<crate::Result<Vec<_>>>()?;

    let mut all = Vec::new();
    for (set, dir) in &sets {
        let reports: Vec<_> = (backends.iter())
            .map(|backend| {
                let bar = reporting::Bar::new(backend.name());
                set.run(&**backend, dtypes, arguments.filter.as_deref(), |progress| bar.show(progress))
            })
            .collect();
        let shown = dir.strip_prefix(cargo::root()).unwrap_or(dir).display();
        println!("{shown}, {} cases: worst error as a fraction of its bound, by feature:", set.len());
        reporting::print_table(&reports);
        reports.iter().for_each(reporting::print_details);
        all.extend(reports);
    }
    if all.iter().all(|report| report.results.is_empty()) {
        return Err("no case was run: the sets are empty, or the filter matches nothing".into());
    }
    Ok(reporting::close(&all))
}

/// Runs the script that made the project's sets. It says itself what it has to skip, and why.
fn check(python: &Path) -> crate::Result {
    let folder = cargo::root().join("crates/attention-conformance/golden");
    let mut command = Command::new(python);
    command.arg(folder.join("generate.py")).arg("--check").arg(&folder);
    match command.status() {
        Ok(status) => Ok(status.success()),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            println!("golden --check skipped: there is no {}", python.display());
            Ok(true)
        }
        Err(error) => Err(format!("{} cannot be run: {error}", python.display()).into()),
    }
}
