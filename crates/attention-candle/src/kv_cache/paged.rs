//! A cache whose sequences share the pages of a pool.

use attention::kv_cache::{self, PagedBatch, PoolShape, Sequence};
use candle_core::{Device, Result, Tensor};

use super::memory::{TensorMemory, numbers, place, told};
use super::token::TokenShape;

/// Keys `[pages, page_size, K, H]` and values `[pages, page_size, K, Hv]` of sequences that take pages as
/// they grow.
///
/// Sequences that were [forked](Self::fork) share pages. A page that is shared is never written: the sequence
/// that appends to it gets a copy first, of the one page that both have partly filled.
///
/// [`kv_cache`](super) has an example.
///
/// # Errors
/// Those of all methods are [`candle_core::Error::WrappedContext`] with an [`Error`](crate::Error), which
/// [`cause`](crate::cause) takes out: [`attention::Error::Cache`] with the [`CacheError`](super::CacheError)
/// inside [`Error::Call`](crate::Error::Call), or what is wrong with a tensor.
#[derive(Debug)]
pub struct PagedKvCache {
    cache: kv_cache::PagedKvCache<TensorMemory>,
    token: TokenShape,
}

/// The tensors of a call over a batch of sequences: [`Attention::paged`](crate::Attention::paged) takes table
/// and lengths.
#[derive(Clone, Debug)]
pub struct PagedInputs {
    /// `[pages, page_size, K, H]`: the cache's memory.
    pub keys: Tensor,
    /// `[pages, page_size, K, Hv]`: the cache's memory.
    pub values: Tensor,
    /// `[B, most]` of i32, on the CPU; -1 where a sequence has no page.
    pub table: Tensor,
    /// `[B]` of i32, on the CPU.
    pub lengths: Tensor,
}

impl PagedKvCache {
    /// A cache without sequences, of zeros on this device.
    ///
    /// # Errors
    /// [`CacheError::Size`](super::CacheError::Size) for a size, a number of heads or a width of 0, or sizes
    /// of more than 2^31 - 1; [`CacheError::Cache`](super::CacheError::Cache) for sizes that overflow;
    /// [`CacheError::OutOfMemory`](super::CacheError::OutOfMemory),
    /// [`CacheError::Memory`](super::CacheError::Memory); [`Error::DType`](crate::Error::DType),
    /// [`Error::Device`](crate::Error::Device).
    pub fn new(token: TokenShape, shape: PoolShape, device: &Device) -> Result<Self> {
        let what = "PagedKvCache::new";
        let facade = token.facade().map_err(|error| error.in_call(what))?;
        let place = place(device).map_err(|error| error.in_call(what))?;
        let make = |shapes| TensorMemory::new(facade.dtype, (place, device), shapes);
        let cache = told(what, kv_cache::PagedKvCache::with_memory(facade, shape, make))?;
        Ok(Self { cache, token })
    }

    /// Adds an empty sequence, which takes no page before its first token.
    pub fn add(&mut self) -> Sequence {
        self.cache.add()
    }

    /// Appends tokens to a sequence: keys `[n, K, H]` and values `[n, K, Hv]` of any layout.
    ///
    /// # Errors
    /// [`CacheError::Tokens`](super::CacheError::Tokens) for other shapes or dtypes than the cache's;
    /// [`Error::CacheDevice`](crate::Error::CacheDevice); [`CacheError::Full`](super::CacheError::Full),
    /// [`CacheError::TooLong`](super::CacheError::TooLong), [`CacheError::Freed`](super::CacheError::Freed),
    /// [`CacheError::OtherCache`](super::CacheError::OtherCache),
    /// [`CacheError::Memory`](super::CacheError::Memory): nothing is appended then.
    pub fn append(&mut self, sequence: Sequence, keys: &Tensor, values: &Tensor) -> Result<()> {
        let [keys, values] = self.cache.keys().new_tokens("append", keys, values)?;
        told("append", self.cache.append(sequence, keys, values))
    }

    /// Appends as many tokens to each of these sequences: keys `[B, n, K, H]` and values `[B, n, K, Hv]` of
    /// any layout. A step of decoding has `n = 1`.
    ///
    /// # Errors
    /// As [`append`](Self::append), and [`CacheError::Twice`](super::CacheError::Twice) for a sequence that
    /// is given twice: nothing is appended to any then.
    pub fn append_each(&mut self, sequences: &[Sequence], keys: &Tensor, values: &Tensor) -> Result<()> {
        let [keys, values] = self.cache.keys().new_tokens("append_each", keys, values)?;
        told("append_each", self.cache.append_each(sequences, keys, values))
    }

    /// Appends packed tokens, keys `[total, K, H]` and values `[total, K, Hv]` of any layout: those from
    /// `offsets[b]` to before `offsets[b + 1]` to `sequences[b]`.
    ///
    /// # Errors
    /// As [`append_each`](Self::append_each); [`CacheError::Count`](super::CacheError::Count) where `offsets`
    /// are not one more than `sequences`, and [`CacheError::Tokens`](super::CacheError::Tokens) where they do
    /// not rise from 0 to at most `total`.
    pub fn append_packed(
        &mut self,
        sequences: &[Sequence],
        offsets: &[usize],
        keys: &Tensor,
        values: &Tensor,
    ) -> Result<()> {
        let [keys, values] = self.cache.keys().new_tokens("append_packed", keys, values)?;
        told("append_packed", self.cache.append_packed(sequences, offsets, keys, values))
    }

    /// How many free pages an append of this many tokens to each of these sequences would take.
    ///
    /// # Errors
    /// As that append: [`CacheError::Freed`](super::CacheError::Freed),
    /// [`CacheError::OtherCache`](super::CacheError::OtherCache),
    /// [`CacheError::Twice`](super::CacheError::Twice), [`CacheError::TooLong`](super::CacheError::TooLong);
    /// and [`CacheError::Count`](super::CacheError::Count) for another number of counts than of sequences.
    pub fn pages_for(&self, sequences: &[Sequence], tokens: &[usize]) -> Result<usize> {
        told("pages_for", self.cache.pages_for(sequences, tokens))
    }

    /// A new sequence with the tokens of another one, whose pages it shares: nothing is copied, and no page
    /// is taken, before one of them appends to a page that both have partly filled.
    ///
    /// # Errors
    /// [`CacheError::Freed`](super::CacheError::Freed),
    /// [`CacheError::OtherCache`](super::CacheError::OtherCache).
    pub fn fork(&mut self, sequence: Sequence) -> Result<Sequence> {
        told("fork", self.cache.fork(sequence))
    }

    /// As [`fork`](Self::fork), with the first `tokens` tokens alone.
    ///
    /// # Errors
    /// As [`fork`](Self::fork); [`CacheError::TooFew`](super::CacheError::TooFew) where the sequence has
    /// fewer.
    pub fn fork_prefix(&mut self, sequence: Sequence, tokens: usize) -> Result<Sequence> {
        told("fork_prefix", self.cache.fork_prefix(sequence, tokens))
    }

    /// Keeps the first `kept` tokens of a sequence; pages that it needs no more are free unless others have
    /// them.
    ///
    /// # Errors
    /// [`CacheError::TooFew`](super::CacheError::TooFew) where the sequence has fewer;
    /// [`CacheError::Freed`](super::CacheError::Freed),
    /// [`CacheError::OtherCache`](super::CacheError::OtherCache).
    pub fn truncate(&mut self, sequence: Sequence, kept: usize) -> Result<()> {
        told("truncate", self.cache.truncate(sequence, kept))
    }

    /// Frees a sequence: its handle is good for nothing from then on, and pages that no other sequence has
    /// are free.
    ///
    /// # Errors
    /// [`CacheError::Freed`](super::CacheError::Freed),
    /// [`CacheError::OtherCache`](super::CacheError::OtherCache).
    pub fn free(&mut self, sequence: Sequence) -> Result<()> {
        told("free", self.cache.free(sequence))
    }

    /// Frees every sequence.
    pub fn clear(&mut self) {
        self.cache.clear();
    }

    /// How many tokens a sequence has.
    ///
    /// # Errors
    /// [`CacheError::Freed`](super::CacheError::Freed),
    /// [`CacheError::OtherCache`](super::CacheError::OtherCache).
    pub fn len(&self, sequence: Sequence) -> Result<usize> {
        told("len", self.cache.len(sequence))
    }

    /// Whether no sequence has a token.
    pub fn is_empty(&self) -> bool {
        self.cache.is_empty()
    }

    /// The pages of a sequence, in order.
    ///
    /// # Errors
    /// [`CacheError::Freed`](super::CacheError::Freed),
    /// [`CacheError::OtherCache`](super::CacheError::OtherCache).
    pub fn pages(&self, sequence: Sequence) -> Result<&[i32]> {
        told("pages", self.cache.pages(sequence))
    }

    /// How many sequences there are.
    pub fn sequence_count(&self) -> usize {
        self.cache.sequence_count()
    }

    /// How many pages no sequence has.
    pub fn free_pages(&self) -> usize {
        self.cache.free_pages()
    }

    /// How many pages a sequence has, or several share.
    pub fn used_pages(&self) -> usize {
        self.cache.used_pages()
    }

    /// How many sequences have this page; `None` where there is no such page.
    pub fn references(&self, page: usize) -> Option<usize> {
        self.cache.references(page)
    }

    /// The pages, and how long a sequence may get.
    pub fn shape(&self) -> PoolShape {
        self.cache.shape()
    }

    /// What is kept of a token.
    pub fn token(&self) -> TokenShape {
        self.token
    }

    /// The keys, `[pages, page_size, K, H]`: the cache's memory, which has later appends too.
    pub fn keys(&self) -> Tensor {
        self.cache.keys().into_tensor()
    }

    /// The values, `[pages, page_size, K, Hv]`: the cache's memory, which has later appends too.
    pub fn values(&self) -> Tensor {
        self.cache.values().into_tensor()
    }

    /// A batch of these sequences, in this order. A sequence may be in it more than once, and in any number
    /// of batches.
    ///
    /// # Errors
    /// [`CacheError::Freed`](super::CacheError::Freed),
    /// [`CacheError::OtherCache`](super::CacheError::OtherCache).
    pub fn batch(&self, sequences: impl IntoIterator<Item = Sequence>) -> Result<PagedBatch> {
        told("batch", self.cache.batch(sequences))
    }

    /// The tensors of a call over the sequences of a batch as they are now. Table and lengths are on the CPU,
    /// where the call checks them.
    ///
    /// # Errors
    /// [`CacheError::OtherCache`](super::CacheError::OtherCache) for a batch of another cache;
    /// [`CacheError::Freed`](super::CacheError::Freed) where a sequence of it was freed.
    pub fn inputs(&self, batch: &mut PagedBatch) -> Result<PagedInputs> {
        let inputs = told("inputs", self.cache.inputs(batch))?;
        Ok(PagedInputs {
            table: numbers(inputs.table)?,
            lengths: numbers(inputs.lengths)?,
            keys: inputs.keys.into_tensor(),
            values: inputs.values.into_tensor(),
        })
    }
}
