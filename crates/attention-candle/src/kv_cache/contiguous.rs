//! A cache with room for as many tokens in each batch row.

use attention::kv_cache;
use candle_core::{Device, Result, Tensor};

use super::memory::{TensorMemory, numbers, place, told};
use super::token::TokenShape;

/// Keys `[B, capacity, K, H]` and values `[B, capacity, K, Hv]` of `B` sequences, each filled from the front.
///
/// A call takes [`keys`](Self::keys), [`values`](Self::values) and [`lengths`](Self::lengths): nothing is
/// copied. Calls of [`Attention::bnth`](crate::Attention::bnth) transpose the first two.
///
/// # Errors
/// As those of [`PagedKvCache`](super::PagedKvCache).
///
/// # Examples
/// ```
/// use attention_candle::kv_cache::{KvCache, TokenShape};
/// use attention_candle::{Attention, QueryOffset};
/// use candle_core::{DType, Device, Tensor};
///
/// let device = Device::Cpu;
/// // 2 sequences of up to 32 tokens; 2 heads of 16.
/// let mut cache = KvCache::new(TokenShape::new(DType::F32, 2, 16), 2, 32, &device)?;
/// // Prompts of 3 tokens and of 1.
/// let prompt = Tensor::randn(0f32, 1f32, (3, 2, 16), &device)?;
/// cache.append_to(0, &prompt, &prompt)?;
/// cache.append_to(1, &prompt.narrow(0, 0, 1)?, &prompt.narrow(0, 0, 1)?)?;
///
/// let attention = Attention::btnh().causal(true).query_offset(QueryOffset::BottomRight);
/// for _ in 0..10 {
///     let query = Tensor::randn(0f32, 1f32, (2, 1, 8, 16), &device)?;
///     let new = Tensor::randn(0f32, 1f32, (2, 1, 2, 16), &device)?;
///     cache.append(&new, &new)?;
///     let attention = attention.clone().key_value_lengths(cache.lengths()?);
///     let out = attention.forward(&query, &cache.keys(), &cache.values())?;
///     assert_eq!(out.dims(), [2, 1, 8, 16]);
/// }
/// assert_eq!([cache.len(0)?, cache.len(1)?], [13, 11]);
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Debug)]
pub struct KvCache {
    cache: kv_cache::KvCache<TensorMemory>,
    token: TokenShape,
}

impl KvCache {
    /// An empty cache of `batch` sequences with room for `capacity` tokens each, of zeros on this device.
    ///
    /// # Errors
    /// [`CacheError::Size`](super::CacheError::Size) for a capacity, a number of heads or a width of 0, or a
    /// capacity of more than 2^31 - 1; [`CacheError::Cache`](super::CacheError::Cache) for sizes that
    /// overflow; [`CacheError::OutOfMemory`](super::CacheError::OutOfMemory),
    /// [`CacheError::Memory`](super::CacheError::Memory); [`Error::DType`](crate::Error::DType),
    /// [`Error::Device`](crate::Error::Device).
    pub fn new(token: TokenShape, batch: usize, capacity: usize, device: &Device) -> Result<Self> {
        let what = "KvCache::new";
        let facade = token.facade().map_err(|error| error.in_call(what))?;
        let place = place(device).map_err(|error| error.in_call(what))?;
        let make = |shapes| TensorMemory::new(facade.dtype, (place, device), shapes);
        let cache = told(what, kv_cache::KvCache::with_memory(facade, batch, capacity, make))?;
        Ok(Self { cache, token })
    }

    /// Appends as many tokens to every sequence: keys `[B, n, K, H]` and values `[B, n, K, Hv]` of any
    /// layout.
    ///
    /// # Errors
    /// [`CacheError::Tokens`](super::CacheError::Tokens) for other shapes or dtypes than the cache's;
    /// [`Error::CacheDevice`](crate::Error::CacheDevice); [`CacheError::TooLong`](super::CacheError::TooLong)
    /// where a sequence has no room; [`CacheError::Memory`](super::CacheError::Memory): nothing is appended
    /// to any then.
    pub fn append(&mut self, keys: &Tensor, values: &Tensor) -> Result<()> {
        let [keys, values] = self.cache.keys().new_tokens("append", keys, values)?;
        told("append", self.cache.append(keys, values))
    }

    /// Appends tokens to one sequence: keys `[n, K, H]` and values `[n, K, Hv]` of any layout.
    ///
    /// # Errors
    /// As [`append`](Self::append); [`CacheError::NoSuchSequence`](super::CacheError::NoSuchSequence).
    pub fn append_to(&mut self, sequence: usize, keys: &Tensor, values: &Tensor) -> Result<()> {
        let [keys, values] = self.cache.keys().new_tokens("append_to", keys, values)?;
        told("append_to", self.cache.append_to(sequence, keys, values))
    }

    /// Appends packed tokens, keys `[total, K, H]` and values `[total, K, Hv]` of any layout: those from
    /// `offsets[b]` to before `offsets[b + 1]` to sequence `b`.
    ///
    /// # Errors
    /// As [`append`](Self::append); [`CacheError::Count`](super::CacheError::Count) where `offsets` are not
    /// `B + 1`, and [`CacheError::Tokens`](super::CacheError::Tokens) where they do not rise from 0 to at
    /// most `total`.
    pub fn append_packed(&mut self, offsets: &[usize], keys: &Tensor, values: &Tensor) -> Result<()> {
        let [keys, values] = self.cache.keys().new_tokens("append_packed", keys, values)?;
        told("append_packed", self.cache.append_packed(offsets, keys, values))
    }

    /// Keeps the first `kept` tokens of a sequence.
    ///
    /// # Errors
    /// [`CacheError::NoSuchSequence`](super::CacheError::NoSuchSequence);
    /// [`CacheError::TooFew`](super::CacheError::TooFew) where the sequence has fewer.
    pub fn truncate(&mut self, sequence: usize, kept: usize) -> Result<()> {
        told("truncate", self.cache.truncate(sequence, kept))
    }

    /// Makes every sequence empty.
    pub fn clear(&mut self) {
        self.cache.clear();
    }

    /// How many tokens a sequence has.
    ///
    /// # Errors
    /// [`CacheError::NoSuchSequence`](super::CacheError::NoSuchSequence).
    pub fn len(&self, sequence: usize) -> Result<usize> {
        told("len", self.cache.len(sequence))
    }

    /// Whether no sequence has a token.
    pub fn is_empty(&self) -> bool {
        self.cache.is_empty()
    }

    /// `B`.
    pub fn batch(&self) -> usize {
        self.cache.batch()
    }

    /// How many tokens a sequence has room for.
    pub fn capacity(&self) -> usize {
        self.cache.capacity()
    }

    /// What is kept of a token.
    pub fn token(&self) -> TokenShape {
        self.token
    }

    /// The keys, `[B, capacity, K, H]`: the cache's memory, which has later appends too.
    pub fn keys(&self) -> Tensor {
        self.cache.keys().into_tensor()
    }

    /// The values, `[B, capacity, K, Hv]`: the cache's memory, which has later appends too.
    pub fn values(&self) -> Tensor {
        self.cache.values().into_tensor()
    }

    /// How many tokens each sequence has, `[B]` of i32 on the CPU: the
    /// [`key_value_lengths`](crate::Attention::key_value_lengths) of a call.
    ///
    /// # Errors
    /// Where candle makes no tensor of them.
    pub fn lengths(&self) -> Result<Tensor> {
        numbers(self.cache.lengths())
    }
}
