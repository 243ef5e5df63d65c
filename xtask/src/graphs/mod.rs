//! `cargo xtask graphs`: whether cuDNN takes the graphs of all problems of the suite that its backend serves,
//! asked on a machine that need not have a GPU.

use std::collections::{BTreeMap, HashSet};
use std::path::{Path, PathBuf};
use std::process::Command;

use attention_conformance::suite::Suite;
use attention_core::{DType, FeatureSet};
use attention_cudnn::{Answer, CudnnConfig, Offline};

use crate::backends::parse_dtype;
use crate::cargo;

/// Asks cuDNN about the graphs of the suite's problems, for a device that is described and need not be there
#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// The device's properties, as cuDNN writes them in JSON; those of an H200 by default
    #[arg(long, value_name = "FILE")]
    device: Option<PathBuf>,
    /// A `site-packages` folder with the wheels of cuDNN, cuBLAS and NVRTC: the command runs again with their
    /// libraries, and with a stand-in for the CUDA driver that it compiles with `cc`
    #[arg(long, value_name = "DIR")]
    wheels: Option<PathBuf>,
    /// The device's compute capability
    #[arg(long, default_value = "9.0", value_parser = parse_capability, value_name = "MAJOR.MINOR")]
    capability: (u32, u32),
    /// Only cases whose name contains this
    #[arg(long, value_name = "S")]
    filter: Option<String>,
    /// A dtype to ask about: f16 or bf16; both by default
    #[arg(long, value_parser = parse_dtype, value_delimiter = ',', value_name = "D")]
    dtype: Vec<DType>,
    /// Ask about every problem, not only about the first of each set of features: every answer is a
    /// compilation
    #[arg(long)]
    all: bool,
}

fn parse_capability(text: &str) -> Result<(u32, u32), String> {
    let parts = text.split_once('.').and_then(|(a, b)| Some((a.parse().ok()?, b.parse().ok()?)));
    parts.ok_or_else(|| format!("'{text}' is no compute capability such as 9.0"))
}

/// The properties of an H200.
const H200: &str = include_str!("../../../crates/attention-cudnn/tests/devices/h200.json");

/// Runs this command again, with the libraries of these wheels and a stand-in for the driver in the loader's
/// path: it is read when a process starts.
fn again_with(wheels: &Path) -> crate::Result {
    let scratch = cargo::root().join("target/graphs");
    std::fs::create_dir_all(&scratch)?;
    let source = scratch.join("driver.c");
    std::fs::write(&source, include_str!("driver.c"))?;
    let compiled = Command::new("cc")
        .args(["-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o"])
        .arg(scratch.join("libcuda.so.1"))
        .arg(&source)
        .status();
    if !compiled.map_err(|error| format!("cc does not start: {error}"))?.success() {
        return Err("cc does not compile the stand-in for the CUDA driver".into());
    }
    let mut folders = vec![scratch];
    let packages = wheels.join("nvidia");
    let listed = std::fs::read_dir(&packages).map_err(|error| format!("{}: {error}", packages.display()))?;
    for package in listed {
        folders.push(package?.path().join("lib"));
    }
    folders.extend(std::env::var_os("LD_LIBRARY_PATH").iter().flat_map(std::env::split_paths));
    let mut arguments = std::env::args_os().skip(1).peekable();
    let mut kept = Vec::new();
    while let Some(argument) = arguments.next() {
        if argument == "--wheels" {
            arguments.next();
        } else if !argument.to_string_lossy().starts_with("--wheels=") {
            kept.push(argument);
        }
    }
    let status = Command::new(std::env::current_exe()?)
        .args(kept)
        .env("LD_LIBRARY_PATH", std::env::join_paths(folders)?)
        .status()?;
    Ok(status.success())
}

/// Runs the command.
pub(crate) fn run(arguments: &Arguments) -> crate::Result {
    if let Some(wheels) = &arguments.wheels {
        return again_with(wheels);
    }
    let properties = match &arguments.device {
        None => H200.to_owned(),
        Some(path) => {
            std::fs::read_to_string(path).map_err(|error| format!("{}: {error}", path.display()))?
        }
    };
    let config = CudnnConfig::default().rounds_group_gradients(true);
    let offline = Offline::new(config.clone(), &properties, arguments.capability)?;
    // Dropout has a second form, which only its configuration asks for.
    let own_dropout = Offline::new(config.own_dropout(true), &properties, arguments.capability)?;
    println!("{}", offline.target());
    let mut suite = Suite::new();
    if let Some(filter) = &arguments.filter {
        suite = suite.filter(filter);
    }
    let (mut asked, mut kinds) = (HashSet::new(), HashSet::new());
    let mut refusals: BTreeMap<String, (usize, String)> = BTreeMap::new();
    let (mut accepted, mut failed, mut skipped) = (0, 0, 0);
    for dtype in [DType::Bf16, DType::F16] {
        if !arguments.dtype.is_empty() && !arguments.dtype.contains(&dtype) {
            continue;
        }
        for case in suite.cases() {
            let data = case.data(dtype);
            for &pass in case.passes() {
                let problem = case.problem(&data, pass, FeatureSet::all())?;
                if let Err(refusal) = offline.serves(&problem) {
                    skipped += 1;
                    let (count, _) = refusals.entry(refusal.rule()).or_insert_with(|| (0, case.name.clone()));
                    *count += 1;
                    continue;
                }
                let kind: Vec<_> = problem.features().iter().collect();
                if !arguments.all && !kinds.insert((dtype, pass, kind)) || !asked.insert(problem.clone()) {
                    continue;
                }
                let forms = [(&offline, ""), (&own_dropout, " by cuDNN's own dropout")];
                let count = if problem.dropout_rate().is_some() { 2 } else { 1 };
                let forms = forms.into_iter().take(count);
                for (asked, how) in forms.filter(|(asked, _)| asked.serves(&problem).is_ok()) {
                    match asked.ask(&problem) {
                        Ok(Answer::Accepted { .. }) => accepted += 1,
                        Ok(_) => {
                            failed += 1;
                            println!("{}: no engine for {problem}{how}", case.name);
                        }
                        Err(error) => {
                            failed += 1;
                            println!("{}: {error} for {problem}{how}", case.name);
                        }
                    }
                }
            }
        }
    }
    println!("What the backend refuses itself, so that cuDNN is not asked:");
    for (refusal, (count, example)) in refusals {
        println!("{count:5}  {refusal} (such as {example})");
    }
    println!("{accepted} passed, {failed} failed, {skipped} skipped");
    Ok(failed == 0)
}
