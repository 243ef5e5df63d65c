//! Builds the CUDA crates with candle's CUDA features, and the crate for candle with its own: Cargo unites
//! the features that all crates of a program ask of `cudarc`, and some of them exclude each other.

use std::fmt::Write;
use std::fs;
use std::path::{Path, PathBuf};

use crate::cargo::{self, Workspace};
use crate::dependencies;

/// The version of `cudarc` that candle-core 0.11.1 asks for.
const VERSION: &str = "0.19.10";

/// The features of `cudarc` that candle-core 0.11.1 asks for: its feature `cuda` all but the last two, which
/// its features `cudnn` and `nccl` add (its Cargo.toml, `dependencies.cudarc` and `features`).
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

/// What stands for CUDA's compiler in the build of candle's kernels, which asks it for files: their contents
/// matter to programs that run, and none is linked here.
const NVCC: &str = r#"#!/bin/sh
# nvcc [options] (--ptx --output-directory FOLDER | -o FILE) SOURCE
while [ $# -gt 0 ]; do
    case $1 in
    --version) echo 'Cuda compilation tools, release 13.0, V13.0.88'; exit ;;
    --output-directory) folder=$2; shift ;;
    -o) : > "$2"; exit ;;
    *.cu) source=$1 ;;
    esac
    shift
done
name=$(basename "$source" .cu)
: > "$folder/$name.ptx"
"#;

/// Checks a crate that depends on all that are for CUDA, and on `cudarc` as candle does; and on Unix the
/// crate for candle with its feature `cuda`. Nothing is linked, which would need CUDA's libraries.
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
    // The lints of this workspace do not apply to the generated package; the compiler's warnings do.
    command.env("RUSTFLAGS", "-D warnings");
    if let Some(nvcc) = stand_in(&folder)? {
        // The compute capability would be asked of a device.
        command.args(["--features", CANDLE]).env("NVCC", nvcc).env("CUDA_COMPUTE_CAP", "90");
    }
    cargo::run(&mut command)
}

/// The crate for candle, in the checked crate a dependency behind a feature of the same name.
const CANDLE: &str = "attention-candle";

/// Writes what stands for CUDA's compiler, and gives its path; `None` on systems that run no shell scripts.
fn stand_in(folder: &Path) -> crate::Result<Option<PathBuf>> {
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;

        let programs = folder.join("cuda/bin");
        fs::create_dir_all(&programs)?;
        fs::create_dir_all(folder.join("cuda/include"))?;
        let nvcc = programs.join("nvcc");
        fs::write(&nvcc, NVCC)?;
        fs::set_permissions(&nvcc, fs::Permissions::from_mode(0o755))?;
        Ok(Some(nvcc))
    }
    #[cfg(not(unix))]
    {
        println!("{CANDLE} is not checked with feature `cuda` here: that needs a shell");
        Ok(None)
    }
}

/// The manifest of that crate, a workspace of its own.
fn manifest(workspace: &Workspace) -> String {
    let features: Vec<String> = FEATURES.iter().map(|feature| format!("\"{feature}\"")).collect();
    let mut text = format!(
        "[workspace]\n\n[package]\nname = \"united\"\nversion = \"0.0.0\"\nedition = \"2024\"\n\n[features]\n\
         {CANDLE} = [\"dep:{CANDLE}\"]\n\n[dependencies]\n\
         cudarc = {{ version = \"{VERSION}\", default-features = false, features = [{}] }}\n",
        features.join(", ")
    );
    if let Some(candle) = workspace.packages.iter().find(|package| package.name == CANDLE) {
        let folder = candle.manifest_path.with_file_name("");
        let _ = writeln!(
            text,
            "{CANDLE} = {{ path = '{}', features = [\"cuda\"], optional = true }}",
            folder.display()
        );
    }
    for package in workspace.published().filter(|package| dependencies::CUDA.contains(&package.name.as_str()))
    {
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
    fn the_crates_for_cuda_are_united_with_candles_features() {
        let text = manifest(&Workspace::read().unwrap());
        for wanted in [
            "\nattention-chunked-cuda = { path = '",
            "\nattention-cuda = { path = '",
            "\nattention-cudnn = { path = '",
            "\nattention-candle = { path = '",
            "\"dynamic-linking\"",
        ] {
            assert!(text.contains(wanted), "{text}");
        }
        assert!(!text.contains("attention-cpu"), "{text}");
    }
}
