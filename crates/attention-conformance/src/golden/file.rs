//! The tensors of a case.

use std::collections::BTreeMap;
use std::path::Path;

use safetensors::{Dtype, SafeTensors};

use super::manifest::QUANTITIES;
use super::{Entry, GoldenError};

/// A tensor of a file: numbers as f64 (f32, f64, i32 and booleans are exact in it).
#[derive(Clone, Debug)]
pub(super) struct Stored {
    pub(super) shape: Vec<usize>,
    pub(super) values: Vec<f64>,
}

/// Every tensor of a case's file.
pub(super) struct Tensors(BTreeMap<String, Stored>);

impl Tensors {
    /// Reads a case's file and checks it against the manifest.
    pub(super) fn read(directory: &Path, entry: &Entry) -> Result<Self, GoldenError> {
        let path = directory.join(&entry.file);
        let bytes =
            std::fs::read(&path).map_err(|source| GoldenError::Read { path: path.clone(), source })?;
        let file = SafeTensors::deserialize(&bytes)
            .map_err(|source| GoldenError::Safetensors { path: path.clone(), source })?;
        let wrong = |what: String| GoldenError::Tensor { path: path.clone(), what };
        let mut tensors = BTreeMap::new();
        for (name, view) in file.tensors() {
            let Some((dtype, shape)) = entry.tensors.get(&name) else {
                return Err(wrong(format!("the tensor '{name}' is not in the manifest")));
            };
            if manifest_name(view.dtype()) != Some(dtype) || view.shape() != shape.as_slice() {
                return Err(wrong(format!(
                    "the tensor '{name}' is {:?} {:?}, the manifest says {dtype} {shape:?}",
                    view.dtype(),
                    view.shape()
                )));
            }
            tensors.insert(name, Stored { shape: shape.clone(), values: decode(view.dtype(), view.data()) });
        }
        if let Some(name) = entry.tensors.keys().find(|name| !tensors.contains_key(*name)) {
            return Err(wrong(format!("the tensor '{name}' of the manifest is missing")));
        }
        let tensors = Self(tensors);
        tensors.check_shapes(entry).map_err(wrong)?;
        Ok(tensors)
    }

    pub(super) fn get(&self, name: &str) -> Option<&Stored> {
        self.0.get(name)
    }

    /// The expected values of a quantity under our rule for empty rows.
    pub(super) fn expected(&self, quantity: &str) -> Option<&Stored> {
        // The gradient of the sinks has another name in some sets of format 3.
        let names = ["_zero_f64", "_f64", "s_f64"];
        names.into_iter().find_map(|end| self.get(&format!("{quantity}{end}")))
    }

    /// Whether every tensor has the shape that the sizes and options give it.
    fn check_shapes(&self, entry: &Entry) -> Result<(), String> {
        if entry.params.sequences.is_some() {
            return self.check_sequences(entry);
        }
        let d = entry.dims;
        let (queries, keys) = (d.T.unwrap_or(0), d.S.unwrap_or(0));
        let hv = d.Hv.unwrap_or(d.H);
        let with_batch = |axes: &[usize]| -> Vec<usize> {
            if entry.rank == Some(4) { [&[d.B], axes].concat() } else { axes.to_vec() }
        };
        let query = with_batch(&[queries, d.N, d.H]);
        let (key, value) = (with_batch(&[keys, d.K, d.H]), with_batch(&[keys, d.K, hv]));
        let (out, row) = (with_batch(&[queries, d.N, hv]), with_batch(&[queries, d.N]));
        let slopes = match entry.params.alibi {
            Some(super::Alibi::Bn) => vec![d.B, d.N],
            _ => vec![d.N],
        };
        let bias = entry.params.bias_shape.clone().unwrap_or_default();
        let mut expected: Vec<(String, Vec<usize>)> = vec![
            ("q".into(), query.clone()),
            ("k".into(), key.clone()),
            ("v".into(), value.clone()),
            ("d_out".into(), out.clone()),
            ("d_lse".into(), row.clone()),
            ("row_has_keys".into(), row.clone()),
            ("bias".into(), bias.clone()),
            ("mask".into(), entry.params.mask_shape.clone().unwrap_or_default()),
            ("alibi_slopes".into(), slopes),
            ("sinks".into(), vec![d.N]),
            ("q_lens".into(), vec![d.B]),
            ("kv_lens".into(), vec![d.B]),
            ("keep_mask".into(), vec![d.B, d.N, queries, keys]),
        ];
        for (quantity, shape) in QUANTITIES.into_iter().zip([out, row, query, key, value, bias, vec![d.N]]) {
            expected.push((format!("{quantity}_f64"), shape.clone()));
            expected.push((format!("{quantity}_zero_f64"), shape));
        }
        for (name, shape) in expected {
            if let Some(tensor) = self.get(&name).filter(|tensor| tensor.shape != shape) {
                return Err(format!(
                    "the tensor '{name}' has shape {:?}, dims and params give {shape:?}",
                    tensor.shape
                ));
            }
        }
        for (name, lengths) in
            [("q_lens", &entry.params.query_seq_lengths), ("kv_lens", &entry.params.key_value_seq_lengths)]
        {
            if let (Some(tensor), Some(lengths)) = (self.get(name), lengths) {
                let stored: Vec<usize> = tensor.values.iter().map(|&length| length as usize).collect();
                if stored != *lengths {
                    return Err(format!("the tensor '{name}' is {stored:?}, params say {lengths:?}"));
                }
            }
        }
        Ok(())
    }
}

/// The name of a dtype in manifests; `None` for those that no set has.
fn manifest_name(dtype: Dtype) -> Option<&'static str> {
    match dtype {
        Dtype::F64 => Some("float64"),
        Dtype::F32 => Some("float32"),
        Dtype::I32 => Some("int32"),
        Dtype::BOOL => Some("bool"),
        _ => None,
    }
}

fn decode(dtype: Dtype, bytes: &[u8]) -> Vec<f64> {
    let four = |bytes: &[u8]| [bytes[0], bytes[1], bytes[2], bytes[3]];
    match dtype {
        Dtype::F64 => (bytes.chunks_exact(8))
            .map(|bytes| f64::from_le_bytes(bytes.try_into().expect("chunks of eight")))
            .collect(),
        Dtype::F32 => bytes.chunks_exact(4).map(|bytes| f32::from_le_bytes(four(bytes)).into()).collect(),
        Dtype::I32 => bytes.chunks_exact(4).map(|bytes| i32::from_le_bytes(four(bytes)).into()).collect(),
        _ => bytes.iter().map(|&byte| f64::from(u8::from(byte != 0))).collect(),
    }
}
