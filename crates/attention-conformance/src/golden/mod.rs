//! Golden sets: calls with expected values that another implementation has computed, in files.
//!
//! A set is a directory with a `manifest.json` and one safetensors file a case. Format 1 holds what
//! `jax.nn.dot_product_attention` can do, format 2 what it has no option for; `golden/README.md` of this crate
//! describes both. A key that this reader does not know is an error: it might change what is computed.

mod bounds;
mod error;
mod file;
mod limits;
mod manifest;
mod problem;
mod run;

pub use error::GoldenError;
pub use manifest::{Alibi, Dims, DropoutParams, Entry, JaxErrors, Manifest, Offset, Params};

use std::path::{Path, PathBuf};

use attention_core::{DType, Pass};

use crate::report::{About, Counting, Report};
use crate::suite::{Progress, Subject};

/// What results are measured by in f32 and half precision. In f64 it is always an error of 1e-12.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Limits {
    /// Twice the error of unmodified JAX on the same case: a measure of quality.
    #[default]
    Jax,
    /// The bounds of [`tolerance`](crate::tolerance), which every backend of the class keeps.
    Derived,
}

/// A directory with golden cases.
#[derive(Clone, Debug)]
pub struct GoldenSet {
    directory: PathBuf,
    manifest: Manifest,
    limits: Limits,
}

impl GoldenSet {
    /// Reads the manifest of a set.
    ///
    /// # Errors
    /// [`GoldenError`] where the manifest cannot be read, has a key that this reader does not know, or contradicts
    /// itself. The files of the cases are read when they run, and what is wrong with one is that case's failure.
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

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.manifest.cases.is_empty()
    }

    /// The names of the cases, in order.
    pub fn names(&self) -> Vec<&str> {
        self.manifest.cases.iter().map(|entry| entry.id.as_str()).collect()
    }

    /// Runs the cases whose name contains `filter`, in these dtypes: forward with the logsumexp, and backward from
    /// what forward wrote. Each gives two results.
    pub fn run<'a>(
        &self,
        subject: impl Into<Subject<'a>>,
        dtypes: &[DType],
        filter: Option<&str>,
        mut progress: impl FnMut(Progress<'_>),
    ) -> Report {
        let subject = subject.into();
        let entries: Vec<&Entry> = (self.manifest.cases.iter())
            .filter(|entry| filter.is_none_or(|part| entry.id.contains(part)))
            .collect();
        let total = 2 * entries.len() * dtypes.len();
        let mut results = Vec::with_capacity(total);
        let mut filters = Vec::new();
        if let Some(part) = filter {
            let (left, all) = (entries.len(), self.len());
            filters.push(format!("{left} of {all} cases, whose names contain '{part}'"));
        }
        if DType::FLOATS.iter().any(|dtype| !dtypes.contains(dtype)) {
            filters.push(format!(
                "dtypes {}",
                dtypes.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
            ));
        }
        let about = About::here(subject.device.as_deref(), filters);
        let counting = Counting::start(subject.backends());
        for &dtype in dtypes {
            for entry in &entries {
                for pass in [Pass::Forward, Pass::Backward] {
                    let result = run::run_entry(self, &subject, entry, dtype, pass);
                    progress(Progress { done: results.len() + 1, total, result: &result });
                    results.push(result);
                }
            }
        }
        let (backend, version) = (subject.backend.name().to_owned(), subject.backend.version().to_owned());
        Report { backend, version, about, variants: counting.finish(), results }
    }
}

/// The sets that come with this crate: JAX's options, and the extended ones.
pub fn own_sets() -> Vec<PathBuf> {
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("golden");
    ["jax", "extended"].into_iter().map(|name| golden.join(name)).collect()
}
