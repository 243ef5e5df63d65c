//! `cargo xtask check`: everything that CI checks besides the tests.

use std::time::{Duration, Instant};

use crate::{cargo, features, packages, trees, united};

/// Checks formatting, lints, docs, features, dependencies, packages, and the build beside candle
#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// Package crates whose files are not committed
    #[arg(long)]
    allow_dirty: bool,
}

/// Runs the command: every step, whether or not the ones before passed.
pub(crate) fn run(arguments: &Arguments) -> crate::Result {
    let mut steps: Vec<(&str, Duration, bool)> = Vec::new();
    let mut step = |name, run: &mut dyn FnMut() -> crate::Result| -> crate::Result<()> {
        println!("== {name}");
        let start = Instant::now();
        let passed = run()?;
        steps.push((name, start.elapsed(), passed));
        Ok(())
    };
    step("format", &mut || cargo::run(&mut cargo::command(["fmt", "--all", "--check"])))?;
    step("lints", &mut || {
        let words = "clippy --quiet --workspace --all-targets --all-features -- -D warnings";
        cargo::run(&mut cargo::command(words.split(' ')))
    })?;
    step("docs", &mut || {
        let words = "doc --quiet --workspace --no-deps --all-features";
        cargo::run(cargo::command(words.split(' ')).env("RUSTDOCFLAGS", "-D warnings"))
    })?;
    step("features", &mut || features::run(&features::Arguments {}))?;
    step("dependencies", &mut trees::check)?;
    step("packages", &mut || packages::check(arguments.allow_dirty))?;
    step("united", &mut united::check)?;

    println!();
    for (name, time, passed) in &steps {
        println!("{name:<14}{:<8}{:>6.1} s", if *passed { "passed" } else { "FAILED" }, time.as_secs_f64());
    }
    Ok(steps.iter().all(|&(_, _, passed)| passed))
}
