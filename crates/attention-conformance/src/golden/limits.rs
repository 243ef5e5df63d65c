//! How far a result may be from the expected value of a golden case. `docs/numerics.md`, "Golden files".

use attention_core::DType;

use super::Entry;

/// What results are measured by in f32 and half precision. In f64 it is always an error of 1e-12.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Limits {
    /// Twice the error of unmodified JAX on the same case: a measure of quality.
    #[default]
    Jax,
    /// The bounds of [`tolerance`](crate::tolerance), which every backend of the class keeps.
    Derived,
}

/// An f64 implementation should reach this, relative to the largest value, or absolute below 1.
const F64: f64 = 1e-12;

/// Unmodified JAX on the CPU over a whole set: error over `max(1, max abs)`, in f32 and bf16. For cases
/// without errors of their own. JAX has no sinks; their gradient is a sum like that of the bias.
const YARDSTICK: [(&str, f64, f64); 7] = [
    ("out", 3.1e-7, 4.8e-3),
    ("lse", 5e-7, 5e-7),
    ("dq", 4.7e-7, 5.5e-3),
    ("dk", 4.7e-7, 4.8e-3),
    ("dv", 2.4e-7, 5.4e-3),
    ("dbias", 8.3e-7, 4.2e-3),
    ("dsink", 8.3e-7, 4.2e-3),
];

/// The largest absolute error that a quantity may have, or `None` where only the derived bounds apply.
pub(super) fn limit(entry: &Entry, quantity: &str, dtype: DType, want: &[f64]) -> Option<f64> {
    let largest =
        want.iter().filter(|value| value.is_finite()).fold(1.0f64, |max, value| max.max(value.abs()));
    if dtype == DType::F64 {
        return Some(F64 * largest);
    }
    let &(_, f32_error, bf16_error) = YARDSTICK.iter().find(|(name, ..)| *name == quantity)?;
    // The logsumexp of halves is computed in f32, from inputs that are exact.
    let in_f32 = dtype == DType::F32 || quantity == "lse";
    let errors = entry.jax_max_abs_err.as_ref();
    let (own, yardstick) = match dtype {
        _ if in_f32 => (errors.map(|errors| &errors.jax_f32), f32_error),
        DType::Bf16 => (errors.map(|errors| &errors.jax_bf16), bf16_error),
        // JAX was not run in f16.
        _ => return None,
    };
    // An error of exactly 0 is luck (the softmax of one key, say) and says nothing of what f32 can do.
    let own = own.and_then(|errors| *errors.get(quantity)?).filter(|&error| error > 0.0);
    Some(2.0 * own.unwrap_or(yardstick * largest))
}
