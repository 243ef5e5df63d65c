//! What a backward call reads of its forward call.

use attention_core::{BackwardInputs, Dims, Problem, Role};

use super::Results;
use crate::cases::{CaseData, Layouts};
use crate::oracle::{Oracle, Padding};
use crate::tensor::{HostTensor, unravel};
use crate::tolerance::SavedErrors;

/// Output and logsumexp.
#[derive(Clone)]
pub(crate) struct SavedTensors {
    pub(crate) out: HostTensor,
    pub(crate) lse: HostTensor,
}

impl SavedTensors {
    /// The oracle's, rounded to their dtypes.
    pub(crate) fn of_oracle(oracle: &Oracle, problem: &Problem, layouts: &Layouts) -> Self {
        // Of the padded call, as all that the oracle has.
        let d = oracle.problem.dims();
        let tensor = |role: Role, shape: &[usize], values: Vec<f64>| {
            let desc = problem.tensor(role).expect("backward problems have it");
            let shape = Dims::from_slice(shape).expect("at most four axes");
            HostTensor::from_values(desc.dtype(), shape, layouts.of(role), |index| values[index])
        };
        let shape = [d.batch, d.query_length, d.query_heads, d.value_head_dim];
        Self {
            out: tensor(Role::Out, &shape, oracle.out()),
            lse: tensor(Role::Lse, &shape[..3], oracle.lse()),
        }
    }

    /// Packed as the outputs of a call, with these numbers in rows of no sequence.
    pub(crate) fn laid_out(
        &self,
        padding: &Padding,
        layouts: &Layouts,
        mut of_no_sequence: impl FnMut() -> f64,
    ) -> Self {
        let mut lay_out = |role: Role, tensor: &HostTensor| {
            padding.lay_out(role, tensor, layouts.of(role), &mut of_no_sequence)
        };
        Self { out: lay_out(Role::Out, &self.out), lse: lay_out(Role::Lse, &self.lse) }
    }

    /// Those that a backend wrote.
    pub(crate) fn of_results(mut results: Results) -> Self {
        let mut take = |role| results.take(role).expect("the forward call wanted both");
        Self { out: take(Role::Out), lse: take(Role::Lse) }
    }

    /// How far they are from the oracle's.
    pub(crate) fn errors(&self, oracle: &Oracle) -> SavedErrors {
        SavedErrors::between(&self.out.values(), &self.lse.values(), oracle)
    }

    /// Whether an output is beyond the largest number of its dtype: it was stored as an infinity, which
    /// leaves nothing of the gradients that depend on it.
    pub(crate) fn overflow(&self, oracle: &Oracle) -> bool {
        let stored = |tensor: &HostTensor, exact: Vec<f64>| {
            tensor
                .values()
                .into_iter()
                .zip(exact)
                .any(|(stored, exact)| exact.is_finite() && stored.is_infinite())
        };
        stored(&self.out, oracle.out()) || stored(&self.lse, oracle.lse())
    }

    /// This number in padded rows, which nothing may read.
    pub(crate) fn add_garbage(&mut self, oracle: &Oracle, garbage: f64) {
        for tensor in [&mut self.out, &mut self.lse] {
            let shape = tensor.desc().shape();
            for index in 0..tensor.desc().element_count().unwrap_or(0) {
                let at = unravel(index, &shape);
                if oracle.structure.is_padded(at[0], at[1]) {
                    tensor.set(index, garbage);
                }
            }
        }
    }

    /// The inputs of a backward call on this data.
    pub(crate) fn inputs<'a>(&'a self, data: &'a CaseData) -> BackwardInputs<'a> {
        self.with(&data.d_out, data.d_lse.as_ref())
    }

    /// The inputs of a backward call with these incoming gradients.
    pub(crate) fn with<'a>(
        &'a self,
        d_out: &'a HostTensor,
        d_lse: Option<&'a HostTensor>,
    ) -> BackwardInputs<'a> {
        BackwardInputs {
            out: self.out.view(),
            lse: self.lse.view(),
            d_out: d_out.view(),
            d_lse: d_lse.map(HostTensor::view),
        }
    }
}
