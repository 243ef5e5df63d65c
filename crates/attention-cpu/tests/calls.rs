//! One plan for calls with other numbers: lengths, offsets, scales, softcaps and seeds. Each has the bits of
//! a plan of its own, in exactly the scratch that was planned.

use std::sync::Arc;

use attention_core::{
    Alignment, AttentionBackend, BackwardCall, BackwardInputs, BackwardOutputs, CallData, DType, Dropout,
    Element, ForwardCall, ForwardOutputs, Gradients, Inputs, Plan, ProblemBuilder, QueryOffset, Role, Scalar,
    ScratchBuffer, View, ViewMut, Window,
};
use attention_cpu::{CpuBackend, CpuConfig};
use half::f16;

/// Numbers in [-1, 1) and below a bound, a pure function of the seed.
struct Random(u32);

impl Random {
    fn next(&mut self) -> u32 {
        self.0 = self.0.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        self.0 >> 8
    }

    fn below(&mut self, bound: usize) -> usize {
        self.next() as usize % bound
    }

    fn coin(&mut self) -> bool {
        self.below(2) == 1
    }

    fn one_of<T: Copy>(&mut self, choices: &[T]) -> T {
        choices[self.below(choices.len())]
    }

    fn floats<T: Scalar>(&mut self, count: usize) -> Vec<T> {
        (0..count).map(|_| T::from_f32(self.next() as f32 / (1 << 23) as f32 - 1.0)).collect()
    }
}

/// `B, T, S, N, K, H`.
type Sizes = [usize; 6];

/// Operands `[B, ..]` with a bias `[1, 1, 1, S]`, sinks and slopes `[N]`.
struct Tensors<T> {
    sizes: Sizes,
    query: Vec<T>,
    key: Vec<T>,
    value: Vec<T>,
    d_out: Vec<T>,
    bias: Vec<f32>,
    per_head: Vec<f32>,
}

impl<T: Scalar> Tensors<T> {
    fn new(sizes: Sizes, random: &mut Random) -> Self {
        let [b, t, s, n, k, h] = sizes;
        Self {
            sizes,
            query: random.floats(b * t * n * h),
            key: random.floats(b * s * k * h),
            value: random.floats(b * s * k * h),
            d_out: random.floats(b * t * n * h),
            bias: random.floats(s),
            per_head: random.floats(n),
        }
    }

    fn inputs(&self) -> Inputs<'_> {
        let [b, t, s, n, k, h] = self.sizes;
        Inputs::new(
            View::from_slice(&self.query, [b, t, n, h]).unwrap(),
            View::from_slice(&self.key, [b, s, k, h]).unwrap(),
            View::from_slice(&self.value, [b, s, k, h]).unwrap(),
        )
    }

    fn d_out(&self) -> View<'_> {
        let [b, t, _, n, _, h] = self.sizes;
        View::from_slice(&self.d_out, [b, t, n, h]).unwrap()
    }

    fn bias(&self) -> View<'_> {
        View::from_slice(&self.bias, [1, 1, 1, self.bias.len()]).unwrap()
    }

    fn per_head(&self) -> View<'_> {
        View::from_slice(&self.per_head, [self.per_head.len()]).unwrap()
    }
}

/// The plans of both passes.
#[derive(Clone)]
struct Plans {
    forward: Arc<dyn Plan>,
    backward: Arc<dyn Plan>,
}

impl Plans {
    /// Of the forward problem of `builder`, and the backward one of the same.
    fn new(backend: &CpuBackend, builder: ProblemBuilder) -> Self {
        let forward = builder.lse(true).build().unwrap();
        let mut gradients = Gradients::QKV;
        for (role, gradient) in [(Role::Bias, Gradients::BIAS), (Role::Sinks, Gradients::SINKS)] {
            if forward.has(role) {
                gradients = gradients | gradient;
            }
        }
        let backward = forward.to_builder().gradients(gradients).build().unwrap();
        Self { forward: backend.plan(&forward).unwrap(), backward: backend.plan(&backward).unwrap() }
    }

    /// Both passes, each in exactly the planned scratch, full of NaN as the outputs are.
    fn run<T: Scalar + Element, L: Scalar + Element>(&self, inputs: Inputs<'_>, d_out: View<'_>) -> Results {
        let nan = T::from_f32(f32::NAN);
        let count = |view: View<'_>| view.desc().element_count().unwrap();
        let (query, key) = (inputs.query.shape(), inputs.key.shape());
        let rows = [query[0], query[1], query[2]];
        let scratch = |plan: &dyn Plan| {
            let mut scratch = ScratchBuffer::new(plan.scratch_bytes());
            scratch.bytes_mut().fill(0xFF);
            scratch
        };
        let mut out = vec![nan; count(inputs.query)];
        let mut lse = vec![L::from_f32(f32::NAN); rows.iter().product()];
        let outputs = ForwardOutputs {
            out: ViewMut::from_slice(&mut out, query).unwrap(),
            lse: Some(ViewMut::from_slice(&mut lse, rows).unwrap()),
        };
        let call = ForwardCall::new(self.forward.problem(), inputs, outputs).unwrap();
        self.forward.forward(call, scratch(&*self.forward).scratch()).unwrap();

        let saved = BackwardInputs {
            out: View::from_slice(&out, query).unwrap(),
            lse: View::from_slice(&lse, rows).unwrap(),
            d_out,
            d_lse: None,
        };
        let [mut dq, mut dk, mut dv] =
            [inputs.query, inputs.key, inputs.value].map(|view| vec![nan; count(view)]);
        let mut dbias = vec![f32::NAN; inputs.bias.map_or(0, count)];
        let mut dsinks = vec![f32::NAN; inputs.sinks.map_or(0, count)];
        let outputs = BackwardOutputs {
            dq: Some(ViewMut::from_slice(&mut dq, query).unwrap()),
            dk: Some(ViewMut::from_slice(&mut dk, key).unwrap()),
            dv: Some(ViewMut::from_slice(&mut dv, key).unwrap()),
            dbias: inputs.bias.map(|bias| ViewMut::from_slice(&mut dbias, bias.shape()).unwrap()),
            dsinks: inputs.sinks.map(|sinks| ViewMut::from_slice(&mut dsinks, sinks.shape()).unwrap()),
        };
        let call = BackwardCall::new(self.backward.problem(), inputs, saved, outputs).unwrap();
        self.backward.backward(call, scratch(&*self.backward).scratch()).unwrap();
        Results {
            rows: [bits(&out), bits(&lse), bits(&dq)],
            keys: [bits(&dk), bits(&dv)],
            shared: [bits(&dbias), bits(&dsinks)],
        }
    }
}

fn bits<T: Scalar>(data: &[T]) -> Vec<u64> {
    data.iter().map(|x| x.to_f64().to_bits()).collect()
}

/// The bits of what both passes write.
#[derive(Debug, PartialEq)]
struct Results {
    /// out, lse and dq, `[B, T, ..]`.
    rows: [Vec<u64>; 3],
    /// dk and dv, `[B, S, ..]`.
    keys: [Vec<u64>; 2],
    /// dbias and dsinks.
    shared: [Vec<u64>; 2],
}

impl Results {
    /// What is of the first `queries` rows and `keys` keys of a batch row, of calls of these sizes; what lies
    /// behind them must be as padding is.
    fn of(&self, [batch, t, s, ..]: Sizes, at: usize, queries: usize, keys: usize) -> [Vec<u64>; 5] {
        let cut = |all: &Vec<u64>, length: usize, real: usize, padding: f64| {
            let row = all.len() / batch / length.max(1);
            let all = &all[at * length * row..(at + 1) * length * row];
            assert!(all[real * row..].iter().all(|&bits| bits == padding.to_bits()));
            all[..real * row].to_vec()
        };
        let [out, lse, dq] = &self.rows;
        let [dk, dv] = &self.keys;
        [
            cut(out, t, queries, 0.0),
            cut(lse, t, queries, f64::NEG_INFINITY),
            cut(dq, t, queries, 0.0),
            cut(dk, s, keys, 0.0),
            cut(dv, s, keys, 0.0),
        ]
    }
}

/// A cache with room for many keys, whose length passes the sizes at which calls are computed in other ways.
fn decode_loop<T: Scalar + Element, L: Scalar + Element>(tokens: usize, room: usize, filled: &[usize]) {
    let sizes = [1, tokens, room, 4, 2, 16];
    let tensors = Tensors::<T>::new(sizes, &mut Random(7));
    let backend = CpuBackend::new();
    fn numbers(length: &[i32; 1]) -> CallData<'_> {
        CallData {
            query_offset: QueryOffset::BottomRight,
            key_value_lengths: Some(View::from_slice(length, [1]).unwrap()),
            ..CallData::default()
        }
    }
    fn with<'a, T: Scalar>(tensors: &'a Tensors<T>, length: &'a [i32; 1]) -> Inputs<'a> {
        Inputs { data: numbers(length), ..tensors.inputs() }
    }
    let plans = Plans::new(&backend, with(&tensors, &[0]).problem().causal(true));
    for &length in filled {
        let lengths = [length as i32];
        let got = plans.run::<T, L>(with(&tensors, &lengths), tensors.d_out());
        // A plan of its own for the same call, and one of a cache that is exactly as long.
        let own = Plans::new(&backend, with(&tensors, &lengths).problem().causal(true));
        assert_eq!(
            got,
            own.run::<T, L>(with(&tensors, &lengths), tensors.d_out()),
            "{} of {length}",
            T::DTYPE
        );
        let Inputs { query, key, value, .. } = tensors.inputs();
        let [key, value] = [key, value].map(|cache| cache.narrow(1, 0..length).unwrap());
        let mut exact = Inputs::new(query, key, value);
        exact.data.query_offset = QueryOffset::BottomRight;
        let own = Plans::new(&backend, exact.problem().causal(true)).run::<T, L>(exact, tensors.d_out());
        let want = own.of([1, tokens, length, 4, 2, 16], 0, tokens, length);
        assert_eq!(got.of(sizes, 0, tokens, length), want, "{} of {length}", T::DTYPE);
    }
}

#[test]
fn a_growing_cache_is_decoded_under_one_plan() {
    let filled: Vec<usize> = (0..70).chain([127, 128, 129, 500, 1000, 1365, 1366, 1400]).collect();
    decode_loop::<f32, f32>(1, 1400, &filled);
    // 3 * 1365 logits are small in f32, 3 * 1366 are not; 3 rows of 2 heads are few, 5 are not.
    decode_loop::<f32, f32>(3, 1400, &filled);
    decode_loop::<f32, f32>(5, 1000, &[0, 1, 63, 64, 65, 819, 820, 1000]);
    decode_loop::<f64, f64>(1, 300, &[0, 1, 64, 65, 300]);
    decode_loop::<f16, f32>(2, 300, &[0, 1, 64, 65, 300]);
}

#[test]
fn lengths_and_offsets_are_read_from_any_integers() {
    let sizes = [2, 20, 90, 4, 2, 8];
    let tensors = Tensors::<f32>::new(sizes, &mut Random(3));
    let (queries, keys, offsets) = ([20i64, 3], [17i64, 90], [-3i64, 70]);
    let backend = CpuBackend::new();
    let run = |views: [View<'_>; 3]| {
        let [query_lengths, key_value_lengths, query_offsets] = views.map(Some);
        let data = CallData { query_lengths, key_value_lengths, query_offsets, ..CallData::default() };
        let inputs = Inputs { data, ..tensors.inputs() };
        let plans = Plans::new(&backend, inputs.problem().causal(true));
        plans.run::<f32, f32>(inputs, tensors.d_out())
    };
    let all = [queries, keys, offsets];
    let want = run(all.each_ref().map(|numbers| View::from_slice(numbers, [2]).unwrap()));
    let i32s = all.map(|numbers| numbers.map(|number| number as i32));
    assert_eq!(run(i32s.each_ref().map(|numbers| View::from_slice(numbers, [2]).unwrap())), want);
    let u32s = [queries, keys].map(|numbers| numbers.map(|number| number as u32));
    let mut views = all.each_ref().map(|numbers| View::from_slice(numbers, [2]).unwrap());
    for (view, numbers) in views.iter_mut().zip(&u32s) {
        *view = View::from_slice(numbers, [2]).unwrap();
    }
    assert_eq!(run(views), want);
    // With gaps that hold what no length is, and backwards.
    let spread = i32s.map(|[first, second]| [i32::MIN, first, -1, second]);
    assert_eq!(run(spread.each_ref().map(|numbers| View::strided(numbers, 1, [2], [2]).unwrap())), want);
    let backwards = all.map(|[first, second]| [second, first]);
    assert_eq!(run(backwards.each_ref().map(|numbers| View::strided(numbers, 1, [2], [-1]).unwrap())), want);
    // The same number for every batch row.
    let same = [[9i64; 2], [40; 2], [5; 2]];
    let expanded = same.each_ref().map(|numbers| View::strided(numbers, 0, [2], [0]).unwrap());
    assert_eq!(run(expanded), run(same.each_ref().map(|numbers| View::from_slice(numbers, [2]).unwrap())));
}

#[test]
fn numbers_of_any_size_are_the_calls_alone() {
    let tensors = Tensors::<f32>::new([1, 30, 150, 2, 1, 8], &mut Random(5));
    let backend = CpuBackend::new();
    let base = CallData {
        scale: Some(-1.0),
        softcap: Some(1.0),
        query_offset: QueryOffset::Fixed(i64::MAX),
        dropout: Some(Dropout::new(0.25, 0)),
        ..CallData::default()
    };
    let mut seen = Vec::new();
    let with = |data| Inputs { data, alibi_slopes: Some(tensors.per_head()), ..tensors.inputs() };
    let window = Window { left: Some(40), right: None };
    let problem = |data| with(data).problem().causal(true).window(window);
    let plans = Plans::new(&backend, problem(base));
    for data in [
        CallData { query_offset: QueryOffset::Fixed(0), ..base },
        CallData { query_offset: QueryOffset::Fixed(100), ..base },
        CallData { query_offset: QueryOffset::Fixed(170), ..base },
        CallData { query_offset: QueryOffset::Fixed(i64::MIN), ..base },
        CallData { query_offset: QueryOffset::Fixed(20), scale: None, ..base },
        CallData { query_offset: QueryOffset::Fixed(20), scale: Some(1e3), ..base },
        CallData { query_offset: QueryOffset::Fixed(20), scale: Some(1e30), softcap: Some(30.0), ..base },
        CallData {
            query_offset: QueryOffset::Fixed(20),
            dropout: Some(Dropout::new(0.25, u64::MAX)),
            ..base
        },
        CallData {
            query_offset: QueryOffset::Fixed(20),
            dropout: Some(Dropout::new(0.25, 0).with_offset(1)),
            ..base
        },
    ] {
        let got = plans.run::<f32, f32>(with(data), tensors.d_out());
        // A plan of the problem that these numbers announce, which may have fewer scales or offsets.
        let own = Plans::new(&backend, problem(data));
        assert_eq!(got, own.run::<f32, f32>(with(data), tensors.d_out()), "{data:?}");
        seen.push(got);
    }
    // Rows before all keys and behind the window see nothing: two of the calls are empty, and no others are
    // alike.
    for (index, one) in seen.iter().enumerate() {
        for (other_index, other) in seen.iter().enumerate().skip(index + 1) {
            let empty = |index: usize| seen[index].rows[0].iter().all(|&bits| bits == 0);
            assert!(one != other || (empty(index) && empty(other_index)), "{index} {other_index}");
        }
    }
}

/// A seed as a tensor gives the bits of the same number.
#[test]
fn seeds_as_tensors_drop_the_same() {
    let tensors = Tensors::<f32>::new([2, 20, 70, 2, 1, 8], &mut Random(11));
    let backend = CpuBackend::new();
    let run = |data| {
        let inputs = Inputs { data, ..tensors.inputs() };
        Plans::new(&backend, inputs.problem()).run::<f32, f32>(inputs, tensors.d_out())
    };
    let number = |seed, offset| {
        let dropout = Some(Dropout::new(0.5, seed).with_offset(offset));
        run(CallData { dropout, ..CallData::default() })
    };
    fn data<'a, S: Element, O: Element>(seed: &'a [S], offset: &'a [O]) -> CallData<'a> {
        CallData {
            dropout: Some(Dropout::new(0.5, 123).with_offset(45)),
            dropout_seed: Some(View::from_slice(seed, [1]).unwrap()),
            dropout_offset: Some(View::from_slice(offset, [1]).unwrap()),
            ..CallData::default()
        }
    }
    let minus_one = run(data(&[-1i32], &[-1i64]));
    assert_eq!(minus_one, number(u64::MAX, u32::MAX));
    assert_eq!(run(data(&[u32::MAX], &[7u32])), number(u32::MAX.into(), 7));
    assert_eq!(run(data(&[0x1234_5678_9ABC_DEF0i64], &[8i32])), number(0x1234_5678_9ABC_DEF0, 8));
    assert_ne!(minus_one, number(123, 45));
}

/// A problem with lengths, offsets or both, and some calls of it.
fn random_calls<T: Scalar + Element, L: Scalar + Element>(random: &mut Random) {
    let key_heads = random.one_of(&[1, 1, 2, 3]);
    let heads = key_heads * random.one_of(&[1, 1, 2, 4, 9]);
    let (long, keys) = random.one_of(&[(false, 1500), (false, 70), (true, 70), (true, 400)]);
    let queries = if long { random.one_of(&[70, 130, 600]) } else { random.one_of(&[1, 2, 3, 9, 20]) };
    let batch = 1 + random.below(3);
    let sizes = [batch, queries, 1 + random.below(keys), heads, key_heads, random.one_of(&[2, 8])];
    let [_, t, s, ..] = sizes;
    let tensors = Tensors::<T>::new(sizes, random);
    let [left, right] = [(); 2].map(|()| random.coin().then(|| random.below(s + 10)));
    let (window, causal) = (Window { left, right }, random.coin());
    let [has_queries, has_keys, has_bias, has_sinks, has_softcap] = [(); 5].map(|()| random.coin());
    let kind = random.below(4);
    let threads = random.one_of(&[1, 3]);
    let backend = CpuBackend::with_config(CpuConfig::default().threads(threads));

    let mut plans = None;
    for _ in 0..4 {
        // Full, empty, and any lengths.
        let mut length = |most: usize| match random.below(4) {
            0 => most,
            1 => random.below(most.min(10) + 1),
            _ => random.below(most + 1),
        };
        let queries: Vec<i32> = (0..batch).map(|_| length(t) as i32).collect();
        let keys: Vec<i64> = (0..batch).map(|_| length(s) as i64).collect();
        let offsets: Vec<i64> = (0..batch).map(|_| random.below(s + t + 20) as i64 - t as i64 - 10).collect();
        let data = CallData {
            softcap: has_softcap.then(|| 0.5 + random.below(10) as f64),
            query_lengths: has_queries.then(|| View::from_slice(&queries, [batch]).unwrap()),
            key_value_lengths: has_keys.then(|| View::from_slice(&keys, [batch]).unwrap()),
            query_offset: match kind {
                0 => QueryOffset::BottomRight,
                // Not 0, for which another problem would be made.
                1 => QueryOffset::Fixed(if offsets[0] == 0 { 1 } else { offsets[0] }),
                _ => QueryOffset::TOP_LEFT,
            },
            query_offsets: (kind == 2).then(|| View::from_slice(&offsets, [batch]).unwrap()),
            ..CallData::default()
        };
        let mut inputs = tensors.inputs();
        inputs.data = data;
        inputs.bias = has_bias.then(|| tensors.bias());
        inputs.sinks = has_sinks.then(|| tensors.per_head());
        let plans =
            plans.get_or_insert_with(|| Plans::new(&backend, inputs.problem().causal(causal).window(window)));
        let got = plans.run::<T, L>(inputs, tensors.d_out());

        // Each batch row alone, of exactly its lengths.
        for at in 0..batch {
            let queries = if has_queries { queries[at] as usize } else { t };
            let keys = if has_keys { keys[at] as usize } else { s };
            let mut alone = inputs;
            alone.query = inputs.query.narrow(0, at..at + 1).unwrap().narrow(1, 0..queries).unwrap();
            alone.key = inputs.key.narrow(0, at..at + 1).unwrap().narrow(1, 0..keys).unwrap();
            alone.value = inputs.value.narrow(0, at..at + 1).unwrap().narrow(1, 0..keys).unwrap();
            alone.bias = inputs.bias.map(|bias| bias.narrow(3, 0..keys).unwrap());
            let query_offset = if kind == 2 { QueryOffset::Fixed(offsets[at]) } else { data.query_offset };
            alone.data = CallData { query_offset, softcap: data.softcap, ..CallData::default() };
            let d_out = tensors.d_out().narrow(0, at..at + 1).unwrap().narrow(1, 0..queries).unwrap();
            let own = Plans::new(&backend, alone.problem().causal(causal).window(window));
            let own = own.run::<T, L>(alone, d_out);
            let [_, _, _, n, k, h] = sizes;
            let want = own.of([1, queries, keys, n, k, h], 0, queries, keys);
            let what = format!("{} {} row {at}: {queries} {keys}", T::DTYPE, plans.forward.problem());
            let names = ["out", "lse", "dq", "dk", "dv"];
            for ((name, got), want) in names.iter().zip(got.of(sizes, at, queries, keys)).zip(want) {
                assert!(got == want, "{name} of {what}");
            }
            if batch == 1 {
                let [dbias, dsinks] = &got.shared;
                assert!(dbias[..dbias.len().min(keys)] == own.shared[0][..], "dbias of {what}");
                assert!(*dsinks == own.shared[1], "dsinks of {what}");
            }
        }
    }
}

#[test]
fn the_planned_scratch_is_enough_for_every_call() {
    let mut random = Random(2026);
    for _ in 0..60 {
        random_calls::<f32, f32>(&mut random);
        random_calls::<f64, f64>(&mut random);
        random_calls::<f16, f32>(&mut random);
    }
}

/// Scratch is sized by bounds, which are those of the tensors: lengths take no more than a call without them
/// does, but for what smaller batch rows take in other ways.
#[test]
fn lengths_do_not_change_what_full_rows_take() {
    let sizes = [2, 300, 700, 4, 2, 32];
    let tensors = Tensors::<f16>::new(sizes, &mut Random(1));
    let backend = CpuBackend::with_config(CpuConfig::default().threads(2));
    let builder = || tensors.inputs().problem().causal(true);
    let bytes = |builder: ProblemBuilder| backend.scratch_bytes(&builder.build().unwrap()).unwrap();
    let dense = bytes(builder());
    assert_eq!(bytes(builder().query_lengths(DType::I32).key_value_lengths(DType::I32)), dense);
    let aligned = || builder().alignment(Alignment::BottomRight);
    assert_eq!(bytes(aligned().key_value_lengths(DType::I32)), bytes(aligned()));
}
