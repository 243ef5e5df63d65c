//! What both caches are made of: a memory, and the check of what is written to it.

use attention_core::{Device, Dims, InvalidCall, Role, TensorDesc};

use super::error::CacheError;
use super::memory::{CacheMemory, CacheTensor, IntoCacheTensor, PageCopy, Update, Write};
use super::token::TokenShape;

/// The memory of a cache, with what it keeps of a token.
#[derive(Clone, Debug)]
pub(super) struct Store<M> {
    token: TokenShape,
    memory: M,
}

/// New tokens with four axes, `[outer, n, K, H]` and `[outer, n, K, Hv]`: checked against the cache.
pub(super) struct NewTokens<T> {
    keys: T,
    values: T,
}

impl<M: CacheMemory> Store<M> {
    /// Memory of `make`, which gets the shapes of keys and values: `[outer, inner, K, H]` and `[outer, inner,
    /// K, Hv]`.
    pub(super) fn new(
        token: TokenShape,
        [outer, inner]: [usize; 2],
        make: impl FnOnce([Dims; 2]) -> Result<M, CacheError>,
    ) -> Result<Self, CacheError> {
        token.check()?;
        let shape = |width| Dims::from([outer, inner, token.key_heads, width]);
        let shapes = [shape(token.head_dim), shape(token.value_head_dim)];
        for (what, shape) in ["the keys of a cache", "the values of a cache"].into_iter().zip(shapes) {
            let desc = TensorDesc::contiguous(token.dtype, shape);
            if desc.span().and(desc.element_count()).is_none() {
                return Err(CacheError::Cache(InvalidCall::Overflow { what, shape }));
            }
        }
        let store = Self { token, memory: make(shapes)? };
        let why = "the memory of the cache";
        let checked = store.check(Role::Key, &store.memory.keys(), shapes[0], why);
        checked
            .and_then(|()| store.check(Role::Value, &store.memory.values(), shapes[1], why))
            .map_err(CacheError::Cache)?;
        Ok(store)
    }

    pub(super) fn token(&self) -> TokenShape {
        self.token
    }

    pub(super) fn memory(&self) -> &M {
        &self.memory
    }

    pub(super) fn keys(&self) -> M::Tensor<'_> {
        self.memory.keys()
    }

    pub(super) fn values(&self) -> M::Tensor<'_> {
        self.memory.values()
    }

    /// Keys `[n, K, H]` and values `[n, K, Hv]`.
    pub(super) fn tokens_of_one<'a>(
        &self,
        keys: impl IntoCacheTensor<'a, M>,
        values: impl IntoCacheTensor<'a, M>,
    ) -> Result<NewTokens<M::Tensor<'a>>, CacheError> {
        let (keys, values) = (keys.into_cache_tensor()?, values.into_cache_tensor()?);
        let TokenShape { key_heads, head_dim, value_head_dim, .. } = self.token;
        let count = keys.shape().first().copied().unwrap_or(0);
        let expected = |width: usize| [count, key_heads, width];
        self.check(Role::Key, &keys, expected(head_dim), "[tokens, K, H]")?;
        self.check(Role::Value, &values, expected(value_head_dim), "[tokens, K, Hv]")?;
        Ok(NewTokens { keys: keys.unsqueeze()?, values: values.unsqueeze()? })
    }

    /// Keys `[B, n, K, H]` and values `[B, n, K, Hv]` of this many sequences.
    pub(super) fn tokens_of_each<'a>(
        &self,
        batch: usize,
        keys: impl IntoCacheTensor<'a, M>,
        values: impl IntoCacheTensor<'a, M>,
    ) -> Result<NewTokens<M::Tensor<'a>>, CacheError> {
        let (keys, values) = (keys.into_cache_tensor()?, values.into_cache_tensor()?);
        let TokenShape { key_heads, head_dim, value_head_dim, .. } = self.token;
        let count = keys.shape().get(1).copied().unwrap_or(0);
        let expected = |width: usize| [batch, count, key_heads, width];
        self.check(Role::Key, &keys, expected(head_dim), "[B, tokens, K, H]")?;
        self.check(Role::Value, &values, expected(value_head_dim), "[B, tokens, K, Hv]")?;
        Ok(NewTokens { keys, values })
    }

    /// Does the copies, then the writes, whose places were checked.
    pub(super) fn update(
        &mut self,
        copies: &[PageCopy],
        writes: &[Write],
        tokens: NewTokens<M::Tensor<'_>>,
    ) -> Result<(), CacheError> {
        let NewTokens { keys, values } = tokens;
        self.memory.update(&Update { copies, writes, keys, values })
    }

    fn check(
        &self,
        role: Role,
        tensor: &M::Tensor<'_>,
        expected: impl Into<Dims>,
        why: &'static str,
    ) -> Result<(), InvalidCall> {
        let (shape, expected) = (tensor.shape(), expected.into());
        let device: Device = self.memory.device();
        if tensor.device() != device {
            return Err(InvalidCall::Device { role, device: tensor.device(), expected: device });
        }
        if tensor.dtype() != self.token.dtype {
            let expected = format!("{} as the cache has", self.token.dtype);
            return Err(InvalidCall::DType { role, dtype: tensor.dtype(), expected });
        }
        if shape != expected {
            return Err(InvalidCall::Shape { role, shape, expected, why });
        }
        Ok(())
    }
}

impl<T: CacheTensor> NewTokens<T> {
    /// How many there are of each sequence, or of all in [`Store::tokens_of_one`].
    pub(super) fn count(&self) -> usize {
        self.keys.shape()[1]
    }
}
