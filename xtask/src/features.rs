//! `cargo xtask features`: every crate with none of its features, with each alone, and with all.

use crate::cargo::{self, Package, Workspace};

/// Builds every crate with no feature, each feature alone, and all features
#[derive(clap::Args)]
pub(crate) struct Arguments {}

/// Runs the command.
pub(crate) fn run(_: &Arguments) -> crate::Result {
    let workspace = Workspace::read()?;
    let mut passed = true;
    for package in workspace.published() {
        for choice in choices(package) {
            // Clippy rather than check, because it can deny warnings without a build of its own.
            let mut command = cargo::command(["clippy", "--quiet", "-p", &package.name]);
            command.args(choice).args(["--", "-D", "warnings"]);
            passed &= cargo::run(&mut command)?;
        }
    }
    Ok(passed)
}

/// Features that build with CUDA's compiler only; `united` checks them with a stand-in for it.
pub(crate) const NEED_NVCC: &[(&str, &str)] =
    &[("attention-candle", "cuda"), ("attention-candle-examples", "cuda")];

/// Cargo's options for every choice of features.
fn choices(package: &Package) -> Vec<Vec<String>> {
    const NONE: &str = "--no-default-features";
    let needs_nvcc = |feature: &str| NEED_NVCC.contains(&(package.name.as_str(), feature));
    let alone = (package.features.keys())
        .filter(|feature| *feature != "default" && !needs_nvcc(feature))
        .map(|feature| vec![NONE.to_owned(), "--features".to_owned(), feature.clone()]);
    let mut choices = vec![vec![NONE.to_owned()]];
    choices.extend(alone);
    // One feature alone is all of them, and a package without features has been built above.
    if choices.len() > 2 {
        choices.push(vec!["--all-features".to_owned()]);
    }
    choices
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn features_are_taken_alone_none_and_all() {
        let workspace = Workspace::read().unwrap();
        let of = |name: &str| {
            let package = workspace.packages.iter().find(|package| package.name == name).unwrap();
            choices(package).into_iter().map(|choice| choice.join(" ")).collect::<Vec<_>>()
        };
        assert_eq!(of("attention-core"), ["--no-default-features", "--no-default-features --features serde"]);
        assert!(
            of("attention-candle").iter().all(|choice| !choice.contains("cuda") && !choice.contains("all"))
        );
        let facade = of("attention");
        assert_eq!(facade.first().unwrap(), "--no-default-features");
        assert_eq!(facade.last().unwrap(), "--all-features");
        assert!(facade.contains(&"--no-default-features --features cpu".to_owned()), "{facade:?}");
    }
}
