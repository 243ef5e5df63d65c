//! A golden case as a call.

use attention_core::{CallProblem, DType, Dropout, Inputs, InvalidCall, ProblemBuilder, QueryOffset, Window};

use super::file::{Stored, Tensors};
use super::{Entry, Offset};
use crate::cases::{Layout, Numbers};
use crate::tensor::HostTensor;

/// The inputs of a case in one dtype.
pub(super) struct GoldenInputs {
    query: HostTensor,
    key: HostTensor,
    value: HostTensor,
    mask: Option<HostTensor>,
    bias: Option<HostTensor>,
    alibi_slopes: Option<HostTensor>,
    sinks: Option<HostTensor>,
    numbers: Numbers,
    /// Present where the case has gradients.
    pub(super) d_out: Option<HostTensor>,
    pub(super) d_lse: Option<HostTensor>,
}

/// A stored tensor in a dtype, with a batch axis in front where the case has none.
fn tensor(stored: &Stored, dtype: DType, batch_axis: bool) -> HostTensor {
    let mut shape = stored.shape.clone();
    if batch_axis {
        shape.insert(0, 1);
    }
    let shape = attention_core::Dims::from_slice(&shape).expect("checked: at most four axes");
    HostTensor::from_values(dtype, shape, Layout::Contiguous, |index| stored.values[index])
}

impl GoldenInputs {
    pub(super) fn new(entry: &Entry, tensors: &Tensors, dtype: DType) -> Self {
        // Packed tensors have the axis in front that batch rows are along.
        let has = |name: &str| tensors.get(name).is_some();
        let rows = |name: &str| entry.rank == Some(3) || has(name);
        let operand = |name: &str, batch_axis: bool| {
            tensor(tensors.get(name).expect("checked with the manifest"), dtype, batch_axis)
        };
        let keys = |name: &'static str, pages: &'static str| {
            operand(if has(pages) { pages } else { name }, rows("cu_seqlens_k"))
        };
        let batch_axis = rows("cu_seqlens_q");
        // Only where the option is on: equivalent calls may bring tensors of their own.
        let extra = |name: &str, wanted: bool| {
            tensors.get(name).filter(|_| wanted).map(|stored| tensor(stored, dtype, false))
        };
        let params = &entry.params;
        let mask = params.mask_shape.as_ref().and(tensors.get("mask"));
        Self {
            query: operand("q", batch_axis),
            key: keys("k", "k_pages"),
            value: keys("v", "v_pages"),
            mask: mask.map(|stored| tensor(stored, DType::Bool, false)),
            bias: extra("bias", params.bias_shape.is_some()),
            alibi_slopes: extra("alibi_slopes", params.alibi.is_some()),
            sinks: extra("sinks", params.sinks),
            numbers: numbers(entry, tensors),
            d_out: has("d_out").then(|| operand("d_out", batch_axis)),
            d_lse: (tensors.get("d_lse").filter(|_| params.d_lse))
                .map(|stored| tensor(stored, dtype.accumulator(), batch_axis)),
        }
    }

    pub(super) fn inputs(&self) -> Inputs<'_> {
        Inputs {
            mask: self.mask.as_ref().map(HostTensor::view),
            bias: self.bias.as_ref().map(HostTensor::view),
            alibi_slopes: self.alibi_slopes.as_ref().map(HostTensor::view),
            sinks: self.sinks.as_ref().map(HostTensor::view),
            data: self.numbers.data(),
            ..Inputs::new(self.query.view(), self.key.view(), self.value.view())
        }
    }

    /// The problem without its pass.
    pub(super) fn problem(&self, entry: &Entry) -> Result<ProblemBuilder, InvalidCall> {
        let params = &entry.params;
        let [left, right] = params.local_window_size.unwrap_or_default();
        let builder = self.inputs().problem().causal(params.is_causal).window(Window { left, right });
        let [queries, keys] = entry.longest();
        let builder = builder.longest(
            self.numbers.query_starts.as_ref().map(|_| queries),
            self.numbers.places_keys().then_some(keys),
        );
        let problem = builder.clone().build()?;
        CallProblem::new(&problem, &self.numbers.data()).map(|_| builder)
    }
}

/// The numbers of the call: lengths in the integers that the file has them in.
fn numbers(entry: &Entry, tensors: &Tensors) -> Numbers {
    let params = &entry.params;
    let lengths = |name: &str, lengths: &Option<Vec<usize>>| {
        let (lengths, stored) = (lengths.as_ref()?, entry.tensors.get(name));
        let is_int32 = stored.is_some_and(|(dtype, _)| dtype == "int32");
        let dtype = if is_int32 { DType::I32 } else { DType::I64 };
        let length = |index: usize| lengths[index] as i64;
        Some(HostTensor::from_integers(dtype, [lengths.len()], Layout::Contiguous, length))
    };
    let given = if params.sequences.is_some() {
        tensors.sequences()
    } else {
        Numbers {
            query_lengths: lengths("q_lens", &params.query_seq_lengths),
            key_value_lengths: lengths("kv_lens", &params.key_value_seq_lengths),
            ..Numbers::default()
        }
    };
    Numbers {
        scale: params.scale,
        softcap: params.softcap,
        query_offset: match params.query_offset {
            None => QueryOffset::TOP_LEFT,
            Some(Offset::Fixed(offset)) => QueryOffset::Fixed(offset),
            // The manifest was checked for other names.
            Some(Offset::Named(_)) => QueryOffset::BottomRight,
        },
        dropout: params
            .dropout
            .map(|dropout| Dropout::new(dropout.rate, dropout.seed).with_offset(dropout.offset)),
        ..given
    }
}
