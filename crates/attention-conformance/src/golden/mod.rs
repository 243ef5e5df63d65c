//! Golden sets: calls with expected values that another implementation has computed, in files.
//!
//! A set is a directory with a `manifest.json` and one safetensors file a case. Format 1 holds what
//! `jax.nn.dot_product_attention` can do, format 2 what it has no option for, format 3 packed and paged
//! sequences; `golden/README.md` of this crate describes them. A key that this reader does not know is an
//! error: it might change what is computed.

mod bounds;
mod error;
mod file;
mod limits;
mod manifest;
mod problem;
mod run;
mod sequences;
mod set;

pub use error::GoldenError;
pub use limits::Limits;
pub use manifest::{Alibi, Dims, DropoutParams, Entry, JaxErrors, Manifest, Offset, Params, SequenceKind};
pub use set::GoldenSet;

use std::path::{Path, PathBuf};

/// The sets that come with this crate: JAX's options, the extended ones, and packed and paged
/// sequences.
pub fn own_sets() -> Vec<PathBuf> {
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("golden");
    ["jax", "extended", "sequences"].into_iter().map(|name| golden.join(name)).collect()
}
