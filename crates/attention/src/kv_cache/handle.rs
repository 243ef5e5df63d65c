//! Handles of the sequences of a paged cache.

/// A handle of a sequence in a [`PagedKvCache`](super::PagedKvCache). Once the sequence was freed, it is an
/// error to use it, also where another sequence has taken its place; so is a handle of another cache.
///
/// Printed, it is its place in the cache and how many sequences were there before: `sequence 3.0`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Sequence {
    pub(super) cache: u64,
    pub(super) slot: usize,
    pub(super) generation: u64,
}

impl std::fmt::Display for Sequence {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "sequence {}.{}", self.slot, self.generation)
    }
}
