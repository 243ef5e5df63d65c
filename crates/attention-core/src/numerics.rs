//! Numerics classes: which implementations may stand in for each other.

/// How an implementation computes. Two implementations replace each other silently (in an automatic choice, or
/// when a stored choice moves to another machine) only inside one class.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[non_exhaustive]
pub enum NumericsClass {
    /// f64 throughout.
    F64,
    /// f32 operands, f32-grade products and softmax.
    F32,
    /// f16 or bf16 operands; f32 logits, softmax and accumulation; probabilities may be rounded to the operand
    /// dtype before the second product.
    HalfF32,
    /// As [`HalfF32`](Self::HalfF32), with logits rounded to the operand dtype before the softmax. No backend of
    /// ours computes this way; it has a name so that it can be refused.
    HalfRounded,
    /// f32 operands with products in tf32 precision. Never chosen automatically.
    Tf32,
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
