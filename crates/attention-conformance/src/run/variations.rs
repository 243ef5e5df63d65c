//! The changes that the suite makes to a call: every kind, each time the same.

use attention_core::{Pass, Role};

use super::Stop;
use super::base::Base;
use crate::cases::{Broadcast, Case, Layout, Layouts, Sequences};
use crate::rng::Rng;
use crate::tensor::unravel;

/// Which elements of which operands are replaced, given `[batch row, query or key, head]`.
struct Poison<'a> {
    what: &'a str,
    value: f64,
    roles: &'a [Role],
    elements: &'a dyn Fn(Role, [usize; 3]) -> bool,
}

impl Base<'_> {
    /// Makes every call that must give the same bits, or the same bits in what does not read what was
    /// changed.
    pub(super) fn check_all(&self) -> Result<(), Stop> {
        for (queries, keys) in [(0, 1), (13, 70)] {
            self.padded(queries, keys)?;
        }
        self.laid_out_otherwise()?;
        self.sequences_otherwise()?;
        for garbage in [f64::NAN, f64::INFINITY, 0.0] {
            let mut data = self.data.clone();
            self.case.add_garbage(&mut data, &[garbage]);
            // In rows of no sequence too, or other numbers than before.
            data.garbage = garbage != 0.0;
            self.with_garbage(&data, garbage, &format!("with {garbage} in memory that does not matter"))?;
        }
        self.poisoned()
    }

    /// More rows and keys behind the lengths, which hold garbage.
    fn padded(&self, queries: usize, keys: usize) -> Result<(), Stop> {
        let how = format!("when it is padded by {queries} queries and {keys} keys");
        self.changed(&self.padded_case(queries, keys), &how)
    }

    /// The same sequences packed, in pages, and as batch rows.
    fn sequences_otherwise(&self) -> Result<(), Stop> {
        let Some(own) = &self.case.sequences else { return Ok(()) };
        for sequences in own.others(self.case, self.problem.pass() == Pass::Backward) {
            let how = match &sequences {
                Some(sequences) => format!("with its sequences as {sequences:?}"),
                None => "with its sequences as batch rows".to_owned(),
            };
            self.changed(&Case { sequences, layouts: Layouts::default(), ..self.case.clone() }, &how)?;
        }
        Ok(())
    }

    pub(super) fn changed(&self, case: &Case, how: &str) -> Result<(), Stop> {
        self.remade(case, &mut Rng::named(case.content.seed, how), how)
    }

    /// The same numbers with other strides, of all tensors and of mask and bias alone.
    fn laid_out_otherwise(&self) -> Result<(), Stop> {
        for (how, layout) in [
            ("when it is transposed", Layout::Transposed),
            ("with gaps between rows", Layout::Padded),
            ("with a stride of 2", Layout::InnerStride),
            ("with a negative stride", Layout::Reversed { axis: 3 }),
        ] {
            self.changed(&Case { layouts: Layouts::everything(layout), ..self.case.clone() }, how)?;
            if self.data.mask.is_some() || self.data.bias.is_some() {
                let layouts = Layouts::default().with(Role::Mask, layout).with(Role::Bias, layout);
                self.changed(&Case { layouts, ..self.case.clone() }, how)?;
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
            self.changed(&case, "when mask and bias are expanded with a stride of 0")?;
        }
        Ok(())
    }

    /// NaN or infinity in what takes part: whatever does not depend on it keeps its bits.
    fn poisoned(&self) -> Result<(), Stop> {
        // What one sequence reads, others read too.
        if self.case.sequences.as_ref().is_some_and(Sequences::share_keys) {
            return Ok(());
        }
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
        poisons.iter().try_for_each(|poison| self.poisoned_by(poison))
    }

    fn poisoned_by(&self, poison: &Poison<'_>) -> Result<(), Stop> {
        let mut data = self.data.clone();
        let reads = |role: Role, at: [usize; 3]| poison.roles.contains(&role) && (poison.elements)(role, at);
        for &role in poison.roles {
            let tensor = data.operand_mut(role);
            let shape = tensor.desc().shape();
            for index in 0..tensor.desc().element_count().unwrap_or(0) {
                let [b, i, head, dim] = unravel(index, &shape)[..] else { unreachable!() };
                // One element of the row: whatever reads one reads the row.
                if dim == shape[3] / 2 && reads(role, [b, i, head]) {
                    tensor.set(index, poison.value);
                }
            }
        }
        let how = format!("with {} in {} that it does not read", poison.value, poison.what);
        self.with_poison(&data, reads, &how)
    }
}
