//! `cargo xtask unsafe`: the list of `unsafe` in docs/unsafe.md, from the sources.

mod scan;

use std::path::{Path, PathBuf};

use scan::{Kind, Site};

use crate::{cargo, generated};

/// Writes the list of docs/unsafe.md: every file with `unsafe`, and in which functions
#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// Compare with the page instead, and fail where it differs
    #[arg(long)]
    pub(crate) check: bool,
}

const COMMAND: &str = "unsafe";
const PAGE: &str = "docs/unsafe.md";
/// The folders that hold the workspace's packages.
const FOLDERS: &[&str] = &["benches", "crates", "examples", "kernels", "xtask"];

/// Runs the command.
pub(crate) fn run(arguments: &Arguments) -> crate::Result {
    let mut files = Vec::new();
    for folder in FOLDERS {
        collect(&cargo::root().join(folder), &mut files)?;
    }
    files.sort();
    let mut rows = Vec::new();
    for file in files {
        let name = file.strip_prefix(cargo::root())?.to_string_lossy().into_owned();
        let sites = scan::sites(&generated::read(&name)?);
        if !sites.is_empty() {
            rows.push((name, sites));
        }
    }
    let page = generated::with_part(&generated::read(PAGE)?, COMMAND, "sites", &table(&rows))?;
    generated::settle(&[(PAGE.to_owned(), page)], COMMAND, arguments.check)
}

/// The Rust files below a folder, but for what cargo built there.
fn collect(folder: &Path, files: &mut Vec<PathBuf>) -> crate::Result<()> {
    for entry in std::fs::read_dir(folder).map_err(|error| format!("{}: {error}", folder.display()))? {
        let path = entry?.path();
        if path.is_dir() {
            if path.file_name().is_some_and(|name| name != "target") {
                collect(&path, files)?;
            }
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            files.push(path);
        }
    }
    Ok(())
}

/// A row per file, and one for all of them.
fn table(rows: &[(String, Vec<Site>)]) -> String {
    let mut text =
        "| file | blocks | functions | implementations | other | where |\n|---|---|---|---|---|---|\n"
            .to_owned();
    let counts = |sites: &mut dyn Iterator<Item = &Site>| {
        let mut counts = [0; 4];
        for site in sites {
            counts[site.kind as usize] += 1;
        }
        counts.map(|count| count.to_string()).join(" | ")
    };
    for (file, sites) in rows {
        text += &format!("| `{file}` | {} | {} |\n", counts(&mut sites.iter()), places(sites));
    }
    let all = counts(&mut rows.iter().flat_map(|(_, sites)| sites));
    text + &format!("| {} files | {all} | |\n", rows.len())
}

/// The functions of a file with how many `unsafe` each has, if more than one, in the order of the first. An
/// unsafe function counts as one, and so does each block in it.
fn places(sites: &[Site]) -> String {
    let mut places: Vec<(String, usize)> = Vec::new();
    for site in sites {
        let place = match site.kind {
            Kind::Block | Kind::Function | Kind::Implementation => format!("`{}`", site.place),
            Kind::Other => site.place.clone(),
        };
        match places.iter_mut().find(|(other, _)| *other == place) {
            Some((_, count)) => *count += 1,
            None => places.push((place, 1)),
        }
    }
    let words = places.into_iter().map(|(place, count)| match count {
        1 => place,
        _ => format!("{place} {count}"),
    });
    words.collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_counts_kinds_and_places() {
        let source = "unsafe fn f() { unsafe { a() } unsafe { b() } }  unsafe impl Send for View {}  fn g() { unsafe { c() } }";
        let table = table(&[("a.rs".to_owned(), scan::sites(source))]);
        let rows: Vec<_> = table.lines().skip(2).collect();
        assert_eq!(
            rows,
            ["| `a.rs` | 3 | 1 | 1 | 0 | `f` 3, `Send for View`, `g` |", "| 1 files | 3 | 1 | 1 | 0 | |"]
        );
    }

    #[test]
    fn this_file_has_none() {
        assert_eq!(scan::sites(include_str!("mod.rs")), []);
    }
}
