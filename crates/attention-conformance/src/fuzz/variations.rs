//! The changes that the fuzzer makes to a call: some of every kind, by its seed.

use attention_core::{Pass, Role};

use super::case::layouts;
use crate::cases::{Case, Layouts, Sequences};
use crate::rng::Rng;
use crate::run::{Base, Stop, invariance, other_numbers};
use crate::tensor::unravel;

impl Base<'_> {
    /// Makes the calls that `rng` picks; the number of calls that were compared. Where a logit `overflows`,
    /// the oracle cannot say which keys a row reads: one that became -inf looks like one that takes no part.
    pub(super) fn check_some(&self, rng: &mut Rng, overflows: bool) -> Result<usize, Stop> {
        let mut compared = 0;
        let laid = self.laid();
        let call = laid.invocation(self.problem, &self.case.layouts);
        if !self.subject.same.is_empty() {
            let (label, other) = &self.subject.same[rng.below(self.subject.same.len())];
            let again = call.run(*other)?;
            self.same(&again, &format!("with {label}"))?;
            compared += 1;
        }
        if rng.chance(0.2) {
            let again = call.run_on(self.plan)?;
            self.same(&again, "once more")?;
            let again = call.run(self.subject.backend)?;
            self.same(&again, "planned again")?;
            compared += 2;
        }
        if rng.chance(0.5) {
            compared += if self.case.sequences.is_some() {
                self.sequences_alone()?
            } else {
                invariance::batch_rows_alone(self.subject.backend, self.case, &call, self.results)?;
                self.case.dims.batch
            };
        }
        if rng.chance(0.5) {
            self.padded_somehow(rng)?;
            compared += 1;
        }
        if rng.chance(0.5) {
            self.with_other_strides(rng)?;
            compared += 1;
        }
        if rng.chance(0.5) && !overflows {
            self.with_some_garbage(rng)?;
            compared += 1;
        }
        if rng.chance(0.5) && !overflows {
            self.poisoned_somewhere(rng)?;
            compared += 1;
        }
        if rng.chance(0.3) {
            let numbers = &laid.data.numbers;
            compared +=
                other_numbers::first(self.subject, numbers, self.plan, &call, self.results, None, rng)?;
        }
        if let Some(own) = self.case.sequences.as_ref().filter(|_| rng.chance(0.5)) {
            let sequences = rng.pick(&own.others(self.case, self.problem.pass() == Pass::Backward));
            let how = format!("with its sequences as {sequences:?}");
            let case = Case { sequences, layouts: Layouts::default(), ..self.case.clone() };
            self.remade(&case, rng, &how)?;
            compared += 1;
        }
        Ok(compared)
    }

    /// Whether what one sequence reads, others read too.
    fn shares_keys(&self) -> bool {
        self.case.sequences.as_ref().is_some_and(Sequences::share_keys)
    }

    /// More rows and keys behind the lengths, which hold garbage.
    fn padded_somehow(&self, rng: &mut Rng) -> Result<(), Stop> {
        let (queries, keys) = (rng.below(20), 1 + rng.below(70));
        let case = Case { layouts: Layouts::default(), ..self.padded_case(queries, keys) };
        let how = format!("padded to T {} and S {}", case.dims.query_length, case.dims.key_length);
        self.remade(&case, rng, &how)
    }

    /// The same numbers with other strides, inputs and outputs.
    fn with_other_strides(&self, rng: &mut Rng) -> Result<(), Stop> {
        let mut case = self.case.clone();
        case.layouts = loop {
            let drawn = layouts(&case.dims, rng);
            if drawn != self.case.layouts || rng.chance(0.1) {
                break drawn;
            }
        };
        self.remade(&case, rng, "with other strides")
    }

    /// NaN and infinities wherever no result may depend on the memory.
    fn with_some_garbage(&self, rng: &mut Rng) -> Result<(), Stop> {
        let (d, mut data) = (self.case.dims, self.data.clone());
        self.case.add_garbage(&mut data, &[f64::NAN, f64::INFINITY, f64::NEG_INFINITY, 6e4]);
        data.garbage = true;
        // A bias of -inf masks as a mask does, so keys that it takes from every row are nobody's either.
        let mut unseen = vec![true; d.batch * d.key_length * d.key_heads];
        self.oracle.for_each_row(|[b, _, n], row| {
            for entry in &row.entries {
                unseen[(b * d.key_length + entry.key) * d.key_heads + n / d.group_size()] = false;
            }
        });
        if !self.case.layouts.of(Role::Key).is_broadcast() && !self.shares_keys() {
            for (key, _) in unseen.iter().enumerate().filter(|(_, unseen)| **unseen) {
                let garbage = rng.pick(&[f64::NAN, f64::INFINITY]);
                data.key.set(key * d.head_dim + rng.below(d.head_dim), garbage);
            }
        }
        self.with_garbage(&data, f64::NAN, "with NaN in masked memory")
    }

    /// NaN or infinity in one element that takes part: whatever does not depend on it keeps its bits.
    fn poisoned_somewhere(&self, rng: &mut Rng) -> Result<(), Stop> {
        let mut data = self.data.clone();
        let backward = self.problem.pass() == Pass::Backward;
        let role =
            rng.pick(&[Role::Query, Role::Key, Role::Value, if backward { Role::DOut } else { Role::Value }]);
        if self.shares_keys() {
            return Ok(());
        }
        let tensor = data.operand_mut(role);
        if tensor.desc().is_empty() || self.case.layouts.of(role).is_broadcast() {
            return Ok(());
        }
        let element = rng.below(tensor.desc().element_count().unwrap_or(1));
        tensor.set(element, rng.pick(&[f64::NAN, f64::NAN, f64::INFINITY]));
        let at = unravel(element, &tensor.desc().shape());
        let reads = |other: Role, row: [usize; 3]| other == role && row[..] == at[..3];
        self.with_poison(&data, reads, &format!("with NaN or infinity at {role}{at:?}"))
    }
}
