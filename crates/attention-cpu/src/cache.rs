//! Which elements keys and values have: those of the query, or 8 bits with scales.
//!
//! Neither scale is applied to a key or value, so none of them is rounded. A product is multiplied by the
//! scale of the call, the rest of the key's scale and its power of two, the last of which multiplies the
//! query ([`KeyScale`]); a row of the output is multiplied by the value's scale once it is normalised, when
//! no sum can overflow that the values themselves do not.

use std::marker::PhantomData;

use attention_core::{CallProblem, DType, F8E4M3, F8E5M2, Float8};

use crate::elementary::Compute;
use crate::operand::{Operand, Read};

/// The elements of keys and values beside queries of some dtype.
pub(crate) trait Cache: 'static {
    /// How they are read beside such queries.
    type Of<E: Operand>: Read<Compute = E::Compute>;

    /// Which of [`DType::EIGHT_BIT`](attention_core::DType::EIGHT_BIT) they are.
    const EIGHT_BIT: Option<usize>;

    /// What the products of a head of a sequence are multiplied by, given the `scale` of the call as it is
    /// computed in.
    #[inline(always)]
    fn key_scale<C: Compute>(problem: &CallProblem<'_>, batch: usize, head: usize, scale: C) -> KeyScale<C> {
        match Self::EIGHT_BIT {
            None => KeyScale { of_queries: None, of_products: scale },
            Some(_) => KeyScale::new(problem.scale(), problem.key_scale(batch, head)),
        }
    }

    /// What the output's rows of a head of a sequence are multiplied by.
    #[inline(always)]
    fn value_scale<C: Compute>(problem: &CallProblem<'_>, batch: usize, head: usize) -> Option<C> {
        Self::EIGHT_BIT.map(|_| C::from_f32(problem.value_scale(batch, head)))
    }
}

/// Those of the query.
pub(crate) enum SameDType {}

impl Cache for SameDType {
    type Of<E: Operand> = E;

    const EIGHT_BIT: Option<usize> = None;
}

/// 8-bit floats.
pub(crate) struct EightBits<F>(PhantomData<F>);

impl Cache for EightBits<F8E4M3> {
    type Of<E: Operand> = Widened<F8E4M3, E::Compute>;

    const EIGHT_BIT: Option<usize> = Some(0);
}

impl Cache for EightBits<F8E5M2> {
    type Of<E: Operand> = Widened<F8E5M2, E::Compute>;

    const EIGHT_BIT: Option<usize> = Some(1);
}

/// Rows of 8-bit floats, computed in `C`.
pub(crate) struct Widened<F, C>(PhantomData<(F, C)>);

impl<F: Float8, C: Compute> Read for Widened<F, C> {
    type Element = F;
    type Compute = C;

    #[inline(always)]
    fn as_compute(_: &[F]) -> Option<&[C]> {
        None
    }

    #[inline(always)]
    fn widen(from: &[F], to: &mut [C]) {
        for (to, &from) in to.iter_mut().zip(from) {
            *to = C::from_f32(from.to_f32());
        }
    }

    #[inline(always)]
    fn widen_one(value: F) -> C {
        C::from_f32(value.to_f32())
    }
}

/// The scale of a call and of the keys of a head, in two factors.
///
/// Numbers of 8 bits are not far from 1, and the keys that they stand for may be. With the power of two of
/// their scale at the query, products are as large as those of the keys themselves, to within a factor of 2,
/// so that none overflows or underflows that a call with wider keys would not lose as well. A power of two
/// rounds nothing.
#[derive(Debug, PartialEq)]
pub(crate) struct KeyScale<C> {
    /// A power of two; `None` for 1.
    of_queries: Option<C>,
    pub(crate) of_products: C,
}

impl<C: Compute> KeyScale<C> {
    /// The largest power of two at queries, either way: with it, the smallest and the largest number of f16
    /// are normal numbers of f32.
    const MOST: i32 = 100;

    fn new(scale: f64, of_keys: f32) -> Self {
        let of_keys = f64::from(of_keys);
        if of_keys == 0.0 {
            return Self { of_queries: None, of_products: C::ZERO };
        }
        let exponent = (of_keys.abs().log2().ceil() as i32).clamp(-Self::MOST, Self::MOST);
        let power = f64::from(exponent).exp2();
        // Both numbers of the product have at most 53 bits, so it is rounded twice at most: here and to f32.
        let product = scale * (of_keys / power);
        // Finite, so that a product of 0 stays 0: only a key's scale beyond the powers of two leads here.
        let most = if C::DTYPE == DType::F64 { f64::MAX } else { f32::MAX.into() };
        let of_products = C::from_f64(product.clamp(-most, most));
        Self { of_queries: (exponent != 0).then(|| C::from_f64(power)), of_products }
    }

    /// Multiplies a query by its factor.
    #[inline(always)]
    pub(crate) fn apply_to_query(&self, query: &mut [C]) {
        if let Some(factor) = self.of_queries {
            query.iter_mut().for_each(|x| *x *= factor);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The product of the factors is the scale, rounded once, and no factor leaves the range.
    #[test]
    fn a_key_scale_is_two_factors() {
        for scale in [0.125, 1.0, -3.7, 1e-37, 2e38] {
            for of_keys in [1.0f32, 0.3, -2.5, 448.0, 1e-30, 3e30, f32::MIN_POSITIVE, 1e-44, f32::MAX] {
                let KeyScale { of_queries, of_products } = KeyScale::<f32>::new(scale, of_keys);
                let power = f64::from(of_queries.unwrap_or(1.0));
                assert_eq!(power.log2().fract(), 0.0, "{scale} {of_keys}");
                assert!((2f64.powi(-100)..=2f64.powi(100)).contains(&power));
                let whole = scale * f64::from(of_keys);
                let within = f64::from(of_products) * power;
                let ordinary =
                    f64::from(of_keys).abs().log2().abs() <= 100.0 || scale.abs().log2().abs() < 20.0;
                assert!(of_products.is_finite());
                if ordinary && of_products.is_normal() {
                    assert!((within / whole - 1.0).abs() <= 2f64.powi(-24), "{scale} {of_keys}: {within}");
                }
                // Where the key's scale is one of most, the products' is about that of the call.
                if (1e-30..=1e30).contains(&of_keys.abs()) {
                    let ratio = f64::from(of_products) / scale;
                    assert!((0.499..=1.001).contains(&ratio.abs()), "{scale} {of_keys}: {ratio}");
                }
            }
        }
        assert_eq!(KeyScale::<f64>::new(0.5, 4.0), KeyScale { of_queries: Some(4.0), of_products: 0.5 });
        assert_eq!(KeyScale::<f32>::new(0.5, 1.0), KeyScale { of_queries: None, of_products: 0.5 });
        assert_eq!(KeyScale::<f32>::new(0.5, 0.0), KeyScale { of_queries: None, of_products: 0.0 });
    }
}
