//! Sequences of a call over a paged cache, with their table and lengths ready as tensors.

use attention_core::View;

use super::error::CacheError;
use super::handle::Sequence;
use super::memory::CacheMemory;
use super::paged::PagedKvCache;
use super::sequences::State;

/// What an entry of the table is that no key needs.
pub(super) const NO_PAGE: i32 = -1;

/// Sequences that are called together, in order: sequence `b` of the call is the `b`-th. Made by
/// [`PagedKvCache::batch`], and brought up to date by [`PagedKvCache::inputs`], which writes the entries of
/// new pages and the lengths: the table is not built again.
#[derive(Clone, Debug)]
pub struct PagedBatch {
    cache: u64,
    /// Entries of a row of the table.
    most: usize,
    sequences: Vec<Sequence>,
    /// Of each sequence, which pages its row of the table has.
    seen: Vec<Seen>,
    table: Vec<i32>,
    lengths: Vec<i32>,
}

#[derive(Clone, Copy, Debug)]
struct Seen {
    stamp: u64,
    pages: usize,
}

/// The tensors of a cache and of a batch for [`Attention::paged`](crate::Attention::paged).
#[derive(Clone, Copy, Debug)]
pub struct PagedInputs<'a, T = View<'a>> {
    /// `[pages, page_size, K, H]`.
    pub keys: T,
    /// `[pages, page_size, K, Hv]`.
    pub values: T,
    /// `[B, most]` of i32, in host memory; -1 where a sequence has no page.
    pub table: View<'a>,
    /// `[B]` of i32, in host memory.
    pub lengths: View<'a>,
    /// Which cache they are of.
    #[cfg(feature = "cuda")]
    pub(super) cache: u64,
}

impl PagedBatch {
    pub(super) fn new(cache: u64, most: usize) -> Self {
        Self { cache, most, sequences: vec![], seen: vec![], table: vec![], lengths: vec![] }
    }

    /// The sequences, in order.
    pub fn sequences(&self) -> &[Sequence] {
        &self.sequences
    }

    /// `B`.
    pub fn len(&self) -> usize {
        self.sequences.len()
    }

    /// Whether there are no sequences.
    pub fn is_empty(&self) -> bool {
        self.sequences.is_empty()
    }

    /// Adds a sequence at the end. Whether it is one of the cache, the next [`PagedKvCache::inputs`] says.
    pub fn push(&mut self, sequence: Sequence) {
        self.sequences.push(sequence);
        // No sequence has stamp 0.
        self.seen.push(Seen { stamp: 0, pages: 0 });
        self.table.resize(self.table.len() + self.most, NO_PAGE);
        self.lengths.push(0);
    }

    /// Takes a sequence out, freed or not; those behind it move up. `false` where the batch does not have it.
    pub fn remove(&mut self, sequence: Sequence) -> bool {
        let Some(index) = self.sequences.iter().position(|&other| other == sequence) else { return false };
        self.sequences.remove(index);
        self.seen.remove(index);
        self.table.drain(index * self.most..(index + 1) * self.most);
        self.lengths.remove(index);
        true
    }

    /// Brings the table and the lengths up to date.
    fn update(&mut self, index: usize, state: &State) {
        let (row, seen) =
            (&mut self.table[index * self.most..(index + 1) * self.most], &mut self.seen[index]);
        if seen.stamp != state.stamp {
            row[..seen.pages].fill(NO_PAGE);
            *seen = Seen { stamp: state.stamp, pages: 0 };
        }
        row[seen.pages..state.pages.len()].copy_from_slice(&state.pages[seen.pages..]);
        seen.pages = state.pages.len();
        // At most the longest of the cache, which an i32 holds.
        self.lengths[index] = state.length as i32;
    }
}

impl<M: CacheMemory> PagedKvCache<M> {
    /// A batch of these sequences, in this order. A sequence may be in it more than once, and in any number
    /// of batches.
    ///
    /// # Errors
    /// [`CacheError::Freed`], [`CacheError::OtherCache`].
    pub fn batch(&self, sequences: impl IntoIterator<Item = Sequence>) -> Result<PagedBatch, CacheError> {
        let mut batch = PagedBatch::new(self.id(), self.most_pages());
        for sequence in sequences {
            self.len(sequence)?;
            batch.push(sequence);
        }
        Ok(batch)
    }

    /// The tensors of a call over the sequences of a batch as they are now.
    ///
    /// # Errors
    /// [`CacheError::OtherCache`] for a batch of another cache; [`CacheError::Freed`] where a sequence of it
    /// was freed.
    pub fn inputs<'a>(
        &'a self,
        batch: &'a mut PagedBatch,
    ) -> Result<PagedInputs<'a, M::Tensor<'a>>, CacheError> {
        if batch.cache != self.id() {
            return Err(CacheError::OtherCache { what: "the batch".to_owned() });
        }
        for index in 0..batch.sequences.len() {
            batch.update(index, self.state(batch.sequences[index])?);
        }
        let (batch, sequences) = (&*batch, batch.len());
        Ok(PagedInputs {
            keys: self.keys(),
            values: self.values(),
            table: View::from_slice(&batch.table, [sequences, batch.most])?,
            lengths: View::from_slice(&batch.lengths, [sequences])?,
            #[cfg(feature = "cuda")]
            cache: batch.cache,
        })
    }
}
