//! Additive masks as booleans.

use super::ConventionError;
use crate::{DType, Scalar};

/// The booleans of an additive mask whose masked entries are the smallest finite number of its dtype, or
/// -inf: `true`, which takes part, where an entry is 0, and `false` where it is at most half of that number.
///
/// transformers, among others, masks with the smallest finite number. As a bias such a number masks nothing:
/// it leaves the key in with a weight that is 0 beside any ordinary logit, and a row of nothing else is the
/// mean of its values. As a boolean mask, such a row has output 0 and logsumexp -inf.
///
/// The dtype is the one that the mask was made in: an f16 mask that was widened to f32 holds -65504, and
/// wants [`bool_where_above`].
///
/// # Errors
/// [`ConventionError::NotAMask`] where an entry is neither, NaN included: what changes logits is a bias.
///
/// # Examples
/// ```
/// use attention_core::conventions::bool_where_above_half_minimum;
///
/// assert_eq!(bool_where_above_half_minimum(&[0.0, f32::MIN, f32::NEG_INFINITY])?, [true, false, false]);
/// assert!(bool_where_above_half_minimum(&[0.0f32, -1e4]).is_err());
/// # Ok::<(), attention_core::conventions::ConventionError>(())
/// ```
pub fn bool_where_above_half_minimum<T: Scalar>(mask: &[T]) -> Result<Vec<bool>, ConventionError> {
    let minimum = match T::DTYPE {
        DType::F64 => f64::MIN,
        DType::F16 => half::f16::MIN.to_f64(),
        DType::Bf16 => half::bf16::MIN.to_f64(),
        _ => f64::from(f32::MIN),
    };
    bool_where_above(mask, minimum / 2.0)
}

/// The booleans of an additive mask: `true`, which takes part, where an entry is 0, and `false` where it is
/// at most `threshold`, -1e4 say.
///
/// # Errors
/// [`ConventionError::NotAMask`] where an entry is neither, NaN included, and [`ConventionError::Threshold`]
/// for a threshold that is not below 0.
///
/// # Examples
/// ```
/// use attention_core::conventions::bool_where_above;
///
/// assert_eq!(bool_where_above(&[0.0f32, -10000.0], -1e4)?, [true, false]);
/// # Ok::<(), attention_core::conventions::ConventionError>(())
/// ```
pub fn bool_where_above<T: Scalar>(mask: &[T], threshold: f64) -> Result<Vec<bool>, ConventionError> {
    if threshold.is_nan() || threshold >= 0.0 {
        return Err(ConventionError::Threshold { threshold });
    }
    (mask.iter().enumerate())
        .map(|(index, entry)| match entry.to_f64() {
            0.0 => Ok(true),
            value if value <= threshold => Ok(false),
            value => Err(ConventionError::NotAMask { index, value, threshold }),
        })
        .collect()
}
