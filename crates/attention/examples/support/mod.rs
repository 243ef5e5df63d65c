//! What the examples on recorded tensors share: the recording of all-MiniLM-L6-v2, times and errors.

use std::collections::HashMap;
use std::error::Error;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use attention::Tensor;
use safetensors::{Dtype, SafeTensors};

const FILE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/examples/data/minilm_attention.safetensors");
/// The layers that were recorded.
pub(crate) const LAYERS: [usize; 2] = [0, 5];
pub(crate) const RUNS: usize = 50;

/// Runs an example on the recording's bytes, from the file that the first argument names or the one beside
/// this code. It fails where the example says that something does not agree.
pub(crate) fn main(run: impl FnOnce(&[u8]) -> Result<bool, Box<dyn Error>>) -> ExitCode {
    let path = std::env::args().nth(1).unwrap_or_else(|| FILE.to_owned());
    let bytes = std::fs::read(&path).map_err(|error| format!("{path}: {error}").into());
    match bytes.and_then(|bytes| run(&bytes)) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Queries, keys, values and outputs that a model computed for some sentences, in one padded batch.
pub(crate) struct Recording<'a> {
    file: SafeTensors<'a>,
    metadata: HashMap<String, String>,
    /// The sentences.
    pub(crate) texts: Vec<String>,
    /// The number of word pieces of each.
    pub(crate) lengths: Vec<usize>,
}

impl<'a> Recording<'a> {
    pub(crate) fn read(bytes: &'a [u8]) -> Result<Self, Box<dyn Error>> {
        let (_, metadata) = SafeTensors::read_metadata(bytes)?;
        let mut recording = Self {
            file: SafeTensors::deserialize(bytes)?,
            metadata: metadata.metadata().clone().unwrap_or_default(),
            texts: Vec::new(),
            lengths: Vec::new(),
        };
        recording.texts = serde_json::from_str(recording.text("sentences"))?;
        let lengths = recording.integers("lengths")?.into_iter().map(usize::try_from);
        recording.lengths = lengths.collect::<Result<_, _>>()?;
        Ok(recording)
    }

    /// Prints which model and which sentences were recorded.
    pub(crate) fn introduce(&self) {
        println!("{} on {} sentences:", self.text("model"), self.lengths.len());
        for (words, length) in self.texts.iter().zip(&self.lengths) {
            println!("  {length:2} word pieces  {words}");
        }
        println!();
    }

    /// Query, key and value of a layer.
    pub(crate) fn operands(&self, layer: usize) -> Result<[Tensor; 3], Box<dyn Error>> {
        let [query, key, value] = ["q", "k", "v"].map(|name| self.floats(&format!("layer{layer}.{name}")));
        Ok([query?, key?, value?])
    }

    /// The output of a layer, computed in f64 from the same operands.
    pub(crate) fn output(&self, layer: usize) -> Result<Vec<f64>, Box<dyn Error>> {
        Ok(self.elements(&format!("layer{layer}.out_f64"), Dtype::F64, f64::from_le_bytes)?.0)
    }

    pub(crate) fn integers(&self, name: &str) -> Result<Vec<i32>, Box<dyn Error>> {
        Ok(self.elements(name, Dtype::I32, i32::from_le_bytes)?.0)
    }

    fn floats(&self, name: &str) -> Result<Tensor, Box<dyn Error>> {
        let (data, shape) = self.elements(name, Dtype::F32, f32::from_le_bytes)?;
        Ok(Tensor::from_vec(data, attention::Dims::try_from(shape)?)?)
    }

    fn text(&self, key: &str) -> &str {
        self.metadata.get(key).map_or("", String::as_str)
    }

    /// The elements of a tensor, by a function from their little-endian bytes.
    fn elements<const SIZE: usize, T>(
        &self,
        name: &str,
        dtype: Dtype,
        of: fn([u8; SIZE]) -> T,
    ) -> Result<(Vec<T>, Vec<usize>), Box<dyn Error>> {
        let tensor = self.file.tensor(name)?;
        if tensor.dtype() != dtype {
            return Err(format!("{name} has dtype {:?}, expected {dtype:?}", tensor.dtype()).into());
        }
        let (chunks, _) = tensor.data().as_chunks::<SIZE>();
        Ok((chunks.iter().map(|&bytes| of(bytes)).collect(), tensor.shape().to_vec()))
    }
}

/// The result, and the median time of some runs after a first one.
pub(crate) fn timed<R, E>(mut call: impl FnMut() -> Result<R, E>) -> Result<(R, Duration), E> {
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
pub(crate) fn compare(got: &[f64], want: &[f64]) -> Result<(f64, f64), Box<dyn Error>> {
    if got.len() != want.len() {
        return Err(format!("{} outputs, {} stored ones", got.len(), want.len()).into());
    }
    let error = largest(got.iter().zip(want).map(|(got, want)| (got - want).abs()));
    Ok((error, error / largest(want.iter().map(|x| x.abs()))))
}

/// The largest of some numbers from 0, NaN where one is NaN: `f64::max` would lose it.
pub(crate) fn largest(numbers: impl IntoIterator<Item = f64>) -> f64 {
    numbers.into_iter().fold(0.0, |max, x| if x <= max { max } else { x })
}
