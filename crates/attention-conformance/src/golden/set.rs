//! A golden set on disk.

use std::path::{Path, PathBuf};

use super::{GoldenError, Limits, Manifest, SequenceKind};

/// A directory with golden cases.
#[derive(Clone, Debug)]
pub struct GoldenSet {
    pub(super) directory: PathBuf,
    manifest: Manifest,
    pub(super) limits: Limits,
}

impl GoldenSet {
    /// Reads the manifest of a set.
    ///
    /// # Errors
    /// [`GoldenError`] where the manifest cannot be read, has a key that this reader does not know, or
    /// contradicts itself. The files of the cases are read when they run, and what is wrong with one is that
    /// case's failure.
    pub fn open(directory: impl AsRef<Path>) -> Result<Self, GoldenError> {
        let directory = directory.as_ref().to_owned();
        let manifest = Manifest::read(&directory.join("manifest.json"))?;
        Ok(Self { directory, manifest, limits: Limits::default() })
    }

    /// Measures by these limits instead of [`Limits::Jax`].
    #[must_use]
    pub fn limits(mut self, limits: Limits) -> Self {
        self.limits = limits;
        self
    }

    /// The manifest.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// How many cases there are.
    pub fn len(&self) -> usize {
        self.manifest.cases.len()
    }

    /// How many passes the cases have together: two each, and one where keys are in pages.
    pub fn passes(&self) -> usize {
        let paged = |entry: &&super::Entry| entry.params.sequences == Some(SequenceKind::Paged);
        2 * self.len() - self.manifest.cases.iter().filter(paged).count()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.manifest.cases.is_empty()
    }

    /// The names of the cases, in order.
    pub fn names(&self) -> Vec<&str> {
        self.manifest.cases.iter().map(|entry| entry.id.as_str()).collect()
    }
}
