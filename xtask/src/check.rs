//! `cargo xtask check`: everything that CI checks besides the tests.

use std::time::{Duration, Instant};

use crate::{
    bench, candle_features, capabilities, cargo, circles, dependencies, features, members, packages,
    unsafe_sites,
};

/// Checks formatting, lints, docs, features, dependencies, circles of files, packages, and the build with
/// candle's features
#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// Package crates whose files are not committed
    #[arg(long)]
    allow_dirty: bool,
}

/// Runs cargo on the workspace with all features, and after it on each package that has a feature which needs
/// CUDA's compiler, without that.
fn with_all_features(
    words: [&str; 3],
    last: &[&str],
    run: &mut dyn FnMut(&mut std::process::Command) -> crate::Result,
) -> crate::Result {
    let mut command = cargo::command(words);
    command.args(["--workspace", "--all-features"]);
    for (package, _) in features::NEED_NVCC {
        command.args(["--exclude", package]);
    }
    let mut passed = run(command.args(last))?;
    for (package, _) in features::NEED_NVCC {
        passed &= run(cargo::command(words).args(["-p", package]).args(last))?;
    }
    Ok(passed)
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
        with_all_features(["clippy", "--quiet", "--all-targets"], &["--", "-D", "warnings"], &mut |command| {
            cargo::run(command)
        })
    })?;
    step("docs", &mut || {
        with_all_features(["doc", "--quiet", "--no-deps"], &[], &mut |command| {
            cargo::run(command.env("RUSTDOCFLAGS", "-D warnings"))
        })
    })?;
    step("documents", &mut || {
        Ok(capabilities::run(&capabilities::Arguments { check: true })?
            & unsafe_sites::run(&unsafe_sites::Arguments { check: true })?
            & members::check()?
            & bench::plot::run(true)?)
    })?;
    step("features", &mut || features::run(&features::Arguments { test: false }))?;
    step("dependencies", &mut dependencies::check)?;
    step("circles", &mut circles::check)?;
    step("packages", &mut || packages::check(arguments.allow_dirty))?;
    step("candle", &mut candle_features::check)?;

    println!();
    for (name, time, passed) in &steps {
        println!("{name:<14}{:<8}{:>6.1} s", if *passed { "passed" } else { "FAILED" }, time.as_secs_f64());
    }
    Ok(steps.iter().all(|&(_, _, passed)| passed))
}
