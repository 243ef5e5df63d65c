//! Caches against a model: for each sequence a list of its tokens.

use std::collections::HashMap;

use attention::kv_cache::{CacheError, KvCache, PagedBatch, PagedKvCache, PoolShape, Sequence, TokenShape};
use attention::{DType, Scalar, Tensor, View, bf16, f16};
use proptest::prelude::*;

/// K 2, H 3, Hv 2.
const HEADS: usize = 2;
const WIDTHS: [usize; 2] = [3, 2];

/// An element of the key (0) or value (1) of a token: a whole number that every dtype has.
fn element(token: u32, which: usize, head: usize, column: usize) -> f64 {
    f64::from((token * 31 + (which * 13 + head * 5 + column) as u32) % 251)
}

/// Keys or values of these tokens, `[n, K, width]` or with the given axes in front, in memory of either order
/// of token and head.
fn tensor(dtype: DType, tokens: &[u32], which: usize, heads_first: bool) -> Tensor {
    fn of<T: Scalar>(tokens: &[u32], which: usize, heads_first: bool) -> Tensor {
        let (n, width) = (tokens.len(), WIDTHS[which]);
        let at = |index: usize| {
            let (outer, inner, column) =
                (index / width / if heads_first { n } else { HEADS }, index / width, index % width);
            let (token, head) = if heads_first { (inner % n, outer) } else { (outer, inner % HEADS) };
            T::from_f64(element(tokens[token], which, head, column))
        };
        let data: Vec<T> = (0..n * HEADS * width).map(at).collect();
        let shape = if heads_first { [HEADS, n, width] } else { [n, HEADS, width] };
        Tensor::from_vec(data, shape).unwrap()
    }
    match dtype {
        DType::F64 => of::<f64>(tokens, which, heads_first),
        DType::F32 => of::<f32>(tokens, which, heads_first),
        DType::F16 => of::<f16>(tokens, which, heads_first),
        _ => of::<bf16>(tokens, which, heads_first),
    }
}

/// `[n, K, width]` of a tensor of [`tensor`].
fn view(tensor: &Tensor, heads_first: bool) -> View<'_> {
    if heads_first { tensor.view().permute([1, 0, 2]).unwrap() } else { tensor.view() }
}

fn at(view: View<'_>, index: &[usize]) -> f64 {
    match view.desc().dtype() {
        DType::F64 => view.host::<f64>().unwrap().at(index),
        DType::F32 => view.host::<f32>().unwrap().at(index).to_f64(),
        DType::F16 => view.host::<f16>().unwrap().at(index).to_f64(),
        _ => view.host::<bf16>().unwrap().at(index).to_f64(),
    }
}

/// That the place of a token holds it.
fn holds(keys: View<'_>, values: View<'_>, place: [usize; 2], token: u32) {
    for (which, view) in [keys, values].into_iter().enumerate() {
        for head in 0..HEADS {
            for column in 0..WIDTHS[which] {
                let got = at(view, &[place[0], place[1], head, column]);
                assert_eq!(got, element(token, which, head, column), "token {token} at {place:?}");
            }
        }
    }
}

/// What is done to a paged cache; sequences are picked by a number modulo how many there are.
#[derive(Clone, Debug)]
enum Operation {
    Add,
    Append {
        pick: usize,
        count: usize,
        heads_first: bool,
    },
    /// The same number to several sequences.
    AppendEach {
        picks: Vec<usize>,
        count: usize,
    },
    AppendPacked {
        parts: Vec<(usize, usize)>,
        behind: usize,
    },
    Fork {
        pick: usize,
    },
    /// A part of the tokens, in sixteenths.
    ForkPrefix {
        pick: usize,
        part: usize,
    },
    Truncate {
        pick: usize,
        part: usize,
    },
    Free {
        pick: usize,
    },
    Clear,
}

fn operation() -> impl Strategy<Value = Operation> {
    let pick = 0usize..64;
    prop_oneof![
        3 => Just(Operation::Add),
        6 => (pick.clone(), 0usize..9, any::<bool>())
            .prop_map(|(pick, count, heads_first)| Operation::Append { pick, count, heads_first }),
        5 => (proptest::collection::vec(pick.clone(), 0..5), 0usize..3)
            .prop_map(|(picks, count)| Operation::AppendEach { picks, count }),
        3 => (proptest::collection::vec((pick.clone(), 0usize..6), 0..4), 0usize..3)
            .prop_map(|(parts, behind)| Operation::AppendPacked { parts, behind }),
        4 => pick.clone().prop_map(|pick| Operation::Fork { pick }),
        2 => (pick.clone(), 0usize..=16).prop_map(|(pick, part)| Operation::ForkPrefix { pick, part }),
        3 => (pick.clone(), 0usize..=16).prop_map(|(pick, part)| Operation::Truncate { pick, part }),
        3 => pick.prop_map(|pick| Operation::Free { pick }),
        1 => Just(Operation::Clear),
    ]
}

/// A cache, and what it should be.
struct Run {
    cache: PagedKvCache,
    other: PagedKvCache,
    live: Vec<(Sequence, Vec<u32>)>,
    freed: Vec<Sequence>,
    /// Lives through all operations.
    batch: PagedBatch,
    tokens: u32,
}

impl Run {
    fn new(dtype: DType, shape: PoolShape) -> Self {
        let token = TokenShape { dtype, key_heads: HEADS, head_dim: WIDTHS[0], value_head_dim: WIDTHS[1] };
        let (cache, other) =
            (PagedKvCache::new(token, shape).unwrap(), PagedKvCache::new(token, shape).unwrap());
        let batch = cache.batch([]).unwrap();
        Self { cache, other, live: vec![], freed: vec![], batch, tokens: 0 }
    }

    fn picked(&self, pick: usize) -> Option<usize> {
        (!self.live.is_empty()).then(|| pick % self.live.len())
    }

    /// The sequences picked, each once.
    fn distinct(&self, picks: impl IntoIterator<Item = usize>) -> Vec<usize> {
        let mut distinct = vec![];
        for index in picks.into_iter().filter_map(|pick| self.picked(pick)) {
            if !distinct.contains(&index) {
                distinct.push(index);
            }
        }
        distinct
    }

    fn new_tokens(&mut self, count: usize) -> Vec<u32> {
        let first = self.tokens;
        self.tokens += count as u32;
        (first..self.tokens).collect()
    }

    /// What an append of this many tokens to these sequences comes to: how many pages it needs, or that one
    /// gets too long.
    fn expected(&self, parts: &[(usize, usize)]) -> Result<usize, CacheError> {
        let PoolShape { page_size, longest, .. } = self.cache.shape();
        let mut references: HashMap<i32, usize> = HashMap::new();
        for (sequence, _) in &self.live {
            for &page in self.cache.pages(*sequence).unwrap() {
                *references.entry(page).or_default() += 1;
            }
        }
        let mut needed = 0;
        for (index, &(which, new)) in parts.iter().enumerate() {
            let (sequence, tokens) = &self.live[which];
            let length = tokens.len();
            if length + new > longest {
                return Err(CacheError::TooLong { index, length, new, longest });
            }
            needed += (length + new).div_ceil(page_size) - length.div_ceil(page_size);
            if new > 0 && length % page_size > 0 {
                let last = self.cache.pages(*sequence).unwrap()[length / page_size];
                let references = references.get_mut(&last).unwrap();
                if *references > 1 {
                    *references -= 1;
                    needed += 1;
                }
            }
        }
        Ok(needed)
    }

    /// Appends by `append`, and checks whether it should have worked.
    fn append(
        &mut self,
        parts: &[(usize, usize)],
        append: impl FnOnce(&mut PagedKvCache, &[Sequence], &[Vec<u32>]) -> Result<(), CacheError>,
    ) {
        let expected = self.expected(parts);
        let sequences: Vec<Sequence> = parts.iter().map(|&(which, _)| self.live[which].0).collect();
        let counts: Vec<usize> = parts.iter().map(|&(_, count)| count).collect();
        assert_eq!(self.cache.pages_for(&sequences, &counts), expected);
        let new: Vec<Vec<u32>> = counts.iter().map(|&count| self.new_tokens(count)).collect();
        let before = self.snapshot();
        let free = self.cache.free_pages();
        let done = append(&mut self.cache, &sequences, &new);
        match expected {
            Err(error) => assert_eq!(done, Err(error)),
            Ok(needed) if needed > free => {
                let pages = self.cache.shape().pages;
                assert_eq!(done, Err(CacheError::Full { needed, free, pages }));
            }
            Ok(needed) => {
                assert_eq!(done, Ok(()));
                assert_eq!(self.cache.free_pages(), free - needed);
                for (&(which, _), new) in parts.iter().zip(new) {
                    self.live[which].1.extend(new);
                }
                return;
            }
        }
        assert_eq!(self.snapshot(), before, "an append that fails changes nothing");
    }

    fn snapshot(&self) -> Vec<(usize, Vec<i32>)> {
        let of = |sequence: Sequence| {
            (self.cache.len(sequence).unwrap(), self.cache.pages(sequence).unwrap().to_vec())
        };
        self.live.iter().map(|&(sequence, _)| of(sequence)).collect()
    }

    fn joined(&mut self, sequence: Sequence, tokens: Vec<u32>) {
        self.live.push((sequence, tokens));
        self.batch.push(sequence);
    }

    fn apply(&mut self, operation: &Operation) {
        let dtype = self.cache.token().dtype;
        match *operation {
            Operation::Add => {
                let sequence = self.cache.add();
                self.joined(sequence, vec![]);
            }
            Operation::Append { pick, count, heads_first } => {
                let Some(which) = self.picked(pick) else { return };
                self.append(&[(which, count)], |cache, sequences, new| {
                    let [k, v] = [0, 1].map(|which| tensor(dtype, &new[0], which, heads_first));
                    cache.append(sequences[0], view(&k, heads_first), view(&v, heads_first))
                });
            }
            Operation::AppendEach { ref picks, count } => {
                let parts: Vec<_> =
                    self.distinct(picks.iter().copied()).into_iter().map(|which| (which, count)).collect();
                self.append(&parts, |cache, sequences, new| {
                    let all = new.concat();
                    let [k, v] = [0, 1].map(|which| {
                        let tensor = tensor(dtype, &all, which, false);
                        let shape = [sequences.len(), count, HEADS, WIDTHS[which]];
                        reshaped(tensor, shape)
                    });
                    cache.append_each(sequences, &k, &v)
                });
            }
            Operation::AppendPacked { ref parts, behind } => {
                let picks = self.distinct(parts.iter().map(|part| part.0));
                let parts: Vec<_> = picks.into_iter().zip(parts.iter().map(|part| part.1)).collect();
                self.append(&parts, |cache, sequences, new| {
                    let mut all = new.concat();
                    let ends = new.iter().scan(0, |end, new| {
                        *end += new.len();
                        Some(*end)
                    });
                    let offsets: Vec<usize> = std::iter::once(0).chain(ends).collect();
                    // Tokens that belong to no sequence.
                    all.extend((0..behind as u32).map(|token| token + 1000));
                    let [k, v] = [0, 1].map(|which| tensor(dtype, &all, which, true));
                    cache.append_packed(sequences, &offsets, view(&k, true), view(&v, true))
                });
            }
            Operation::Fork { pick } => {
                let Some(which) = self.picked(pick) else { return };
                let (sequence, tokens) = self.live[which].clone();
                let fork = self.cache.fork(sequence).unwrap();
                self.joined(fork, tokens);
            }
            Operation::ForkPrefix { pick, part } => {
                let Some(which) = self.picked(pick) else { return };
                let (sequence, mut tokens) = self.live[which].clone();
                let too_few = CacheError::TooFew { kept: tokens.len() + 1, length: tokens.len() };
                assert_eq!(self.cache.fork_prefix(sequence, tokens.len() + 1), Err(too_few));
                tokens.truncate(tokens.len() * part / 16);
                let fork = self.cache.fork_prefix(sequence, tokens.len()).unwrap();
                self.joined(fork, tokens);
            }
            Operation::Truncate { pick, part } => {
                let Some(which) = self.picked(pick) else { return };
                let (sequence, tokens) = &mut self.live[which];
                let too_few = CacheError::TooFew { kept: tokens.len() + 1, length: tokens.len() };
                assert_eq!(self.cache.truncate(*sequence, tokens.len() + 1), Err(too_few));
                tokens.truncate(tokens.len() * part / 16);
                self.cache.truncate(*sequence, tokens.len()).unwrap();
            }
            Operation::Free { pick } => {
                let Some(which) = self.picked(pick) else { return };
                let (sequence, _) = self.live.remove(which);
                self.cache.free(sequence).unwrap();
                assert_eq!(self.cache.inputs(&mut self.batch).err(), Some(CacheError::Freed { sequence }));
                assert!(self.batch.remove(sequence) && !self.batch.remove(sequence));
                self.freed.push(sequence);
            }
            Operation::Clear => {
                self.cache.clear();
                self.freed.extend(self.live.drain(..).map(|(sequence, _)| sequence));
                self.batch = self.cache.batch([]).unwrap();
                assert!(self.cache.is_empty() && self.cache.used_pages() == 0);
            }
        }
    }

    /// Compares everything.
    fn check(&mut self) {
        let PoolShape { pages, page_size, longest } = self.cache.shape();
        let mut references = vec![0usize; pages];
        for (sequence, tokens) in &self.live {
            assert_eq!(self.cache.len(*sequence), Ok(tokens.len()));
            let own = self.cache.pages(*sequence).unwrap();
            assert_eq!(own.len(), tokens.len().div_ceil(page_size));
            own.iter().for_each(|&page| references[page as usize] += 1);
            for (j, &token) in tokens.iter().enumerate() {
                let place = [own[j / page_size] as usize, j % page_size];
                holds(self.cache.keys(), self.cache.values(), place, token);
            }
        }
        let used = references.iter().filter(|&&references| references > 0).count();
        assert_eq!((self.cache.used_pages(), self.cache.free_pages()), (used, pages - used), "pages leak");
        assert_eq!((self.cache.sequence_count(), self.cache.is_empty()), (self.live.len(), used == 0));
        for (page, &references) in references.iter().enumerate() {
            assert_eq!(self.cache.references(page), Some(references), "page {page}");
        }
        assert_eq!(self.cache.references(pages), None);

        // The batch that was there from the beginning, and one that is made anew, have the same table.
        let most = longest.div_ceil(page_size).min(pages);
        let order = self.batch.sequences().to_vec();
        let mut anew = self.cache.batch(order.iter().copied()).unwrap();
        for batch in [&mut self.batch, &mut anew] {
            let inputs = self.cache.inputs(batch).unwrap();
            assert_eq!(inputs.table.shape(), [order.len(), most].into());
            for (b, &sequence) in order.iter().enumerate() {
                let own = self.cache.pages(sequence).unwrap();
                let (length, entries) = (
                    inputs.lengths.host::<i32>().unwrap().at(&[b]),
                    inputs.table.host::<i32>().unwrap().row(&[b]),
                );
                assert_eq!(length as usize, self.cache.len(sequence).unwrap());
                let want = own.iter().copied().chain(std::iter::repeat(-1)).take(most);
                assert!(entries.iter().eq(want), "row {b}");
            }
        }

        // Handles that are good for nothing.
        for &sequence in &self.freed {
            let freed = CacheError::Freed { sequence };
            assert_eq!(self.cache.len(sequence), Err(freed.clone()));
            assert_eq!(self.cache.free(sequence), Err(freed.clone()));
            assert_eq!(self.cache.fork(sequence), Err(freed.clone()));
            assert_eq!(self.cache.truncate(sequence, 0), Err(freed.clone()));
            assert_eq!(self.cache.pages_for(&[sequence], &[0]), Err(freed.clone()));
            assert_eq!(self.cache.batch([sequence]).err(), Some(freed));
        }
        for &(sequence, _) in &self.live {
            assert!(matches!(self.other.len(sequence), Err(CacheError::OtherCache { .. })));
            assert!(matches!(self.other.free(sequence), Err(CacheError::OtherCache { .. })));
        }
        if let [(sequence, _), ..] = self.live[..] {
            let twice = Err(CacheError::Twice { sequence });
            assert_eq!(self.cache.pages_for(&[sequence, sequence], &[0, 0]), twice);
        }
        let other = self.other.inputs(&mut self.batch);
        assert_eq!(other.err(), Some(CacheError::OtherCache { what: "the batch".to_owned() }));
    }
}

fn reshaped(tensor: Tensor, shape: [usize; 4]) -> Tensor {
    match tensor.dtype() {
        DType::F64 => Tensor::from_vec(tensor.into_vec::<f64>().unwrap(), shape),
        DType::F32 => Tensor::from_vec(tensor.into_vec::<f32>().unwrap(), shape),
        DType::F16 => Tensor::from_vec(tensor.into_vec::<f16>().unwrap(), shape),
        _ => Tensor::from_vec(tensor.into_vec::<bf16>().unwrap(), shape),
    }
    .unwrap()
}

fn dtype() -> impl Strategy<Value = DType> {
    proptest::sample::select(&DType::FLOATS[..])
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_paged_cache_is_its_model(
        dtype in dtype(),
        (pages, page_size, longest) in (1usize..14, 1usize..6, 1usize..40),
        operations in proptest::collection::vec(operation(), 1..50),
    ) {
        let mut run = Run::new(dtype, PoolShape { pages, page_size, longest });
        for operation in &operations {
            run.apply(operation);
            run.check();
        }
    }

    #[test]
    fn a_contiguous_cache_is_its_model(
        dtype in dtype(),
        (batch, capacity) in (0usize..4, 1usize..12),
        // Which sequence, or all; how many tokens; what to do with them.
        operations in proptest::collection::vec((0usize..5, 0usize..6, 0u8..6, any::<bool>()), 1..40),
    ) {
        let token = TokenShape { dtype, key_heads: HEADS, head_dim: WIDTHS[0], value_head_dim: WIDTHS[1] };
        let mut cache = KvCache::new(token, batch, capacity).unwrap();
        let mut model: Vec<Vec<u32>> = vec![vec![]; batch];
        let mut tokens = 0u32;
        for (which, count, what, heads_first) in operations {
            let mut new = |count: usize| {
                tokens += count as u32;
                (tokens - count as u32..tokens).collect::<Vec<u32>>()
            };
            let too_long = |index: usize, new: usize| {
                let length = model[index].len();
                (length + new > capacity)
                    .then_some(CacheError::TooLong { index, length, new, longest: capacity })
            };
            match what {
                0 | 1 => {
                    let each: Vec<Vec<u32>> = (0..batch).map(|_| new(count)).collect();
                    let [k, v] = [0, 1].map(|which| {
                        let tensor = tensor(dtype, &each.concat(), which, false);
                        reshaped(tensor, [batch, count, HEADS, WIDTHS[which]])
                    });
                    let expected = (0..batch).find_map(|index| too_long(index, count));
                    prop_assert_eq!(cache.append(&k, &v).err(), expected.clone());
                    if expected.is_none() {
                        model.iter_mut().zip(each).for_each(|(model, new)| model.extend(new));
                    }
                }
                2 => {
                    let new = new(count);
                    let [k, v] = [0, 1].map(|which| tensor(dtype, &new, which, heads_first));
                    let expected = if which < batch {
                        too_long(which, count)
                    } else {
                        Some(CacheError::NoSuchSequence { index: which, batch })
                    };
                    let done = cache.append_to(which, view(&k, heads_first), view(&v, heads_first));
                    prop_assert_eq!(done.err(), expected.clone());
                    if expected.is_none() {
                        model[which].extend(new);
                    }
                }
                3 => {
                    let counts: Vec<usize> = (0..batch).map(|index| (count + index * which) % 5).collect();
                    let each: Vec<Vec<u32>> = counts.iter().map(|&count| new(count)).collect();
                    let ends = counts.iter().scan(0, |end, count| { *end += count; Some(*end) });
                    let offsets: Vec<usize> = std::iter::once(0).chain(ends).collect();
                    let [k, v] = [0, 1].map(|which| tensor(dtype, &each.concat(), which, heads_first));
                    let expected = (0..batch).find_map(|index| too_long(index, counts[index]));
                    let done = cache.append_packed(&offsets, view(&k, heads_first), view(&v, heads_first));
                    prop_assert_eq!(done.err(), expected.clone());
                    if expected.is_none() {
                        model.iter_mut().zip(each).for_each(|(model, new)| model.extend(new));
                    }
                }
                4 if which < batch => {
                    let length = model[which].len();
                    let done = cache.truncate(which, count);
                    let expected = (count > length).then_some(CacheError::TooFew { kept: count, length });
                    prop_assert_eq!(done.err(), expected);
                    model[which].truncate(count);
                }
                5 if count == 0 => {
                    cache.clear();
                    model.iter_mut().for_each(Vec::clear);
                }
                _ => {}
            }
            prop_assert_eq!(cache.is_empty(), model.iter().all(Vec::is_empty));
            let lengths: Vec<i32> = model.iter().map(|tokens| tokens.len() as i32).collect();
            prop_assert_eq!(cache.lengths().shape(), [batch].into());
            for (b, tokens) in model.iter().enumerate() {
                prop_assert_eq!(cache.lengths().host::<i32>().unwrap().at(&[b]), lengths[b]);
                prop_assert_eq!(cache.len(b), Ok(tokens.len()));
                for (j, &token) in tokens.iter().enumerate() {
                    holds(cache.keys(), cache.values(), [b, j], token);
                }
            }
        }
    }
}
