//! Packed and paged sequences: against dense calls of each sequence alone, with their numbers in host and in
//! device memory, in captured graphs, and out of their bounds.

mod calls;

use attention_chunked_cuda::{ChunkedCudaBackend, ChunkedCudaConfig};
use attention_core::DType;

use crate::support::{Integers, Place, Placed, Result, device, graph_of, noise};
use calls::{Keys, Lengths, Sequences, floats, most_pages};

const PLACES: [Place; 4] =
    [Place::Host, Place::Device(DType::I32, 1), Place::Device(DType::I64, 2), Place::Device(DType::I32, -1)];

/// Dtypes and lengths, few, since kernels are compiled for each of them: the suite has all others.
fn kinds(wide: usize) -> [(ChunkedCudaConfig, DType, Lengths, bool); 5] {
    let plain = ChunkedCudaConfig::default();
    [
        (plain.clone(), DType::Bf16, Lengths::mixed(128), true),
        (plain.clone(), DType::Bf16, Lengths::decoding(wide), true),
        (plain.clone(), DType::F32, Lengths::mixed(64), false),
        (plain.clone(), DType::F64, Lengths::decoding(32), true),
        (plain.warpgroups(false), DType::F16, Lengths::mixed(64), true),
    ]
}

#[test]
#[ignore = "needs a GPU"]
fn packed_sequences_are_what_they_are_alone() -> Result {
    let device = device()?;
    for (config, dtype, lengths, causal) in kinds(64) {
        let backend = ChunkedCudaBackend::on(device.clone(), config);
        let mut calls = Sequences::new(&device, dtype, &lengths, Keys::Packed)?;
        calls.causal = causal;
        let mut first: Option<Vec<Vec<u8>>> = None;
        for place in PLACES {
            let what = format!("{dtype}, {lengths:?} at {place:?}");
            let data = Placed::new(&device, place, &calls.integers())?;
            let plans = calls.plan(&backend, data.data()?)?;
            calls.poison()?;
            calls.run(&plans, data.data()?)?;
            let results = calls.results()?;
            match &first {
                Some(first) => assert!(results == *first, "{what}: other bits"),
                None => calls.check(&backend, &results, &what)?,
            }
            first.get_or_insert(results);
        }
    }
    Ok(())
}

#[test]
#[ignore = "needs a GPU"]
fn keys_in_pages_are_those_of_dense_calls() -> Result {
    let device = device()?;
    for (config, dtype, lengths, causal) in kinds(96) {
        let backend = ChunkedCudaBackend::on(device.clone(), config);
        let mut first: Option<Vec<Vec<u8>>> = None;
        // Bits do not depend on the size of a page.
        for (size, place) in [1, 16, 7, 256].into_iter().zip(PLACES) {
            let what = format!("{dtype}, {lengths:?} in pages of {size} at {place:?}");
            let mut calls = Sequences::new(&device, dtype, &lengths, Keys::Paged(size))?;
            calls.causal = causal;
            let data = Placed::new(&device, place, &calls.integers())?;
            let plans = calls.plan(&backend, data.data()?)?;
            calls.poison()?;
            calls.run(&plans, data.data()?)?;
            let results = calls.results()?;
            match &first {
                Some(first) => assert!(results == *first, "{what}: other bits"),
                None => calls.check(&backend, &results, &what)?,
            }
            first.get_or_insert(results);
        }
    }
    Ok(())
}

/// The numbers of a call whose sequences are others than those of the call's lengths, by one row or key each.
fn others(integers: &Integers, round: i64) -> Integers {
    let shifted = |starts: &Option<Vec<i64>>| {
        starts.as_ref().map(|starts| {
            let last = starts.len() - 1;
            let shift = |(index, &start): (usize, &i64)| {
                if index == 0 || index == last { start } else { (start - round).max(0) }
            };
            starts.iter().enumerate().map(shift).collect()
        })
    };
    Integers {
        query_starts: shifted(&integers.query_starts),
        key_value_starts: shifted(&integers.key_value_starts),
        key_value_lengths: integers
            .key_value_lengths
            .as_ref()
            .map(|lengths| lengths.iter().map(|&length| (length - round).max(0)).collect()),
        block_table: integers.block_table.as_ref().map(|table| {
            let mut table = table.clone();
            table.rotate_left(usize::try_from(round).expect("small"));
            table
        }),
        ..integers.clone()
    }
}

/// A graph computes with the starts, lengths and tables that are in device memory when it is launched.
#[test]
#[ignore = "needs a GPU"]
fn a_graph_reads_starts_and_tables_when_it_is_launched() -> Result {
    let device = device()?;
    let backend = ChunkedCudaBackend::on(device.clone(), ChunkedCudaConfig::default());
    // With a longest sequence of others' too.
    let lengths =
        Lengths { queries: vec![30, 1, 0, 64, 9], keys: vec![500, 90, 40, 64, 9], ..Lengths::mixed(64) };
    for (dtype, keys) in
        [(DType::Bf16, Keys::Packed), (DType::F32, Keys::Packed), (DType::Bf16, Keys::Paged(16))]
    {
        let mut calls = Sequences::new(&device, dtype, &lengths, keys)?;
        calls.causal = true;
        // Slots that other tables and lengths reach are numbers too.
        let filled = |index: usize, seed: u64, calls: &Sequences| {
            let bytes = calls.inputs[index].contents()?.len();
            Ok::<_, Box<dyn std::error::Error + Send + Sync>>(noise(dtype, seed, bytes / dtype.size()))
        };
        for index in 0..4 {
            let bytes = filled(index, 20 + index as u64, &calls)?;
            calls.inputs[index].put(&bytes)?;
        }
        let integers = calls.integers();
        let mut data = Placed::new(&device, Place::Device(DType::I32, 1), &integers)?;
        let plans = calls.plan(&backend, data.data()?)?;
        calls.run(&plans, data.data()?)?;
        let graph = graph_of(&device, || calls.run(&plans, data.data()?))?;
        let mut seen: Vec<Vec<Vec<u8>>> = Vec::new();
        for round in [0, 1, 4, 2] {
            data.replace(&others(&integers, round))?;
            calls.poison()?;
            graph.launch()?;
            let replayed = calls.results()?;
            calls.poison()?;
            calls.run(&plans, data.data()?)?;
            assert!(calls.results()? == replayed, "{dtype}, {keys:?}, round {round}: a call");
            assert!(!seen.contains(&replayed), "{dtype}, {keys:?}, round {round}: other numbers");
            let is_nan = |(index, bytes): (usize, &Vec<u8>)| {
                floats(calls.dtype_of(index), bytes).iter().any(|x| x.is_nan())
            };
            assert!(!replayed.iter().enumerate().any(is_nan), "{dtype}, {keys:?}, round {round}: NaN");
            seen.push(replayed);
        }
    }
    Ok(())
}

/// Starts, lengths and entries in device memory that are out of their bounds count as the nearest in bounds.
/// Starts that fall give wrong rows. Nothing outside the tensors is touched, which the guards around each
/// show, and compute-sanitizer.
#[test]
#[ignore = "needs a GPU"]
fn starts_and_tables_out_of_their_bounds_are_brought_into_them() -> Result {
    let device = device()?;
    let backend = ChunkedCudaBackend::on(device.clone(), ChunkedCudaConfig::default());
    let lengths = Lengths { spare: 0, ..Lengths::mixed(64) };
    for (dtype, keys) in
        [(DType::Bf16, Keys::Packed), (DType::F32, Keys::Packed), (DType::F16, Keys::Paged(3))]
    {
        let mut calls = Sequences::new(&device, dtype, &lengths, keys)?;
        for index in 0..4 {
            let bytes = calls.inputs[index].contents()?.len();
            calls.inputs[index].put(&noise(dtype, 30 + index as u64, bytes / dtype.size()))?;
        }
        let tame = calls.integers();
        let most_pages = most_pages(&lengths, 3);
        let (rows, keys_in_all): (usize, usize) = (lengths.queries.iter().sum(), lengths.keys.iter().sum());
        let pages = i64::try_from(lengths.queries.len() * most_pages + 1)?;
        // There are no rows behind the last sequence, so its end counts as theirs wherever it is behind.
        let mut wild = tame.clone();
        let mut near = tame.clone();
        let end = |starts: &mut Option<Vec<i64>>, last: i64| {
            if let Some(end) = starts.as_mut().and_then(|starts| starts.last_mut()) {
                *end = last;
            }
        };
        end(&mut wild.query_starts, i64::MAX);
        end(&mut near.query_starts, i64::try_from(rows)?);
        end(&mut wild.key_value_starts, 1 << 40);
        end(&mut near.key_value_starts, i64::try_from(keys_in_all)?);
        if let (Some(wild), Some(near)) = (&mut wild.key_value_lengths, &mut near.key_value_lengths) {
            (wild[1], near[1]) = (i64::MAX, 1000);
            (wild[2], near[2]) = (-7, 0);
        }
        if let (Some(wild), Some(near)) = (&mut wild.block_table, &mut near.block_table) {
            for (index, entry) in [(0, i64::MIN), (most_pages, i64::MAX), (most_pages + 3, -1)] {
                wild[index] = entry;
                near[index] = entry.clamp(0, pages - 1);
            }
        }
        let mut run = |integers: &Integers, place: Place| -> Result<Vec<Vec<u8>>> {
            let data = Placed::new(&device, place, integers)?;
            let plans = calls.plan(&backend, data.data()?)?;
            calls.poison()?;
            calls.run(&plans, data.data()?)?;
            calls.results()
        };
        let results = run(&wild, Place::Device(DType::I64, 1))?;
        assert!(run(&near, Place::Device(DType::I64, 1))? == results, "{dtype}, {keys:?}");
        assert!(run(&near, Place::Host)? == results, "{dtype}, {keys:?}: in host memory");
        // Only the guards are looked at.
        for first in [i64::MIN, -1, 60, i64::MAX] {
            let falling = |starts: &Option<Vec<i64>>| {
                starts.as_ref().map(|starts| {
                    starts
                        .iter()
                        .enumerate()
                        .map(|(index, &start)| if index % 2 == 0 { first } else { start })
                        .collect()
                })
            };
            let falling = Integers {
                query_starts: falling(&tame.query_starts),
                key_value_starts: falling(&tame.key_value_starts),
                ..wild.clone()
            };
            run(&falling, Place::Device(DType::I64, 1))?;
        }
    }
    Ok(())
}
