//! Calls of packed queries, with keys that are packed or in pages.

use std::sync::Arc;

use attention_core::{
    AttentionBackend, BackwardCall, BackwardInputs, BackwardOutputs, CallData, DType, Dims, ForwardCall,
    ForwardOutputs, Gradients, Inputs, Plan, QueryOffset, TensorDesc,
};
use attention_cuda::CudaDevice;
use half::{bf16, f16};

use crate::support::{Guarded, Integers, POISON, Result, Sizes, Step, noise};

/// Lengths of sequences, and how wide a row is.
#[derive(Clone, Debug)]
pub(super) struct Lengths {
    pub(super) queries: Vec<usize>,
    pub(super) keys: Vec<usize>,
    /// Rows behind the last sequence, of queries and of keys.
    pub(super) spare: usize,
    pub(super) heads: usize,
    pub(super) key_heads: usize,
    pub(super) width: usize,
}

impl Lengths {
    /// A decoder's step: some prompts, more sequences of one token, an empty one, and one without keys.
    pub(super) fn mixed(width: usize) -> Self {
        let (queries, keys) = (vec![70, 1, 1, 0, 300, 9], vec![70, 1000, 1, 40, 300, 0]);
        Self { queries, keys, spare: 5, heads: 4, key_heads: 2, width }
    }

    pub(super) fn decoding(width: usize) -> Self {
        let keys: Vec<usize> = (0..33).map(|index| 1 + index * 37).collect();
        Self { queries: vec![1; 33], keys, spare: 0, heads: 8, key_heads: 1, width }
    }
}

/// Where each sequence starts, and where the last one ends.
fn starts(lengths: &[usize]) -> Vec<usize> {
    let mut starts = vec![0];
    for &length in lengths {
        starts.push(starts[starts.len() - 1] + length);
    }
    starts
}

fn numbers(of: &[usize]) -> Vec<i64> {
    of.iter().map(|&number| i64::try_from(number).expect("small")).collect()
}

/// How the keys and values of a call lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Keys {
    Packed,
    /// In pages of so many rows, in the order of [`page_order`].
    Paged(usize),
}

/// Every page of a table of so many, in an order that scatters neighbours.
fn page_order(pages: usize) -> Vec<usize> {
    let step = (pages / 2..).find(|step| gcd(*step, pages) == 1).unwrap_or(1);
    (0..pages).map(|index| (index * step + 1) % pages).collect()
}

fn gcd(a: usize, b: usize) -> usize {
    if b == 0 { a } else { gcd(b, a % b) }
}

/// The tensors of both passes over packed queries.
pub(super) struct Sequences {
    device: CudaDevice,
    dtype: DType,
    lengths: Lengths,
    keys: Keys,
    pub(super) causal: bool,
    /// Packed query, key, value and incoming gradient on the host.
    data: [Vec<u8>; 4],
    pub(super) inputs: [Guarded; 4],
    outputs: [Guarded; 5],
    scratch: Guarded,
}

impl Sequences {
    /// Rows of no sequence are NaN, and so are slots of pages that no key is in.
    pub(super) fn new(device: &CudaDevice, dtype: DType, lengths: &Lengths, keys: Keys) -> Result<Self> {
        let of_query = lengths.heads * lengths.width;
        let of_key = lengths.key_heads * lengths.width;
        let total = |of: &[usize]| of.iter().sum::<usize>();
        let rows = [total(&lengths.queries), total(&lengths.keys)];
        let data = [
            noise(dtype, 1, rows[0] * of_query),
            noise(dtype, 2, rows[1] * of_key),
            noise(dtype, 3, rows[1] * of_key),
            noise(dtype, 4, rows[0] * of_query),
        ];
        let with_spare = |bytes: &[u8], width: usize| {
            [bytes, &vec![POISON; lengths.spare * width * dtype.size()]].concat()
        };
        let query: Dims = [rows[0] + lengths.spare, lengths.heads, lengths.width].into();
        let key: Dims = match keys {
            Keys::Packed => [rows[1] + lengths.spare, lengths.key_heads, lengths.width].into(),
            Keys::Paged(size) => {
                let pages = lengths.queries.len() * most_pages(lengths, size) + 1;
                [pages, size, lengths.key_heads, lengths.width].into()
            }
        };
        let placed = |bytes: &[u8]| match keys {
            Keys::Packed => with_spare(bytes, of_key),
            Keys::Paged(size) => in_pages(bytes, lengths, size, of_key * dtype.size()),
        };
        let send = |dtype: DType, shape: Dims, bytes: &[u8]| {
            Guarded::new(device, TensorDesc::contiguous(dtype, shape), bytes)
        };
        let room = |dtype: DType, shape: Dims| {
            send(dtype, shape, &vec![POISON; shape.iter().product::<usize>() * dtype.size()])
        };
        let lse: Dims = [rows[0] + lengths.spare, lengths.heads].into();
        Ok(Self {
            device: device.clone(),
            dtype,
            lengths: lengths.clone(),
            keys,
            causal: false,
            inputs: [
                send(dtype, query, &with_spare(&data[0], of_query))?,
                send(dtype, key, &placed(&data[1]))?,
                send(dtype, key, &placed(&data[2]))?,
                send(dtype, query, &with_spare(&data[3], of_query))?,
            ],
            data,
            outputs: [
                room(dtype, query)?,
                room(dtype.accumulator(), lse)?,
                room(dtype, query)?,
                room(dtype, key)?,
                room(dtype, key)?,
            ],
            scratch: room(DType::Bool, [64].into())?,
        })
    }

    /// The numbers of a call with the lengths.
    pub(super) fn integers(&self) -> Integers {
        let lengths = &self.lengths;
        let common = Integers {
            query_starts: Some(numbers(&starts(&lengths.queries))),
            query_offset: QueryOffset::BottomRight,
            ..Integers::default()
        };
        match self.keys {
            Keys::Packed => Integers { key_value_starts: Some(numbers(&starts(&lengths.keys))), ..common },
            Keys::Paged(size) => Integers {
                key_value_lengths: Some(numbers(&lengths.keys)),
                block_table: Some(numbers(&table(lengths, size))),
                ..common
            },
        }
    }

    fn has_backward(&self) -> bool {
        self.keys == Keys::Packed
    }

    /// The forward pass, and for packed keys the backward pass, for calls with numbers like these.
    pub(super) fn plan(
        &mut self,
        backend: &dyn AttentionBackend,
        data: CallData<'_>,
    ) -> Result<Vec<Arc<dyn Plan>>> {
        let [query, key, value, _] = &self.inputs;
        let inputs = Inputs { data, ..Inputs::new(query.view()?, key.view()?, value.view()?) };
        let most = |of: &[usize]| of.iter().copied().max();
        let longest = (most(&self.lengths.queries), most(&self.lengths.keys));
        let builder = inputs.problem().causal(self.causal).longest(longest.0, longest.1);
        let mut plans = vec![backend.plan(&builder.clone().lse(true).build()?)?];
        if self.has_backward() {
            plans.push(backend.plan(&builder.gradients(Gradients::QKV).build()?)?);
        }
        let bytes = plans.iter().map(|plan| plan.scratch_bytes()).max().unwrap_or(0).max(64);
        let scratch = TensorDesc::contiguous(DType::Bool, [bytes]);
        self.scratch = Guarded::new(&self.device, scratch, &vec![POISON; bytes])?;
        Ok(plans)
    }

    pub(super) fn run(&mut self, plans: &[Arc<dyn Plan>], data: CallData<'_>) -> Result {
        let [query, key, value, d_out] = &self.inputs;
        let inputs = Inputs { data, ..Inputs::new(query.view()?, key.view()?, value.view()?) };
        let [out, lse, dq, dk, dv] = &mut self.outputs;
        let outputs = ForwardOutputs { out: out.view_mut()?, lse: Some(lse.view_mut()?) };
        let call = ForwardCall::new(plans[0].problem(), inputs, outputs)?;
        plans[0].forward(call, self.scratch.scratch()?)?;
        let Some(backward) = plans.get(1) else { return Ok(()) };
        let saved = BackwardInputs { out: out.view()?, lse: lse.view()?, d_out: d_out.view()?, d_lse: None };
        let outputs = BackwardOutputs {
            dq: Some(dq.view_mut()?),
            dk: Some(dk.view_mut()?),
            dv: Some(dv.view_mut()?),
            dbias: None,
            dsinks: None,
        };
        let call = BackwardCall::new(backward.problem(), inputs, saved, outputs)?;
        backward.backward(call, self.scratch.scratch()?)?;
        Ok(())
    }

    pub(super) fn poison(&mut self) -> Result {
        self.outputs.iter_mut().chain([&mut self.scratch]).try_for_each(Guarded::poison)
    }

    /// The outputs that the passes write; every guard is checked.
    pub(super) fn results(&self) -> Result<Vec<Vec<u8>>> {
        for tensor in self.inputs.iter().chain([&self.scratch]) {
            tensor.contents()?;
        }
        let count = if self.has_backward() { 5 } else { 2 };
        let all: Vec<_> = self.outputs.iter().map(Guarded::contents).collect::<Result<_>>()?;
        Ok(all.into_iter().take(count).collect())
    }

    /// Output, logsumexp and gradients of one sequence in a dense call of it alone.
    fn alone(&self, backend: &dyn AttentionBackend, sequence: usize) -> Result<Vec<Vec<f64>>> {
        let lengths = &self.lengths;
        let (queries, keys) = (lengths.queries[sequence], lengths.keys[sequence]);
        let Lengths { heads, key_heads, width, .. } = *lengths;
        let sizes = Sizes { batch: 1, queries, keys, heads, key_heads, width };
        let mut step = Step::new(&self.device, self.dtype, sizes, 0)?;
        step.causal = self.causal;
        let places = [starts(&lengths.queries)[sequence], starts(&lengths.keys)[sequence]];
        let part = |index: usize, first: usize, rows: usize, heads: usize| {
            let row = heads * width * self.dtype.size();
            self.data[index][first * row..][..rows * row].to_vec()
        };
        step.take([
            part(0, places[0], queries, heads),
            part(1, places[1], keys, key_heads),
            part(2, places[1], keys, key_heads),
            part(3, places[0], queries, heads),
        ])?;
        let data = CallData { query_offset: QueryOffset::BottomRight, ..CallData::default() };
        let plans = step.plan(backend, data)?;
        step.run(&plans, data)?;
        let results = step.results()?;
        Ok((0..5).map(|index| floats(self.dtype_of(index), &results[index])).collect())
    }

    pub(super) fn dtype_of(&self, index: usize) -> DType {
        if index == 1 { self.dtype.accumulator() } else { self.dtype }
    }

    /// Compares results with those of each sequence alone, and with what rows of no sequence have.
    pub(super) fn check(&self, backend: &dyn AttentionBackend, results: &[Vec<u8>], what: &str) -> Result {
        let Lengths { heads, key_heads, width, .. } = self.lengths;
        let widths = [heads * width, heads, heads * width, key_heads * width, key_heads * width];
        let got: Vec<Vec<f64>> =
            results.iter().enumerate().map(|(index, bytes)| floats(self.dtype_of(index), bytes)).collect();
        let places = [starts(&self.lengths.queries), starts(&self.lengths.keys)];
        for (sequence, (&query, &key)) in places[0].iter().zip(&places[1]).enumerate() {
            // Behind the last sequence.
            if sequence == self.lengths.queries.len() {
                break;
            }
            let want = self.alone(backend, sequence)?;
            for (index, got) in got.iter().enumerate() {
                let first = if index > 2 { key } else { query } * widths[index];
                for (at, (&got, &want)) in got[first..].iter().zip(&want[index]).enumerate() {
                    let near = (got - want).abs() <= tolerance(self.dtype) * (1.0 + want.abs());
                    assert!(
                        got == want || near,
                        "{what}: result {index} of sequence {sequence} at {at}: {got}, {want}"
                    );
                }
            }
        }
        for (index, got) in got.iter().enumerate() {
            let side = &places[usize::from(index > 2)];
            let fill = if index == 1 { f64::NEG_INFINITY } else { 0.0 };
            let behind = &got[side[side.len() - 1] * widths[index]..];
            assert!(behind.iter().all(|&x| x == fill), "{what}: result {index} of rows of no sequence");
        }
        Ok(())
    }
}

pub(super) fn most_pages(lengths: &Lengths, size: usize) -> usize {
    lengths.keys.iter().copied().max().unwrap_or(0).div_ceil(size)
}

/// The pages of each sequence, in the place of those that no key needs too.
fn table(lengths: &Lengths, size: usize) -> Vec<usize> {
    let entries = lengths.queries.len() * most_pages(lengths, size);
    page_order(entries + 1).into_iter().take(entries).collect()
}

/// Packed keys, or values, in pages of `size` rows of so many bytes.
fn in_pages(packed: &[u8], lengths: &Lengths, size: usize, row: usize) -> Vec<u8> {
    let (table, most) = (table(lengths, size), most_pages(lengths, size));
    let mut pages = vec![POISON; (table.len() + 1) * size * row];
    for (sequence, (&keys, start)) in lengths.keys.iter().zip(starts(&lengths.keys)).enumerate() {
        for key in 0..keys {
            let place = table[sequence * most + key / size] * size + key % size;
            pages[place * row..][..row].copy_from_slice(&packed[(start + key) * row..][..row]);
        }
    }
    pages
}

pub(super) fn floats(dtype: DType, bytes: &[u8]) -> Vec<f64> {
    let float = |bytes: &[u8]| match (dtype, bytes) {
        (DType::F64, &[a, b, c, d, e, f, g, h]) => f64::from_ne_bytes([a, b, c, d, e, f, g, h]),
        (DType::F32, &[a, b, c, d]) => f32::from_ne_bytes([a, b, c, d]).into(),
        (DType::F16, &[a, b]) => f16::from_ne_bytes([a, b]).into(),
        (_, &[a, b]) => bf16::from_ne_bytes([a, b]).into(),
        _ => unreachable!("a float of {dtype}"),
    };
    bytes.chunks_exact(dtype.size()).map(float).collect()
}

/// Two calls of one sequence may cut its tiles elsewhere. The suite has the bounds of errors; this finds rows
/// that are in another place.
fn tolerance(dtype: DType) -> f64 {
    match dtype {
        DType::F64 => 1e-12,
        DType::F32 => 1e-4,
        DType::F16 => 1e-2,
        _ => 6e-2,
    }
}
