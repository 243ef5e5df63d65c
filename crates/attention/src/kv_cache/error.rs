//! What a cache refuses.

use attention_core::{InvalidCall, OutOfMemory};

use super::handle::Sequence;

/// What a cache refuses: nothing of it was changed. `Debug` is the text.
#[derive(Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum CacheError {
    /// A size that no cache has.
    #[error("{what} is {size}, expected {least} to {most}")]
    Size {
        /// Which size.
        what: &'static str,
        /// The size given.
        size: usize,
        /// The smallest.
        least: usize,
        /// The largest.
        most: usize,
    },
    /// There is no cache of such tokens: a dtype that is no float of calls, sizes that overflow, memory that is
    /// not what was asked for.
    #[error("the cache: {0}")]
    Cache(InvalidCall),
    /// New keys or values are not what the cache holds: another dtype, shape or device. `key` and `value` in
    /// the message are theirs.
    #[error("new tokens: {0}")]
    Tokens(#[from] InvalidCall),
    /// Fewer pages are free than an append needs, those for copies of shared pages included.
    #[error(
        "the append needs {needed} pages, and {free} of {pages} are free: free or truncate sequences first"
    )]
    Full {
        /// The pages that it needs.
        needed: usize,
        /// The pages that are free.
        free: usize,
        /// The pages of the cache.
        pages: usize,
    },
    /// A sequence would get longer than the cache takes one.
    #[error("sequence {index} has {length} tokens, and {new} more are above the {longest} that it may have")]
    TooLong {
        /// Which of the sequences of the append, counted from 0; of a contiguous cache, which batch row.
        index: usize,
        /// Its tokens.
        length: usize,
        /// Those to be appended.
        new: usize,
        /// The most that it may have.
        longest: usize,
    },
    /// More tokens are to be kept than a sequence has.
    #[error("{kept} tokens are to be kept, and the sequence has {length}")]
    TooFew {
        /// The tokens to be kept.
        kept: usize,
        /// The tokens that there are.
        length: usize,
    },
    /// A contiguous cache has no such batch row.
    #[error("there is no sequence {index}, the cache has {batch}")]
    NoSuchSequence {
        /// The batch row asked for.
        index: usize,
        /// How many there are.
        batch: usize,
    },
    /// The sequence was freed.
    #[error("{sequence} was freed")]
    Freed {
        /// Its handle.
        sequence: Sequence,
    },
    /// The sequence, or the batch, is one of another cache.
    #[error("{what} belongs to another cache")]
    OtherCache {
        /// What it is.
        what: String,
    },
    /// A sequence is twice in one append.
    #[error("{sequence} is given twice")]
    Twice {
        /// Its handle.
        sequence: Sequence,
    },
    /// Another number of sequences than of what goes with them.
    #[error("{sequences} sequences were given, and {what} {given}")]
    Count {
        /// How many sequences.
        sequences: usize,
        /// What goes with them.
        what: &'static str,
        /// How many of it.
        given: usize,
    },
    /// Memory that is not the library's failed: [`CacheMemory`](super::CacheMemory).
    #[error("the memory of the cache failed: {reason}")]
    Memory {
        /// What it said, in words.
        reason: String,
    },
    /// The allocator refused.
    #[error(transparent)]
    OutOfMemory(#[from] OutOfMemory),
}

/// An empty list with room for this many elements.
pub(super) fn reserved<T>(what: &'static str, count: usize) -> Result<Vec<T>, OutOfMemory> {
    let mut list = Vec::new();
    let bytes = count.saturating_mul(size_of::<T>());
    list.try_reserve_exact(count).map_err(|_| OutOfMemory { what, bytes })?;
    Ok(list)
}

impl std::fmt::Debug for CacheError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        std::fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_that_no_memory_holds_is_an_error() {
        let error = reserved::<u64>("a list", usize::MAX).expect_err("more than an address space");
        assert_eq!(error, OutOfMemory { what: "a list", bytes: usize::MAX });
        assert!(reserved::<u64>("a list", 3).is_ok_and(|list| list.is_empty() && list.capacity() >= 3));
    }
}
