//! Attention on real input: queries, keys and values that all-MiniLM-L6-v2 computes for six sentences of different
//! lengths, in one padded batch, on every implementation of this build, compared with the stored output of an f64
//! implementation and with each other.
//!
//! ```text
//! cargo run --release -p attention --example minilm [FILE]
//! ```

mod support;

use std::error::Error;
use std::process::ExitCode;

use attention::{Attention, Candidate, Tensor, Verdict, View};

use support::{LAYERS, RUNS, Recording, compare, timed};

/// The largest error, as a fraction of the largest output, that counts as agreement. f32 carries 6e-8, and the sums
/// of this input lose less than a hundred of those.
const ALLOWED: f64 = 1e-5;

fn main() -> ExitCode {
    support::main(run)
}

/// Prints everything; false where a layer does not agree.
fn run(bytes: &[u8]) -> Result<bool, Box<dyn Error>> {
    let recording = Recording::read(bytes)?;
    recording.introduce();
    let attention = Attention::new().key_value_lengths(&recording.lengths);
    let mut agrees = true;
    for (index, layer) in LAYERS.into_iter().enumerate() {
        let [query, key, value] = recording.operands(layer)?;
        let explanation = attention.explain(&query, &key, &value)?;
        if index == 0 {
            println!("{explanation}\n");
            println!(
                "layer  implementation  time (median of {RUNS})  max abs error  of the largest output  allowed"
            );
        }
        let want = recording.output(layer)?;
        let mut outputs: Vec<(String, Vec<f64>)> = Vec::new();
        let serves = |candidate: &&Candidate| !matches!(candidate.verdict, Verdict::Refused(_));
        for Candidate { name, .. } in explanation.candidates.iter().filter(serves) {
            let attention = attention.clone().implementation(name.clone());
            let (out, time) = timed(|| attention.forward(&query, &key, &value))?;
            let out = numbers(&out)?;
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
            outputs.push((name.clone(), out));
        }
    }
    println!();

    let layer = LAYERS[LAYERS.len() - 1];
    let [query, key, _] = recording.operands(layer)?;
    Sentences::read(&recording)?.print_attention(&attention, layer, &query, &key)?;
    Ok(agrees)
}

/// The numbers of an f32 tensor.
fn numbers(tensor: &Tensor) -> Result<Vec<f64>, Box<dyn Error>> {
    let numbers = tensor.as_slice::<f32>().ok_or("the output of f32 queries is f32")?;
    Ok(numbers.iter().map(|&x| f64::from(x)).collect())
}

/// The sentences, as text and as word pieces.
struct Sentences<'a> {
    texts: &'a [String],
    lengths: &'a [usize],
    token_ids: Vec<i32>,
}

impl<'a> Sentences<'a> {
    fn read(recording: &'a Recording<'_>) -> Result<Self, Box<dyn Error>> {
        let token_ids = recording.integers("token_ids")?;
        Ok(Self { texts: &recording.texts, lengths: &recording.lengths, token_ids })
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
