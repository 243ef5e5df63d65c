//! Numerics classes: which implementations may stand in for each other.

use crate::DType;

/// How an implementation computes. Two implementations replace each other silently (in an automatic choice,
/// or when a stored choice moves to another machine) only inside one class.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[non_exhaustive]
pub enum NumericsClass {
    /// f64 throughout.
    F64,
    /// f32 operands, f32-grade products and softmax.
    F32,
    /// f16 or bf16 operands; f32 logits, softmax and accumulation; probabilities may be rounded to the
    /// operand dtype before the second product.
    HalfF32,
    /// As [`HalfF32`](Self::HalfF32), with logits rounded to the operand dtype before the softmax. No backend
    /// of ours computes this way; it has a name so that it can be refused.
    HalfRounded,
    /// f32 operands with products in tf32 precision. Never chosen automatically.
    Tf32,
}

impl NumericsClass {
    /// The standard class of every dtype that operands may have, in the order of [`DType::FLOATS`]. An
    /// automatic choice keeps to it, and a backend that computes every dtype in its standard class declares
    /// this table in its [`Capabilities`](crate::Capabilities).
    pub const STANDARD: [(DType, Self); 4] = [
        (DType::F64, Self::F64),
        (DType::F32, Self::F32),
        (DType::F16, Self::HalfF32),
        (DType::Bf16, Self::HalfF32),
    ];

    /// The standard class of a dtype; `None` where operands cannot have it.
    ///
    /// # Examples
    /// ```
    /// use attention_core::{DType, NumericsClass}; // or of `attention`, which are the same
    ///
    /// assert_eq!(NumericsClass::standard(DType::Bf16), Some(NumericsClass::HalfF32));
    /// assert_eq!(NumericsClass::standard(DType::Bool), None);
    /// ```
    pub fn standard(dtype: DType) -> Option<Self> {
        Self::STANDARD.into_iter().find_map(|(of, class)| (of == dtype).then_some(class))
    }
}

impl std::fmt::Display for NumericsClass {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(match self {
            NumericsClass::F64 => "F64",
            NumericsClass::F32 => "F32",
            NumericsClass::HalfF32 => "HalfF32",
            NumericsClass::HalfRounded => "HalfRounded",
            NumericsClass::Tf32 => "Tf32",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_dtype_of_operands_has_a_standard_class() {
        assert_eq!(NumericsClass::STANDARD.map(|(dtype, _)| dtype), DType::FLOATS);
        assert_eq!(NumericsClass::standard(DType::F16), Some(NumericsClass::HalfF32));
        assert_eq!(NumericsClass::standard(DType::F8E4M3), None);
    }
}
