//! A naive backend: the formula, one logit at a time in f64, with everything configurable that a choice looks
//! at.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use attention::core::{
    BackendFailure, BackwardCall, CallProblem, Capabilities, DropoutStream, Error, Feature, FeatureSet,
    ForwardCall, PassCapabilities, Plan, Scratch, ScratchGrowth, SequenceRows,
};
use attention::{
    AttentionBackend, DType, DeviceKind, NumericsClass, Problem, Registry, Scalar, Unavailable, Unsupported,
    View, ViewMut, bf16, f16,
};

#[derive(Debug)]
pub(crate) struct Toy {
    name: String,
    pub(crate) version: String,
    pub(crate) capabilities: Capabilities,
    pub(crate) unavailable: Option<Unavailable>,
    pub(crate) scratch: usize,
    /// What it says when it is to plan.
    pub(crate) planning: Planning,
    /// Every call that was run.
    pub(crate) seen: Arc<Mutex<Vec<Seen>>>,
    plans: AtomicUsize,
}

/// A call that was run: its problem, and its numbers as a backend has them.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Seen {
    pub(crate) problem: Problem,
    pub(crate) scale: f64,
    pub(crate) softcap: Option<f64>,
    pub(crate) dropout: Option<DropoutStream>,
    pub(crate) rows: Vec<SequenceRows>,
}

/// How planning ends.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Planning {
    Succeeds,
    Fails,
    ShowsALimit,
}

impl Toy {
    pub(crate) fn new(name: &str) -> Self {
        let all = PassCapabilities::new(FeatureSet::all().with(Feature::BatchInvariant));
        let numerics = [(DType::F64, NumericsClass::F64), (DType::F32, NumericsClass::F32)];
        Self {
            name: name.to_owned(),
            version: "1.2.3".to_owned(),
            capabilities: Capabilities::new(DeviceKind::Cpu, numerics, all.clone(), ScratchGrowth::Constant)
                .with_backward(all),
            unavailable: None,
            scratch: 0,
            planning: Planning::Succeeds,
            seen: Arc::default(),
            plans: AtomicUsize::new(0),
        }
    }

    pub(crate) fn scratch(mut self, bytes: usize) -> Self {
        self.scratch = bytes;
        self
    }

    pub(crate) fn planning(mut self, planning: Planning) -> Self {
        self.planning = planning;
        self
    }

    pub(crate) fn numerics(mut self, numerics: &[(DType, NumericsClass)]) -> Self {
        self.capabilities.numerics = numerics.to_vec();
        self
    }

    pub(crate) fn device(mut self, device: DeviceKind) -> Self {
        self.capabilities.device = device;
        self
    }

    pub(crate) fn missing(mut self, what: &str, looked_for: &[&str]) -> Self {
        self.unavailable = Some(Unavailable {
            backend: self.name.clone(),
            what: what.to_owned(),
            looked_for: looked_for.iter().map(|&name| name.to_owned()).collect(),
        });
        self
    }

    pub(crate) fn arc(self) -> Arc<Self> {
        Arc::new(self)
    }

    /// The problem of the last call.
    pub(crate) fn last(&self) -> Problem {
        self.last_call().problem
    }

    pub(crate) fn last_call(&self) -> Seen {
        self.seen.lock().unwrap().last().expect("it ran").clone()
    }

    pub(crate) fn runs(&self) -> usize {
        self.seen.lock().unwrap().len()
    }

    /// How often it was asked to plan.
    pub(crate) fn plans(&self) -> usize {
        self.plans.load(Ordering::Relaxed)
    }
}

/// A registry of these, in this order.
pub(crate) fn registry<const N: usize>(toys: [Arc<Toy>; N]) -> Registry {
    toys.into_iter().fold(Registry::empty(), |registry, toy| registry.with(toy))
}

impl AttentionBackend for Toy {
    fn name(&self) -> &str {
        &self.name
    }

    fn version(&self) -> &str {
        &self.version
    }

    fn capabilities(&self) -> &Capabilities {
        &self.capabilities
    }

    fn available(&self) -> Result<(), Unavailable> {
        self.unavailable.clone().map_or(Ok(()), Err)
    }

    fn supports(&self, problem: &Problem) -> Result<(), Unsupported> {
        self.capabilities.check(&self.name, problem)
    }

    fn scratch_bytes(&self, problem: &Problem) -> Result<usize, Unsupported> {
        self.supports(problem).map(|()| self.scratch)
    }

    fn plan(&self, problem: &Problem) -> Result<Arc<dyn Plan>, Error> {
        self.supports(problem)?;
        self.plans.fetch_add(1, Ordering::Relaxed);
        let backend = self.name.clone();
        match self.planning {
            Planning::Succeeds => Ok(Arc::new(ToyPlan {
                problem: problem.clone(),
                name: backend,
                scratch: self.scratch,
                seen: self.seen.clone(),
            })),
            Planning::Fails => {
                let operation = "building a plan".to_owned();
                Err(BackendFailure { backend, operation, source: "no engine".into() }.into())
            }
            Planning::ShowsALimit => {
                Err(Unsupported::ScratchLimit { backend, needed: 2048, limit: 1024 }.into())
            }
        }
    }
}

/// A plan of a [`Toy`].
#[derive(Debug)]
struct ToyPlan {
    problem: Problem,
    name: String,
    scratch: usize,
    seen: Arc<Mutex<Vec<Seen>>>,
}

impl ToyPlan {
    fn start(&self, call: &CallProblem<'_>, scratch: &Scratch<'_>) -> Result<(), Error> {
        self.admit(call.problem(), scratch)?;
        let seen = Seen {
            problem: call.problem().clone(),
            scale: call.scale(),
            softcap: call.softcap(),
            dropout: call.dropout_stream(),
            rows: (0..call.dims().batch).map(|batch| call.sequence(batch)).collect(),
        };
        self.seen.lock().unwrap().push(seen);
        Ok(())
    }
}

impl Plan for ToyPlan {
    fn backend(&self) -> &str {
        &self.name
    }

    fn problem(&self) -> &Problem {
        &self.problem
    }

    fn scratch_bytes(&self) -> usize {
        self.scratch
    }

    fn forward(&self, call: ForwardCall<'_>, scratch: Scratch<'_>) -> Result<(), Error> {
        let (problem, inputs, outputs) = call.into_parts();
        self.start(&problem, &scratch)?;
        let logits = Logits::new(&problem, &inputs);
        let (mut out, mut lse) = (Writer::new(outputs.out), outputs.lse.map(Writer::new));
        for [b, t, n] in rows(&problem) {
            let (row, [outer, inner]) = (logits.row(b, t, n), problem.query_places(b).of(t));
            for h in 0..problem.dims().value_head_dim {
                let value = |key: &Key| at(&inputs.value, &[key.place[0], key.place[1], row.k, h]);
                let sum = row.keys.iter().map(|key| key.p * key.keep * value(key));
                out.set(&[outer, inner, n, h], sum.sum());
            }
            if let Some(lse) = &mut lse {
                lse.set(&[outer, inner, n], row.lse);
            }
        }
        for row in problem.query_rows_of_no_sequence() {
            for n in 0..problem.dims().query_heads {
                (0..problem.dims().value_head_dim).for_each(|h| out.set(&[0, row, n, h], 0.0));
                lse.iter_mut().for_each(|lse| lse.set(&[0, row, n], f64::NEG_INFINITY));
            }
        }
        Ok(())
    }

    fn backward(&self, call: BackwardCall<'_>, scratch: Scratch<'_>) -> Result<(), Error> {
        let (problem, inputs, saved, outputs) = call.into_parts();
        self.start(&problem, &scratch)?;
        let logits = Logits::new(&problem, &inputs);
        let dims = problem.dims();
        let [mut dq, mut dk, mut dv, mut dbias, mut dsinks] =
            [outputs.dq, outputs.dk, outputs.dv, outputs.dbias, outputs.dsinks]
                .map(|view| view.map(Sum::new));
        for [b, t, n] in rows(&problem) {
            let (row, [outer, inner]) = (logits.row(b, t, n), problem.query_places(b).of(t));
            let d_out = |h: usize| at(&saved.d_out, &[outer, inner, n, h]);
            let d_lse = saved.d_lse.map_or(0.0, |d_lse| at(&d_lse, &[outer, inner, n]));
            let dot = |h: usize| d_out(h) * at(&saved.out, &[outer, inner, n, h]);
            let delta = (0..dims.value_head_dim).map(dot).sum::<f64>() - d_lse;
            let lse = at(&saved.lse, &[outer, inner, n]);
            if let (Some(dsinks), Some(sinks), true) = (&mut dsinks, inputs.sinks, row.real) {
                dsinks.add(&[n], -(at(&sinks, &[n]) - lse).exp() * delta);
            }
            for key in &row.keys {
                let [page, slot] = key.place;
                let value = |h: usize| d_out(h) * at(&inputs.value, &[page, slot, row.k, h]);
                let dp = key.keep * (0..dims.value_head_dim).map(value).sum::<f64>();
                let dx = key.p * (dp - delta);
                let product = dx * key.softcap * problem.scale();
                for h in 0..dims.value_head_dim {
                    dv.iter_mut().for_each(|dv| dv.add(&[page, slot, row.k, h], key.p * key.keep * d_out(h)));
                }
                for h in 0..dims.head_dim {
                    let q = at(&inputs.query, &[outer, inner, n, h]);
                    let k = at(&inputs.key, &[page, slot, row.k, h]);
                    dq.iter_mut().for_each(|dq| dq.add(&[outer, inner, n, h], product * k));
                    dk.iter_mut().for_each(|dk| dk.add(&[page, slot, row.k, h], product * q));
                }
                dbias.iter_mut().for_each(|dbias| dbias.add(&[b, n, t, key.j], dx));
            }
        }
        [dq, dk, dv, dbias, dsinks].into_iter().flatten().for_each(Sum::write);
        Ok(())
    }
}

/// Batch row, row within it, and head of every query row, padding included.
fn rows(problem: &CallProblem<'_>) -> impl Iterator<Item = [usize; 3]> {
    let heads = problem.dims().query_heads;
    let rows = move |b: usize| indices(&[problem.query_places(b).rows(), heads]);
    let sequences = 0..problem.dims().batch;
    sequences.flat_map(move |b| rows(b).into_iter().map(move |row| [b, row[0], row[1]]))
}

fn indices(shape: &[usize]) -> Vec<Vec<usize>> {
    shape.iter().fold(vec![vec![]], |prefixes, &size| {
        let with = |prefix: Vec<usize>| (0..size).map(move |index| [&prefix[..], &[index]].concat());
        prefixes.into_iter().flat_map(with).collect()
    })
}

/// An element of a view of any float dtype, broadcast along axes of size 1.
fn at(view: &View<'_>, index: &[usize]) -> f64 {
    let index: Vec<_> = index.iter().zip(view.shape().iter()).map(|(&i, &size)| i.min(size - 1)).collect();
    fn of<T: Scalar>(view: &View<'_>, index: &[usize]) -> f64 {
        view.host::<T>().unwrap().at(index).to_f64()
    }
    match view.desc().dtype() {
        DType::F64 => of::<f64>(view, &index),
        DType::F32 => of::<f32>(view, &index),
        DType::F16 => of::<f16>(view, &index),
        _ => of::<bf16>(view, &index),
    }
}

struct Writer<'a>(ViewMut<'a>);

impl<'a> Writer<'a> {
    fn new(view: ViewMut<'a>) -> Self {
        Self(view)
    }

    fn set(&mut self, index: &[usize], value: f64) {
        fn of<T: Scalar>(view: ViewMut<'_>, index: &[usize], value: f64) {
            view.host_mut::<T>().unwrap().set(index, T::from_f64(value));
        }
        let view = self.0.reborrow();
        match view.desc().dtype() {
            DType::F64 => of::<f64>(view, index, value),
            DType::F32 => of::<f32>(view, index, value),
            DType::F16 => of::<f16>(view, index, value),
            _ => of::<bf16>(view, index, value),
        }
    }
}

/// Adds up in f64 what goes to one element, with broadcast axes folded.
struct Sum<'a> {
    target: Writer<'a>,
    sums: std::collections::HashMap<Vec<usize>, f64>,
}

impl<'a> Sum<'a> {
    fn new(view: ViewMut<'a>) -> Self {
        Self { target: Writer::new(view), sums: Default::default() }
    }

    fn add(&mut self, index: &[usize], value: f64) {
        let shape = self.target.0.shape();
        let index = index.iter().zip(shape.iter()).map(|(&i, &size)| i.min(size - 1)).collect();
        *self.sums.entry(index).or_default() += value;
    }

    fn write(mut self) {
        for index in indices(&self.target.0.shape()) {
            self.target.set(&index, self.sums.get(&index).copied().unwrap_or(0.0));
        }
    }
}

struct Logits<'a, 'v> {
    problem: &'a CallProblem<'a>,
    inputs: &'a attention::core::Inputs<'v>,
}

struct Row {
    k: usize,
    lse: f64,
    real: bool,
    keys: Vec<Key>,
}

struct Key {
    j: usize,
    /// The first two indices of its row.
    place: [usize; 2],
    p: f64,
    keep: f64,
    softcap: f64,
}

impl<'a, 'v> Logits<'a, 'v> {
    fn new(problem: &'a CallProblem<'a>, inputs: &'a attention::core::Inputs<'v>) -> Self {
        Self { problem, inputs }
    }

    fn row(&self, b: usize, t: usize, n: usize) -> Row {
        let (problem, inputs, dims) = (self.problem, self.inputs, self.problem.dims());
        let k = n / dims.group_size();
        let position = problem.position(b, t);
        let mut logits = Vec::new();
        for j in problem.key_range(b, t) {
            let masked = inputs.mask.and_then(|mask| mask.host_mask()).is_some_and(|mask| {
                let index = [b, n, t, j];
                let index: Vec<_> =
                    index.iter().zip(mask.shape().iter()).map(|(&i, &size)| i.min(size - 1)).collect();
                mask.at(&index) == 0
            });
            let ([outer, inner], [page, slot]) = (problem.query_places(b).of(t), problem.key_places(b).of(j));
            let product =
                |h: usize| at(&inputs.query, &[outer, inner, n, h]) * at(&inputs.key, &[page, slot, k, h]);
            let mut x = problem.scale() * (0..dims.head_dim).map(product).sum::<f64>();
            let mut softcap = 1.0;
            if let Some(c) = problem.softcap() {
                let tanh = (x / c).tanh();
                (x, softcap) = (c * tanh, 1.0 - tanh * tanh);
            }
            if let Some(slopes) = inputs.alibi_slopes {
                let index = if slopes.shape().rank() == 1 { vec![n] } else { vec![b, n] };
                x -= at(&slopes, &index) * (position - j as i64).abs() as f64;
            }
            x += inputs.bias.map_or(0.0, |bias| at(&bias, &[b, n, t, j]));
            if !masked && x != f64::NEG_INFINITY {
                logits.push((j, x, softcap));
            }
        }
        let real = t < problem.query_len(b);
        let sink = inputs.sinks.filter(|_| real).map(|sinks| at(&sinks, &[n]));
        let max = logits.iter().map(|&(_, x, _)| x).chain(sink).fold(f64::NEG_INFINITY, f64::max);
        let sum: f64 = logits.iter().map(|&(_, x, _)| x).chain(sink).map(|x| (x - max).exp()).sum();
        let lse = if sum == 0.0 { f64::NEG_INFINITY } else { max + sum.ln() };
        let keep = |j: usize| {
            problem.dropout_stream().map_or(1.0, |stream| {
                let row = (b * dims.query_heads + n) as u32;
                if stream.keeps(row, t as u32, j as u32) { stream.keep_scale() } else { 0.0 }
            })
        };
        let keys = logits.into_iter().map(|(j, x, softcap)| {
            let p = (x - lse).exp();
            Key { j, place: problem.key_places(b).of(j), p, keep: keep(j), softcap }
        });
        Row { k, lse, real, keys: keys.collect() }
    }
}

/// A call on what this build has for host memory, or on the naive backend where it has nothing.
#[cfg(any(feature = "ndarray", feature = "dlpack"))]
pub(crate) fn attention<'a>() -> attention::Attention<'a> {
    let call = attention::Attention::new();
    if cfg!(any(feature = "chunked", feature = "cpu")) {
        return call;
    }
    call.registry(&registry([Toy::new("toy").arc()]))
}

/// A call on what this build has for host memory, and on the naive backend for what that does not serve.
#[cfg(any(feature = "ndarray", feature = "dlpack"))]
pub(crate) fn served<'a>() -> attention::Attention<'a> {
    attention::Attention::new().registry(&Registry::default().with(Toy::new("toy").arc()))
}

/// Numbers between -1 and 1 that look random and are the same every time.
pub(crate) fn numbers(count: usize, seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let next = || {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    };
    std::iter::repeat_with(next).take(count).collect()
}

/// Asserts that two slices are equal up to rounding.
#[cfg(feature = "cpu")]
#[track_caller]
pub(crate) fn assert_close(got: &[f32], want: &[f32]) {
    assert_eq!(got.len(), want.len());
    for (index, (got, want)) in got.iter().zip(want).enumerate() {
        assert!((got - want).abs() <= 2e-6 * want.abs().max(1.0), "element {index}: got {got}, want {want}");
    }
}
