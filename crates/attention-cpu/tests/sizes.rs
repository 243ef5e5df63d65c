//! Sizes of axes that cost neither time nor memory, because nothing is computed along them.

use std::time::{Duration, Instant};

use attention_core::{
    AttentionBackend, BackwardCall, BackwardInputs, BackwardOutputs, DType, Error, ForwardCall,
    ForwardOutputs, Gradients, Inputs, Plan, Problem, ScratchBuffer, TensorDesc, View, ViewMut,
};
use attention_cpu::{CpuBackend, CpuConfig};

/// Runs `work`, which must not take long: the loops it was found in took seconds, or never ended.
fn at_once<R>(what: &str, work: impl FnOnce() -> R) -> R {
    let begin = Instant::now();
    let result = work();
    assert!(begin.elapsed() < Duration::from_millis(500), "{what} took {:?}", begin.elapsed());
    result
}

fn forward(query: [usize; 4], key: [usize; 4]) -> Result<(), Error> {
    let none: [f32; 0] = [];
    let (q, k) = (View::from_slice(&none, query)?, View::from_slice(&none, key)?);
    let inputs = Inputs::new(q, k, k);
    let problem = inputs.problem().lse(true).build()?;
    let plan = CpuBackend::new().plan(&problem)?;
    let mut scratch = ScratchBuffer::new(plan.scratch_bytes());
    let (out, lse): (&mut [f32], &mut [f32]) = (&mut [], &mut []);
    let outputs = ForwardOutputs {
        out: ViewMut::from_slice(out, query)?,
        lse: Some(ViewMut::from_slice(lse, [query[0], query[1], query[2]])?),
    };
    plan.forward(ForwardCall::new(&problem, inputs, outputs)?, scratch.scratch())
}

#[test]
fn empty_calls_end_at_once_whatever_their_other_sizes() {
    for (query, key) in [
        ([1 << 30, 0, 1, 1], [1 << 30, 0, 1, 1]),
        ([1 << 60, 0, 1, 1], [1 << 60, 0, 1, 1]),
        ([1, 0, 1 << 60, 1], [1, 0, 1 << 60, 1]),
        ([1 << 30, 0, 1 << 30, 1], [1 << 30, 0, 1 << 30, 1]),
        ([1 << 60, 1, 0, 1], [1 << 60, 1, 0, 1]),
        ([0, 1 << 30, 1, 1], [0, 1 << 30, 1, 1]),
    ] {
        at_once("forward", || forward(query, key)).unwrap();
        at_once("backward", || backward(query, key)).unwrap();
    }
}

/// With a bias and sinks, whose gradients are there although there is no row.
fn backward(query: [usize; 4], key: [usize; 4]) -> Result<(), Error> {
    let none: [f32; 0] = [];
    let (q, k) = (View::from_slice(&none, query)?, View::from_slice(&none, key)?);
    let bias = [1f32];
    let mut inputs = Inputs::new(q, k, k);
    inputs.bias = Some(View::from_slice(&bias, [1, 1, 1, 1])?);
    let gradients = Gradients::QKV | Gradients::BIAS;
    let problem = inputs.problem().gradients(gradients).build()?;
    let saved = BackwardInputs {
        out: View::from_slice(&none, query)?,
        lse: View::from_slice(&none, [query[0], query[1], query[2]])?,
        d_out: View::from_slice(&none, query)?,
        d_lse: None,
    };
    let mut dbias = [f32::NAN];
    let [dq, dk, dv]: [&mut [f32]; 3] = [&mut [], &mut [], &mut []];
    let outputs = BackwardOutputs {
        dq: Some(ViewMut::from_slice(dq, query)?),
        dk: Some(ViewMut::from_slice(dk, key)?),
        dv: Some(ViewMut::from_slice(dv, key)?),
        dbias: Some(ViewMut::from_slice(&mut dbias, [1, 1, 1, 1])?),
        dsinks: None,
    };
    let plan = CpuBackend::new().plan(&problem)?;
    let mut scratch = ScratchBuffer::new(plan.scratch_bytes());
    plan.backward(BackwardCall::new(&problem, inputs, saved, outputs)?, scratch.scratch())?;
    assert_eq!(dbias, [0.0]);
    Ok(())
}

#[test]
fn large_batches_are_asked_about_and_planned_at_once() {
    let backend = CpuBackend::new();
    for shape in
        [[1 << 24, 1, 1, 1], [1 << 40, 1, 4, 1], [1, 1 << 24, 1, 1], [1, 1, 1 << 40, 1], [1, 1 << 50, 1, 1]]
    {
        let desc = TensorDesc::contiguous(DType::F32, shape);
        let key = TensorDesc::contiguous(DType::F32, [shape[0], 64, shape[2], 1]);
        for gradients in [Gradients::NONE, Gradients::QKV | Gradients::BIAS] {
            let mut builder = Problem::builder(desc, key, key).causal(true);
            if !gradients.is_empty() {
                let bias = TensorDesc::contiguous(DType::F32, [1, 1, 1, 64]);
                builder = builder.bias(bias).gradients(gradients);
            }
            let problem = builder.build().unwrap();
            at_once(&format!("{problem}"), || {
                backend.supports(&problem).unwrap();
                backend.scratch_bytes(&problem).unwrap();
                // A plan has the sizes of the work, and no list of it.
                backend.plan(&problem).unwrap()
            });
        }
    }
}

/// Sizes whose products do not fit: refused by name, in both passes.
#[test]
fn products_of_sizes_that_overflow_are_refused() {
    for (dims, dtype) in [
        ([1, 1, 1, 1 << 61], DType::Bf16),
        ([1, 100, 1, 1 << 61], DType::F16),
        ([1, 1 << 61, 1, 1], DType::Bf16),
        ([1, 1, 1 << 61, 1], DType::Bf16),
        ([1, 1 << 30, 1, 1 << 31], DType::F16),
    ] {
        let query = TensorDesc::strided(dtype, dims, [0; 4]).unwrap();
        for (key_length, value_head_dim) in [(1, 1), (dims[1], 1), (1, dims[3]), (dims[1], dims[3])] {
            let key = TensorDesc::strided(dtype, [dims[0], key_length, 1, dims[3]], [0; 4]).unwrap();
            let value = TensorDesc::strided(dtype, [dims[0], key_length, 1, value_head_dim], [0; 4]).unwrap();
            for gradients in [Gradients::NONE, Gradients::QKV] {
                let builder = Problem::builder(query, key, value);
                let builder = if gradients.is_empty() { builder } else { builder.gradients(gradients) };
                let Ok(problem) = builder.build() else { continue };
                for threads in [1, 2, 64] {
                    let backend = CpuBackend::with_config(CpuConfig::default().threads(threads));
                    match at_once(&format!("{problem}"), || backend.scratch_bytes(&problem)) {
                        Ok(bytes) => assert!(bytes <= isize::MAX as usize, "{problem}: {bytes}"),
                        Err(error) => {
                            let text = error.to_string();
                            assert!(
                                text.ends_with("scratch for them does not fit an address space"),
                                "{text}"
                            );
                        }
                    }
                }
            }
        }
    }
}

/// What a caller sized its scratch by holds in a pool of any size, and inside and outside of it.
#[test]
fn scratch_does_not_depend_on_the_pool() {
    let data: Vec<f32> = (0..2 * 300 * 4 * 8).map(|i| (i % 17) as f32 / 8.0 - 1.0).collect();
    let view = View::from_slice(&data, [2, 300, 4, 8]).unwrap();
    let inputs = Inputs::new(view, view, view);
    let problem = inputs.problem().causal(true).build().unwrap();
    for config in [CpuConfig::default(), CpuConfig::default().threads(2)] {
        let backend = CpuBackend::with_config(config);
        let bytes = backend.scratch_bytes(&problem).unwrap();
        let run = |plan: &dyn Plan| {
            assert_eq!((backend.scratch_bytes(&problem).unwrap(), plan.scratch_bytes()), (bytes, bytes));
            let mut out = vec![f32::NAN; data.len()];
            let mut scratch = ScratchBuffer::new(bytes);
            let outputs =
                ForwardOutputs { out: ViewMut::from_slice(&mut out, [2, 300, 4, 8]).unwrap(), lse: None };
            let call = ForwardCall::new(&problem, inputs, outputs).unwrap();
            plan.forward(call, scratch.scratch()).unwrap();
            out
        };
        let plan = backend.plan(&problem).unwrap();
        let want = run(&*plan);
        for threads in [1, 2, 3, 7] {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            assert!(pool.install(|| run(&*plan)) == want, "{threads} threads, planned outside");
            let planned_inside = || run(&*backend.plan(&problem).unwrap());
            assert!(pool.install(planned_inside) == want, "{threads} threads, planned inside");
        }
    }
}

/// The gradient of the sinks alone, whose rows have logsumexps that have lost their digits: a call with other
/// gradients gives the same, and has scratch for their tasks.
#[test]
fn sinks_have_their_gradient_without_others() {
    for (rows, keys) in [(2, 5), (20, 30), (70, 90)] {
        for size in [0.0f32, 1e8, -3e20] {
            let (zeros, ones, bias, sinks) =
                (vec![0f32; rows.max(keys)], vec![1f32; rows.max(keys)], [size], [size]);
            let query = View::from_slice(&zeros[..rows], [1, rows, 1, 1]).unwrap();
            let key = View::from_slice(&zeros[..keys], [1, keys, 1, 1]).unwrap();
            let value = View::from_slice(&ones[..keys], [1, keys, 1, 1]).unwrap();
            let d_out = View::from_slice(&ones[..rows], [1, rows, 1, 1]).unwrap();
            let mut inputs = Inputs::new(query, key, value);
            inputs.bias = Some(View::from_slice(&bias, [1, 1, 1, 1]).unwrap());
            inputs.sinks = Some(View::from_slice(&sinks, [1]).unwrap());
            let all = keys as f32 + 1.0;
            let (out, lse) = (vec![keys as f32 / all; rows], vec![size + all.ln(); rows]);
            let saved = || BackwardInputs {
                out: View::from_slice(&out, [1, rows, 1, 1]).unwrap(),
                lse: View::from_slice(&lse, [1, rows, 1]).unwrap(),
                d_out,
                d_lse: None,
            };
            let run = |gradients: Gradients| {
                let backend = CpuBackend::new();
                let problem = inputs.problem().gradients(gradients).build().unwrap();
                let (mut dsinks, mut dq) = ([f32::NAN], vec![f32::NAN; rows]);
                let outputs = BackwardOutputs {
                    dq: gradients
                        .contains(Gradients::QUERY)
                        .then(|| ViewMut::from_slice(&mut dq, [1, rows, 1, 1]).unwrap()),
                    dk: None,
                    dv: None,
                    dbias: None,
                    dsinks: Some(ViewMut::from_slice(&mut dsinks, [1]).unwrap()),
                };
                let call = BackwardCall::new(&problem, inputs, saved(), outputs).unwrap();
                let plan = backend.plan(&problem).unwrap();
                let mut scratch = ScratchBuffer::new(plan.scratch_bytes());
                plan.backward(call, scratch.scratch()).unwrap();
                dsinks[0]
            };
            let (alone, with_dq) = (run(Gradients::SINKS), run(Gradients::SINKS | Gradients::QUERY));
            assert_eq!(alone.to_bits(), with_dq.to_bits(), "{rows}x{keys} {size:e}");
            let want = -(rows as f32) * keys as f32 / (all * all);
            assert!((alone - want).abs() <= 2e-5 * want.abs(), "{rows}x{keys} {size:e}: {alone} for {want}");
        }
    }
}
