//! `cargo xtask features`: every crate with none of its features, with each alone, and with all; and the
//! tests of the facade in the builds that its users have.

use std::time::Instant;

use crate::cargo::{self, Package, Workspace};
use crate::reporting;

/// Builds every crate with no feature, each feature alone, and all features
#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// Run the tests of the facade in each instead, and with its default features; prints a table
    #[arg(long)]
    pub(crate) test: bool,
}

/// Runs the command.
pub(crate) fn run(arguments: &Arguments) -> crate::Result {
    let workspace = Workspace::read()?;
    if arguments.test {
        return test(&workspace);
    }
    let mut passed = true;
    for package in workspace.published() {
        for choice in choices(package) {
            // Clippy rather than check, because it can deny warnings without a build of its own.
            let mut command = cargo::command(["clippy", "--quiet", "-p", &package.name]);
            command.args(choice).args(["--", "-D", "warnings"]);
            passed &= cargo::run(&mut command)?;
        }
    }
    Ok(passed)
}

/// Features that build with CUDA's compiler only; `candle_features` checks them with a stand-in for it.
pub(crate) const NEED_NVCC: &[(&str, &str)] =
    &[("attention-candle", "cuda"), ("attention-candle-examples", "cuda")];

/// Cargo's options for every choice of features.
fn choices(package: &Package) -> Vec<Vec<String>> {
    const NONE: &str = "--no-default-features";
    let needs_nvcc = |feature: &str| NEED_NVCC.contains(&(package.name.as_str(), feature));
    let alone = (package.features.keys())
        .filter(|feature| *feature != "default" && !needs_nvcc(feature))
        .map(|feature| vec![NONE.to_owned(), "--features".to_owned(), feature.clone()]);
    let mut choices = vec![vec![NONE.to_owned()]];
    choices.extend(alone);
    // One feature alone is all of them, and a package without features has been built above.
    if choices.len() > 2 {
        choices.push(vec!["--all-features".to_owned()]);
    }
    choices
}

/// The crate whose tests run in every build, and the Cargo profile that they are compiled in.
const FACADE: &str = "attention";
const PROFILE: &str = "features";

/// A test of the facade that needs smaller stack frames than unoptimised code has; `cargo test` runs it.
const NEEDS_OPTIMISATION: &str = "calls_run_on_a_small_stack";

/// Runs the facade's tests in every build.
fn test(workspace: &Workspace) -> crate::Result {
    let mut passed = true;
    let mut rows = Vec::new();
    for choice in builds(workspace)? {
        let start = Instant::now();
        let mut command = cargo::command(["test", "--quiet", "--profile", PROFILE, "-p", FACADE]);
        // Not the examples, which `check` builds, nor doctests, which are for the default features.
        command.args(["--lib", "--tests"]).args(&choice).args(["--", "--skip", NEEDS_OPTIMISATION]);
        let (succeeded, printed) = cargo::captured(&mut command)?;
        if !succeeded {
            println!("{printed}");
        }
        let counts = Counts::of(&printed);
        let verdict = if succeeded { "passed" } else { "FAILED" };
        rows.push(vec![
            named(&choice),
            verdict.to_owned(),
            counts.passed.to_string(),
            counts.failed.to_string(),
            format!("{:.1}", start.elapsed().as_secs_f64()),
        ]);
        passed &= succeeded;
    }
    let header = ["features of attention", "", "passed", "failed", "s"].map(str::to_owned);
    reporting::print_cells(&header, &rows);
    Ok(passed)
}

/// Cargo's options for every build of the facade that is tested: those that are checked, and the default one.
fn builds(workspace: &Workspace) -> crate::Result<Vec<Vec<String>>> {
    let facade = workspace.packages.iter().find(|package| package.name == FACADE).ok_or("no facade")?;
    let mut all = choices(facade);
    all.insert(1, Vec::new());
    Ok(all)
}

/// A choice of features in words.
fn named(choice: &[String]) -> String {
    match choice {
        [] => "default".to_owned(),
        [one] => one.trim_start_matches("--").replace("no-default-features", "none"),
        [.., feature] => feature.clone(),
    }
}

/// How many tests passed and failed, over all of a run's test programs.
#[derive(Debug, Default, PartialEq)]
struct Counts {
    passed: usize,
    failed: usize,
}

impl Counts {
    fn of(printed: &str) -> Self {
        let results = printed.lines().filter_map(|line| line.split_once("test result: "));
        results.fold(Self::default(), |counts, (_, result)| {
            let of = |what: &str| {
                let part = result.split(['.', ';']).map(str::trim).find(|part| part.ends_with(what));
                part.and_then(|part| part.split(' ').next()?.parse::<usize>().ok()).unwrap_or(0)
            };
            Self { passed: counts.passed + of(" passed"), failed: counts.failed + of(" failed") }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn features_are_taken_alone_none_and_all() {
        let workspace = Workspace::read().unwrap();
        let of = |name: &str| {
            let package = workspace.packages.iter().find(|package| package.name == name).unwrap();
            choices(package).into_iter().map(|choice| choice.join(" ")).collect::<Vec<_>>()
        };
        assert_eq!(of("attention-core"), ["--no-default-features", "--no-default-features --features serde"]);
        assert!(
            of("attention-candle").iter().all(|choice| !choice.contains("cuda") && !choice.contains("all"))
        );
        let facade = of("attention");
        assert_eq!(facade.first().unwrap(), "--no-default-features");
        assert_eq!(facade.last().unwrap(), "--all-features");
        assert!(facade.contains(&"--no-default-features --features cpu".to_owned()), "{facade:?}");
    }

    #[test]
    fn the_facade_is_tested_in_the_builds_that_users_have() {
        let builds = builds(&Workspace::read().unwrap()).unwrap();
        let names: Vec<String> = builds.iter().map(|choice| named(choice)).collect();
        for name in
            ["none", "default", "chunked", "cpu", "cuda", "ndarray", "dlpack", "serde", "all-features"]
        {
            assert!(names.iter().any(|other| other == name), "{name} is not in {names:?}");
        }
    }

    #[test]
    fn tests_are_counted_over_programs() {
        let printed = "....\ntest result: ok. 13 passed; 0 failed; 1 ignored; finished in 0.1s\n\
                       test result: FAILED. 46 passed; 2 failed; 0 ignored; finished in 0.1s\n";
        assert_eq!(Counts::of(printed), Counts { passed: 59, failed: 2 });
    }
}
