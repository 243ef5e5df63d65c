//! `cargo xtask graphs`: whether cuDNN takes the graphs of all problems of the suite that its backend serves, asked on a
//! machine that need not have a GPU.

use std::collections::{BTreeMap, HashSet};
use std::path::PathBuf;

use attention_conformance::suite::Suite;
use attention_core::{DType, FeatureSet, Pass};
use attention_cudnn::{Answer, CudnnConfig, Offline};

/// Asks cuDNN about the graphs of the suite's problems, for a device that is described and need not be there
#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// The device's properties, as cuDNN writes them in JSON
    #[arg(long, value_name = "FILE")]
    device: PathBuf,
    /// The device's compute capability
    #[arg(long, default_value = "9.0", value_parser = parse_capability, value_name = "MAJOR.MINOR")]
    capability: (u32, u32),
    /// Only cases whose name contains this
    #[arg(long, value_name = "S")]
    filter: Option<String>,
    /// Ask about every problem, not only about the first of each set of features: every answer is a compilation
    #[arg(long)]
    all: bool,
}

fn parse_capability(text: &str) -> Result<(u32, u32), String> {
    let parts = text.split_once('.').and_then(|(a, b)| Some((a.parse().ok()?, b.parse().ok()?)));
    parts.ok_or_else(|| format!("'{text}' is no compute capability such as 9.0"))
}

/// Runs the command.
pub(crate) fn run(arguments: &Arguments) -> crate::Result {
    let properties = std::fs::read_to_string(&arguments.device)
        .map_err(|error| format!("{}: {error}", arguments.device.display()))?;
    let config = CudnnConfig::default().rounds_group_gradients(true);
    let offline = Offline::new(config, &properties, arguments.capability)?;
    println!("{}", offline.target());
    let mut suite = Suite::new();
    if let Some(filter) = &arguments.filter {
        suite = suite.filter(filter);
    }
    let (mut asked, mut kinds) = (HashSet::new(), HashSet::new());
    let mut refusals: BTreeMap<String, (usize, String)> = BTreeMap::new();
    let (mut accepted, mut failed, mut skipped) = (0, 0, 0);
    for dtype in [DType::Bf16, DType::F16] {
        for case in suite.cases() {
            let data = case.data(dtype);
            for pass in [Pass::Forward, Pass::Backward] {
                let problem = case.problem(&data, pass, FeatureSet::all())?;
                if let Err(refusal) = offline.serves(&problem) {
                    skipped += 1;
                    let (count, _) =
                        refusals.entry(refusal.to_string()).or_insert_with(|| (0, case.name.clone()));
                    *count += 1;
                    continue;
                }
                let kind: Vec<_> = problem.features().iter().collect();
                if !arguments.all && !kinds.insert((dtype, pass, kind)) || !asked.insert(problem.clone()) {
                    continue;
                }
                match offline.ask(&problem) {
                    Ok(Answer::Accepted { .. }) => accepted += 1,
                    Ok(_) => {
                        failed += 1;
                        println!("{}: no engine for {problem}", case.name);
                    }
                    Err(error) => {
                        failed += 1;
                        println!("{}: {error} for {problem}", case.name);
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
