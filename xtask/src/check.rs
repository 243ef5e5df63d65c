//! `cargo xtask check`: everything that CI checks besides the tests.

use std::time::{Duration, Instant};

use crate::cargo::{self, Workspace};
use crate::{features, trees};

/// Checks formatting, lints, docs, features, dependencies and packages
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
    step("packages", &mut || package(arguments.allow_dirty))?;

    println!();
    for (name, time, passed) in &steps {
        println!("{name:<14}{:<8}{:>6.1} s", if *passed { "passed" } else { "FAILED" }, time.as_secs_f64());
    }
    Ok(steps.iter().all(|&(_, _, passed)| passed))
}

/// Packages every published crate, and builds each from its package and those of its siblings.
///
/// In a folder of its own each time: Cargo keeps what it has unpacked of a sibling by the folder and the version, so
/// that in the same folder it would build against the sibling of an earlier run.
fn package(allow_dirty: bool) -> crate::Result {
    let folder = cargo::root().join(format!("target/package-check-{}", std::process::id()));
    let mut command = cargo::command(["package", "--quiet"]);
    command.arg("--target-dir").arg(&folder);
    for package in Workspace::read()?.published() {
        command.args(["-p", &package.name]);
    }
    if allow_dirty {
        command.arg("--allow-dirty");
    }
    let packaged = cargo::run(&mut command);
    // What is left of it is in nobody's way, so failing to remove it is no failure.
    let _ = std::fs::remove_dir_all(&folder);
    packaged
}
