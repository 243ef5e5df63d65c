//! Requests served together over a paged cache, and each one alone.

use std::collections::VecDeque;

use attention_candle::kv_cache::{KvCache, PagedBatch, PagedKvCache, PoolShape, Sequence, TokenShape};
use attention_candle::{Attention, QueryOffset};
use candle_core::{Result, Tensor};

use crate::model::Model;

/// A prompt, and how many tokens are wanted after it.
pub(crate) struct Request {
    pub(crate) prompt: Vec<u32>,
    pub(crate) wanted: usize,
}

impl Request {
    /// How many tokens of it a cache has in the end: the last one is not fed to the model again.
    fn cached(&self) -> usize {
        self.prompt.len() + self.wanted - 1
    }
}

/// What serving gave, and what it took.
#[derive(Default)]
pub(crate) struct Served {
    /// The tokens of each request.
    pub(crate) tokens: Vec<Vec<u32>>,
    /// Calls of the model on prompts, and on one token of each running request.
    pub(crate) prefills: usize,
    pub(crate) steps: usize,
    /// The most pages that were used at once.
    pub(crate) most_pages: usize,
}

/// A request that has a slot.
struct Running {
    request: usize,
    /// Its sequence in the cache of each layer.
    sequences: Vec<Sequence>,
}

/// The cache of a layer, with the sequences of all running requests in their order.
struct LayerCache {
    cache: PagedKvCache,
    batch: PagedBatch,
}

struct Server<'a> {
    model: &'a Model,
    /// What prefills and steps have in common.
    attention: Attention,
    requests: &'a [Request],
    layers: Vec<LayerCache>,
    running: Vec<Running>,
    served: Served,
}

fn token(model: &Model) -> TokenShape {
    TokenShape::new(model.dtype(), model.sizes.key_heads, model.sizes.head_dim)
}

/// What the calls of all layers have in common: rows of a sequence stand at its end.
fn attention(batch_invariant: bool) -> Attention {
    Attention::btnh().causal(true).query_offset(QueryOffset::BottomRight).batch_invariant(batch_invariant)
}

/// Serves requests by continuous batching: each joins as soon as there is a slot and there are pages for all
/// that it may ever need, and leaves when it has its tokens.
pub(crate) fn together(
    model: &Model,
    requests: &[Request],
    slots: usize,
    pool: PoolShape,
    batch_invariant: bool,
) -> Result<Served> {
    let layers = (0..model.sizes.layers).map(|_| {
        let cache = PagedKvCache::new(token(model), pool, model.device())?;
        let batch = cache.batch([])?;
        Ok(LayerCache { cache, batch })
    });
    let tokens = vec![Vec::new(); requests.len()];
    let served = Served { tokens, ..Served::default() };
    let mut server = Server {
        model,
        attention: attention(batch_invariant),
        requests,
        layers: layers.collect::<Result<_>>()?,
        running: Vec::new(),
        served,
    };
    let pages = |request: usize| requests[request].cached().div_ceil(pool.page_size);
    let mut waiting: VecDeque<usize> = (0..requests.len()).collect();
    while !waiting.is_empty() || !server.running.is_empty() {
        let mut promised: usize = server.running.iter().map(|running| pages(running.request)).sum();
        let mut joining = Vec::new();
        while let Some(&request) = waiting.front() {
            if server.running.len() + joining.len() == slots || promised + pages(request) > pool.pages {
                break;
            }
            promised += pages(request);
            joining.push(request);
            waiting.pop_front();
        }
        if !joining.is_empty() {
            server.prefill(&joining)?;
        } else if server.running.is_empty() {
            candle_core::bail!("a request needs more pages or slots than there are")
        }
        server.leave()?;
        if !server.running.is_empty() {
            server.step()?;
            server.leave()?;
        }
    }
    Ok(server.served)
}

impl Server<'_> {
    /// Runs the model on the prompts of requests that join, one behind the other.
    fn prefill(&mut self, joining: &[usize]) -> Result<()> {
        let prompts = || joining.iter().map(|&request| &self.requests[request].prompt);
        let mut offsets = vec![0];
        offsets.extend(prompts().scan(0, |end, prompt| {
            *end += prompt.len();
            Some(*end)
        }));
        let tokens: Vec<u32> = prompts().flatten().copied().collect();
        let positions: Vec<u32> = prompts().flat_map(|prompt| 0..prompt.len() as u32).collect();
        let last: Vec<u32> = offsets[1..].iter().map(|&end| end as u32 - 1).collect();

        let first = self.running.len();
        for &request in joining {
            let mut sequences = Vec::with_capacity(self.layers.len());
            for LayerCache { cache, batch } in &mut self.layers {
                let sequence = cache.add();
                batch.push(sequence);
                sequences.push(sequence);
            }
            self.running.push(Running { request, sequences });
        }
        let attention = self.attention.clone().packed(&offsets);
        let layers = &mut self.layers;
        let next = self.model.next(&tokens, &positions, &last, &mut |layer, query, key, value| {
            let LayerCache { cache, batch } = &mut layers[layer];
            cache.append_packed(&batch.sequences()[first..], &offsets, key, value)?;
            attention.forward(query, key, value)
        })?;
        self.served.prefills += 1;
        self.take(first, &next);
        Ok(())
    }

    /// Runs the model on the last token of every running request.
    fn step(&mut self) -> Result<()> {
        let mut tokens = Vec::with_capacity(self.running.len());
        let mut positions = Vec::with_capacity(self.running.len());
        for &Running { request, .. } in &self.running {
            let done = &self.served.tokens[request];
            tokens.extend(done.last());
            positions.push((self.requests[request].prompt.len() + done.len() - 1) as u32);
        }
        let all: Vec<u32> = (0..tokens.len() as u32).collect();
        let (layers, attention) = (&mut self.layers, &self.attention);
        let next = self.model.next(&tokens, &positions, &all, &mut |layer, query, key, value| {
            let LayerCache { cache, batch } = &mut layers[layer];
            cache.append_each(batch.sequences(), &key.unsqueeze(1)?, &value.unsqueeze(1)?)?;
            let step = cache.inputs(batch)?;
            let attention = attention.clone().paged(&step.table, &step.lengths);
            attention.forward(&query.unsqueeze(1)?, &step.keys, &step.values)?.squeeze(1)
        })?;
        self.served.steps += 1;
        self.take(0, &next);
        Ok(())
    }

    /// Gives new tokens to the running requests from `first` on.
    fn take(&mut self, first: usize, next: &[u32]) {
        for (running, &token) in self.running[first..].iter().zip(next) {
            self.served.tokens[running.request].push(token);
        }
        let used = self.layers.iter().map(|layer| layer.cache.used_pages()).max().unwrap_or(0);
        self.served.most_pages = self.served.most_pages.max(used);
    }

    /// Frees the slots and pages of the requests that have their tokens.
    fn leave(&mut self) -> Result<()> {
        let (served, requests) = (&self.served, self.requests);
        let done =
            |running: &mut Running| served.tokens[running.request].len() == requests[running.request].wanted;
        for Running { sequences, .. } in self.running.extract_if(.., done) {
            for (LayerCache { cache, batch }, sequence) in self.layers.iter_mut().zip(sequences) {
                batch.remove(sequence);
                cache.free(sequence)?;
            }
        }
        Ok(())
    }
}

/// Runs a request alone: a batch of one, with a contiguous cache and dense calls.
pub(crate) fn alone(model: &Model, request: &Request, batch_invariant: bool) -> Result<Vec<u32>> {
    let cache = |_| KvCache::new(token(model), 1, request.cached(), model.device());
    let caches = (0..model.sizes.layers).map(cache);
    let mut caches = caches.collect::<Result<Vec<_>>>()?;
    let attention = attention(batch_invariant);
    let mut tokens: Vec<u32> = Vec::with_capacity(request.wanted);
    let mut fed = request.prompt.clone();
    let mut position = 0;
    while tokens.len() < request.wanted {
        let positions: Vec<u32> = (position..position + fed.len() as u32).collect();
        let last = fed.len() as u32 - 1;
        let batch = |rows: &Tensor| rows.unsqueeze(0);
        let next = model.next(&fed, &positions, &[last], &mut |layer, query, key, value| {
            let cache = &mut caches[layer];
            cache.append(&batch(key)?, &batch(value)?)?;
            let attention = attention.clone().key_value_lengths(cache.lengths()?);
            attention.forward(&batch(query)?, &cache.keys(), &cache.values())?.squeeze(0)
        })?;
        position += fed.len() as u32;
        tokens.extend(&next);
        fed = next;
    }
    Ok(tokens)
}
