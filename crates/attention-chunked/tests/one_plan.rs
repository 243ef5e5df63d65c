//! One plan, many calls: lengths, offsets, scales, softcaps and seeds are the call's, and the bits are those
//! of a plan of its own, in exactly the scratch that was planned.

mod common;

use std::sync::Arc;

use attention_chunked::{ChunkedBackend, ChunkedConfig, Level};
use attention_core::{
    Alignment, AttentionBackend, BackwardCall, BackwardInputs, BackwardOutputs, CallData, DType, Dropout,
    ForwardCall, ForwardOutputs, Gradients, Inputs, OffsetRange, Plan, Problem, ProblemBuilder, QueryOffset,
    ScratchBuffer, TensorDesc, View, Window,
};
use common::{Data, random};

/// The operands of both passes.
struct Tensors {
    query: Data,
    key: Data,
    value: Data,
    d_out: Data,
    /// Batch, queries, keys, query heads, key/value heads, head dimension.
    sizes: [usize; 6],
}

impl Tensors {
    fn new(dtype: DType, sizes: [usize; 6]) -> Self {
        let [batch, queries, keys, heads, key_heads, width] = sizes;
        let new = |count: usize, seed: u32| Data::new(dtype, &random(count, seed));
        let (rows, columns) = (batch * queries * heads * width, batch * keys * key_heads * width);
        Self { query: new(rows, 1), key: new(columns, 2), value: new(columns, 3), d_out: new(rows, 4), sizes }
    }

    fn rows(&self) -> [usize; 4] {
        let [batch, queries, _, heads, _, width] = self.sizes;
        [batch, queries, heads, width]
    }

    fn columns(&self) -> [usize; 4] {
        let [batch, _, keys, _, key_heads, width] = self.sizes;
        [batch, keys, key_heads, width]
    }

    fn inputs<'a>(&'a self, data: CallData<'a>) -> Inputs<'a> {
        let [query, key, value] =
            [(&self.query, self.rows()), (&self.key, self.columns()), (&self.value, self.columns())]
                .map(|(data, shape)| data.view(&shape));
        Inputs { data, ..Inputs::new(query, key, value) }
    }

    fn d_out(&self) -> View<'_> {
        self.d_out.view(&self.rows())
    }
}

/// The plans of both passes, with scratch of exactly the size that they ask for.
struct Plans([(Arc<dyn Plan>, ScratchBuffer); 2]);

/// Bits of out, logsumexp, dq, dk and dv.
#[derive(Clone, Debug, PartialEq)]
struct Bits([Vec<u64>; 5]);

impl Plans {
    fn new(backend: &ChunkedBackend, problem: &ProblemBuilder) -> Self {
        let forward = problem.clone().lse(true).build().expect("a valid problem");
        let backward = problem.clone().gradients(Gradients::QKV).build().expect("a valid problem");
        Self([forward, backward].map(|problem| {
            let plan = backend.plan(&problem).expect("supported");
            assert_eq!(plan.scratch_bytes(), backend.scratch_bytes(&problem).expect("supported"));
            let scratch = ScratchBuffer::new(plan.scratch_bytes());
            (plan, scratch)
        }))
    }

    fn run(&mut self, inputs: Inputs<'_>, d_out: View<'_>) -> Bits {
        let [(forward, scratch), (backward, backward_scratch)] = &mut self.0;
        let (rows, columns) = (inputs.query.shape(), inputs.key.shape());
        let (lse_shape, dtype) = ([rows[0], rows[1], rows[2]], inputs.query.desc().dtype());
        let stats = if dtype == DType::F64 { DType::F64 } else { DType::F32 };
        let (of_rows, of_columns) = (rows.iter().product(), columns.iter().product());
        let mut out = Data::of(dtype, of_rows, f64::NAN);
        let mut lse = Data::of(stats, lse_shape.iter().product(), f64::NAN);
        let outputs = ForwardOutputs { out: out.view_mut(&rows), lse: Some(lse.view_mut(&lse_shape)) };
        let call = ForwardCall::new(forward.problem(), inputs, outputs).expect("a valid call");
        forward.forward(call, scratch.scratch()).expect("the call runs");

        let [mut dq, mut dk, mut dv] =
            [of_rows, of_columns, of_columns].map(|count| Data::of(dtype, count, f64::NAN));
        let saved = BackwardInputs { out: out.view(&rows), lse: lse.view(&lse_shape), d_out, d_lse: None };
        let outputs = BackwardOutputs {
            dq: Some(dq.view_mut(&rows)),
            dk: Some(dk.view_mut(&columns)),
            dv: Some(dv.view_mut(&columns)),
            ..BackwardOutputs::default()
        };
        let call = BackwardCall::new(backward.problem(), inputs, saved, outputs).expect("a valid call");
        backward.backward(call, backward_scratch.scratch()).expect("the call runs");
        Bits([out, lse, dq, dk, dv].map(|data| data.bits()))
    }
}

/// The forward pass alone.
fn forward(plan: &dyn Plan, inputs: Inputs<'_>) -> Vec<u64> {
    let shape = inputs.query.shape();
    let mut out = Data::of(inputs.query.desc().dtype(), shape.iter().product(), f64::NAN);
    let outputs = ForwardOutputs { out: out.view_mut(&shape), lse: None };
    let call = ForwardCall::new(plan.problem(), inputs, outputs).expect("a valid call");
    plan.forward(call, ScratchBuffer::new(plan.scratch_bytes()).scratch()).expect("the call runs");
    out.bits()
}

fn in_pool(level: Level, threads: usize) -> ChunkedBackend {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("a pool");
    ChunkedBackend::with_config(ChunkedConfig::default().level(level).pool(Arc::new(pool)))
}

/// A decoder's call whose caches are filled with these numbers of keys.
fn filled(keys: &[i32]) -> CallData<'_> {
    CallData {
        query_offset: QueryOffset::BottomRight,
        key_value_lengths: Some(View::from_slice(keys, [keys.len()]).unwrap()),
        ..CallData::default()
    }
}

/// The first `length` positions of a batch row.
fn part(view: View<'_>, row: usize, length: usize) -> View<'_> {
    view.narrow(0, row..row + 1).and_then(|view| view.narrow(1, 0..length)).expect("a part of the tensor")
}

#[test]
fn a_growing_cache_has_one_plan() {
    let capacity = 2600;
    for level in Level::available() {
        let backends = [in_pool(level, 1), in_pool(level, 3)];
        for dtype in [DType::F32, DType::Bf16, DType::F64] {
            let tensors = Tensors::new(dtype, [1, 1, capacity, 4, 2, 16]);
            let problem = tensors.inputs(filled(&[0])).problem().causal(true).build().unwrap();
            let plans = backends.each_ref().map(|backend| backend.plan(&problem).unwrap());
            let lengths = (0..70).chain((70..capacity).step_by(97)).chain([1023, 1024, 1025, 2048, capacity]);
            for length in lengths {
                // A cache of this length, all of it.
                let all = tensors.inputs(CallData::default());
                let [key, value] = [all.key, all.value].map(|view| view.narrow(1, 0..length).unwrap());
                let alone = Inputs { key, value, ..all };
                let own = backends[0].plan(&alone.problem().build().unwrap()).unwrap();
                let want = forward(&*own, alone);
                let lengths = [i32::try_from(length).unwrap()];
                for plan in &plans {
                    let got = forward(&**plan, tensors.inputs(filled(&lengths)));
                    assert!(got == want, "{level}, {dtype}, {length} keys");
                }
            }
        }
    }
}

/// Numbers that tests choose sizes by.
struct Choices(u64);

impl Choices {
    fn below(&mut self, end: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as usize % end
    }

    fn of<T: Copy>(&mut self, choices: &[T]) -> T {
        choices[self.below(choices.len())]
    }

    /// Mostly a number up to `most`, often one at its ends.
    fn length(&mut self, most: usize) -> usize {
        let any = self.below(most + 1);
        let few = self.below(most.min(9) + 1);
        self.of(&[0, few, any, any, most])
    }
}

/// Batch rows of very different lengths and offsets in calls of one plan, which run in exactly the scratch
/// that was planned: each batch row gives what it gives alone, by a plan of its own.
#[test]
fn any_lengths_and_offsets_fit_the_plan_and_change_no_bit() {
    let mut choices = Choices(7);
    for level in Level::available() {
        for round in 0..120 {
            let [batch, group, key_heads] =
                [choices.below(4) + 1, choices.of(&[1, 1, 2, 4, 9]), choices.below(3) + 1];
            let (queries, keys) = (
                choices.of(&[1, 1, 2, 5, 9, 30, 70, 300]),
                choices.of(&[0, 1, 60, 300, 1100, 1100, 2500, 5000]),
            );
            let keys = if queries > 100 { keys.min(1100) } else { keys };
            let dtype = choices.of(&[DType::F32, DType::F32, DType::F64, DType::Bf16, DType::F16]);
            let tensors = Tensors::new(dtype, [batch, queries, keys, group * key_heads, key_heads, 4]);
            let (has_query_lengths, has_key_lengths) =
                choices.of(&[(true, true), (true, true), (false, true), (true, false), (false, false)]);
            let (causal, window) = (
                choices.below(2) == 0,
                choices.of(&[Window::UNBOUNDED, Window::UNBOUNDED, Window::new(40, 9), Window::new(1500, 0)]),
            );
            let alignment = choices.below(4);
            let threads = choices.of(&[1, 2, 3, 7]);
            let mut config = ChunkedConfig::default().level(level);
            if round % 5 == 0 {
                config = config
                    .query_chunk(choices.below(40))
                    .key_chunk(choices.below(2000))
                    .budget(choices.below(1 << 16));
            }
            let pool = Arc::new(rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap());
            let backend = ChunkedBackend::with_config(config.pool(pool));
            let alone_backend = ChunkedBackend::with_config(ChunkedConfig::default().level(level).threads(1));

            let mut plans = None;
            for _ in 0..4 {
                let of_batch = |choices: &mut Choices, most| -> Vec<i64> {
                    (0..batch).map(|_| choices.length(most) as i64).collect()
                };
                let query_lengths = of_batch(&mut choices, queries);
                let key_lengths = of_batch(&mut choices, keys);
                let offsets: Vec<i64> = (0..batch)
                    .map(|_| choices.length(keys + 2) as i64 - choices.length(queries) as i64)
                    .collect();
                let view = |data| View::from_slice(data, [batch]).unwrap();
                let data = CallData {
                    query_lengths: has_query_lengths.then(|| view(&query_lengths)),
                    key_value_lengths: has_key_lengths.then(|| view(&key_lengths)),
                    query_offsets: (alignment == 0).then(|| view(&offsets)),
                    query_offset: match alignment {
                        1 => QueryOffset::Fixed(offsets[0]),
                        2 => QueryOffset::BottomRight,
                        _ => QueryOffset::TOP_LEFT,
                    },
                    ..CallData::default()
                };
                let inputs = tensors.inputs(data);
                let problem = |inputs: &Inputs<'_>| {
                    let problem = inputs.problem().causal(causal).window(window);
                    if alignment == 1 {
                        problem.alignment(Alignment::Offset(OffsetRange::Near))
                    } else {
                        problem
                    }
                };
                let plans = plans.get_or_insert_with(|| Plans::new(&backend, &problem(&inputs)));
                let got = plans.run(inputs, tensors.d_out());
                for row in 0..batch {
                    let queries = if has_query_lengths { query_lengths[row] as usize } else { queries };
                    let keys = if has_key_lengths { key_lengths[row] as usize } else { keys };
                    let (rows, columns) = (inputs.query.shape(), inputs.key.shape());
                    let query = part(inputs.query, row, queries);
                    let [key, value] = [inputs.key, inputs.value].map(|view| part(view, row, keys));
                    let query_offset = match alignment {
                        0 => QueryOffset::Fixed(offsets[row]),
                        _ => data.query_offset,
                    };
                    let data = CallData { query_offset, ..CallData::default() };
                    let alone = Inputs { data, ..Inputs::new(query, key, value) };
                    let mut own = Plans::new(&alone_backend, &problem(&alone));
                    let want = own.run(alone, part(tensors.d_out(), row, queries));
                    let names = ["out", "lse", "dq", "dk", "dv"];
                    for (index, (got, want)) in got.0.iter().zip(&want.0).enumerate() {
                        let is_column = index > 2;
                        let shape = if is_column { columns } else { rows };
                        let width = if index == 1 { shape[2] } else { shape[2] * shape[3] };
                        let got = &got[row * shape[1] * width..][..shape[1] * width];
                        let what = format!(
                            "{level}, round {round}, {dtype}, {:?}, row {row} of {query_lengths:?} and \
                             {key_lengths:?}: {}",
                            tensors.sizes, names[index]
                        );
                        assert!(got[..want.len()] == want[..], "{what}");
                        // Minus infinity for the logsumexp of a padded row, zero elsewhere.
                        let padding = match (index, dtype) {
                            (1, DType::F64) => f64::NEG_INFINITY.to_bits(),
                            (1, _) => f32::NEG_INFINITY.to_bits().into(),
                            _ => 0,
                        };
                        assert!(got[want.len()..].iter().all(|&bits| bits == padding), "{what}, padding");
                    }
                }
            }
        }
    }
}

#[test]
fn lengths_and_offsets_may_be_of_any_integers_and_strides() {
    let tensors = Tensors::new(DType::F32, [3, 12, 90, 2, 1, 8]);
    let (queries, keys, offsets) = ([12i64, 5, 9], [90i64, 33, 0], [0i64, 7, 60]);
    let backend = in_pool(Level::best(), 2);
    let run = |query_lengths: View<'_>, key_value_lengths: View<'_>, query_offsets: View<'_>| {
        let inputs = tensors.inputs(CallData {
            query_lengths: Some(query_lengths),
            key_value_lengths: Some(key_value_lengths),
            query_offsets: Some(query_offsets),
            ..CallData::default()
        });
        Plans::new(&backend, &inputs.problem().causal(true)).run(inputs, tensors.d_out())
    };
    let dense = |data| View::from_slice(data, [3]).unwrap();
    let want = run(dense(&queries), dense(&keys), dense(&offsets));

    let narrow = |numbers: [i64; 3]| numbers.map(|number| i32::try_from(number).unwrap());
    let unsigned = |numbers: [i64; 3]| numbers.map(|number| u32::try_from(number).unwrap());
    // Every third number, from the last one on.
    let strided = |numbers: [i64; 3]| [numbers[2], -1, i64::MAX, numbers[1], -1, -1, numbers[0]];
    let (a, b, c) = (narrow(queries), unsigned(keys), strided(offsets));
    let backwards = |data| View::strided(data, 6, [3], [-3]).unwrap();
    let got = run(View::from_slice(&a, [3]).unwrap(), View::from_slice(&b, [3]).unwrap(), backwards(&c));
    assert!(got == want, "i32, u32 and strided i64");
    let (a, b, c) = (strided(queries), narrow(keys), unsigned(offsets));
    let got = run(backwards(&a), View::from_slice(&b, [3]).unwrap(), View::from_slice(&c, [3]).unwrap());
    assert!(got == want, "strided i64, i32 and u32");
    // One number for all.
    let same = View::strided(&[7i32], 0, [3], [0]).unwrap();
    let got = run(same, same, same);
    assert!(got == run(dense(&[7; 3]), dense(&[7; 3]), dense(&[7; 3])), "one number for all");
}

#[test]
fn scales_softcaps_and_seeds_are_the_calls() {
    for level in Level::available() {
        let backend = in_pool(level, 2);
        for dtype in [DType::F32, DType::Bf16] {
            for sizes in [[1, 1, 700, 2, 1, 8], [2, 40, 150, 2, 1, 8]] {
                let tensors = Tensors::new(dtype, sizes);
                for dropout in [None, Some(0.25)] {
                    let with = |scale: f64, softcap: f64, seed: u64| CallData {
                        scale: Some(scale),
                        softcap: Some(softcap),
                        dropout: dropout.map(|rate| Dropout { rate, seed, offset: seed as u32 / 3 }),
                        ..CallData::default()
                    };
                    let problem = tensors.inputs(with(1.0, 1.0, 0)).problem().any_scale(true);
                    let mut plans = Plans::new(&backend, &problem);
                    let mut before = None;
                    for (scale, softcap, seed) in
                        [(0.5, 3.0, 1), (0.5, 3.0, 2), (-0.3, 3.0, 2), (0.0, 0.1, 2), (17.0, 50.0, u64::MAX)]
                    {
                        let inputs = tensors.inputs(with(scale, softcap, seed));
                        let got = plans.run(inputs, tensors.d_out());
                        let want = Plans::new(&backend, &inputs.problem()).run(inputs, tensors.d_out());
                        assert!(got == want, "{level}, {dtype}, {sizes:?}, scale {scale}, seed {seed}");
                        let is_new = before.as_ref() != Some(&got) || (dropout.is_none() && seed == 2);
                        assert!(is_new, "{level}, {dtype}: scale {scale}, softcap {softcap}, seed {seed}");
                        before = Some(got);
                    }
                }
            }
        }
    }
}

/// A problem with lengths and offsets asks for little more scratch than its full calls, and full calls of
/// fewer batch rows, take: small batch rows are computed in f64, in a scratch of twice the size at most.
#[test]
fn numbers_of_a_call_cost_little_scratch() {
    for level in Level::available() {
        for threads in [1, 2, 16] {
            let backend = ChunkedBackend::with_config(ChunkedConfig::default().level(level).threads(threads));
            let bytes = |problem: ProblemBuilder| backend.scratch_bytes(&problem.build().unwrap()).unwrap();
            for dtype in [DType::F32, DType::Bf16, DType::F64] {
                for sizes in [
                    [1, 1, 1, 1, 1, 64],
                    [1, 1, 8192, 32, 8, 128],
                    [8, 1, 8192, 32, 8, 128],
                    [1, 512, 512, 8, 8, 64],
                    [2, 512, 4096, 8, 2, 64],
                    [4, 4096, 4096, 16, 16, 64],
                    [64, 70, 70, 4, 4, 32],
                ] {
                    let [batch, queries, keys, heads, key_heads, width] = sizes;
                    let problem = |batch: usize, queries: usize, gradients: Gradients| {
                        let desc =
                            |length, heads| TensorDesc::contiguous(dtype, [batch, length, heads, width]);
                        let (query, key) = (desc(queries, heads), desc(keys, key_heads));
                        let problem = Problem::builder(query, key, key);
                        if gradients.is_empty() { problem } else { problem.gradients(gradients) }
                    };
                    for gradients in [Gradients::NONE, Gradients::QKV] {
                        let all = || problem(batch, queries, gradients);
                        let full = bytes(all());
                        let fewer_queries = (1..=queries.min(8)).chain([queries]);
                        let shorter = fewer_queries
                            .flat_map(|queries| (1..=batch).map(move |batch| (batch, queries)))
                            .map(|(batch, queries)| bytes(problem(batch, queries, gradients)))
                            .max()
                            .unwrap();
                        let with_lengths = all().key_value_lengths(DType::I32);
                        for (what, with, most) in [
                            ("offsets", all().query_offsets(OffsetRange::Near, DType::I32), full),
                            ("key lengths", with_lengths.clone(), full),
                            ("both lengths", with_lengths.query_lengths(DType::I64), full.max(shorter)),
                        ] {
                            let bytes = bytes(with);
                            let what = format!("{level}, {threads} threads, {dtype}, {sizes:?}, {what}");
                            // Where a call is all one task, one with lengths may be more.
                            let most = if most == 0 { 0 } else { 2 * most + most / 4 + 4096 };
                            assert!(bytes >= full && bytes <= most, "{what}: {bytes} for {full}");
                        }
                    }
                }
            }
        }
    }
}
