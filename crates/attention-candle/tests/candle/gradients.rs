//! Which gradients arrive, and when.

use attention_candle::{Attention, Dropout};
use candle_core::backprop::GradStore;
use candle_core::{DType, Result, Tensor, Var};

use crate::device::device;

/// Normal numbers in f64, the same for the same seed.
pub(crate) fn randn(shape: &[usize], seed: u64) -> Result<Tensor> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15).wrapping_add(1);
    let mut uniform = || {
        // SplitMix64 (Steele, Lea and Flood 2014).
        state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = state;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        ((z ^ (z >> 31)) >> 11) as f64 / (1u64 << 53) as f64
    };
    let data: Vec<f64> =
        (0..shape.iter().product()).map(|_| (0..12).map(|_| uniform()).sum::<f64>() - 6.0).collect();
    Tensor::from_vec(data, shape, device())
}

/// Asserts that no element differs by more than `tolerance`.
pub(crate) fn close(what: &str, got: &Tensor, want: &Tensor, tolerance: f64) -> Result<()> {
    assert_eq!(got.dims(), want.dims(), "{what}");
    let (got, want) = (got.to_dtype(DType::F64)?, want.to_dtype(DType::F64)?);
    let difference = (got - want)?.abs()?.flatten_all()?.max(0)?.to_scalar::<f64>()?;
    assert!(difference <= tolerance, "{what}: differs by {difference:e}, allowed is {tolerance:e}");
    Ok(())
}

fn variable(shape: &[usize], seed: u64) -> Result<Var> {
    Var::from_tensor(&randn(shape, seed)?)
}

fn loss(out: &Tensor) -> Result<GradStore> {
    out.sqr()?.sum_all()?.backward()
}

const SHAPE: [usize; 4] = [2, 3, 5, 8];

#[test]
fn without_variables_there_is_no_graph() -> Result<()> {
    let x = randn(&SHAPE, 1)?;
    let (out, lse) = Attention::bnth().bias(&randn(&[5, 5], 2)?).forward_with_lse(&x, &x, &x)?;
    assert!(!out.track_op() && !lse.track_op());
    assert!(!Attention::btnh().forward(&x, &x, &x)?.track_op());
    Ok(())
}

#[test]
fn gradients_reach_what_asks_for_them_and_nothing_else() -> Result<()> {
    let constants = [1, 2, 3].map(|seed| randn(&SHAPE, seed).unwrap());
    let (bias, sinks) = (randn(&[3, 1, 5], 4)?, randn(&[3], 5)?);
    let all = {
        let qkv = [1, 2, 3].map(|seed| variable(&SHAPE, seed).unwrap());
        let (bias, sinks) = (Var::from_tensor(&bias)?, Var::from_tensor(&sinks)?);
        let call = Attention::bnth().causal(true).bias(&bias).sinks(&sinks);
        let gradients = loss(&call.forward(&qkv[0], &qkv[1], &qkv[2])?)?;
        let [query, key, value] = qkv;
        [query, key, value, bias, sinks].map(|variable| gradients.get(&variable).unwrap().clone())
    };
    // Every set of variables.
    for set in 1..32usize {
        let [query, key, value] = &constants;
        let tensors = [query, key, value, &bias, &sinks];
        let variables: Vec<Option<Var>> = (0..5)
            .map(|index| (set >> index & 1 == 1).then(|| Var::from_tensor(tensors[index]).unwrap()))
            .collect();
        let tensor = |index: usize| variables[index].as_ref().map_or(tensors[index], |variable| variable);
        let call = Attention::bnth().causal(true).bias(tensor(3)).sinks(tensor(4));
        let gradients = loss(&call.forward(tensor(0), tensor(1), tensor(2))?)?;
        for (index, variable) in variables.iter().enumerate() {
            match variable {
                Some(variable) => {
                    let got =
                        gradients.get(variable).unwrap_or_else(|| panic!("set {set}: no gradient {index}"));
                    close(&format!("set {set}, gradient {index}"), got, &all[index], 1e-13)?;
                }
                None => assert!(gradients.get(tensors[index]).is_none(), "set {set}, constant {index}"),
            }
        }
    }
    Ok(())
}

#[test]
fn gradients_flow_through_what_the_operands_come_from() -> Result<()> {
    // Query, key, value and bias are all functions of one variable.
    let x = variable(&SHAPE, 1)?;
    let out = |fused: bool| -> Result<Tensor> {
        let (query, key) = ((x.as_tensor() * 0.5)?, x.sin()?);
        let value = x.as_tensor().clone();
        let bias = x.sum(3)?.unsqueeze(3)?;
        if fused {
            return Attention::bnth().bias(&bias).forward(&query, &key, &value);
        }
        let logits = (query.matmul(&key.t()?.contiguous()?)? / 8f64.sqrt())?.broadcast_add(&bias)?;
        candle_nn::ops::softmax(&logits, 3)?.matmul(&value)
    };
    let (fused, plain) = (out(true)?, out(false)?);
    close("output", &fused, &plain, 1e-13)?;
    close("gradient", loss(&fused)?.get(&x).unwrap(), loss(&plain)?.get(&x).unwrap(), 1e-12)
}

#[test]
fn the_logsumexp_has_gradients_of_its_own() -> Result<()> {
    let [query, key, value] = [1, 2, 3].map(|seed| variable(&SHAPE, seed).unwrap());
    let bias = variable(&[1, 3, 5, 5], 4)?;
    let logits = (query.matmul(&key.t()?.contiguous()?)? / 8f64.sqrt())?.broadcast_add(&bias)?;
    let (want_out, want_lse) =
        (candle_nn::ops::softmax(&logits, 3)?.matmul(&value)?, logits.exp()?.sum(3)?.log()?);
    let (out, lse) = Attention::bnth().bias(&bias).forward_with_lse(&query, &key, &value)?;
    close("output", &out, &want_out, 1e-13)?;
    close("logsumexp", &lse, &want_lse, 1e-13)?;
    let both = |out: &Tensor, lse: &Tensor| -> Result<[GradStore; 3]> {
        let of_lse = lse.sqr()?.sum_all()?;
        Ok([of_lse.backward()?, loss(out)?, (of_lse + out.sqr()?.sum_all()?)?.backward()?])
    };
    for (got, want) in both(&out, &lse)?.iter().zip(&both(&want_out, &want_lse)?) {
        for variable in [&query, &key, &value, &bias] {
            let zeros = variable.zeros_like()?;
            let want = want.get(variable).unwrap_or(&zeros);
            close("gradient", got.get(variable).unwrap(), want, 1e-12)?;
        }
    }
    Ok(())
}

#[test]
fn a_graph_can_be_gone_through_again_and_by_several_threads() -> Result<()> {
    let [query, key, value] = [1, 2, 3].map(|seed| variable(&SHAPE, seed).unwrap());
    let bias = variable(&[5, 5], 4)?;
    let out = Attention::bnth().bias(&bias).forward(&query, &key, &value)?;
    let bits = |weight: f64| -> Result<Vec<u64>> {
        let gradients = (out.sqr()?.sum_all()? * weight)?.backward()?;
        let mut bits = Vec::new();
        for variable in [&query, &key, &value, &bias] {
            let gradient = gradients.get(variable).unwrap().flatten_all()?.to_vec1::<f64>()?;
            bits.extend(gradient.into_iter().map(f64::to_bits));
        }
        Ok(bits)
    };
    let weights = [1.0, 2.0, -3.0, 0.5];
    let want: Vec<Vec<u64>> = weights.iter().map(|&weight| bits(weight)).collect::<Result<_>>()?;
    assert_eq!(bits(1.0)?, want[0]);
    std::thread::scope(|scope| {
        for (weight, want) in weights.iter().zip(&want) {
            let bits = &bits;
            scope.spawn(move || {
                for _ in 0..20 {
                    assert_eq!(&bits(*weight).unwrap(), want);
                }
            });
        }
    });
    Ok(())
}

#[test]
fn recomputing_gives_the_same_bits() -> Result<()> {
    let [query, key, value] = [1, 2, 3].map(|seed| variable(&SHAPE, seed).unwrap());
    let bias = variable(&[5, 5], 4)?;
    let bits = |recompute: bool| -> Result<Vec<u64>> {
        let call = Attention::bnth().bias(&bias).dropout(Dropout::new(0.2, 9)).recompute(recompute);
        let gradients = loss(&call.forward(&query, &key, &value)?)?;
        let mut bits = Vec::new();
        for variable in [&query, &key, &value, &bias] {
            let gradient = gradients.get(variable).unwrap().flatten_all()?.to_vec1::<f64>()?;
            bits.extend(gradient.into_iter().map(f64::to_bits));
        }
        Ok(bits)
    };
    assert_eq!(bits(true)?, bits(false)?);
    Ok(())
}

#[test]
fn dropout_is_a_function_of_seed_and_offset() -> Result<()> {
    let x = variable(&SHAPE, 1)?;
    let run = |dropout: Dropout| -> Result<(Vec<f64>, Vec<f64>)> {
        let out = Attention::bnth().dropout(dropout).forward(&x, &x, &x)?;
        let gradient = loss(&out)?.get(&x).unwrap().flatten_all()?.to_vec1()?;
        Ok((out.flatten_all()?.to_vec1()?, gradient))
    };
    let dropout = Dropout::new(0.5, 3);
    assert_eq!(run(dropout)?, run(dropout)?);
    assert_ne!(run(dropout)?.0, run(dropout.with_offset(1))?.0);
    assert_ne!(run(dropout)?.0, run(Dropout::new(0.5, 4))?.0);
    // The order of axes does not change the bits.
    let out = Attention::btnh().dropout(dropout).forward(
        &x.transpose(1, 2)?,
        &x.transpose(1, 2)?,
        &x.transpose(1, 2)?,
    )?;
    assert_eq!(out.transpose(1, 2)?.flatten_all()?.to_vec1::<f64>()?, run(dropout)?.0);
    Ok(())
}

/// A mask without a key for some rows, and padding: zeros, and no NaN anywhere.
#[test]
fn rows_with_nothing_to_attend_to_are_zero_and_have_no_gradients() -> Result<()> {
    let [query, key, value] = [1, 2, 3].map(|seed| variable(&SHAPE, seed).unwrap());
    let mask: Vec<u8> = (0..25).map(|at| u8::from(at / 5 != 2)).collect();
    let mask = Tensor::from_vec(mask, (5, 5), device())?;
    let call = Attention::bnth().mask(&mask).query_lengths([5, 3]).key_value_lengths([5, 0]);
    let (out, lse) = call.forward_with_lse(&query, &key, &value)?;
    let rows = out.sqr()?.sum(3)?.to_vec3::<f64>()?;
    let lse = lse.to_vec3::<f64>()?;
    let gradients = loss(&out)?;
    let of_query = gradients.get(&query).unwrap().sqr()?.sum(3)?.to_vec3::<f64>()?;
    for (b, n, t) in (0..2).flat_map(|b| (0..3).flat_map(move |n| (0..5).map(move |t| (b, n, t)))) {
        let empty = b == 1 || t == 2;
        assert_eq!(rows[b][n][t] == 0.0, empty);
        assert_eq!(of_query[b][n][t] == 0.0, empty);
        assert_eq!(lse[b][n][t] == f64::NEG_INFINITY, empty);
    }
    for variable in [&key, &value] {
        let of_row = gradients.get(variable).unwrap().narrow(0, 1, 1)?.abs()?.sum_all()?;
        assert_eq!(of_row.to_scalar::<f64>()?, 0.0);
    }
    Ok(())
}

#[test]
fn tensors_without_a_batch_axis_work_in_both_orders() -> Result<()> {
    let [query, key, value] = [1, 2, 3].map(|seed| variable(&SHAPE[1..], seed).unwrap());
    let bias = variable(&[3, 5, 5], 4)?;
    let (out, lse) = Attention::bnth().bias(&bias).forward_with_lse(&query, &key, &value)?;
    assert_eq!((out.dims(), lse.dims()), (&[3, 5, 8][..], &[3, 5][..]));
    let batch = |tensor: &Tensor| tensor.unsqueeze(0);
    let call = Attention::bnth().bias(&bias);
    let want = call.forward(&batch(&query)?, &batch(&key)?, &batch(&value)?)?;
    close("output", &batch(&out)?, &want, 0.0)?;
    let swap = |tensor: &Tensor| tensor.transpose(0, 1);
    let call = Attention::btnh().bias(&bias);
    let (other, other_lse) = call.forward_with_lse(&swap(&query)?, &swap(&key)?, &swap(&value)?)?;
    close("output", &swap(&other)?, &out, 0.0)?;
    close("logsumexp", &other_lse.t()?, &lse, 0.0)?;
    let (got, want) = (loss(&other)?, loss(&want)?);
    for variable in [&query, &key, &value, &bias] {
        close("gradient", got.get(variable).unwrap(), want.get(variable).unwrap(), 1e-13)?;
    }
    Ok(())
}
