//! The numbers of a call: what may differ from call to call of one problem.

use crate::{Dims, Dropout, HostView, QueryOffset, Role, Row, View};

/// The numbers of a call that its [`Problem`](crate::Problem) only announces: a decoder whose cache grows, or
/// a trainer that draws a seed for each step, plans once.
///
/// The default is a call without any: scale `1 / sqrt(H)`, no softcap, top-left, full lengths, no dropout.
///
/// # Tensors
/// Lengths, offsets, starts, tables of pages, and the seed and offset of a dropout may be tensors of i32, u32
/// or i64, of any strides: `[B]`, or as their fields say. A usize is read as the signed integer of its size.
/// They are in host memory or, in a call on a device, in that device's memory.
///
/// Numbers in host memory are checked when the call is made, and a wrong one is an error. Numbers in device
/// memory are read by the kernels, which bring them into their bounds: a length into `0..=T` (or `S`), a
/// start into the rows of its tensor, an entry of a table into the pages, an offset into its
/// [`OffsetRange`](crate::OffsetRange). So a wrong one gives other rows, and never touches memory that is not
/// the call's.
///
/// Scales of 8-bit keys and values are tensors of f32, in either memory too.
///
/// # Examples
/// ```
/// use attention_core::{CallData, Inputs, View};
///
/// let (tokens, filled) = (vec![0.5f32; 2 * 4 * 8], [3i32, 1]);
/// let x = View::from_slice(&tokens, [2, 4, 1, 8])?;
/// let data = CallData { key_value_lengths: Some(View::from_slice(&filled, [2])?), ..CallData::default() };
/// // The problem says that there are lengths of 32 bits, and not which.
/// let problem = Inputs { data, ..Inputs::new(x, x, x) }.problem().build()?;
/// # assert!(problem.has(attention_core::Role::KeyValueLengths));
/// # Ok::<(), attention_core::InvalidCall>(())
/// ```
#[derive(Clone, Copy, Debug, Default)]
pub struct CallData<'a> {
    /// What the products of query and key are multiplied by; `None` for `1 / sqrt(H)`.
    pub scale: Option<f64>,
    /// Caps logits at `c` by `c * tanh(x / c)`, before the bias.
    pub softcap: Option<f64>,
    /// Where query rows stand among the keys.
    pub query_offset: QueryOffset,
    /// An offset for each batch row, `[B]`, in the place of `query_offset`.
    pub query_offsets: Option<View<'a>>,
    /// How many query rows of each batch row are real, `[B]`, each at most `T`; the rest is suffix padding.
    pub query_lengths: Option<View<'a>>,
    /// How many keys of each batch row are real, `[B]`, each at most `S`.
    pub key_value_lengths: Option<View<'a>>,
    /// Dropout of the probabilities. The rate is the problem's too, and must be the same.
    pub dropout: Option<Dropout>,
    /// `[1]`, in the place of the dropout's seed: 64 bits, of which narrower integers give the lower ones
    /// (a negative i32 is extended by its sign).
    pub dropout_seed: Option<View<'a>>,
    /// `[1]`, in the place of the dropout's offset, whose 32 bits are the lower ones of what is given.
    pub dropout_offset: Option<View<'a>>,
    /// Of packed queries `[total, N, H]`, the row at which each sequence starts and the one behind the last
    /// sequence, `[B + 1]`, rising from 0. Sequences may be empty. Rows behind the last sequence belong to
    /// none: their output is 0 and their LSE -inf.
    pub query_starts: Option<View<'a>>,
    /// The same of packed keys `[total, K, H]` and values `[total, K, Hv]`. `key_value_lengths` may leave out
    /// the last keys of a sequence.
    pub key_value_starts: Option<View<'a>>,
    /// Of keys and values in pages, `[pages, page size, K, H or Hv]`, which pages a sequence has: key `j` of
    /// sequence `b` is slot `j % page size` of page `block_table[b, j / page size]`. `[B, most]`; entries
    /// behind the sequence's `key_value_lengths` are not read, and pages may be shared.
    pub block_table: Option<View<'a>>,
    /// Of 8-bit keys, what their numbers are multiplied by to give what they stand for: f32, one for all
    /// (`[1]` or a scalar), one for each key/value head, `[K]`, or one for each head of each sequence,
    /// `[B, K]`. `None` for 1. In host memory, a scale that is NaN or infinite is an error.
    pub key_scales: Option<View<'a>>,
    /// The same of 8-bit values.
    pub value_scales: Option<View<'a>>,
}

/// How many tensors there may be among the numbers of a call.
const TENSORS: usize = Role::DATA.len() + Role::SEQUENCES.len() + Role::SCALES.len();

impl<'a> CallData<'a> {
    /// The tensors among the numbers, by role.
    pub(crate) fn views(&self) -> [(Role, Option<&View<'a>>); TENSORS] {
        [
            (Role::QueryLengths, self.query_lengths.as_ref()),
            (Role::KeyValueLengths, self.key_value_lengths.as_ref()),
            (Role::QueryOffsets, self.query_offsets.as_ref()),
            (Role::DropoutSeed, self.dropout_seed.as_ref()),
            (Role::DropoutOffset, self.dropout_offset.as_ref()),
            (Role::QueryStarts, self.query_starts.as_ref()),
            (Role::KeyValueStarts, self.key_value_starts.as_ref()),
            (Role::BlockTable, self.block_table.as_ref()),
            (Role::KeyScales, self.key_scales.as_ref()),
            (Role::ValueScales, self.value_scales.as_ref()),
        ]
    }
}

/// How many numbers of a tensor there are to look at: a broadcast tensor holds one, whatever its shape is.
pub(crate) fn distinct(view: View<'_>) -> usize {
    match (view.shape().first(), view.desc().strides().first()) {
        (Some(&count), Some(0)) => count.min(1),
        (Some(&count), _) => count,
        (None, _) => 0,
    }
}

/// Integers in host memory, of any of the dtypes that a call may have them in.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Integers<'a> {
    I32(Row<'a, i32>),
    U32(Row<'a, u32>),
    I64(Row<'a, i64>),
}

impl<'a> Integers<'a> {
    /// Those of a tensor of one axis; `None` where it has others or is not in host memory.
    pub(crate) fn of(view: View<'a>) -> Option<Self> {
        if view.shape().rank() == 1 { Self::row(view, &[]) } else { None }
    }

    /// Those along the last axis; `None` where the tensor is not in host memory.
    ///
    /// # Panics
    /// Where `leading` has another length than the other axes, or is outside of them.
    #[inline]
    fn row(view: View<'a>, leading: &[usize]) -> Option<Self> {
        let i32s = view.host::<i32>().map(|host| Self::I32(host.row(leading)));
        let u32s = || view.host::<u32>().map(|host| Self::U32(host.row(leading)));
        let i64s = || view.host::<i64>().map(|host| Self::I64(host.row(leading)));
        i32s.or_else(u32s).or_else(i64s)
    }

    /// # Panics
    /// Where there is no number at `index`.
    #[inline]
    pub(crate) fn at(&self, index: usize) -> i64 {
        match self {
            Self::I32(row) => row.at(index).into(),
            Self::U32(row) => row.at(index).into(),
            Self::I64(row) => row.at(index),
        }
    }
}

/// The scales of 8-bit keys or values in host memory: finite numbers.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Scales<'a>(HostView<'a, f32>);

impl<'a> Scales<'a> {
    /// Those of a tensor as its problem describes it; `None` where it is not in host memory.
    pub(crate) fn of(view: View<'a>) -> Option<Self> {
        view.host().map(Self)
    }

    /// The index and the value of the first that is not finite. Numbers that are repeated are looked at once.
    pub(crate) fn not_finite(&self) -> Option<(Dims, f32)> {
        let sizes = (self.0.shape().iter().zip(self.0.strides().iter()))
            .map(|(&size, &stride)| if stride == 0 { size.min(1) } else { size })
            .collect::<Vec<_>>();
        let columns = sizes.last().copied().unwrap_or(1);
        (0..sizes.iter().product::<usize>()).find_map(|flat| {
            let index: Dims = match sizes.len() {
                0 => [].into(),
                1 => [flat].into(),
                _ => [flat / columns, flat % columns].into(),
            };
            let scale = self.0.at(&index);
            (!scale.is_finite()).then_some((index, scale))
        })
    }

    /// That of a head of a sequence.
    ///
    /// # Panics
    /// Where there is no such head, or no such sequence.
    pub(crate) fn at(&self, batch: usize, head: usize) -> f32 {
        match self.0.shape()[..] {
            [] => self.0.at(&[]),
            [1] => self.0.at(&[0]),
            [_] => self.0.at(&[head]),
            _ => self.0.at(&[batch, head]),
        }
    }
}

/// A block table in host memory.
#[derive(Clone, Copy, Debug)]
pub(crate) struct BlockTable<'a>(View<'a>);

impl<'a> BlockTable<'a> {
    /// `None` where the tensor has other axes than `[B, most]` or is not in host memory.
    pub(crate) fn of(view: View<'a>) -> Option<Self> {
        (view.shape().rank() == 2 && view.device() == crate::Device::Cpu && view.desc().dtype().is_integer())
            .then_some(Self(view))
    }

    /// The pages of a sequence, in order.
    ///
    /// # Panics
    /// Where there is no such sequence.
    #[inline]
    pub(crate) fn sequence(&self, batch: usize) -> Integers<'a> {
        Integers::row(self.0, &[batch])
            .unwrap_or_else(|| unreachable!("a block table holds integers in host memory"))
    }
}
