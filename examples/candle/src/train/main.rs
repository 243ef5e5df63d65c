//! Trains a small transformer on the characters of this repository's documents, with dropout, once with
//! attention of this library and once with candle's own operations and the same dropout bits; compares the
//! loss curves, measures the peak memory of a step against the length of a sequence, and plots both.
//!
//! ```text
//! cargo run --release -p attention-candle-examples --bin train -- train.svg
//! ```

mod memory;
mod model;
mod plot;

use std::error::Error;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use attention_candle::Dropout;
use candle_core::{Device, Tensor};
use candle_nn::{AdamW, Optimizer, ParamsAdamW};
use clap::Parser;

use model::{By, Model, Random, Sizes};

/// What is read.
const TEXT: &str = concat!(
    include_str!("../../../../README.md"),
    include_str!("../../../../docs/architecture.md"),
    include_str!("../../../../docs/numerics.md"),
    include_str!("../../../../docs/semantics.md"),
);

/// How far the curves may be apart: each step multiplies what rounding made different before it, and curves
/// of different dropout bits are a tenth apart.
const TOLERANCE: f32 = 0.01;

/// Trains a small transformer with this library's attention and with candle's, and plots loss and memory
#[derive(Parser)]
struct Arguments {
    /// Where the plot is written
    #[arg(default_value = "train.svg")]
    svg: PathBuf,
    /// Steps
    #[arg(long, default_value_t = 300)]
    steps: u32,
    /// Sequences of a step
    #[arg(long, default_value_t = 8)]
    batch: usize,
    /// Characters of a sequence
    #[arg(long, default_value_t = 128)]
    context: usize,
    /// The rate of dropout
    #[arg(long, default_value_t = 0.1)]
    dropout: f64,
    /// The seed of weights, batches and dropout
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// The longest sequence whose memory is measured
    #[arg(long, default_value_t = 2048)]
    longest: usize,
    /// Trains on the first CUDA device; memory is measured on the CPU
    #[arg(long)]
    cuda: bool,
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

/// Prints everything and writes the plot; false where the curves are not one, or do not fall.
fn run(arguments: &Arguments) -> Result<bool, Box<dyn Error>> {
    let text = Text::new(TEXT);
    let sizes = Sizes {
        characters: text.alphabet.len(),
        context: arguments.context,
        width: 128,
        heads: 4,
        layers: 2,
    };
    println!("{} characters, {} different; {sizes:?}", text.indices.len(), text.alphabet.len());
    let device = if arguments.cuda { Device::new_cuda(0)? } else { Device::Cpu };
    let (ours, time) = train(arguments, sizes, By::Us, &text, &device)?;
    let (candles, candles_time) = train(arguments, sizes, By::Candle, &text, &device)?;
    let losses: Vec<(f32, f32)> = ours.into_iter().zip(candles).collect();

    println!("\n step      ours    candle");
    let every = (losses.len() / 10).max(1);
    for (step, (ours, candles)) in losses.iter().enumerate() {
        if step % every == 0 || step + 1 == losses.len() {
            println!("{step:5}  {ours:8.4}  {candles:8.4}");
        }
    }
    println!("{} steps took {time:.1?} with our attention, {candles_time:.1?} with candle's", losses.len());
    let apart = losses.iter().map(|(ours, candles)| (ours - candles).abs());
    // NaN counts as apart.
    let apart = apart.fold(0.0, |most: f32, one| if one <= most { most } else { one });
    let mean =
        |losses: &[(f32, f32)]| losses.iter().map(|(ours, _)| ours).sum::<f32>() / losses.len().max(1) as f32;
    let tenth = (losses.len() / 10).max(1).min(losses.len());
    let (first, last) = (mean(&losses[..tenth]), mean(&losses[losses.len() - tenth..]));
    let good = apart <= TOLERANCE && last < first;
    println!(
        "the curves are at most {apart:.1e} apart (allowed {TOLERANCE}); the mean of the first tenth is {first:.3}, of the \
         last {last:.3}"
    );

    let peaks = peaks(arguments, sizes, &text)?;
    plot::write(&arguments.svg, &plot::Measured { losses: &losses, peaks: &peaks })?;
    println!("\n{} shows both", arguments.svg.display());
    Ok(good)
}

/// The loss of each step, and how long they took.
fn train(
    arguments: &Arguments,
    sizes: Sizes,
    by: By,
    text: &Text,
    device: &Device,
) -> candle_core::Result<(Vec<f32>, Duration)> {
    let model = Model::new(sizes, by, arguments.seed, device)?;
    let parameters = ParamsAdamW { lr: 3e-3, weight_decay: 0.01, ..ParamsAdamW::default() };
    let mut optimiser = AdamW::new(model.variables.all_vars(), parameters)?;
    let mut random = Random::new(arguments.seed ^ 0x5EED);
    let start = Instant::now();
    let mut losses = Vec::new();
    for step in 0..arguments.steps {
        let (now, next) = text.batch(arguments.batch, sizes.context, &mut random, device)?;
        // Every layer of every step has bits of its own.
        let dropout = Dropout::new(arguments.dropout, arguments.seed).with_offset(step * model.depth());
        let loss = model.loss(&now, &next, Some(dropout))?;
        optimiser.backward_step(&loss)?;
        losses.push(loss.to_scalar()?);
    }
    Ok((losses, start.elapsed()))
}

/// Characters, and peak bytes of a step of one sequence with our attention and with candle's, on the CPU.
fn peaks(
    arguments: &Arguments,
    sizes: Sizes,
    text: &Text,
) -> candle_core::Result<Vec<(usize, usize, usize)>> {
    println!("\nlength  peak of a step, ours  candle's");
    let lengths = std::iter::successors(Some(128), |length| Some(length * 2));
    let mut peaks = Vec::new();
    for context in lengths.take_while(|&length| length <= arguments.longest) {
        let peak_of = |by| -> candle_core::Result<usize> {
            let model = Model::new(Sizes { context, ..sizes }, by, arguments.seed, &Device::Cpu)?;
            let (now, next) = text.batch(1, context, &mut Random::new(7), &Device::Cpu)?;
            let dropout = Dropout::new(arguments.dropout, arguments.seed);
            let (gradients, bytes) = memory::peak(|| model.loss(&now, &next, Some(dropout))?.backward());
            gradients?;
            Ok(bytes)
        };
        // Once before, for what threads keep.
        peak_of(By::Us)?;
        let (ours, candles) = (peak_of(By::Us)?, peak_of(By::Candle)?);
        let mib = |bytes: usize| format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20));
        println!("{context:6}  {:>20}  {:>8}", mib(ours), mib(candles));
        peaks.push((context, ours, candles));
    }
    Ok(peaks)
}

/// A text as indices into its alphabet.
struct Text {
    alphabet: Vec<char>,
    indices: Vec<u32>,
}

impl Text {
    fn new(text: &str) -> Self {
        let mut alphabet: Vec<char> = text.chars().collect();
        alphabet.sort_unstable();
        alphabet.dedup();
        let index = |character| alphabet.binary_search(&character).unwrap_or_default() as u32;
        let indices = text.chars().map(index).collect();
        Self { alphabet, indices }
    }

    /// Sequences from random places, and the same one character on: both `[count, length]`.
    fn batch(
        &self,
        count: usize,
        length: usize,
        random: &mut Random,
        device: &Device,
    ) -> candle_core::Result<(Tensor, Tensor)> {
        let places = self.indices.len().saturating_sub(length);
        if places == 0 {
            candle_core::bail!("the text has {} characters, fewer than {length} and one", self.indices.len());
        }
        let (mut now, mut next) = (Vec::<u32>::new(), Vec::<u32>::new());
        for _ in 0..count {
            let start = (random.next() % places as u64) as usize;
            now.extend(&self.indices[start..start + length]);
            next.extend(&self.indices[start + 1..start + 1 + length]);
        }
        let shape = (count, length);
        Ok((Tensor::from_vec(now, shape, device)?, Tensor::from_vec(next, shape, device)?))
    }
}
