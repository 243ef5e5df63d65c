//! What a cache keeps of one token.

use attention::Role;
use candle_core::DType;

use crate::Error;
use crate::layout::expected;

/// What a cache keeps of one token: a key `[K, H]` and a value `[K, Hv]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
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

    /// As the facade has it.
    pub(super) fn facade(&self) -> Result<attention::kv_cache::TokenShape, Error> {
        let Self { dtype, key_heads, head_dim, value_head_dim } = *self;
        let dtype = float(Role::Key, dtype)?;
        Ok(attention::kv_cache::TokenShape { dtype, key_heads, head_dim, value_head_dim })
    }
}

/// A dtype that keys and values can have.
pub(super) fn float(role: Role, dtype: DType) -> Result<attention::DType, Error> {
    match dtype {
        DType::F64 => Ok(attention::DType::F64),
        DType::F32 => Ok(attention::DType::F32),
        DType::F16 => Ok(attention::DType::F16),
        DType::BF16 => Ok(attention::DType::Bf16),
        dtype => Err(Error::DType { role, dtype, expected: expected(role) }),
    }
}
