//! Calls of packed sequences and of keys in pages on a GPU with cuDNN, at sizes of many tiles, beside the
//! same calls of chunked-cuda. Run with `--ignored`.

mod common;

use std::sync::Arc;

use attention_core::{
    Alignment, AttentionBackend, BackwardCall, BackwardInputs, BackwardOutputs, CallData, DType, ForwardCall,
    ForwardOutputs, Gradients, Inputs, Plan, ProblemBuilder, QueryOffset, TensorDesc, View,
};
use attention_cuda::cudarc::driver::sys::{CUgraphInstantiate_flags, CUstreamCaptureMode};
use attention_cuda::{CudaDevice, DeviceTensor};
use common::{Result, backends, device, numbers};
use half::bf16;

/// Lengths of sequences with some that are empty, of one row, at the edges of tiles, and longer than several;
/// and rows behind the last one.
const QUERIES: [usize; 9] = [700, 0, 1, 128, 129, 5, 0, 1500, 64];
const KEYS: [usize; 9] = [700, 12, 1, 127, 300, 0, 0, 1400, 256];
const SPARE: usize = 77;
const LONGEST: [usize; 2] = [1536, 1536];

/// Rows of queries and of keys, without those behind the last sequence.
const ROWS: [usize; 2] = [2527, 2796];

fn starts(lengths: &[usize]) -> Vec<i32> {
    let mut starts = vec![0];
    starts.extend(lengths.iter().scan(0, |end, &length| {
        *end += length as i32;
        Some(*end)
    }));
    starts
}

/// The tensors of a call of packed sequences, each with rows behind the last sequence.
struct Packed {
    inputs: [DeviceTensor; 4],
    starts: [DeviceTensor; 2],
    outputs: [DeviceTensor; 5],
}

/// Mask, alignment and gradients of a call.
#[derive(Clone, Copy, Debug)]
struct Kind {
    causal: bool,
    bottom_right: bool,
    heads: usize,
    key_heads: usize,
    width: usize,
}

impl Kind {
    fn data<'a>(self, starts: &'a [DeviceTensor; 2]) -> Result<CallData<'a>> {
        Ok(CallData {
            query_starts: Some(starts[0].view()?),
            key_value_starts: Some(starts[1].view()?),
            query_offset: if self.bottom_right { QueryOffset::BottomRight } else { QueryOffset::TOP_LEFT },
            ..CallData::default()
        })
    }

    fn options(self, builder: ProblemBuilder) -> ProblemBuilder {
        let alignment = if self.bottom_right { Alignment::BottomRight } else { Alignment::TopLeft };
        builder.causal(self.causal).alignment(alignment)
    }
}

impl Packed {
    /// Rows of no sequence have these bits in every element.
    fn new(device: &CudaDevice, kind: Kind, spare: u16) -> Result<Self> {
        let Kind { heads, key_heads, width, .. } = kind;
        let send = |seed: u64, rows: usize, heads: usize| -> Result<DeviceTensor> {
            let mut data = numbers(seed, rows * heads * width);
            data.extend(std::iter::repeat_n(bf16::from_bits(spare), SPARE * heads * width));
            Ok(DeviceTensor::from_host(device, View::from_slice(&data, [rows + SPARE, heads, width])?)?)
        };
        let room = |rows: usize, heads: usize| {
            let desc = TensorDesc::contiguous(DType::Bf16, [rows + SPARE, heads, width]);
            DeviceTensor::filled(device, desc, 0xff)
        };
        let lse = TensorDesc::contiguous(DType::F32, [ROWS[0] + SPARE, heads]);
        let of = |lengths: &[usize]| -> Result<DeviceTensor> {
            let starts = starts(lengths);
            Ok(DeviceTensor::from_host(device, View::from_slice(&starts, [starts.len()])?)?)
        };
        Ok(Self {
            inputs: [
                send(1, ROWS[0], heads)?,
                send(2, ROWS[1], key_heads)?,
                send(3, ROWS[1], key_heads)?,
                send(4, ROWS[0], heads)?,
            ],
            starts: [of(&QUERIES)?, of(&KEYS)?],
            outputs: [
                room(ROWS[0], heads)?,
                DeviceTensor::filled(device, lse, 0xff)?,
                room(ROWS[0], heads)?,
                room(ROWS[1], key_heads)?,
                room(ROWS[1], key_heads)?,
            ],
        })
    }

    /// The forward pass and, unless heads are grouped, the backward pass.
    fn plan(&self, backend: &dyn AttentionBackend, kind: Kind) -> Result<Vec<Arc<dyn Plan>>> {
        let [query, key, value, _] = &self.inputs;
        let data = kind.data(&self.starts)?;
        let inputs = Inputs { data, ..Inputs::new(query.view()?, key.view()?, value.view()?) };
        let builder = kind.options(inputs.problem()).longest(LONGEST[0], LONGEST[1]);
        let mut plans = vec![backend.plan(&builder.clone().lse(true).build()?)?];
        if kind.heads == kind.key_heads {
            plans.push(backend.plan(&builder.gradients(Gradients::QKV).build()?)?);
        }
        Ok(plans)
    }

    fn run(&mut self, plans: &[Arc<dyn Plan>], kind: Kind) -> Result {
        let [query, key, value, d_out] = &self.inputs;
        let data = kind.data(&self.starts)?;
        let inputs = Inputs { data, ..Inputs::new(query.view()?, key.view()?, value.view()?) };
        let [out, lse, dq, dk, dv] = &mut self.outputs;
        let outputs = ForwardOutputs { out: out.view_mut()?, lse: Some(lse.view_mut()?) };
        let call = ForwardCall::new(plans[0].problem(), inputs, outputs)?;
        plans[0].forward(call, plans[0].lend_scratch()?.scratch())?;
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
        backward.backward(call, backward.lend_scratch()?.scratch())?;
        Ok(())
    }

    /// The output, the logsumexp and, if there is a backward pass, the gradients.
    fn results(&self, has_backward: bool) -> Result<Vec<Vec<f32>>> {
        let count = if has_backward { 5 } else { 2 };
        let of = |tensor: &DeviceTensor| -> Result<Vec<f32>> {
            match tensor.to_vec::<bf16>()? {
                Some(halves) => Ok(halves.into_iter().map(bf16::to_f32).collect()),
                None => Ok(tensor.to_vec::<f32>()?.ok_or("f32")?),
            }
        };
        self.outputs.iter().take(count).map(of).collect()
    }
}

/// The largest difference of two results, as a fraction of the largest number. Infinities must agree.
fn distance(got: &[f32], want: &[f32]) -> f32 {
    assert_eq!(got.len(), want.len());
    let largest = want.iter().filter(|x| x.is_finite()).map(|x| x.abs()).fold(f32::MIN_POSITIVE, f32::max);
    let apart = got.iter().zip(want).map(|(&got, &want)| match (got.is_finite(), want.is_finite()) {
        (true, true) => (got - want).abs(),
        _ if got == want => 0.0,
        _ => f32::INFINITY,
    });
    apart.fold(0.0, f32::max) / largest
}

/// Both backends round each result to bf16, and cuDNN rounds probabilities too: a few parts in 256 of the
/// largest number.
const MOST_APART: f32 = 0.02;

const KINDS: [Kind; 5] = [
    Kind { causal: false, bottom_right: false, heads: 4, key_heads: 4, width: 64 },
    Kind { causal: true, bottom_right: false, heads: 4, key_heads: 4, width: 128 },
    Kind { causal: true, bottom_right: true, heads: 4, key_heads: 4, width: 64 },
    Kind { causal: true, bottom_right: true, heads: 8, key_heads: 2, width: 128 },
    Kind { causal: false, bottom_right: false, heads: 8, key_heads: 1, width: 128 },
];

/// Also if rows of no sequence are NaN, which reach no result and are written like others.
#[test]
#[ignore = "needs a GPU with cuDNN"]
fn packed_calls_of_many_tiles_are_those_of_chunked_cuda() -> Result {
    let device = device()?;
    let [cudnn, chunked] = backends(&device);
    for kind in KINDS {
        let mut results = Vec::new();
        for (backend, spare) in [(&chunked, 0), (&cudnn, 0), (&cudnn, 0x7fc0), (&cudnn, 0x7f80)] {
            let mut packed = Packed::new(&device, kind, spare)?;
            let plans = packed.plan(&**backend, kind)?;
            packed.run(&plans, kind)?;
            results.push(packed.results(plans.len() > 1)?);
        }
        for (got, what) in results[1..].iter().zip(["zeros", "NaN", "infinity"]) {
            let apart: Vec<f32> =
                got.iter().zip(&results[0]).map(|(got, want)| distance(got, want)).collect();
            println!("{kind:?}, {what} behind the last sequence: {apart:?} apart");
            assert!(apart.iter().all(|&apart| apart < MOST_APART), "{kind:?}, {what}: {apart:?}");
            for (index, result) in got.iter().enumerate() {
                let row = result.len() / (ROWS[usize::from(index > 2)] + SPARE);
                let behind = &result[result.len() - SPARE * row..];
                let nothing = if index == 1 { f32::NEG_INFINITY } else { 0.0 };
                assert!(behind.iter().all(|&x| x == nothing), "{kind:?}, {what}: result {index} behind");
            }
        }
    }
    Ok(())
}

/// A plan and a captured graph serve starts that differ, in device memory.
#[test]
#[ignore = "needs a GPU with cuDNN"]
fn a_captured_packed_call_reads_the_starts_that_are_there_when_it_is_launched() -> Result {
    let device = device()?;
    let [cudnn, chunked] = backends(&device);
    for kind in &KINDS[1..3] {
        let mut packed = Packed::new(&device, *kind, 0x7fc0)?;
        let plans = packed.plan(&*cudnn, *kind)?;
        packed.run(&plans, *kind)?;
        let before = packed.results(true)?;
        let stream = device.stream();
        stream.begin_capture(CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL)?;
        packed.run(&plans, *kind)?;
        let flags = CUgraphInstantiate_flags::CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH;
        let graph = stream.end_capture(flags)?.ok_or("nothing was captured")?;
        // The sequences the other way round.
        let reversed = |lengths: [usize; 9]| {
            let mut lengths = lengths;
            lengths.reverse();
            starts(&lengths)
        };
        let (queries, keys) = (reversed(QUERIES), reversed(KEYS));
        packed.starts[0].replace(View::from_slice(&queries, [queries.len()])?)?;
        packed.starts[1].replace(View::from_slice(&keys, [keys.len()])?)?;
        graph.launch()?;
        let replayed = packed.results(true)?;
        assert_ne!(replayed[0], before[0], "the starts changed");
        let plans = packed.plan(&*chunked, *kind)?;
        packed.run(&plans, *kind)?;
        for (index, (got, want)) in replayed.iter().zip(packed.results(true)?).enumerate() {
            let apart = distance(got, &want);
            assert!(apart < MOST_APART, "{kind:?}: result {index} is {apart} apart");
        }
    }
    Ok(())
}

/// Pages in an order of no pattern, slots behind a sequence's keys that are NaN, and entries of the table
/// that no key needs that are no pages.
#[test]
#[ignore = "needs a GPU with cuDNN"]
fn paged_calls_of_many_tiles_are_those_of_chunked_cuda() -> Result {
    const LENGTHS: [usize; 5] = [1000, 0, 1, 257, 640];
    const MOST_KEYS: usize = 1024;
    let device = device()?;
    let [cudnn, chunked] = backends(&device);
    for (page_size, queries) in [(16, 1), (64, 1), (16, 3), (64, 130), (256, 40), (1, 2)] {
        let most = MOST_KEYS / page_size;
        let count = LENGTHS.len() * most;
        let (heads, key_heads, width) = (8, 2, 128);
        // Each page is used at most once: 7 has no common divisor with the count, a power of two times 5.
        let page_of = |index: usize| (index * 7 + 3) % count;
        let mut table = vec![-1i32; count];
        let mut pages = [11, 12].map(|seed| numbers(seed, count * page_size * key_heads * width));
        for (sequence, &length) in LENGTHS.iter().enumerate() {
            for entry in 0..most {
                let page = page_of(sequence * most + entry);
                if entry * page_size < length {
                    table[sequence * most + entry] = page as i32;
                }
                let row = key_heads * width;
                let used = length.saturating_sub(entry * page_size).min(page_size);
                let slots = (page * page_size + used) * row..(page + 1) * page_size * row;
                pages.iter_mut().for_each(|pages| pages[slots.clone()].fill(bf16::NAN));
            }
        }
        let shape = [LENGTHS.len(), queries, heads, width];
        let query = numbers(10, shape.iter().product());
        let query = DeviceTensor::from_host(&device, View::from_slice(&query, shape)?)?;
        let of_pages = [count, page_size, key_heads, width];
        let [keys, values] = &pages;
        let keys = DeviceTensor::from_host(&device, View::from_slice(keys, of_pages)?)?;
        let values = DeviceTensor::from_host(&device, View::from_slice(values, of_pages)?)?;
        let table = DeviceTensor::from_host(&device, View::from_slice(&table, [LENGTHS.len(), most])?)?;
        let lengths = LENGTHS.map(|length| length as i32);
        let lengths = DeviceTensor::from_host(&device, View::from_slice(&lengths, [LENGTHS.len()])?)?;
        let data = CallData {
            block_table: Some(table.view()?),
            key_value_lengths: Some(lengths.view()?),
            query_offset: QueryOffset::BottomRight,
            ..CallData::default()
        };
        let inputs = Inputs { data, ..Inputs::new(query.view()?, keys.view()?, values.view()?) };
        let problem = inputs.problem().causal(true).alignment(Alignment::BottomRight).lse(true).build()?;
        let run = |backend: &dyn AttentionBackend| -> Result<[Vec<f32>; 2]> {
            let mut out = DeviceTensor::filled(&device, TensorDesc::contiguous(DType::Bf16, shape), 0xff)?;
            let lse = TensorDesc::contiguous(DType::F32, [shape[0], shape[1], shape[2]]);
            let mut lse = DeviceTensor::filled(&device, lse, 0xff)?;
            let plan = backend.plan(&problem)?;
            let outputs = ForwardOutputs { out: out.view_mut()?, lse: Some(lse.view_mut()?) };
            let call = ForwardCall::new(plan.problem(), inputs, outputs)?;
            plan.forward(call, plan.lend_scratch()?.scratch())?;
            let out = out.to_vec::<bf16>()?.ok_or("bf16")?.into_iter().map(bf16::to_f32).collect();
            Ok([out, lse.to_vec::<f32>()?.ok_or("f32")?])
        };
        let (want, got) = (run(&*chunked)?, run(&*cudnn)?);
        let apart = [0, 1].map(|index| distance(&got[index], &want[index]));
        println!("{queries} queries, pages of {page_size}: {apart:?} apart");
        assert!(apart.iter().all(|&apart| apart < MOST_APART), "pages of {page_size}: {apart:?}");
    }
    Ok(())
}
