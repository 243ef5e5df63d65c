//! Attention on real input: queries, keys and values that all-MiniLM-L6-v2 computes for six sentences of
//! different lengths, on every implementation of this build, compared with the stored output of an f64
//! implementation and with each other. Once in one padded batch, and once as one sequence in which a mask
//! keeps the sentences apart: the same outputs, of calls so long that f32 is computed in f32.
//!
//! ```text
//! cargo run --release -p attention --example minilm [FILE]
//! ```

mod support;

use std::error::Error;
use std::process::ExitCode;

use attention::{Attention, Candidate, Tensor, Verdict, View};

use support::{LAYERS, RUNS, Recording, compare, timed};

/// The largest error, as a fraction of the largest output, that counts as agreement. f32 carries 6e-8, and
/// the sums of this input lose less than a hundred of those.
const ALLOWED: f64 = 1e-5;

fn main() -> ExitCode {
    support::main(run)
}

/// The same sentences in two calls that give the same outputs.
struct Arrangement<'a> {
    name: &'static str,
    attention: Attention<'a>,
    /// The shape of query, key and value, from that of the batch.
    shape: fn([usize; 4]) -> [usize; 4],
}

/// Prints everything; false where a layer does not agree.
fn run(bytes: &[u8]) -> Result<bool, Box<dyn Error>> {
    let recording = Recording::read(bytes)?;
    recording.introduce();
    let padded = recording.operands(LAYERS[0])?[0].shape()[1];
    let apart = sentences_apart(&recording.lengths, padded);
    let rows = recording.lengths.len() * padded;
    let batch = Attention::new().key_value_lengths(&recording.lengths);
    let arrangements = [
        Arrangement { name: "batch", attention: batch.clone(), shape: |shape| shape },
        Arrangement {
            name: "sequence",
            attention: Attention::new().mask((&apart, [rows, rows])),
            shape: |[batch, length, heads, width]| [1, batch * length, heads, width],
        },
    ];
    println!("batch: {} padded sentences of {padded} rows", recording.lengths.len());
    println!(
        "sequence: the same rows as one sequence of {rows}, with a mask that keeps the sentences apart\n"
    );
    let mut agrees = true;
    for (index, layer) in LAYERS.into_iter().enumerate() {
        let operands = recording.operands(layer)?;
        let want = recording.output(layer)?;
        if index == 0 {
            let [query, key, value] = &operands;
            println!("the batch: {}\n", batch.explain(query, key, value)?);
            println!(
                "layer  call      implementation  time (median of {RUNS})  max abs error  of the largest output  allowed"
            );
        }
        for arrangement in &arrangements {
            agrees &= print_layer(layer, arrangement, &operands, &want)?;
        }
    }
    println!();

    let layer = LAYERS[LAYERS.len() - 1];
    let [query, key, _] = recording.operands(layer)?;
    Sentences::read(&recording)?.print_attention(&batch, layer, &query, &key)?;
    Ok(agrees)
}

/// Which rows see which, of sentences one behind the other that are all padded to the same length: true where
/// both are of one sentence and the key is no padding.
fn sentences_apart(lengths: &[usize], padded: usize) -> Vec<bool> {
    let rows = lengths.len() * padded;
    let sees =
        |query: usize, key: usize| query / padded == key / padded && key % padded < lengths[key / padded];
    (0..rows * rows).map(|index| sees(index / rows, index % rows)).collect()
}

/// Prints a layer on every implementation; false where one does not agree.
fn print_layer(
    layer: usize,
    arrangement: &Arrangement<'_>,
    operands: &[Tensor; 3],
    want: &[f64],
) -> Result<bool, Box<dyn Error>> {
    let arranged = |tensor: &Tensor| -> Result<Tensor, Box<dyn Error>> {
        let &[b, t, n, h] = &tensor.shape()[..] else { return Err("operands must have four axes".into()) };
        let data = tensor.as_slice::<f32>().ok_or("operands must be f32")?.to_vec();
        Ok(Tensor::from_vec(data, (arrangement.shape)([b, t, n, h]))?)
    };
    let [query, key, value] = operands;
    let (query, key, value) = (arranged(query)?, arranged(key)?, arranged(value)?);
    let explanation = arrangement.attention.explain(&query, &key, &value)?;
    let mut agrees = true;
    let mut outputs: Vec<(String, Vec<f64>)> = Vec::new();
    let serves = |candidate: &&Candidate| !matches!(candidate.verdict, Verdict::Refused(_));
    for Candidate { name, .. } in explanation.candidates.iter().filter(serves) {
        let attention = arrangement.attention.clone().implementation(name.clone());
        let (out, time) = timed(|| attention.forward(&query, &key, &value))?;
        let out = numbers(&out)?;
        let (error, relative) = compare(&out, want)?;
        // Written so that NaN disagrees.
        let good = relative <= ALLOWED;
        agrees &= good;
        println!(
            "{layer:5}  {:8}  {name:14}  {:>19}  {error:13.2e}  {relative:21.2e}  {ALLOWED:7.0e}  {}",
            arrangement.name,
            format!("{time:.1?}"),
            if good { "agrees" } else { "DOES NOT AGREE" }
        );
        if let Some((first, values)) = outputs.first() {
            let difference = compare(&out, values)?.0;
            let why = if difference == 0.0 {
                " (none: both compute batch rows of so few logits in f64 and round once)"
            } else {
                ""
            };
            println!("       largest difference between {name} and {first}: {difference:.2e}{why}");
        }
        outputs.push((name.clone(), out));
    }
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

    /// A label for each word piece of a sentence: the token id, and the word where words and pieces are one
    /// to one.
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
