//! Format 3: sequences that are packed or in pages.

use attention_core::{DType, Role};

use super::file::{Stored, Tensors};
use super::{Alibi, Entry, SequenceKind};
use crate::cases::{Layout, Numbers};
use crate::oracle::{Dense, Padding};
use crate::tensor::HostTensor;

/// Tensors that every format has, and those of this one.
const KNOWN_TENSORS: [&str; 18] = [
    "q",
    "k",
    "v",
    "k_pages",
    "v_pages",
    "block_table",
    "cu_seqlens_q",
    "cu_seqlens_k",
    "seqused_k",
    "q_lens",
    "kv_lens",
    "d_out",
    "d_lse",
    "bias",
    "mask",
    "alibi_slopes",
    "sinks",
    "row_has_keys",
];

/// The sequence whose dropout bits a tensor holds.
fn sequence_of(name: &str) -> Option<usize> {
    name.strip_prefix("keep_mask_")?.parse().ok()
}

impl Entry {
    /// Checks what is new in this format.
    pub(super) fn check_sequences(&self, kind: SequenceKind) -> Result<(), String> {
        let (params, batch) = (&self.params, self.dims.B);
        let has = |name: &str| self.tensors.contains_key(name);
        let of_sequences = |name: &str| sequence_of(name).is_some_and(|sequence| sequence < batch);
        for name in self.tensors.keys() {
            let known = KNOWN_TENSORS.contains(&name.as_str()) || of_sequences(name);
            if !known && !self.is_expected(name) {
                return Err(format!("tensor '{name}' is unknown"));
            }
            if of_sequences(name) && params.dropout.is_none() {
                return Err(format!("the tensor '{name}' is listed, params do not mention it"));
            }
        }
        if self.rank.is_some() || self.layout.is_some() || self.dims.T.is_some() || self.dims.S.is_some() {
            return Err("rank, layout, T and S are not of this format".to_owned());
        }
        if params.query_seq_lengths.is_some() || params.key_value_seq_lengths.is_some() {
            return Err("lengths are 'query_lengths' and 'key_value_lengths' in this format".to_owned());
        }
        for (name, lengths) in [
            ("query_lengths", &params.query_lengths),
            ("key_value_lengths", &params.key_value_lengths),
            ("used_key_value_lengths", &params.used_key_value_lengths),
        ] {
            let count = lengths.as_ref().map(Vec::len);
            if count != Some(batch) && !(count.is_none() && name.starts_with("used")) {
                return Err(format!("{name} has {count:?} numbers, B is {batch}"));
            }
        }
        let paged = kind == SequenceKind::Paged;
        if paged != params.page_size.is_some() {
            return Err("pages have a page_size, and nothing else has".to_owned());
        }
        let dense_keys = !paged && !has("cu_seqlens_k");
        for (name, wanted) in [
            ("q", true),
            ("k", !paged),
            ("v", !paged),
            ("k_pages", paged),
            ("v_pages", paged),
            ("block_table", paged),
            ("d_out", !self.grads.is_empty()),
            ("cu_seqlens_q", !paged),
            ("kv_lens", dense_keys),
            ("seqused_k", params.used_key_value_lengths.is_some()),
            ("mask", params.mask_shape.is_some()),
            ("bias", params.bias_shape.is_some()),
            ("alibi_slopes", params.alibi.is_some()),
            ("sinks", params.sinks),
            ("d_lse", params.d_lse && !self.grads.is_empty()),
        ] {
            if wanted && !has(name) {
                return Err(format!("params need the tensor '{name}', which is not listed"));
            }
            let optional = matches!(name, "d_out" | "d_lse" | "kv_lens") || name == "cu_seqlens_q";
            if has(name) && !wanted && !optional {
                return Err(format!("the tensor '{name}' is listed, params do not mention it"));
            }
        }
        if paged && !has("kv_lens") && !has("seqused_k") {
            return Err("keys in pages need the tensor 'kv_lens', which is not listed".to_owned());
        }
        if has("q_lens") && has("cu_seqlens_q") || has("cu_seqlens_k") && has("kv_lens") {
            return Err("packed sequences have starts and no lengths beside them".to_owned());
        }
        Ok(())
    }

    /// The longest sequences that a call may have, in queries and keys: what masks and biases reach.
    pub(super) fn longest(&self) -> [usize; 2] {
        let params = &self.params;
        let longest = |lengths: &Option<Vec<usize>>, axis: usize| {
            let axes = [&params.mask_shape, &params.bias_shape].into_iter().flatten();
            let axes = axes.filter_map(|shape| shape.get((axis + shape.len()).checked_sub(4)?)).copied();
            lengths.iter().flatten().copied().chain(axes.filter(|&size| size != 1)).max().unwrap_or(0)
        };
        [longest(&params.query_lengths, 2), longest(&params.key_value_lengths, 3)]
    }
}

impl Tensors {
    /// Whether every tensor has the shape that the sizes give it, and lengths are what the params say.
    pub(super) fn check_sequences(&self, entry: &Entry) -> Result<(), String> {
        let (d, params) = (entry.dims, &entry.params);
        let hv = d.Hv.unwrap_or(d.H);
        let axes = |name: &str, count: usize| -> Vec<usize> {
            self.get(name).map_or(Vec::new(), |stored| stored.shape.iter().take(count).copied().collect())
        };
        let query_axes = axes("q", if self.get("cu_seqlens_q").is_some() { 1 } else { 2 });
        let key_axes = axes("k", if self.get("cu_seqlens_k").is_some() { 1 } else { 2 });
        let page_axes = axes("k_pages", 2);
        let page_axes = [page_axes.first().copied().unwrap_or(0), params.page_size.unwrap_or(0)];
        let with = |axes: &[usize], rest: &[usize]| [axes, rest].concat();
        let (query, out, row) =
            (with(&query_axes, &[d.N, d.H]), with(&query_axes, &[d.N, hv]), with(&query_axes, &[d.N]));
        let (key, value) = (with(&key_axes, &[d.K, d.H]), with(&key_axes, &[d.K, hv]));
        let (bias, mask) = (params.bias_shape.clone(), params.mask_shape.clone());
        let slopes = if params.alibi == Some(Alibi::Bn) { vec![d.B, d.N] } else { vec![d.N] };
        let most = axes("block_table", 2).get(1).copied().unwrap_or(0);
        let bias = bias.unwrap_or_default();
        let shapes = [
            ("q", &query),
            ("k", &key),
            ("v", &value),
            ("k_pages", &with(&page_axes, &[d.K, d.H])),
            ("v_pages", &with(&page_axes, &[d.K, hv])),
            ("block_table", &vec![d.B, most]),
            ("d_out", &out),
            ("d_lse", &row),
            ("row_has_keys", &row),
            ("bias", &bias),
            ("mask", &mask.unwrap_or_default()),
            ("alibi_slopes", &slopes),
            ("sinks", &vec![d.N]),
            ("out_f64", &out),
            ("lse_f64", &row),
            ("dq_f64", &query),
            ("dk_f64", &key),
            ("dv_f64", &value),
            ("dbias_f64", &bias),
            ("dsink_f64", &vec![d.N]),
            ("dsinks_f64", &vec![d.N]),
        ];
        for (name, shape) in shapes {
            if let Some(stored) = self.get(name).filter(|stored| stored.shape != *shape) {
                let shape_of = &stored.shape;
                return Err(format!(
                    "the tensor '{name}' has shape {shape_of:?}, dims and params give {shape:?}"
                ));
            }
        }
        let lengths = |lengths: &Option<Vec<usize>>| lengths.clone().unwrap_or_default();
        let starts = |lengths: &[usize]| -> Vec<usize> {
            let ends = lengths.iter().scan(0, |end, &length| {
                *end += length;
                Some(*end)
            });
            std::iter::once(0).chain(ends).collect()
        };
        let (queries, keys) = (lengths(&params.query_lengths), lengths(&params.key_value_lengths));
        for (name, numbers) in [
            ("cu_seqlens_q", &starts(&queries)),
            ("cu_seqlens_k", &starts(&keys)),
            ("q_lens", &queries),
            ("kv_lens", &keys),
            ("seqused_k", &lengths(&params.used_key_value_lengths)),
        ] {
            let Some(stored) = self.get(name) else { continue };
            if !stored.values.iter().copied().eq(numbers.iter().map(|&number| number as f64)) {
                return Err(format!("the tensor '{name}' is {:?}, params say {numbers:?}", stored.values));
            }
        }
        let all_rows = self.get("cu_seqlens_q").is_some() || self.get("q_lens").is_some();
        if !all_rows && queries.iter().any(|length| query_axes.get(1) != Some(length)) {
            return Err(format!("there are no 'q_lens', and params say {queries:?}"));
        }
        Ok(())
    }

    /// The numbers of the call that say where rows are and how many.
    pub(super) fn sequences(&self) -> Numbers {
        let numbers = |name: &str| {
            self.get(name).map(|stored| {
                let shape =
                    attention_core::Dims::from_slice(&stored.shape).expect("checked: at most two axes");
                let number = |index: usize| stored.values[index] as i64;
                HostTensor::from_integers(DType::I32, shape, Layout::Contiguous, number)
            })
        };
        Numbers {
            query_starts: numbers("cu_seqlens_q"),
            key_value_starts: numbers("cu_seqlens_k"),
            block_table: numbers("block_table"),
            query_lengths: numbers("q_lens"),
            key_value_lengths: numbers("seqused_k").or_else(|| numbers("kv_lens")),
            ..Numbers::default()
        }
    }

    /// Whether the dropout bits of each sequence are those of the stream, `[B, N, T, S]` in `logits`.
    pub(super) fn check_keep_masks(&self, ours: &[bool], logits: [usize; 4]) -> Result<(), String> {
        let [batch, heads, queries, keys] = logits;
        for b in 0..batch {
            let Some(stored) = self.get(&format!("keep_mask_{b}")) else { continue };
            let &[n, t, s] = &stored.shape[..] else {
                return Err(format!("keep_mask_{b} has shape {:?}", stored.shape));
            };
            if n != heads || t > queries || s > keys {
                return Err(format!("keep_mask_{b} has shape {:?}, the call has {logits:?}", stored.shape));
            }
            for (index, &bit) in stored.values.iter().enumerate() {
                let at = [index / s / t, index / s % t, index % s];
                if (bit != 0.0) != ours[((b * heads + at[0]) * queries + at[1]) * keys + at[2]] {
                    return Err(format!("keep_mask_{b}{at:?} of the file disagrees with the dropout stream"));
                }
            }
        }
        Ok(())
    }
}

/// The numbers of a stored tensor in the padded call, with those of rows that no sequence has left out, which
/// are `empty` in the padding.
pub(super) fn padded(stored: &Stored, role: Role, padding: Option<&Padding>, empty: f64) -> Vec<f64> {
    let Some(places) = padding.and_then(|padding| padding.places(role)) else { return stored.values.clone() };
    places.pad(&with_axes(stored, role), empty).values()
}

/// Whether all rows that no sequence has are `empty`.
pub(super) fn is_empty_elsewhere(stored: &Stored, role: Role, padding: Option<&Padding>, empty: f64) -> bool {
    let Some(places) = padding.and_then(|padding| padding.places(role)) else { return true };
    let taken = places.taken();
    let row = stored.values.len().checked_div(taken.len()).unwrap_or(1).max(1);
    stored.values.iter().enumerate().all(|(index, &value)| taken[index / row] || value == empty)
}

/// The tensor with the axis of size 1 in front that packed ones are without.
fn with_axes(stored: &Stored, role: Role) -> HostTensor {
    let mut shape = stored.shape.clone();
    if shape.len() < if role == Role::Lse { 3 } else { 4 } {
        shape.insert(0, 1);
    }
    let shape = attention_core::Dims::from_slice(&shape).expect("checked: at most four axes");
    HostTensor::from_values(DType::F64, shape, Layout::Contiguous, |index| stored.values[index])
}

/// A tensor as the oracle has it.
pub(super) fn padded_tensor(tensor: &HostTensor, role: Role, padding: Option<&Padding>) -> Dense {
    match padding.and_then(|padding| padding.places(role)) {
        Some(places) => Dense::read(&places.pad(tensor, 0.0).view()),
        None => Dense::read(&tensor.view()),
    }
}
