//! Tests of both backends for device memory that need a GPU with cuDNN: one plan serves calls with different
//! lengths, offsets, scales and seeds, in host and in device memory, directly and in captured graphs. Run
//! with `--ignored`.

mod common;

use std::sync::Arc;

use attention_core::{
    AttentionBackend, BackwardCall, BackwardInputs, BackwardOutputs, CallData, DType, Dropout, ForwardCall,
    ForwardOutputs, Gradients, Inputs, Plan, Problem, ProblemBuilder, QueryOffset, Role, Scratch, TensorDesc,
    View,
};
use attention_cuda::cudarc::driver::CudaGraph;
use attention_cuda::cudarc::driver::sys::{CUgraphInstantiate_flags, CUstreamCaptureMode};
use attention_cuda::{CudaDevice, DeviceTensor};
use attention_cudnn::{CudnnBackend, CudnnConfig};
use common::{Result, backends, device, numbers};
use half::bf16;

/// The byte that outputs are filled with before a call, gaps included: NaN in every dtype.
const CANARY: u8 = 0xff;

/// A tensor without gaps but for those between batch rows, as large as one of them.
fn spread<const N: usize>(dtype: DType, shape: [usize; N]) -> Result<TensorDesc>
where
    [usize; N]: Into<attention_core::Dims>,
    [isize; N]: Into<attention_core::Strides>,
{
    let mut strides = [1_isize; N];
    for axis in (1..N).rev() {
        strides[axis - 1] = strides[axis] * shape[axis] as isize;
    }
    strides[0] *= 2;
    Ok(TensorDesc::strided(dtype, shape, strides).ok_or("ranks")?)
}

/// Sizes of a step: batch, queries, keys, heads, head dimension.
type Sizes = [usize; 5];

/// The tensors of a training step, of which queries see a longer cache of keys.
struct Step {
    device: CudaDevice,
    sizes: Sizes,
    causal: bool,
    query: DeviceTensor,
    key: DeviceTensor,
    value: DeviceTensor,
    d_out: DeviceTensor,
    out: DeviceTensor,
    lse: DeviceTensor,
    gradients: [DeviceTensor; 3],
}

/// Both passes, planned.
struct Plans {
    forward: Arc<dyn Plan>,
    backward: Arc<dyn Plan>,
}

/// The bytes of what a step writes: output, logsumexp, and the gradients as numbers.
#[derive(Clone, Debug)]
struct Results {
    out: Vec<bf16>,
    lse: Vec<u32>,
    gradients: [Vec<bf16>; 3],
}

impl Step {
    fn new(device: &CudaDevice, sizes: Sizes, causal: bool) -> Result<Self> {
        let [b, t, s, n, h] = sizes;
        let (rows, keys) = ([b, t, n, h], [b, s, n, h]);
        let send = |seed: u64, shape: [usize; 4]| -> Result<DeviceTensor> {
            let data = numbers(seed, shape.iter().product());
            Ok(DeviceTensor::from_host(device, View::from_slice(&data, shape)?)?)
        };
        let canaries = |desc| DeviceTensor::filled(device, desc, CANARY);
        Ok(Self {
            device: device.clone(),
            sizes,
            causal,
            query: send(1, rows)?,
            key: send(2, keys)?,
            value: send(3, keys)?,
            d_out: send(4, rows)?,
            out: canaries(spread(DType::Bf16, rows)?)?,
            lse: canaries(spread(DType::F32, [b, t, n])?)?,
            gradients: [
                canaries(spread(DType::Bf16, rows)?)?,
                canaries(spread(DType::Bf16, keys)?)?,
                canaries(spread(DType::Bf16, keys)?)?,
            ],
        })
    }

    /// Keys and values of which the first ones of each batch row, as many as its length says, are numbers and
    /// the others NaN.
    fn fill_cache(&mut self, lengths: &[usize]) -> Result {
        let [b, _, s, n, h] = self.sizes;
        for (seed, tensor) in [(2, &mut self.key), (3, &mut self.value)] {
            let mut data = numbers(seed, b * s * n * h);
            for (row, &length) in data.chunks_mut(s * n * h).zip(lengths) {
                row[length * n * h..].fill(bf16::NAN);
            }
            tensor.replace(View::from_slice(&data, [b, s, n, h])?)?;
        }
        Ok(())
    }

    fn inputs<'a>(&'a self, data: CallData<'a>) -> Result<Inputs<'a>> {
        Ok(Inputs { data, ..Inputs::new(self.query.view()?, self.key.view()?, self.value.view()?) })
    }

    /// The problems of calls with numbers like these.
    fn problems(&self, data: CallData<'_>) -> Result<[Problem; 2]> {
        let builder = || -> Result<ProblemBuilder> {
            let builder = self.inputs(data)?.problem().causal(self.causal);
            Ok(builder.layout(Role::Out, self.out.desc()).layout(Role::Lse, self.lse.desc()))
        };
        let mut backward = builder()?.gradients(Gradients::QKV);
        let roles = [Role::DQuery, Role::DKey, Role::DValue];
        for (role, gradient) in roles.into_iter().zip(&self.gradients) {
            backward = backward.layout(role, gradient.desc());
        }
        Ok([builder()?.lse(true).build()?, backward.build()?])
    }

    fn plan(&self, backend: &dyn AttentionBackend, data: CallData<'_>) -> Result<Plans> {
        let [forward, backward] = self.problems(data)?;
        Ok(Plans { forward: backend.plan(&forward)?, backward: backend.plan(&backward)? })
    }

    /// Enqueues both passes on the stream of their plans.
    fn enqueue(&mut self, plans: &Plans, data: CallData<'_>) -> Result {
        let (forward, backward) = (&plans.forward, &plans.backward);
        let (forward_scratch, backward_scratch) = (forward.lend_scratch(), backward.lend_scratch());
        self.enqueue_with(plans, data, [forward_scratch?.scratch(), backward_scratch?.scratch()])
    }

    fn enqueue_with(&mut self, plans: &Plans, data: CallData<'_>, scratch: [Scratch<'_>; 2]) -> Result {
        let Self { query, key, value, d_out, out, lse, gradients, .. } = self;
        let inputs = Inputs { data, ..Inputs::new(query.view()?, key.view()?, value.view()?) };
        let [forward_scratch, backward_scratch] = scratch;
        let outputs = ForwardOutputs { out: out.view_mut()?, lse: Some(lse.view_mut()?) };
        let call = ForwardCall::new(plans.forward.problem(), inputs, outputs)?;
        plans.forward.forward(call, forward_scratch)?;
        let saved = BackwardInputs { out: out.view()?, lse: lse.view()?, d_out: d_out.view()?, d_lse: None };
        let [dq, dk, dv] = gradients;
        let outputs = BackwardOutputs {
            dq: Some(dq.view_mut()?),
            dk: Some(dk.view_mut()?),
            dv: Some(dv.view_mut()?),
            ..BackwardOutputs::default()
        };
        let call = BackwardCall::new(plans.backward.problem(), inputs, saved, outputs)?;
        plans.backward.backward(call, backward_scratch)?;
        Ok(())
    }

    /// Writes this byte to all bytes of every output, gaps included; the outputs keep their addresses.
    fn fill(&mut self, byte: u8) -> Result {
        let Self { out, lse, gradients, .. } = self;
        for tensor in [out, lse].into_iter().chain(gradients) {
            let desc = tensor.desc();
            let (_, last) = desc.span().ok_or("elements")?;
            let bytes = vec![byte; (last + 1).unsigned_abs() * desc.dtype().size()];
            // SAFETY: `bytes` has all bytes from the first element of the description to its last,
            // initialised, and outlives the view; nothing writes them.
            let view = unsafe { View::from_raw_parts(bytes.as_ptr(), attention_core::Device::Cpu, desc) }?;
            tensor.replace(view)?;
            self.device.stream().synchronize()?;
        }
        Ok(())
    }

    /// Runs both passes and returns what they have written.
    fn run(&mut self, plans: &Plans, data: CallData<'_>) -> Result<Results> {
        self.enqueue(plans, data)?;
        self.results()
    }

    fn results(&self) -> Result<Results> {
        let halves =
            |tensor: &DeviceTensor| -> Result<Vec<bf16>> { Ok(tensor.to_vec::<bf16>()?.ok_or("bf16")?) };
        let lse = self.lse.to_vec::<f32>()?.ok_or("f32")?;
        let [dq, dk, dv] = &self.gradients;
        Ok(Results {
            out: halves(&self.out)?,
            lse: lse.into_iter().map(f32::to_bits).collect(),
            gradients: [halves(dq)?, halves(dk)?, halves(dv)?],
        })
    }

    /// Whether the gaps between batch rows of the outputs are as before.
    fn gaps_are_untouched(&self) -> Result<bool> {
        for tensor in [&self.out, &self.lse].into_iter().chain(&self.gradients) {
            let (desc, bytes) = (tensor.desc(), tensor.bytes()?);
            let row = desc.shape()[1..].iter().product::<usize>() * desc.dtype().size();
            if bytes.chunks(row).skip(1).step_by(2).flatten().any(|&byte| byte != CANARY) {
                return Ok(false);
            }
        }
        Ok(true)
    }
}

/// Asserts that outputs have the same bits, and that gradients are near: the order in which gradients of
/// queries are summed varies.
fn assert_same(got: &Results, want: &Results, what: &str) {
    let as_bits = |halves: &[bf16]| halves.iter().map(|x| x.to_bits()).collect::<Vec<u16>>();
    assert_eq!(as_bits(&got.out), as_bits(&want.out), "{what}: output");
    assert_eq!(got.lse, want.lse, "{what}: logsumexp");
    for (index, (got, want)) in got.gradients.iter().zip(&want.gradients).enumerate() {
        let largest = want.iter().map(|x| x.to_f32().abs()).fold(f32::MIN_POSITIVE, f32::max);
        let far = want.iter().zip(got).enumerate().find(|(_, (a, b))| {
            let near = (a.to_f32() - b.to_f32()).abs() <= 0.01 * largest;
            !near
        });
        assert!(far.is_none(), "{what}: gradient {index}: {far:?} of {largest}");
    }
}

fn assert_other(got: &Results, other: &Results, what: &str) {
    assert!(got.out != other.out && got.lse != other.lse, "{what}: the same results");
}

/// A new backend of this name, without plans.
fn again(device: &CudaDevice, name: &str) -> Arc<dyn AttentionBackend> {
    let [one, other] = backends(device);
    if one.name() == name { one } else { other }
}

fn on(device: &CudaDevice, data: &[i32]) -> Result<DeviceTensor> {
    Ok(DeviceTensor::from_host(device, View::from_slice(data, [data.len()])?)?)
}

/// Captures a graph of both passes without running them. Plans, kernels and workspaces are made before.
fn captured(step: &mut Step, plans: &Plans, data: CallData<'_>) -> Result<CudaGraph> {
    let stream = step.device.stream().clone();
    stream.begin_capture(CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL)?;
    let enqueued = step.enqueue(plans, data);
    let flags = CUgraphInstantiate_flags::CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH;
    let graph = stream.end_capture(flags)?;
    enqueued?;
    Ok(graph.ok_or("nothing was captured")?)
}

fn bottom_right(lengths: View<'_>) -> CallData<'_> {
    CallData {
        query_offset: QueryOffset::BottomRight,
        key_value_lengths: Some(lengths),
        ..CallData::default()
    }
}

/// A decoder's cache, by one plan with lengths in host memory, one with lengths on the device, and a new plan
/// per call.
#[test]
#[ignore = "needs a GPU with cuDNN"]
fn one_plan_serves_a_growing_cache() -> Result {
    let device = device()?;
    for backend in backends(&device) {
        let sizes = [3, 4, 200, 2, 64];
        let mut step = Step::new(&device, sizes, true)?;
        let mut on_device = on(&device, &[0; 3])?;
        let start = [4i32; 3];
        let of_host = step.plan(&*backend, bottom_right(View::from_slice(&start, [3])?))?;
        let of_device = {
            let data = bottom_right(on_device.view()?);
            step.plan(&*backend, data)?
        };
        let mut before: Option<Results> = None;
        for lengths in [[4, 5, 6], [17, 64, 65], [129, 0, 2], [200, 199, 128]] {
            let what = format!("{}, lengths {lengths:?}", backend.name());
            step.fill_cache(&lengths.map(|length| length as usize))?;
            on_device.replace(View::from_slice(&lengths, [3])?)?;
            let host = bottom_right(View::from_slice(&lengths, [3])?);
            let want = {
                let plans = step.plan(&*again(&device, backend.name()), host)?;
                step.fill(CANARY)?;
                step.run(&plans, host)?
            };
            assert!(want.out.iter().all(|x| x.is_finite()), "{what}: NaN of keys that are not there");
            step.fill(CANARY)?;
            assert_same(&step.run(&of_host, host)?, &want, &format!("{what}, on the host"));
            step.fill(CANARY)?;
            let got = step.run(&of_device, bottom_right(on_device.view()?))?;
            assert_same(&got, &want, &format!("{what}, on the device"));
            assert!(step.gaps_are_untouched()?, "{what}");
            if let Some(before) = &before {
                assert_other(&want, before, &what);
            }
            before = Some(want);
        }
    }
    Ok(())
}

/// A captured graph computes the results for the lengths that are in device memory when it is launched.
#[test]
#[ignore = "needs a GPU with cuDNN"]
fn a_captured_graph_reads_lengths_in_device_memory_when_it_is_launched() -> Result {
    let device = device()?;
    for (backend, causal) in backends(&device)
        .into_iter()
        .flat_map(|backend| [false, true].map(|causal| (backend.clone(), causal)))
    {
        let mut step = Step::new(&device, [3, 70, 130, 2, 64], causal)?;
        let (mut queries, mut keys) = (on(&device, &[70, 1, 64])?, on(&device, &[130, 128, 3])?);
        fn data<'a>(queries: View<'a>, keys: View<'a>) -> CallData<'a> {
            CallData { query_lengths: Some(queries), key_value_lengths: Some(keys), ..CallData::default() }
        }
        let plans = step.plan(&*backend, data(queries.view()?, keys.view()?))?;
        let mut before = step.run(&plans, data(queries.view()?, keys.view()?))?;
        let graph = captured(&mut step, &plans, data(queries.view()?, keys.view()?))?;
        for (query, key) in [([3, 70, 65], [129, 17, 64]), ([0, 69, 70], [5, 0, 130])] {
            let what = format!("{}, causal: {causal}, lengths {query:?} and {key:?}", backend.name());
            queries.replace(View::from_slice(&query, [3])?)?;
            keys.replace(View::from_slice(&key, [3])?)?;
            step.fill(CANARY)?;
            graph.launch()?;
            let replayed = step.results()?;
            step.fill(CANARY)?;
            let called = step.run(&plans, data(queries.view()?, keys.view()?))?;
            assert_same(&replayed, &called, &format!("{what}, replayed"));
            step.fill(CANARY)?;
            let on_host = data(View::from_slice(&query, [3])?, View::from_slice(&key, [3])?);
            let plans = step.plan(&*backend, on_host)?;
            assert_same(&step.run(&plans, on_host)?, &called, &format!("{what}, on the host"));
            assert_other(&called, &before, &what);
            before = called;
        }
    }
    Ok(())
}

/// Lengths in device memory that are out of bounds are clamped, and nothing outside of the call's tensors and
/// scratch is written.
#[test]
#[ignore = "needs a GPU with cuDNN"]
fn lengths_out_of_bounds_are_brought_into_them() -> Result {
    let device = device()?;
    let (t, s) = (40, 72);
    for backend in backends(&device) {
        let mut step = Step::new(&device, [3, t, s, 2, 64], true)?;
        let (i32s, i64s) = ([-5, 1000, 7], [i64::MIN, 7, i64::MAX]);
        let u32s = [u32::MAX, 0, 9];
        let tensor = |view| DeviceTensor::from_host(&device, view);
        let cases = [
            (
                tensor(View::from_slice(&i32s, [3])?)?,
                tensor(View::from_slice(&u32s, [3])?)?,
                [0, t, 7],
                [s, 0, 9],
            ),
            (
                tensor(View::from_slice(&u32s, [3])?)?,
                tensor(View::from_slice(&i64s, [3])?)?,
                [t, 0, 9],
                [0, 7, s],
            ),
        ];
        for (queries, keys, bounded_queries, bounded_keys) in &cases {
            let what = format!("{}, {bounded_queries:?} and {bounded_keys:?}", backend.name());
            for query_offset in [QueryOffset::TOP_LEFT, QueryOffset::BottomRight] {
                let with = |queries, keys| CallData {
                    query_offset,
                    query_lengths: Some(queries),
                    key_value_lengths: Some(keys),
                    ..CallData::default()
                };
                let out_of_bounds = with(queries.view()?, keys.view()?);
                let bounded =
                    with(View::from_slice(bounded_queries, [3])?, View::from_slice(bounded_keys, [3])?);
                let plans = step.plan(&*backend, bounded)?;
                step.fill(CANARY)?;
                let want = step.run(&plans, bounded)?;
                let plans = step.plan(&*backend, out_of_bounds)?;
                // Scratch between two areas of canary bytes, a page each.
                const AROUND: usize = 4096;
                let with_canaries = |plan: &Arc<dyn Plan>| {
                    let bytes = plan.scratch_bytes().next_multiple_of(256) + 2 * AROUND;
                    DeviceTensor::filled(&device, TensorDesc::contiguous(DType::Bool, [bytes]), CANARY)
                };
                let mut memory = [with_canaries(&plans.forward)?, with_canaries(&plans.backward)?];
                let bytes = [plans.forward.scratch_bytes(), plans.backward.scratch_bytes()];
                let mut scratch = Vec::new();
                for (memory, bytes) in memory.iter_mut().zip(bytes) {
                    let start = memory.view_mut()?.as_mut_ptr().wrapping_add(AROUND);
                    // SAFETY: `with_canaries` allocated at least `AROUND` bytes before and after these
                    // `bytes`. The tensor is read next by `bytes()` below, on the same stream, after the work
                    // on it.
                    scratch.push(unsafe { Scratch::from_raw_parts(start, bytes, device.device()) });
                }
                let [forward, backward] = [scratch.remove(0), scratch.remove(0)];
                step.fill(CANARY)?;
                step.enqueue_with(&plans, out_of_bounds, [forward, backward])?;
                assert_same(&step.results()?, &want, &what);
                assert!(step.gaps_are_untouched()?, "{what}");
                for (memory, bytes) in memory.iter().zip(bytes) {
                    let all = memory.bytes()?;
                    let around = all[..AROUND].iter().chain(&all[AROUND + bytes..]);
                    assert!(around.copied().all(|byte| byte == CANARY), "{what}: written around the scratch");
                }
            }
        }
    }
    Ok(())
}

/// The seed and the offset of dropout give the same bits in device memory as in host memory. A graph uses
/// those that are in device memory when it is launched.
#[test]
#[ignore = "needs a GPU with cuDNN"]
fn a_captured_graph_reads_the_seed_in_device_memory_when_it_is_launched() -> Result {
    let device = device()?;
    for backend in backends(&device) {
        let mut step = Step::new(&device, [2, 33, 50, 2, 64], true)?;
        let rate = 0.25;
        let on_host = |seed: i64, offset: i32| CallData {
            dropout: Some(Dropout::new(rate, seed.cast_unsigned()).with_offset(offset.cast_unsigned())),
            ..CallData::default()
        };
        let (mut seed, mut offset) =
            (DeviceTensor::from_host(&device, View::from_slice(&[1i64], [1])?)?, on(&device, &[2])?);
        fn data<'a>(rate: f64, seed: View<'a>, offset: View<'a>) -> CallData<'a> {
            let dropout = Some(Dropout::new(rate, 0));
            CallData {
                dropout,
                dropout_seed: Some(seed),
                dropout_offset: Some(offset),
                ..CallData::default()
            }
        }
        let plans = step.plan(&*backend, data(rate, seed.view()?, offset.view()?))?;
        let of_host = step.plan(&*backend, on_host(0, 0))?;
        let mut before = step.run(&plans, data(rate, seed.view()?, offset.view()?))?;
        assert_same(&before, &step.run(&of_host, on_host(1, 2))?, "before the capture");
        let graph = captured(&mut step, &plans, data(rate, seed.view()?, offset.view()?))?;
        for (to_seed, to_offset) in [(-7, 2), (-7, -1), (i64::MAX, 0)] {
            let what = format!("{}, seed {to_seed}, offset {to_offset}", backend.name());
            seed.replace(View::from_slice(&[to_seed], [1])?)?;
            offset.replace(View::from_slice(&[to_offset], [1])?)?;
            step.fill(CANARY)?;
            graph.launch()?;
            let replayed = step.results()?;
            step.fill(CANARY)?;
            let want = step.run(&of_host, on_host(to_seed, to_offset))?;
            assert_same(&replayed, &want, &format!("{what}, replayed"));
            assert!(want.out != before.out, "{what}: the same bits");
            before = want;
        }
    }
    Ok(())
}

/// Calls one after the other with the same memory: each uses its own numbers.
#[test]
#[ignore = "needs a GPU with cuDNN"]
fn one_plan_serves_other_scales_and_offsets() -> Result {
    let device = device()?;
    for backend in backends(&device) {
        let mut step = Step::new(&device, [2, 40, 100, 2, 64], true)?;
        let with = |(scale, offset): (f64, i64)| CallData {
            scale: Some(scale),
            query_offset: QueryOffset::Fixed(offset),
            ..CallData::default()
        };
        let plans = step.plan(&*backend, with((0.1, 60)))?;
        let mut before: Option<Results> = None;
        for numbers in [(0.1, 60), (0.3, 60), (0.1, -10), (0.1, 60), (1e-3, 0), (0.2, -1000), (0.2, 1 << 22)]
        {
            let what = format!("{}, {numbers:?}", backend.name());
            step.fill(CANARY)?;
            let own = step.plan(&*again(&device, backend.name()), with(numbers))?;
            let want = step.run(&own, with(numbers))?;
            step.fill(CANARY)?;
            assert_same(&step.run(&plans, with(numbers))?, &want, &what);
            if let Some(before) = &before {
                assert_other(&want, before, &what);
            }
            before = Some(want);
        }
    }
    Ok(())
}

/// cuDNN leaves them unwritten.
#[test]
#[ignore = "needs a GPU with cuDNN"]
fn gradients_of_batch_rows_without_keys_are_zeros_with_dropout() -> Result {
    let device = device()?;
    for own_dropout in [false, true] {
        let config = CudnnConfig::default().own_dropout(own_dropout);
        let backend = CudnnBackend::on(device.clone(), config);
        let mut step = Step::new(&device, [3, 40, 72, 2, 64], false)?;
        let lengths = [30i32, 0, 72];
        let key_value_lengths = Some(View::from_slice(&lengths, [3])?);
        let data = CallData { key_value_lengths, dropout: Some(Dropout::new(0.5, 1)), ..CallData::default() };
        let plans = step.plan(&backend, data)?;
        let results = step.run(&plans, data)?;
        for (index, gradient) in results.gradients.iter().enumerate() {
            let row = gradient.len() / 3;
            let what = format!("own dropout: {own_dropout}, gradient {index}");
            assert!(gradient.iter().all(|x| x.is_finite()), "{what}");
            assert!(gradient[row..2 * row].iter().all(|x| x.to_f32() == 0.0), "{what}");
            for others in [&gradient[..row], &gradient[2 * row..]] {
                assert!(others.iter().any(|x| x.to_f32() != 0.0), "{what}");
            }
        }
    }
    Ok(())
}
