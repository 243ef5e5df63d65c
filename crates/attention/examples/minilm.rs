//! Attention on real input: queries, keys and values that all-MiniLM-L6-v2 computes for six sentences of different
//! lengths, in one padded batch, on every implementation of this build, compared with the stored output of an f64
//! implementation and with each other.
//!
//! ```text
//! cargo run --release -p attention --example minilm [FILE]
//! ```

use std::collections::HashMap;
use std::error::Error;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use attention::{Attention, Registry, Tensor, View};
use safetensors::{Dtype, SafeTensors};

const FILE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/examples/data/minilm_attention.safetensors");
const LAYERS: [usize; 2] = [0, 5];
/// The largest error, as a fraction of the largest output, that counts as agreement. f32 carries 6e-8, and the sums
/// of this input lose less than a hundred of those.
const ALLOWED: f64 = 1e-5;
const RUNS: usize = 50;

fn main() -> ExitCode {
    let path = std::env::args().nth(1).unwrap_or_else(|| FILE.to_owned());
    match run(&path) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Prints everything; false where a layer does not agree.
fn run(path: &str) -> Result<bool, Box<dyn Error>> {
    let bytes = std::fs::read(path).map_err(|error| format!("{path}: {error}"))?;
    let (_, metadata) = SafeTensors::read_metadata(&bytes)?;
    let metadata = metadata.metadata().clone().unwrap_or_default();
    let file = SafeTensors::deserialize(&bytes)?;
    let sentences = Sentences::read(&file, &metadata)?;

    println!("{} on {} sentences:", text(&metadata, "model"), sentences.lengths.len());
    for (words, length) in sentences.texts.iter().zip(&sentences.lengths) {
        println!("  {length:2} word pieces  {words}");
    }
    println!();

    let attention = Attention::new().key_value_lengths(&sentences.lengths);
    let mut agrees = true;
    for (index, layer) in LAYERS.into_iter().enumerate() {
        let [query, key, value] = ["q", "k", "v"].map(|name| floats(&file, &format!("layer{layer}.{name}")));
        let (query, key, value) = (query?, key?, value?);
        if index == 0 {
            println!("{}\n", attention.explain(&query, &key, &value)?);
            println!(
                "layer  implementation  time (median of {RUNS})  max abs error  of the largest output  allowed"
            );
        }
        let want = doubles(&file, &format!("layer{layer}.out_f64"))?;
        let mut outputs: Vec<(String, Vec<f64>)> = Vec::new();
        for name in Registry::shared().names() {
            let attention = attention.clone().implementation(name.clone());
            let (out, time) = timed(|| attention.forward(&query, &key, &value))?;
            let (error, relative) = compare(&out, &want)?;
            // Written so that NaN disagrees.
            let good = relative <= ALLOWED;
            agrees &= good;
            println!(
                "{layer:5}  {name:14}  {:>19}  {error:13.2e}  {relative:21.2e}  {ALLOWED:7.0e}  {}",
                format!("{time:.1?}"),
                if good { "agrees" } else { "DOES NOT AGREE" }
            );
            if let Some((first, values)) = outputs.first() {
                println!(
                    "       largest difference between {name} and {first}: {:.2e}",
                    compare(&out, values)?.0
                );
            }
            let values = out.as_slice::<f32>().ok_or("the output of f32 queries is f32")?;
            outputs.push((name, values.iter().map(|&x| f64::from(x)).collect()));
        }
    }
    println!();

    let layer = LAYERS[LAYERS.len() - 1];
    let [query, key] = ["q", "k"].map(|name| floats(&file, &format!("layer{layer}.{name}")));
    sentences.print_attention(&attention, layer, &query?, &key?)?;
    Ok(agrees)
}

/// The sentences, as text and as word pieces.
struct Sentences {
    texts: Vec<String>,
    lengths: Vec<usize>,
    token_ids: Vec<i32>,
}

impl Sentences {
    fn read(file: &SafeTensors<'_>, metadata: &HashMap<String, String>) -> Result<Self, Box<dyn Error>> {
        Ok(Self {
            texts: serde_json::from_str(text(metadata, "sentences"))?,
            lengths: integers(file, "lengths")?.into_iter().map(usize::try_from).collect::<Result<_, _>>()?,
            token_ids: integers(file, "token_ids")?,
        })
    }

    /// A label for each word piece of a sentence: the token id, and the word where words and pieces are one to one.
    fn labels(&self, sentence: usize) -> Vec<String> {
        let padded = self.token_ids.len() / self.lengths.len();
        let ids = &self.token_ids[sentence * padded..][..self.lengths[sentence]];
        let mut words = vec!["[CLS]".to_owned()];
        words.extend(basic_tokens(&self.texts[sentence]));
        words.push("[SEP]".to_owned());
        let known = words.len() == ids.len();
        let label = |(id, word): (&i32, &String)| format!("{word} {id}");
        if known {
            ids.iter().zip(&words).map(label).collect()
        } else {
            ids.iter().map(i32::to_string).collect()
        }
    }

    /// Prints the three word pieces that each piece of the second sentence attends to most, over all heads.
    ///
    /// The weights come from the same call: with one-hot rows as values, `[B, S, N, S]`, the output is the
    /// probabilities. One identity matrix serves every batch row and head, by strides of 0.
    fn print_attention(
        &self,
        attention: &Attention<'_>,
        layer: usize,
        query: &Tensor,
        key: &Tensor,
    ) -> Result<(), Box<dyn Error>> {
        let sentence = 1.min(self.lengths.len() - 1);
        let [batch, length, heads, _] = key.shape()[..] else {
            return Err("keys must have four axes".into());
        };
        let mut identity = vec![0.0f32; length * length];
        identity.iter_mut().step_by(length + 1).for_each(|x| *x = 1.0);
        let one_hot = View::from_slice(&identity, [length, length])?;
        let one_hot = one_hot.unsqueeze()?.unsqueeze()?.permute([0, 2, 1, 3])?;
        let weights = attention.forward(query, key, one_hot.expand([batch, length, heads, length])?)?;
        let weights = weights.as_slice::<f32>().ok_or("weights of f32 queries are f32")?;

        let labels = self.labels(sentence);
        let width = labels.iter().map(String::len).max().unwrap_or(0);
        println!("what the pieces of '{}' attend to", self.texts[sentence]);
        println!("layer {layer}, mean over {heads} heads, word and token id, the three largest weights");
        for (t, label) in labels.iter().enumerate() {
            let row = &weights[(sentence * length + t) * heads * length..][..heads * length];
            let mean = |j: usize| row.iter().skip(j).step_by(length).sum::<f32>() / heads as f32;
            let mut keys: Vec<(usize, f32)> = (0..length).map(|j| (j, mean(j))).collect();
            keys.sort_by(|a, b| b.1.total_cmp(&a.1));
            print!("  {label:width$}  ->");
            for (j, weight) in keys.into_iter().take(3).filter(|&(_, weight)| weight > 0.0) {
                print!("  {:width$} {weight:.3}", labels.get(j).map_or("padding", String::as_str));
            }
            println!();
        }
        Ok(())
    }
}

/// Lower-case words and single punctuation marks, as BERT splits before it looks for word pieces.
fn basic_tokens(sentence: &str) -> Vec<String> {
    let mut tokens: Vec<String> = Vec::new();
    let mut inside_word = false;
    for character in sentence.to_lowercase().chars() {
        if character.is_alphanumeric() && inside_word {
            tokens.last_mut().expect("a word was started").push(character);
        } else if !character.is_whitespace() {
            tokens.push(character.to_string());
        }
        inside_word = character.is_alphanumeric();
    }
    tokens
}

/// The result, and the median time of some runs after a first one.
fn timed<R, E>(mut call: impl FnMut() -> Result<R, E>) -> Result<(R, Duration), E> {
    let mut result = call()?;
    let mut times = Vec::with_capacity(RUNS);
    for _ in 0..RUNS {
        let start = Instant::now();
        result = call()?;
        times.push(start.elapsed());
    }
    times.sort_unstable();
    Ok((result, times[RUNS / 2]))
}

/// The largest error, and the same as a fraction of the largest number that there should be.
fn compare(out: &Tensor, want: &[f64]) -> Result<(f64, f64), Box<dyn Error>> {
    let got = out.as_slice::<f32>().ok_or("the output of f32 queries is f32")?;
    if got.len() != want.len() {
        return Err(format!("{} outputs, {} stored ones", got.len(), want.len()).into());
    }
    let errors = got.iter().zip(want).map(|(&got, &want)| (f64::from(got) - want).abs());
    // `f64::max` would lose a NaN.
    let error = errors.fold(0.0, |max, error| if error <= max { max } else { error });
    let largest = want.iter().fold(0.0f64, |max, x| max.max(x.abs()));
    Ok((error, error / largest))
}

fn text<'m>(metadata: &'m HashMap<String, String>, key: &str) -> &'m str {
    metadata.get(key).map_or("", String::as_str)
}

/// The elements of a tensor, by a function from their little-endian bytes.
fn elements<const SIZE: usize, T>(
    file: &SafeTensors<'_>,
    name: &str,
    dtype: Dtype,
    of: fn([u8; SIZE]) -> T,
) -> Result<(Vec<T>, Vec<usize>), Box<dyn Error>> {
    let tensor = file.tensor(name)?;
    if tensor.dtype() != dtype {
        return Err(format!("{name} has dtype {:?}, expected {dtype:?}", tensor.dtype()).into());
    }
    let (chunks, _) = tensor.data().as_chunks::<SIZE>();
    Ok((chunks.iter().map(|&bytes| of(bytes)).collect(), tensor.shape().to_vec()))
}

fn floats(file: &SafeTensors<'_>, name: &str) -> Result<Tensor, Box<dyn Error>> {
    let (data, shape) = elements(file, name, Dtype::F32, f32::from_le_bytes)?;
    Ok(Tensor::from_vec(data, attention::Dims::try_from(shape)?)?)
}

fn doubles(file: &SafeTensors<'_>, name: &str) -> Result<Vec<f64>, Box<dyn Error>> {
    Ok(elements(file, name, Dtype::F64, f64::from_le_bytes)?.0)
}

fn integers(file: &SafeTensors<'_>, name: &str) -> Result<Vec<i32>, Box<dyn Error>> {
    Ok(elements(file, name, Dtype::I32, i32::from_le_bytes)?.0)
}
