//! Caches in candle's tensors: beside those in host memory, whose tests have a model, and under a decoder.

use attention::kv_cache::{self as host, CacheError};
use attention_candle::kv_cache::{KvCache, PagedKvCache, PoolShape, Sequence, TokenShape};
use attention_candle::{Attention, Error, QueryOffset, cause};
use candle_core::{DType, Device, Result, Tensor, WithDType};

use crate::device::device;
use crate::gradients::randn;

/// K, H, Hv.
const K: usize = 2;
const H: usize = 3;
const HV: usize = 2;
const POOL: PoolShape = PoolShape { pages: 7, page_size: 3, longest: 13 };

/// SplitMix64 (Steele, Lea and Flood 2014).
struct Random(u64);

impl Random {
    fn below(&mut self, bound: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        ((z ^ (z >> 31)) % bound as u64) as usize
    }
}

fn token(dtype: DType) -> TokenShape {
    TokenShape { value_head_dim: HV, ..TokenShape::new(dtype, K, H) }
}

fn host_token(dtype: DType) -> host::TokenShape {
    let dtype = match dtype {
        DType::F64 => attention::DType::F64,
        DType::F32 => attention::DType::F32,
        DType::F16 => attention::DType::F16,
        _ => attention::DType::Bf16,
    };
    host::TokenShape { value_head_dim: HV, ..host::TokenShape::new(dtype, K, H) }
}

/// New keys and values `[axes.., K, width]`, in one of the layouts that candle has.
fn new_tokens(axes: &[usize], dtype: DType, random: &mut Random) -> Result<[Tensor; 2]> {
    let (seed, layout) = (random.below(1 << 30) as u64, random.below(3));
    let of = |width: usize, seed| {
        let shape = [axes, &[K, width]].concat();
        let tensor = randn(&shape, seed)?.to_dtype(dtype)?;
        let heads = shape.len() - 2;
        match layout {
            0 => Ok(tensor),
            // Heads in front.
            1 => tensor.transpose(heads, heads - 1)?.contiguous()?.transpose(heads, heads - 1),
            // In the middle of a larger tensor.
            _ => Tensor::cat(&[&tensor, &tensor, &tensor], 0)?.narrow(0, shape[0], shape[0]),
        }
    };
    Ok([of(H, seed)?, of(HV, seed + 1)?])
}

/// A candle tensor in host memory of the library.
fn to_host<T: WithDType + attention::Scalar>(tensor: &Tensor) -> Result<attention::Tensor> {
    let shape = attention::core::Dims::from_slice(tensor.dims()).unwrap();
    Ok(attention::Tensor::from_vec(tensor.flatten_all()?.to_vec1::<T>()?, shape).unwrap())
}

fn numbers<T: WithDType + attention::Scalar>(view: attention::View<'_>) -> Vec<f64> {
    let mut numbers = Vec::new();
    let host = view.host::<T>().unwrap();
    let shape = host.shape();
    crate::placed::for_each_index(&shape, |index| numbers.push(WithDType::to_f64(host.at(index))));
    numbers
}

/// A list or a table.
fn integers(view: attention::View<'_>) -> Vec<f64> {
    let mut numbers = Vec::new();
    let (host, shape) = (view.host::<i32>().unwrap(), view.shape());
    crate::placed::for_each_index(&shape, |index| numbers.push(f64::from(host.at(index))));
    numbers
}

fn candle_numbers(tensor: &Tensor) -> Result<Vec<f64>> {
    tensor.to_dtype(DType::F64)?.flatten_all()?.to_vec1()
}

/// Random appends, forks, truncations and frees do to a cache of tensors what they do to one in host memory:
/// the same pages, lengths, elements and refusals.
fn a_paged_cache_is_that_of_host_memory<T: WithDType + attention::Scalar>(seed: u64) -> Result<()> {
    let (random, dtype) = (&mut Random(seed), <T as WithDType>::DTYPE);
    let mut cache = PagedKvCache::new(token(dtype), POOL, device())?;
    let mut host = host::PagedKvCache::new(host_token(dtype), POOL).unwrap();
    let mut live: Vec<(Sequence, host::Sequence)> = Vec::new();
    let (mut refused, mut copied) = (0, 0);
    for _ in 0..150 {
        let pick = |random: &mut Random, live: &[(Sequence, host::Sequence)]| live[random.below(live.len())];
        match random.below(9) {
            0 | 1 => live.push((cache.add(), host.add())),
            _ if live.is_empty() => {}
            2 | 3 => {
                let (sequence, other) = pick(random, &live);
                let [keys, values] = new_tokens(&[random.below(6)], dtype, random)?;
                let (before, shared) = (cache.used_pages(), cache.pages(sequence)?.last().copied());
                let got = cache.append(sequence, &keys, &values);
                let want = host.append(other, &to_host::<T>(&keys)?, &to_host::<T>(&values)?);
                copied += usize::from(cache.pages(sequence)?.last().copied() != shared && before > 0);
                refused += usize::from(is_same(got, want));
            }
            4 | 5 => {
                // Distinct ones, as many tokens for each.
                let first = random.below(live.len());
                let (chosen, others): (Vec<_>, Vec<_>) = live[first..].iter().copied().unzip();
                let [keys, values] = new_tokens(&[chosen.len(), random.below(3)], dtype, random)?;
                let got = cache.append_each(&chosen, &keys, &values);
                let want = host.append_each(&others, &to_host::<T>(&keys)?, &to_host::<T>(&values)?);
                refused += usize::from(is_same(got, want));
            }
            6 => {
                let (chosen, others): (Vec<_>, Vec<_>) = live.iter().copied().unzip();
                let mut offsets = vec![0];
                chosen.iter().for_each(|_| offsets.push(offsets[offsets.len() - 1] + random.below(4)));
                let total = offsets[chosen.len()] + random.below(2);
                let [keys, values] = new_tokens(&[total], dtype, random)?;
                let got = cache.append_packed(&chosen, &offsets, &keys, &values);
                let want =
                    host.append_packed(&others, &offsets, &to_host::<T>(&keys)?, &to_host::<T>(&values)?);
                refused += usize::from(is_same(got, want));
            }
            7 => {
                let (sequence, other) = pick(random, &live);
                let kept = random.below(cache.len(sequence)? + 1);
                live.push((cache.fork_prefix(sequence, kept)?, host.fork_prefix(other, kept).unwrap()));
            }
            _ => {
                let at = random.below(live.len());
                let (sequence, other) = live[at];
                if random.below(2) == 0 {
                    let kept = cache.len(sequence)? / 2;
                    cache.truncate(sequence, kept)?;
                    host.truncate(other, kept).unwrap();
                } else {
                    cache.free(sequence)?;
                    host.free(other).unwrap();
                    assert!(matches!(
                        cache_error(&cache.len(sequence).unwrap_err()),
                        CacheError::Freed { .. }
                    ));
                    live.swap_remove(at);
                }
            }
        }
        for &(sequence, other) in &live {
            assert_eq!(cache.len(sequence)?, host.len(other).unwrap());
            assert_eq!(cache.pages(sequence)?, host.pages(other).unwrap());
        }
        assert_eq!((cache.used_pages(), cache.free_pages()), (host.used_pages(), host.free_pages()));
        assert_eq!(candle_numbers(&cache.keys())?, numbers::<T>(host.keys()));
        assert_eq!(candle_numbers(&cache.values())?, numbers::<T>(host.values()));
        let (sequences, others): (Vec<_>, Vec<_>) = live.iter().copied().unzip();
        let (mut batch, mut other) = (cache.batch(sequences)?, host.batch(others).unwrap());
        let (inputs, want) = (cache.inputs(&mut batch)?, host.inputs(&mut other).unwrap());
        assert_eq!(inputs.table.dims(), &want.table.shape()[..]);
        assert_eq!(candle_numbers(&inputs.table)?, integers(want.table));
        assert_eq!(candle_numbers(&inputs.lengths)?, integers(want.lengths));
    }
    assert!(refused > 0 && copied > 0, "seed {seed}: {refused} refused, {copied} on another page");
    Ok(())
}

#[test]
fn paged_caches_are_those_of_host_memory() -> Result<()> {
    for seed in 0..6 {
        a_paged_cache_is_that_of_host_memory::<f64>(seed)?;
        a_paged_cache_is_that_of_host_memory::<f32>(10 + seed)?;
        a_paged_cache_is_that_of_host_memory::<attention::f16>(20 + seed)?;
        a_paged_cache_is_that_of_host_memory::<attention::bf16>(30 + seed)?;
    }
    Ok(())
}

#[test]
fn contiguous_caches_are_those_of_host_memory() -> Result<()> {
    let random = &mut Random(1);
    let mut cache = KvCache::new(token(DType::F32), 3, 10, device())?;
    let mut host = host::KvCache::new(host_token(DType::F32), 3, 10).unwrap();
    let mut refused = 0;
    for _ in 0..120 {
        let refusal = match random.below(5) {
            0 => {
                let [keys, values] = new_tokens(&[3, random.below(4)], DType::F32, random)?;
                let got = cache.append(&keys, &values);
                is_same(got, host.append(&to_host::<f32>(&keys)?, &to_host::<f32>(&values)?))
            }
            1 => {
                let [keys, values] = new_tokens(&[random.below(5)], DType::F32, random)?;
                // There are 3.
                let row = random.below(4);
                let got = cache.append_to(row, &keys, &values);
                is_same(got, host.append_to(row, &to_host::<f32>(&keys)?, &to_host::<f32>(&values)?))
            }
            2 => {
                let offsets = [0, 1, 1, 3 + random.below(2)];
                let [keys, values] = new_tokens(&[3], DType::F32, random)?;
                let got = cache.append_packed(&offsets, &keys, &values);
                let want = host.append_packed(&offsets, &to_host::<f32>(&keys)?, &to_host::<f32>(&values)?);
                is_same(got, want)
            }
            3 => {
                let (row, kept) = (random.below(3), random.below(8));
                is_same(cache.truncate(row, kept), host.truncate(row, kept))
            }
            _ if random.below(6) == 0 => {
                cache.clear();
                host.clear();
                assert!(cache.is_empty());
                false
            }
            _ => false,
        };
        refused += usize::from(refusal);
        assert_eq!(candle_numbers(&cache.keys())?, numbers::<f32>(host.keys()));
        assert_eq!(candle_numbers(&cache.values())?, numbers::<f32>(host.values()));
        assert_eq!(candle_numbers(&cache.lengths()?)?, integers(host.lengths()));
    }
    assert!(refused > 3, "{refused}");
    assert_eq!((cache.batch(), cache.capacity(), cache.token()), (3, 10, token(DType::F32)));
    Ok(())
}

fn cache_error(error: &candle_core::Error) -> &CacheError {
    match cause(error) {
        Some(Error::Call(attention::Error::Cache(cache))) => cache,
        _ => panic!("not an error of a cache: {error}"),
    }
}

/// Asserts that both did the same; whether it was to refuse. Handles in messages are of their caches.
fn is_same(got: Result<()>, want: std::result::Result<(), CacheError>) -> bool {
    match (got, want) {
        (Ok(()), Ok(())) => false,
        (Err(got), Err(want)) => {
            assert_eq!(cache_error(&got), &want);
            true
        }
        (got, want) => panic!("{got:?}, in host memory {want:?}"),
    }
}

/// What a cache gives out is its memory: it has later appends, of the cache's own keys too.
#[test]
fn tensors_of_a_cache_have_later_appends() -> Result<()> {
    let mut cache = PagedKvCache::new(token(DType::F32), POOL, device())?;
    let (keys, values) = (cache.keys(), cache.values());
    let sequence = cache.add();
    let [new_keys, new_values] = new_tokens(&[4], DType::F32, &mut Random(3))?;
    // A history that the cache does not keep.
    let variable = candle_core::Var::from_tensor(&new_keys)?;
    cache.append(sequence, &(variable.as_tensor() * 1.0)?, &new_values)?;
    assert!(!cache.keys().track_op());
    // Pages are taken in order.
    let rows = |pages: &Tensor, count: usize| pages.flatten(0, 1)?.narrow(0, 0, count);
    assert_eq!(candle_numbers(&rows(&keys, 4)?)?, candle_numbers(&new_keys)?);
    assert_eq!(candle_numbers(&rows(&values, 4)?)?, candle_numbers(&new_values)?);
    // From its own memory, over places that are written meanwhile.
    cache.append(sequence, &rows(&keys, 6)?, &rows(&values, 6)?)?;
    let want = Tensor::cat(&[&new_keys, &new_keys, &new_keys.zeros_like()?.narrow(0, 0, 2)?], 0)?;
    assert_eq!(candle_numbers(&rows(&keys, 10)?)?, candle_numbers(&want)?);
    Ok(())
}

#[test]
fn what_a_cache_refuses_changes_nothing() -> Result<()> {
    let mut cache = PagedKvCache::new(token(DType::F32), POOL, device())?;
    let sequence = cache.add();
    let new = |count, dtype| new_tokens(&[count], dtype, &mut Random(0));
    let [keys, values] = new(5, DType::F32)?;
    cache.append(sequence, &keys, &values)?;
    let before = candle_numbers(&cache.keys())?;
    let text = |error: candle_core::Error| cause(&error).unwrap().to_string();
    let wrong = keys.to_dtype(DType::I64)?;
    let error = cache.append(sequence, &wrong, &values).unwrap_err();
    assert!(matches!(cause(&error), Some(Error::DType { dtype: DType::I64, .. })), "{error}");
    assert!(error.to_string().ends_with("\"attention, append\""), "{error}");
    let [halves, _] = new(5, DType::F16)?;
    assert_eq!(
        text(cache.append(sequence, &halves, &values).unwrap_err()),
        "new tokens: key has dtype f16, expected f32 as the cache has"
    );
    assert_eq!(
        text(cache.append(sequence, &keys, &keys).unwrap_err()),
        "new tokens: value has shape [5, 2, 3], expected [5, 2, 2] ([tokens, K, Hv])"
    );
    let deep = keys.reshape((1, 1, 5, K, H))?;
    assert!(matches!(cause(&cache.append(sequence, &deep, &values).unwrap_err()), Some(Error::Rank { .. })));
    let batch = keys.unsqueeze(0)?;
    assert!(
        text(cache.append(sequence, &batch, &values.unsqueeze(0)?).unwrap_err()).contains("[1, 5, 2, 3]")
    );
    let [keys, values] = new(9, DType::F32)?;
    let error = cache.append(sequence, &keys, &values).unwrap_err();
    assert_eq!(
        cache_error(&error),
        &CacheError::TooLong { index: 0, length: 5, new: 9, longest: POOL.longest }
    );
    let others = [cache.add(), cache.add()];
    let [keys, values] = new_tokens(&[2, 9], DType::F32, &mut Random(0))?;
    let error = cache.append_each(&others, &keys, &values).unwrap_err();
    assert_eq!(cache_error(&error), &CacheError::Full { needed: 6, free: 5, pages: 7 });
    let other = PagedKvCache::new(token(DType::F32), POOL, device())?;
    assert!(matches!(cache_error(&other.len(sequence).unwrap_err()), CacheError::OtherCache { .. }));
    let mut batch = cache.batch([sequence])?;
    assert!(matches!(cache_error(&other.inputs(&mut batch).unwrap_err()), CacheError::OtherCache { .. }));
    assert_eq!((candle_numbers(&cache.keys())?, cache.len(sequence)?), (before, 5));
    // No such caches.
    let new = |token, pool| PagedKvCache::new(token, pool, device()).unwrap_err();
    let error = new(token(DType::U8), POOL);
    assert!(matches!(cause(&error), Some(Error::DType { dtype: DType::U8, .. })), "{error}");
    let error = new(token(DType::F32), PoolShape { page_size: 0, ..POOL });
    assert!(matches!(cache_error(&error), CacheError::Size { size: 0, .. }), "{error}");
    let huge = PoolShape { pages: 1 << 30, page_size: 1 << 30, longest: 9 };
    assert!(matches!(cache_error(&new(token(DType::F32), huge)), CacheError::Cache(_)));
    if device().is_cpu() {
        let huge = PoolShape { pages: 1 << 30, page_size: 1 << 20, longest: 9 };
        assert!(matches!(cache_error(&new(token(DType::F32), huge)), CacheError::OutOfMemory(_)));
    }
    let error = KvCache::new(token(DType::F32), 2, 0, device()).unwrap_err();
    assert!(matches!(cache_error(&error), CacheError::Size { size: 0, .. }), "{error}");
    Ok(())
}

/// Sequences that begin with one prompt, grow by packed and single tokens, and are each what they are alone.
#[test]
fn a_decoder_over_pages_is_each_sequence_alone() -> Result<()> {
    let (heads, dtype) = (4, DType::F32);
    let mut cache =
        PagedKvCache::new(token(dtype), PoolShape { pages: 24, page_size: 4, longest: 32 }, device())?;
    let random = &mut Random(9);
    let mut histories: Vec<[Tensor; 2]> = vec![new_tokens(&[6], dtype, random)?];
    let mut sequences = vec![cache.add()];
    cache.append(sequences[0], &histories[0][0], &histories[0][1])?;
    sequences.push(cache.fork(sequences[0])?);
    histories.push(histories[0].clone());
    assert_eq!(cache.used_pages(), 2);
    let attention = Attention::btnh().causal(true).query_offset(QueryOffset::BottomRight);
    let mut batch = cache.batch(sequences.clone())?;
    for step in 0..12 {
        let query = randn(&[2, 1, heads, H], step)?.to_dtype(dtype)?;
        let [keys, values] = new_tokens(&[2, 1], dtype, random)?;
        cache.append_each(batch.sequences(), &keys, &values)?;
        let inputs = cache.inputs(&mut batch)?;
        let call = attention.clone().paged(&inputs.table, &inputs.lengths);
        let out = call.forward(&query, &inputs.keys, &inputs.values)?;
        for (b, history) in histories.iter_mut().enumerate() {
            for (all, new) in history.iter_mut().zip([&keys, &values]) {
                *all = Tensor::cat(&[&*all, &new.get(b)?], 0)?;
            }
            let alone = attention.forward(&query.get(b)?, &history[0], &history[1])?;
            let difference = (out.get(b)? - alone)?.abs()?.max_all()?.to_scalar::<f32>()?;
            assert!(difference <= if device().is_cpu() { 0.0 } else { 1e-5 }, "{step}, {b}: {difference}");
        }
    }
    assert!(matches!(
        PagedKvCache::new(token(dtype), POOL, &Device::Cpu)?.append(sequences[0], &histories[0][0], &histories[0][1]),
        Err(error) if !device().is_cpu() || matches!(cache_error(&error), CacheError::OtherCache { .. })
    ));
    Ok(())
}
