//! Caches of keys and values: calls over them, and what they refuse.

use attention::core::{ForwardOutputs, Inputs};
use attention::kv_cache::{
    CacheError, CacheMemory, IntoCacheTensor, KvCache, PagedKvCache, PoolShape, TokenShape, Update,
};
use attention::{Attention, CallData, DType, Device, Error, QueryOffset, Registry, Tensor, View};

use crate::support::{Toy, numbers, registry};

/// K 2, H 4, Hv 6.
const TOKEN: TokenShape = TokenShape { dtype: DType::F32, key_heads: 2, head_dim: 4, value_head_dim: 6 };

/// Keys `[n, 2, 4]` and values `[n, 2, 6]`.
fn tokens(count: usize, seed: u64) -> [Tensor; 2] {
    [(4, seed), (6, seed + 1000)]
        .map(|(width, seed)| Tensor::from_vec(numbers(count * 2 * width, seed), [count, 2, width]).unwrap())
}

fn paged(pages: usize, page_size: usize, longest: usize) -> PagedKvCache {
    PagedKvCache::new(TOKEN, PoolShape { pages, page_size, longest }).unwrap()
}

/// What a row `[1, 1, 4, 4]` gets of these keys and values, given one after the other.
fn alone(registry: &Registry, query: View<'_>, history: &[[Tensor; 2]]) -> Vec<f32> {
    let joined = |which: usize| {
        let parts = history.iter().map(|tokens| tokens[which].as_slice::<f32>().unwrap());
        let data = parts.collect::<Vec<_>>().concat();
        let width = [4, 6][which];
        let shape = [1, data.len() / (2 * width), 2, width];
        Tensor::from_vec(data, shape).unwrap()
    };
    let call = Attention::new().registry(registry).causal(true).query_offset(QueryOffset::BottomRight);
    call.forward(query, &joined(0), &joined(1)).unwrap().into_vec().unwrap()
}

/// Prompts, a fork, steps of decoding, and a sequence that leaves: each row is that of its sequence alone,
/// and one plan serves them all.
#[test]
fn a_decoder_over_a_paged_cache_plans_once() {
    let toy = Toy::new("toy").arc();
    let registry = registry([toy.clone()]);
    let oracle = registry.clone();
    let mut cache = paged(16, 4, 24);
    let (first, other) = (cache.add(), cache.add());
    let mut history = vec![vec![tokens(6, 1)], vec![tokens(3, 2)]];
    cache.append(first, &history[0][0][0], &history[0][0][1]).unwrap();
    cache.append(other, &history[1][0][0], &history[1][0][1]).unwrap();
    let fork = cache.fork(first).unwrap();
    history.push(history[0].clone());
    assert_eq!(cache.used_pages(), 3);

    let mut batch = cache.batch([first, other, fork]).unwrap();
    let attention = Attention::new().registry(&registry).causal(true).query_offset(QueryOffset::BottomRight);
    for step in 0..14u64 {
        let new = [10, 11, 12].map(|seed| tokens(1, seed + step * 10));
        let joined = |which: usize, width: usize| {
            let data = new.iter().flat_map(|tokens| tokens[which].as_slice::<f32>().unwrap().to_vec());
            Tensor::from_vec(data.collect::<Vec<f32>>(), [3, 1, 2, width]).unwrap()
        };
        cache.append_each(batch.sequences(), &joined(0, 4), &joined(1, 6)).unwrap();
        history.iter_mut().zip(new).for_each(|(history, new)| history.push(new));

        let query = Tensor::from_vec(numbers(3 * 16, 7 + step), [3, 1, 4, 4]).unwrap();
        let (plans, inputs) = (toy.plans(), cache.inputs(&mut batch).unwrap());
        let call = attention.clone().paged(inputs.table, inputs.lengths);
        let out = call.forward(&query, inputs.keys, inputs.values).unwrap();
        assert_eq!(toy.plans(), plans + usize::from(step == 0));
        for (b, history) in history.iter().enumerate() {
            let query = query.view().index_axis(0, b).unwrap().unsqueeze().unwrap();
            let want = alone(&Registry::empty().with(Toy::new("alone").arc()), query, history);
            assert_eq!(
                &out.as_slice::<f32>().unwrap()[b * 24..][..24],
                &want[..],
                "sequence {b} of step {step}"
            );
        }
    }
    // 20 tokens, 17 and 20, of which a page is shared.
    assert_eq!(cache.used_pages(), 5 + 5 + 4);
    drop(oracle);

    // One sequence less is another problem.
    cache.free(other).unwrap();
    assert!(batch.remove(other));
    let inputs = cache.inputs(&mut batch).unwrap();
    let query = Tensor::from_vec(numbers(2 * 16, 1), [2, 1, 4, 4]).unwrap();
    let call = attention.paged(inputs.table, inputs.lengths);
    let out = call.forward(&query, inputs.keys, inputs.values).unwrap();
    let want = alone(&registry, query.view().narrow(0, 1..2).unwrap(), &history[2]);
    assert_eq!(&out.as_slice::<f32>().unwrap()[24..], &want[..]);
}

/// The same with a plan that is held, and chunks of a prompt of any length as packed queries.
#[test]
fn a_held_plan_and_packed_queries_over_a_paged_cache() {
    let toy = Toy::new("toy").arc();
    let registry = registry([toy.clone()]);
    let mut cache = paged(8, 4, 12);
    let sequences = [cache.add(), cache.add()];
    let mut batch = cache.batch(sequences).unwrap();
    let mut plan = None;
    for (step, (lengths, offsets)) in
        [([3, 2], [0, 3, 5]), ([1, 4], [0, 1, 5]), ([5, 0], [0, 5, 5])].into_iter().enumerate()
    {
        let [k, v] = tokens(5, step as u64);
        cache.append_packed(&sequences, &offsets, &k, &v).unwrap();
        assert_eq!(offsets[1], lengths[0]);
        let query = Tensor::from_vec(numbers(5 * 16, step as u64), [5, 4, 4]).unwrap();
        let inputs = cache.inputs(&mut batch).unwrap();
        let call = Attention::new()
            .registry(&registry)
            .causal(true)
            .query_offset(QueryOffset::BottomRight)
            .packed_queries(offsets)
            .longest(5, None)
            .paged(inputs.table, inputs.lengths);
        let want = call.forward(&query, inputs.keys, inputs.values).unwrap();
        let plan = plan.get_or_insert_with(|| {
            call.plan(&call.problem(&query, inputs.keys, inputs.values).unwrap()).unwrap()
        });
        let mut out = Tensor::zeros::<f32>([5, 4, 6]).unwrap();
        let data = CallData { block_table: Some(inputs.table), ..call.data() };
        let call = Inputs { data, ..Inputs::new(query.view(), inputs.keys, inputs.values) };
        plan.forward_into(call, ForwardOutputs { out: out.view_mut(), lse: None }).unwrap();
        assert_eq!(out, want);
    }
    assert_eq!(toy.plans(), 1);
    assert_eq!([cache.len(sequences[0]).unwrap(), cache.len(sequences[1]).unwrap()], [9, 6]);
}

#[test]
fn a_decoder_over_a_contiguous_cache_plans_once() {
    let toy = Toy::new("toy").arc();
    let registry = registry([toy.clone()]);
    let mut cache = KvCache::new(TOKEN, 2, 10).unwrap();
    let mut history = [vec![tokens(4, 1)], vec![tokens(1, 2)]];
    for (b, history) in history.iter().enumerate() {
        cache.append_to(b, &history[0][0], &history[0][1]).unwrap();
    }
    for step in 0..6u64 {
        let new = [tokens(1, 20 + step), tokens(1, 30 + step)];
        let joined = |which: usize, width: usize| {
            let data = new.iter().flat_map(|tokens| tokens[which].as_slice::<f32>().unwrap().to_vec());
            Tensor::from_vec(data.collect::<Vec<f32>>(), [2, 1, 2, width]).unwrap()
        };
        cache.append(&joined(0, 4), &joined(1, 6)).unwrap();
        history.iter_mut().zip(new).for_each(|(history, new)| history.push(new));
        let query = Tensor::from_vec(numbers(2 * 16, step), [2, 1, 4, 4]).unwrap();
        let call = Attention::new().registry(&registry).causal(true).query_offset(QueryOffset::BottomRight);
        let call = call.key_value_lengths(cache.lengths());
        let out = call.forward(&query, cache.keys(), cache.values()).unwrap();
        assert_eq!(toy.plans(), 1);
        for (b, history) in history.iter().enumerate() {
            let query = query.view().index_axis(0, b).unwrap().unsqueeze().unwrap();
            let want = alone(&Registry::empty().with(Toy::new("alone").arc()), query, history);
            assert_eq!(
                &out.as_slice::<f32>().unwrap()[b * 24..][..24],
                &want[..],
                "sequence {b} of step {step}"
            );
        }
    }
    // Full: the first has 10 tokens, and the second gets none either.
    let [k, v] = [4, 6].map(|width| Tensor::zeros::<f32>([2, 1, 2, width]).unwrap());
    let error = cache.append(&k, &v).unwrap_err();
    assert_eq!(error.to_string(), "sequence 0 has 10 tokens, and 1 more are above the 10 that it may have");
    assert_eq!([cache.len(0).unwrap(), cache.len(1).unwrap()], [10, 7]);
    assert_eq!(cache.len(2).unwrap_err().to_string(), "there is no sequence 2, the cache has 2");
    assert_eq!((cache.capacity(), cache.batch(), cache.token()), (10, 2, TOKEN));
}

#[test]
fn what_a_cache_refuses_is_told_with_its_numbers() {
    let mut cache = paged(3, 4, 9);
    let (one, other) = (cache.add(), cache.add());
    let [k, v] = tokens(5, 1);
    cache.append(one, &k, &v).unwrap();
    let told = |error: CacheError| error.to_string();
    assert_eq!(
        told(cache.append(other, &k, &v).unwrap_err()),
        "the append needs 2 pages, and 1 of 3 are free: free or truncate sequences first"
    );
    let error = cache.append(one, &k, &v).unwrap_err();
    assert_eq!(told(error), "sequence 0 has 5 tokens, and 5 more are above the 9 that it may have");
    // Room for either, and not for both.
    let [k1, v1] = tokens(8, 1);
    let error = cache.append_packed(&[one, other], &[0, 4, 8], &k1, &v1).unwrap_err();
    assert_eq!(
        told(error),
        "the append needs 2 pages, and 1 of 3 are free: free or truncate sequences first"
    );
    assert_eq!((cache.len(one), cache.len(other), cache.free_pages()), (Ok(5), Ok(0), 1));
    let error = cache.append_packed(&[one, other], &[0, 4], &k1, &v1).unwrap_err();
    assert_eq!(told(error), "2 sequences were given, and offsets (one more than sequences) 2");
    let error = cache.append_packed(&[one], &[0, 9], &k1, &v1).unwrap_err();
    assert_eq!(
        told(error),
        "new tokens: token start 1 is 9, expected 0 to 8: starts rise from 0 to at most the rows of the tensor"
    );
    let error = cache.append_packed(&[one], &[1, 2], &k1, &v1).unwrap_err();
    assert!(told(error).starts_with("new tokens: token start 0 is 1, expected 0 to 0"));
    let error = cache.append(one, &v, &v).unwrap_err();
    assert_eq!(told(error), "new tokens: key has shape [5, 2, 6], expected [5, 2, 4] ([tokens, K, H])");
    let error = cache.append(one, &k, &v1).unwrap_err();
    assert_eq!(told(error), "new tokens: value has shape [8, 2, 6], expected [5, 2, 6] ([tokens, K, Hv])");
    let error = cache.append_each(&[one, other], &k, &v).unwrap_err();
    assert_eq!(told(error), "new tokens: key has shape [5, 2, 4], expected [2, 2, 2, 4] ([B, tokens, K, H])");
    let wide = Tensor::zeros::<f64>([1, 2, 4]).unwrap();
    let error = cache.append(one, &wide, &wide).unwrap_err();
    assert_eq!(told(error), "new tokens: key has dtype f64, expected f32 as the cache has");
    let device = k.view();
    // SAFETY: pointer, lifetime and description are those of a live view; the cache refuses memory of a
    // device, so nobody follows the pointer.
    let device = unsafe { View::from_raw_parts(device.as_ptr(), Device::Cuda(0), device.desc()) }.unwrap();
    let error = cache.append(one, device, &v).unwrap_err();
    assert_eq!(told(error), "new tokens: key is on cuda:0, the call is on cpu");

    cache.free(one).unwrap();
    assert_eq!(told(cache.append(one, &k, &v).unwrap_err()), "sequence 0.0 was freed");
    let again = cache.add();
    assert_eq!(told(cache.append(one, &k, &v).unwrap_err()), "sequence 0.0 was freed");
    cache.append(again, &k, &v).unwrap();
    assert_eq!(told(paged(1, 1, 1).len(again).unwrap_err()), "sequence 0.1 belongs to another cache");
    assert_eq!(
        told(
            cache
                .append_each(
                    &[again, again],
                    &Tensor::zeros::<f32>([2, 1, 2, 4]).unwrap(),
                    &Tensor::zeros::<f32>([2, 1, 2, 6]).unwrap()
                )
                .unwrap_err()
        ),
        "sequence 0.1 is given twice"
    );
    assert_eq!(
        told(cache.truncate(again, 6).unwrap_err()),
        "6 tokens are to be kept, and the sequence has 5"
    );
    // One of this crate's errors, for `?`.
    let error = Error::from(cache.free(one).unwrap_err());
    assert_eq!(format!("{error:?}"), "sequence 0.0 was freed");

    let shape = PoolShape { pages: 1, page_size: 1, longest: 1 };
    let made = |token, shape| told(PagedKvCache::new(token, shape).unwrap_err());
    assert_eq!(
        made(TOKEN, PoolShape { page_size: 0, ..shape }),
        "the page size is 0, expected 1 to 2147483647"
    );
    assert_eq!(
        made(TokenShape { head_dim: 0, ..TOKEN }, shape),
        "the head dimension of keys is 0, expected 1 to 2147483647"
    );
    assert_eq!(
        made(TokenShape { dtype: DType::I32, ..TOKEN }, shape),
        "the cache: key has dtype i32, expected f64, f32, f16, bf16, f8e4m3 or f8e5m2"
    );
    let large = i32::MAX as usize;
    let error = made(
        TokenShape { head_dim: large, ..TOKEN },
        PoolShape { pages: large, page_size: large, longest: 1 },
    );
    assert!(error.contains("overflows the address space"), "{error}");
    let error = KvCache::new(TOKEN, 1 << 30, 1 << 25).unwrap_err();
    assert!(told(error).starts_with("no memory for a tensor of "));
}

/// No sequence has a page twice, so a table needs no more entries than there are pages, however long sequences
/// may get.
#[test]
fn a_table_has_no_more_entries_than_there_are_pages() {
    let mut cache = paged(2, 1, i32::MAX as usize);
    let sequence = cache.add();
    assert!(cache.is_empty());
    let [k, v] = tokens(2, 1);
    cache.append(sequence, &k, &v).unwrap();
    assert!(!cache.is_empty());
    let mut batch = cache.batch([sequence]).unwrap();
    assert_eq!(cache.inputs(&mut batch).unwrap().table.shape(), [1, 2].into());
    let [k, v] = tokens(1, 1);
    let full = cache.append(sequence, &k, &v).unwrap_err().to_string();
    assert_eq!(full, "the append needs 1 pages, and 0 of 2 are free: free or truncate sequences first");
}

/// A page that two sequences have partly filled is copied for the first that goes on, and not for the last.
#[test]
fn shared_pages_are_copied_where_one_goes_on() {
    let mut cache = paged(4, 4, 16);
    let one = cache.add();
    let [k, v] = tokens(6, 1);
    cache.append(one, &k, &v).unwrap();
    let other = cache.fork(one).unwrap();
    assert_eq!((cache.pages(one).unwrap(), cache.pages(other).unwrap()), (&[0, 1][..], &[0, 1][..]));
    assert_eq!([0, 1, 2].map(|page| cache.references(page)), [Some(2), Some(2), Some(0)]);
    // Both in one step: one copy is enough.
    assert_eq!(cache.pages_for(&[one, other], &[1, 1]), Ok(1));
    let [k, v] = [4, 6].map(|width| Tensor::zeros::<f32>([2, 1, 2, width]).unwrap());
    cache.append_each(&[one, other], &k, &v).unwrap();
    assert_eq!((cache.pages(one).unwrap(), cache.pages(other).unwrap()), (&[0, 2][..], &[0, 1][..]));
    assert_eq!([0, 1, 2].map(|page| cache.references(page)), [Some(2), Some(1), Some(1)]);
    // A prefix that ends with a page needs no copy of it.
    let third = cache.fork_prefix(one, 4).unwrap();
    assert_eq!(cache.pages_for(&[third], &[1]), Ok(1));
    cache.truncate(one, 4).unwrap();
    assert_eq!((cache.pages(one).unwrap(), cache.references(2)), (&[0][..], Some(0)));
    [one, other, third].into_iter().for_each(|sequence| cache.free(sequence).unwrap());
    assert_eq!((cache.free_pages(), cache.used_pages(), cache.is_empty()), (4, 0, true));
}

/// Memory of another crate, which fails when it is told to, having written nothing.
struct Failing {
    keys: Tensor,
    values: Tensor,
    fails: bool,
}

/// A view for memory that is not the library's.
struct Given<'a>(View<'a>);

impl CacheMemory for Failing {
    type Tensor<'a> = View<'a>;

    fn device(&self) -> Device {
        Device::Cpu
    }

    fn keys(&self) -> View<'_> {
        self.keys.view()
    }

    fn values(&self) -> View<'_> {
        self.values.view()
    }

    fn update(&mut self, update: &Update<'_, View<'_>>) -> Result<(), CacheError> {
        if self.fails {
            return Err(CacheError::Memory { reason: "out of luck".to_owned() });
        }
        assert_eq!(update.keys().shape()[..3], update.values().shape()[..3]);
        assert_eq!(update.writes().iter().map(|write| write.count).sum::<usize>(), 3);
        assert!(update.copies().is_empty());
        Ok(())
    }
}

impl<'a> IntoCacheTensor<'a, Failing> for Given<'a> {
    fn into_cache_tensor(self) -> Result<View<'a>, attention::InvalidCall> {
        Ok(self.0)
    }
}

#[test]
fn memory_of_another_crate_is_checked_and_may_fail() {
    let shape = PoolShape { pages: 4, page_size: 2, longest: 8 };
    let zeros =
        |shape: &[usize]| Tensor::zeros::<f32>(attention::core::Dims::from_slice(shape).unwrap()).unwrap();
    let made = PagedKvCache::with_memory(TOKEN, shape, |[keys, values]| {
        Ok(Failing { keys: zeros(&keys), values: zeros(&values), fails: true })
    });
    let mut cache = made.unwrap();
    let sequence = cache.add();
    let [keys, values] = tokens(3, 1);
    let error = cache.append(sequence, Given(keys.view()), Given(values.view())).unwrap_err();
    assert_eq!(error.to_string(), "the memory of the cache failed: out of luck");
    assert_eq!((cache.len(sequence), cache.used_pages()), (Ok(0), 0));
    // Tokens are checked before the memory is asked.
    let error = cache.append(sequence, Given(keys.view()), Given(keys.view())).unwrap_err();
    assert!(matches!(error, CacheError::Tokens(_)), "{error}");
    // Memory that is not what was asked for, and sizes that are refused before it is.
    let wrong = KvCache::with_memory(TOKEN, 2, 3, |[keys, _]| {
        Ok(Failing { keys: zeros(&keys), values: zeros(&keys), fails: false })
    });
    let Err(error) = wrong else { panic!("values have the width of keys") };
    assert!(error.to_string().contains("value has shape [2, 3, 2, 4], expected [2, 3, 2, 6]"), "{error}");
    let refused = KvCache::with_memory(TOKEN, 2, 0, |_| -> Result<Failing, CacheError> { unreachable!() });
    assert!(matches!(refused, Err(CacheError::Size { size: 0, .. })));
    let mut cache = KvCache::with_memory(TOKEN, 1, 3, |[keys, values]| {
        Ok(Failing { keys: zeros(&keys), values: zeros(&values), fails: false })
    })
    .unwrap();
    cache.append_to(0, Given(keys.view()), Given(values.view())).unwrap();
    assert_eq!(cache.len(0), Ok(3));
}
