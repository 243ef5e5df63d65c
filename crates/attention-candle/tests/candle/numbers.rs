//! Lengths, offsets and seeds: lists and tensors, and one plan for all of them.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use attention::AttentionBackend;
use attention::core::{Delegate, Plan, Problem};
use attention_candle::{Attention, Dropout, QueryOffset, Registry};
use candle_core::{DType, Device, Result, Tensor, Var};

use crate::device::device;
use crate::gradients::randn;

const SHAPE: [usize; 4] = [2, 3, 5, 8];

/// The output and the gradient of its square's sum.
fn run(call: &Attention, query: &Var, keys: &Tensor) -> Result<(Vec<f64>, Vec<f64>)> {
    let out = call.forward(query, keys, keys)?;
    let gradients = out.sqr()?.sum_all()?.backward()?;
    let gradient = gradients.get(query).unwrap().flatten_all()?.to_vec1()?;
    Ok((out.flatten_all()?.to_vec1()?, gradient))
}

#[test]
fn tensors_are_the_same_numbers_as_lists() -> Result<()> {
    let (query, keys) = (Var::from_tensor(&randn(&SHAPE, 1)?)?, randn(&SHAPE, 2)?);
    let call = || Attention::bnth().causal(true).dropout(Dropout::new(0.25, 7).with_offset(3));
    let lists = call().query_lengths([5, 3]).key_value_lengths(vec![4usize, 5]).query_offsets([1i64, -1]);
    let want = run(&lists, &query, &keys)?;
    for dtype in [DType::U32, DType::I32, DType::I64] {
        let tensor = |numbers: &[i64]| Tensor::new(numbers, device())?.to_dtype(dtype);
        let tensors = call()
            .query_lengths(&tensor(&[5, 3])?)
            .key_value_lengths(tensor(&[4, 5])?)
            .dropout(Dropout::new(0.25, 1))
            .dropout_seed(&tensor(&[7])?.get(0)?)
            .dropout_offset(&tensor(&[3])?);
        // A negative offset is none of u32.
        let tensors = match dtype {
            DType::U32 => tensors.query_offsets([1, -1]),
            _ => tensors.query_offsets(&tensor(&[1, -1])?),
        };
        assert_eq!(run(&tensors, &query, &keys)?, want, "{dtype:?}");
        assert_eq!(run(&tensors.recompute(true), &query, &keys)?, want, "{dtype:?}");
    }
    // In host memory, wherever the others are, and with a stride.
    let lengths =
        Tensor::new(&[4u32, 9, 5, 9], &Device::Cpu)?.reshape((2, 2))?.narrow(1, 0, 1)?.squeeze(1)?;
    assert_eq!(run(&lists.clone().key_value_lengths(&lengths), &query, &keys)?, want);
    // The last one counts.
    let other = Tensor::new(&[1u32, 1], device())?;
    let again = lists.clone().query_lengths(&other).query_lengths([5, 3]).query_offsets(&other);
    assert_eq!(run(&again.query_offsets([1, -1]), &query, &keys)?, want);
    assert_ne!(run(&lists.clone().query_offset(0), &query, &keys)?, want);
    assert_ne!(run(&lists.query_lengths(&other), &query, &keys)?, want);
    Ok(())
}

/// A backend that counts how often it plans.
#[derive(Debug)]
struct Counting(attention::chunked::ChunkedBackend, AtomicUsize);

impl Delegate for Counting {
    fn inner(&self) -> &dyn AttentionBackend {
        &self.0
    }

    fn plan(&self, problem: &Problem) -> std::result::Result<Arc<dyn Plan>, attention::core::Error> {
        self.1.fetch_add(1, Ordering::Relaxed);
        self.inner().plan(problem)
    }
}

/// How many plans these calls have.
fn plans(calls: impl IntoIterator<Item = Attention>) -> Result<usize> {
    let counting = Arc::new(Counting(Default::default(), AtomicUsize::new(0)));
    let registry = Registry::empty().with(counting.clone());
    let keys = Tensor::zeros(&SHAPE, DType::F32, &Device::Cpu)?;
    for call in calls {
        call.registry(&registry).forward(&keys.narrow(2, 0, 1)?, &keys, &keys)?;
    }
    Ok(counting.1.load(Ordering::Relaxed))
}

#[test]
fn a_decoder_and_a_trainer_plan_once() -> Result<()> {
    let decode = || Attention::bnth().causal(true).query_offset(QueryOffset::BottomRight);
    assert_eq!(plans((1..=5).map(|filled| decode().key_value_lengths([filled, 1])))?, 1);
    let filled = |filled: u32| Tensor::new(&[filled, 1], &Device::Cpu).unwrap();
    assert_eq!(plans((1..=5).map(|step| decode().key_value_lengths(filled(step))))?, 1);
    assert_eq!(plans((1..=4).map(|cached| Attention::bnth().causal(true).query_offset(cached)))?, 1);
    let dropout = |seed, step| Attention::bnth().dropout(Dropout::new(0.1, seed).with_offset(step));
    assert_eq!(plans((0..5).map(|step| dropout(1, step)))?, 1);
    assert_eq!(plans((0..5).map(|seed| dropout(seed, 0)))?, 1);
    Ok(())
}
