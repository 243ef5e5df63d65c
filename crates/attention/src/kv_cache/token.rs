//! What a cache keeps of one token, and where packed tokens begin.

use attention_core::{DType, InvalidCall, Role};

use super::error::CacheError;

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
    /// f64, f32, f16 or bf16, or f8e4m3 or f8e5m2 beside a query of one of these.
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
        if !self.dtype.is_supported_float() && !self.dtype.is_eight_bit() {
            let expected = "f64, f32, f16, bf16, f8e4m3 or f8e5m2".to_owned();
            let error = InvalidCall::DType { role: Role::Key, dtype: self.dtype, expected };
            return Err(CacheError::Cache(error));
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
