//! What the crates promise about their dependencies, checked with `cargo tree`.

use std::collections::BTreeSet;

use crate::cargo::{self, Package, Workspace};

/// What a published crate may depend on among the crates of this workspace. A new crate needs a row.
const SIBLINGS: &[(&str, &[&str])] = &[
    (
        "attention",
        &[
            "attention-chunked",
            "attention-chunked-cuda",
            "attention-core",
            "attention-cpu",
            "attention-cuda",
            "attention-cudnn",
            "attention-kernels",
            "attention-threads",
        ],
    ),
    (
        "attention-candle",
        &[
            "attention",
            "attention-chunked",
            "attention-chunked-cuda",
            "attention-core",
            "attention-cpu",
            "attention-cuda",
            "attention-cudnn",
            "attention-kernels",
            "attention-threads",
        ],
    ),
    ("attention-chunked", &["attention-core", "attention-threads"]),
    ("attention-chunked-cuda", &["attention-core", "attention-cuda", "attention-kernels"]),
    ("attention-conformance", &["attention-core"]),
    ("attention-core", &[]),
    ("attention-cpu", &["attention-core", "attention-threads"]),
    ("attention-cuda", &["attention-conformance", "attention-core", "attention-kernels"]),
    ("attention-cudnn", &["attention-core", "attention-cuda", "attention-kernels"]),
    ("attention-kernels", &[]),
    ("attention-threads", &[]),
];

/// The crates that are for CUDA, and may depend on it by default.
pub(crate) const CUDA: &[&str] = &["attention-chunked-cuda", "attention-cuda", "attention-cudnn"];

/// Everything that the core may name in its manifest.
const CORE_DEPENDENCIES: &[&str] = &["bytemuck", "half", "serde", "thiserror"];

/// Checks every promise and prints what is broken.
pub(crate) fn check() -> crate::Result {
    let workspace = Workspace::read()?;
    let mut faults = Vec::new();
    for package in workspace.published() {
        faults.extend(unexpected_siblings(package, &workspace, &tree(package, &["--all-features"])?));
        if !CUDA.contains(&package.name.as_str()) {
            faults.extend(cuda_crates(package, &tree(package, &[])?));
        }
        if package.name == "attention-core" {
            faults.extend(unexpected_core_dependencies(package));
        }
    }
    crate::reporting::print_lines(&faults);
    println!("dependencies of {} crates checked", workspace.published().count());
    Ok(faults.is_empty())
}

/// The names of everything that a package is built with, itself left out; no dev-dependencies.
fn tree(package: &Package, options: &[&str]) -> crate::Result<BTreeSet<String>> {
    let words =
        ["tree", "-p", &package.name, "--edges", "normal,build", "--prefix", "none", "--target", "all"];
    let text = cargo::output(cargo::command(words).args(["--format", "{p}"]).args(options))?;
    let names = text.lines().filter_map(|line| line.split(' ').next());
    Ok(names.filter(|name| !name.is_empty() && *name != package.name).map(str::to_owned).collect())
}

fn unexpected_siblings(package: &Package, workspace: &Workspace, tree: &BTreeSet<String>) -> Vec<String> {
    let Some((name, allowed)) = SIBLINGS.iter().find(|(name, _)| *name == package.name) else {
        return vec![format!("{} has no row in the table of xtask/src/dependencies.rs", package.name)];
    };
    (tree.iter().filter(|dependency| workspace.has(dependency) && !allowed.contains(&dependency.as_str())))
        .map(|dependency| format!("{name} must not depend on {dependency}"))
        .collect()
}

fn cuda_crates(package: &Package, tree: &BTreeSet<String>) -> Vec<String> {
    (tree.iter().filter(|dependency| {
        ["cuda", "cudarc", "cudnn", "nvrtc"].iter().any(|part| dependency.contains(part))
    }))
    .map(|dependency| format!("the default build of {} has {dependency}", package.name))
    .collect()
}

fn unexpected_core_dependencies(core: &Package) -> Vec<String> {
    (core.dependencies.iter())
        .filter(|dependency| dependency.kind.as_deref() != Some("dev"))
        .filter(|dependency| !CORE_DEPENDENCIES.contains(&dependency.name.as_str()))
        .map(|dependency| format!("{} must not depend on {}", core.name, dependency.name))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn package(name: &str) -> (Package, Workspace) {
        let workspace = Workspace::read().unwrap();
        let package = workspace.packages.iter().find(|package| package.name == name).unwrap().clone();
        (package, workspace)
    }

    fn names(names: &[&str]) -> BTreeSet<String> {
        names.iter().map(|&name| name.to_owned()).collect()
    }

    #[test]
    fn a_backend_may_not_depend_on_the_facade() {
        let (cpu, workspace) = package("attention-cpu");
        let tree = names(&["attention", "attention-core", "gemm"]);
        assert_eq!(
            unexpected_siblings(&cpu, &workspace, &tree),
            ["attention-cpu must not depend on attention"]
        );
    }

    #[test]
    fn cuda_is_found_by_any_of_its_names() {
        let (facade, _) = package("attention");
        let found = cuda_crates(&facade, &names(&["cudarc", "attention-cuda", "cudnn-sys", "half"]));
        assert_eq!(found.len(), 3, "{found:?}");
        assert_eq!(found[0], "the default build of attention has attention-cuda");
    }

    #[test]
    fn the_core_stays_small() {
        let (mut core, _) = package("attention-core");
        assert_eq!(unexpected_core_dependencies(&core), Vec::<String>::new());
        core.dependencies[0].name = "rayon".to_owned();
        assert_eq!(unexpected_core_dependencies(&core), ["attention-core must not depend on rayon"]);
    }
}
