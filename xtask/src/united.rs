//! The CUDA crates beside candle's CUDA features: Cargo unites the features that all crates of a program ask of `cudarc`,
//! and some of them exclude each other.

use std::fmt::Write;
use std::fs;

use crate::cargo::{self, Workspace};

/// The version of `cudarc` that candle-core 0.11.1 asks for.
const VERSION: &str = "0.19.10";

/// The features of `cudarc` that candle-core 0.11.1 asks for: its feature `cuda` all but the last two, which its features
/// `cudnn` and `nccl` add (its Cargo.toml, `dependencies.cudarc` and `features`). candle itself cannot be checked without
/// nvcc.
const FEATURES: &[&str] = &[
    "std",
    "cublas",
    "cublaslt",
    "curand",
    "driver",
    "nvrtc",
    "f16",
    "f8",
    "cuda-version-from-build-system",
    "dynamic-linking",
    "cudnn",
    "nccl",
];

/// Checks a crate that depends on all that use `cudarc`, and on `cudarc` as candle does. Nothing is linked, which would
/// need CUDA's libraries.
pub(crate) fn check() -> crate::Result {
    let workspace = Workspace::read()?;
    let folder = workspace.target_directory.join("united");
    fs::create_dir_all(folder.join("src"))?;
    fs::write(folder.join("src/lib.rs"), "")?;
    fs::write(folder.join("Cargo.toml"), manifest(&workspace))?;
    // The same versions as here; only what `f8` brings is looked up.
    fs::copy(cargo::root().join("Cargo.lock"), folder.join("Cargo.lock"))?;
    let mut command = cargo::command(["check", "--quiet", "--target-dir"]);
    command.arg(folder.with_file_name("united-target")).current_dir(&folder);
    cargo::run(&mut command)
}

/// The manifest of that crate, a workspace of its own.
fn manifest(workspace: &Workspace) -> String {
    let features: Vec<String> = FEATURES.iter().map(|feature| format!("\"{feature}\"")).collect();
    let mut text = format!(
        "[workspace]\n\n[package]\nname = \"united\"\nversion = \"0.0.0\"\nedition = \"2024\"\n\n[dependencies]\n\
         cudarc = {{ version = \"{VERSION}\", default-features = false, features = [{}] }}\n",
        features.join(", ")
    );
    let users = workspace
        .published()
        .filter(|package| package.dependencies.iter().any(|dependency| dependency.name == "cudarc"));
    for package in users {
        let folder = package.manifest_path.with_file_name("");
        // Writing to a string cannot fail. A literal string of TOML takes backslashes as they are.
        let _ = writeln!(text, "{} = {{ path = '{}' }}", package.name, folder.display());
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_crates_that_use_cudarc_are_united_with_candles_features() {
        let text = manifest(&Workspace::read().unwrap());
        for wanted in
            ["\nattention-cuda = { path = '", "\nattention-cudnn = { path = '", "\"dynamic-linking\""]
        {
            assert!(text.contains(wanted), "{text}");
        }
        assert!(!text.contains("attention-cpu"), "{text}");
    }
}
