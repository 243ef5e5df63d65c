//! What a row measures.

use attention_benches::{Mask, Work};
use attention_core::{DType, Dimensions};

/// What a row measures, but for the backend and the peer.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Case {
    pub(crate) dims: Dimensions,
    pub(crate) dtype: DType,
    pub(crate) work: Work,
    pub(crate) causal: bool,
    pub(crate) mask: Mask,
}
