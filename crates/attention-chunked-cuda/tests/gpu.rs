//! What needs a GPU: lengths, offsets, scales and seeds that differ from call to call of one plan, in host
//! and in device memory, in captured graphs, and out of their bounds; packed and paged sequences; and keys
//! and values of 8 bits. Run with `--ignored`.

mod eight_bit;
mod sequences;
mod support;

use std::sync::Arc;

use attention_chunked_cuda::{ChunkedCudaBackend, ChunkedCudaConfig};
use attention_core::{
    AttentionBackend, CallData, DType, Dropout, Feature, OffsetRange, Plan, QueryOffset, Window,
};
use attention_cuda::CudaDevice;
use support::{Integers, Place, Placed, Result, Sizes, Step, device, graph_of};

fn backend(device: &CudaDevice) -> ChunkedCudaBackend {
    ChunkedCudaBackend::on(device.clone(), ChunkedCudaConfig::default())
}

/// Where the numbers of a call may be.
const PLACES: [Place; 6] = [
    Place::Host,
    Place::Device(DType::I32, 1),
    Place::Device(DType::I64, 1),
    Place::Device(DType::I32, 3),
    Place::Device(DType::I64, -2),
    Place::Device(DType::I32, 0),
];

/// Where those may be that are not all alike.
const VARYING: &[Place] = PLACES.split_at(5).0;

const SMALL: Sizes = Sizes { batch: 5, queries: 70, keys: 200, heads: 4, key_heads: 2, width: 64 };

/// The lengths and offsets of the batch rows of [`SMALL`], with the option that decides what they mean.
fn numbers_of_rows() -> Vec<(&'static str, Integers)> {
    let (queries, keys) = (vec![70, 0, 33, 64, 1], vec![200, 57, 0, 199, 64]);
    let offsets = vec![0, -20, 130, -(1 << 22), 1 << 22];
    vec![
        ("query lengths", Integers { query_lengths: Some(queries.clone()), ..Integers::default() }),
        ("key/value lengths", Integers { key_value_lengths: Some(keys.clone()), ..Integers::default() }),
        (
            "both lengths, bottom-right",
            Integers {
                query_lengths: Some(queries.clone()),
                key_value_lengths: Some(keys.clone()),
                query_offset: QueryOffset::BottomRight,
                ..Integers::default()
            },
        ),
        (
            "key/value lengths and an offset",
            Integers {
                key_value_lengths: Some(keys.clone()),
                query_offset: QueryOffset::Fixed(100),
                ..Integers::default()
            },
        ),
        ("offsets", Integers { query_offsets: Some(offsets.clone()), ..Integers::default() }),
        (
            "both lengths and far offsets",
            Integers {
                query_lengths: Some(queries),
                key_value_lengths: Some(keys),
                query_offsets: Some(vec![i64::from(i32::MAX), 3, 60, i64::from(i32::MIN), -5]),
                ..Integers::default()
            },
        ),
    ]
}

/// Every batch row has the bits of a call of that row alone, whose numbers are the same for all of its rows.
#[test]
#[ignore = "needs a GPU"]
fn batch_rows_have_the_bits_of_calls_of_their_own() -> Result {
    let device = device()?;
    let backend = backend(&device);
    let windows = [Window::UNBOUNDED, Window::new(30, 20), Window { left: Some(64), right: None }];
    for dtype in [DType::Bf16, DType::F32, DType::F64] {
        for (causal, window) in windows.into_iter().flat_map(|window| [(false, window), (true, window)]) {
            for (what, integers) in numbers_of_rows() {
                let mut step = Step::new(&device, dtype, SMALL, 1)?;
                (step.causal, step.window) = (causal, window);
                let mut alone = Step::new(&device, dtype, Sizes { batch: 1, ..SMALL }, 1)?;
                (alone.causal, alone.window) = (causal, window);
                let mut rows = Vec::new();
                for batch in 0..SMALL.batch {
                    alone.take_row(&step, batch)?;
                    let data = Placed::new(&device, Place::Host, &integers.of_row(batch))?;
                    let plans = alone.plan(&backend, data.data()?)?;
                    alone.run(&plans, data.data()?)?;
                    rows.push(alone.results()?);
                }
                for &place in VARYING {
                    let data = Placed::new(&device, place, &integers)?;
                    let plans = step.plan(&backend, data.data()?)?;
                    step.run(&plans, data.data()?)?;
                    let results = step.results()?;
                    for (batch, row) in rows.iter().enumerate() {
                        for (index, (got, want)) in results.iter().zip(row).enumerate() {
                            let bytes = want.len();
                            assert!(
                                got[batch * bytes..][..bytes] == want[..],
                                "{dtype}, causal {causal}, {window}, {what} at {place:?}: result {index} of row \
                                 {batch}"
                            );
                        }
                    }
                }
            }
        }
    }
    Ok(())
}

/// A block that goes over all tiles of a call gives them the bits that blocks with one tile each do.
/// Sequences of none, one and several tiles of keys follow each other, with sixteen heads each: producers
/// that load the queries of a later tile must wait until consumers have read those of this one.
#[test]
#[ignore = "needs a GPU"]
fn one_block_has_the_bits_of_a_block_for_each_tile() -> Result {
    let device = device()?;
    let in_one = ChunkedCudaConfig::default().sm_margin(usize::MAX);
    let [many, one] =
        [ChunkedCudaConfig::default(), in_one].map(|config| ChunkedCudaBackend::on(device.clone(), config));
    let lengths = vec![300, 64, 128, 0, 129, 1, 257, 100];
    for (dtype, width) in [(DType::Bf16, 64), (DType::Bf16, 128), (DType::F16, 256)] {
        // As many tiles as a device with 132 multiprocessors has at least.
        let sizes = Sizes { batch: 8, queries: 70, keys: 300, heads: 16, key_heads: 16, width };
        for (causal, window) in
            [(false, Window::UNBOUNDED), (true, Window::UNBOUNDED), (false, Window::new(9, 5))]
        {
            let mut step = Step::new(&device, dtype, sizes, 7)?;
            (step.causal, step.window) = (causal, window);
            let integers = Integers { key_value_lengths: Some(lengths.clone()), ..Integers::default() };
            let data = Placed::new(&device, Place::Device(DType::I32, 1), &integers)?;
            let mut results = Vec::new();
            for backend in [&many, &one, &one] {
                let plans = step.plan(backend, data.data()?)?;
                step.poison()?;
                step.run(&plans, data.data()?)?;
                results.push(step.results()?);
            }
            assert!(!step.holds_nan(&results[0]), "{dtype}, {width}, causal {causal}, {window}: not written");
            assert!(results[1] == results[0], "{dtype}, {width}, causal {causal}, {window}: other bits");
            assert!(
                results[2] == results[0],
                "{dtype}, {width}, causal {causal}, {window}: other bits again"
            );
        }
    }
    Ok(())
}

/// Where splits of a batch-invariant call have blocks of their own, of a row alone, and where one block goes
/// over all of them, of the batch: the bits of a row are the same, also where it is computed again because of
/// NaN that it must not see.
#[test]
#[ignore = "needs a GPU"]
fn splits_of_batch_invariant_calls_have_the_same_bits_either_way() -> Result {
    let device = device()?;
    let plain = ChunkedCudaConfig::default();
    let lengths = vec![4500, 2048, 2049, 100, 4097, 0, 3000, 4096];
    let sizes = Sizes { batch: 8, queries: 150, keys: 4500, heads: 32, key_heads: 8, width: 64 };
    let windows = [Window::UNBOUNDED, Window { left: Some(2500), right: None }];
    for (config, dtype, width) in [
        (plain.clone(), DType::Bf16, 128),
        (plain.clone(), DType::F16, 64),
        (plain.clone(), DType::F32, 64),
        (plain.clone(), DType::F32, 32),
        (plain.clone(), DType::F64, 32),
        (plain.warpgroups(false), DType::Bf16, 64),
    ] {
        let backend = ChunkedCudaBackend::on(device.clone(), config);
        let mut step = Step::new(&device, dtype, Sizes { width, ..sizes }, 11)?;
        let mut alone = Step::new(&device, dtype, Sizes { width, ..sizes }.alone(), 11)?;
        for (window, nan_keys) in windows.into_iter().flat_map(|window| [(window, 0), (window, 5)]) {
            for step in [&mut step, &mut alone] {
                (step.causal, step.window, step.batch_invariant) = (true, window, true);
            }
            // The rows at the end see NaN, the others not.
            let finite: Vec<i64> = lengths.iter().map(|length| (length - nan_keys).max(0)).collect();
            let integers = Integers {
                key_value_lengths: Some(lengths.clone()),
                query_offset: QueryOffset::BottomRight,
                ..Integers::default()
            };
            let data = Placed::new(&device, Place::Host, &integers)?;
            let plans = step.plan(&backend, data.data()?)?;
            step.poison_keys_behind(&finite)?;
            step.poison()?;
            step.run(&plans, data.data()?)?;
            let results = step.results()?;
            for batch in 0..sizes.batch {
                alone.take_row(&step, batch)?;
                alone.poison_keys_behind(&finite[batch..][..1])?;
                let data = Placed::new(&device, Place::Host, &integers.of_row(batch))?;
                let plans = alone.plan(&backend, data.data()?)?;
                alone.run(&plans, data.data()?)?;
                for (index, (got, want)) in results.iter().zip(alone.results()?).enumerate() {
                    let bytes = want.len();
                    assert!(
                        got[batch * bytes..][..bytes] == want[..],
                        "{dtype}, {width}, {window}, {nan_keys} keys of NaN: result {index} of row {batch}"
                    );
                }
            }
        }
    }
    Ok(())
}

/// A decoder: one plan, made before the first token, serves a cache that fills up. Keys behind the length are
/// NaN.
#[test]
#[ignore = "needs a GPU"]
fn one_plan_serves_a_growing_cache() -> Result {
    let device = device()?;
    let backend = backend(&device);
    let sizes = Sizes { batch: 3, queries: 1, keys: 4096, heads: 8, key_heads: 2, width: 128 };
    for dtype in [DType::Bf16, DType::F32] {
        let mut step = Step::new(&device, dtype, sizes, 7)?;
        step.causal = true;
        let lengths_at = |round: i64| vec![1 + 100 * round, 300 * round, 4096 - round];
        let cache = |lengths: Vec<i64>| Integers {
            key_value_lengths: Some(lengths),
            query_offset: QueryOffset::BottomRight,
            ..Integers::default()
        };
        let mut placed = Vec::new();
        for place in VARYING {
            let data = Placed::new(&device, *place, &cache(lengths_at(0)))?;
            let plans = step.plan(&backend, data.data()?)?;
            placed.push((place, data, plans));
        }
        let mut before: Option<Vec<Vec<u8>>> = None;
        for round in 0..14 {
            step.poison_keys_behind(&lengths_at(round))?;
            let mut want: Option<Vec<Vec<u8>>> = None;
            for (place, data, plans) in &mut placed {
                data.replace(&cache(lengths_at(round)))?;
                step.run(plans, data.data()?)?;
                let results = step.results()?;
                let want = want.get_or_insert_with(|| results.clone());
                assert!(results == *want, "{dtype}, round {round}, {place:?}");
            }
            // A plan of the round's own.
            let data = Placed::new(&device, Place::Host, &cache(lengths_at(round)))?;
            let plans = step.plan(&backend, data.data()?)?;
            step.run(&plans, data.data()?)?;
            let results = step.results()?;
            assert!(Some(&results) == want.as_ref(), "{dtype}, round {round}, a plan of its own");
            assert!(!step.holds_nan(&results), "{dtype}, round {round}: NaN of keys behind the lengths");
            assert!(before.replace(results.clone()) != Some(results), "the cache grew");
            step.restore()?;
        }
    }
    Ok(())
}

/// The numbers of a call with all of them.
fn all_numbers(round: i64) -> Integers {
    Integers {
        query_lengths: Some(vec![70 - 3 * round, 10 * round, 33, 64, 1]),
        key_value_lengths: Some(vec![200, 57 + round, 30 * round, 199, 64]),
        query_offsets: Some(vec![round, -20, 130 - 10 * round, 3, 7 * round]),
        dropout: Some((0.25, 1000 * round - 5, 17 + round)),
        ..Integers::default()
    }
}

/// A graph computes with the numbers that are in device memory when it is launched.
#[test]
#[ignore = "needs a GPU"]
fn a_graph_reads_numbers_in_device_memory_when_it_is_launched() -> Result {
    let device = device()?;
    let backend = backend(&device);
    for dtype in [DType::Bf16, DType::F32] {
        for place in [Place::Device(DType::I32, 1), Place::Device(DType::I64, 2)] {
            let mut step = Step::new(&device, dtype, SMALL, 3)?;
            step.causal = true;
            let mut data = Placed::new(&device, place, &all_numbers(0))?;
            let plans = step.plan(&backend, data.data()?)?;
            // In host memory, with plans of another problem. After them, scratch stays where it is.
            let host = Placed::new(&device, Place::Host, &all_numbers(0))?;
            let host_plans = step.plan(&backend, host.data()?)?;
            step.run(&plans, data.data()?)?;
            let graph = graph_of(&device, || step.run(&plans, data.data()?))?;
            let mut seen = Vec::new();
            for round in [0, 1, 5, 2] {
                data.replace(&all_numbers(round))?;
                step.poison()?;
                graph.launch()?;
                let replayed = step.results()?;
                step.poison()?;
                step.run(&plans, data.data()?)?;
                assert!(step.results()? == replayed, "{dtype}, {place:?}, round {round}: a call");
                let host = Placed::new(&device, Place::Host, &all_numbers(round))?;
                step.poison()?;
                step.run(&host_plans, host.data()?)?;
                assert!(
                    step.results()? == replayed,
                    "{dtype}, {place:?}, round {round}: numbers on the host"
                );
                assert!(!seen.contains(&replayed), "{dtype}, {place:?}, round {round}: other numbers");
                seen.push(replayed);
            }
        }
    }
    Ok(())
}

/// A graph that was captured with numbers in host memory computes with those, whatever comes to be in that
/// memory.
#[test]
#[ignore = "needs a GPU"]
fn a_graph_keeps_the_numbers_in_host_memory_that_it_was_captured_with() -> Result {
    let device = device()?;
    let backend = backend(&device);
    let many = Sizes { batch: 100, queries: 17, keys: 40, heads: 2, key_heads: 1, width: 64 };
    for (sizes, numbers) in [(SMALL, all_numbers as fn(i64) -> Integers), (many, many_numbers)] {
        let mut step = Step::new(&device, DType::Bf16, sizes, 3)?;
        let mut data = Placed::new(&device, Place::Host, &numbers(1))?;
        let plans = step.plan(&backend, data.data()?)?;
        step.run(&plans, data.data()?)?;
        let first = step.results()?;
        let graph = graph_of(&device, || step.run(&plans, data.data()?))?;
        data.replace(&numbers(4))?;
        step.poison()?;
        step.run(&plans, data.data()?)?;
        let other = step.results()?;
        assert!(other != first, "other numbers");
        drop(data);
        for _ in 0..2 {
            step.poison()?;
            graph.launch()?;
            assert!(step.results()? == first, "a replay");
        }
    }
    Ok(())
}

/// Lengths and offsets of a hundred batch rows, most of which differ.
fn many_numbers(round: i64) -> Integers {
    Integers {
        query_lengths: Some((0..100).map(|batch| (batch * 7 + round) % 18).collect()),
        key_value_lengths: Some((0..100).map(|batch| (batch * 11 + 3 * round) % 41).collect()),
        query_offsets: Some((0..100).map(|batch| (batch * 5 + round) % 60 - 20).collect()),
        ..Integers::default()
    }
}

/// More batch rows than the parameters of kernels have room for.
#[test]
#[ignore = "needs a GPU"]
fn numbers_of_a_hundred_batch_rows_are_the_same_wherever_they_are() -> Result {
    let device = device()?;
    let backend = backend(&device);
    let sizes = Sizes { batch: 100, queries: 17, keys: 40, heads: 2, key_heads: 1, width: 64 };
    let only = |mut numbers: Integers, which: usize| {
        if which & 1 == 0 {
            numbers.query_lengths = None;
        }
        if which & 2 == 0 {
            numbers.key_value_lengths = None;
        }
        if which & 4 == 0 {
            numbers.query_offsets = None;
        }
        numbers
    };
    for which in 1..8 {
        let mut step = Step::new(&device, DType::Bf16, sizes, 3)?;
        step.causal = true;
        let mut want: Option<Vec<Vec<u8>>> = None;
        for place in VARYING {
            let data = Placed::new(&device, *place, &only(many_numbers(2), which))?;
            let plans = step.plan(&backend, data.data()?)?;
            if *place == Place::Host {
                assert!(plans[0].scratch_bytes() >= 100 * 8, "{which}: scratch for numbers");
            }
            step.poison()?;
            step.run(&plans, data.data()?)?;
            let results = step.results()?;
            let want = want.get_or_insert_with(|| results.clone());
            assert!(results == *want, "{which} at {place:?}");
        }
        // Each row once more, by a call of its own.
        let (want, mut alone) = (want.ok_or("no place")?, Step::new(&device, DType::Bf16, sizes.alone(), 3)?);
        alone.causal = true;
        for batch in [0, 63, 64, 99] {
            alone.take_row(&step, batch)?;
            let data = Placed::new(&device, Place::Host, &only(many_numbers(2), which).of_row(batch))?;
            let plans = alone.plan(&backend, data.data()?)?;
            alone.run(&plans, data.data()?)?;
            for (index, (got, row)) in want.iter().zip(alone.results()?).enumerate() {
                let got = &got[batch * row.len()..][..row.len()];
                assert!(got == row, "{which}: result {index} of row {batch}");
            }
        }
    }
    Ok(())
}

/// Numbers in device memory that are out of their bounds count as the nearest in bounds, and nothing outside
/// the tensors is touched: guards around each are checked with the results, and are NaN, which reading them
/// would show.
#[test]
#[ignore = "needs a GPU"]
fn numbers_out_of_their_bounds_are_brought_into_them() -> Result {
    let device = device()?;
    let backend = backend(&device);
    let clamped = |numbers: &[i64], low: i64, high: i64| -> Vec<i64> {
        numbers.iter().map(|number| *number.clamp(&low, &high)).collect()
    };
    for (dtype, queries, keys, offsets) in [
        (
            DType::I32,
            [-1, 71, i64::from(i32::MIN), 5, i64::from(i32::MAX)],
            [201, 57, -7, 1 << 30, 3],
            [1 << 30; 5],
        ),
        (
            DType::I64,
            [i64::MIN, 1 << 62, 9, -1, 1 << 32],
            [i64::MAX, 1 << 40, 60, -(1 << 33), 5],
            [i64::MIN; 5],
        ),
        (
            DType::U32,
            [70, 71, u32::MAX.into(), 5, 1 << 31],
            [1 << 31, 57, u32::MAX.into(), 0, 200],
            [u32::MAX.into(); 5],
        ),
    ] {
        for (range, window) in [
            (OffsetRange::Near, Window::new(1 << 22, 1 << 22)),
            (OffsetRange::Any, Window { left: Some(usize::MAX), right: Some(9) }),
        ] {
            let mut step = Step::new(&device, DType::Bf16, SMALL, 5)?;
            (step.window, step.offset_range) = (window, Some(range));
            let most = range.most().unwrap_or(i64::MAX);
            let wild = Integers {
                query_lengths: Some(queries.to_vec()),
                key_value_lengths: Some(keys.to_vec()),
                query_offsets: Some(offsets.to_vec()),
                ..Integers::default()
            };
            let tame = Integers {
                query_lengths: Some(clamped(&queries, 0, 70)),
                key_value_lengths: Some(clamped(&keys, 0, 200)),
                query_offsets: Some(clamped(&offsets, -most, most)),
                ..Integers::default()
            };
            let data = Placed::new(&device, Place::Device(dtype, 1), &wild)?;
            let plans = step.plan(&backend, data.data()?)?;
            step.run(&plans, data.data()?)?;
            let results = step.results()?;
            let data = Placed::new(&device, Place::Host, &tame)?;
            let plans = step.plan(&backend, data.data()?)?;
            step.poison()?;
            step.run(&plans, data.data()?)?;
            assert!(step.results()? == results, "{dtype}, {range:?}");
            assert!(!step.holds_nan(&results), "{dtype}, {range:?}: NaN from outside the tensors");
        }
    }
    Ok(())
}

/// One plan, and another scale, softcap and seed with each call: the bits are those of a plan of the call's
/// own.
#[test]
#[ignore = "needs a GPU"]
fn one_plan_serves_other_scales_softcaps_and_seeds() -> Result {
    let device = device()?;
    let backend = backend(&device);
    let plain = |scale: f64, seed: u64| CallData {
        scale: Some(scale),
        dropout: Some(Dropout::new(0.3, seed)),
        query_offset: QueryOffset::Fixed(seed as i64 % 50),
        ..CallData::default()
    };
    let capped = |scale: f64, seed: u64| CallData { softcap: Some(3.0 * scale), ..plain(scale, seed) };
    for dtype in [DType::F16, DType::F32] {
        for data in [&plain as &dyn Fn(f64, u64) -> CallData<'static>, &capped] {
            let mut step = Step::new(&device, dtype, SMALL, 11)?;
            step.causal = true;
            let held = step.plan(&backend, data(0.125, 51))?;
            for (scale, seed) in [(0.125, 51), (2.0, 1), (1e-3, u64::MAX), (0.5, 1 << 40)] {
                step.poison()?;
                step.run(&held, data(scale, seed))?;
                let results = step.results()?;
                let own: [Arc<dyn Plan>; 2] = step.plan(&backend, data(scale, seed))?;
                step.poison()?;
                step.run(&own, data(scale, seed))?;
                assert!(step.results()? == results, "{dtype}, {scale}, {seed}");
            }
        }
    }
    Ok(())
}

/// Seeds and offsets of a dropout in device memory draw the bits of the same numbers by value.
#[test]
#[ignore = "needs a GPU"]
fn seeds_in_device_memory_draw_the_same_bits() -> Result {
    let device = device()?;
    let backend = backend(&device);
    for dtype in [DType::Bf16, DType::F32, DType::F64] {
        let mut step = Step::new(&device, dtype, SMALL, 13)?;
        for (seed, offset) in [(0, 0), (-1, 5), (i64::from(i32::MIN), i64::from(i32::MAX))] {
            let integers = Integers { dropout: Some((0.4, seed, offset)), ..Integers::default() };
            let by_value = CallData {
                dropout: Some(Dropout::new(0.4, seed.cast_unsigned()).with_offset(offset as u32)),
                ..CallData::default()
            };
            let plans = step.plan(&backend, by_value)?;
            step.poison()?;
            step.run(&plans, by_value)?;
            let want = step.results()?;
            for place in PLACES {
                let data = Placed::new(&device, place, &integers)?;
                let plans = step.plan(&backend, data.data()?)?;
                let on_device = plans[0].problem().features().contains(Feature::DeviceData);
                assert_eq!(on_device, place != Place::Host);
                step.poison()?;
                step.run(&plans, data.data()?)?;
                assert!(step.results()? == want, "{dtype}, seed {seed}, offset {offset} at {place:?}");
            }
        }
    }
    Ok(())
}

/// Numbers that belong to another stream are refused, as other tensors are.
#[test]
#[ignore = "needs a GPU"]
fn numbers_of_another_stream_are_refused() -> Result {
    let (here, elsewhere) = (device()?, device()?);
    let backend = backend(&here);
    let mut step = Step::new(&here, DType::Bf16, SMALL, 1)?;
    let integers = Integers { key_value_lengths: Some(vec![1, 2, 3, 4, 5]), ..Integers::default() };
    let data = Placed::new(&elsewhere, Place::Device(DType::I32, 1), &integers)?;
    let plans = step.plan(&backend as &dyn AttentionBackend, data.data()?)?;
    let error = step.run(&plans, data.data()?).err().ok_or("it ran")?.to_string();
    assert!(error.contains("key/value lengths on") && error.contains("another stream"), "{error}");
    Ok(())
}
