//! PyTorch's attention on a GPU, in a process of its own.

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use serde::{Deserialize, Serialize};

use super::case::Case;
use super::measured::Times;
use crate::cargo;

/// What the peer is asked.
#[derive(Serialize)]
struct Question<'a> {
    #[serde(flatten)]
    case: &'a Case,
    path: &'a str,
}

/// What it answers.
#[derive(Deserialize)]
#[serde(untagged)]
enum Answer {
    Times(Times),
    Refused { error: String },
}

/// PyTorch in a process of its own.
pub(super) struct Peer {
    process: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
    pub(super) versions: String,
}

impl Peer {
    pub(super) fn start(python: &Path) -> crate::Result<Self> {
        let script = cargo::root().join("benches/peers/gpu.py");
        let mut process =
            Command::new(python).arg(script).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
        let input = process.stdin.take().ok_or("no input")?;
        let mut output = BufReader::new(process.stdout.take().ok_or("no output")?);
        let mut versions = String::new();
        output.read_line(&mut versions)?;
        if versions.is_empty() {
            return Err("torch does not start".into());
        }
        Ok(Self { process, input, output, versions: versions.trim().to_owned() })
    }

    /// Its times on one of its paths, or why it refuses.
    pub(super) fn ask(&mut self, case: &Case, path: &str) -> crate::Result<Result<Times, String>> {
        writeln!(self.input, "{}", serde_json::to_string(&Question { case, path })?)?;
        let mut line = String::new();
        self.output.read_line(&mut line)?;
        match serde_json::from_str(&line) {
            Ok(Answer::Times(times)) => Ok(Ok(times)),
            Ok(Answer::Refused { error }) => Ok(Err(error)),
            Err(error) => Err(format!("torch answered '{}': {error}", line.trim()).into()),
        }
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}
