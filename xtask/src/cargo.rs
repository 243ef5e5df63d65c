//! Cargo, as a process; and the workspace as it describes it.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde::Deserialize;

/// The repository.
pub(crate) fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("xtask is a folder of the repository")
}

/// A call of the cargo that runs this, in the repository.
pub(crate) fn command<'a>(arguments: impl IntoIterator<Item = &'a str>) -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.args(arguments).current_dir(root());
    // Set for this process by `cargo run`. What reads them would be built anew here and again outside.
    for (name, _) in std::env::vars_os() {
        let name = name.to_string_lossy();
        if name.starts_with("CARGO_PKG_") || name.starts_with("CARGO_MANIFEST_") {
            command.env_remove(&*name);
        }
    }
    command
}

/// Runs a command with its output on this terminal; whether it succeeded.
pub(crate) fn run(command: &mut Command) -> crate::Result {
    println!("$ {}", line(command));
    let status = command.status().map_err(|error| format!("{} cannot be run: {error}", line(command)))?;
    Ok(status.success())
}

/// Runs a command and gives what it prints.
pub(crate) fn output(command: &mut Command) -> crate::Result<String> {
    let output = command.stderr(Stdio::inherit()).output();
    let output = output.map_err(|error| format!("{} cannot be run: {error}", line(command)))?;
    if !output.status.success() {
        return Err(format!("{} failed: {}", line(command), output.status).into());
    }
    Ok(String::from_utf8(output.stdout)?)
}

/// Runs a command; whether it succeeded, and what it prints. Its errors go to this terminal.
pub(crate) fn captured(command: &mut Command) -> crate::Result<(bool, String)> {
    println!("$ {}", line(command));
    let output = command.stderr(Stdio::inherit()).output();
    let output = output.map_err(|error| format!("{} cannot be run: {error}", line(command)))?;
    Ok((output.status.success(), String::from_utf8_lossy(&output.stdout).into_owned()))
}

/// A command as one would type it.
fn line(command: &Command) -> String {
    let program = Path::new(command.get_program()).file_stem().unwrap_or(command.get_program());
    let words = std::iter::once(program).chain(command.get_args());
    words.map(|word| word.to_string_lossy().into_owned()).collect::<Vec<_>>().join(" ")
}

/// The packages of the workspace.
#[derive(Clone, Debug, Deserialize)]
pub(crate) struct Workspace {
    /// In the order of their names.
    pub(crate) packages: Vec<Package>,
    /// Where cargo builds.
    pub(crate) target_directory: PathBuf,
}

/// A package of the workspace.
#[derive(Clone, Debug, Deserialize)]
pub(crate) struct Package {
    /// Its name.
    pub(crate) name: String,
    /// Its version.
    pub(crate) version: String,
    /// Its Cargo.toml.
    pub(crate) manifest_path: PathBuf,
    /// Its features, with what each switches on.
    pub(crate) features: BTreeMap<String, Vec<String>>,
    /// What its manifest asks for.
    pub(crate) dependencies: Vec<Dependency>,
    /// The registries it may go to; `None` for any.
    publish: Option<Vec<String>>,
}

/// A line of a manifest's dependencies.
#[derive(Clone, Debug, Deserialize)]
pub(crate) struct Dependency {
    /// The package's name.
    pub(crate) name: String,
    /// `dev`, `build`, or `None` for a normal one.
    pub(crate) kind: Option<String>,
}

impl Package {
    /// Whether it goes to a registry.
    pub(crate) fn is_published(&self) -> bool {
        self.publish.as_ref().is_none_or(|registries| !registries.is_empty())
    }
}

impl Workspace {
    /// Asks cargo.
    pub(crate) fn read() -> crate::Result<Self> {
        let text = output(&mut command(["metadata", "--format-version", "1", "--no-deps"]))?;
        Ok(serde_json::from_str(&text)?)
    }

    /// The packages that go to a registry.
    pub(crate) fn published(&self) -> impl Iterator<Item = &Package> {
        self.packages.iter().filter(|package| package.is_published())
    }

    /// Whether a package is one of the workspace's own.
    pub(crate) fn has(&self, name: &str) -> bool {
        self.packages.iter().any(|package| package.name == name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_workspace_is_read_with_what_is_not_published() {
        let workspace = Workspace::read().unwrap();
        assert!(workspace.published().any(|package| package.name == "attention-core"));
        assert!(workspace.has("xtask") && workspace.published().all(|package| package.name != "xtask"));
        let core = workspace.packages.iter().find(|package| package.name == "attention-core").unwrap();
        assert!(core.features.contains_key("serde"));
        assert!(core.dependencies.iter().any(|dependency| dependency.kind.as_deref() == Some("dev")));
    }
}
