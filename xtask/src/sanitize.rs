//! `cargo xtask sanitize`: the CPU backends' tests and a short fuzz under the address sanitizer.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::cargo;

/// The one target that this is set up for; named, so that build scripts and macros are built without the
/// sanitizer.
const TARGET: &str = "x86_64-unknown-linux-gnu";
/// Sanitizer flags are unstable: with this variable a stable compiler takes them, too.
const UNSTABLE: &str = "RUSTC_BOOTSTRAP";
/// How many seeds each fuzz test runs.
const SEEDS: &str = "ATTENTION_FUZZ_SEEDS";

/// Runs the CPU backends' tests and a short fuzz under the address sanitizer, with poisoned red zones between
/// the pieces of their scratch memory
#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// Seeds that the fuzzer runs on each backend and level
    #[arg(long, default_value_t = 100, value_name = "N")]
    seeds: u64,
    /// Run the conformance suite too, which takes an hour
    #[arg(long)]
    suite: bool,
}

/// A compiler that has the sanitizer's run-time library, and how cargo is called for it.
struct Toolchain {
    name: &'static str,
    /// What stands before `cargo` and `rustc`.
    prefix: &'static [&'static str],
}

const TOOLCHAINS: [Toolchain; 2] = [
    Toolchain { name: "the toolchain in use", prefix: &[] },
    Toolchain { name: "nightly", prefix: &["rustup", "run", "nightly"] },
];

/// Runs the command.
pub(crate) fn run(arguments: &Arguments) -> crate::Result {
    if !cfg!(all(target_arch = "x86_64", target_os = "linux")) {
        println!("sanitize: skipped, it is set up for {TARGET} alone");
        return Ok(true);
    }
    let Some(toolchain) = TOOLCHAINS.iter().find(|toolchain| toolchain.has_sanitizer()) else {
        let names = TOOLCHAINS.map(|toolchain| toolchain.name).join(" nor ");
        println!(
            "sanitize: skipped, neither {names} has the address sanitizer's run-time library for {TARGET}"
        );
        return Ok(true);
    };
    println!("sanitize: with {}", toolchain.name);
    let mut tests = vec!["--lib", "--test", "fuzz"];
    if arguments.suite {
        tests.extend(["--test", "conformance"]);
    }
    let packages = ["-p", "attention-cpu", "-p", "attention-chunked"];
    // At the first level of optimisation: without any, kernels of intrinsics take minutes for a test.
    let mut command = toolchain.command("cargo");
    command.args(["test", "--profile", "dev", "--target", TARGET]).args(packages).args(tests);
    command
        .current_dir(cargo::root())
        .env("CARGO_TARGET_DIR", target_folder()?)
        .env("CARGO_PROFILE_DEV_INCREMENTAL", "false")
        .env(UNSTABLE, "1")
        .env("RUSTFLAGS", "-Zsanitizer=address --cfg attention_red_zones")
        // Threads of rayon's global pool are never joined, and what they own is no leak.
        .env("ASAN_OPTIONS", "detect_leaks=0")
        .env(SEEDS, arguments.seeds.to_string());
    cargo::run(&mut command)
}

impl Toolchain {
    fn command(&self, program: &str) -> Command {
        match self.prefix {
            [] if program == "cargo" => cargo::command([]),
            [] => Command::new(program),
            [first, rest @ ..] => {
                let mut command = Command::new(first);
                command.args(rest).arg(program);
                // Of the toolchain that runs this, which would win over the one named here.
                ["CARGO", "RUSTC", "RUSTUP_TOOLCHAIN"].iter().for_each(|name| {
                    command.env_remove(name);
                });
                command
            }
        }
    }

    fn has_sanitizer(&self) -> bool {
        let output = self.command("rustc").args(["--print", "sysroot"]).output();
        let Some(output) = output.ok().filter(|output| output.status.success()) else { return false };
        let root = String::from_utf8_lossy(&output.stdout).trim().to_owned();
        has_run_time(&Path::new(&root).join("lib/rustlib").join(TARGET).join("lib"))
    }
}

/// Whether a folder of libraries has `librustc-stable_rt.asan.a` or its like of another channel.
fn has_run_time(libraries: &Path) -> bool {
    let Ok(entries) = std::fs::read_dir(libraries) else { return false };
    entries.flatten().any(|entry| entry.file_name().to_string_lossy().ends_with("_rt.asan.a"))
}

/// A folder of its own: other flags would build everything anew in the usual one, each time.
fn target_folder() -> crate::Result<PathBuf> {
    Ok(cargo::Workspace::read()?.target_directory.join("sanitize"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_without_the_library_has_no_sanitizer() {
        assert!(!has_run_time(Path::new(env!("CARGO_MANIFEST_DIR"))));
        assert!(!has_run_time(Path::new("/nowhere")));
    }
}
