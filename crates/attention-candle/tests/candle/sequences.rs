//! Packed and paged sequences: each as it is alone, with gradients, in every dtype and both orders of axes.

use attention::InvalidCall;
use attention_candle::{Attention, AxisOrder, Error, Numbers, QueryOffset, cause};
use candle_core::{DType, Device, Result, Tensor, Var};

use crate::device::device;
use crate::gradients::{close, randn};

const DTYPES: [DType; 4] = [DType::F64, DType::F32, DType::F16, DType::BF16];
/// Sequences of 3, 0, 5 and 1 rows, and 2 rows behind them that belong to none.
const OFFSETS: [usize; 5] = [0, 3, 3, 8, 9];
const TOTAL: usize = 11;
/// N, K, H, Hv.
const N: usize = 4;
const K: usize = 2;
const H: usize = 8;
const HV: usize = 6;

/// The axis of the rows of a tensor without a batch axis.
fn rows_axis(order: AxisOrder) -> usize {
    match order {
        AxisOrder::Btnh => 0,
        AxisOrder::Bnth => 1,
    }
}

/// Variables `[rows, heads, width]` in the order of axes.
fn variable(order: AxisOrder, dtype: DType, [rows, heads, width]: [usize; 3], seed: u64) -> Result<Var> {
    let tensor = randn(&[rows, heads, width], seed)?.to_dtype(dtype)?;
    Var::from_tensor(&tensor.transpose(0, rows_axis(order))?.contiguous()?)
}

fn values(tensor: &Tensor) -> Result<Vec<f64>> {
    tensor.to_dtype(DType::F64)?.flatten_all()?.to_vec1()
}

/// Asserts that two tensors are the same: to the bit on the CPU, nearly on a device, where another kernel may
/// be chosen.
fn same(what: &str, got: &Tensor, want: &Tensor) -> Result<()> {
    assert_eq!((got.dims(), got.dtype()), (want.dims(), want.dtype()), "{what}");
    if device().is_cpu() {
        assert_eq!(values(got)?, values(want)?, "{what}");
        return Ok(());
    }
    close(what, got, want, if got.dtype() == DType::F64 { 1e-12 } else { 2e-2 })
}

/// Offsets as every kind of number that a call takes.
fn numbers(offsets: &[usize]) -> Result<Vec<Numbers>> {
    let list: Vec<i64> = offsets.iter().map(|&offset| offset as i64).collect();
    let mut numbers = vec![Numbers::from(offsets), Numbers::from(list.clone())];
    for dtype in [DType::U32, DType::I32, DType::I64] {
        let host = Tensor::new(&list[..], &Device::Cpu)?.to_dtype(dtype)?;
        numbers.push(Numbers::from(host.to_device(device())?));
        numbers.push(Numbers::from(host));
    }
    Ok(numbers)
}

/// What comes in for an output, and for a logsumexp.
fn weights(out: &Tensor, lse: &Tensor) -> Result<[Tensor; 2]> {
    Ok([randn(out.dims(), 21)?.to_dtype(out.dtype())?, randn(lse.dims(), 22)?.to_dtype(lse.dtype())?])
}

/// Whose gradients are exactly these weights.
fn loss(out: &Tensor, weights: &Tensor) -> Result<Tensor> {
    (out * weights)?.sum_all()?.to_dtype(DType::F64)
}

#[test]
fn a_packed_sequence_is_what_it_is_alone_with_its_gradients() -> Result<()> {
    for order in [AxisOrder::Btnh, AxisOrder::Bnth] {
        for dtype in DTYPES {
            let axis = rows_axis(order);
            let query = variable(order, dtype, [TOTAL, N, H], 1)?;
            let key = variable(order, dtype, [TOTAL, K, H], 2)?;
            let value = variable(order, dtype, [TOTAL, K, HV], 3)?;
            let call = Attention::new(order).causal(true);
            let packed = call.clone().packed(OFFSETS);
            let (out, lse) = packed.forward_with_lse(&query, &key, &value)?;
            let [d_out, d_lse] = weights(&out, &lse)?;
            // Of the output alone, whose gradients are the call's; then of the logsumexp.
            let gradients = [loss(&out, &d_out)?.backward()?, loss(&lse, &d_lse)?.backward()?];
            for numbers in numbers(&OFFSETS)? {
                let again = call.clone().packed(numbers.clone()).forward(&query, &key, &value)?;
                same("numbers of another kind", &again, &out)?;
                let both = call.clone().packed_queries(numbers.clone()).packed_keys(numbers);
                same("each given its own", &both.forward(&query, &key, &value)?, &out)?;
            }
            for bounds in OFFSETS.windows(2).filter(|bounds| bounds[0] < bounds[1]) {
                let (first, count) = (bounds[0], bounds[1] - bounds[0]);
                let what = format!("{order}, {dtype:?}, rows from {first}");
                let part = |tensor: &Tensor| tensor.narrow(axis, first, count);
                let alone = [&query, &key, &value].map(|all| Var::from_tensor(&part(all).unwrap()).unwrap());
                let (out_alone, lse_alone) = call.forward_with_lse(&alone[0], &alone[1], &alone[2])?;
                same(&format!("{what}: output"), &part(&out)?, &out_alone)?;
                same(&format!("{what}: logsumexp"), &part(&lse)?, &lse_alone)?;
                let of_alone = [
                    loss(&out_alone, &part(&d_out)?)?.backward()?,
                    loss(&lse_alone, &part(&d_lse)?)?.backward()?,
                ];
                for (got, want) in gradients.iter().zip(of_alone) {
                    for (name, all, alone) in
                        [("query", &query, &alone[0]), ("key", &key, &alone[1]), ("value", &value, &alone[2])]
                    {
                        let got = part(got.get(all).unwrap())?;
                        same(&format!("{what}: gradient of {name}"), &got, want.get(alone).unwrap())?;
                    }
                }
            }
            // Rows behind the last offset.
            let behind = |tensor: &Tensor| values(&tensor.narrow(axis, 9, TOTAL - 9)?);
            assert!(behind(&out)?.iter().all(|&number| number == 0.0));
            assert!(behind(&lse)?.iter().all(|&number| number == f64::NEG_INFINITY));
            for all in [&query, &key, &value] {
                assert!(behind(gradients[0].get(all).unwrap())?.iter().all(|&number| number == 0.0));
            }
        }
    }
    Ok(())
}

/// The gradients of a bias and of sinks are the sums of those of the sequences, with `recompute` too.
#[test]
fn a_bias_and_sinks_of_packed_sequences_have_gradients() -> Result<()> {
    let variables = || -> Result<[Var; 5]> {
        let operand = |heads, width, seed| variable(AxisOrder::Btnh, DType::F64, [9, heads, width], seed);
        // The longest sequence has 5 rows.
        let (bias, sinks) = (randn(&[N, 5, 5], 4)?, randn(&[N], 5)?);
        let [query, key, value] = [operand(N, H, 1)?, operand(K, H, 2)?, operand(K, HV, 3)?];
        Ok([query, key, value, Var::from_tensor(&bias)?, Var::from_tensor(&sinks)?])
    };
    let [query, key, value, bias, sinks] = &variables()?;
    let call = |bias: &Tensor| Attention::btnh().softcap(4.0).bias(bias).sinks(sinks);
    for recompute in [false, true] {
        let packed = call(bias).packed(OFFSETS).recompute(recompute);
        let out = packed.forward(query, key, value)?;
        let d_out = randn(out.dims(), 21)?;
        let gradients = loss(&out, &d_out)?.backward()?;
        let mut sums = None::<Tensor>;
        for bounds in OFFSETS.windows(2).filter(|bounds| bounds[0] < bounds[1]) {
            let (first, count) = (bounds[0], bounds[1] - bounds[0]);
            let part = |tensor: &Tensor| tensor.narrow(0, first, count);
            let here = bias.narrow(1, 0, count)?.narrow(2, 0, count)?;
            let alone = call(&here).forward(&part(query)?, &part(key)?, &part(value)?)?;
            let loss = loss(&alone, &part(&d_out)?)?;
            sums = Some(match sums {
                None => loss,
                Some(sum) => (sum + loss)?,
            });
        }
        let want = sums.unwrap().backward()?;
        for variable in [query, key, value, bias, sinks] {
            close("gradient", gradients.get(variable).unwrap(), want.get(variable).unwrap(), 1e-13)?;
        }
    }
    Ok(())
}

/// Keys `[B, S, K, H]` in pages of this size, in an order that is none, with NaN wherever no key is; and the
/// table.
fn paged(keys: &Tensor, page_size: usize, lengths: &[usize]) -> Result<(Tensor, Tensor)> {
    let (batch, longest, heads, width) = keys.dims4()?;
    let most = longest.div_ceil(page_size);
    let pages = batch * most + 1;
    let nan = (Tensor::zeros((pages, page_size, heads, width), keys.dtype(), device())? * f64::NAN)?;
    let mut table = vec![-1i64; batch * most];
    for (b, &length) in lengths.iter().enumerate() {
        for index in 0..length.div_ceil(page_size) {
            let page = (b * most + index) * 7 % pages;
            table[b * most + index] = page as i64;
            let (first, count) = (index * page_size, page_size.min(length - index * page_size));
            let rows = keys.narrow(0, b, 1)?.narrow(1, first, count)?.contiguous()?;
            let rest = nan.narrow(0, page, 1)?.narrow(1, count, page_size - count)?;
            nan.slice_set(&Tensor::cat(&[rows, rest], 1)?, 0, page)?;
        }
    }
    Ok((nan, Tensor::from_vec(table, (batch, most), &Device::Cpu)?))
}

#[test]
fn a_paged_sequence_is_what_it_is_alone() -> Result<()> {
    let lengths = [5usize, 0, 11];
    for order in [AxisOrder::Btnh, AxisOrder::Bnth] {
        let swap = |tensor: &Tensor| match order {
            AxisOrder::Btnh => Ok(tensor.clone()),
            AxisOrder::Bnth => tensor.transpose(1, 2),
        };
        for dtype in DTYPES {
            for page_size in [1, 3, 4, 16] {
                let query = randn(&[3, 2, N, H], 1)?.to_dtype(dtype)?;
                let [keys, values] = [(H, 2), (HV, 3)]
                    .map(|(width, seed)| randn(&[3, 11, K, width], seed).unwrap().to_dtype(dtype).unwrap());
                let (key_pages, table) = paged(&keys, page_size, &lengths)?;
                let (value_pages, _) = paged(&values, page_size, &lengths)?;
                let call = Attention::new(order).causal(true).query_offset(QueryOffset::BottomRight).clone();
                let run = |call: Attention, query: &Tensor| {
                    call.forward_with_lse(query, &swap(&key_pages)?, &swap(&value_pages)?)
                };
                let (out, lse) = run(call.clone().paged(&table, lengths), &swap(&query)?)?;
                for (b, &length) in lengths.iter().enumerate() {
                    let what = format!("{order}, {dtype:?}, pages of {page_size}, sequence {b}");
                    let rows = |tensor: &Tensor| tensor.narrow(0, b, 1)?.narrow(1, 0, length);
                    let alone = call.forward_with_lse(
                        &swap(&query.narrow(0, b, 1)?)?,
                        &swap(&rows(&keys)?)?,
                        &swap(&rows(&values)?)?,
                    )?;
                    same(&what, &out.narrow(0, b, 1)?, &alone.0)?;
                    same(&what, &lse.narrow(0, b, 1)?, &alone.1)?;
                }
                // Numbers of every kind, in host memory and on the device.
                for (dtype, lengths) in [DType::I32, DType::I64].into_iter().zip(numbers(&lengths)?) {
                    for place in [&Device::Cpu, device()] {
                        let table = table.to_dtype(dtype)?.to_device(place)?;
                        let again = call.clone().paged(&table, lengths.clone());
                        same("numbers of another kind", &run(again, &swap(&query)?)?.0, &out)?;
                    }
                }
                // Queries packed: 2 rows each.
                let flat = query.reshape((6, N, H))?;
                let flat = if order == AxisOrder::Bnth { flat.transpose(0, 1)? } else { flat };
                let packed = call.clone().packed_queries([0, 2, 4, 6]).paged(&table, lengths);
                let (packed, _) = run(packed.longest(2, 11), &flat)?;
                let packed = packed.transpose(0, rows_axis(order))?.contiguous()?;
                same("packed queries", &packed.reshape((3, 2, N, HV))?, &swap(&out)?.contiguous()?)?;
            }
        }
    }
    Ok(())
}

#[test]
fn packed_queries_over_a_dense_cache_are_batch_rows() -> Result<()> {
    let query = randn(&[5, N, H], 1)?;
    let cache = randn(&[2, 9, K, H], 2)?;
    let call = Attention::btnh().causal(true).query_offset(QueryOffset::BottomRight);
    let out = call.clone().packed_queries([0, 3, 5]).key_value_lengths([9, 4]);
    let out = out.forward(&query, &cache, &cache)?;
    for (b, (first, count, filled)) in [(0, 3, 9), (3, 2, 4)].into_iter().enumerate() {
        let keys = cache.get(b)?.narrow(0, 0, filled)?;
        let alone = call.forward(&query.narrow(0, first, count)?, &keys, &keys)?;
        same("a sequence", &out.narrow(0, first, count)?, &alone)?;
    }
    Ok(())
}

/// The reason in an error of a call, which is the library's.
fn reason(error: &candle_core::Error) -> InvalidCall {
    match cause(error) {
        Some(Error::Call(call)) => call.invalid_call().unwrap_or_else(|| panic!("{error}")).clone(),
        _ => panic!("not an error of the library: {error}"),
    }
}

#[test]
fn wrong_offsets_are_typed_errors() -> Result<()> {
    let x = randn(&[9, K, H], 1)?;
    let refused = |call: Attention| reason(&call.forward(&x, &x, &x).unwrap_err());
    for offsets in [vec![1i64, 3, 9], vec![0, 4, 3, 9], vec![0, 3, 10], vec![-1, 9]] {
        let tensor = Tensor::new(&offsets[..], &Device::Cpu)?;
        for call in [Attention::btnh().packed(&offsets), Attention::btnh().packed(&tensor)] {
            assert!(matches!(refused(call), InvalidCall::StartOutOfRange { .. }), "{offsets:?}");
        }
    }
    let call = Attention::btnh().packed_queries([0, 3, 9]).packed_keys([0, 9]);
    assert!(matches!(refused(call), InvalidCall::Shape { .. }));
    let call = Attention::btnh().packed([0, 3, 9]).longest(5, None);
    assert!(matches!(refused(call), InvalidCall::SequenceTooLong { .. }));
    let call = Attention::btnh().packed([0, 3, 9]).longest(6, 6);
    let unbounded = Attention::btnh().packed([0, 3, 9]);
    same("a bound", &call.forward(&x, &x, &x)?, &unbounded.forward(&x, &x, &x)?)?;
    // Axes: a batch of packed sequences is none.
    let batched = x.unsqueeze(0)?.repeat(2)?;
    let error = Attention::btnh().packed([0, 9]).forward(&batched, &batched, &batched).unwrap_err();
    reason(&error);
    let flat = x.flatten_all()?;
    let error = Attention::btnh().packed([0, 9]).forward(&flat, &flat, &flat).unwrap_err();
    assert!(matches!(reason(&error), InvalidCall::Rank { .. }), "{error}");
    // Offsets of floats.
    let offsets = Tensor::new(&[0f32, 9.0], device())?;
    let error = Attention::btnh().packed(&offsets).forward(&x, &x, &x).unwrap_err();
    assert!(matches!(cause(&error), Some(Error::DType { dtype: DType::F32, .. })), "{error}");
    assert!(error.to_string().contains("expected u32, i32 or i64"), "{error}");
    Ok(())
}

#[test]
fn wrong_tables_are_typed_errors() -> Result<()> {
    let (query, pages) = (randn(&[2, 1, N, H], 1)?, randn(&[3, 4, K, H], 2)?);
    let table = |rows: [[i64; 2]; 2]| Tensor::new(&rows, &Device::Cpu).unwrap();
    let refused = |table: &Tensor, lengths: [i64; 2]| {
        reason(&Attention::btnh().paged(table, lengths).forward(&query, &pages, &pages).unwrap_err())
    };
    assert!(matches!(refused(&table([[0, 1], [2, 3]]), [8, 8]), InvalidCall::NoSuchPage { .. }));
    assert!(matches!(refused(&table([[0, 1], [2, -1]]), [8, 5]), InvalidCall::NoSuchPage { .. }));
    assert!(matches!(refused(&table([[0, 1], [2, 0]]), [9, 8]), InvalidCall::UsedKeysOutOfRange { .. }));
    assert!(matches!(refused(&table([[0, 1], [2, 0]]), [-1, 8]), InvalidCall::UsedKeysOutOfRange { .. }));
    let flat = Tensor::new(&[0i64, 1, 2, 0], &Device::Cpu)?;
    assert!(matches!(refused(&flat, [4, 4]), InvalidCall::Rank { .. }));
    let one = Tensor::new(&[[0i64, 1]], &Device::Cpu)?;
    assert!(matches!(refused(&one, [4, 4]), InvalidCall::Shape { .. }));
    let floats = Tensor::zeros((2, 2), DType::F32, device())?;
    let error = Attention::btnh().paged(&floats, [4, 4]).forward(&query, &pages, &pages).unwrap_err();
    assert!(matches!(cause(&error), Some(Error::DType { .. })), "{error}");
    Ok(())
}

/// A call over pages has no gradients: what goes backward through it is told so, and not left without them.
#[test]
fn going_backward_through_pages_is_an_error() -> Result<()> {
    let table = Tensor::new(&[[0u32, 1], [2, 0]], &Device::Cpu)?;
    let (query, pages) = (randn(&[2, 1, N, H], 1)?, randn(&[3, 4, K, H], 2)?);
    let call = Attention::btnh().paged(&table, [5, 3]);
    let plain = call.forward(&query, &pages, &pages)?;
    assert!(!plain.track_op());
    let sinks = Var::zeros(N, DType::F64, device())?;
    for recompute in [false, true] {
        let call = call.clone().recompute(recompute);
        let (query, pages) = (Var::from_tensor(&query)?, Var::from_tensor(&pages)?);
        let out = call.forward(&query, &pages, &pages)?;
        same("output", &out.detach(), &plain)?;
        let sunk = call.clone().sinks(&sinks).forward(&query.as_detached_tensor(), &pages, &pages)?;
        let (_, lse) = call.forward_with_lse(&query, &pages, &pages)?;
        for result in [out, sunk, lse] {
            assert!(result.track_op());
            let Err(error) = result.sum_all()?.backward() else { panic!("pages have no backward pass") };
            assert!(error.to_string().contains("keys in pages have no backward pass"), "{error}");
            assert!(error.to_string().ends_with("\"attention, backward\""), "{error}");
            reason(&error);
        }
    }
    Ok(())
}
