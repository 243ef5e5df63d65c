//! The bounds of a golden case, element by element.

use attention_core::{DType, Problem, Role};

use super::file::Tensors;
use super::limits::limit;
use super::problem::GoldenInputs;
use super::sequences::{is_empty_elsewhere, padded, padded_tensor};
use super::{Entry, Limits};
use crate::oracle::{Oracle, Padding};
use crate::run::{Judge, Results, SavedTensors, Stop};
use crate::tolerance::Precision;

/// The outputs with their names in the files.
const OUTPUTS: [(Role, &str); 7] = [
    (Role::Out, "out"),
    (Role::Lse, "lse"),
    (Role::DQuery, "dq"),
    (Role::DKey, "dk"),
    (Role::DValue, "dv"),
    (Role::DBias, "dbias"),
    (Role::DSinks, "dsink"),
];

/// A call of a golden case, and what its results are measured by.
pub(super) struct Bounds<'a> {
    pub(super) limits: Limits,
    pub(super) entry: &'a Entry,
    pub(super) problem: &'a Problem,
    pub(super) oracle: &'a Oracle,
    pub(super) data: &'a GoldenInputs,
    /// Where the rows of sequences are.
    pub(super) padding: Option<&'a Padding>,
    pub(super) precision: Precision,
}

impl Bounds<'_> {
    /// Compares results with the expected values. `saved` is what a backward call started from.
    pub(super) fn judge(
        &self,
        tensors: &Tensors,
        results: &Results,
        saved: Option<&SavedTensors>,
    ) -> Result<Judge, Stop> {
        let mut judge = Judge::new(self.problem.dtype());
        for (role, name) in OUTPUTS {
            let Some(tensor) = results.get(role) else { continue };
            let Some(want) = tensors.expected(name) else {
                return Err(Stop::failed(format!("the file has no expected {name}")));
            };
            let empty = if role == Role::Lse { f64::NEG_INFINITY } else { 0.0 };
            if !is_empty_elsewhere(want, role, self.padding, empty) {
                return Err(Stop::failed(format!(
                    "the file expects another {name} than {empty} of no sequence"
                )));
            }
            let want = padded(want, role, self.padding, empty);
            judge.compare_tensor(tensor, role, &want, &self.bounds(role, name, &want, saved));
        }
        Ok(judge)
    }

    fn bounds(&self, role: Role, name: &str, want: &[f64], saved: Option<&SavedTensors>) -> Vec<f64> {
        let dtype = self.problem.dtype();
        let derived = || match (saved, role) {
            (Some(saved), _) => self.backward(role, self.precision, saved),
            (None, Role::Out) => self.precision.forward(self.oracle).out,
            (None, _) => self.precision.forward(self.oracle).lse,
        };
        match (limit(self.entry, name, dtype, want), self.limits) {
            (Some(limit), _) if dtype == DType::F64 => vec![limit; want.len()],
            (Some(limit), Limits::Jax) if dtype == DType::F32 && saved.is_none() => vec![limit; want.len()],
            (Some(limit), Limits::Jax) if dtype == DType::F32 => {
                // JAX differentiates what it has computed; a backward call starts from a logsumexp and an
                // output that were rounded, exact as they may have been before.
                let rounded = SavedTensors::of_oracle(self.oracle, self.problem, &Default::default());
                let of_saved = self.backward(role, Precision::EXACT, &rounded);
                of_saved.into_iter().map(|bound| bound + limit).collect()
            }
            // The derived bounds of halves allow for an output that was rounded to half precision, and JAX
            // was not run in f16.
            (Some(limit), Limits::Jax) => derived().into_iter().map(|bound| bound.max(limit)).collect(),
            _ => derived(),
        }
    }

    fn backward(&self, role: Role, precision: Precision, saved: &SavedTensors) -> Vec<f64> {
        let d_out = self.data.d_out.as_ref().expect("checked with the manifest");
        let d_out = padded_tensor(d_out, Role::DOut, self.padding);
        let d_lse = self.data.d_lse.as_ref().map(|d_lse| padded_tensor(d_lse, Role::DLse, self.padding));
        let bounds = precision.backward(self.oracle, &d_out, d_lse.as_ref(), &saved.errors(self.oracle));
        match role {
            Role::DQuery => bounds.dq,
            Role::DKey => bounds.dk,
            Role::DValue => bounds.dv,
            Role::DBias => bounds.dbias,
            _ => bounds.dsinks,
        }
    }
}
