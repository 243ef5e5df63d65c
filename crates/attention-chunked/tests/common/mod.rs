//! Calls of both passes on data that a test makes, in any dtype.

#![allow(dead_code, reason = "each test uses some of it")]

pub(crate) mod sequences;

use attention_chunked::ChunkedBackend;
use attention_core::{
    AttentionBackend, BackwardCall, BackwardInputs, BackwardOutputs, CallData, DType, Dims, Element,
    ForwardCall, ForwardOutputs, Gradients, Inputs, Lengths, QueryOffset, ScratchBuffer, Strides, View,
    ViewMut,
};
use half::{bf16, f16};

/// The numbers of a tensor in the dtype that a call has it in.
#[derive(Clone, Debug)]
pub(crate) enum Data {
    F64(Vec<f64>),
    F32(Vec<f32>),
    F16(Vec<f16>),
    Bf16(Vec<bf16>),
}

impl Data {
    pub(crate) fn new(dtype: DType, numbers: &[f64]) -> Self {
        match dtype {
            DType::F64 => Self::F64(numbers.to_vec()),
            DType::F32 => Self::F32(numbers.iter().map(|&x| x as f32).collect()),
            DType::F16 => Self::F16(numbers.iter().map(|&x| f16::from_f32(x as f32)).collect()),
            _ => Self::Bf16(numbers.iter().map(|&x| bf16::from_f32(x as f32)).collect()),
        }
    }

    pub(crate) fn of(dtype: DType, count: usize, value: f64) -> Self {
        Self::new(dtype, &vec![value; count])
    }

    pub(crate) fn numbers(&self) -> Vec<f64> {
        match self {
            Self::F64(data) => data.clone(),
            Self::F32(data) => data.iter().map(|&x| f64::from(x)).collect(),
            Self::F16(data) => data.iter().map(|x| x.to_f64()).collect(),
            Self::Bf16(data) => data.iter().map(|x| x.to_f64()).collect(),
        }
    }

    /// The bits, so that NaN and the signs of zeros count.
    pub(crate) fn bits(&self) -> Vec<u64> {
        match self {
            Self::F64(data) => data.iter().map(|x| x.to_bits()).collect(),
            Self::F32(data) => data.iter().map(|x| x.to_bits().into()).collect(),
            Self::F16(data) => data.iter().map(|x| x.to_bits().into()).collect(),
            Self::Bf16(data) => data.iter().map(|x| x.to_bits().into()).collect(),
        }
    }

    pub(crate) fn view<'a>(&'a self, shape: &[usize]) -> View<'a> {
        fn make<'a, T: Element>(data: &'a [T], shape: &[usize]) -> View<'a> {
            View::from_slice(data, dims(shape)).expect("the data has the shape")
        }
        match self {
            Self::F64(data) => make(data, shape),
            Self::F32(data) => make(data, shape),
            Self::F16(data) => make(data, shape),
            Self::Bf16(data) => make(data, shape),
        }
    }

    /// As [`view`](Self::view), of data whose last axis has a stride of two: every second element is another
    /// number.
    pub(crate) fn strided<'a>(&'a self, shape: &[usize]) -> View<'a> {
        fn make<'a, T: Element>(data: &'a [T], shape: &[usize]) -> View<'a> {
            View::strided(data, 0, dims(shape), strides(shape, 2)).expect("the data has the shape, twice")
        }
        match self {
            Self::F64(data) => make(data, shape),
            Self::F32(data) => make(data, shape),
            Self::F16(data) => make(data, shape),
            Self::Bf16(data) => make(data, shape),
        }
    }

    /// With strides in elements.
    pub(crate) fn view_with<'a>(&'a self, shape: &[usize], strides: &[isize]) -> View<'a> {
        fn make<'a, T: Element>(data: &'a [T], shape: &[usize], strides: &[isize]) -> View<'a> {
            let strides: Strides = strides.to_vec().try_into().expect("at most four axes");
            View::strided(data, 0, dims(shape), strides).expect("the data has the shape")
        }
        match self {
            Self::F64(data) => make(data, shape, strides),
            Self::F32(data) => make(data, shape, strides),
            Self::F16(data) => make(data, shape, strides),
            Self::Bf16(data) => make(data, shape, strides),
        }
    }

    /// With strides in elements.
    pub(crate) fn view_mut_with<'a>(&'a mut self, shape: &[usize], strides: &[isize]) -> ViewMut<'a> {
        fn make<'a, T: Element>(data: &'a mut [T], shape: &[usize], strides: &[isize]) -> ViewMut<'a> {
            let strides: Strides = strides.to_vec().try_into().expect("at most four axes");
            ViewMut::strided(data, 0, dims(shape), strides).expect("the data has the shape")
        }
        match self {
            Self::F64(data) => make(data, shape, strides),
            Self::F32(data) => make(data, shape, strides),
            Self::F16(data) => make(data, shape, strides),
            Self::Bf16(data) => make(data, shape, strides),
        }
    }

    pub(crate) fn view_mut<'a>(&'a mut self, shape: &[usize]) -> ViewMut<'a> {
        fn make<'a, T: Element>(data: &'a mut [T], shape: &[usize]) -> ViewMut<'a> {
            ViewMut::from_slice(data, dims(shape)).expect("the data has the shape")
        }
        match self {
            Self::F64(data) => make(data, shape),
            Self::F32(data) => make(data, shape),
            Self::F16(data) => make(data, shape),
            Self::Bf16(data) => make(data, shape),
        }
    }
}

pub(crate) fn dims(shape: &[usize]) -> Dims {
    shape.to_vec().try_into().expect("at most four axes")
}

/// Of dense rows whose elements are `last` apart.
fn strides(shape: &[usize], last: isize) -> Strides {
    let mut strides = vec![last; shape.len()];
    for axis in (1..shape.len()).rev() {
        strides[axis - 1] = strides[axis] * shape[axis] as isize;
    }
    strides.try_into().expect("at most four axes")
}

/// Numbers between -1 and 1 that are reproducible and look random.
pub(crate) fn random(count: usize, seed: u32) -> Vec<f64> {
    let mut state = seed.wrapping_mul(2_654_435_761).wrapping_add(12345);
    (0..count)
        .map(|_| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            f64::from(state >> 8) / f64::from(1u32 << 23) - 1.0
        })
        .collect()
}

/// A call; the tensors' numbers are rounded to the dtype.
#[derive(Clone, Debug)]
pub(crate) struct Case {
    pub(crate) dtype: DType,
    /// Batch, queries, keys, query heads, key/value heads, head dimension (of values too).
    pub(crate) sizes: [usize; 6],
    pub(crate) query: Vec<f64>,
    pub(crate) key: Vec<f64>,
    pub(crate) value: Vec<f64>,
    pub(crate) d_out: Vec<f64>,
    pub(crate) d_lse: f64,
    pub(crate) scale: Option<f64>,
    pub(crate) softcap: Option<f64>,
    pub(crate) causal: bool,
    pub(crate) offset: i64,
    pub(crate) key_lengths: Option<usize>,
    /// Of one shape that broadcasts to `[B, N, T, S]`, in a dtype of its own.
    pub(crate) bias: Option<(DType, Vec<f64>, Vec<usize>)>,
    /// Whether the last axis of bias and mask has a stride.
    pub(crate) strided: bool,
    pub(crate) mask: Option<(Vec<bool>, Vec<usize>)>,
    pub(crate) slopes: Option<Vec<f64>>,
    pub(crate) sinks: Option<Vec<f64>>,
}

/// What both passes gave.
#[derive(Clone, Debug)]
pub(crate) struct Results {
    pub(crate) out: Data,
    pub(crate) lse: Data,
    pub(crate) dq: Data,
    pub(crate) dk: Data,
    pub(crate) dv: Data,
    pub(crate) dbias: Option<Data>,
    pub(crate) dsinks: Option<Data>,
}

impl Results {
    pub(crate) fn named(&self) -> impl Iterator<Item = (&'static str, &Data)> {
        [("out", &self.out), ("lse", &self.lse), ("dq", &self.dq), ("dk", &self.dk), ("dv", &self.dv)]
            .into_iter()
            .chain(self.dbias.as_ref().map(|data| ("dbias", data)))
            .chain(self.dsinks.as_ref().map(|data| ("dsinks", data)))
    }

    /// That everything has the same bits, apart from what `but` names.
    pub(crate) fn assert_same(&self, other: &Self, but: &[&str], what: &str) {
        for ((name, got), (_, want)) in
            self.named().zip(other.named()).filter(|((name, _), _)| !but.contains(name))
        {
            let (got, want) = (got.bits(), want.bits());
            let differ = got.iter().zip(&want).filter(|(a, b)| a != b).count();
            assert!(
                differ == 0 && got.len() == want.len(),
                "{what}: {differ} of {} differ in {name}",
                got.len()
            );
        }
    }

    pub(crate) fn assert_finite(&self, what: &str) {
        for (name, data) in self.named() {
            let wrong = data.numbers().iter().position(|x| !x.is_finite());
            assert_eq!(wrong, None, "{what}: {name} is not finite");
        }
    }
}

impl Case {
    /// Random queries, keys and values, and ones for the gradient of the output.
    pub(crate) fn new(dtype: DType, sizes: [usize; 6]) -> Self {
        let [batch, queries, keys, heads, key_heads, width] = sizes;
        Self {
            dtype,
            sizes,
            query: random(batch * queries * heads * width, 1),
            key: random(batch * keys * key_heads * width, 2),
            value: random(batch * keys * key_heads * width, 3),
            d_out: vec![1.0; batch * queries * heads * width],
            d_lse: 0.0,
            scale: None,
            softcap: None,
            causal: false,
            offset: 0,
            key_lengths: None,
            bias: None,
            strided: false,
            mask: None,
            slopes: None,
            sinks: None,
        }
    }

    pub(crate) fn run(&self, backend: &ChunkedBackend) -> Results {
        let [batch, queries, keys, heads, key_heads, width] = self.sizes;
        let (rows, columns) = ([batch, queries, heads, width], [batch, keys, key_heads, width]);
        let lse_shape = [batch, queries, heads];
        let new = |numbers: &[f64]| Data::new(self.dtype, numbers);
        let (q, k, v, d) = (new(&self.query), new(&self.key), new(&self.value), new(&self.d_out));
        let mut inputs = Inputs::new(q.view(&rows), k.view(&columns), v.view(&columns));
        let doubled = |numbers: &[f64], other: f64| -> Vec<f64> {
            if self.strided { numbers.iter().flat_map(|&x| [x, other]).collect() } else { numbers.to_vec() }
        };
        let bias = self
            .bias
            .as_ref()
            .map(|(dtype, numbers, shape)| (Data::new(*dtype, &doubled(numbers, 7.0)), shape));
        if let Some((data, shape)) = &bias {
            inputs.bias = Some(if self.strided { data.strided(shape) } else { data.view(shape) });
        }
        let mask: Option<(Vec<bool>, _)> = self.mask.as_ref().map(|(mask, shape)| {
            let data =
                if self.strided { mask.iter().flat_map(|&x| [x, true]).collect() } else { mask.clone() };
            (data, shape)
        });
        if let Some((data, shape)) = &mask {
            let strides = strides(shape, if self.strided { 2 } else { 1 });
            inputs.mask = Some(View::strided(data, 0, dims(shape), strides).expect("the mask has its shape"));
        }
        let slopes = self.slopes.as_ref().map(|slopes| Data::new(DType::F32, slopes));
        inputs.alibi_slopes = slopes.as_ref().map(|slopes| slopes.view(&[heads]));
        let sink_type = if self.dtype == DType::F64 { DType::F64 } else { DType::F32 };
        let sinks = self.sinks.as_ref().map(|sinks| Data::new(sink_type, sinks));
        inputs.sinks = sinks.as_ref().map(|sinks| sinks.view(&[heads]));
        let lengths = self.key_lengths.map_or(Lengths::Full, |length| Lengths::from(vec![length; batch]));
        inputs.data = CallData {
            scale: self.scale,
            softcap: self.softcap,
            query_offset: QueryOffset::Fixed(self.offset),
            key_value_lengths: lengths.view(),
            ..CallData::default()
        };
        let problem = || inputs.problem().causal(self.causal);
        let stats = if self.dtype == DType::F64 { DType::F64 } else { DType::F32 };
        let nan = f64::NAN;
        let mut out = Data::of(self.dtype, self.query.len(), nan);
        let mut lse = Data::of(stats, batch * queries * heads, nan);
        let forward = problem().lse(true).build().expect("a valid problem");
        let outputs = ForwardOutputs { out: out.view_mut(&rows), lse: Some(lse.view_mut(&lse_shape)) };
        let plan = backend.plan(&forward).expect("supported");
        let mut scratch = ScratchBuffer::new(plan.scratch_bytes());
        let call = ForwardCall::new(&forward, inputs, outputs).expect("a valid call");
        plan.forward(call, scratch.scratch()).expect("the call runs");

        let mut wanted = Gradients::QKV;
        if bias.is_some() {
            wanted = wanted | Gradients::BIAS;
        }
        if sinks.is_some() {
            wanted = wanted | Gradients::SINKS;
        }
        let [mut dq, mut dk, mut dv] =
            [&self.query, &self.key, &self.value].map(|like| Data::of(self.dtype, like.len(), nan));
        let mut dbias =
            self.bias.as_ref().map(|(dtype, numbers, shape)| (Data::of(*dtype, numbers.len(), nan), shape));
        let mut dsinks = sinks.as_ref().map(|_| Data::of(sink_type, heads, nan));
        let d_lse = Data::of(stats, batch * queries * heads, self.d_lse);
        {
            let backward = problem();
            let backward = backward.d_lse(self.d_lse != 0.0);
            let backward = backward.gradients(wanted).build().expect("a valid problem");
            let saved = BackwardInputs {
                out: out.view(&rows),
                lse: lse.view(&lse_shape),
                d_out: d.view(&rows),
                d_lse: (self.d_lse != 0.0).then(|| d_lse.view(&lse_shape)),
            };
            let outputs = BackwardOutputs {
                dq: Some(dq.view_mut(&rows)),
                dk: Some(dk.view_mut(&columns)),
                dv: Some(dv.view_mut(&columns)),
                dbias: dbias.as_mut().map(|(data, shape)| data.view_mut(shape)),
                dsinks: dsinks.as_mut().map(|data| data.view_mut(&[heads])),
            };
            let plan = backend.plan(&backward).expect("supported");
            let mut scratch = ScratchBuffer::new(plan.scratch_bytes());
            let call = BackwardCall::new(&backward, inputs, saved, outputs).expect("a valid call");
            plan.backward(call, scratch.scratch()).expect("the call runs");
        }
        Results { out, lse, dq, dk, dv, dbias: dbias.map(|(data, _)| data), dsinks }
    }
}
