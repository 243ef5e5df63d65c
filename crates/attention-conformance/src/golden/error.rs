//! What can be wrong with a golden set.

use std::path::PathBuf;

/// What is wrong with a golden set, and where. `Debug` is the text.
#[derive(thiserror::Error)]
#[non_exhaustive]
pub enum GoldenError {
    /// A file cannot be read.
    #[error("cannot read {}: {source}", .path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The manifest is not in the schema: an unknown or missing key, a value of another type.
    #[error("{}: {source}", .path.display())]
    Manifest {
        /// The manifest.
        path: PathBuf,
        /// What the parser said, with the line.
        source: serde_json::Error,
    },
    /// The manifest contradicts itself, or asks for what this reader does not know.
    #[error("{}: {what}", .path.display())]
    Contradiction {
        /// The manifest.
        path: PathBuf,
        /// What is wrong, with the case.
        what: String,
    },
    /// A case's file is no safetensors file.
    #[error("{}: {source}", .path.display())]
    Safetensors {
        /// The file.
        path: PathBuf,
        /// What the parser said.
        source: safetensors::SafeTensorError,
    },
    /// A case's file does not hold what the manifest says.
    #[error("{}: {what}", .path.display())]
    Tensor {
        /// The file.
        path: PathBuf,
        /// Which tensor, what it is and what it should be.
        what: String,
    },
}

impl std::fmt::Debug for GoldenError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        std::fmt::Display::fmt(self, f)
    }
}
