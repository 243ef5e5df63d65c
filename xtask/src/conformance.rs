//! `cargo xtask conformance`: the generated cases on every backend.

use std::path::PathBuf;
use std::sync::Arc;

use attention_conformance::report::Report;
use attention_conformance::suite::{Subject, Suite};
use attention_core::{AttentionBackend, DType, Pass};

use crate::backends::{self, InPool, parse_dtype, parse_pass};
use crate::reporting;

/// Runs the conformance suite, on every instruction set that a backend has kernels for
#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// A backend to run; all by default
    #[arg(long, value_name = "NAME")]
    backend: Vec<String>,
    /// A dtype to run: f64, f32, f16 or bf16; all by default
    #[arg(long, value_parser = parse_dtype, value_delimiter = ',', value_name = "D")]
    dtype: Vec<DType>,
    /// A pass to run: forward or backward; both by default
    #[arg(long, value_parser = parse_pass)]
    pass: Option<Pass>,
    /// Only cases whose name contains this
    #[arg(long, value_name = "S")]
    filter: Option<String>,
    /// Print the names of the cases, and run nothing
    #[arg(long)]
    list: bool,
    /// Write every result to this file as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Write a page with tables and plots to this file
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,
    /// Numbers of threads on which every result must be bitwise the same
    #[arg(long, value_delimiter = ',', default_value = "1,2,3", value_name = "N,..")]
    threads: Vec<usize>,
}

/// Runs the command.
pub(crate) fn run(arguments: &Arguments) -> crate::Result {
    let mut suite = Suite::new();
    if !arguments.dtype.is_empty() {
        suite = suite.dtypes(arguments.dtype.iter().copied());
    }
    if let Some(pass) = arguments.pass {
        suite = suite.passes([pass]);
    }
    if let Some(filter) = &arguments.filter {
        suite = suite.filter(filter);
    }
    let runs = suite.list();
    if runs.is_empty() {
        return Err("no case is left by these options; --list shows them".into());
    }
    if arguments.list {
        reporting::print_lines(runs);
        return Ok(true);
    }

    // Before minutes of work whose result could not be written.
    reporting::make_folders_of(
        [&arguments.json, &arguments.html].into_iter().flatten().map(PathBuf::as_path),
    )?;
    let named = backends::named(&arguments.backend)?;
    // A level that the processor lacks is part of the report, with every case skipped.
    let missing: Vec<Report> = (backends::missing_levels(&named).iter())
        .map(|(label, version, reason)| suite.skipped(label, version, reason))
        .collect();
    let backends = backends::at_every_level(named);
    let mut reports = (backends.iter())
        .map(|backend| run_backend(&suite, backend, &arguments.threads))
        .collect::<crate::Result<Vec<Report>>>()?;
    reports.extend(missing);
    if let Some(path) = &arguments.json {
        reporting::write_asked_for(path, &attention_conformance::report::json(&reports))?;
    }
    if let Some(path) = &arguments.html {
        reporting::write_asked_for(path, &attention_conformance::report::html(&reports))?;
    }
    println!("Worst error as a fraction of its bound, by feature:");
    reporting::print_table(&reports);
    let covered = reporting::print_variants(&reports);
    reports.iter().for_each(reporting::print_details);
    Ok(reporting::close(&reports) && covered)
}

fn run_backend(
    suite: &Suite,
    backend: &Arc<dyn AttentionBackend>,
    threads: &[usize],
) -> crate::Result<Report> {
    // 0 would stand for all of the machine's threads, which is what the backend itself has.
    let pools = (threads.iter().filter(|&&count| count > 0))
        .map(|&count| Ok((format!("{count} threads"), InPool::new(backend.clone(), count)?)))
        .collect::<crate::Result<Vec<_>>>()?;
    let subject = if backends::computes_on_a_device(backend) {
        Subject::new(&**backend).computes_on_a_device()
    } else {
        (pools.iter())
            .fold(Subject::new(&**backend), |subject, (label, pool)| subject.same_as(label.clone(), pool))
    };
    let bar = reporting::Bar::new(backend.name());
    Ok(suite.run(subject, |progress| bar.show(progress)))
}
