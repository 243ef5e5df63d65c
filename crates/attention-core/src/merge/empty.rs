//! Parts without keys of other libraries.

use super::Accumulator;
use crate::{InvalidCall, Scalar};

/// What another library gives as the logsumexp of a row that has no keys in a part, where this one gives
/// -inf.
///
/// [`convert`](Self::convert) makes such rows neutral, so that parts of that library can be merged. What
/// libraries give was seen by running them; those that give -inf (torch's FlexAttention, FlashAttention 3,
/// cuDNN) need no conversion.
///
/// | library | logsumexp of an empty row | |
/// |---|---|---|
/// | FlashAttention 2 | inf | [`PositiveInfinity`](Self::PositiveInfinity) |
/// | JAX 0.10.2, `return_residual=True` | about -2.4e38 (f32, bf16) | [`AtMost`](Self::AtMost)`(-1e38)`, and see there for f16 |
/// | torch 2.15.0, fused CPU kernel; 2.11.0, memory-efficient on CUDA | 0 | [`Zero`](Self::Zero) |
///
/// JAX's Pallas kernels on GPUs and FlashInfer give logsumexps in base two: multiply them with `ln 2`
/// ([`std::f64::consts::LN_2`]) first.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub enum EmptyLse {
    /// `inf`.
    PositiveInfinity,
    /// A finite number that no row with keys reaches: at most this. JAX adds the logarithm of the number of
    /// keys to -0.7 times the largest number of the logits' dtype, which is lost in rounding. Its results in
    /// f16 hold -inf, which is converted as well.
    AtMost(f64),
    /// 0, which a row with keys can have, too: a row counts as empty where its output is 0 throughout as
    /// well. One key of logit 0 whose value is 0 looks the same and would be lost: where that can happen, set
    /// the logsumexp of the rows that you know to be empty.
    Zero,
}

impl EmptyLse {
    /// Sets the logsumexp of empty rows to -inf and their outputs to 0, and returns how many rows that were.
    ///
    /// `lse` has one number per row and `out` as many rows, contiguous and in the same order.
    ///
    /// # Errors
    /// [`InvalidCall::BufferLength`] where `out` has not the same number of elements for each row. Nothing is
    /// written then.
    ///
    /// # Examples
    /// ```
    /// use attention_core::merge::{EmptyLse, merge_row};
    ///
    /// // Two rows of a part from FlashAttention 2, the first without keys.
    /// let (mut out, mut lse) = ([0.0f32, 0.0, 3.0, 5.0], [f32::INFINITY, 0.5]);
    /// assert_eq!(EmptyLse::PositiveInfinity.convert(&mut out, &mut lse)?, 1);
    ///
    /// // Merged, it leaves the other part as it is.
    /// let (mut row, mut row_lse) = ([7.0f32, 8.0], 0.25);
    /// merge_row(&mut row, &mut row_lse, &out[..2], lse[0]);
    /// assert_eq!((row, row_lse), ([7.0, 8.0], 0.25));
    /// # Ok::<(), attention_core::InvalidCall>(())
    /// ```
    pub fn convert<T: Scalar, F: Accumulator>(
        self,
        out: &mut [T],
        lse: &mut [F],
    ) -> Result<usize, InvalidCall> {
        let width = out.len().checked_div(lse.len()).unwrap_or(0);
        if width * lse.len() != out.len() {
            let (expected, available) = (width * lse.len(), out.len());
            return Err(InvalidCall::BufferLength { shape: [lse.len(), width].into(), expected, available });
        }
        let mut empty = 0;
        for (row, lse) in lse.iter_mut().enumerate() {
            let out = &mut out[row * width..(row + 1) * width];
            if self.is_empty(lse.to_f64(), out) {
                *lse = F::NEG_INFINITY;
                out.fill(T::from_f64(0.0));
                empty += 1;
            }
        }
        Ok(empty)
    }

    fn is_empty<T: Scalar>(self, lse: f64, out: &[T]) -> bool {
        match self {
            Self::PositiveInfinity => lse == f64::INFINITY,
            Self::AtMost(limit) => lse <= limit,
            Self::Zero => lse == 0.0 && out.iter().all(|x| x.to_f64() == 0.0),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::merge::merge_row;

    #[test]
    fn empty_rows_become_neutral_and_others_stay() {
        let jax = -0.7 * f64::from(f32::MAX);
        for (marker, empty, finite) in [
            (EmptyLse::PositiveInfinity, f64::INFINITY, -1e30),
            (EmptyLse::AtMost(-1e38), jax, -9e37),
            (EmptyLse::AtMost(-1e38), f64::NEG_INFINITY, 0.0),
            (EmptyLse::Zero, 0.0, 0.0),
        ] {
            // What libraries write as the output of an empty row: 0, the mean of the values, or NaN.
            let filler = if marker == EmptyLse::Zero { 0.0 } else { f32::NAN };
            let (mut out, mut lse) = ([filler, filler, 3.0, 5.0], [empty as f32, finite as f32]);
            assert_eq!(marker.convert(&mut out, &mut lse), Ok(1), "{marker:?}");
            assert_eq!((out, lse), ([0.0, 0.0, 3.0, 5.0], [f32::NEG_INFINITY, finite as f32]), "{marker:?}");

            let (mut row, mut row_lse) = ([7.0f32, 8.0], -2.5);
            merge_row(&mut row, &mut row_lse, &out[..2], lse[0]);
            assert_eq!((row, row_lse), ([7.0, 8.0], -2.5), "{marker:?}");
        }
    }

    #[test]
    fn halves_beside_f64_and_rows_of_no_elements() {
        let (mut out, mut lse) = ([half::f16::NAN; 2], [f64::INFINITY]);
        assert_eq!(EmptyLse::PositiveInfinity.convert(&mut out, &mut lse), Ok(1));
        assert_eq!((out, lse), ([half::f16::ZERO; 2], [f64::NEG_INFINITY]));
        assert_eq!(EmptyLse::Zero.convert::<f32, f32>(&mut [], &mut []), Ok(0));
        let mut lse = [0.0f32];
        assert_eq!(EmptyLse::Zero.convert::<f32, f32>(&mut [], &mut lse), Ok(1));
    }

    #[test]
    fn rows_of_different_length_are_refused() {
        let (mut out, mut lse) = ([0.0f32; 5], [f32::INFINITY; 2]);
        let error = EmptyLse::PositiveInfinity.convert(&mut out, &mut lse).unwrap_err();
        assert_eq!(error.to_string(), "shape [2, 2] has 4 elements, the slice has 5");
        assert_eq!(lse, [f32::INFINITY; 2]);
        assert!(EmptyLse::Zero.convert::<f32, f32>(&mut out, &mut []).is_err());
    }
}
