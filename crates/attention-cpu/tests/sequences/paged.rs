//! Keys and values in pages against the same ones gathered.

use attention_core::{CallData, Element, Scalar, View};
use attention_cpu::CpuBackend;

use super::case::{Case, Random};
use super::dense::alone;
use super::store::{LAYOUTS, Store, bits, forward};

/// How queries lie beside pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Queries {
    Packed,
    Dense,
}

/// Runs a case with its keys in pages on each backend, and compares the bits with those of each sequence
/// alone.
pub(crate) fn check<T: Scalar + Element + PartialEq, L: Scalar + Element>(
    backends: &[CpuBackend],
    case: &mut Case<T, L>,
    queries_are: Queries,
    page_size: usize,
    random: &mut Random,
    what: &str,
) {
    let ([n, k, h, hv], batch) = (case.heads, case.lengths.len());
    let layout = random.one_of(&LAYOUTS);
    // Sometimes the first pages of all sequences are the same ones.
    if random.once_in(2) {
        let shared = case.lengths.iter().map(|rows| rows.used).min().unwrap_or(0) / page_size * page_size;
        let (of_keys, of_values) = (shared * k * h, shared * k * hv);
        let (first, others) = case.operands.split_at_mut(1);
        for other in others {
            other.key[..of_keys].copy_from_slice(&first[0].key[..of_keys]);
            other.value[..of_values].copy_from_slice(&first[0].value[..of_values]);
        }
    }
    let needed = |batch: usize| case.lengths[batch].used.div_ceil(page_size);
    // As many columns as masks over the longest sequence ask for, and entries that no key needs.
    let longest = case.lengths.iter().map(|rows| rows.keys).max().unwrap_or(0);
    let columns = longest.div_ceil(page_size) + random.below(2);
    let pages = (0..batch).map(needed).sum::<usize>() + 2;
    let mut free: Vec<usize> = (0..pages).collect();
    for index in (1..pages).rev() {
        free.swap(index, random.below(index + 1));
    }
    let mut key = Store::<T>::new([pages, page_size, k, h], layout);
    let mut value = Store::<T>::new([pages, page_size, k, hv], layout);
    let mut table = vec![-1i64; batch * columns];
    // Of a page that holds the same as one of another sequence, there is one.
    let mut taken: Vec<(usize, usize, usize)> = Vec::new();
    for (batch, operands) in case.operands.iter().enumerate() {
        for index in 0..needed(batch) {
            let rows = index * page_size..case.lengths[batch].used.min((index + 1) * page_size);
            let keys = &operands.key[rows.start * k * h..rows.end * k * h];
            let values = &operands.value[rows.start * k * hv..rows.end * k * hv];
            let same = |&&(other, at, _): &&(usize, usize, usize)| {
                let [of_keys, of_values] = [&case.operands[other].key, &case.operands[other].value];
                rows.len() == page_size
                    && of_keys.get(at * page_size * k * h..).is_some_and(|rest| rest.starts_with(keys))
                    && of_values.get(at * page_size * k * hv..).is_some_and(|rest| rest.starts_with(values))
            };
            let page = match taken.iter().find(same) {
                Some(&(_, _, page)) => page,
                None => {
                    let page = free.pop().unwrap();
                    key.write_part(page, keys);
                    value.write_part(page, values);
                    taken.push((batch, index, page));
                    page
                }
            };
            table[batch * columns + index] = page as i64;
        }
    }

    let used: Vec<i32> = case.lengths.iter().map(|rows| rows.used as i32).collect();
    let most = case.lengths.iter().map(|rows| rows.queries).max().unwrap_or(0);
    let (mut starts, mut query_lengths) = (vec![0u32], Vec::new());
    for rows in &case.lengths {
        query_lengths.push(rows.queries as i32);
        starts.push(starts.last().unwrap() + rows.queries as u32);
    }
    let total = *starts.last().unwrap() as usize;
    let mut data = CallData {
        block_table: Some(View::from_slice(&table, [batch, columns]).unwrap()),
        key_value_lengths: Some(View::from_slice(&used, [batch]).unwrap()),
        ..CallData::default()
    };
    let query = if queries_are == Queries::Packed {
        data.query_starts = Some(View::from_slice(&starts, [batch + 1]).unwrap());
        let mut query = Store::<T>::new([total + 2, n, h], case.layout);
        for (operands, &start) in case.operands.iter().zip(&starts) {
            query.write(start as usize, &operands.query);
        }
        query
    } else {
        data.query_lengths = Some(View::from_slice(&query_lengths, [batch]).unwrap());
        let mut query = Store::<T>::new([batch, most, n, h], case.layout);
        for (batch, operands) in case.operands.iter().enumerate() {
            query.write_part(batch, &operands.query);
        }
        query
    };
    let inputs = case.inputs([&query, &key, &value].map(Store::view), data, 0..batch, None);
    let problem = case.builder(&inputs).longest(None, longest).build().unwrap();
    let wanted: Vec<_> = (0..batch).map(|batch| alone(&backends[0], case, batch)).collect();
    for backend in backends {
        let (out, lse) = forward::<T, L>(backend, inputs, &problem, case.layout);
        for (batch, wanted) in wanted.iter().enumerate() {
            let rows = case.lengths[batch].queries;
            let (from, count) = match queries_are {
                Queries::Packed => (starts[batch] as usize, rows),
                Queries::Dense => (batch, 1),
            };
            let (found, found_lse) = (out.read(from, count), lse.read(from, count));
            let (real, padded) = found.split_at(rows * n * hv);
            assert_eq!(bits(real), bits(&wanted.out.read(0, 1)), "{what}, sequence {batch}: out");
            assert!(padded.iter().all(|number| number.to_f64() == 0.0), "{what}: padding");
            let (real, padded) = found_lse.split_at(rows * n);
            assert_eq!(bits(real), bits(&wanted.lse.read(0, 1)), "{what}, sequence {batch}: lse");
            assert!(padded.iter().all(|number| number.to_f64() == f64::NEG_INFINITY), "{what}: padding");
        }
        if queries_are == Queries::Packed {
            assert!(bits(&out.read(total, 2)).iter().all(|&bits| bits == 0), "{what}: tail");
        }
    }
}
