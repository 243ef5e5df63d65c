//! A cache whose sequences share the pages of a pool.

use std::collections::{HashMap, HashSet};

use attention_core::Dims;

use super::error::CacheError;
use super::handle::Sequence;
use super::memory::{CacheMemory, HostMemory, IntoCacheTensor, PageCopy, Write};
use super::pool::Pool;
use super::sequences::{Sequences, State};
use super::store::{NewTokens, Store};
use super::token::{TokenShape, at_least_one, check_offsets};

/// The pages of a cache, and how long its sequences may get.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PoolShape {
    /// How many pages there are.
    pub pages: usize,
    /// How many tokens a page has room for.
    pub page_size: usize,
    /// How many tokens a sequence may have: tables of calls have entries for as many, or for all pages where
    /// those are fewer, and calls are planned for them.
    pub longest: usize,
}

/// Keys `[pages, page_size, K, H]` and values `[pages, page_size, K, Hv]` of sequences that take pages as
/// they grow.
///
/// Sequences that were [forked](Self::fork) share pages. A page that is shared is never written: the sequence
/// that appends to it gets a copy first, of the one page that both have partly filled.
///
/// [`kv_cache`](super) has an example.
#[derive(Debug)]
pub struct PagedKvCache<M = HostMemory> {
    shape: PoolShape,
    pool: Pool,
    sequences: Sequences,
    store: Store<M>,
}

/// New tokens of one sequence.
#[derive(Clone, Copy)]
struct Part {
    sequence: Sequence,
    /// The first two indices of the first of them.
    from: [usize; 2],
    count: usize,
}

/// What an append does, worked out before it does anything.
#[derive(Default)]
struct Step {
    copies: Vec<PageCopy>,
    writes: Vec<Write>,
    /// For each part: whether the sequence gets a copy of its last page, and how many pages more.
    pages: Vec<(bool, usize)>,
    /// All of these.
    needed: usize,
}

impl PagedKvCache {
    /// A cache without sequences, in host memory.
    ///
    /// # Errors
    /// [`CacheError::Size`] for a size, a number of heads or a width of 0, or sizes of more than 2^31 - 1;
    /// [`CacheError::Cache`] for a dtype that is no float of calls, or sizes that overflow;
    /// [`CacheError::OutOfMemory`].
    pub fn new(token: TokenShape, shape: PoolShape) -> Result<Self, CacheError> {
        Self::with_memory(token, shape, |shapes| HostMemory::new(token.dtype, shapes))
    }
}

impl<M: CacheMemory> PagedKvCache<M> {
    /// As [`new`](PagedKvCache::new), in memory that `make` gives for the shapes of keys and values, `[pages,
    /// page_size, K, H]` and `[pages, page_size, K, Hv]`. It is called once the sizes were checked.
    ///
    /// # Errors
    /// As [`new`](PagedKvCache::new); those of `make`; [`CacheError::Cache`] where the memory is not what
    /// was asked for.
    pub fn with_memory(
        token: TokenShape,
        shape: PoolShape,
        make: impl FnOnce([Dims; 2]) -> Result<M, CacheError>,
    ) -> Result<Self, CacheError> {
        at_least_one("the number of pages", shape.pages)?;
        at_least_one("the page size", shape.page_size)?;
        at_least_one("the longest sequence", shape.longest)?;
        let store = Store::new(token, [shape.pages, shape.page_size], make)?;
        Ok(Self { shape, pool: Pool::new(shape.pages)?, sequences: Sequences::new(), store })
    }

    /// Adds an empty sequence, which takes no page before its first token.
    pub fn add(&mut self) -> Sequence {
        self.sequences.add(0, Vec::new())
    }

    /// Appends tokens to a sequence: keys `[n, K, H]` and values `[n, K, Hv]` of any strides.
    ///
    /// # Errors
    /// [`CacheError::Tokens`] for other shapes, dtypes or memory than the cache's; [`CacheError::Full`],
    /// [`CacheError::TooLong`], [`CacheError::Freed`], [`CacheError::OtherCache`]: nothing is appended then.
    pub fn append<'a>(
        &mut self,
        sequence: Sequence,
        keys: impl IntoCacheTensor<'a, M>,
        values: impl IntoCacheTensor<'a, M>,
    ) -> Result<(), CacheError> {
        let tokens = self.store.tokens_of_one(keys, values)?;
        self.append_parts(&[Part { sequence, from: [0, 0], count: tokens.count() }], tokens)
    }

    /// Appends as many tokens to each of these sequences: keys `[B, n, K, H]` and values `[B, n, K, Hv]` of
    /// any strides. A step of decoding has `n = 1`.
    ///
    /// # Errors
    /// As [`append`](Self::append), and [`CacheError::Twice`] for a sequence that is given twice: nothing is
    /// appended to any then.
    pub fn append_each<'a>(
        &mut self,
        sequences: &[Sequence],
        keys: impl IntoCacheTensor<'a, M>,
        values: impl IntoCacheTensor<'a, M>,
    ) -> Result<(), CacheError> {
        let tokens = self.store.tokens_of_each(sequences.len(), keys, values)?;
        let part = |(index, &sequence)| Part { sequence, from: [index, 0], count: tokens.count() };
        let parts: Vec<Part> = sequences.iter().enumerate().map(part).collect();
        self.append_parts(&parts, tokens)
    }

    /// Appends packed tokens, keys `[total, K, H]` and values `[total, K, Hv]` of any strides: those from
    /// `offsets[b]` to before `offsets[b + 1]` to `sequences[b]`.
    ///
    /// # Errors
    /// As [`append_each`](Self::append_each); [`CacheError::Count`] where `offsets` are not one more than
    /// `sequences`, and [`CacheError::Tokens`] where they do not rise from 0 to at most `total`.
    pub fn append_packed<'a>(
        &mut self,
        sequences: &[Sequence],
        offsets: &[usize],
        keys: impl IntoCacheTensor<'a, M>,
        values: impl IntoCacheTensor<'a, M>,
    ) -> Result<(), CacheError> {
        let tokens = self.store.tokens_of_one(keys, values)?;
        check_offsets(sequences.len(), offsets, tokens.count())?;
        let part = |(&sequence, part): (&Sequence, &[usize])| Part {
            sequence,
            from: [0, part[0]],
            count: part[1] - part[0],
        };
        let parts: Vec<Part> = sequences.iter().zip(offsets.windows(2)).map(part).collect();
        self.append_parts(&parts, tokens)
    }

    /// How many free pages an append of this many tokens to each of these sequences would take.
    ///
    /// # Errors
    /// As that append: [`CacheError::Freed`], [`CacheError::OtherCache`], [`CacheError::Twice`],
    /// [`CacheError::TooLong`]; and [`CacheError::Count`] for another number of counts than of sequences.
    pub fn pages_for(&self, sequences: &[Sequence], tokens: &[usize]) -> Result<usize, CacheError> {
        if sequences.len() != tokens.len() {
            let (sequences, what, given) = (sequences.len(), "numbers of tokens", tokens.len());
            return Err(CacheError::Count { sequences, what, given });
        }
        let part = |(&sequence, &count)| Part { sequence, from: [0, 0], count };
        let parts: Vec<Part> = sequences.iter().zip(tokens).map(part).collect();
        Ok(self.step(&parts)?.needed)
    }

    /// Checks an append, then does it: first in memory, which may fail, and in the books once that has not.
    fn append_parts(&mut self, parts: &[Part], tokens: NewTokens<M::Tensor<'_>>) -> Result<(), CacheError> {
        let mut step = self.step(parts)?;
        let (needed, free, pages) = (step.needed, self.pool.free(), self.pool.pages());
        if needed > free {
            return Err(CacheError::Full { needed, free, pages });
        }
        self.place(parts, &mut step)?;
        self.store.update(&step.copies, &step.writes, tokens)?;
        for (part, &(copies, new)) in parts.iter().zip(&step.pages) {
            if copies {
                let (page, stamp) = (self.pool.take(), self.sequences.stamp());
                let state = self.sequences.get_mut(part.sequence)?;
                state.stamp = stamp;
                let shared = state.pages.last_mut().map(|last| std::mem::replace(last, page));
                shared.into_iter().for_each(|shared| self.pool.release(shared));
            }
            let state = self.sequences.get_mut(part.sequence)?;
            state.pages.extend((0..new).map(|_| self.pool.take()));
            state.length += part.count;
        }
        Ok(())
    }

    /// How many pages an append takes.
    fn step(&self, parts: &[Part]) -> Result<Step, CacheError> {
        let PoolShape { page_size, longest, .. } = self.shape;
        let mut step = Step { pages: Vec::with_capacity(parts.len()), ..Step::default() };
        // How many sequences of this append have given a page up for a copy of it.
        let mut given_up: HashMap<i32, usize> = HashMap::new();
        let mut given = HashSet::with_capacity(parts.len());
        for (index, &Part { sequence, count, .. }) in parts.iter().enumerate() {
            let state = self.sequences.get(sequence)?;
            if !given.insert(sequence) {
                return Err(CacheError::Twice { sequence });
            }
            let length = state.length;
            if count > longest.saturating_sub(length) {
                return Err(CacheError::TooLong { index, length, new: count, longest });
            }
            let filled = state.pages.last().filter(|_| count > 0 && length % page_size > 0);
            let copies = filled.is_some_and(|&page| {
                let references = self.pool.references(page as usize).unwrap_or(0);
                // Mostly, and then nothing needs to be looked up.
                if references <= 1 {
                    return false;
                }
                let given_up = given_up.entry(page).or_default();
                // The last sequence that has the page keeps it.
                let copies = references - *given_up > 1;
                *given_up += usize::from(copies);
                copies
            });
            let new = (length + count).div_ceil(page_size) - state.pages.len();
            step.pages.push((copies, new));
            step.needed += new + usize::from(copies);
        }
        Ok(step)
    }

    /// Where an append copies and writes; the pages that it needs are free.
    fn place(&self, parts: &[Part], step: &mut Step) -> Result<(), CacheError> {
        let page_size = self.shape.page_size;
        let mut taken = 0;
        for (&Part { sequence, from: [outer, first], count }, &(copies, new)) in parts.iter().zip(&step.pages)
        {
            let State { length, pages, .. } = self.sequences.get(sequence)?;
            let (old, copy) = (pages.len(), taken);
            taken += usize::from(copies);
            if copies {
                let (from, to) = (pages[old - 1] as usize, self.pool.next(copy) as usize);
                step.copies.push(PageCopy { from, to, slots: length % page_size });
            }
            let page = |index: usize| match index {
                _ if index >= old => self.pool.next(taken + index - old),
                _ if copies => self.pool.next(copy),
                _ => pages[index],
            };
            let mut done = 0;
            while done < count {
                let slot = (length + done) % page_size;
                let rows = (page_size - slot).min(count - done);
                let to = [page((length + done) / page_size) as usize, slot];
                step.writes.push(Write { from: [outer, first + done], to, count: rows });
                done += rows;
            }
            taken += new;
        }
        Ok(())
    }

    /// A new sequence with the tokens of another one, whose pages it shares: nothing is copied, and no page
    /// is taken, before one of them appends to a page that both have partly filled.
    ///
    /// # Errors
    /// [`CacheError::Freed`], [`CacheError::OtherCache`].
    pub fn fork(&mut self, sequence: Sequence) -> Result<Sequence, CacheError> {
        self.fork_prefix(sequence, self.len(sequence)?)
    }

    /// As [`fork`](Self::fork), with the first `tokens` tokens alone.
    ///
    /// # Errors
    /// As [`fork`](Self::fork); [`CacheError::TooFew`] where the sequence has fewer.
    pub fn fork_prefix(&mut self, sequence: Sequence, tokens: usize) -> Result<Sequence, CacheError> {
        let State { length, pages, .. } = self.sequences.get(sequence)?;
        if tokens > *length {
            return Err(CacheError::TooFew { kept: tokens, length: *length });
        }
        let pages = pages[..tokens.div_ceil(self.shape.page_size)].to_vec();
        pages.iter().for_each(|&page| self.pool.share(page));
        Ok(self.sequences.add(tokens, pages))
    }

    /// Keeps the first `kept` tokens of a sequence; pages that it needs no more are free unless others have
    /// them.
    ///
    /// # Errors
    /// [`CacheError::TooFew`] where the sequence has fewer; [`CacheError::Freed`],
    /// [`CacheError::OtherCache`].
    pub fn truncate(&mut self, sequence: Sequence, kept: usize) -> Result<(), CacheError> {
        let stamp = self.sequences.stamp();
        let state = self.sequences.get_mut(sequence)?;
        if kept > state.length {
            return Err(CacheError::TooFew { kept, length: state.length });
        }
        state.length = kept;
        let pages = kept.div_ceil(self.shape.page_size);
        if pages < state.pages.len() {
            state.stamp = stamp;
            // The last page first, so that the first is the next to be taken.
            state.pages.drain(pages..).rev().for_each(|page| self.pool.release(page));
        }
        Ok(())
    }

    /// Frees a sequence: its handle is good for nothing from then on, and pages that no other sequence has
    /// are free.
    ///
    /// # Errors
    /// [`CacheError::Freed`], [`CacheError::OtherCache`].
    pub fn free(&mut self, sequence: Sequence) -> Result<(), CacheError> {
        let state = self.sequences.remove(sequence)?;
        state.pages.into_iter().rev().for_each(|page| self.pool.release(page));
        Ok(())
    }

    /// Frees every sequence.
    pub fn clear(&mut self) {
        let handles: Vec<Sequence> = self.sequences.handles().collect();
        for sequence in handles {
            let freed = self.free(sequence);
            debug_assert_eq!(freed, Ok(()));
        }
    }

    /// How many tokens a sequence has.
    ///
    /// # Errors
    /// [`CacheError::Freed`], [`CacheError::OtherCache`].
    pub fn len(&self, sequence: Sequence) -> Result<usize, CacheError> {
        Ok(self.state(sequence)?.length)
    }

    /// Whether no sequence has a token.
    pub fn is_empty(&self) -> bool {
        self.used_pages() == 0
    }

    /// The pages of a sequence, in order.
    ///
    /// # Errors
    /// [`CacheError::Freed`], [`CacheError::OtherCache`].
    pub fn pages(&self, sequence: Sequence) -> Result<&[i32], CacheError> {
        Ok(&self.state(sequence)?.pages)
    }

    /// How many sequences there are.
    pub fn sequence_count(&self) -> usize {
        self.sequences.count()
    }

    /// How many pages no sequence has.
    pub fn free_pages(&self) -> usize {
        self.pool.free()
    }

    /// How many pages a sequence has, or several share.
    pub fn used_pages(&self) -> usize {
        self.pool.pages() - self.pool.free()
    }

    /// How many sequences have this page; `None` where there is no such page.
    pub fn references(&self, page: usize) -> Option<usize> {
        self.pool.references(page)
    }

    /// The pages, and how long a sequence may get.
    pub fn shape(&self) -> PoolShape {
        self.shape
    }

    /// What is kept of a token.
    pub fn token(&self) -> TokenShape {
        self.store.token()
    }

    /// Where keys and values are.
    pub fn memory(&self) -> &M {
        self.store.memory()
    }

    /// The keys, `[pages, page_size, K, H]`.
    pub fn keys(&self) -> M::Tensor<'_> {
        self.store.keys()
    }

    /// The values, `[pages, page_size, K, Hv]`.
    pub fn values(&self) -> M::Tensor<'_> {
        self.store.values()
    }

    /// Which cache this is, of all in the process.
    pub(super) fn id(&self) -> u64 {
        self.sequences.cache()
    }

    /// How many pages a sequence may have: none has a page twice.
    pub(super) fn most_pages(&self) -> usize {
        self.shape.longest.div_ceil(self.shape.page_size).min(self.shape.pages)
    }

    pub(super) fn state(&self, sequence: Sequence) -> Result<&State, CacheError> {
        self.sequences.get(sequence)
    }
}
