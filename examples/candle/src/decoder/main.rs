//! A small decoder that serves eight prompts of different lengths with continuous batching over a paged
//! cache, and each of them alone: the tokens must be the same.
//!
//! ```text
//! cargo run --release -p attention-candle-examples --bin decoder
//! ```
//!
//! The weights are random, from a fixed seed: what it says means nothing, and what it computes is what a
//! trained model of its kind computes. Prompts that join are one packed call without padding; a step of all
//! running requests is one paged call. A request leaves when it has its tokens, and the next one takes its
//! slot and its pages. Weights, states and caches are on one device, and only tokens leave it. Attention is
//! asked for results that do not depend on who else is served.

mod model;
mod serve;

use std::process::ExitCode;
use std::time::Instant;

use attention_candle::kv_cache::PoolShape;
use candle_core::{DType, Device, Result};
use clap::{ArgAction, Parser};

use model::{Model, Sizes};
use serve::{Request, Served, alone, together};

const SIZES: Sizes = Sizes {
    vocabulary: 256,
    width: 256,
    heads: 8,
    key_heads: 2,
    head_dim: 32,
    hidden: 512,
    layers: 3,
    longest: 512,
};

/// What prompts are made of, and how long each is, with the tokens that it wants.
const TEXT: &str = include_str!("../../../../docs/semantics.md");
const REQUESTS: [(usize, usize); 8] =
    [(7, 40), (123, 24), (40, 64), (1, 33), (300, 12), (64, 48), (17, 80), (90, 1)];

/// A small decoder over a paged cache, with random weights
#[derive(Parser)]
struct Arguments {
    /// Requests that run at once
    #[arg(long, default_value_t = 4)]
    slots: usize,
    /// Pages of the cache of each layer
    #[arg(long, default_value_t = 40)]
    pages: usize,
    /// Tokens of a page
    #[arg(long, default_value_t = 16)]
    page_size: usize,
    /// The seed of the weights
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// The dtype of weights, states and caches: f32, f16 or bf16
    #[arg(long, default_value = "f32", value_parser = dtype)]
    dtype: DType,
    /// Whether attention gives a sequence the bits that it gives it alone (`Attention::batch_invariant`)
    #[arg(long, default_value_t = true, action = ArgAction::Set)]
    batch_invariant: bool,
    /// Runs on the first CUDA device
    #[arg(long)]
    cuda: bool,
}

fn dtype(name: &str) -> std::result::Result<DType, String> {
    match name {
        "f32" => Ok(DType::F32),
        "f16" => Ok(DType::F16),
        "bf16" => Ok(DType::BF16),
        _ => Err("expected f32, f16 or bf16".to_owned()),
    }
}

fn main() -> ExitCode {
    match run(&Arguments::parse()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Prints everything; false where a request has other tokens than alone.
fn run(arguments: &Arguments) -> Result<bool> {
    let &Arguments { slots, pages, page_size, seed, dtype, batch_invariant, cuda } = arguments;
    let device = if cuda { Device::new_cuda(0)? } else { Device::Cpu };
    let model = Model::random(SIZES, seed, dtype, &device)?;
    let Sizes { width, heads, key_heads, head_dim, layers, .. } = SIZES;
    println!(
        "a decoder of {layers} layers, width {width}, {heads} query heads on {key_heads} of {head_dim}; \
         random weights of seed {seed}, {} on the {}",
        dtype.as_str(),
        if cuda { "GPU" } else { "CPU" }
    );
    let requests: Vec<Request> = REQUESTS
        .iter()
        .enumerate()
        .map(|(index, &(length, wanted))| {
            let prompt = TEXT.bytes().skip(index * 1009).take(length).map(u32::from).collect();
            Request { prompt, wanted }
        })
        .collect();
    let pool = PoolShape { pages, page_size, longest: SIZES.longest };

    let serve = || together(&model, &requests, slots, pool, batch_invariant);
    let each = || {
        let alone = requests.iter().map(|request| alone(&model, request, batch_invariant));
        alone.collect::<Result<Vec<_>>>()
    };
    // First calls load kernels, which a server has done before its first request: what is timed is the second
    // time. It has the same tokens.
    let (warm, warm_alone) = (timed(serve)?, timed(each)?);
    let (served, of_all) = timed(serve)?;
    let (alone, of_each) = timed(each)?;
    let again = (&served.tokens, &alone) == (&warm.0.tokens, &warm_alone.0);
    if !again {
        println!("the second time gave other tokens than the first: DIFFERS");
    }

    let agrees = compare(&requests, &served, &alone);
    let tokens: usize = served.tokens.iter().map(Vec::len).sum();
    let per_second = |seconds: f64| tokens as f64 / seconds;
    println!(
        "together: {tokens} tokens in {of_all:.3} s, {:.0} tokens per second; {} packed prefills and {} steps \
         of at most {slots} requests, at most {} of {pages} pages of {page_size} in use",
        per_second(of_all),
        served.prefills,
        served.steps,
        served.most_pages
    );
    println!("one after the other: {of_each:.3} s, {:.0} tokens per second", per_second(of_each));
    println!("the first time, with the loading of kernels: {:.3} s and {:.3} s", warm.1, warm_alone.1);
    Ok(agrees && again)
}

/// What a function gives, and how many seconds it took. The last thing that the model does is to bring tokens
/// to the host, so a device has done its work then.
fn timed<T>(work: impl FnOnce() -> Result<T>) -> Result<(T, f64)> {
    let start = Instant::now();
    let result = work()?;
    Ok((result, start.elapsed().as_secs_f64()))
}

/// Prints a line for each request; false where one has other tokens than alone.
fn compare(requests: &[Request], served: &Served, alone: &[Vec<u32>]) -> bool {
    let mut agrees = true;
    for (index, request) in requests.iter().enumerate() {
        let (got, want) = (&served.tokens[index], &alone[index]);
        let differs = (0..got.len().max(want.len())).find(|&at| got.get(at) != want.get(at));
        agrees &= differs.is_none();
        print!("request {index}: {:3} tokens of prompt, {:2} new: ", request.prompt.len(), got.len());
        match differs {
            None => println!("the same as alone, {:?} ..", &got[..got.len().min(6)]),
            Some(at) => println!("token {at} is {:?}, alone {:?}: DIFFERS", got.get(at), want.get(at)),
        }
    }
    agrees
}
