use attention_core::FeatureSet;

use super::*;
use crate::oracle::Oracle;

/// A seed gives the same case again, and every case is a valid call with finite results where nothing
/// overflows.
#[test]
fn seeds_are_cases() {
    for seed in 0..300 {
        let case = FuzzCase::from_seed(seed);
        assert_eq!(case.to_string(), FuzzCase::from_seed(seed).to_string());
        let data = case.data();
        for &pass in case.case.passes() {
            let problem = case.case.problem(&case.case.laid_out(&data), pass, FeatureSet::all());
            problem.unwrap_or_else(|error| panic!("{case}: {error}"));
        }
    }
}

/// What the generator is for: every option, size and magnitude comes up, and few cases are lost to overflow.
#[test]
fn seeds_reach_every_kind_of_case() {
    let (mut few_rows, mut small, mut blocks, mut empty, mut huge_logits, mut minimum, mut infinite) =
        (0, 0, 0, 0, 0, 0, 0);
    let seeds = 600;
    for seed in 0..seeds {
        let case = FuzzCase::from_seed(seed);
        let d = case.case.dims;
        empty += usize::from(d.logits().contains(&0));
        few_rows += usize::from(d.query_length * d.group_size() <= 8 && d.key_length > 1000);
        small += usize::from(d.query_length <= 64 && d.key_length <= 64);
        blocks += usize::from(d.query_length > 64 && d.key_length > 256);
        let data = case.data();
        let problem = case.case.problem(&data, Pass::Forward, FeatureSet::all()).unwrap();
        let oracle = Oracle::new(&problem, &data.inputs());
        let finite = |row: &&crate::oracle::Row| row.lse.is_finite();
        huge_logits += usize::from(oracle.rows.iter().filter(finite).any(|row| row.lse.abs() > 1e9));
        let least = data.bias.as_ref().map(|bias| -magnitudes::largest(bias.desc().dtype()));
        let bias = data.bias.map_or(Vec::new(), |bias| bias.values());
        minimum += usize::from(bias.iter().any(|&x| Some(x) == least));
        infinite += usize::from(bias.contains(&f64::NEG_INFINITY));
    }
    let seen = [few_rows, small, blocks, empty, huge_logits, minimum, infinite];
    assert!(seen.iter().all(|&count| count >= 5), "{seen:?} of {seeds}");
}

/// Offsets by batch row and seeds in tensors come up, and every kind of wrong number is refused.
#[test]
fn seeds_reach_numbers_in_tensors() {
    let (mut offsets, mut seeds) = (0, 0);
    for seed in 0..200 {
        let case = FuzzCase::from_seed(seed);
        offsets += usize::from(case.case.options.query_offsets.is_some());
        seeds += usize::from(case.case.options.dropout_tensors);
        let mut rng = Rng::named(seed, "wrong numbers");
        assert_eq!(invalid::numbers(&case.case.dims, case.dtype(), &mut rng), Ok(4));
    }
    assert!(offsets >= 20 && seeds >= 10, "{offsets} and {seeds}");
}

/// Every layout of sequences comes up, and every mistake in them is refused.
#[test]
fn seeds_reach_sequences() {
    use crate::cases::KeyRows;

    let (mut layouts, mut shared, mut used) = ([[0; 3]; 2], 0, 0);
    for seed in 0..600 {
        let case = FuzzCase::from_seed(seed);
        let Some(sequences) = &case.case.sequences else { continue };
        let keys = match sequences.keys {
            KeyRows::Dense => 0,
            KeyRows::Packed { .. } => 1,
            KeyRows::Paged { .. } => 2,
        };
        layouts[usize::from(sequences.query_tail.is_some())][keys] += 1;
        shared += usize::from(sequences.share_keys());
        used += usize::from(matches!(sequences.keys, KeyRows::Packed { unused: Some(_), .. }));
    }
    let [[dense, none, paged], of_packed] = layouts;
    assert!(dense + none == 0 && paged >= 10 && of_packed.iter().all(|&count| count >= 5), "{layouts:?}");
    assert!(layouts.iter().flatten().sum::<usize>() == 120 && shared >= 5 && used >= 10, "{shared} {used}");
    for seed in 0..40 {
        let dtype = DType::FLOATS[seed as usize % 4];
        let mut rng = Rng::named(seed, "wrong sequences");
        assert_eq!(invalid_sequences::calls(dtype, &mut rng), Ok(4));
    }
    assert_eq!(invalid_sequences::all(DType::F32), Ok(()));
}

/// Simplifying ends, and leaves a valid case each time.
#[test]
fn every_simplification_leaves_a_valid_case() {
    for seed in 0..100 {
        let mut case = FuzzCase::from_seed(seed);
        for simplification in Simplification::ALL.into_iter().chain(Simplification::ALL) {
            case.simplify(simplification);
            let data = case.data();
            for &pass in case.case.passes() {
                let problem = case.case.problem(&case.case.laid_out(&data), pass, FeatureSet::all());
                problem.unwrap_or_else(|error| panic!("{case} {simplification:?}: {error}"));
            }
        }
        let again = FuzzCase::from_seed(seed).simplified(case.simplifications());
        assert_eq!(again.to_string(), case.to_string());
    }
}
