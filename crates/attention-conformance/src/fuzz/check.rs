//! Runs one case on backends: against the oracle, against limits that no rounding moves, and against itself.

use attention_core::{
    AttentionBackend, DType, FeatureSet, Gradients, NumericsClass, Pass, Plan, Problem, Role,
};

use super::case::FuzzCase;
use super::counts::Counts;
use super::magnitudes::largest;
use crate::cases::{CaseData, Saved, Wanted};
use crate::oracle::{Dense, Oracle};
use crate::rng::Rng;
use crate::run::{self, Base, Laid, Results, SavedTensors, Stop, fraction_of_bound};
use crate::suite::Subject;
use crate::tensor::{HostTensor, unravel};
use crate::tolerance::{Precision, constants, unit_roundoff};

/// How many differing elements a fault lists.
const LISTED: usize = 3;

/// A failed check: in which pass, and what was wrong.
pub(super) struct Failure {
    pub(super) pass: Pass,
    pub(super) reason: String,
}

/// What all backends of a case share.
pub(super) struct Prepared<'a> {
    fuzz: &'a FuzzCase,
    data: CaseData,
    oracle: Oracle,
    /// Whether a logit, or a product on the way to it, leaves the range of the accumulator. Then any result
    /// is right, and only what must not change bits is checked.
    overflows: bool,
}

impl<'a> Prepared<'a> {
    pub(super) fn new(fuzz: &'a FuzzCase) -> Self {
        let data = fuzz.data();
        // Of the padded call, which has gradients where keys are in pages.
        let pass = if fuzz.case.options.eight_bit.is_some() { Pass::Forward } else { Pass::Backward };
        let problem = (fuzz.case.problem(&data, pass, FeatureSet::all()))
            .unwrap_or_else(|error| panic!("the fuzzer drew an invalid case: {error}: {fuzz}"));
        let oracle = Oracle::new(&problem, &data.inputs());
        let overflows = fuzz.magnitudes.products_overflow(&fuzz.case, fuzz.dtype)
            || logits_overflow(&oracle, largest(fuzz.dtype.accumulator()));
        Self { fuzz, data, oracle, overflows }
    }

    /// Runs both passes on a backend.
    pub(super) fn check(&self, subject: &Subject<'_>, counts: &mut Counts) -> Result<(), Failure> {
        for &pass in self.fuzz.case.passes() {
            let outcome = match pass {
                Pass::Forward => self.forward(subject, counts),
                Pass::Backward => self.backward(subject, counts),
            };
            match outcome {
                Ok(()) => counts.of(self.fuzz.dtype, pass).cases += 1,
                Err(Stop::Skipped(_)) => counts.of(self.fuzz.dtype, pass).skipped += 1,
                Err(Stop::Failed(reason, _)) => {
                    counts.of(self.fuzz.dtype, pass).cases += 1;
                    counts.of(self.fuzz.dtype, pass).faults += 1;
                    return Err(Failure { pass, reason });
                }
            }
        }
        Ok(())
    }

    fn problem(&self, backend: &dyn AttentionBackend, pass: Pass, lse: bool) -> Result<Problem, Stop> {
        let declared = backend.capabilities().pass(pass).map_or(FeatureSet::EMPTY, |pass| pass.features);
        let mut case = self.fuzz.case.clone();
        if lse {
            case.options.lse = Wanted::Always;
        }
        let problem = case
            .problem(&case.laid_out(&self.data), pass, declared)
            .map_err(|error| Stop::failed(format!("the fuzzer drew an invalid call: {error}")))?;
        run::usable(backend)?;
        backend.supports(&problem).map_err(|refusal| Stop::Skipped(refusal.to_string()))?;
        Ok(problem)
    }

    fn precision(&self, backend: &dyn AttentionBackend) -> Precision {
        let dtype = self.fuzz.dtype;
        Precision::new(dtype, backend.capabilities().numerics_of(dtype).unwrap_or(NumericsClass::F32))
    }

    fn forward(&self, subject: &Subject<'_>, counts: &mut Counts) -> Result<(), Stop> {
        let problem = self.problem(subject.backend, Pass::Forward, false)?;
        let laid = Laid::new(&self.fuzz.case, &self.data, None);
        let invocation = laid.invocation(&problem, &self.fuzz.case.layouts);
        let plan = &*invocation.plan(subject.backend)?;
        let results = invocation.run_on(plan)?;
        self.compare_forward(&self.precision(subject.backend), &results, counts)?;
        self.variations(subject, plan, None, &results, counts)
    }

    fn backward(&self, subject: &Subject<'_>, counts: &mut Counts) -> Result<(), Stop> {
        let problem = self.problem(subject.backend, Pass::Backward, false)?;
        let layouts = &self.fuzz.case.layouts;
        let own = self.fuzz.case.saved == Saved::Backend;
        let saved = if own {
            let forward = self.problem(subject.backend, Pass::Forward, true)?;
            let laid = Laid::new(&self.fuzz.case, &self.data, None);
            SavedTensors::of_results(laid.invocation(&forward, layouts).run(subject.backend)?)
        } else {
            SavedTensors::of_oracle(&self.oracle, &problem, layouts)
        };
        let laid = Laid::new(&self.fuzz.case, &self.data, Some(&saved));
        let invocation = laid.invocation(&problem, layouts);
        let plan = &*invocation.plan(subject.backend)?;
        let results = invocation.run_on(plan)?;
        if !self.overflows && !saved.overflow(&self.oracle) {
            let precision = self.precision(subject.backend);
            let d_out = Dense::read(&self.data.d_out.view());
            let d_lse = self.data.d_lse.as_ref().map(|d_lse| Dense::read(&d_lse.view()));
            let want = self.oracle.gradients(&d_out, d_lse.as_ref());
            let errors = saved.errors(&self.oracle);
            let bounds = precision.backward(&self.oracle, &d_out, d_lse.as_ref(), &errors);
            let mut judge = Judge::new(self.fuzz.dtype);
            for (role, want, bounds) in [
                (Role::DQuery, &want.dq, &bounds.dq),
                (Role::DKey, &want.dk, &bounds.dk),
                (Role::DValue, &want.dv, &bounds.dv),
                (Role::DBias, &want.dbias, &bounds.dbias),
                (Role::DSinks, &want.dsinks, &bounds.dsinks),
            ] {
                judge.compare(&results, role, want, bounds);
            }
            judge.verdict(&mut counts.of(self.fuzz.dtype, Pass::Backward).elements)?;
            if own && problem.gradients().contains(Gradients::VALUE) {
                self.probabilities_sum_to_one(&precision, &results, &d_out)?;
            }
        }
        self.variations(subject, plan, Some(&saved), &results, counts)
    }

    fn variations(
        &self,
        subject: &Subject<'_>,
        plan: &dyn Plan,
        saved: Option<&SavedTensors>,
        results: &Results,
        counts: &mut Counts,
    ) -> Result<(), Stop> {
        if !subject.reproducible {
            return Ok(());
        }
        let (case, data, oracle) = (&self.fuzz.case, &self.data, &self.oracle);
        let problem = plan.problem();
        let base = Base { subject, case, data, problem, plan, saved, oracle, results };
        // The same variations for every backend, so that a fault is found again on its own.
        let mut rng = Rng::named(self.fuzz.seed(), &problem.pass().to_string());
        counts.of(self.fuzz.dtype, problem.pass()).bitwise += base.check_some(&mut rng, self.overflows)?;
        Ok(())
    }

    fn compare_forward(
        &self,
        precision: &Precision,
        results: &Results,
        counts: &mut Counts,
    ) -> Result<(), Stop> {
        if self.overflows {
            return Ok(());
        }
        let bounds = precision.forward(&self.oracle);
        let mut judge = Judge::new(self.fuzz.dtype);
        judge.compare(results, Role::Out, &self.oracle.out(), &bounds.out);
        judge.compare(results, Role::Lse, &self.oracle.lse(), &bounds.lse);
        judge.verdict(&mut counts.of(self.fuzz.dtype, Pass::Forward).elements)?;
        self.outputs_are_means(precision, results)
    }

    /// Without dropout an output is a weighted mean of values: between the least and the largest of them,
    /// whatever the logits. Bounds of large logits say less than that.
    fn outputs_are_means(&self, precision: &Precision, results: &Results) -> Result<(), Stop> {
        let (d, Some(out)) = (self.fuzz.case.dims, results.get(Role::Out)) else { return Ok(()) };
        if self.fuzz.case.options.dropout.is_some() {
            return Ok(());
        }
        let got = out.values();
        let mut failure = None;
        self.oracle.for_each_row(|[b, t, n], row| {
            if row.entries.is_empty() || failure.is_some() {
                return;
            }
            let roundings = (row.entries.len() as f64 + constants::SUM) * precision.accumulator;
            for dim in 0..d.value_head_dim {
                // A sink is a key with a value of 0.
                let start = if row.sink.is_some() { (0.0, 0.0) } else { (f64::INFINITY, f64::NEG_INFINITY) };
                let (least, most) = row.entries.iter().fold(start, |(least, most), entry| {
                    let v = self.oracle.value.row(&[b, entry.key, n / d.group_size()])[dim];
                    (f64::min(least, v), f64::max(most, v))
                });
                let size = least.abs().max(most.abs());
                let roundings = roundings + precision.weight + unit_roundoff(self.fuzz.dtype);
                let slack = roundings * size
                    + row.entries.len() as f64 * precision.weight_underflow * size
                    + crate::tolerance::underflow(self.fuzz.dtype);
                let got = got[((b * d.query_length + t) * d.query_heads + n) * d.value_head_dim + dim];
                // NaN is in no interval.
                let inside = got >= least - slack && got <= most + slack;
                if !inside {
                    let at = [b, t, n, dim];
                    failure.get_or_insert(format!(
                        "out{at:?} is {got:e}, a weighted mean of values between {least:e} and {most:e}"
                    ));
                }
            }
        });
        failure.map_or(Ok(()), |reason| Err(Stop::failed(reason)))
    }

    /// Without dropout and sinks the probabilities of a row sum to 1, so the gradients of values sum over the
    /// keys to the incoming gradients, whatever the logits: as far as the backend's own logsumexp was given
    /// back to it, and the products of queries and keys are exact to a quarter, and lose next to nothing
    /// where they underflow: a path of the forward pass may keep subnormal numbers, and one of the backward
    /// pass take them as 0.
    fn probabilities_sum_to_one(
        &self,
        precision: &Precision,
        results: &Results,
        d_out: &Dense,
    ) -> Result<(), Stop> {
        let (d, options) = (self.fuzz.case.dims, &self.fuzz.case.options);
        let Some(dv) = results.get(Role::DValue) else { return Ok(()) };
        let product_error = (d.head_dim as f64 + constants::PRODUCT) * precision.accumulator;
        let lost = d.head_dim as f64 * precision.scaled_underflow(&self.oracle);
        let mut entries = self.oracle.rows.iter().flat_map(|row| &row.entries);
        let is_exact = lost < 1e-4 && entries.all(|entry| product_error * entry.product_magnitude < 0.25);
        if options.dropout.is_some() || options.sinks || options.softcap.is_some() || !is_exact {
            return Ok(());
        }
        let columns = d.batch * d.key_heads * d.value_head_dim;
        let column = |b: usize, k: usize, dim: usize| (b * d.key_heads + k) * d.value_head_dim + dim;
        let (mut want, mut size, mut got) = (vec![0.0; columns], vec![0.0; columns], vec![0.0; columns]);
        let mut most_keys = 0;
        self.oracle.for_each_row(|[b, t, n], row| {
            if row.entries.is_empty() {
                return;
            }
            most_keys = most_keys.max(row.entries.len());
            for (dim, g) in d_out.row(&[b, t, n]).iter().enumerate() {
                let column = column(b, n / d.group_size(), dim);
                want[column] += g;
                size[column] += g.abs();
            }
        });
        let rounding = unit_roundoff(self.fuzz.dtype);
        let mut rounded = vec![0.0; columns];
        for (index, value) in dv.values().into_iter().enumerate() {
            let (row, dim) = (index / d.value_head_dim, index % d.value_head_dim);
            let column = column(row / d.key_heads / d.key_length, row % d.key_heads, dim);
            got[column] += value;
            rounded[column] += rounding * value.abs() + crate::tolerance::underflow(self.fuzz.dtype);
        }
        for column in 0..columns {
            let relative = 1e-3 + precision.weight + most_keys as f64 * precision.weight_underflow;
            let most = relative * size[column] + rounded[column];
            let difference = (got[column] - want[column]).abs();
            if difference.is_nan() || difference > most {
                return Err(Stop::failed(format!(
                    "the gradients of the values of batch row {}, head {}, dim {} sum to {:e} over the keys, the \
                     incoming gradients to {:e}: probabilities do not sum to 1",
                    column / d.value_head_dim / d.key_heads,
                    column / d.value_head_dim % d.key_heads,
                    column % d.value_head_dim,
                    got[column],
                    want[column]
                )));
            }
        }
        Ok(())
    }
}

/// Whether a logit is beyond the largest number of the accumulator, or so close that roundings can make it
/// so.
fn logits_overflow(oracle: &Oracle, most: f64) -> bool {
    (oracle.rows.iter().flat_map(|row| &row.entries)).any(|entry| {
        let size = entry.capped.abs() + entry.added_magnitude;
        // A bias of the least number stays what it is where a small product is added.
        entry.product_magnitude > most / 4.0 || size > most * (1.0 + 1e-9) || size.is_infinite()
    })
}

/// Compares results with the oracle's.
struct Judge {
    dtype: DType,
    compared: u64,
    wrong: usize,
    listed: Vec<String>,
}

impl Judge {
    fn new(dtype: DType) -> Self {
        Self { dtype, compared: 0, wrong: 0, listed: Vec::new() }
    }

    fn compare(&mut self, results: &Results, role: Role, want: &[f64], bounds: &[f64]) {
        let Some(tensor) = results.get(role) else { return };
        let dtype = tensor.desc().dtype();
        for (index, got) in tensor.values().into_iter().enumerate() {
            self.compared += 1;
            let (want, bound) = (want[index], bounds[index]);
            let fraction = if tensor.is_unwritten(index) {
                f64::INFINITY
            } else if got.is_finite() || fits(want, bound, largest(dtype.accumulator())) {
                fraction_of_bound(got, want, bound, dtype)
            } else {
                // The gradient, or a term of its sum, may leave the range of the accumulator.
                0.0
            };
            if fraction > 1.0 {
                self.wrong += 1;
                self.list(role, tensor, index, [got, want, bound]);
            }
        }
    }

    fn list(&mut self, role: Role, tensor: &HostTensor, index: usize, [got, want, bound]: [f64; 3]) {
        if self.listed.len() < LISTED {
            let at = unravel(index, &tensor.desc().shape());
            let got = if tensor.is_unwritten(index) { "not written".to_owned() } else { format!("{got:e}") };
            self.listed.push(format!("{role}{at:?} is {got}, expected {want:e} within {bound:.1e}"));
        }
    }

    fn verdict(self, compared: &mut u64) -> Result<(), Stop> {
        *compared += self.compared;
        if self.wrong == 0 {
            return Ok(());
        }
        let (wrong, all, dtype) = (self.wrong, self.compared, self.dtype);
        Err(Stop::failed(format!(
            "{wrong} of {all} elements are out of bounds in {dtype}: {}",
            self.listed.join(", ")
        )))
    }
}

/// Whether no term of a sum that is `want` within `bound` can overflow.
fn fits(want: f64, bound: f64, most: f64) -> bool {
    !want.is_finite() || want.abs() + bound < most / 64.0
}
