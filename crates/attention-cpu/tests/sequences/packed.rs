//! Packed sequences against each of them alone.

use attention_core::{CallData, Element, Scalar, View};
use attention_cpu::CpuBackend;

use super::case::{Case, Lengths};
use super::dense::alone;
use super::store::{Layout, Results, Store, bits, both};

/// How keys lie beside packed queries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Keys {
    Packed,
    Dense,
}

/// Packed rows: where each sequence starts, and what belongs to none.
struct Packing {
    starts: Vec<i32>,
    total: usize,
}

impl Packing {
    fn new(rows: impl Iterator<Item = usize>, tail: usize) -> Self {
        let mut starts = vec![0];
        for rows in rows {
            starts.push(starts.last().unwrap() + rows as i32);
        }
        let total = *starts.last().unwrap() as usize + tail;
        Self { starts, total }
    }

    fn start(&self, batch: usize) -> usize {
        self.starts[batch] as usize
    }

    /// `[total, ..]` with these rows of each sequence, and NaN in all others.
    fn pack<'a, T: Scalar + Element>(
        &self,
        axes: &[usize],
        layout: Layout,
        sequences: impl Iterator<Item = &'a Vec<T>>,
    ) -> Store<T> {
        let shape = attention_core::Dims::from_slice(&[&[self.total], axes].concat()).unwrap();
        let mut store = Store::new(shape, layout);
        for (batch, elements) in sequences.enumerate() {
            store.write(self.start(batch), elements);
        }
        store
    }

    fn tail(&self) -> std::ops::Range<usize> {
        *self.starts.last().unwrap() as usize..self.total
    }
}

/// Runs a case packed on each backend, and compares the bits with those of each sequence alone.
pub(crate) fn check<T: Scalar + Element, L: Scalar + Element>(
    backends: &[CpuBackend],
    case: &Case<T, L>,
    keys_are: Keys,
    [tail_of_queries, tail_of_keys]: [usize; 2],
    what: &str,
) {
    let ([n, k, h, hv], batch, layout) = (case.heads, case.lengths.len(), case.layout);
    let queries = Packing::new(case.lengths.iter().map(|rows| rows.queries), tail_of_queries);
    let longest = case.lengths.iter().map(|rows| rows.keys).max().unwrap_or(0);
    // Dense keys are packed ones of which all sequences have the same number.
    let room = |rows: &Lengths| if keys_are == Keys::Dense { longest } else { rows.keys };
    let tail_of_keys = if keys_are == Keys::Dense { 0 } else { tail_of_keys };
    let keys = Packing::new(case.lengths.iter().map(room), tail_of_keys);
    let operands = || case.operands.iter();
    let query = queries.pack(&[n, h], layout, operands().map(|of| &of.query));
    let key = keys.pack(&[k, h], layout, operands().map(|of| &of.key));
    let value = keys.pack(&[k, hv], layout, operands().map(|of| &of.value));
    let d_out = queries.pack(&[n, hv], layout, operands().map(|of| &of.d_out));
    let d_lse = queries.pack(&[n], layout, operands().map(|of| &of.d_lse));

    let used: Vec<u32> = case.lengths.iter().map(|rows| rows.used as u32).collect();
    let mut data = CallData {
        query_starts: Some(View::from_slice(&queries.starts, [batch + 1]).unwrap()),
        ..CallData::default()
    };
    if keys_are == Keys::Packed {
        data.key_value_starts = Some(View::from_slice(&keys.starts, [batch + 1]).unwrap());
    }
    if keys_are == Keys::Dense || case.lengths.iter().any(|rows| rows.used < rows.keys) {
        data.key_value_lengths = Some(View::from_slice(&used, [batch]).unwrap());
    }
    let dense = |store: &Store<T>, width: usize| {
        Store::of([batch, longest, k, width], layout, &store.read(0, keys.total))
    };
    let (key, value) = match keys_are {
        Keys::Packed => (key, value),
        Keys::Dense => (dense(&key, h), dense(&value, hv)),
    };
    let inputs = case.inputs([&query, &key, &value].map(Store::view), data, 0..batch, None);
    let problem = case.problem(&inputs);
    let d_lse = case.has_d_lse.then_some(&d_lse);

    let wanted: Vec<Results<T, L>> = (0..batch).map(|batch| alone(&backends[0], case, batch)).collect();
    for backend in backends {
        let tail = queries.tail();
        // What the tail holds must not matter: NaN in the place of what the forward pass wrote.
        let spoil = |out: &mut Store<T>, lse: &mut Store<L>| {
            out.write(tail.start, &vec![T::from_f32(f32::NAN); tail.len() * n * hv]);
            lse.write(tail.start, &vec![L::from_f32(f32::NAN); tail.len() * n]);
        };
        let found = both(backend, inputs, &problem, layout, (&d_out, d_lse), spoil);
        for (batch, wanted) in wanted.iter().enumerate() {
            let (what, rows) = (format!("{what}, sequence {batch}"), case.lengths[batch]);
            let start = queries.start(batch);
            same(&found.out.read(start, rows.queries), &wanted.out, &format!("{what}: out"));
            same(&found.lse.read(start, rows.queries), &wanted.lse, &format!("{what}: lse"));
            same(&found.dq.read(start, rows.queries), &wanted.dq, &format!("{what}: dq"));
            for (name, found, wanted) in [("dk", &found.dk, &wanted.dk), ("dv", &found.dv, &wanted.dv)] {
                let found = match keys_are {
                    Keys::Packed => found.read(keys.start(batch), rows.keys),
                    Keys::Dense => found.read(batch, 1),
                };
                let (used, unused) = found.split_at(wanted.shape.iter().product());
                same(used, wanted, &format!("{what}: {name}"));
                all_are(unused, 0.0, &format!("{what}: {name} of keys that take no part"));
            }
        }
        for (name, found, value) in [("out", &found.out, 0.0), ("dq", &found.dq, 0.0)] {
            all_are(&found.read(tail.start, tail.len()), value, &format!("{what}: {name} of the tail"));
        }
        all_are(&found.lse.read(tail.start, tail.len()), f64::NEG_INFINITY, "lse of the tail");
        if keys_are == Keys::Packed {
            for gradient in [&found.dk, &found.dv] {
                all_are(&gradient.read(keys.tail().start, keys.tail().len()), 0.0, "keys of the tail");
            }
        }
        sums(case, &found, &wanted, what);
    }
}

/// The gradients that are summed over sequences.
fn sums<T: Scalar + Element, L: Scalar + Element>(
    case: &Case<T, L>,
    found: &Results<T, L>,
    wanted: &[Results<T, L>],
    what: &str,
) {
    if let Some(dsinks) = &found.dsinks {
        // One sum in f64 over all sequences in order, of numbers that are not rounded in between.
        let sum = |head: usize| {
            wanted.iter().fold(0.0, |sum, one| sum + one.dsinks.as_ref().unwrap().read(head, 1)[0])
        };
        let sums: Vec<f64> = (0..case.heads[0]).map(sum).collect();
        assert_eq!(bits(&dsinks.read(0, sums.len())), bits(&sums), "{what}: dsinks");
    }
    let Some(dbias) = &found.dbias else { return };
    let shape = dbias.shape;
    let (mut sums, mut sizes) = (vec![0f64; shape.iter().product()], vec![0f64; shape.iter().product()]);
    for (batch, one) in wanted.iter().enumerate() {
        let one = one.dbias.as_ref().unwrap();
        let [_, heads, rows, keys] = std::array::from_fn(|axis| one.shape[axis]);
        let elements = one.read(0, one.shape[0]);
        for (index, element) in elements.into_iter().enumerate() {
            let (head, row, key) = (index / (rows * keys), index / keys % rows, index % keys);
            assert!(head < heads);
            let batch = if shape[0] == 1 { 0 } else { batch };
            let at = ((batch * shape[1] + head) * shape[2] + row) * shape[3] + key;
            sums[at] += element;
            sizes[at] += element.abs();
        }
    }
    // Each element is the sum of the sequences' own, in order, unless it also sums over heads, rows or keys.
    let is_exact = shape[0] > 1 || wanted.len() == 1 || shape[1..] == full(case)[1..];
    for (index, &found) in dbias.read(0, shape[0]).iter().enumerate() {
        let (want, size) = (sums[index], sizes[index]);
        if is_exact {
            assert_eq!(
                found.to_bits(),
                want.to_bits(),
                "{what}: dbias {shape} at {index}: {found} for {want}"
            );
        } else {
            assert!(
                (found - want).abs() <= 1e-12 * size,
                "{what}: dbias {shape} at {index}: {found} for {want}"
            );
        }
    }
}

fn full<T, L>(case: &Case<T, L>) -> [usize; 4] {
    let longest = |rows: fn(&Lengths) -> usize| case.lengths.iter().map(rows).max().unwrap_or(0);
    [case.lengths.len(), case.heads[0], longest(|rows| rows.queries), longest(|rows| rows.keys)]
}

fn same<T: Scalar + Element>(found: &[T], wanted: &Store<T>, what: &str) {
    let wanted = wanted.read(0, wanted.shape[0]);
    assert!(wanted.iter().all(|number| !number.to_f64().is_nan()), "{what}: NaN is wanted");
    assert_eq!(bits(found), bits(&wanted), "{what}");
}

fn all_are<T: Scalar>(found: &[T], value: f64, what: &str) {
    assert!(bits(found).iter().all(|&bits| bits == value.to_bits()), "{what}");
}
