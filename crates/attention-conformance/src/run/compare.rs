//! Compares results with the oracle's.

use attention_core::{DType, Role};

use super::Results;
use crate::report::{Difference, Outcome};
use crate::tensor::{HostTensor, unravel};

/// How many differing elements a failure lists.
const LISTED: usize = 5;

/// Collects the comparisons of a case.
pub(crate) struct Judge {
    dtype: DType,
    worst: f64,
    worst_tensor: Option<Role>,
    wrong: usize,
    unwritten: usize,
    checked: usize,
    differences: Vec<Difference>,
}

impl Judge {
    pub(crate) fn new(dtype: DType) -> Self {
        let differences = Vec::with_capacity(LISTED);
        Self { dtype, worst: 0.0, worst_tensor: None, wrong: 0, unwritten: 0, checked: 0, differences }
    }

    /// Compares the output of this role, if the call has it, element by element.
    pub(crate) fn compare(&mut self, results: &Results, role: Role, want: &[f64], bounds: &[f64]) {
        if let Some(tensor) = results.get(role) {
            self.compare_tensor(tensor, role, want, bounds);
        }
    }

    pub(crate) fn compare_tensor(&mut self, tensor: &HostTensor, role: Role, want: &[f64], bounds: &[f64]) {
        let dtype = tensor.desc().dtype();
        let got = tensor.values();
        assert!(got.len() == want.len() && want.len() == bounds.len(), "{role}: lengths differ");
        for (index, &got) in got.iter().enumerate() {
            self.checked += 1;
            let (want, bound) = (want[index], bounds[index]);
            let unwritten = tensor.is_unwritten(index);
            let fraction = if unwritten { f64::INFINITY } else { fraction_of_bound(got, want, bound, dtype) };
            if fraction > self.worst || self.worst_tensor.is_none() {
                self.worst = fraction;
                self.worst_tensor = Some(role);
            }
            if fraction > 1.0 {
                self.wrong += 1;
                self.unwritten += usize::from(unwritten);
                if self.differences.len() < LISTED {
                    let index = unravel(index, &tensor.desc().shape());
                    self.differences.push(Difference { tensor: role, index, got, want, bound });
                }
            }
        }
    }

    /// The verdict.
    pub(crate) fn outcome(self) -> Outcome {
        if self.wrong == 0 {
            return Outcome::Passed { worst: self.worst, tensor: self.worst_tensor };
        }
        let unwritten = match self.unwritten {
            0 => String::new(),
            count => format!(", {count} of them never written"),
        };
        Outcome::Failed {
            reason: format!(
                "{} of {} elements are out of bounds in {}{unwritten}",
                self.wrong, self.checked, self.dtype
            ),
            differences: self.differences,
        }
    }
}

/// The error as a fraction of its bound; infinite where no error is allowed or the kind of number is wrong.
pub(crate) fn fraction_of_bound(got: f64, want: f64, bound: f64, dtype: DType) -> f64 {
    if want.is_nan() {
        return if got.is_nan() { 0.0 } else { f64::INFINITY };
    }
    if got == want {
        return 0.0;
    }
    if got.is_infinite() && want.is_finite() {
        // A result next to the largest number of its dtype may round to infinity.
        let overflows = got.signum() * want + bound >= largest(dtype);
        return if overflows { 1.0 } else { f64::INFINITY };
    }
    let fraction = (got - want).abs() / bound;
    // NaN where `got` is, or where the bound is 0 and so is nothing.
    if fraction.is_nan() { f64::INFINITY } else { fraction }
}

fn largest(dtype: DType) -> f64 {
    match dtype {
        DType::F16 => 65504.0,
        DType::F64 => f64::MAX,
        _ => f64::from(f32::MAX),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kinds_of_numbers_must_agree() {
        let fraction = |got, want, bound| fraction_of_bound(got, want, bound, DType::F32);
        assert_eq!(fraction(f64::NAN, f64::NAN, 0.0), 0.0);
        assert_eq!(fraction(f64::NEG_INFINITY, f64::NEG_INFINITY, 0.0), 0.0);
        assert_eq!(fraction(0.0, -0.0, 0.0), 0.0);
        assert_eq!(fraction(1.5, 1.0, 1.0), 0.5);
        for (got, want) in [
            (f64::NAN, 1.0),
            (1.0, f64::NAN),
            (f64::INFINITY, 1.0),
            (f64::INFINITY, f64::NEG_INFINITY),
            (1.0, f64::NEG_INFINITY),
            (1e-30, 0.0),
        ] {
            assert!(fraction(got, want, 0.0) > 1.0, "{got} for {want}");
            assert!(got.is_finite() || fraction(got, want, 1.0) > 1.0, "{got} for {want}");
        }
        assert!(fraction(1.0, f64::NEG_INFINITY, 1.0) > 1.0);
    }
}
