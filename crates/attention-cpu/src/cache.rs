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
            Some(_) => KeyScale::of(problem, batch, head),
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

/// The scale of a call and of the keys of a head, in two factors
/// ([`CallProblem::scale_of_products`]).
pub(crate) struct KeyScale<C> {
    /// A power of two; `None` for 1.
    of_queries: Option<C>,
    pub(crate) of_products: C,
}

impl<C: Compute> KeyScale<C> {
    /// Of a head of a sequence.
    fn of(problem: &CallProblem<'_>, batch: usize, head: usize) -> Self {
        let (power, product) = problem.scale_of_products(batch, head);
        // Finite in what is computed in too.
        let most = if C::DTYPE == DType::F64 { f64::MAX } else { f32::MAX.into() };
        let of_products = C::from_f64(product.clamp(-most, most));
        Self { of_queries: (power != 1.0).then(|| C::from_f64(power)), of_products }
    }

    /// Multiplies a query by its factor.
    #[inline(always)]
    pub(crate) fn apply_to_query(&self, query: &mut [C]) {
        if let Some(factor) = self.of_queries {
            query.iter_mut().for_each(|x| *x *= factor);
        }
    }
}
