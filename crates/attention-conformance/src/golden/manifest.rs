//! The manifest, typed: what is not a field here is an error.

use std::collections::BTreeMap;
use std::path::Path;

use serde::Deserialize;

use super::GoldenError;

/// The formats that this reader knows.
const KNOWN_FORMATS: std::ops::RangeInclusive<u32> = 1..=3;

/// What every format has.
#[derive(Deserialize)]
struct Format {
    format: u32,
}

/// `manifest.json`.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// 1 for what JAX can do, 2 for what it has no option for, 3 for packed and paged sequences.
    pub format: u32,
    /// The script that made the set.
    pub generator: Option<String>,
    /// The version of JAX.
    pub jax: Option<String>,
    /// The version of NumPy.
    pub numpy: Option<String>,
    /// What the expected values come from.
    pub reference: Option<String>,
    /// The seed of the inputs.
    pub seed: Option<u64>,
    /// The largest difference between the reference and an independent computation.
    pub oracle_max_abs_diff: Option<f64>,
    /// The largest difference between gradients and central differences.
    pub finite_difference_worst: Option<f64>,
    /// How many cases there are.
    pub n_cases: usize,
    /// The cases.
    pub cases: Vec<Entry>,
}

/// The entry of one case.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Entry {
    /// Its name.
    pub id: String,
    /// Its file, relative to the manifest.
    pub file: String,
    /// What it is about.
    pub tags: Vec<String>,
    /// The sizes.
    pub dims: Dims,
    /// 4, or 3 for tensors without a batch axis. Absent in format 3.
    pub rank: Option<usize>,
    /// `BTNH`, or `TNH` without a batch axis. Absent in format 3.
    pub layout: Option<String>,
    /// The options.
    pub params: Params,
    /// The same numbers seen as another feature; for information.
    #[serde(default)]
    pub equivalent_params: serde_json::Value,
    /// Whether every float input is exact in f16 and bf16.
    pub inputs_half_exact: bool,
    /// `zero`: the expected values follow our rule for empty rows. Absent in format 1, where `*_zero_f64`
    /// tensors do.
    pub convention: Option<String>,
    /// Whether any row has nothing to attend to; for information. Absent in format 3.
    pub has_empty_rows: Option<bool>,
    /// How many; for information.
    pub n_empty_rows: Option<usize>,
    /// How many rows are padding; for information.
    pub n_padded_query_rows: Option<usize>,
    /// The tensors with expected gradients.
    pub grads: Vec<String>,
    /// Every tensor of the file: name to dtype and shape.
    pub tensors: BTreeMap<String, (String, Vec<usize>)>,
    /// The largest absolute values; for information.
    #[serde(default)]
    pub max_abs: BTreeMap<String, Option<f64>>,
    /// The errors of unmodified JAX.
    pub jax_max_abs_err: Option<JaxErrors>,
    /// The largest difference between gradients and central differences; for information.
    pub finite_difference_worst: Option<f64>,
    /// What is special about the case; for information.
    pub semantics_note: Option<String>,
}

/// Sizes as the manifest has them.
#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
#[allow(non_snake_case)]
pub struct Dims {
    /// Batch.
    pub B: usize,
    /// Query length. Absent in format 3.
    pub T: Option<usize>,
    /// Key/value length. Absent in format 3.
    pub S: Option<usize>,
    /// Query heads.
    pub N: usize,
    /// Key/value heads.
    pub K: usize,
    /// Head dimension.
    pub H: usize,
    /// Value head dimension; `H` where absent.
    pub Hv: Option<usize>,
}

/// Which layout the keys have, or the queries alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum SequenceKind {
    /// One sequence behind the other: queries, and keys unless `k` has a batch axis and lengths.
    Packed,
    /// Keys and values in pages. Queries are batch rows with lengths, or packed.
    Paged,
}

/// The options of a case.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Params {
    /// `null` for `1 / sqrt(H)`.
    pub scale: Option<f64>,
    /// Causal masking.
    pub is_causal: bool,
    /// `[left, right]`, inclusive, `null` for an unbounded side.
    pub local_window_size: Option<[Option<usize>; 2]>,
    /// The window as it was passed to JAX, which also takes one number; for information.
    #[serde(default)]
    pub local_window_size_as_passed: serde_json::Value,
    /// The shape of the mask.
    pub mask_shape: Option<Vec<usize>>,
    /// The shape of the bias.
    pub bias_shape: Option<Vec<usize>>,
    /// Query lengths.
    pub query_seq_lengths: Option<Vec<usize>>,
    /// Key/value lengths.
    pub key_value_seq_lengths: Option<Vec<usize>>,
    /// Top-left where absent.
    pub query_offset: Option<Offset>,
    /// Softcap.
    pub softcap: Option<f64>,
    /// Dropout of the published stream.
    pub dropout: Option<DropoutParams>,
    /// The shape of the slopes.
    pub alibi: Option<Alibi>,
    /// Whether there are sinks.
    #[serde(default)]
    pub sinks: bool,
    /// Whether the logsumexp has an incoming gradient.
    #[serde(default)]
    pub d_lse: bool,
    /// Format 3: how the rows of sequences lie.
    pub sequences: Option<SequenceKind>,
    /// Format 3: rows of a page.
    pub page_size: Option<usize>,
    /// Format 3: the query rows of each sequence.
    pub query_lengths: Option<Vec<usize>>,
    /// Format 3: the keys that the tensors hold of each sequence.
    pub key_value_lengths: Option<Vec<usize>>,
    /// Format 3: how many of them take part, where not all do.
    pub used_key_value_lengths: Option<Vec<usize>>,
}

/// The offset of the queries.
#[derive(Clone, Debug, Deserialize)]
#[serde(untagged)]
pub enum Offset {
    /// The same for every batch row.
    Fixed(i64),
    /// `bottom_right`.
    Named(String),
}

/// The parameters of a dropout stream.
#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DropoutParams {
    /// The rate.
    pub rate: f64,
    /// The seed.
    pub seed: u64,
    /// The offset.
    pub offset: u32,
}

/// The shape of ALiBi slopes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Alibi {
    /// `[N]`.
    N,
    /// `[B, N]`.
    Bn,
}

/// The largest absolute errors of unmodified JAX, by tensor (`out`, `lse`, `dq`, ..).
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct JaxErrors {
    /// In float64, with JAX's cast of the logits to float32.
    pub jax_f64_native: BTreeMap<String, Option<f64>>,
    /// In float32.
    pub jax_f32: BTreeMap<String, Option<f64>>,
    /// In bfloat16.
    pub jax_bf16: BTreeMap<String, Option<f64>>,
}

impl Manifest {
    pub(super) fn read(path: &Path) -> Result<Self, GoldenError> {
        let text = std::fs::read_to_string(path)
            .map_err(|source| GoldenError::Read { path: path.to_owned(), source })?;
        let text = without_special_numbers(&text);
        let invalid = |source| GoldenError::Manifest { path: path.to_owned(), source };
        // The format first: of another one nothing else is known.
        let Format { format } = serde_json::from_str(&text).map_err(invalid)?;
        if !KNOWN_FORMATS.contains(&format) {
            let what = format!("format {format} is unknown, this reader knows 1 to 3");
            return Err(GoldenError::Contradiction { path: path.to_owned(), what });
        }
        let manifest: Self = serde_json::from_str(&text).map_err(invalid)?;
        manifest.check().map_err(|what| GoldenError::Contradiction { path: path.to_owned(), what })?;
        Ok(manifest)
    }

    fn check(&self) -> Result<(), String> {
        if self.n_cases != self.cases.len() {
            return Err(format!("n_cases is {}, there are {} cases", self.n_cases, self.cases.len()));
        }
        self.cases.iter().try_for_each(|entry| {
            entry.check(self.format).map_err(|what| format!("case {}: {what}", entry.id))
        })
    }
}

/// Tensors whose values say what is called or what comes out.
const KNOWN_TENSORS: [&str; 13] = [
    "q",
    "k",
    "v",
    "d_out",
    "bias",
    "mask",
    "q_lens",
    "kv_lens",
    "alibi_slopes",
    "sinks",
    "d_lse",
    "row_has_keys",
    "keep_mask",
];

/// What has an expected value, under the names of the files.
pub(super) const QUANTITIES: [&str; 7] = ["out", "lse", "dq", "dk", "dv", "dbias", "dsink"];

impl Entry {
    fn check(&self, format: u32) -> Result<(), String> {
        if let Some(convention) = self.convention.as_deref().filter(|&convention| convention != "zero") {
            return Err(format!("convention '{convention}' is unknown, this reader knows 'zero'"));
        }
        match &self.params.query_offset {
            Some(Offset::Named(name)) if name != "bottom_right" => {
                return Err(format!("query_offset '{name}' is unknown, this reader knows 'bottom_right'"));
            }
            _ => {}
        }
        for name in &self.grads {
            if !self.tensors.contains_key(name) {
                return Err(format!("the gradient '{name}' is not among the tensors"));
            }
        }
        match (format, self.params.sequences) {
            (3, Some(kind)) => self.check_sequences(kind),
            (3, None) => Err("params do not say how 'sequences' lie".to_owned()),
            _ => self.check_batch_rows(),
        }
    }

    /// Whether this is the name of an expected value.
    pub(super) fn is_expected(&self, name: &str) -> bool {
        let of = |quantity: &&str| {
            name.strip_prefix(*quantity).is_some_and(|rest| rest == "_f64" || rest == "_zero_f64")
        };
        // Format 3 may have the sinks' gradient under another name.
        QUANTITIES.iter().any(of) || self.params.sequences.is_some() && name == "dsinks_f64"
    }

    /// Checks what the formats before 3 have.
    fn check_batch_rows(&self) -> Result<(), String> {
        let (params, d) = (&self.params, self.dims);
        let layout = self.layout.as_deref().unwrap_or("null");
        match (self.rank.unwrap_or(0), layout) {
            (4, "BTNH") => {}
            (3, "TNH" | "BTNH") if d.B == 1 => {}
            (rank, layout) => {
                return Err(format!("rank {rank} with layout {layout} and B {} is unknown", d.B));
            }
        }
        if d.T.is_none() || d.S.is_none() {
            return Err("dims need T and S".to_owned());
        }
        let lengths = [&params.query_lengths, &params.key_value_lengths, &params.used_key_value_lengths]
            .map(Option::is_some);
        if params.sequences.is_some() || params.page_size.is_some() || lengths.contains(&true) {
            return Err("packed and paged sequences are of format 3".to_owned());
        }
        for name in self.tensors.keys() {
            let expected = self.is_expected(name);
            // What JAX itself gave is a yardstick, and an equivalent call may bring tensors of its own.
            let for_information = name.starts_with("jax_") || !self.equivalent_params.is_null();
            if !(expected || for_information || KNOWN_TENSORS.contains(&name.as_str())) {
                return Err(format!("tensor '{name}' is unknown"));
            }
        }
        self.check_presence()
    }

    /// Whether the options that come with tensors have them, and no tensor comes without its option.
    fn check_presence(&self) -> Result<(), String> {
        let params = &self.params;
        for (name, wanted) in [
            ("q", true),
            ("k", true),
            ("v", true),
            ("d_out", true),
            ("mask", params.mask_shape.is_some()),
            ("bias", params.bias_shape.is_some()),
            ("q_lens", params.query_seq_lengths.is_some()),
            ("kv_lens", params.key_value_seq_lengths.is_some()),
            ("alibi_slopes", params.alibi.is_some()),
            ("sinks", params.sinks),
            ("d_lse", params.d_lse),
            ("keep_mask", params.dropout.is_some()),
        ] {
            let present = self.tensors.contains_key(name);
            if wanted && !present && name != "keep_mask" {
                return Err(format!("params need the tensor '{name}', which is not listed"));
            }
            if present && !wanted && self.equivalent_params.is_null() {
                return Err(format!("the tensor '{name}' is listed, params do not mention it"));
            }
        }
        Ok(())
    }
}

/// Python writes NaN and infinities as bare words, which JSON does not have: they become `null`, outside
/// strings.
fn without_special_numbers(text: &str) -> String {
    let mut result = String::with_capacity(text.len());
    let (mut in_string, mut escaped) = (false, false);
    let mut rest = text;
    while let Some(next) = rest.chars().next() {
        if !in_string {
            let word = ["-Infinity", "Infinity", "NaN"].into_iter().find(|word| rest.starts_with(word));
            if let Some(word) = word {
                result.push_str("null");
                rest = &rest[word.len()..];
                continue;
            }
        }
        in_string ^= next == '"' && !escaped;
        escaped = in_string && next == '\\' && !escaped;
        result.push(next);
        rest = &rest[next.len_utf8()..];
    }
    result
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn special_numbers_become_null_outside_strings() {
        let text = r#"{"a": NaN, "NaN \" Infinity": [-Infinity, Infinity, 1.5]}"#;
        assert_eq!(without_special_numbers(text), r#"{"a": null, "NaN \" Infinity": [null, null, 1.5]}"#);
    }
}
