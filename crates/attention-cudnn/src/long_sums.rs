//! How far cuDNN's long sums drift, and up to where its numerics class holds.

use attention_core::{DType, LongSums, SumLimit};

/// The relative errors of long sums, measured with cuDNN 9.19 on an H200, for values of one sign and 256
/// rows.
pub(crate) const LONG_SUMS: &[LongSums] = &[
    LongSums::new(DType::F16, 4096, -2e-5),
    LongSums::new(DType::F16, 65_536, -4e-4),
    LongSums::new(DType::F16, 1 << 20, -6.4e-3),
    LongSums::new(DType::Bf16, 65_536, -7e-4),
    LongSums::new(DType::Bf16, 1 << 20, -7e-3),
];

/// The longest sums for which class `HalfF32` holds. The drift grows in proportion to the number of keys, at
/// most by the largest of [`LONG_SUMS`] per key, and reaches half a unit in the last place of a result just
/// below a power of two (2^-12 in f16, 2^-9 in bf16, half of what `r` of docs/numerics.md allows a result) at
/// 40000 and 182000 keys; these are the powers of two below. The gradients of keys and values are sums over
/// query rows in the same instructions. Their drift was not measured, and the same is assumed of it.
pub(crate) const SUM_LIMITS: &[SumLimit] =
    &[SumLimit::new(DType::F16, 1 << 15, 1 << 15), SumLimit::new(DType::Bf16, 1 << 17, 1 << 17)];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sum_limits_follow_from_what_was_measured() {
        for (limit, half_a_unit) in SUM_LIMITS.iter().zip([2f64.powi(-12), 2f64.powi(-9)]) {
            let of_dtype = LONG_SUMS.iter().filter(|sums| sums.dtype == limit.dtype);
            let by_key = of_dtype.map(|sums| -sums.mean_error / sums.keys as f64).fold(0.0, f64::max);
            let most = (half_a_unit / by_key) as usize;
            assert_eq!(limit.keys, 1 << most.ilog2(), "{limit:?}, {most}");
            assert_eq!(limit.queries, limit.keys);
        }
    }
}
