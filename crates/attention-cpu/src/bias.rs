//! Small tensors of any float dtype: bias rows, ALiBi slopes and sinks.

use attention_core::{DType, HostView, Row, Scalar, VariantCounter, View};
use half::{bf16, f16};

use crate::elementary::Compute;
use crate::variants::{BiasRuns, RowRuns};

/// A tensor of any float dtype that the logits take numbers from.
#[derive(Clone, Copy)]
pub(crate) enum AnyFloat<'a> {
    F64(HostView<'a, f64>),
    /// f64 that is read in the precision of f32 logits, also where small batch rows are computed in f64: what
    /// is infinite there masks everywhere.
    F64InF32(HostView<'a, f64>),
    F32(HostView<'a, f32>),
    F16(HostView<'a, f16>),
    Bf16(HostView<'a, bf16>),
}

impl<'a> AnyFloat<'a> {
    /// Of a view in host memory with a float dtype, which a checked call guarantees, in the precision of
    /// `logits`.
    pub(crate) fn new(view: View<'a>, logits: DType) -> Self {
        let typed = match view.desc().dtype() {
            DType::F64 if logits == DType::F64 => view.host().map(Self::F64),
            DType::F64 => view.host().map(Self::F64InF32),
            DType::F32 => view.host().map(Self::F32),
            DType::F16 => view.host().map(Self::F16),
            DType::Bf16 => view.host().map(Self::Bf16),
            _ => None,
        };
        typed.unwrap_or_else(|| {
            unreachable!("a checked call has float tensors in host memory, got {}", view.desc())
        })
    }

    /// The counter of how [`add_row`](Self::add_row) reads a bias; `None` where it has no rows.
    pub(crate) fn counter<'r>(&self, runs: &'r BiasRuns) -> Option<&'r VariantCounter> {
        match self {
            Self::F64(view) => row_counter(view, &runs.f64),
            Self::F64InF32(view) => row_counter(view, &runs.f64_in_f32),
            Self::F32(view) => row_counter(view, &runs.f32),
            Self::F16(view) => row_counter(view, &runs.f16),
            Self::Bf16(view) => row_counter(view, &runs.bf16),
        }
    }

    /// One number.
    pub(crate) fn at<C: Compute>(&self, index: &[usize]) -> C {
        match self {
            Self::F64(view) => C::from_f64(view.at(index)),
            Self::F64InF32(view) => C::from_f32(view.at(index) as f32),
            Self::F32(view) => C::from_f32(view.at(index)),
            Self::F16(view) => C::from_f32(view.at(index).to_f32()),
            Self::Bf16(view) => C::from_f32(view.at(index).to_f32()),
        }
    }

    /// Adds the numbers of a row from `start` on to `logits`; a row of one number is the same for every key.
    /// -inf masks whatever the logit is, and nothing else leads below the `lowest` finite logit.
    #[inline(always)]
    pub(crate) fn add_row<C: Compute>(&self, leading: [usize; 3], start: usize, logits: &mut [C], lowest: C) {
        match self {
            Self::F64(view) => add_row(view.row(&leading), start, logits, lowest, C::from_f64),
            Self::F64InF32(view) => {
                add_row(view.row(&leading), start, logits, lowest, |x| C::from_f32(x as f32))
            }
            Self::F32(view) => add_row(view.row(&leading), start, logits, lowest, C::from_f32),
            Self::F16(view) => {
                add_row(view.row(&leading), start, logits, lowest, |x| C::from_f32(x.to_f32()))
            }
            Self::Bf16(view) => {
                add_row(view.row(&leading), start, logits, lowest, |x| C::from_f32(x.to_f32()))
            }
        }
    }
}

#[inline(always)]
fn add_row<C: Compute, T: Scalar>(
    row: Row<'_, T>,
    start: usize,
    logits: &mut [C],
    lowest: C,
    convert: impl Fn(T) -> C,
) {
    if row.len() == 1 {
        let value = convert(row.at(0));
        for logit in logits {
            *logit = logit.biased(value, lowest);
        }
    } else if let Some(values) = row.contiguous() {
        for (logit, &value) in logits.iter_mut().zip(&values[start..]) {
            *logit = logit.biased(convert(value), lowest);
        }
    } else {
        for (index, logit) in logits.iter_mut().enumerate() {
            *logit = logit.biased(convert(row.at(start + index)), lowest);
        }
    }
}

/// The counter of how the rows of a mask or bias are read; `None` where it has none.
pub(crate) fn row_counter<'r, T: Copy>(
    view: &HostView<'_, T>,
    runs: &'r RowRuns,
) -> Option<&'r VariantCounter> {
    if view.shape().contains(&0) {
        return None;
    }
    let row = view.row(&[0; 3]);
    Some(match row.contiguous() {
        _ if row.len() == 1 => &runs.one_for_all_keys,
        Some(_) => &runs.contiguous,
        None => &runs.strided,
    })
}

/// The index of a broadcast tensor of four axes for a row of the logits: 0 along axes of size 1.
pub(crate) fn broadcast(shape: &[usize], index: [usize; 3]) -> [usize; 3] {
    std::array::from_fn(|axis| if shape[axis] == 1 { 0 } else { index[axis] })
}
