//! `cargo xtask exchange`: tensors of PyTorch through DLPack to the library and back.

use std::path::PathBuf;
use std::process::Command;

use crate::cargo::{self, Workspace};

/// Hands tensors of PyTorch to the library through DLPack and back, and compares with its attention
#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// The Python that has torch; without torch everything is skipped
    #[arg(long, env = "ATTENTION_PYTHON", default_value = "python3", value_name = "PATH")]
    python: PathBuf,
}

/// Runs the command.
pub(crate) fn run(arguments: &Arguments) -> crate::Result {
    let words = "build --quiet --release -p attention --features dlpack --example dlpack_python";
    if !cargo::run(&mut cargo::command(words.split(' ')))? {
        return Ok(false);
    }
    let name = format!("{}dlpack_python{}", std::env::consts::DLL_PREFIX, std::env::consts::DLL_SUFFIX);
    let library = Workspace::read()?.target_directory.join("release/examples").join(name);
    let script = cargo::root().join("xtask/src/exchange/peer.py");
    let mut python = Command::new(&arguments.python);
    match python.arg(script).arg(library).status() {
        Ok(status) => Ok(status.success()),
        Err(error) => {
            println!("skipped: {} does not start: {error}", arguments.python.display());
            println!("0 passed, 0 failed, 1 skipped");
            Ok(true)
        }
    }
}
