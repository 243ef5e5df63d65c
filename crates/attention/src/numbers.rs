//! Lengths and offsets of batch rows as callers have them, and the numbers of a call as a result keeps them.

use std::sync::Arc;

use attention_core::{
    Alignment, CallProblem, Dropout, InvalidCall, Lengths, QueryOffset, Role, TensorDesc, View,
};

use crate::IntoView;

/// One number for each batch row: what [`IntoNumbers`] makes of lengths and offsets.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum Numbers<'a> {
    /// A list in host memory, which the call owns.
    List(Arc<[i64]>),
    /// A tensor of i32, u32 or i64, `[B]`, in host or device memory.
    Tensor(View<'a>),
    /// Lengths of [`Options`](crate::Options), which may be full.
    Lengths(Lengths),
}

/// Anything that the facade takes as one number for each batch row, lengths or offsets: a list of integers
/// (an array, a slice, a `Vec`), which is copied, or a tensor of i32, u32 or i64, which is borrowed: anything
/// that is [`IntoView`].
///
/// A tensor may be in the memory of the call's device, where kernels read it: no number goes to the host.
///
/// # Examples
/// ```
/// # #[cfg(feature = "cpu")] {
/// use attention::{Attention, View};
///
/// let (query, cache) = (vec![0.5f32; 2 * 4], vec![0.5f32; 2 * 6 * 4]);
/// let (query, cache) = ((&query, [2, 1, 1, 4]), (&cache, [2, 6, 1, 4]));
/// let list = Attention::new().key_value_lengths([6, 3]).forward(query, cache, cache)?;
/// let lengths = [6i32, 3];
/// let lengths = View::from_slice(&lengths, [2])?;
/// assert_eq!(Attention::new().key_value_lengths(lengths).forward(query, cache, cache)?, list);
/// # }
/// # Ok::<(), attention::Error>(())
/// ```
pub trait IntoNumbers<'a> {
    /// The numbers.
    ///
    /// # Errors
    /// As [`IntoView::into_view`].
    fn into_numbers(self) -> Result<Numbers<'a>, InvalidCall>;
}

impl<'a, T: IntoView<'a>> IntoNumbers<'a> for T {
    fn into_numbers(self) -> Result<Numbers<'a>, InvalidCall> {
        self.into_view().map(Numbers::Tensor)
    }
}

impl<'a> IntoNumbers<'a> for Numbers<'a> {
    fn into_numbers(self) -> Result<Self, InvalidCall> {
        Ok(self)
    }
}

impl<'a> IntoNumbers<'a> for Lengths {
    fn into_numbers(self) -> Result<Numbers<'a>, InvalidCall> {
        Ok(Numbers::Lengths(self))
    }
}

impl<'a> IntoNumbers<'a> for &Lengths {
    fn into_numbers(self) -> Result<Numbers<'a>, InvalidCall> {
        self.clone().into_numbers()
    }
}

/// Lists of integers, by value and by reference.
macro_rules! lists {
    ($(($list:ty, $($const_name:ident)?),)*) => {$(
        impl<'a, I: Copy + Default + PartialOrd + TryInto<i64>, $(const $const_name: usize)?> IntoNumbers<'a>
            for $list
        {
            fn into_numbers(self) -> Result<Numbers<'a>, InvalidCall> {
                // What is no i64 is out of every bound as the nearest one is.
                let nearest = |number: I| if number < I::default() { i64::MIN } else { i64::MAX };
                let number = |&number: &I| number.try_into().unwrap_or_else(|_| nearest(number));
                Ok(Numbers::List(self.iter().map(number).collect()))
            }
        }
    )*};
}

lists! {
    ([I; LEN], LEN),
    (&[I; LEN], LEN),
    (&[I],),
    (Vec<I>,),
    (&Vec<I>,),
    (Box<[I]>,),
    (&Box<[I]>,),
    (Arc<[I]>,),
    (&Arc<[I]>,),
}

impl<'a> Numbers<'a> {
    /// As the lengths of options, or as a tensor.
    pub(crate) fn into_lengths(self) -> (Lengths, Option<View<'a>>) {
        // A negative number stays one where a usize has 64 bits, and is above every length where it has
        // fewer.
        let length = |&length: &i64| match usize::BITS {
            64 => length as usize,
            _ => usize::try_from(length).unwrap_or(usize::MAX),
        };
        match self {
            Self::List(list) => (Lengths::PerBatch(list.iter().map(length).collect()), None),
            Self::Tensor(view) => (Lengths::Full, Some(view)),
            Self::Lengths(lengths) => (lengths, None),
        }
    }

    /// As the offsets of options, or as a tensor.
    pub(crate) fn into_offsets(self) -> (Option<Arc<[i64]>>, Option<View<'a>>) {
        let offset = |&length: &usize| i64::try_from(length).unwrap_or(i64::MAX);
        match self {
            Self::List(list) => (Some(list), None),
            Self::Tensor(view) => (None, Some(view)),
            Self::Lengths(Lengths::PerBatch(list)) => (Some(list.iter().map(offset).collect()), None),
            Self::Lengths(_) => (None, None),
        }
    }
}

/// The numbers of a call in memory of their own, for a comparison with those of another call: of a call in
/// host memory, whose tensors are known.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct KeptNumbers {
    pub(crate) scale: f64,
    pub(crate) softcap: Option<f64>,
    pub(crate) dropout: Option<Dropout>,
    pub(crate) query_offset: KeptOffset,
    pub(crate) query_lengths: Option<Box<[usize]>>,
    pub(crate) key_value_lengths: Option<Box<[usize]>>,
    pub(crate) query_starts: Option<Box<[usize]>>,
    pub(crate) key_value_starts: Option<Box<[usize]>>,
}

/// Where query rows stood among the keys.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum KeptOffset {
    One(QueryOffset),
    PerBatchRow(Box<[i64]>),
}

impl std::fmt::Display for KeptOffset {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::One(offset) => offset.fmt(f),
            Self::PerBatchRow(offsets) if offsets.len() > 16 => write!(f, "{} numbers", offsets.len()),
            Self::PerBatchRow(offsets) => write!(f, "{offsets:?}"),
        }
    }
}

impl KeptNumbers {
    pub(crate) fn of(call: &CallProblem<'_>) -> Self {
        // A call without rows may have any number of batch rows, of which nothing depends on a number.
        let dims = call.dims();
        // One number for all starts leaves every sequence without query rows, and there may be any number.
        let starts_differ = |desc: &TensorDesc| desc.strides().first() != Some(&0);
        let has_rows = dims.query_length > 0
            && dims.query_heads > 0
            && call.tensor(Role::QueryStarts).is_none_or(starts_differ);
        let batch = 0..if has_rows { dims.batch } else { 0 };
        Self {
            scale: call.scale(),
            softcap: call.softcap(),
            dropout: call.dropout_stream().and_then(|stream| {
                let ([low, high], offset) = stream.words();
                call.dropout_at(u64::from(high) << 32 | u64::from(low), offset)
            }),
            query_offset: match call.alignment() {
                Alignment::Offsets(_) => {
                    KeptOffset::PerBatchRow(batch.clone().map(|row| call.offset(row)).collect())
                }
                Alignment::BottomRight => KeptOffset::One(QueryOffset::BottomRight),
                // The same for every batch row, where there is one.
                _ => KeptOffset::One(QueryOffset::Fixed(if batch.is_empty() { 0 } else { call.offset(0) })),
            },
            query_lengths: call
                .has(Role::QueryLengths)
                .then(|| batch.clone().map(|row| call.query_len(row)).collect()),
            key_value_lengths: call
                .has(Role::KeyValueLengths)
                .then(|| batch.clone().map(|row| call.key_value_len(row)).collect()),
            query_starts: starts(call, Role::QueryStarts, |sequence| call.query_places(sequence).rows()),
            key_value_starts: starts(call, Role::KeyValueStarts, |sequence| call.key_places(sequence).rows()),
        }
    }
}

/// The starts of packed sequences, as many as differ: they rise from 0 by the rows of each sequence.
fn starts(call: &CallProblem<'_>, role: Role, rows: impl Fn(usize) -> usize) -> Option<Box<[usize]>> {
    let desc = call.tensor(role)?;
    // One number for all starts: every sequence is empty, and there may be any number of them.
    let sequences = if desc.strides()[0] == 0 { 0 } else { call.dims().batch };
    let ends = (0..sequences).scan(0, |end, sequence| {
        *end += rows(sequence);
        Some(*end)
    });
    Some(std::iter::once(0).chain(ends).collect())
}
