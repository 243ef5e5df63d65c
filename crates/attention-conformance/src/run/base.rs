//! A call, and others that must give its bits: what changes between the two must not matter.
//!
//! Which changes are made is said by the suite ([`variations`](super::variations)), in full, and by the
//! fuzzer (`fuzz::variations`), at random.

use attention_core::{FeatureSet, InvalidCall, Plan, Problem, Role};

use super::invariance::is_summed_over_batch;
use super::{Laid, Results, SavedTensors, Stop};
use crate::cases::{Broadcast, Case, CaseData, Layout, Sequences};
use crate::oracle::Oracle;
use crate::rng::Rng;
use crate::suite::Subject;
use crate::tensor::{HostTensor, unravel};

/// A call that was made, with what it was made from: data, saved tensors and results are of the padded call
/// where sequences are packed or in pages.
pub(crate) struct Base<'a> {
    pub(crate) subject: &'a Subject<'a>,
    pub(crate) case: &'a Case,
    pub(crate) data: &'a CaseData,
    pub(crate) problem: &'a Problem,
    /// The plan that gave the results, and that makes the calls on other data.
    pub(crate) plan: &'a dyn Plan,
    pub(crate) saved: Option<&'a SavedTensors>,
    pub(crate) oracle: &'a Oracle,
    pub(crate) results: &'a Results,
}

impl Base<'_> {
    /// The case with so many more queries and keys behind the lengths.
    pub(crate) fn padded_case(&self, queries: usize, keys: usize) -> Case {
        let mut case = self.case.clone();
        let d = self.case.dims;
        let options = &mut case.options;
        options.query_lengths.get_or_insert_with(|| vec![d.query_length; d.batch]);
        options.key_value_lengths.get_or_insert_with(|| vec![d.key_length; d.batch]);
        case.dims.query_length += queries;
        case.dims.key_length += keys;
        if let Some(sequences) = &mut case.sequences {
            sequences.add_rows_of_no_sequence(queries, keys);
        }
        case
    }

    /// The call of a case that differs in sizes of padding and in layouts.
    ///
    /// Passes where the backend refuses the other call, for its sizes or layouts.
    pub(crate) fn remade(&self, case: &Case, rng: &mut Rng, how: &str) -> Result<(), Stop> {
        let d = case.dims;
        let results_shape = [d.batch, d.query_length, d.query_heads, d.value_head_dim];
        let mut make = |role: Role, tensor: &HostTensor, shape: &[usize]| {
            extended(tensor, shape, case.layouts.of(role), rng)
        };
        let data = self.data;
        let shape_of = |pattern: Option<Broadcast>| pattern.map(|pattern| pattern.shape(&d));
        let data = CaseData {
            query: make(Role::Query, &data.query, &[d.batch, d.query_length, d.query_heads, d.head_dim]),
            key: make(Role::Key, &data.key, &[d.batch, d.key_length, d.key_heads, d.head_dim]),
            value: make(Role::Value, &data.value, &[d.batch, d.key_length, d.key_heads, d.value_head_dim]),
            mask: (data.mask.as_ref().zip(shape_of(case.options.mask)))
                .map(|(mask, shape)| make(Role::Mask, mask, &shape)),
            bias: (data.bias.as_ref().zip(shape_of(case.options.bias)))
                .map(|(bias, shape)| make(Role::Bias, bias, &shape)),
            alibi_slopes: data.alibi_slopes.clone(),
            sinks: data.sinks.clone(),
            numbers: data.numbers.remade(case),
            d_out: make(Role::DOut, &data.d_out, &results_shape),
            d_lse: data.d_lse.as_ref().map(|d_lse| make(Role::DLse, d_lse, &results_shape[..3])),
            garbage: case.sequences.is_some(),
        };
        let saved = self.saved.map(|saved| SavedTensors {
            out: make(Role::Out, &saved.out, &results_shape),
            lse: make(Role::Lse, &saved.lse, &results_shape[..3]),
        });
        let laid = Laid::new(case, &data, saved.as_ref());
        let problem = self
            .problem_of(case, &laid.data)
            .map_err(|error| Stop::failed(format!("the call is invalid {how}: {error}")))?;
        if self.subject.backend.supports(&problem).is_err() {
            return Ok(());
        }
        let again = laid.invocation(&problem, &case.layouts).run(self.subject.backend)?;
        // Another layout of sequences may add what is summed over them in another order.
        let kind = |case: &Case| case.sequences.as_ref().map(Sequences::kind);
        let other_kind = kind(case) != kind(self.case);
        // The gradient of a bias that was expanded is another one.
        let expanded = case.options.bias != self.case.options.bias;
        let compared = |role: Role| !(expanded && role == Role::DBias || other_kind && is_summed(self, role));
        self.same_where(&again, how, compared, |_, _| true)
    }

    /// The call on `data`, which differs where no result may depend on the memory, with this number in padded
    /// rows of what the forward pass left.
    pub(crate) fn with_garbage(&self, data: &CaseData, garbage: f64, how: &str) -> Result<(), Stop> {
        let mut tensors = self.saved.cloned();
        if let Some(tensors) = &mut tensors {
            tensors.add_garbage(self.oracle, garbage);
        }
        let again = self.run_on(data, tensors.as_ref())?;
        self.same(&again, how)
    }

    /// The call with NaN or infinity in what takes part: whatever does not depend on it keeps its bits.
    /// `reads` tells whether the row `[batch row, query or key, head]` of query, key, value or d_out was
    /// changed in `data`.
    pub(crate) fn with_poison(
        &self,
        data: &CaseData,
        reads: impl Fn(Role, [usize; 3]) -> bool,
        how: &str,
    ) -> Result<(), Stop> {
        let d = self.case.dims;
        // The rows that read what was changed, and the keys, biases and sinks that have gradients through
        // those rows.
        let group = d.group_size();
        let mut rows = vec![false; d.batch * d.query_length * d.query_heads];
        let mut keys = vec![false; d.batch * d.key_length * d.key_heads];
        let mut heads = vec![false; d.query_heads];
        let bias_shape = self.case.options.bias.map(|pattern| (pattern, pattern.shape(&d)));
        let mut biases = vec![false; bias_shape.as_ref().map_or(0, |(_, shape)| shape.iter().product())];
        self.oracle.for_each_row(|[b, t, n], row| {
            let of_query = [b, t, n];
            let of_keys = row.entries.iter().any(|entry| {
                let at = [b, entry.key, n / group];
                reads(Role::Key, at) || reads(Role::Value, at)
            });
            if !(of_keys || reads(Role::Query, of_query) || reads(Role::DOut, of_query)) {
                return;
            }
            rows[(b * d.query_length + t) * d.query_heads + n] = true;
            // The probability of a sink of -inf is 0, whatever else the row holds.
            heads[n] |= row.sink != Some(f64::NEG_INFINITY);
            for entry in &row.entries {
                keys[(b * d.key_length + entry.key) * d.key_heads + n / group] = true;
                if let Some((pattern, shape)) = &bias_shape {
                    biases[pattern.index(shape, [b, n, t, entry.key])] = true;
                }
            }
        });
        let depends = |role: Role, at: &[usize]| match role {
            Role::Out | Role::Lse | Role::DQuery => {
                rows[(at[0] * d.query_length + at[1]) * d.query_heads + at[2]]
            }
            Role::DKey | Role::DValue => keys[(at[0] * d.key_length + at[1]) * d.key_heads + at[2]],
            Role::DBias => {
                // The same elements in the same order, with four axes.
                let gradient = self.results.get(role).expect("it is compared");
                biases[flat(at, &gradient.desc().shape())]
            }
            _ => heads[at[0]],
        };
        let again = self.run_on(data, self.saved)?;
        self.same_where(&again, how, |_| true, |role, at| !depends(role, at))
    }

    /// The tensors of the call itself.
    pub(crate) fn laid(&self) -> Laid<'_> {
        Laid::new(self.case, self.data, self.saved)
    }

    /// The problem of a case that differs in what must not change bits.
    pub(super) fn problem_of(&self, case: &Case, laid: &CaseData) -> Result<Problem, InvalidCall> {
        let pass = self.problem.pass();
        let declared = self.subject.backend.capabilities().pass(pass);
        case.problem(laid, pass, declared.map_or(FeatureSet::EMPTY, |declared| declared.features))
    }

    /// A call of the plan on other data.
    fn run_on(&self, data: &CaseData, saved: Option<&SavedTensors>) -> Result<Results, Stop> {
        Laid::new(self.case, data, saved).invocation(self.problem, &self.case.layouts).run_on(self.plan)
    }

    /// Compares another call's outputs, which may be larger: what is behind the end of this call's must be
    /// what padding gives.
    pub(crate) fn same(&self, again: &Results, how: &str) -> Result<(), Stop> {
        self.same_where(again, how, |_| true, |_, _| true)
    }

    /// As [`same`](Self::same), of these outputs, and in them of the elements that `compared` says.
    fn same_where(
        &self,
        again: &Results,
        how: &str,
        outputs: impl Fn(Role) -> bool,
        compared: impl Fn(Role, &[usize]) -> bool,
    ) -> Result<(), Stop> {
        for ((role, first), (_, second)) in self.results.iter().zip(again.iter()) {
            let (shape, larger) = (first.desc().shape(), second.desc().shape());
            if !outputs(role) {
                continue;
            }
            let (bits, values) = (first.bits(), first.values());
            let (other_bits, other_values) = (second.bits(), second.values());
            for index in 0..other_bits.len() {
                let at = unravel(index, &larger);
                if at.iter().zip(shape.iter()).any(|(&index, &size)| index >= size) {
                    let padding = if role == Role::Lse { f64::NEG_INFINITY } else { 0.0 };
                    if other_values[index] != padding {
                        let got = other_values[index];
                        return Err(Stop::failed(format!("{role}{at:?} is {got:e} {how}, in the padding")));
                    }
                    continue;
                }
                let own = flat(&at, &shape);
                // Two NaNs are the same, whatever their bits.
                let both_nan = values[own].is_nan() && other_values[index].is_nan();
                if bits[own] != other_bits[index] && !both_nan && compared(role, &at) {
                    let (a, b) = (values[own], other_values[index]);
                    return Err(Stop::failed(format!("{role}{at:?} is {a:e}, and {b:e} {how}")));
                }
            }
        }
        Ok(())
    }
}

fn flat(at: &[usize], shape: &[usize]) -> usize {
    at.iter().zip(shape).fold(0, |flat, (&index, &size)| flat * size + index)
}

/// The tensor with its numbers in a larger shape, repeated along axes that it was broadcast along, and
/// garbage behind its ends.
fn extended(tensor: &HostTensor, shape: &[usize], layout: Layout, rng: &mut Rng) -> HostTensor {
    let (own, values) = (tensor.desc().shape(), tensor.values());
    let mut value = |index: usize| {
        let mut at = unravel(index, shape);
        if matches!(layout, Layout::Broadcast { axis } if own[axis] == 1) {
            for (index, &size) in at.iter_mut().zip(own.iter()) {
                *index = if size == 1 { 0 } else { *index };
            }
        }
        if at.iter().zip(own.iter()).any(|(&index, &size)| index >= size) {
            return rng.pick(&[f64::NAN, f64::INFINITY, f64::NEG_INFINITY, 6e4]);
        }
        values[flat(&at, &own)]
    };
    let dims = attention_core::Dims::from_slice(shape).expect("at most four axes");
    if tensor.desc().dtype() == attention_core::DType::Bool {
        return HostTensor::from_bools(dims, layout, |index| value(index) == 1.0);
    }
    HostTensor::from_values(tensor.desc().dtype(), dims, layout, value)
}

/// Whether the gradient of this role is a sum over sequences, which other layouts of them may add in another
/// order.
fn is_summed(base: &Base<'_>, role: Role) -> bool {
    base.results.get(role).is_some_and(|whole| is_summed_over_batch(role, whole, base.case.dims.batch))
}
