//! A cache with room for as many tokens in each batch row.

use attention_core::{Dims, View};

use super::error::{CacheError, reserved};
use super::memory::{CacheMemory, HostMemory, IntoCacheTensor, Write};
use super::store::{NewTokens, Store};
use super::token::{TokenShape, at_least_one, check_offsets};

/// Keys `[B, capacity, K, H]` and values `[B, capacity, K, Hv]` of `B` sequences, each filled from the front.
///
/// A call takes [`keys`](Self::keys), [`values`](Self::values) and [`lengths`](Self::lengths), which are
/// views of the cache: nothing is copied. Calls of [`Attention::bnth`](crate::Attention::bnth) permute the
/// views first.
///
/// # Examples
/// ```
/// # #[cfg(feature = "cpu")] {
/// use attention::kv_cache::{KvCache, TokenShape};
/// use attention::{Attention, DType, QueryOffset};
///
/// // 2 sequences of up to 32 tokens; 2 heads of 16.
/// let mut cache = KvCache::new(TokenShape::new(DType::F32, 2, 16), 2, 32)?;
/// // Prompts of 3 tokens and of 1.
/// cache.append_to(0, (&[0.5f32; 3 * 2 * 16], [3, 2, 16]), (&[0.5f32; 3 * 2 * 16], [3, 2, 16]))?;
/// cache.append_to(1, (&[0.5f32; 2 * 16], [1, 2, 16]), (&[0.5f32; 2 * 16], [1, 2, 16]))?;
///
/// let attention = Attention::new().causal(true).query_offset(QueryOffset::BottomRight);
/// for _ in 0..10 {
///     let (query, new) = ([0.1f32; 2 * 8 * 16], [0.2f32; 2 * 2 * 16]);
///     cache.append((&new, [2, 1, 2, 16]), (&new, [2, 1, 2, 16]))?;
///     let attention = attention.clone().key_value_lengths(cache.lengths());
///     let out = attention.forward((&query, [2, 1, 8, 16]), cache.keys(), cache.values())?;
///     assert_eq!(out.shape(), [2, 1, 8, 16].into());
/// }
/// assert_eq!([cache.len(0)?, cache.len(1)?], [13, 11]);
/// # }
/// # Ok::<(), attention::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct KvCache<M = HostMemory> {
    capacity: usize,
    lengths: Vec<i32>,
    store: Store<M>,
}

impl KvCache {
    /// An empty cache of `batch` sequences with room for `capacity` tokens each, in host memory.
    ///
    /// # Errors
    /// [`CacheError::Size`] for a capacity, a number of heads or a width of 0, or a capacity of more than
    /// 2^31 - 1; [`CacheError::Cache`] for a dtype that is no float of calls, or sizes that overflow;
    /// [`CacheError::OutOfMemory`].
    pub fn new(token: TokenShape, batch: usize, capacity: usize) -> Result<Self, CacheError> {
        Self::with_memory(token, batch, capacity, |shapes| HostMemory::new(token.dtype, shapes))
    }
}

impl<M: CacheMemory> KvCache<M> {
    /// As [`new`](KvCache::new), in memory that `make` gives for the shapes of keys and values, `[B,
    /// capacity, K, H]` and `[B, capacity, K, Hv]`. It is called once the sizes were checked.
    ///
    /// # Errors
    /// As [`new`](KvCache::new); those of `make`; [`CacheError::Cache`] where the memory is not what was
    /// asked for.
    pub fn with_memory(
        token: TokenShape,
        batch: usize,
        capacity: usize,
        make: impl FnOnce([Dims; 2]) -> Result<M, CacheError>,
    ) -> Result<Self, CacheError> {
        at_least_one("the capacity", capacity)?;
        let store = Store::new(token, [batch, capacity], make)?;
        let mut lengths = reserved("the lengths of a cache's sequences", batch)?;
        lengths.resize(batch, 0);
        Ok(Self { capacity, lengths, store })
    }

    /// Appends as many tokens to every sequence: keys `[B, n, K, H]` and values `[B, n, K, Hv]` of any
    /// strides.
    ///
    /// # Errors
    /// [`CacheError::Tokens`] for other shapes, dtypes or memory than the cache's; [`CacheError::TooLong`]
    /// where a sequence has no room: nothing is appended to any then.
    pub fn append<'a>(
        &mut self,
        keys: impl IntoCacheTensor<'a, M>,
        values: impl IntoCacheTensor<'a, M>,
    ) -> Result<(), CacheError> {
        let tokens = self.store.tokens_of_each(self.lengths.len(), keys, values)?;
        let count = tokens.count();
        let parts = (0..self.lengths.len()).map(move |index| (index, [index, 0], count));
        self.append_parts(parts, tokens)
    }

    /// Appends tokens to one sequence: keys `[n, K, H]` and values `[n, K, Hv]` of any strides.
    ///
    /// # Errors
    /// As [`append`](Self::append); [`CacheError::NoSuchSequence`].
    pub fn append_to<'a>(
        &mut self,
        sequence: usize,
        keys: impl IntoCacheTensor<'a, M>,
        values: impl IntoCacheTensor<'a, M>,
    ) -> Result<(), CacheError> {
        self.len(sequence)?;
        let tokens = self.store.tokens_of_one(keys, values)?;
        self.append_parts(std::iter::once((sequence, [0, 0], tokens.count())), tokens)
    }

    /// Appends packed tokens, keys `[total, K, H]` and values `[total, K, Hv]` of any strides: those from
    /// `offsets[b]` to before `offsets[b + 1]` to sequence `b`.
    ///
    /// # Errors
    /// As [`append`](Self::append); [`CacheError::Count`] where `offsets` are not `B + 1`, and
    /// [`CacheError::Tokens`] where they do not rise from 0 to at most `total`.
    pub fn append_packed<'a>(
        &mut self,
        offsets: &[usize],
        keys: impl IntoCacheTensor<'a, M>,
        values: impl IntoCacheTensor<'a, M>,
    ) -> Result<(), CacheError> {
        let tokens = self.store.tokens_of_one(keys, values)?;
        check_offsets(self.lengths.len(), offsets, tokens.count())?;
        let parts = offsets.windows(2).enumerate();
        let parts = parts.map(|(index, part)| (index, [0, part[0]], part[1] - part[0]));
        self.append_parts(parts, tokens)
    }

    /// Appends to each of these sequences, which exist, `count` tokens from an index on. None is given twice.
    fn append_parts(
        &mut self,
        parts: impl Iterator<Item = (usize, [usize; 2], usize)>,
        tokens: NewTokens<M::Tensor<'_>>,
    ) -> Result<(), CacheError> {
        let write = |(index, from, count): (usize, [usize; 2], usize)| {
            let length = self.lengths[index] as usize;
            if count > self.capacity - length {
                return Err(CacheError::TooLong { index, length, new: count, longest: self.capacity });
            }
            Ok(Write { from, to: [index, length], count })
        };
        let writes = parts.map(write).collect::<Result<Vec<_>, _>>()?;
        self.store.update(&[], &writes, tokens)?;
        for Write { to: [index, length], count, .. } in writes {
            // At most the capacity, which an i32 holds.
            self.lengths[index] = (length + count) as i32;
        }
        Ok(())
    }

    /// Keeps the first `kept` tokens of a sequence.
    ///
    /// # Errors
    /// [`CacheError::NoSuchSequence`]; [`CacheError::TooFew`] where the sequence has fewer.
    pub fn truncate(&mut self, sequence: usize, kept: usize) -> Result<(), CacheError> {
        let length = self.len(sequence)?;
        if kept > length {
            return Err(CacheError::TooFew { kept, length });
        }
        self.lengths[sequence] = kept as i32;
        Ok(())
    }

    /// Makes every sequence empty.
    pub fn clear(&mut self) {
        self.lengths.fill(0);
    }

    /// How many tokens a sequence has.
    ///
    /// # Errors
    /// [`CacheError::NoSuchSequence`].
    pub fn len(&self, sequence: usize) -> Result<usize, CacheError> {
        let batch = self.lengths.len();
        let length = self.lengths.get(sequence).map(|&length| length as usize);
        length.ok_or(CacheError::NoSuchSequence { index: sequence, batch })
    }

    /// Whether no sequence has a token.
    pub fn is_empty(&self) -> bool {
        self.lengths.iter().all(|&length| length == 0)
    }

    /// `B`.
    pub fn batch(&self) -> usize {
        self.lengths.len()
    }

    /// How many tokens a sequence has room for.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// What is kept of a token.
    pub fn token(&self) -> TokenShape {
        self.store.token()
    }

    /// Where keys and values are.
    pub fn memory(&self) -> &M {
        self.store.memory()
    }

    /// The keys, `[B, capacity, K, H]`.
    pub fn keys(&self) -> M::Tensor<'_> {
        self.store.keys()
    }

    /// The values, `[B, capacity, K, Hv]`.
    pub fn values(&self) -> M::Tensor<'_> {
        self.store.values()
    }

    /// How many tokens each sequence has, `[B]` of i32 in host memory: the
    /// [`key_value_lengths`](crate::Attention::key_value_lengths) of a call.
    pub fn lengths(&self) -> View<'_> {
        let lengths = View::from_slice(&self.lengths, [self.lengths.len()]);
        lengths.unwrap_or_else(|_| unreachable!("a list has as many numbers as its length says"))
    }
}
