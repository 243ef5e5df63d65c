//! Numbers at the edges of their types: masks of -inf around NaN, biases of any size, logits beyond their own
//! precision.

use attention_core::{
    AttentionBackend, BackwardCall, BackwardInputs, BackwardOutputs, CallData, ForwardCall, ForwardOutputs,
    Gradients, Inputs, Scalar, ScratchBuffer, View, ViewMut,
};
use attention_cpu::CpuBackend;
use half::f16;

/// One head of one batch row, with a bias `[T, S]` or `[S]` and a sink where given.
struct Call<'a, T, B> {
    rows: usize,
    keys: usize,
    width: usize,
    query: &'a [T],
    key: &'a [T],
    value: &'a [T],
    bias: Option<&'a [B]>,
    sink: Option<f32>,
    scale: f64,
}

#[derive(Debug)]
struct Results {
    out: Vec<f64>,
    lse: Vec<f64>,
    dq: Vec<f64>,
    dk: Vec<f64>,
    dv: Vec<f64>,
    dbias: Vec<f64>,
    dsink: f64,
}

impl<T: Scalar + attention_core::Element, B: Scalar> Call<'_, T, B> {
    /// Forward, then backward from `d_out`.
    fn run<L: Scalar>(&self, d_out: &[T]) -> Results {
        let Self { rows, keys, width, .. } = *self;
        let (query, key) = ([1, rows, 1, width], [1, keys, 1, width]);
        let sinks = self.sink.map(|sink| [sink]);
        let view = |data, shape| View::from_slice::<T>(data, shape).unwrap();
        let mut inputs = Inputs::new(view(self.query, query), view(self.key, key), view(self.value, key));
        let bias_shape = self.bias.map(|bias| [1, 1, bias.len() / keys, keys]);
        inputs.bias = self.bias.zip(bias_shape).map(|(bias, shape)| View::from_slice(bias, shape).unwrap());
        inputs.sinks = sinks.as_ref().map(|sinks| View::from_slice(sinks, [1]).unwrap());
        inputs.data = CallData { scale: Some(self.scale), ..CallData::default() };
        let backend = CpuBackend::new();
        let nan = T::from_f64(f64::NAN);
        let (mut out, mut lse) = (vec![nan; rows * width], vec![L::from_f64(f64::NAN); rows]);
        let problem = inputs.problem().lse(true).build().unwrap();
        let outputs = ForwardOutputs {
            out: ViewMut::from_slice(&mut out, query).unwrap(),
            lse: Some(ViewMut::from_slice(&mut lse, [1, rows, 1]).unwrap()),
        };
        let plan = backend.plan(&problem).unwrap();
        let mut scratch = ScratchBuffer::new(plan.scratch_bytes());
        let call = ForwardCall::new(&problem, inputs, outputs).unwrap();
        plan.forward(call, scratch.scratch()).unwrap();

        let mut wanted = Gradients::QKV;
        if self.bias.is_some() {
            wanted = wanted | Gradients::BIAS;
        }
        if self.sink.is_some() {
            wanted = wanted | Gradients::SINKS;
        }
        let problem = inputs.problem().gradients(wanted).build().unwrap();
        let saved = BackwardInputs {
            out: view(&out, query),
            lse: View::from_slice(&lse, [1, rows, 1]).unwrap(),
            d_out: view(d_out, query),
            d_lse: None,
        };
        let (mut dq, mut dk, mut dv) =
            (vec![nan; rows * width], vec![nan; keys * width], vec![nan; keys * width]);
        let mut dbias = vec![B::from_f64(f64::NAN); self.bias.map_or(0, <[B]>::len)];
        let mut dsink = [f32::NAN];
        let outputs = BackwardOutputs {
            dq: Some(ViewMut::from_slice(&mut dq, query).unwrap()),
            dk: Some(ViewMut::from_slice(&mut dk, key).unwrap()),
            dv: Some(ViewMut::from_slice(&mut dv, key).unwrap()),
            dbias: bias_shape.map(|shape| ViewMut::from_slice(&mut dbias, shape).unwrap()),
            dsinks: self.sink.map(|_| ViewMut::from_slice(&mut dsink, [1]).unwrap()),
        };
        let plan = backend.plan(&problem).unwrap();
        let mut scratch = ScratchBuffer::new(plan.scratch_bytes());
        let call = BackwardCall::new(&problem, inputs, saved, outputs).unwrap();
        plan.backward(call, scratch.scratch()).unwrap();
        fn all<T: Scalar>(data: &[T]) -> Vec<f64> {
            data.iter().map(|x| x.to_f64()).collect()
        }
        Results {
            out: all(&out),
            lse: all(&lse),
            dq: all(&dq),
            dk: all(&dk),
            dv: all(&dv),
            dbias: all(&dbias),
            dsink: f64::from(dsink[0]),
        }
    }
}

fn numbers<T: Scalar>(count: usize, seed: usize) -> Vec<T> {
    (0..count).map(|i| T::from_f64(((i * 37 + seed * 11) % 23) as f64 / 8.0 - 1.25)).collect()
}

/// Sizes of few rows, of a small batch row, and of blocks.
const SIZES: [(usize, usize); 4] = [(2, 3), (9, 20), (1, 300), (70, 90)];

fn close(got: f64, want: f64, tolerance: f64) -> bool {
    (got - want).abs() <= tolerance * want.abs().max(1.0)
}

/// Every magnitude of a bias: on all keys, on all but the last, and on the last alone. Queries are 0, so that
/// logits are the bias exactly.
fn biases_of_every_magnitude<T: Scalar, L: Scalar>(largest: i32, tolerance: f64) {
    for (rows, keys) in SIZES {
        let width = 4;
        let (query, key) = (vec![T::from_f64(0.0); rows * width], numbers::<T>(keys * width, 1));
        let (value, d_out) = (numbers::<T>(keys * width, 2), numbers::<T>(rows * width, 3));
        let exponents = (0..=largest).step_by(if rows == 70 { 7 } else { 1 + largest as usize / 100 });
        for size in exponents.flat_map(|e| (1..10).step_by(2).map(move |d| f64::from(d) * 10f64.powi(e))) {
            for place in 0..6 {
                let sign = if place % 2 == 0 { -1.0 } else { 1.0 };
                let at = |j: usize| match place / 2 {
                    0 => true,
                    1 => j + 1 < keys,
                    _ => j + 1 == keys,
                };
                let bias: Vec<L> =
                    (0..keys).map(|j| L::from_f64(if at(j) { sign * size } else { 0.0 })).collect();
                let bias: Vec<L> = bias.into_iter().filter(|b| b.to_f64().is_finite()).collect();
                if bias.len() < keys {
                    continue;
                }
                let call = Call {
                    rows,
                    keys,
                    width,
                    query: &query,
                    key: &key,
                    value: &value,
                    bias: Some(&bias),
                    sink: None,
                    scale: 0.5,
                };
                let got = call.run::<L>(&d_out);
                let what = format!("{} {rows}x{keys} bias {sign}*{size:e} place {place}", T::DTYPE);
                let x = |j: usize| bias[j].to_f64();
                let max = (0..keys).map(x).fold(f64::NEG_INFINITY, f64::max);
                let total: f64 = (0..keys).map(|j| (x(j) - max).exp()).sum();
                let p = |j: usize| (x(j) - max).exp() / total;
                let lse = max + total.ln();
                for t in 0..rows {
                    assert!(close(got.lse[t], lse, tolerance), "{what}: lse {} for {lse}", got.lse[t]);
                }
                let v = |j: usize, h: usize| value[j * width + h].to_f64();
                let d = |t: usize, h: usize| d_out[t * width + h].to_f64();
                for h in 0..width {
                    let want: f64 = (0..keys).map(|j| p(j) * v(j, h)).sum();
                    let rounded = T::from_f64(want).to_f64();
                    assert!(
                        close(got.out[h], want, tolerance.max((rounded - want).abs() * 2.0)),
                        "{what}: out"
                    );
                    let summed: f64 = (0..rows).map(|t| d(t, h)).sum();
                    for j in 0..keys {
                        let (got, want) = (got.dv[j * width + h], p(j) * summed);
                        let sizes: f64 = (0..rows).map(|t| p(j) * d(t, h).abs()).sum();
                        let eps = if T::DTYPE.size() == 2 { 2e-3 } else { tolerance };
                        let smallest = if T::DTYPE.size() == 2 { 1e-4 } else { 1e-30 };
                        assert!(
                            (got - want).abs() <= eps * sizes.max(smallest),
                            "{what}: dv {got} for {want}"
                        );
                    }
                }
                // Queries are 0, so keys have no gradient; and no gradient of a bias is more than all that
                // comes in.
                assert!(got.dk.iter().all(|&x| x == 0.0), "{what}: dk");
                let most: f64 = (0..rows * width).map(|i| d_out[i].to_f64().abs() * 4.0).sum();
                assert!(got.dbias.iter().chain(&got.dq).all(|x| x.abs() <= most), "{what}: dbias, dq");
            }
        }
    }
}

#[test]
fn f32_biases_of_every_magnitude() {
    biases_of_every_magnitude::<f32, f32>(38, 4e-6);
}

#[test]
fn f16_with_biases_of_every_magnitude() {
    biases_of_every_magnitude::<f16, f32>(38, 4e-6);
}

#[test]
fn f64_biases_of_every_magnitude() {
    biases_of_every_magnitude::<f64, f64>(308, 1e-14);
}

/// The usual additive mask beside logits that would take it over the edge; and what is -inf in f32 masks f32
/// operands.
#[test]
fn the_lowest_bias_does_not_mask_and_minus_infinity_in_the_precision_of_the_logits_does() {
    for (rows, keys) in SIZES {
        let (query, key) = (vec![-1e17f32; rows], vec![1e17f32; keys]);
        let (value, d_out) = (vec![3.0f32; keys], vec![1.0f32; rows]);
        let lowest = vec![f32::MIN; keys];
        let call = |bias| Call {
            rows,
            keys,
            width: 1,
            query: &query,
            key: &key,
            value: &value,
            bias: Some(bias),
            sink: None,
            scale: 1.0,
        };
        let got = call(&lowest[..]).run::<f32>(&d_out);
        assert!(got.out.iter().all(|&x| close(x, 3.0, 1e-6)), "{rows}x{keys} {got:?}");
        let sum: f64 = got.dv.iter().sum();
        assert!(close(sum, rows as f64, 1e-5), "{rows}x{keys} {sum}");

        // A product that f32 does not hold, where small batch rows are computed in f64.
        if rows > 2 && rows * keys <= 4096 {
            let none = vec![0.0; keys];
            for key in [vec![1e25f32; keys], vec![-1e25; keys]] {
                let got = Call { key: &key, ..call(&none[..]) }.run::<f32>(&d_out);
                assert!(got.out.iter().all(|&x| close(x, 3.0, 1e-6)), "{rows}x{keys} {got:?}");
                assert!(got.lse.iter().all(|x| x.is_finite()), "{rows}x{keys} {got:?}");
                assert!(close(got.dv.iter().sum(), rows as f64, 1e-5), "{rows}x{keys} {got:?}");
            }
        }

        let below = vec![f64::MIN; keys];
        let call = Call {
            rows,
            keys,
            width: 1,
            query: &query,
            key: &key,
            value: &value,
            bias: Some(&below),
            sink: None,
            scale: 1.0,
        };
        let got = call.run::<f32>(&d_out);
        assert!(got.out.iter().all(|&x| x == 0.0), "{rows}x{keys}");
        assert!(got.lse.iter().all(|&x| x == f64::NEG_INFINITY), "{rows}x{keys}");
        let gradients = [&got.dq, &got.dk, &got.dv, &got.dbias];
        assert!(gradients.into_iter().flatten().all(|&x| x == 0.0), "{rows}x{keys}");
    }
}

/// A key under a bias of -inf is out, whatever it holds, to the bit: results are those without the key's NaN.
#[test]
fn what_a_bias_of_minus_infinity_hides_reaches_nothing() {
    for (rows, keys) in SIZES {
        let width = 4;
        let (query, d_out) = (numbers::<f32>(rows * width, 1), numbers::<f32>(rows * width, 4));
        let (key, value) = (numbers::<f32>(keys * width, 2), numbers::<f32>(keys * width, 3));
        let hidden = keys / 2;
        let mut bias = numbers::<f32>(keys, 5);
        bias[hidden] = f32::NEG_INFINITY;
        // And a row that has nothing to attend to, where there are several.
        let mut rows_of_bias = bias.repeat(rows);
        if rows > 1 {
            rows_of_bias[keys..2 * keys].fill(f32::NEG_INFINITY);
        }
        let results = |key: &[f32], value: &[f32]| {
            let call = Call {
                rows,
                keys,
                width,
                query: &query,
                key,
                value,
                bias: Some(&rows_of_bias),
                sink: None,
                scale: -0.5,
            };
            call.run::<f32>(&d_out)
        };
        let bits = |r: Results| -> Vec<u64> {
            let all = [r.out, r.lse, r.dq, r.dk, r.dv, r.dbias];
            all.into_iter().flatten().map(f64::to_bits).collect()
        };
        let want = bits(results(&key, &value));
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, -1.0, 1.0] {
            let (mut bad_key, mut bad_value) = (key.clone(), value.clone());
            bad_key[hidden * width..][..width].fill(bad);
            bad_value[hidden * width..][..width].fill(bad);
            // -inf * 0 and the like are no numbers either.
            assert!(bits(results(&bad_key, &value)) == want, "{rows}x{keys}, key of {bad}");
            assert!(bits(results(&key, &bad_value)) == want, "{rows}x{keys}, value of {bad}");
        }
    }
}

/// A zero has no sign that masked memory decides: of rows that attend to nothing, and of values that are
/// zero.
#[test]
fn zeros_are_positive() {
    for (rows, keys) in SIZES {
        let (query, key, d_out) = (vec![1.0f32; rows], vec![1.0f32; keys], vec![1.0f32; rows]);
        for masked in [2.0f32, -2.0, f32::NAN] {
            let mut value = vec![0.0f32; keys];
            value[keys - 1] = masked;
            let mut bias = vec![0.0f32; keys];
            bias[keys - 1] = f32::NEG_INFINITY;
            for bias in [bias, vec![f32::NEG_INFINITY; keys]] {
                for scale in [1.0, -1.0] {
                    let call = Call {
                        rows,
                        keys,
                        width: 1,
                        query: &query,
                        key: &key,
                        value: &value,
                        bias: Some(&bias),
                        sink: None,
                        scale,
                    };
                    let got = call.run::<f32>(&d_out);
                    let zeros = got.out.iter().chain(&got.dq);
                    assert!(
                        zeros.into_iter().all(|x| x.to_bits() == 0),
                        "{rows}x{keys} {masked} {scale} {got:?}"
                    );
                }
            }
        }
    }
}

#[test]
fn a_sink_of_minus_infinity_has_no_gradient() {
    for (rows, keys) in SIZES {
        let (query, key, value) = (vec![1.0f32; rows], vec![1.0f32; keys], vec![1.0f32; keys]);
        let mut d_out = vec![1.0f32; rows];
        d_out[0] = f32::NAN;
        for sink in [f32::NEG_INFINITY, f32::MIN] {
            let call = Call::<f32, f32> {
                rows,
                keys,
                width: 1,
                query: &query,
                key: &key,
                value: &value,
                bias: None,
                sink: Some(sink),
                scale: 1.0,
            };
            let got = call.run::<f32>(&d_out);
            // A finite sink is one, however low: 0 times NaN.
            assert_eq!(got.dsink.is_nan(), sink == f32::MIN, "{rows}x{keys} {}", got.dsink);
            assert!(got.out.iter().all(|&x| close(x, 1.0, 1e-6)));
        }
    }
}

/// Logits whose rounding is more than the exponential's range: their probabilities mean little, and are
/// probabilities.
#[test]
fn logits_beyond_their_precision_have_gradients_that_are_numbers() {
    fn check<T: Scalar, L: Scalar>(scale: f64) {
        for (rows, keys) in SIZES {
            for width in [1, 9, 40] {
                let (query, d_out) = (numbers::<T>(rows * width, 1), vec![T::from_f64(1.0); rows * width]);
                let (key, value) = (numbers::<T>(keys * width, 2), numbers::<T>(keys * width, 3));
                let bias = numbers::<L>(keys, 4);
                let call = Call {
                    rows,
                    keys,
                    width,
                    query: &query,
                    key: &key,
                    value: &value,
                    bias: Some(&bias),
                    sink: None,
                    scale,
                };
                let got = call.run::<L>(&d_out);
                let what = format!("{} {rows}x{keys} H {width} scale {scale:e}", T::DTYPE);
                assert!(got.out.iter().chain(&got.lse).all(|x| x.is_finite()), "{what}: forward");
                assert!(got.dv.iter().chain(&got.dbias).all(|x| x.is_finite()), "{what}: dv, dbias");
                for h in 0..width {
                    let sum: f64 = (0..keys).map(|j| got.dv[j * width + h]).sum();
                    assert!(close(sum, rows as f64, 3e-3), "{what}: dv sums to {sum}");
                }
                // `scale` times a small number may be beyond the dtype, and is no NaN.
                assert!(!got.dq.iter().chain(&got.dk).any(|x| x.is_nan()), "{what}: dq, dk");
            }
        }
    }
    for scale in [1e3, 3e8, -3e8, 1e20, 1e30] {
        check::<f32, f32>(scale);
        check::<f64, f64>(scale);
        check::<f16, f32>(scale);
    }
    check::<f64, f64>(1e200);
}
