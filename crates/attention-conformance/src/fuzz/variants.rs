//! Calls that must give the bits of another call: what changes between the two must not matter.

use attention_core::{BackwardInputs, FeatureSet, Pass, Problem, Role};

use super::case::layouts;
use crate::cases::{Case, CaseData, Layout, Layouts};
use crate::oracle::Oracle;
use crate::rng::Rng;
use crate::run::{Invocation, Results, SavedTensors, Stop, invariance};
use crate::suite::Subject;
use crate::tensor::{HostTensor, unravel};

/// A call that was made, with what it was made from.
pub(super) struct Base<'a> {
    pub(super) subject: &'a Subject<'a>,
    pub(super) case: &'a Case,
    pub(super) data: &'a CaseData,
    pub(super) problem: &'a Problem,
    pub(super) saved: Option<&'a SavedTensors>,
    pub(super) oracle: &'a Oracle,
    pub(super) results: &'a Results,
}

/// What one element of an output is compared with.
enum Expect {
    /// The same bits.
    Same,
    /// Nothing: something that it may depend on was changed.
    Anything,
}

impl Base<'_> {
    /// Makes the calls that `rng` picks; the number of calls that were compared.
    pub(super) fn check(&self, rng: &mut Rng) -> Result<usize, Stop> {
        let mut compared = 0;
        if !self.subject.same.is_empty() {
            let (label, other) = &self.subject.same[rng.below(self.subject.same.len())];
            let again = self.invocation().run(*other)?;
            self.same(&again, &format!("with {label}"), |_, _| Expect::Same)?;
            compared += 1;
        }
        if rng.chance(0.2) {
            let again = self.invocation().run(self.subject.backend)?;
            self.same(&again, "once more", |_, _| Expect::Same)?;
            compared += 1;
        }
        if rng.chance(0.5) {
            self.rows_alone()?;
            compared += self.case.dims.batch;
        }
        if rng.chance(0.5) {
            self.padded(rng)?;
            compared += 1;
        }
        if rng.chance(0.5) {
            self.laid_out_otherwise(rng)?;
            compared += 1;
        }
        if rng.chance(0.5) {
            self.with_garbage(rng)?;
            compared += 1;
        }
        if rng.chance(0.5) {
            self.poisoned(rng)?;
            compared += 1;
        }
        Ok(compared)
    }

    fn saved_inputs(&self) -> Option<BackwardInputs<'_>> {
        self.saved.map(|saved| saved.inputs(self.data))
    }

    fn invocation(&self) -> Invocation<'_> {
        Invocation {
            problem: self.problem,
            inputs: self.data.inputs(),
            saved: self.saved_inputs(),
            layouts: Some(&self.case.layouts),
        }
    }

    /// Each batch row alone.
    fn rows_alone(&self) -> Result<(), Stop> {
        invariance::batch_rows_alone(self.subject.backend, self.case, &self.invocation(), self.results)
    }

    /// More rows and keys behind the lengths, which hold garbage.
    fn padded(&self, rng: &mut Rng) -> Result<(), Stop> {
        let mut case = self.case.clone();
        let d = self.case.dims;
        let options = &mut case.options;
        options.query_lengths.get_or_insert_with(|| vec![d.query_length; d.batch]);
        options.key_value_lengths.get_or_insert_with(|| vec![d.key_length; d.batch]);
        case.dims.query_length += rng.below(20);
        case.dims.key_length += 1 + rng.below(70);
        case.layouts = Layouts::default();
        let how = format!("padded to T {} and S {}", case.dims.query_length, case.dims.key_length);
        self.remade(case, rng, &how)
    }

    /// The same numbers with other strides, inputs and outputs.
    fn laid_out_otherwise(&self, rng: &mut Rng) -> Result<(), Stop> {
        let mut case = self.case.clone();
        case.layouts = loop {
            let drawn = layouts(&case.dims, rng);
            if drawn != self.case.layouts || rng.chance(0.1) {
                break drawn;
            }
        };
        self.remade(case, rng, "with other strides")
    }

    /// The call of a case that differs in sizes of padding and in layouts.
    fn remade(&self, case: Case, rng: &mut Rng, how: &str) -> Result<(), Stop> {
        let d = case.dims;
        let results_shape = [d.batch, d.query_length, d.query_heads, d.value_head_dim];
        let mut make = |role: Role, tensor: &HostTensor, shape: &[usize]| {
            extended(tensor, shape, case.layouts.of(role), rng)
        };
        let data = self.data;
        let pattern_shape =
            |pattern: Option<crate::cases::Broadcast>| pattern.map(|pattern| pattern.shape(&d));
        let data = CaseData {
            query: make(Role::Query, &data.query, &[d.batch, d.query_length, d.query_heads, d.head_dim]),
            key: make(Role::Key, &data.key, &[d.batch, d.key_length, d.key_heads, d.head_dim]),
            value: make(Role::Value, &data.value, &[d.batch, d.key_length, d.key_heads, d.value_head_dim]),
            mask: (data.mask.as_ref().zip(pattern_shape(case.options.mask)))
                .map(|(mask, shape)| make(Role::Mask, mask, &shape)),
            bias: (data.bias.as_ref().zip(pattern_shape(case.options.bias)))
                .map(|(bias, shape)| make(Role::Bias, bias, &shape)),
            alibi_slopes: data.alibi_slopes.clone(),
            sinks: data.sinks.clone(),
            d_out: make(Role::DOut, &data.d_out, &results_shape),
            d_lse: data.d_lse.as_ref().map(|d_lse| make(Role::DLse, d_lse, &results_shape[..3])),
            garbage: false,
        };
        let saved = self.saved.map(|saved| SavedTensors {
            out: make(Role::Out, &saved.out, &results_shape),
            lse: make(Role::Lse, &saved.lse, &results_shape[..3]),
        });
        let problem = self.problem_of(&case, &data)?;
        let invocation = Invocation {
            problem: &problem,
            inputs: data.inputs(),
            saved: saved.as_ref().map(|saved| saved.inputs(&data)),
            layouts: Some(&case.layouts),
        };
        let again = invocation.run(self.subject.backend)?;
        self.same(&again, how, |_, _| Expect::Same)
    }

    /// The problem of a case that asks for what this call asks for.
    fn problem_of(&self, case: &Case, data: &CaseData) -> Result<Problem, Stop> {
        let pass = self.problem.pass();
        let declared = self.subject.backend.capabilities().pass(pass);
        let declared = declared.map_or(FeatureSet::EMPTY, |declared| declared.features);
        case.problem(data, pass, declared)
            .map_err(|error| Stop::failed(format!("the fuzzer made an invalid variant: {error}")))
    }

    /// NaN and infinities wherever no result may depend on the memory.
    fn with_garbage(&self, rng: &mut Rng) -> Result<(), Stop> {
        let (d, mut data) = (self.case.dims, self.data.clone());
        self.case.add_garbage(&mut data, &[f64::NAN, f64::INFINITY, f64::NEG_INFINITY, 6e4]);
        // A bias of -inf masks as a mask does, so keys that it takes from every row are nobody's either.
        let mut unseen = vec![true; d.batch * d.key_length * d.key_heads];
        self.oracle.for_each_row(|[b, _, n], row| {
            for entry in &row.entries {
                unseen[(b * d.key_length + entry.key) * d.key_heads + n / d.group_size()] = false;
            }
        });
        if !self.case.layouts.of(Role::Key).is_broadcast() {
            for (key, _) in unseen.iter().enumerate().filter(|(_, unseen)| **unseen) {
                let garbage = rng.pick(&[f64::NAN, f64::INFINITY]);
                data.key.set(key * d.head_dim + rng.below(d.head_dim), garbage);
            }
        }
        let mut saved = self.saved.cloned();
        if let Some(saved) = &mut saved {
            saved.add_garbage(self.oracle, f64::NAN);
        }
        let invocation = Invocation {
            problem: self.problem,
            inputs: data.inputs(),
            saved: saved.as_ref().map(|saved| saved.inputs(&data)),
            layouts: Some(&self.case.layouts),
        };
        let again = invocation.run(self.subject.backend)?;
        self.same(&again, "with NaN in masked memory", |_, _| Expect::Same)
    }

    /// NaN or infinity in one element that takes part: whatever does not depend on it keeps its bits.
    fn poisoned(&self, rng: &mut Rng) -> Result<(), Stop> {
        let (d, mut data) = (self.case.dims, self.data.clone());
        let backward = self.problem.pass() == Pass::Backward;
        let role =
            rng.pick(&[Role::Query, Role::Key, Role::Value, if backward { Role::DOut } else { Role::Value }]);
        let tensor = match role {
            Role::Query => &mut data.query,
            Role::Key => &mut data.key,
            Role::Value => &mut data.value,
            _ => &mut data.d_out,
        };
        if tensor.desc().is_empty() || self.case.layouts.of(role).is_broadcast() {
            return Ok(());
        }
        let element = rng.below(tensor.desc().element_count().unwrap_or(1));
        tensor.set(element, rng.pick(&[f64::NAN, f64::NAN, f64::INFINITY]));
        let at = unravel(element, &tensor.desc().shape());

        // The rows that read the element, and the keys, biases and sinks that have gradients through those rows.
        let group = d.group_size();
        let mut rows = vec![false; d.batch * d.query_length * d.query_heads];
        let mut keys = vec![false; d.batch * d.key_length * d.key_heads];
        let mut heads = vec![false; d.query_heads];
        let bias_shape = self.case.options.bias.map(|pattern| (pattern, pattern.shape(&d)));
        let mut biases = vec![false; bias_shape.as_ref().map_or(0, |(_, shape)| shape.iter().product())];
        self.oracle.for_each_row(|[b, t, n], row| {
            let reads = b == at[0]
                && match role {
                    Role::Query | Role::DOut => t == at[1] && n == at[2],
                    _ => n / group == at[2] && row.entries.iter().any(|entry| entry.key == at[1]),
                };
            if !reads {
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
        let depends = |role: Role, at: &[usize], flat: usize| match role {
            Role::Out | Role::Lse | Role::DQuery => {
                rows[(at[0] * d.query_length + at[1]) * d.query_heads + at[2]]
            }
            Role::DKey | Role::DValue => keys[(at[0] * d.key_length + at[1]) * d.key_heads + at[2]],
            Role::DBias => biases[flat],
            _ => heads[at[0]],
        };
        let invocation = Invocation {
            problem: self.problem,
            inputs: data.inputs(),
            saved: self.saved.map(|saved| saved.inputs(&data)),
            layouts: Some(&self.case.layouts),
        };
        let again = invocation.run(self.subject.backend)?;
        let how = format!("with NaN or infinity at {role}{at:?}");
        let shapes: Vec<_> =
            (self.results.iter()).map(|(role, tensor)| (role, tensor.desc().shape())).collect();
        self.same(&again, &how, |role, at| {
            let shape = shapes.iter().find(|(other, _)| *other == role).expect("it has this output").1;
            let flat = at.iter().zip(shape.iter()).fold(0, |flat, (&index, &size)| flat * size + index);
            if depends(role, at, flat) { Expect::Anything } else { Expect::Same }
        })
    }

    /// Compares another call's outputs, which may be larger: what is behind the end of this call's must be what
    /// padding gives.
    fn same(
        &self,
        again: &Results,
        how: &str,
        expect: impl Fn(Role, &[usize]) -> Expect,
    ) -> Result<(), Stop> {
        for ((role, first), (_, second)) in self.results.iter().zip(again.iter()) {
            let (shape, larger) = (first.desc().shape(), second.desc().shape());
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
                let own = at.iter().zip(shape.iter()).fold(0, |flat, (&index, &size)| flat * size + index);
                let both_nan = values[own].is_nan() && other_values[index].is_nan();
                let same = bits[own] == other_bits[index] || both_nan;
                if !same && matches!(expect(role, &at), Expect::Same) {
                    let (a, b) = (values[own], other_values[index]);
                    return Err(Stop::failed(format!("{role}{at:?} is {a:e}, and {b:e} {how}")));
                }
            }
        }
        Ok(())
    }
}

/// The tensor with its numbers in a larger shape, and garbage behind its ends.
fn extended(tensor: &HostTensor, shape: &[usize], layout: Layout, rng: &mut Rng) -> HostTensor {
    let (own, values) = (tensor.desc().shape(), tensor.values());
    let mut value = |index: usize| {
        let at = unravel(index, shape);
        if at.iter().zip(own.iter()).any(|(&index, &size)| index >= size) {
            return rng.pick(&[f64::NAN, f64::INFINITY, f64::NEG_INFINITY, 6e4]);
        }
        values[at.iter().zip(own.iter()).fold(0, |flat, (&index, &size)| flat * size + index)]
    };
    let dims = attention_core::Dims::from_slice(shape).expect("at most four axes");
    if tensor.desc().dtype() == attention_core::DType::Bool {
        return HostTensor::from_bools(dims, layout, |index| value(index) == 1.0);
    }
    HostTensor::from_values(tensor.desc().dtype(), dims, layout, value)
}
