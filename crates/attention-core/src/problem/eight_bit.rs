//! Keys and values of 8 bits, and the scales of what they stand for.

use super::{Dimensions, Spec};
use crate::{DType, InvalidCall, Pass, Role, TensorDesc};

/// The dtypes of key and value beside a query of `dtype`: both the query's, or both the same of 8 bits.
pub(super) fn dtypes(spec: &Spec, dtype: DType, key: DType, value: DType) -> Result<(), InvalidCall> {
    let wrong = |role, dtype, expected| Err(InvalidCall::DType { role, dtype, expected });
    if !key.is_eight_bit() {
        if key != dtype {
            return wrong(Role::Key, key, format!("{dtype} as the query has"));
        }
        if value != dtype {
            return wrong(Role::Value, value, format!("{dtype} as the query has"));
        }
        return Ok(());
    }
    if value != key {
        return wrong(Role::Value, value, format!("{key} as the key has"));
    }
    if spec.pass == Pass::Backward {
        return Err(InvalidCall::EightBitGradients { dtype: key });
    }
    Ok(())
}

/// Checks scales, and gives a scalar an axis of size 1, so that problems that do the same are equal.
pub(super) fn scales(
    spec: &Spec,
    role: Role,
    desc: TensorDesc,
    dims: Dimensions,
) -> Result<TensorDesc, InvalidCall> {
    let of = if role == Role::KeyScales { Role::Key } else { Role::Value };
    let dtype = spec.tensors[of as usize].map_or(DType::F32, |desc| desc.dtype());
    if !dtype.is_eight_bit() {
        return Err(InvalidCall::ScalesWithoutEightBit { role, of, dtype });
    }
    if desc.dtype() != DType::F32 {
        return Err(InvalidCall::DType { role, dtype: desc.dtype(), expected: "f32".to_owned() });
    }
    let (heads, shape) = (dims.key_heads, desc.shape());
    let wrong = |expected: crate::Dims, why| Err(InvalidCall::Shape { role, shape, expected, why });
    match shape[..] {
        [] => Ok(desc.reshaped([1].into(), [1].into())),
        [1] => Ok(desc),
        [given] if given == heads => Ok(desc),
        [_] => wrong([heads].into(), "[K], one for each key/value head; or [1], [B, K]"),
        [batch, given] if (batch, given) == (dims.batch, heads) => Ok(desc),
        [_, _] => {
            wrong([dims.batch, heads].into(), "[B, K], one for each head of each sequence; or [1], [K]")
        }
        _ => Err(InvalidCall::Rank { role, rank: desc.rank(), shape, expected: "0, 1 or 2" }),
    }
}
