//! Packed and paged calls mean what their sequences mean alone, to the bit: whatever else is in the call,
//! however rows lie, and on any number of threads.

mod common;

use std::sync::Arc;

use attention_chunked::{ChunkedBackend, ChunkedConfig, Level};
use attention_core::{AttentionBackend, DType, QueryOffset};
use common::sequences::{Bits, Keys, Sequences, Written};

/// The backends of a level: of one, two and three threads, and with the smallest chunks.
fn backends(level: Level) -> Vec<ChunkedBackend> {
    let config = || ChunkedConfig::default().level(level);
    let pool = |threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("a pool");
        ChunkedBackend::with_config(config().pool(Arc::new(pool)))
    };
    let one = ChunkedBackend::with_config(config().threads(1));
    let small_chunks = ChunkedBackend::with_config(config().threads(1).query_chunk(1).budget(1));
    vec![one, pool(2), pool(3), small_chunks]
}

/// Checks that what a call wrote for sequences is what `want` has for `batches`, of a dense call with them
/// alone.
fn assert_same(call: &Sequences, got: &Written, want: &Written, batches: std::ops::Range<usize>, what: &str) {
    let [query_starts, key_starts] = [0, 1].map(|side| call.starts(side));
    let [heads, key_heads, ..] = call.heads;
    for (dense, batch) in batches.enumerate() {
        let [queries, keys] = call.lengths[batch];
        let same = |name: &str, got: &Bits, got_at: &[usize], want: &Bits, want_at: &[usize]| {
            let (got, want) = (got.at(got_at), want.at(want_at));
            assert_eq!(got, want, "{what}: {name} of sequence {batch} at {want_at:?}, {call:?}");
        };
        for (row, head) in (0..queries).flat_map(|row| (0..heads).map(move |head| (row, head))) {
            let packed = [query_starts[batch] as usize + row, head];
            let at: &[usize] = if call.packed_queries { &packed } else { &[batch, row, head] };
            same("out", &got.out, at, &want.out, &[dense, row, head]);
            same("lse", &got.lse, at, &want.lse, &[dense, row, head]);
            if let Some((got, want)) = got.gradients.as_ref().zip(want.gradients.as_ref()) {
                same("dq", &got.dq, at, &want.dq, &[dense, row, head]);
            }
        }
        let Some((got, want)) = got.gradients.as_ref().zip(want.gradients.as_ref()) else { continue };
        for (key, head) in (0..keys).flat_map(|key| (0..key_heads).map(move |head| (key, head))) {
            let packed = [key_starts[batch] as usize + key, head];
            let at: &[usize] = if call.keys == Keys::Packed { &packed } else { &[batch, key, head] };
            same("dk", &got.dk, at, &want.dk, &[dense, key, head]);
            same("dv", &got.dv, at, &want.dv, &[dense, key, head]);
        }
    }
}

/// Checks the rows and keys of no sequence.
fn assert_filled(call: &Sequences, got: &Written, what: &str) {
    let [queries, keys] = [0, 1].map(|side| call.starts(side)[call.lengths.len()] as usize);
    let infinity = if call.dtype == DType::F64 {
        f64::NEG_INFINITY.to_bits()
    } else {
        f32::NEG_INFINITY.to_bits().into()
    };
    let all = |bits: &Bits, row: usize, value: u64| {
        assert!(bits.at(&[row]).iter().all(|&x| x == value), "{what}: row {row} of none, {call:?}");
    };
    for row in queries..queries + if call.packed_queries { call.behind[0] } else { 0 } {
        all(&got.out, row, 0);
        all(&got.lse, row, infinity);
        got.gradients.iter().for_each(|gradients| all(&gradients.dq, row, 0));
    }
    let Some(gradients) = &got.gradients else { return };
    for key in keys..keys + if call.keys == Keys::Packed { call.behind[1] } else { 0 } {
        all(&gradients.dk, key, 0);
        all(&gradients.dv, key, 0);
    }
    for (batch, &[_, keys]) in call.lengths.iter().enumerate() {
        for key in call.used(batch)..keys {
            for output in [&gradients.dk, &gradients.dv] {
                let first = call.starts(1)[batch] as usize + key;
                let at: &[usize] = if call.keys == Keys::Packed { &[first] } else { &[batch, key] };
                assert!(output.at(at).iter().all(|&x| x == 0), "{what}: an unused key, {call:?}");
            }
        }
    }
}

/// Checks a call against one dense call of all sequences and against each sequence alone.
fn check(call: &Sequences, backends: &[ChunkedBackend], what: &str) {
    let got = call.run(&backends[0]);
    assert_filled(call, &got, what);
    let padded = call.run_padded(&backends[0]);
    assert_same(call, &got, &padded, 0..call.lengths.len(), &format!("{what}, padded"));
    if got.gradients.is_some() {
        // Sums over the sequences, in the same order.
        assert_eq!((&got.dbias, &got.dsinks), (&padded.dbias, &padded.dsinks), "{what}: {call:?}");
    }
    // The stream of dropout counts sequences.
    if call.dropout.is_none() {
        for batch in 0..call.lengths.len() {
            let alone = call.run_alone(&backends[0], batch);
            assert_same(call, &got, &alone, batch..batch + 1, &format!("{what}, alone"));
        }
    }
    for backend in &backends[1..] {
        assert_eq!(call.run(backend), got, "{what}: other threads or chunks, {call:?}");
    }
}

/// How many random calls there are of a dtype at a level: `ATTENTION_SEQUENCE_SEEDS`, or as many as take some
/// seconds.
fn seeds() -> u64 {
    let given = std::env::var("ATTENTION_SEQUENCE_SEEDS").ok();
    given.map_or(60, |count| count.parse().expect("ATTENTION_SEQUENCE_SEEDS is a number"))
}

fn random_calls(dtype: DType) {
    for level in Level::available() {
        let backends = backends(level);
        for seed in 0..seeds() {
            check(&Sequences::random(dtype, seed), &backends, &format!("{level}, {dtype}, seed {seed}"));
        }
    }
}

#[test]
fn random_calls_are_their_sequences_in_f32() {
    random_calls(DType::F32);
}

#[test]
fn random_calls_are_their_sequences_in_f64() {
    random_calls(DType::F64);
}

#[test]
fn random_calls_are_their_sequences_in_bf16() {
    random_calls(DType::Bf16);
}

#[test]
fn random_calls_are_their_sequences_in_f16() {
    random_calls(DType::F16);
}

/// Whether one of the backends has taken a path of this name, which begins with the dtype.
fn has_run(backends: &[ChunkedBackend], name: &str) -> bool {
    let runs = backends.iter().flat_map(|backend| backend.variants().expect("it counts variants").runs());
    runs.filter(|variant| variant.runs > 0).any(|variant| variant.name == name)
}

/// Single tokens over many keys, in one task and in splits, in pages of every size: keys and values are read
/// as they lie.
#[test]
fn tokens_are_decoded_from_pages_of_every_size() {
    for level in Level::available() {
        let backends = backends(level);
        for dtype in [DType::F64, DType::F32, DType::F16, DType::Bf16] {
            for size in [1, 2, 5, 13, 16, 24, 64, 300] {
                for (heads, lengths) in [
                    ([8, 2, 64, 64], vec![[2, 2600]]),
                    ([2, 2, 40, 16], vec![[1, 700], [0, 30], [2, 1], [1, 0], [1, 263]]),
                ] {
                    let call = Sequences {
                        keys: Keys::Paged { size, shared: size == 13, by_head: size == 16 },
                        gaps: if size == 5 { [0, 1] } else { [0, 0] },
                        causal: size == 24,
                        offset: QueryOffset::BottomRight,
                        infinite: size == 2,
                        sinks: true,
                        ..Sequences::plain(dtype, heads, lengths)
                    };
                    check(&call, &backends, &format!("{level}, {dtype}, pages of {size}"));
                }
            }
            for path in ["keys in pages", "all keys", "parts and merge", "strided keys or values"] {
                assert!(
                    has_run(&backends, &format!("{dtype}: few rows, {path}")),
                    "{level}, {dtype}: {path}"
                );
            }
        }
        assert!(has_run(&backends, "f32 in f64: few rows, keys in pages"), "{level}");
    }
}

/// A long sequence among short and empty ones is spread over the threads, short ones are not.
#[test]
fn a_long_sequence_among_short_ones_keeps_its_bits() {
    let mut lengths = vec![[0, 0]; 20];
    lengths.extend([[3, 5], [700, 600], [0, 4], [9, 0], [1, 1], [40, 50], [8, 300]]);
    for level in Level::available() {
        let backends = backends(level);
        for dtype in [DType::F32, DType::Bf16] {
            let call = Sequences {
                behind: [2, 3],
                causal: true,
                d_lse: true,
                bounded: false,
                bias: Some([false, true, false, true]),
                ..Sequences::plain(dtype, [4, 1, 32, 32], lengths.clone())
            };
            check(&call, &backends, &format!("{level}, {dtype}"));
            for path in ["all gradients of a head together", "dq apart", "dk and dv apart"] {
                assert!(
                    has_run(&backends, &format!("{dtype}: backward, {path}")),
                    "{level}, {dtype}: {path}"
                );
            }
        }
    }
}

/// Logsumexps that have lost digits are replaced by sums of the keys at hand, those of each sequence.
#[test]
fn large_logsumexps_are_replaced_in_each_sequence() {
    for level in Level::available() {
        let backends = backends(level);
        for dtype in [DType::F64, DType::F32, DType::Bf16] {
            let call = Sequences {
                behind: [1, 1],
                used: Some(vec![7, 0, 90, 300, 2]),
                scale: Some(3e4),
                sinks: true,
                ..Sequences::plain(dtype, [4, 2, 16, 16], vec![[9, 9], [0, 0], [70, 100], [40, 300], [1, 2]])
            };
            check(&call, &backends, &format!("{level}, {dtype}"));
            assert!(has_run(&backends, &format!("{dtype}: backward, own sums of a row")), "{level}, {dtype}");
        }
    }
}

/// No work grows with the number of sequences times the length of the longest: this would take hours.
#[test]
fn a_million_empty_sequences_are_cheap() {
    let (count, long) = (1_000_000, 600_000);
    let mut lengths = vec![[0, 0]; count];
    lengths[long] = [300, 400];
    lengths[count - 2] = [0, 3];
    for (keys, used) in
        [(Keys::Packed, None), (Keys::Paged { size: 16, shared: false, by_head: false }, None)]
    {
        let call = Sequences {
            keys,
            used,
            behind: [2, 2],
            bias: Some([false, true, true, true]),
            scale: Some(3e4),
            sinks: true,
            ..Sequences::plain(DType::F32, [2, 2, 16, 16], lengths.clone())
        };
        for backend in &backends(Level::best())[..3] {
            let got = call.run(backend);
            assert_same(&call, &got, &call.run_alone(backend, long), long..long + 1, "a million");
            assert_filled(&call, &got, "a million");
        }
    }
}

#[test]
fn calls_without_sequences_or_rows_are_filled() {
    let backends = backends(Level::best());
    for lengths in [vec![], vec![[0, 0]; 3], vec![[0, 4]; 2], vec![[5, 0]; 2]] {
        for (behind, bounded) in [([0, 0], true), ([4, 6], true), ([4, 6], false)] {
            for keys in [Keys::Packed, Keys::Dense, Keys::Paged { size: 3, shared: false, by_head: false }] {
                let call = Sequences {
                    behind,
                    bounded,
                    keys,
                    sinks: true,
                    bias: Some([true; 4]),
                    ..Sequences::plain(DType::F32, [4, 2, 8, 8], lengths.clone())
                };
                check(&call, &backends, "nothing");
            }
        }
    }
}
