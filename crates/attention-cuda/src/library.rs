//! Libraries that are looked for at run time: where, in which order, and what was tried.

use std::path::{Path, PathBuf};

use libloading::Library;

/// Where a library is looked for, in this order: an explicit path, the file or folder that an environment
/// variable names, the loader's own search by each name, and the folders of Python wheels under some roots.
#[derive(Clone, Debug, Default)]
pub struct Search {
    path: Option<PathBuf>,
    variable: Option<&'static str>,
    names: Vec<&'static str>,
    wheel_roots: Vec<PathBuf>,
}

/// A library that was opened, and how it was found.
#[derive(Debug)]
pub struct Found {
    /// The library. It is never closed: code of it may run at exit.
    pub library: &'static Library,
    /// The path or name that opened it.
    pub place: String,
}

/// A library that was not found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NotFound {
    /// What the last attempt that found a file said, or that there was none.
    pub what: String,
    /// Every name and path that was tried.
    pub looked_for: Vec<String>,
}

impl Search {
    /// A library with these file names, in the order in which the loader is asked for them.
    pub fn new(names: impl IntoIterator<Item = &'static str>) -> Self {
        Self { names: names.into_iter().collect(), ..Self::default() }
    }

    /// First of all, this file, or the names in this folder.
    #[must_use]
    pub fn path(self, path: Option<PathBuf>) -> Self {
        Self { path, ..self }
    }

    /// Then what this environment variable names.
    #[must_use]
    pub fn variable(self, variable: &'static str) -> Self {
        Self { variable: Some(variable), ..self }
    }

    /// At last, `nvidia/*/lib` under these roots (each a `site-packages` folder).
    #[must_use]
    pub fn wheel_roots(self, roots: Vec<PathBuf>) -> Self {
        Self { wheel_roots: roots, ..self }
    }

    /// Opens the first that can be opened.
    ///
    /// An explicit path or a set variable is binding: where it names nothing that can be opened, nothing else
    /// is tried. An empty variable counts as unset.
    ///
    /// # Errors
    /// [`NotFound`] with everything that was tried.
    pub fn open(&self) -> Result<Found, NotFound> {
        let mut attempt = Attempt { what: None, looked_for: Vec::new() };
        let from_variable = self.variable.and_then(std::env::var_os);
        let from_variable = from_variable.filter(|path| !path.is_empty()).map(PathBuf::from);
        if let Some(path) = self.path.clone().or(from_variable) {
            let candidates = if path.is_dir() {
                self.names.iter().map(|name| path.join(name)).collect()
            } else {
                vec![path]
            };
            return attempt.first(candidates).ok_or_else(|| attempt.give_up());
        }
        if let Some(found) = attempt.first(self.names.iter().map(PathBuf::from).collect()) {
            return Ok(found);
        }
        for root in &self.wheel_roots {
            let candidates = in_wheels(root, &self.names);
            if candidates.is_empty() {
                attempt.looked_for.push(root.join("nvidia/*/lib").display().to_string());
            }
            if let Some(found) = attempt.first(candidates) {
                return Ok(found);
            }
        }
        Err(attempt.give_up())
    }
}

/// `root/nvidia/*/lib/NAME` for the folders that there are.
fn in_wheels(root: &Path, names: &[&'static str]) -> Vec<PathBuf> {
    let Ok(folders) = std::fs::read_dir(root.join("nvidia")) else { return Vec::new() };
    let mut folders: Vec<PathBuf> = folders.flatten().map(|folder| folder.path().join("lib")).collect();
    folders.sort();
    folders
        .iter()
        .flat_map(|folder| names.iter().map(|name| folder.join(name)))
        .filter(|path| path.exists())
        .collect()
}

struct Attempt {
    what: Option<String>,
    looked_for: Vec<String>,
}

impl Attempt {
    fn first(&mut self, candidates: Vec<PathBuf>) -> Option<Found> {
        candidates.into_iter().find_map(|candidate| {
            let place = candidate.display().to_string();
            self.looked_for.push(place.clone());
            // SAFETY: loading runs the initialisers of the library that the user or the system put under this
            // name; the libraries looked for are NVIDIA's, whose initialisers may run at any time and on any
            // thread.
            match unsafe { Library::new(&candidate) } {
                Ok(library) => Some(Found { library: Box::leak(Box::new(library)), place }),
                Err(error) => {
                    // A file that is there and cannot be opened says more than one that is not.
                    if candidate.exists() || self.what.is_none() {
                        // The loader's own words are behind the error.
                        let source = std::error::Error::source(&error).map(ToString::to_string);
                        self.what = Some(source.unwrap_or_else(|| error.to_string()));
                    }
                    None
                }
            }
        })
    }

    fn give_up(&self) -> NotFound {
        let what = self.what.clone().unwrap_or_else(|| "no candidate".to_owned());
        NotFound { what, looked_for: self.looked_for.clone() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn everything_that_was_tried_is_named() {
        let search = Search::new(["libno_such_thing.so.9", "libno_such_thing.so"]);
        let error = search.open().expect_err("there is no such library");
        assert_eq!(error.looked_for, ["libno_such_thing.so.9", "libno_such_thing.so"]);
        assert!(error.what.contains("no_such_thing"), "{}", error.what);
    }

    #[test]
    fn an_explicit_path_is_binding() {
        let search = Search::new(["libc.so.6"]).path(Some(PathBuf::from("/nowhere/libx.so")));
        let error = search.open().expect_err("the path names nothing");
        assert_eq!(error.looked_for, ["/nowhere/libx.so"]);
    }

    #[test]
    fn wheels_are_searched_below_their_roots() {
        let root = std::env::temp_dir().join(format!("attention-cuda-wheels-{}", std::process::id()));
        let folder = root.join("nvidia/cudnn/lib");
        std::fs::create_dir_all(&folder).expect("a folder");
        std::fs::write(folder.join("libno_such_thing.so.9"), "not a library").expect("a file");
        let search = Search::new(["libno_such_thing.so.9"]).wheel_roots(vec![root.clone()]);
        let error = search.open().expect_err("the file is no library");
        std::fs::remove_dir_all(&root).expect("cleaned up");
        assert_eq!(error.looked_for.len(), 2);
        assert!(error.looked_for[1].ends_with("nvidia/cudnn/lib/libno_such_thing.so.9"));

        let search = Search::new(["libno_such_thing.so.9"]).wheel_roots(vec!["/nowhere".into()]);
        let error = search.open().expect_err("there is no such folder");
        assert_eq!(error.looked_for, ["libno_such_thing.so.9", "/nowhere/nvidia/*/lib"]);
    }
}
