//! Calls that must give the bits of another call: what changes between the two must not matter.

use attention_core::{BackwardInputs, FeatureSet, Inputs, Pass, Problem, Role};

use super::call::Invocation;
use super::{Results, SavedTensors, Stop};
use crate::cases::{Broadcast, Case, CaseData, Layout, Layouts};
use crate::oracle::Oracle;
use crate::rng::Rng;
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

/// Which elements of which operands are replaced, given `[batch row, query or key, head]`.
struct Poison<'a> {
    what: &'a str,
    value: f64,
    roles: &'a [Role],
    elements: &'a dyn Fn(Role, [usize; 3]) -> bool,
}

impl Base<'_> {
    /// Makes every call that must give the same bits, or the same bits in what does not read what was changed.
    pub(super) fn check(&self) -> Result<(), Stop> {
        for (queries, keys) in [(0, 1), (13, 70)] {
            self.padded(queries, keys)?;
        }
        self.laid_out_otherwise()?;
        for garbage in [f64::NAN, f64::INFINITY, 0.0] {
            self.with_garbage(garbage)?;
        }
        self.poisoned()
    }

    /// More rows and keys behind the lengths, which hold garbage.
    fn padded(&self, queries: usize, keys: usize) -> Result<(), Stop> {
        let mut case = self.case.clone();
        let d = self.case.dims;
        let options = &mut case.options;
        options.query_lengths.get_or_insert_with(|| vec![d.query_length; d.batch]);
        options.key_value_lengths.get_or_insert_with(|| vec![d.key_length; d.batch]);
        case.dims.query_length += queries;
        case.dims.key_length += keys;
        let how = format!("when it is padded by {queries} queries and {keys} keys");
        self.remade(&case, &how)
    }

    /// The same numbers with other strides, of all tensors and of mask and bias alone.
    fn laid_out_otherwise(&self) -> Result<(), Stop> {
        for (how, layout) in [
            ("when it is transposed", Layout::Transposed),
            ("with gaps between rows", Layout::Padded),
            ("with a stride of 2", Layout::InnerStride),
            ("with a negative stride", Layout::Reversed { axis: 3 }),
        ] {
            self.remade(&Case { layouts: Layouts::everything(layout), ..self.case.clone() }, how)?;
            if self.data.mask.is_some() || self.data.bias.is_some() {
                let layouts = Layouts::default().with(Role::Mask, layout).with(Role::Bias, layout);
                self.remade(&Case { layouts, ..self.case.clone() }, how)?;
            }
        }
        // A mask or bias that says the same for all of an axis, in full size with a stride of 0.
        let mut case = self.case.clone();
        let mut expand = |role: Role, pattern: &mut Option<Broadcast>| {
            let Some(Broadcast { rank: 4, full }) = *pattern else { return false };
            let mut missing = (0..4).filter(|&axis| !full[axis]);
            let (Some(axis), None) = (missing.next(), missing.next()) else { return false };
            *pattern = Some(Broadcast::FULL);
            case.layouts = case.layouts.clone().with(role, Layout::Broadcast { axis });
            true
        };
        let (mut mask, mut bias) = (self.case.options.mask, self.case.options.bias);
        let expanded = [expand(Role::Mask, &mut mask), expand(Role::Bias, &mut bias)];
        if expanded.contains(&true) {
            (case.options.mask, case.options.bias) = (mask, bias);
            self.remade(&case, "when mask and bias are expanded with a stride of 0")?;
        }
        Ok(())
    }

    /// The call of a case that differs in sizes of padding and in layouts.
    fn remade(&self, case: &Case, how: &str) -> Result<(), Stop> {
        let d = case.dims;
        let results_shape = [d.batch, d.query_length, d.query_heads, d.value_head_dim];
        let mut rng = Rng::named(case.content.seed, how);
        let mut make = |role: Role, tensor: &HostTensor, shape: &[usize]| {
            extended(tensor, shape, case.layouts.of(role), &mut rng)
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
            d_out: make(Role::DOut, &data.d_out, &results_shape),
            d_lse: data.d_lse.as_ref().map(|d_lse| make(Role::DLse, d_lse, &results_shape[..3])),
            garbage: false,
        };
        let saved = self.saved.map(|saved| SavedTensors {
            out: make(Role::Out, &saved.out, &results_shape),
            lse: make(Role::Lse, &saved.lse, &results_shape[..3]),
        });
        let pass = self.problem.pass();
        let declared = self.subject.backend.capabilities().pass(pass);
        let declared = declared.map_or(FeatureSet::EMPTY, |declared| declared.features);
        let problem = case
            .problem(&data, pass, declared)
            .map_err(|error| Stop::failed(format!("the suite made an invalid call {how}: {error}")))?;
        if self.subject.backend.supports(&problem).is_err() {
            return Ok(());
        }
        let saved = saved.as_ref().map(|saved| saved.inputs(&data));
        let again = self.run(&problem, data.inputs(), saved, &case.layouts)?;
        self.same(&again, how, |_, _| true)
    }

    /// Other garbage wherever no result may depend on the memory.
    fn with_garbage(&self, garbage: f64) -> Result<(), Stop> {
        let mut data = self.data.clone();
        self.case.add_garbage(&mut data, &[garbage]);
        let mut saved = self.saved.cloned();
        if let Some(saved) = &mut saved {
            saved.add_garbage(self.oracle, garbage);
        }
        let saved = saved.as_ref().map(|saved| saved.inputs(&data));
        let again = self.run(self.problem, data.inputs(), saved, &self.case.layouts)?;
        self.same(&again, &format!("with {garbage} in memory that does not matter"), |_, _| true)
    }

    /// NaN or infinity in what takes part: whatever does not depend on it keeps its bits.
    fn poisoned(&self) -> Result<(), Stop> {
        let d = self.case.dims;
        let middle = [0, d.key_length / 2, 0];
        let is_middle = |_: Role, at: [usize; 3]| at == middle;
        let is_first = |_: Role, at: [usize; 3]| at == [0, 0, 0];
        let is_last_head = |role: Role, at: [usize; 3]| match role {
            Role::Key | Role::Value => at[2] + 1 == d.key_heads,
            _ => at[2] / d.group_size() + 1 == d.key_heads,
        };
        let is_last_row = |_: Role, at: [usize; 3]| at[0] + 1 == d.batch;
        let all = [Role::Query, Role::Key, Role::Value, Role::DOut];
        let mut poisons = Vec::new();
        for value in [f64::NAN, f64::INFINITY] {
            poisons.push(Poison { what: "one key", value, roles: &[Role::Key], elements: &is_middle });
            poisons.push(Poison { what: "one value", value, roles: &[Role::Value], elements: &is_middle });
        }
        let value = f64::NAN;
        poisons.push(Poison { what: "one query", value, roles: &[Role::Query], elements: &is_first });
        if self.problem.pass() == Pass::Backward {
            let (what, roles) = ("one gradient of the output", &[Role::DOut][..]);
            poisons.push(Poison { what, value, roles, elements: &is_first });
        }
        if d.key_heads > 1 {
            poisons.push(Poison { what: "the last head", value, roles: &all, elements: &is_last_head });
        }
        if d.batch > 1 {
            poisons.push(Poison { what: "the last batch row", value, roles: &all, elements: &is_last_row });
        }
        poisons.iter().try_for_each(|poison| self.with_poison(poison))
    }

    fn with_poison(&self, poison: &Poison<'_>) -> Result<(), Stop> {
        let (d, mut data) = (self.case.dims, self.data.clone());
        let reads = |role: Role, at: [usize; 3]| poison.roles.contains(&role) && (poison.elements)(role, at);
        for &role in poison.roles {
            let tensor = match role {
                Role::Query => &mut data.query,
                Role::Key => &mut data.key,
                Role::Value => &mut data.value,
                _ => &mut data.d_out,
            };
            let shape = tensor.desc().shape();
            for index in 0..tensor.desc().element_count().unwrap_or(0) {
                let [b, i, head, dim] = unravel(index, &shape)[..] else { unreachable!() };
                // One element of the row: whatever reads one reads the row.
                if dim == shape[3] / 2 && reads(role, [b, i, head]) {
                    tensor.set(index, poison.value);
                }
            }
        }
        // The rows that read what was changed, and the keys, biases and sinks that have gradients through those rows.
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
        let saved = self.saved.map(|saved| saved.inputs(&data));
        let again = self.run(self.problem, data.inputs(), saved, &self.case.layouts)?;
        let how = format!("with {} in {} that it does not read", poison.value, poison.what);
        self.same(&again, &how, |role, at| !depends(role, at))
    }

    fn run(
        &self,
        problem: &Problem,
        inputs: Inputs<'_>,
        saved: Option<BackwardInputs<'_>>,
        layouts: &Layouts,
    ) -> Result<Results, Stop> {
        Invocation { problem, inputs, saved, layouts: Some(layouts) }.run(self.subject.backend)
    }

    /// Compares another call's outputs, which may be larger: what is behind the end of this call's must be what padding
    /// gives. The gradient of a bias that was expanded is another one.
    fn same(
        &self,
        again: &Results,
        how: &str,
        compared: impl Fn(Role, &[usize]) -> bool,
    ) -> Result<(), Stop> {
        for ((role, first), (_, second)) in self.results.iter().zip(again.iter()) {
            let (shape, larger) = (first.desc().shape(), second.desc().shape());
            if role == Role::DBias && (shape.rank() != larger.rank() || is_expanded(&shape, &larger)) {
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

/// Whether an axis that was broadcast has its full size, rather than more of it.
fn is_expanded(shape: &[usize], larger: &[usize]) -> bool {
    shape.iter().zip(larger).any(|(&own, &other)| own == 1 && other > 1)
}

fn flat(at: &[usize], shape: &[usize]) -> usize {
    at.iter().zip(shape).fold(0, |flat, (&index, &size)| flat * size + index)
}

/// The tensor with its numbers in a larger shape, repeated along axes that it was broadcast along, and garbage behind its
/// ends.
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
