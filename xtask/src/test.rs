//! `cargo xtask test`: what the README names.

use crate::cargo;

/// Runs all tests: the same as `cargo test --workspace`
#[derive(clap::Args)]
pub(crate) struct Arguments {}

/// Runs the command.
pub(crate) fn run(_: &Arguments) -> crate::Result {
    cargo::run(&mut cargo::command(["test", "--workspace"]))
}
