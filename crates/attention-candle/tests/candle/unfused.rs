//! Beside candle's own operations: the graph of products, softmax and sums that attention is without this
//! crate.

use attention::core::{CallData, CallProblem, DType as Float, Problem, TensorDesc};
use attention_candle::{Attention, Dropout, QueryOffset, Window};
use candle_core::{D, DType, Result, Tensor, Var};
use candle_nn::ops::softmax;

use crate::device::device;
use crate::gradients::{close, randn};

/// `[B, N, T, S]` logits that are added or masked.
#[derive(Clone, Default)]
struct Around {
    scale: Option<f64>,
    softcap: Option<f64>,
    bias: Option<Tensor>,
    /// 1 takes part.
    mask: Option<Tensor>,
    /// What probabilities are multiplied by.
    keep: Option<Tensor>,
}

/// Attention of candle's own operations on `[B, N, T, H]`.
fn unfused(query: &Tensor, key: &Tensor, value: &Tensor, around: &Around) -> Result<Tensor> {
    let group = query.dim(1)? / key.dim(1)?;
    let repeat = |tensor: &Tensor| -> Result<Tensor> {
        let (b, k, s, h) = tensor.dims4()?;
        tensor.unsqueeze(2)?.expand((b, k, group, s, h))?.contiguous()?.reshape((b, k * group, s, h))
    };
    let (key, value) = (repeat(key)?, repeat(value)?);
    let scale = around.scale.unwrap_or(1.0 / (query.dim(3)? as f64).sqrt());
    let mut logits = (query.contiguous()?.matmul(&key.t()?.contiguous()?)? * scale)?;
    if let Some(cap) = around.softcap {
        logits = ((logits / cap)?.tanh()? * cap)?;
    }
    if let Some(bias) = &around.bias {
        logits = logits.broadcast_add(&bias.to_dtype(logits.dtype())?)?;
    }
    if let Some(mask) = &around.mask {
        let masked = Tensor::new(f64::NEG_INFINITY, device())?.to_dtype(logits.dtype())?;
        let mask = mask.broadcast_as(logits.shape())?;
        logits = mask.where_cond(&logits, &masked.broadcast_as(logits.shape())?)?;
    }
    let mut probabilities = softmax(&logits, D::Minus1)?;
    if let Some(keep) = &around.keep {
        probabilities = (probabilities * keep.to_dtype(logits.dtype())?)?;
    }
    probabilities.matmul(&value.contiguous()?)
}

/// A mask `[T, S]` by position.
fn by_position(t: usize, s: usize, allowed: impl Fn(i64, i64) -> bool) -> Result<Tensor> {
    let mask: Vec<u8> = (0..t * s).map(|at| u8::from(allowed((at / s) as i64, (at % s) as i64))).collect();
    Tensor::from_vec(mask, (t, s), device())
}

struct Case {
    name: &'static str,
    /// B, N, K, T, S, H, Hv.
    sizes: [usize; 7],
    fused: Attention,
    around: Around,
}

fn cases() -> Result<Vec<Case>> {
    let sizes = [2, 4, 4, 9, 9, 16, 16];
    let [b, n, _, t, s, ..] = sizes;
    let plain = |name, fused: Attention, around: Around| Case { name, sizes, fused, around };
    let bnth = Attention::bnth;
    let causal = by_position(t, s, |t, j| j <= t)?;
    let mut cases = vec![
        plain("plain", bnth(), Around::default()),
        plain("scale", bnth().scale(0.3), Around { scale: Some(0.3), ..Around::default() }),
        plain("causal", bnth().causal(true), Around { mask: Some(causal.clone()), ..Around::default() }),
        plain("softcap", bnth().softcap(1.5), Around { softcap: Some(1.5), ..Around::default() }),
        plain(
            "window",
            bnth().window(Window::new(2, 3)),
            Around {
                mask: Some(by_position(t, s, |t, j| (t - 2..=t + 3).contains(&j))?),
                ..Around::default()
            },
        ),
    ];
    // Grouped heads, other lengths, another width of values.
    for (name, k) in [("grouped heads", 2), ("one key/value head", 1)] {
        let sizes = [2, 4, k, 7, 11, 8, 5];
        let around = Around { mask: Some(by_position(7, 11, |t, j| j <= t + 4)?), ..Around::default() };
        let fused = bnth().causal(true).query_offset(QueryOffset::BottomRight);
        cases.push(Case { name, sizes, fused, around });
    }
    for (name, shape) in [
        ("bias of everything", vec![b, n, t, s]),
        ("bias of heads", vec![1, n, t, s]),
        ("bias of the batch", vec![b, 1, 1, s]),
        ("bias of positions", vec![t, s]),
        ("bias of keys", vec![s]),
    ] {
        let bias = Var::from_tensor(&randn(&shape, 11)?)?;
        let fused = bnth().bias(&bias).causal(true);
        let around =
            Around { bias: Some(bias.as_tensor().clone()), mask: Some(causal.clone()), ..Around::default() };
        cases.push(plain(name, fused, around));
    }
    // A comparison's result as mask; key 0 is allowed everywhere, since candle's softmax of nothing is NaN.
    let mask = randn(&[b, 1, t, s], 5)?.gt(0.0)?;
    let first =
        Tensor::cat(&[Tensor::ones((b, 1, t, 1), DType::U8, device())?, mask.narrow(3, 1, s - 1)?], 3)?;
    cases.push(plain("mask", bnth().mask(&first), Around { mask: Some(first), ..Around::default() }));
    let lengths = [9, 4];
    let padding: Vec<u8> = (0..b * s).map(|at| u8::from(at % s < lengths[at / s])).collect();
    let padding = Tensor::from_vec(padding, (b, 1, 1, s), device())?;
    cases.push(plain(
        "lengths",
        bnth().key_value_lengths(lengths),
        Around { mask: Some(padding), ..Around::default() },
    ));
    // The published bits, as a tensor.
    let dropout = Dropout::new(0.3, 1234).with_offset(7);
    let desc = |heads| TensorDesc::contiguous(Float::F32, [b, t, heads, 16]);
    let data = CallData { dropout: Some(dropout), ..CallData::default() };
    let problem = Problem::builder(desc(n), desc(n), desc(n)).data(&data).build().unwrap();
    let call = CallProblem::new(&problem, &data).unwrap();
    let kept = attention::dropout_mask(&call).unwrap().unwrap();
    let scale = call.dropout_stream().unwrap().keep_scale();
    let kept: Vec<f64> = kept.into_iter().map(|kept| if kept { scale } else { 0.0 }).collect();
    let kept = Tensor::from_vec(kept, (b, n, t, s), device())?;
    cases.push(plain(
        "dropout",
        bnth().dropout(dropout).causal(true),
        Around { keep: Some(kept), mask: Some(causal), ..Around::default() },
    ));
    Ok(cases)
}

/// Output and gradients of fused and unfused agree; the loss gives each element another weight.
fn compare(case: &Case, dtype: DType, tolerance: f64) -> Result<()> {
    let [b, n, k, t, s, h, hv] = case.sizes;
    let variable =
        |shape: [usize; 4], seed| -> Result<Var> { Var::from_tensor(&randn(&shape, seed)?.to_dtype(dtype)?) };
    let query = variable([b, n, t, h], 1)?;
    let (key, value) = (variable([b, k, s, h], 2)?, variable([b, k, s, hv], 3)?);
    let weights = randn(&[b, n, t, hv], 4)?.to_dtype(dtype)?;
    let fused = case.fused.forward(&query, &key, &value)?;
    let plain = unfused(&query, &key, &value, &case.around)?;
    assert!(fused.is_contiguous() && fused.dtype() == dtype);
    close(&format!("{}: output", case.name), &fused, &plain, tolerance)?;
    let fused = (fused * &weights)?.sum_all()?.backward()?;
    let plain = (plain * &weights)?.sum_all()?.backward()?;
    let mut variables =
        vec![("query", query.as_tensor()), ("key", key.as_tensor()), ("value", value.as_tensor())];
    variables.extend(case.around.bias.as_ref().map(|bias| ("bias", bias)));
    for (name, variable) in variables {
        let (fused, plain) = (fused.get(variable), plain.get(variable));
        let (Some(fused), Some(plain)) = (fused, plain) else {
            panic!("{}: {name} has no gradient", case.name)
        };
        assert_eq!((fused.dims(), fused.dtype()), (variable.dims(), variable.dtype()));
        close(&format!("{}: gradient of {name}", case.name), fused, plain, tolerance)?;
    }
    Ok(())
}

#[test]
fn outputs_and_gradients_agree_with_candles_own() -> Result<()> {
    for case in cases()? {
        compare(&case, DType::F64, 1e-12)?;
        compare(&case, DType::F32, 2e-5)?;
    }
    Ok(())
}

/// What comes out of a projection: one buffer of queries, keys and values, and views of it with offsets and
/// strides.
#[test]
fn slices_of_a_fused_projection_are_used_as_they_lie() -> Result<()> {
    let (b, t, n, h) = (2, 7, 3, 8);
    let buffer = Var::from_tensor(&randn(&[b, t + 2, 3 * n * h], 21)?)?;
    // Also the first and last token are left out: an offset, and a batch stride that is no product of sizes.
    let parts = |order: fn(&Tensor) -> Result<Tensor>| -> Result<Vec<Tensor>> {
        let tokens = buffer.narrow(1, 1, t)?;
        (0..3).map(|part| order(&tokens.narrow(2, part * n * h, n * h)?.reshape((b, t, n, h))?)).collect()
    };
    let view = |tokens: &Tensor| -> Result<Vec<Tensor>> {
        // The same without the copy that `reshape` makes of what is not contiguous.
        let whole = buffer.reshape((b, t + 2, 3, n, h))?.narrow(1, 1, t)?;
        assert_eq!(tokens.dims(), [b, t, n, h]);
        (0..3).map(|part| whole.narrow(2, part, 1)?.squeeze(2)).collect()
    };
    let copied = parts(|part| part.transpose(1, 2)?.contiguous())?;
    let plain = unfused(&copied[0], &copied[1], &copied[2], &Around::default())?;
    let want = plain.sqr()?.sum_all()?.backward()?;
    let want_gradient = want.get(&buffer).unwrap();

    let tokens = view(&Tensor::zeros((b, t, n, h), DType::F64, device())?)?;
    assert!(tokens.iter().all(|part| !part.is_contiguous()));
    let out = Attention::btnh().forward(&tokens[0], &tokens[1], &tokens[2])?;
    close("output", &out.transpose(1, 2)?, &plain, 1e-12)?;
    close("gradient", out.sqr()?.sum_all()?.backward()?.get(&buffer).unwrap(), want_gradient, 1e-12)?;

    let heads: Vec<Tensor> = tokens.iter().map(|part| part.transpose(1, 2)).collect::<Result<_>>()?;
    let out = Attention::bnth().forward(&heads[0], &heads[1], &heads[2])?;
    close("output", &out, &plain, 1e-12)?;
    close("gradient", out.sqr()?.sum_all()?.backward()?.get(&buffer).unwrap(), want_gradient, 1e-12)
}

/// Keys and values of one batch row for all of them, as `expand` makes them: stride 0.
#[test]
fn broadcast_keys_and_values_are_used_as_they_lie() -> Result<()> {
    let query = Var::from_tensor(&randn(&[3, 2, 5, 8], 31)?)?;
    let key = Var::from_tensor(&randn(&[1, 2, 6, 8], 32)?)?;
    let value = Var::from_tensor(&randn(&[1, 2, 6, 8], 33)?)?;
    let (keys, values) = (key.expand((3, 2, 6, 8))?, value.expand((3, 2, 6, 8))?);
    assert!(keys.stride()[0] == 0);
    let out = Attention::bnth().forward(&query, &keys, &values)?;
    let plain = unfused(&query, &keys.contiguous()?, &values.contiguous()?, &Around::default())?;
    close("output", &out, &plain, 1e-12)?;
    let (fused, plain) = (out.sqr()?.sum_all()?.backward()?, plain.sqr()?.sum_all()?.backward()?);
    for variable in [&query, &key, &value] {
        close("gradient", fused.get(variable).unwrap(), plain.get(variable).unwrap(), 1e-12)?;
    }
    Ok(())
}
