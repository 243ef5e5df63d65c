//! Another library, in a process of its own. `benches/peers/peer.py` says how it is talked to.

use std::io::{BufRead, BufReader, Read, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::thread::JoinHandle;

use attention_benches::Sequences;
use serde::Deserialize;
use serde_json::{Value, json};

use super::case::Case;
use crate::{cargo, machine};

/// A running peer.
#[derive(Debug)]
pub(crate) struct Peer {
    /// What it was asked for by: `torch`, `jax` or `candle`.
    pub(crate) name: String,
    /// The library's version.
    pub(crate) version: String,
    threads: usize,
    process: Child,
    to: Option<ChildStdin>,
    from: BufReader<ChildStdout>,
    /// Gives the last line that the process wrote to stderr, once it has ended.
    last_words: Option<JoinHandle<String>>,
}

/// Every answer of the peer, with the fields of each.
#[derive(Debug, Deserialize)]
struct Answer {
    #[serde(default)]
    ready: bool,
    #[serde(default)]
    ok: bool,
    reason: Option<String>,
    version: Option<String>,
    path: Option<String>,
    #[serde(default)]
    ms: Vec<f64>,
}

/// The peer that is a program of this workspace.
const CANDLE: &str = "candle";

/// Those of these peers that can run here; the others are named on standard error, with the reason.
pub(crate) fn start_all(names: &[String], python: &Path, threads: usize) -> Vec<Peer> {
    let start = |name: &String| match Peer::start(name, python, threads) {
        Ok(peer) => Some(peer),
        Err(reason) => {
            eprintln!("peer {name} skipped: {reason}");
            None
        }
    };
    names.iter().filter_map(start).collect()
}

/// Builds candle's side where it is not built, which takes minutes the first time, and runs it.
fn candle() -> Command {
    let mut command = cargo::command(["run", "--quiet", "--release"]);
    command.args(["-p", "attention-candle-examples", "--bin", "peer"]);
    command
}

impl Peer {
    /// Starts a peer.
    ///
    /// # Errors
    /// Why it cannot run here, as a sentence.
    pub(crate) fn start(name: &str, python: &Path, threads: usize) -> Result<Self, String> {
        let mut command = if name == CANDLE { candle() } else { Command::new(python) };
        if name == CANDLE {
            command.env("RAYON_NUM_THREADS", threads.to_string());
        } else {
            command.arg(cargo::root().join("benches/peers/peer.py")).args(["--peer", name]);
            command.args(["--threads", &threads.to_string()]);
        }
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let program = command.get_program().to_string_lossy().into_owned();
        let mut process = command.spawn().map_err(|error| format!("{program} cannot be run: {error}"))?;
        let to = process.stdin.take();
        let from = process.stdout.take().ok_or("its output cannot be read")?;
        let last_words = process.stderr.take().map(|stderr| std::thread::spawn(move || last_line(stderr)));
        let name = name.to_owned();
        let (version, from) = (String::new(), BufReader::new(from));
        let mut peer = Self { name, version, threads, process, to, from, last_words };
        let answer = peer.answer()?;
        if !answer.ready {
            return Err(answer.reason.unwrap_or_else(|| "it is not ready and does not say why".to_owned()));
        }
        peer.version = answer.version.unwrap_or_default();
        Ok(peer)
    }

    /// Makes the data of a call, and calls once, on the implementation that `path` names; the name of the one
    /// that runs.
    ///
    /// # Errors
    /// Why the peer does not serve the call.
    pub(crate) fn prepare(&mut self, case: &Case, path: &str) -> Result<String, String> {
        self.prepare_of(case, None, path)
    }

    /// As [`prepare`](Self::prepare), for sequences of these lengths: packed where the peer takes packed
    /// tensors, and in the rectangle of `case`, padding and all, where it does not.
    ///
    /// # Errors
    /// Why the peer does not serve the call.
    pub(crate) fn prepare_sequences(
        &mut self,
        case: &Case,
        sequences: &Sequences,
        path: &str,
    ) -> Result<String, String> {
        self.prepare_of(case, Some(&sequences.lengths), path)
    }

    fn prepare_of(
        &mut self,
        case: &Case,
        lengths: Option<&[[usize; 2]]>,
        path: &str,
    ) -> Result<String, String> {
        let dims = case.dims;
        let request = json!({
            "op": "prepare",
            "b": dims.batch, "t": dims.query_length, "s": dims.key_length, "n": dims.query_heads,
            "k": dims.key_heads, "h": dims.head_dim, "hv": dims.value_head_dim,
            "dtype": case.dtype.name(), "pass": case.work.name(), "causal": case.causal,
            "mask": case.mask.name(), "path": path, "threads": self.threads, "lengths": lengths,
            // Half, because the estimate leaves out what a library holds on to besides.
            "limit_bytes": machine::available_memory().map(|bytes| bytes / 2),
        });
        Ok(self.ask(&request)?.path.unwrap_or_default())
    }

    /// The milliseconds of each of some calls of what was prepared.
    ///
    /// # Errors
    /// What went wrong.
    pub(crate) fn time(&mut self, repeats: usize) -> Result<Vec<f64>, String> {
        let answer = self.ask(&json!({"op": "time", "repeats": repeats}))?;
        if answer.ms.len() != repeats {
            return Err(format!("{} times were asked for and {} given", repeats, answer.ms.len()));
        }
        Ok(answer.ms)
    }

    fn ask(&mut self, request: &Value) -> Result<Answer, String> {
        let to = self.to.as_mut().ok_or("it was told to end")?;
        let written = writeln!(to, "{request}").and_then(|()| to.flush());
        // Where it has ended, its exit status says more than the broken pipe.
        let answer = self.answer()?;
        written.map_err(|error| error.to_string())?;
        if answer.ok {
            return Ok(answer);
        }
        Err(answer.reason.unwrap_or_else(|| "it refuses and does not say why".to_owned()))
    }

    fn answer(&mut self) -> Result<Answer, String> {
        let mut line = String::new();
        match self.from.read_line(&mut line) {
            Ok(0) => {
                let status =
                    self.process.wait().map_or_else(|error| error.to_string(), |status| status.to_string());
                let last_words = self.last_words.take().and_then(|reader| reader.join().ok());
                Err(match last_words.filter(|words| !words.is_empty()) {
                    Some(words) => format!("the process ended ({status}): {words}"),
                    None => format!("the process ended ({status})"),
                })
            }
            Ok(_) => serde_json::from_str(&line).map_err(|error| format!("'{}': {error}", line.trim())),
            Err(error) => Err(error.to_string()),
        }
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        // The end of its input ends it.
        drop(self.to.take());
        let _ = self.process.wait();
    }
}

/// Reads to the end, so that the writer never waits, and keeps the last line that is not empty: of a Python
/// traceback, that is the exception.
fn last_line(stderr: impl Read) -> String {
    let lines = BufReader::new(stderr).lines().map_while(Result::ok);
    lines.filter(|line| !line.trim().is_empty()).last().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_python_is_a_reason_and_not_a_failure() {
        let error = Peer::start("torch", Path::new("no-such-python"), 1).unwrap_err();
        assert!(error.starts_with("no-such-python cannot be run: "), "{error}");
    }

    #[test]
    fn the_last_line_of_a_traceback_is_kept() {
        assert_eq!(
            last_line(&b"Traceback\n  line 1\nModuleNotFoundError: x\n\n"[..]),
            "ModuleNotFoundError: x"
        );
        assert_eq!(last_line(&b""[..]), "");
    }

    #[cfg(unix)]
    #[test]
    fn a_process_that_ends_is_quoted() {
        // `cat` does not know the option --peer, and says so on stderr.
        let error = Peer::start("torch", Path::new("cat"), 1).unwrap_err();
        assert!(
            error.starts_with("the process ended (exit status: 1): ") && error.contains("cat"),
            "{error}"
        );
    }
}
