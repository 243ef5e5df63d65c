//! One plan serves calls with other numbers: nothing that it computes may stem from those of an earlier call.

use attention_core::{Alignment, DType, Inputs, Pass, Plan, Problem, QueryOffset, Role};

use super::call::Invocation;
use super::invariance::same;
use super::{Results, Stop};
use crate::cases::{Case, Numbers};
use crate::rng::Rng;
use crate::suite::Subject;
use crate::tensor::HostTensor;

/// Says what is wrong with results.
pub(crate) type Verdict<'a> = &'a dyn Fn(&Results) -> Result<(), Stop>;

/// Whether a run of the suite makes these calls: a quarter does, by the case's seed, so that every case is
/// among them in one dtype of each pass. More would make a run longer by more than a tenth.
pub(super) fn is_chosen(case: &Case, dtype: DType, pass: Pass) -> bool {
    let of_case = Rng::named(case.content.seed, "other numbers").below(4);
    let of_dtype = DType::FLOATS.iter().position(|&float| float == dtype).unwrap_or(0);
    (of_case + of_dtype + usize::from(pass == Pass::Backward)).is_multiple_of(4)
}

/// Makes the call on a plan that was first called with other numbers, and the other on the plan that gave
/// `results`. Where `judge` is given, it says what is wrong with the results of the former; elsewhere both
/// must have the bits of a plan whose first call they are. Returns how many calls were compared.
pub(crate) fn first(
    subject: &Subject<'_>,
    numbers: &Numbers,
    plan: &dyn Plan,
    invocation: &Invocation<'_>,
    results: &Results,
    judge: Option<Verdict<'_>>,
    rng: &mut Rng,
) -> Result<usize, Stop> {
    let others = numbers.others(invocation.problem, rng);
    let inputs = Inputs { data: others.data(), ..invocation.inputs };
    let other = Invocation { inputs, ..*invocation };
    let new = &*invocation.plan(subject.backend)?;
    let of_others = other.run_on(new)?;
    let again = invocation.run_on(new)?;
    if let Some(judge) = judge {
        judge(&again)?;
        return Ok(1);
    }
    same(results, &again, "made after one with other numbers")?;
    same(&of_others, &other.run_on(plan)?, "made with other numbers, and after one with these")?;
    Ok(2)
}

impl Numbers {
    /// Other numbers of calls of the same problem: other lengths, mostly shorter, offsets, scale, softcap, seed,
    /// and scales of 8-bit keys and values.
    fn others(&self, problem: &Problem, rng: &mut Rng) -> Self {
        let mut others = self.clone();
        let accumulator = problem.dtype().accumulator();
        let scale = self.scale.unwrap_or_else(|| problem.default_scale());
        let scales = if scale == 0.0 { [0.5, 0.5] } else { [0.75 * scale, 1.25 * scale] };
        let may_be =
            |scale: f64| problem.any_scale() || Problem::ordinary_scales(accumulator).contains(&scale);
        others.scale = scales.into_iter().find(|&scale| may_be(scale));
        // Finite, and not 0 in any precision.
        others.softcap = self.softcap.map(|cap| if cap > 1.0 { 0.75 * cap } else { 1.5 * cap });
        let offset = |offset: i64, rng: &mut Rng| match offset {
            // Offsets from which no key is seen by any row, or all are.
            i64::MIN..-1_000_000 | 1_000_001.. => 1 + rng.below(3) as i64,
            offset => offset + rng.pick(&[-2, -1, 1, 2, 3]),
        };
        if let (Alignment::Offset(_), QueryOffset::Fixed(given)) = (problem.alignment(), self.query_offset) {
            others.query_offset = QueryOffset::Fixed(offset(given, rng));
        }
        if let Some(offsets) = &mut others.query_offsets {
            // The dtype may have no negative numbers.
            let least = if offsets.desc().dtype() == DType::U32 { 0 } else { i64::MIN };
            offsets.map_integers(|given| offset(given, rng).max(least));
        }
        others.other_rows(problem, rng);
        if let Some(dropout) = &mut others.dropout {
            dropout.seed ^= rng.next() | 1;
            dropout.offset = dropout.offset.wrapping_add(1);
        }
        for tensor in [&mut others.dropout_seed, &mut others.dropout_offset].into_iter().flatten() {
            tensor.map_integers(|given| given ^ (rng.next() | 1).cast_signed());
        }
        for scales in [&mut others.key_scales, &mut others.value_scales].into_iter().flatten() {
            for (index, scale) in scales.values().into_iter().enumerate() {
                scales.set(index, scale * rng.pick(&[0.5, 0.75, 1.5, -1.0]));
            }
        }
        others
    }

    /// Other lengths, mostly shorter, and other places of the rows.
    fn other_rows(&mut self, problem: &Problem, rng: &mut Rng) {
        let d = problem.dims();
        let axes =
            |role: Role| problem.tensor(role).map_or([0, 0], |desc| [desc.shape()[0], desc.shape()[1]]);
        let shorten = |lengths: &mut Option<HostTensor>, full: usize, rng: &mut Rng| {
            if let Some(lengths) = lengths {
                lengths.map_integers(|given| match usize::try_from(given) {
                    Ok(given) if given > 1 && rng.chance(0.8) => (given - 1 - rng.below(given / 2)) as i64,
                    _ => full as i64,
                });
            }
        };
        match &mut self.query_starts {
            Some(starts) => restart(starts, axes(Role::Query)[1], d.query_length, rng),
            None => shorten(&mut self.query_lengths, d.query_length, rng),
        }
        if let Some(starts) = &mut self.key_value_starts {
            restart(starts, axes(Role::Key)[1], d.key_length, rng);
            let ends = starts.integers();
            let mut rooms = ends.windows(2).map(|ends| (ends[1] - ends[0]) as usize);
            if let Some(lengths) = &mut self.key_value_lengths {
                lengths.map_integers(|_| rng.below(rooms.next().unwrap_or(0) + 1) as i64);
            }
        } else if let Some(table) = &mut self.block_table {
            let [pages, page_size] = axes(Role::Key);
            let most = if pages == 0 { 0 } else { d.key_length.min(table.desc().shape()[1] * page_size) };
            shorten(&mut self.key_value_lengths, most, rng);
            table.map_integers(|_| if pages == 0 { -1 } else { rng.below(pages) as i64 });
        } else {
            shorten(&mut self.key_value_lengths, d.key_length, rng);
        }
    }
}

/// Draws other sequences of at most `longest` of these rows.
fn restart(starts: &mut HostTensor, rows: usize, longest: usize, rng: &mut Rng) {
    let (mut next, mut is_first) = (0, true);
    starts.map_integers(|_| {
        if !std::mem::take(&mut is_first) {
            next += rng.below(longest.min(rows - next) + 1);
        }
        next as i64
    });
}

#[cfg(test)]
mod tests {
    use attention_core::{CallProblem, FeatureSet};

    use super::*;
    use crate::cases;
    use crate::oracle::Oracle;

    /// Each case's other numbers are of the same problem, and few of them have the same results.
    #[test]
    fn other_numbers_are_of_the_same_problem() {
        let (mut different, mut all) = (0, 0);
        let others = cases::of_sequences().into_iter().chain(cases::of_eight_bits());
        for case in cases::all().into_iter().chain(others) {
            let dtype = DType::FLOATS[case.content.seed as usize % 4];
            let data = case.data(dtype);
            let problem = case.problem(&data, Pass::Forward, FeatureSet::all()).unwrap();
            let others = data.numbers.others(&problem, &mut Rng::named(case.content.seed, "others"));
            CallProblem::new(&problem, &others.data())
                .unwrap_or_else(|error| panic!("{}: {error}", case.name));
            let d = case.dims;
            if d.logits().iter().product::<usize>() * d.head_dim > 30_000 {
                continue;
            }
            let results = |inputs: &Inputs<'_>| {
                let oracle = Oracle::new(&problem, inputs);
                let lse = oracle.lse().into_iter().map(f64::to_bits);
                lse.chain(oracle.out().into_iter().map(f64::to_bits)).collect::<Vec<_>>()
            };
            let inputs = data.inputs();
            all += 1;
            different += usize::from(results(&inputs) != results(&Inputs { data: others.data(), ..inputs }));
        }
        assert!(10 * different > 9 * all, "{different} of {all}");
    }

    #[test]
    fn every_case_is_chosen_in_one_dtype_of_each_pass() {
        for case in cases::all() {
            for pass in [Pass::Forward, Pass::Backward] {
                let chosen = DType::FLOATS.into_iter().filter(|&dtype| is_chosen(&case, dtype, pass)).count();
                assert_eq!(chosen, 1, "{} {pass}", case.name);
            }
        }
    }
}
