//! What must not change a bit: padding, strides of masks and biases, whatever is masked, other heads and
//! batch rows, and the number of threads. Chunk sizes are in `chunks.rs`.

mod common;

use std::sync::Arc;

use attention_chunked::{ChunkedBackend, ChunkedConfig, Level};
use attention_core::DType;
use common::{Case, Data, Results, random};

const TYPES: [DType; 4] = [DType::F64, DType::F32, DType::F16, DType::Bf16];

fn at(level: Level) -> ChunkedBackend {
    ChunkedBackend::with_config(ChunkedConfig::default().level(level).threads(1))
}

fn for_each(mut visit: impl FnMut(Level, DType, &str)) {
    for level in Level::available() {
        for dtype in TYPES {
            visit(level, dtype, &format!("{level}, {dtype}"));
        }
    }
}

/// A variant whose gradients may be beyond the dtype.
const LARGE_SCALE: &str = "a scale that cannot go to base two";

/// What is applied to products on their way to logits, each alone and some together.
fn variants(case: &Case, seed: u32) -> Vec<(&'static str, Case)> {
    let [_, queries, keys, heads, _, _] = case.sizes;
    let bias_type = if seed.is_multiple_of(2) { case.dtype } else { DType::F32 };
    let with = |change: &dyn Fn(&mut Case)| {
        let mut case = case.clone();
        change(&mut case);
        case
    };
    let bias = |case: &mut Case| case.bias = Some((bias_type, random(keys, seed), vec![keys]));
    let wide = |case: &mut Case| {
        let numbers = random(heads * queries * keys, seed);
        case.bias = Some((bias_type, numbers, vec![heads, queries, keys]));
    };
    let mask = |case: &mut Case| {
        let mask = random(queries * keys, seed + 1).iter().map(|&x| x > -0.5).collect();
        case.mask = Some((mask, vec![queries, keys]));
    };
    let slopes = |case: &mut Case| case.slopes = Some((1..=heads).map(|head| 0.07 * head as f64).collect());
    vec![
        ("plain", case.clone()),
        ("bias", with(&bias)),
        ("wide bias", with(&wide)),
        ("mask", with(&mask)),
        ("alibi", with(&slopes)),
        ("softcap", with(&|case| case.softcap = Some(2.5))),
        (
            "softcap, bias, mask",
            with(&|case| {
                case.softcap = Some(2.5);
                wide(case);
                mask(case);
            }),
        ),
        (
            "alibi, bias, negative scale",
            with(&|case| {
                case.scale = Some(-0.3);
                slopes(case);
                bias(case);
            }),
        ),
        (
            "no scale, bias",
            with(&|case| {
                case.scale = Some(0.0);
                bias(case);
            }),
        ),
        (
            LARGE_SCALE,
            with(&|case| {
                case.scale = Some(2.4e38);
                case.query.iter_mut().for_each(|x| *x = 0.0);
            }),
        ),
    ]
}

/// The first `keys` of the keys of a tensor `[.., S, ..]` of one batch row.
fn first_keys(case: &Case, results: &Results, keys: usize) -> Results {
    let row = case.sizes[4] * case.sizes[5];
    let cut = |data: &Data, count: usize| Data::new(case.dtype, &data.numbers()[..count]);
    let mut cut_results = results.clone();
    cut_results.dk = cut(&results.dk, keys * row);
    cut_results.dv = cut(&results.dv, keys * row);
    if let (Some(dbias), Some((dtype, _, shape))) = (&results.dbias, &case.bias) {
        let all = *shape.last().unwrap();
        let numbers = dbias.numbers();
        let kept: Vec<f64> = numbers.chunks(all).flat_map(|row| row[..keys].iter().copied()).collect();
        cut_results.dbias = Some(Data::new(*dtype, &kept));
    }
    cut_results
}

#[test]
fn padding_of_keys_changes_nothing() {
    for_each(|level, dtype, what| {
        let backend = at(level);
        for (queries, keys, heads) in [(70, 70, 1), (9, 33, 2), (3, 301, 2), (70, 261, 1)] {
            for padding in [1, 7, 20, 300] {
                let sizes = [1, queries, keys, heads, 1, 4];
                let base = Case::new(dtype, sizes);
                for ((name, want), (_, mut case)) in variants(&base, 5).into_iter().zip(variants(&base, 5)) {
                    let what = format!("{what}, {name}, {keys} keys and {padding}");
                    let want = want.run(&backend);
                    case.sizes[2] += padding;
                    case.key_lengths = Some(keys);
                    case.key.extend(vec![f64::NAN; padding * 4]);
                    case.value.extend(vec![f64::INFINITY; padding * 4]);
                    if let Some((_, bias, shape)) = &mut case.bias {
                        let padded = bias
                            .chunks(keys)
                            .flat_map(|row| row.iter().copied().chain(vec![f64::NAN; padding]));
                        *bias = padded.collect();
                        *shape.last_mut().unwrap() += padding;
                    }
                    if let Some((mask, shape)) = &mut case.mask {
                        let padded =
                            mask.chunks(keys).flat_map(|row| row.iter().copied().chain(vec![true; padding]));
                        *mask = padded.collect();
                        *shape.last_mut().unwrap() += padding;
                    }
                    let got = first_keys(&case, &case.run(&backend), keys);
                    got.assert_same(&want, &[], &what);
                }
            }
        }
    });
}

#[test]
fn strides_of_masks_and_biases_change_nothing() {
    for_each(|level, dtype, what| {
        let backend = at(level);
        for sizes in [[1, 70, 90, 2, 1, 4], [1, 9, 33, 2, 2, 4], [1, 2, 300, 2, 1, 5]] {
            for (name, mut case) in variants(&Case::new(dtype, sizes), 8) {
                let want = case.run(&backend);
                case.strided = true;
                case.run(&backend).assert_same(&want, &[], &format!("{what}, {name}, {sizes:?}"));
            }
        }
    });
}

/// NaN and infinity in keys and values that a mask or a bias of -inf hides from some rows, or from all.
#[test]
fn masked_memory_changes_nothing() {
    for_each(|level, dtype, what| {
        let backend = at(level);
        for sizes in [[1, 70, 70, 1, 1, 4], [1, 9, 33, 2, 2, 4], [1, 2, 2100, 1, 1, 5], [1, 4, 300, 2, 1, 33]]
        {
            let [_, queries, keys, _, key_heads, width] = sizes;
            for (name, mut case) in variants(&Case::new(dtype, sizes), 3) {
                let mut mask = case.mask.take().map_or(vec![true; queries * keys], |(mask, _)| mask);
                let hidden = [5, keys / 2, keys - 1];
                for row in mask.chunks_mut(keys) {
                    hidden.iter().for_each(|&key| row[key] = false);
                }
                case.mask = Some((mask, vec![queries, keys]));
                let want = case.run(&backend);
                if name != LARGE_SCALE {
                    want.assert_finite(what);
                }
                let row = key_heads * width;
                for (number, other) in
                    [(f64::NAN, f64::NAN), (f64::INFINITY, 1.0), (2.0, f64::NEG_INFINITY), (-0.0, -1.0)]
                {
                    let mut case = case.clone();
                    for key in hidden {
                        case.key[key * row..(key + 1) * row].fill(number);
                        case.value[key * row..(key + 1) * row].fill(other);
                    }
                    let what = format!("{what}, {name}, {sizes:?}, {number} and {other}");
                    case.run(&backend).assert_same(&want, &[], &what);
                }
                // Hidden from the last query alone: the last row has the bits that it has when all rows see a
                // number.
                let mut mask = vec![true; queries * keys];
                mask[(queries - 1) * keys + 5] = false;
                case.mask = Some((mask, vec![queries, keys]));
                let want = case.run(&backend);
                case.value[5 * row] = f64::NAN;
                case.value[5 * row + 1] = f64::INFINITY;
                let got = case.run(&backend);
                let last = |results: &Results| {
                    let bits = results.out.bits();
                    let row = bits.len() / queries;
                    bits[(queries - 1) * row..].to_vec()
                };
                assert_eq!(
                    last(&got),
                    last(&want),
                    "{what}, {name}, {sizes:?}: the row that does not see it"
                );
                let out = got.out.numbers();
                assert!(queries < 2 || out[0].is_nan() || name == LARGE_SCALE, "{what}, {name}: {}", out[0]);
            }
        }
    });
}

/// NaN in one head reaches no other, for any number of threads.
#[test]
fn other_heads_and_batch_rows_change_nothing() {
    for_each(|level, dtype, what| {
        let pools = [1, 2, 3, 7].map(|threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            let config = ChunkedConfig::default().level(level).pool(Arc::new(pool));
            (threads, ChunkedBackend::with_config(config))
        });
        for sizes in [[4, 3, 3, 2, 2, 4], [3, 1, 1500, 4, 2, 8], [2, 70, 90, 2, 1, 4]] {
            let [batch, queries, _, heads, _, width] = sizes;
            for (name, case) in variants(&Case::new(dtype, sizes), 4) {
                let want = case.run(&pools[0].1);
                let mut spoiled = case.clone();
                for batch in 0..batch {
                    spoiled.query[batch * queries * heads * width] = f64::NAN;
                }
                let spoiled_want = spoiled.run(&pools[0].1);
                for (threads, backend) in &pools {
                    let what = format!("{what}, {name}, {sizes:?}, {threads} threads");
                    case.run(backend).assert_same(&want, &[], &what);
                    let got = spoiled.run(backend);
                    got.assert_same(&spoiled_want, &[], &what);
                    // The rows of the other heads.
                    for (got, want) in [(&got.out, &want.out), (&got.lse, &want.lse), (&got.dq, &want.dq)] {
                        let (got, want) = (got.bits(), want.bits());
                        let row = got.len() / (batch * queries * heads);
                        for (index, (got, want)) in got.chunks(row).zip(want.chunks(row)).enumerate() {
                            if index % heads != 0 {
                                assert_eq!(got, want, "{what}: row {index}");
                            }
                        }
                    }
                }
                // A batch row alone.
                let mut alone = case.clone();
                alone.sizes[0] = 1;
                for data in [&mut alone.query, &mut alone.key, &mut alone.value, &mut alone.d_out] {
                    data.truncate(data.len() / batch);
                }
                let alone = alone.run(&pools[3].1);
                for ((name, got), (_, want)) in alone.named().zip(want.named()) {
                    if ["dbias", "dsinks"].contains(&name) {
                        continue;
                    }
                    let (got, want) = (got.bits(), want.bits());
                    assert_eq!(got, want[..got.len()], "{what}: {name} of a batch row alone");
                }
            }
        }
    });
}

/// Distances beyond 2^24, which f32 does not hold exactly, come out the same wherever a row's blocks begin.
#[test]
fn alibi_far_away_is_the_same_for_every_cut() {
    for_each(|level, dtype, what| {
        for offset in [-1_000_000_000, 16_777_000, 1 << 40, i64::MIN, i64::MAX] {
            let mut case = Case::new(dtype, [1, 150, 400, 2, 1, 8]);
            case.slopes = Some(vec![1e-9, 3e-13]);
            case.offset = offset;
            let want = case.run(&at(level));
            let small = ChunkedConfig::default().level(level).threads(1).query_chunk(1).key_chunk(1);
            let what = format!("{what}, offset {offset}");
            case.run(&ChunkedBackend::with_config(small)).assert_same(&want, &[], &what);
            want.assert_finite(&what);
        }
    });
}

/// A sum that underflows has a sign of its own, which terms that take no part must not change.
#[test]
fn zeros_have_no_sign() {
    for_each(|level, dtype, what| {
        for sizes in [[1, 70, 70, 1, 1, 4], [1, 2, 40, 1, 1, 4], [1, 9, 33, 1, 1, 4]] {
            let mut case = Case::new(dtype, sizes);
            case.value.fill(-0.0);
            case.d_out.fill(-0.0);
            for (name, data) in case.run(&at(level)).named() {
                let negative = data.numbers().iter().filter(|x| **x == 0.0 && x.is_sign_negative()).count();
                assert_eq!(negative, 0, "{what}, {sizes:?}: {name}");
            }
        }
    });
}
