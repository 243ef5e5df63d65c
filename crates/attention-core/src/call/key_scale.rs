//! The scale of a call together with that of 8-bit keys.

/// The largest power of two at queries, either way: with it, the smallest and the largest number of f16 are
/// normal numbers of f32.
const MOST: i32 = 100;

/// `scale * of_keys` as a power of two for queries and a finite factor for products.
pub(super) fn split(scale: f64, of_keys: f32) -> (f64, f64) {
    let of_keys = f64::from(of_keys);
    if of_keys == 0.0 {
        return (1.0, 0.0);
    }
    let exponent = (of_keys.abs().log2().ceil() as i32).clamp(-MOST, MOST);
    let power = f64::from(exponent).exp2();
    // Both numbers of the product have at most 53 bits, so it is rounded once. Finite, so that a product of 0
    // stays 0: only a key's scale beyond the powers of two leads there.
    (power, (scale * (of_keys / power)).clamp(-f64::MAX, f64::MAX))
}

#[cfg(test)]
mod tests {
    use super::split;

    /// The product of the factors is the scale, rounded once, and no factor leaves the range.
    #[test]
    fn a_key_scale_is_two_factors() {
        for scale in [0.125, 1.0, -3.7, 1e-37, 2e38, 1e308] {
            for of_keys in [1.0f32, 0.3, -2.5, 448.0, 1e-30, 3e30, f32::MIN_POSITIVE, 1e-44, f32::MAX] {
                let (power, of_products) = split(scale, of_keys);
                assert_eq!(power.log2().fract(), 0.0, "{scale} {of_keys}");
                assert!((2f64.powi(-100)..=2f64.powi(100)).contains(&power));
                assert!(of_products.is_finite());
                let ordinary = of_keys.abs().log2().abs() <= 100.0 || scale.abs() < 1e100;
                if ordinary {
                    let (within, whole) = (of_products, scale * (f64::from(of_keys) / power));
                    assert!((within / whole - 1.0).abs() <= f64::EPSILON, "{scale} {of_keys}: {within}");
                }
                // Where the key's scale is one of most, the products' is about that of the call.
                if (1e-30..=1e30).contains(&of_keys.abs()) {
                    let ratio = of_products / scale;
                    assert!((0.499..=1.001).contains(&ratio.abs()), "{scale} {of_keys}: {ratio}");
                }
            }
        }
        assert_eq!(split(0.5, 4.0), (4.0, 0.5));
        assert_eq!(split(0.5, 1.0), (1.0, 0.5));
        assert_eq!(split(0.5, -3.0), (4.0, -0.375));
        assert_eq!(split(0.5, 0.0), (1.0, 0.0));
        assert_eq!(split(1e308, f32::MAX).1, f64::MAX);
    }
}
