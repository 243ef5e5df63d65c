//! Packages every published crate, and builds what is in the packages.

use std::fmt::Write;
use std::fs;
use std::path::Path;
use std::process::Command;

use crate::cargo::{self, Workspace};

/// Packages the crates and checks that they build from each other's packages.
///
/// `cargo package` can verify as well, but it unpacks the siblings of a crate into Cargo's home once for a
/// version and a target folder, and from then on builds against those, whatever has been packaged since.
pub(crate) fn check(allow_dirty: bool) -> crate::Result {
    let workspace = Workspace::read()?;
    let mut command = cargo::command(["package", "--quiet", "--no-verify"]);
    for package in workspace.published() {
        command.args(["-p", &package.name]);
    }
    if allow_dirty {
        command.arg("--allow-dirty");
    }
    if !cargo::run(&mut command)? {
        return Ok(false);
    }

    let packages = workspace.target_directory.join("package");
    let unpacked = workspace.target_directory.join("unpacked");
    if unpacked.exists() {
        fs::remove_dir_all(&unpacked)?;
    }
    fs::create_dir_all(&unpacked)?;
    for package in workspace.published() {
        let file = packages.join(format!("{}-{}.crate", package.name, package.version));
        let mut untar = Command::new("tar");
        // As of now: packages hold one date for all files, by which cargo would take those of an earlier
        // build for these.
        if !cargo::run(untar.arg("-xmzf").arg(&file).arg("-C").arg(&unpacked))? {
            return Ok(false);
        }
    }
    fs::write(unpacked.join("Cargo.toml"), manifest(&workspace))?;
    // The same versions of everything else, and nothing to look up.
    fs::copy(cargo::root().join("Cargo.lock"), unpacked.join("Cargo.lock"))?;
    cargo::run(&mut build(&unpacked))
}

/// Builds what was unpacked, in a target folder that the next run reuses.
fn build(unpacked: &Path) -> Command {
    let mut command = cargo::command(["check", "--quiet", "--workspace", "--target-dir"]);
    command.arg(unpacked.with_file_name("unpacked-target")).current_dir(unpacked);
    command
}

/// A workspace of the unpacked crates, in which they depend on each other.
fn manifest(workspace: &Workspace) -> String {
    let folders = || {
        workspace.published().map(|package| (&package.name, format!("{}-{}", package.name, package.version)))
    };
    let members: Vec<String> = folders().map(|(_, folder)| format!("\"{folder}\"")).collect();
    let mut text =
        format!("[workspace]\nresolver = \"3\"\nmembers = [{}]\n\n[patch.crates-io]\n", members.join(", "));
    for (name, folder) in folders() {
        // Writing to a string cannot fail.
        let _ = writeln!(text, "{name} = {{ path = \"{folder}\" }}");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The pages of an optional part are missing from docs.rs where the manifest does not ask for them.
    #[test]
    fn docs_rs_is_told_which_features_to_show() {
        let workspace = Workspace::read().unwrap();
        for package in workspace.published() {
            let manifest = fs::read_to_string(&package.manifest_path).unwrap();
            let (_, part) = manifest
                .split_once("[package.metadata.docs.rs]\n")
                .unwrap_or_else(|| panic!("{} does not say what docs.rs shows", package.name));
            let part = part.split("\n[").next().unwrap_or_default();
            // candle's feature needs CUDA to build.
            let wanted = if package.features.contains_key("cuda") && package.name == "attention-candle" {
                "features = []"
            } else {
                "all-features = true"
            };
            assert!(part.contains(wanted), "{}: {part}", package.name);
        }
    }

    #[test]
    fn the_unpacked_crates_depend_on_each_other() {
        let workspace = Workspace::read().unwrap();
        let text = manifest(&workspace);
        let core = workspace.packages.iter().find(|package| package.name == "attention-core").unwrap();
        let folder = format!("attention-core-{}", core.version);
        assert!(text.contains(&format!("\nattention-core = {{ path = \"{folder}\" }}\n")), "{text}");
        assert!(text.contains(&format!("\"{folder}\"")) && !text.contains("xtask"), "{text}");
    }
}
