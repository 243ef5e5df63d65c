//! The numbers of a case's calls: lengths, offsets, scale, softcap and dropout, as values and as tensors.

use attention_core::{CallData, DType, Dropout, QueryOffset, Role, View};

use super::{Case, ScaleShape};
use crate::rng::Rng;
use crate::tensor::HostTensor;

/// The numbers of a call, with the tensors among them.
#[derive(Clone, Debug, Default)]
pub struct Numbers {
    /// As in [`CallData`].
    pub scale: Option<f64>,
    /// As in [`CallData`].
    pub softcap: Option<f64>,
    /// As in [`CallData`].
    pub query_offset: QueryOffset,
    /// `[B]`.
    pub query_offsets: Option<HostTensor>,
    /// `[B]`.
    pub query_lengths: Option<HostTensor>,
    /// `[B]`.
    pub key_value_lengths: Option<HostTensor>,
    /// As in [`CallData`]: where there are tensors of them, with another seed and offset, which must not
    /// matter.
    pub dropout: Option<Dropout>,
    /// `[1]`.
    pub dropout_seed: Option<HostTensor>,
    /// `[1]`.
    pub dropout_offset: Option<HostTensor>,
    /// `[B + 1]`, of packed queries.
    pub query_starts: Option<HostTensor>,
    /// `[B + 1]`, of packed keys.
    pub key_value_starts: Option<HostTensor>,
    /// `[B, most]`, of keys in pages.
    pub block_table: Option<HostTensor>,
    /// `[1]`, `[K]` or `[B, K]`, of 8-bit keys.
    pub key_scales: Option<HostTensor>,
    /// The same of values.
    pub value_scales: Option<HostTensor>,
}

impl Numbers {
    /// Those of a case, of the padded call where its sequences are packed or in pages. The dtype of each
    /// tensor is drawn by the case's seed, among those that can hold its numbers.
    pub fn of(case: &Case) -> Self {
        let options = &case.options;
        let tensor = |role: Role, numbers: &[i64]| tensor(case, role, numbers);
        let lengths = |role: Role, lengths: &Option<Vec<usize>>| {
            let lengths = lengths.as_ref()?;
            let lengths: Vec<i64> = lengths.iter().map(|&length| length as i64).collect();
            Some(tensor(role, &lengths))
        };
        let scales = |role: Role, shape: Option<ScaleShape>| shape.map(|shape| shape.tensor(case, role));
        let in_tensors = options.dropout.filter(|_| options.dropout_tensors);
        Self {
            scale: options.scale,
            softcap: options.softcap,
            query_offset: options.query_offset,
            query_offsets: options.query_offsets.as_ref().map(|offsets| tensor(Role::QueryOffsets, offsets)),
            query_lengths: lengths(Role::QueryLengths, &options.query_lengths),
            key_value_lengths: lengths(Role::KeyValueLengths, &options.key_value_lengths),
            dropout: options.dropout.map(|dropout| match in_tensors {
                Some(Dropout { rate, seed, offset }) => Dropout { rate, seed: !seed, offset: !offset },
                None => dropout,
            }),
            dropout_seed: in_tensors.map(|dropout| tensor(Role::DropoutSeed, &[dropout.seed.cast_signed()])),
            dropout_offset: in_tensors.map(|dropout| tensor(Role::DropoutOffset, &[dropout.offset.into()])),
            query_starts: None,
            key_value_starts: None,
            block_table: None,
            key_scales: scales(Role::KeyScales, options.eight_bit.and_then(|cache| cache.key_scales)),
            value_scales: scales(Role::ValueScales, options.eight_bit.and_then(|cache| cache.value_scales)),
        }
    }

    /// Whether keys are packed or in pages.
    pub(crate) fn places_keys(&self) -> bool {
        self.key_value_starts.is_some() || self.block_table.is_some()
    }

    /// The same for a case that differs in its lengths or layouts: tensors keep their dtypes, where they are
    /// not new.
    pub(crate) fn remade(&self, case: &Case) -> Self {
        let mut numbers = Self::of(case);
        for ((role, own), (_, new)) in self.tensors().into_iter().zip(numbers.tensors_mut()) {
            if let (Some(own), Some(new)) = (own, new) {
                let integers = new.integers();
                *new = HostTensor::from_integers(
                    own.desc().dtype(),
                    own.desc().shape(),
                    case.layouts.of(role),
                    |index| integers[index],
                );
            }
        }
        numbers
    }

    /// The numbers as a call takes them.
    pub fn data(&self) -> CallData<'_> {
        fn view(tensor: &Option<HostTensor>) -> Option<View<'_>> {
            tensor.as_ref().map(HostTensor::view)
        }
        CallData {
            scale: self.scale,
            softcap: self.softcap,
            query_offset: self.query_offset,
            query_offsets: view(&self.query_offsets),
            query_lengths: view(&self.query_lengths),
            key_value_lengths: view(&self.key_value_lengths),
            dropout: self.dropout,
            dropout_seed: view(&self.dropout_seed),
            dropout_offset: view(&self.dropout_offset),
            query_starts: view(&self.query_starts),
            key_value_starts: view(&self.key_value_starts),
            block_table: view(&self.block_table),
            key_scales: view(&self.key_scales),
            value_scales: view(&self.value_scales),
        }
    }

    /// Those that are integers.
    pub(crate) fn tensors(&self) -> [(Role, Option<&HostTensor>); 8] {
        [
            (Role::QueryLengths, self.query_lengths.as_ref()),
            (Role::KeyValueLengths, self.key_value_lengths.as_ref()),
            (Role::QueryOffsets, self.query_offsets.as_ref()),
            (Role::DropoutSeed, self.dropout_seed.as_ref()),
            (Role::DropoutOffset, self.dropout_offset.as_ref()),
            (Role::QueryStarts, self.query_starts.as_ref()),
            (Role::KeyValueStarts, self.key_value_starts.as_ref()),
            (Role::BlockTable, self.block_table.as_ref()),
        ]
    }

    fn tensors_mut(&mut self) -> [(Role, Option<&mut HostTensor>); 8] {
        [
            (Role::QueryLengths, self.query_lengths.as_mut()),
            (Role::KeyValueLengths, self.key_value_lengths.as_mut()),
            (Role::QueryOffsets, self.query_offsets.as_mut()),
            (Role::DropoutSeed, self.dropout_seed.as_mut()),
            (Role::DropoutOffset, self.dropout_offset.as_mut()),
            (Role::QueryStarts, self.query_starts.as_mut()),
            (Role::KeyValueStarts, self.key_value_starts.as_mut()),
            (Role::BlockTable, self.block_table.as_mut()),
        ]
    }
}

/// A list of integers of a case, in a dtype that has them all.
pub(super) fn tensor(case: &Case, role: Role, numbers: &[i64]) -> HostTensor {
    let (dtype, layout) = (dtype_for(case, role, numbers), case.layouts.of(role));
    HostTensor::from_integers(dtype, [numbers.len()], layout, |index| numbers[index])
}

/// A dtype that has all of these numbers.
pub(super) fn dtype_for(case: &Case, role: Role, numbers: &[i64]) -> DType {
    let dtypes: Vec<DType> =
        DType::INTEGERS.into_iter().filter(|&dtype| numbers.iter().all(|&x| holds(dtype, x))).collect();
    Rng::named(case.content.seed, role.name()).pick(&dtypes)
}

/// Whether an integer dtype has this number.
fn holds(dtype: DType, number: i64) -> bool {
    match dtype {
        DType::I32 => i32::try_from(number).is_ok(),
        DType::U32 => u32::try_from(number).is_ok(),
        _ => true,
    }
}
