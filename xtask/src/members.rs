//! Whether docs/architecture.md has a row for every package of the workspace.

use crate::cargo::{self, Workspace};
use crate::generated;

const PAGE: &str = "docs/architecture.md";

/// Compares the table of packages with the workspace, and prints what is missing.
pub(crate) fn check() -> crate::Result {
    let workspace = Workspace::read()?;
    let mut members = Vec::new();
    for package in &workspace.packages {
        let folder = package.manifest_path.parent().ok_or("a manifest is in a folder")?;
        let folder = folder.strip_prefix(cargo::root())?.to_string_lossy().replace('\\', "/");
        members.push((folder, package.name.clone()));
    }
    let missing = missing(&generated::read(PAGE)?, &members);
    crate::reporting::print_lines(&missing);
    println!("{PAGE}: {} of {} packages have a row", members.len() - missing.len(), members.len());
    Ok(missing.is_empty())
}

/// What is wrong with a page that is to have a row for each of these folders and names.
fn missing(page: &str, members: &[(String, String)]) -> Vec<String> {
    let row = |(folder, name): &&(String, String)| {
        page.lines().any(|line| line.starts_with(&format!("| `{folder}/` | `{name}` |")))
    };
    (members.iter().filter(|member| !row(member)))
        .map(|(folder, name)| format!("{PAGE} has no row that begins with '| `{folder}/` | `{name}` |'"))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_package_has_a_row() {
        assert!(check().unwrap());
    }

    #[test]
    fn a_package_without_a_row_is_named() {
        let members = [("crates/a", "a"), ("crates/b", "b")].map(|(x, y)| (x.to_owned(), y.to_owned()));
        assert_eq!(
            missing("| `crates/a/` | `a` | what it is |\n", &members),
            ["docs/architecture.md has no row that begins with '| `crates/b/` | `b` |'"]
        );
    }
}
