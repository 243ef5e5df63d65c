//! What a cache keeps of one token, and new tokens as callers have them.

use attention_core::{DType, Device, Dims, InvalidCall, Role, View};

use super::error::CacheError;
use crate::IntoView;

/// What a cache keeps of one token: a key `[K, H]` and a value `[K, Hv]`.
///
/// # Examples
/// ```
/// use attention::DType;
/// use attention::kv_cache::TokenShape;
///
/// let token = TokenShape { value_head_dim: 64, ..TokenShape::new(DType::Bf16, 8, 128) };
/// assert_eq!(token.bytes(), 8 * (128 + 64) * 2);
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct TokenShape {
    /// f64, f32, f16 or bf16.
    pub dtype: DType,
    /// `K`.
    pub key_heads: usize,
    /// `H`.
    pub head_dim: usize,
    /// `Hv`.
    pub value_head_dim: usize,
}

impl TokenShape {
    /// Keys and values of one width.
    pub const fn new(dtype: DType, key_heads: usize, head_dim: usize) -> Self {
        Self { dtype, key_heads, head_dim, value_head_dim: head_dim }
    }

    /// Bytes of a token, saturating.
    pub const fn bytes(&self) -> usize {
        let width = self.head_dim.saturating_add(self.value_head_dim);
        self.key_heads.saturating_mul(width).saturating_mul(self.dtype.size())
    }

    pub(super) fn check(&self) -> Result<(), CacheError> {
        if !self.dtype.is_supported_float() {
            let expected = "f64, f32, f16 or bf16".to_owned();
            return Err(InvalidCall::DType { role: Role::Key, dtype: self.dtype, expected }.into());
        }
        for (what, size) in [
            ("the number of key/value heads", self.key_heads),
            ("the head dimension of keys", self.head_dim),
            ("the head dimension of values", self.value_head_dim),
        ] {
            at_least_one(what, size)?;
        }
        Ok(())
    }
}

/// Refuses 0, and what a table or length of 32 bits does not hold.
pub(super) fn at_least_one(what: &'static str, size: usize) -> Result<(), CacheError> {
    let most = i32::MAX as usize;
    if (1..=most).contains(&size) { Ok(()) } else { Err(CacheError::Size { what, size, least: 1, most }) }
}

/// New tokens with four axes, `[outer, n, K, H]` and `[outer, n, K, Hv]`: checked against the cache.
#[derive(Clone, Copy)]
pub(super) struct NewTokens<'a> {
    pub(super) keys: View<'a>,
    pub(super) values: View<'a>,
}

impl<'a> NewTokens<'a> {
    /// Keys `[n, K, H]` and values `[n, K, Hv]`.
    pub(super) fn of_one(
        token: &TokenShape,
        device: Device,
        keys: impl IntoView<'a>,
        values: impl IntoView<'a>,
    ) -> Result<Self, CacheError> {
        let (keys, values) = (keys.into_view()?, values.into_view()?);
        let count = |view: &View<'_>| view.shape().first().copied().unwrap_or(0);
        let expected = |width: usize| [count(&keys), token.key_heads, width];
        check(token, device, Role::Key, &keys, expected(token.head_dim), "[tokens, K, H]")?;
        check(token, device, Role::Value, &values, expected(token.value_head_dim), "[tokens, K, Hv]")?;
        Ok(Self { keys: keys.unsqueeze()?, values: values.unsqueeze()? })
    }

    /// Keys `[B, n, K, H]` and values `[B, n, K, Hv]` of this many sequences.
    pub(super) fn of_each(
        token: &TokenShape,
        device: Device,
        batch: usize,
        keys: impl IntoView<'a>,
        values: impl IntoView<'a>,
    ) -> Result<Self, CacheError> {
        let (keys, values) = (keys.into_view()?, values.into_view()?);
        let count = |view: &View<'_>| view.shape().get(1).copied().unwrap_or(0);
        let expected = |width: usize| [batch, count(&keys), token.key_heads, width];
        check(token, device, Role::Key, &keys, expected(token.head_dim), "[B, tokens, K, H]")?;
        check(token, device, Role::Value, &values, expected(token.value_head_dim), "[B, tokens, K, Hv]")?;
        Ok(Self { keys, values })
    }

    /// How many there are of each sequence, or of all in [`of_one`](Self::of_one).
    pub(super) fn count(&self) -> usize {
        self.keys.shape()[1]
    }
}

fn check(
    token: &TokenShape,
    device: Device,
    role: Role,
    view: &View<'_>,
    expected: impl Into<Dims>,
    why: &'static str,
) -> Result<(), InvalidCall> {
    let (shape, expected) = (view.shape(), expected.into());
    if view.device() != device {
        return Err(InvalidCall::Device { role, device: view.device(), expected: device });
    }
    if view.desc().dtype() != token.dtype {
        let expected = format!("{} as the cache has", token.dtype);
        return Err(InvalidCall::DType { role, dtype: view.desc().dtype(), expected });
    }
    if shape != expected {
        return Err(InvalidCall::Shape { role, shape, expected, why });
    }
    Ok(())
}

/// Checks offsets of packed tokens: as many as sequences and one more, rising from 0 to at most `total`.
pub(super) fn check_offsets(sequences: usize, offsets: &[usize], total: usize) -> Result<(), CacheError> {
    if Some(sequences) != offsets.len().checked_sub(1) {
        let (what, given) = ("offsets (one more than sequences)", offsets.len());
        return Err(CacheError::Count { sequences, what, given });
    }
    let number = |number: usize| i64::try_from(number).unwrap_or(i64::MAX);
    let mut least = 0;
    for (index, &start) in offsets.iter().enumerate() {
        let most = if index == 0 { 0 } else { total };
        if !(least..=most).contains(&start) {
            let (start, least, most) = (number(start), number(least), number(most));
            return Err(InvalidCall::StartOutOfRange { which: "token", index, start, least, most }.into());
        }
        least = start;
    }
    Ok(())
}
