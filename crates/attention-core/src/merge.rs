//! The associative merge of partial softmax results, which chunked, split-KV and multi-device runs share.
//!
//! Attention over a set of keys is determined by attention over the parts of the set: with per-part outputs
//! `o_i` and logsumexps `l_i`, `l = ln(sum of exp(l_i))` and `o = sum of exp(l_i - l) o_i` (Rabe and Staats,
//! arXiv 2112.05682, section 3; the online form is Milakov and Gimelshein, arXiv 1805.02867). A part without
//! keys has output 0 and logsumexp -inf, and is the neutral element. Where there is a sink, exactly one part
//! carries it.

mod empty;

pub use empty::EmptyLse;

use crate::{DType, HostView, HostViewMut, InvalidCall, Role, Scalar, View, ViewMut};

/// The floats that softmax statistics are kept in.
pub trait Accumulator: Scalar + PartialOrd {
    /// Negative infinity: the logsumexp of nothing.
    const NEG_INFINITY: Self;
    /// Zero.
    const ZERO: Self;
    /// `e` to this.
    fn exp(self) -> Self;
    /// The natural logarithm.
    fn ln(self) -> Self;
    /// `self * b + c`.
    fn scaled_plus(self, b: Self, c: Self) -> Self;
    /// `self - b`.
    fn minus(self, b: Self) -> Self;
}

macro_rules! accumulator {
    ($type:ty) => {
        impl Accumulator for $type {
            const NEG_INFINITY: Self = <$type>::NEG_INFINITY;
            const ZERO: Self = 0.0;

            #[inline(always)]
            fn exp(self) -> Self {
                self.exp()
            }
            #[inline(always)]
            fn ln(self) -> Self {
                self.ln()
            }
            #[inline(always)]
            fn scaled_plus(self, b: Self, c: Self) -> Self {
                self * b + c
            }
            #[inline(always)]
            fn minus(self, b: Self) -> Self {
                self - b
            }
        }
    };
}
accumulator!(f32);
accumulator!(f64);

/// The statistics of a softmax over some logits: their maximum and the sum of `exp(x - max)`.
///
/// Carried together with `value = sum of exp(x - max) v`, which [`push`](Self::push) and
/// [`merge`](Self::merge) tell how to rescale.
///
/// ```
/// use attention_core::merge::RunningSoftmax;
///
/// let mut left = RunningSoftmax::<f64>::EMPTY;
/// left.push(&[1.0, 2.0]);
/// let mut right = RunningSoftmax::EMPTY;
/// right.push(&[3.0]);
/// left.merge(right);
/// let whole = (1f64.exp() + 2f64.exp() + 3f64.exp()).ln();
/// assert!((left.lse() - whole).abs() < 1e-15);
/// ```
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RunningSoftmax<F> {
    /// The largest logit so far; -inf where there is none.
    pub max: F,
    /// The sum of `exp(x - max)` so far.
    pub sum: F,
}

/// What the two values of a merge are multiplied by before they are added.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rescale<F> {
    /// The factor of the value that was there.
    pub old: F,
    /// The factor of the value that joins.
    pub new: F,
}

impl<F: Accumulator> RunningSoftmax<F> {
    /// Of no logits: the neutral element.
    pub const EMPTY: Self = Self { max: F::NEG_INFINITY, sum: F::ZERO };

    /// Of one logit. -inf counts as no logit.
    pub fn of(logit: F) -> Self {
        let sum = if logit == F::NEG_INFINITY { F::ZERO } else { F::from_f64(1.0) };
        Self { max: logit, sum }
    }

    /// Adds the statistics of more logits and returns the factors of the two values.
    pub fn merge(&mut self, other: Self) -> Rescale<F> {
        // A NaN on either side becomes the maximum and stays it, whatever joins later.
        let takes_over = other.max > self.max || other.max.partial_cmp(&other.max).is_none();
        let max = if takes_over { other.max } else { self.max };
        let factor = |part: F| if part == F::NEG_INFINITY { F::ZERO } else { part.minus(max).exp() };
        let rescale = Rescale { old: factor(self.max), new: factor(other.max) };
        self.sum = self.sum.scaled_plus(rescale.old, other.sum.scaled_plus(rescale.new, F::ZERO));
        self.max = max;
        rescale
    }

    /// Adds logits one by one.
    pub fn push(&mut self, logits: &[F]) {
        for &logit in logits {
            self.merge(Self::of(logit));
        }
    }

    /// `ln(sum of exp(x))`: -inf where there is no logit.
    pub fn lse(&self) -> F {
        if self.max == F::NEG_INFINITY {
            return F::NEG_INFINITY;
        }
        self.sum.ln().scaled_plus(F::from_f64(1.0), self.max)
    }
}

/// The logsumexp of two parts, and the factors of their outputs.
pub fn merge_lse<F: Accumulator>(lse: F, other: F) -> (F, Rescale<F>) {
    let mut running = RunningSoftmax::of(lse);
    running.merge(RunningSoftmax::of(other));
    // Not `exp(part - merged)`: `merged` is rounded at the size of the logsumexps, so at 1e4 in f32 the two
    // factors would miss a sum of one by 5e-4. The differences from the maximum are exact or small.
    let log_sum = running.sum.ln();
    let factor = |part: F| {
        if part == F::NEG_INFINITY { F::ZERO } else { part.minus(running.max).minus(log_sum).exp() }
    };
    (running.lse(), Rescale { old: factor(lse), new: factor(other) })
}

/// Merges the result of a part into a row: `out` and `lse` hold one part's result and receive that of both.
///
/// # Examples
/// ```
/// use attention_core::merge::merge_row;
///
/// // Two parts of equal weight.
/// let (mut out, mut lse) = ([1.0f32, 5.0], 0.0);
/// merge_row(&mut out, &mut lse, &[3.0, 5.0], 0.0);
/// assert!((out[0] - 2.0).abs() < 1e-6 && (lse - 2f32.ln()).abs() < 1e-6);
/// ```
///
/// # Panics
/// Where the rows differ in length.
pub fn merge_row<F: Accumulator>(out: &mut [F], lse: &mut F, other_out: &[F], other_lse: F) {
    assert_eq!(out.len(), other_out.len(), "rows of one head have one length");
    let (merged, rescale) = merge_lse(*lse, other_lse);
    *lse = merged;
    for (out, &other) in out.iter_mut().zip(other_out) {
        *out = out.scaled_plus(rescale.old, other.scaled_plus(rescale.new, F::ZERO));
    }
}

/// Merges partial results over any number of parts of the keys, for whole tensors on the host: parts `(out,
/// lse)` of shapes `[B, T, N, Hv]` and `[B, T, N]` into an output of any float dtype.
///
/// The parts are merged in order, in f32 (f64 where the logsumexps are f64). Without parts the result is that
/// of no keys: output 0, logsumexp -inf. Nothing is written on a refusal.
///
/// # Errors
/// [`InvalidCall::Rank`], [`InvalidCall::Shape`] or [`InvalidCall::DType`] where the parts do not fit,
/// [`InvalidCall::Device`] for memory that is not on the host.
pub fn merge_partials(
    parts: &[(View<'_>, View<'_>)],
    out: ViewMut<'_>,
    lse: ViewMut<'_>,
) -> Result<(), InvalidCall> {
    match lse.desc().dtype() {
        DType::F64 => merge_parts::<f64>(parts, out, lse),
        _ => merge_parts::<f32>(parts, out, lse),
    }
}

/// Elements of a row that are merged at a time, so that no memory of a row's length is needed.
const BLOCK: usize = 256;

fn merge_parts<F: Accumulator>(
    parts: &[(View<'_>, View<'_>)],
    out: ViewMut<'_>,
    lse: ViewMut<'_>,
) -> Result<(), InvalidCall> {
    let (shape, rows) = (out.shape(), lse.shape());
    let expected: [usize; 4] = shape[..].try_into().map_err(|_| InvalidCall::Rank {
        role: Role::Out,
        rank: shape.rank(),
        shape,
        expected: "4",
    })?;
    let [batch, length, heads, width] = expected;
    if rows[..] != shape[..3] {
        let expected = [batch, length, heads].into();
        return Err(InvalidCall::Shape { role: Role::Lse, shape: rows, expected, why: "[B, T, N] of out" });
    }
    let dtype = out.desc().dtype();
    let mut sources = Vec::with_capacity(parts.len());
    for (part_out, part_lse) in parts {
        for (role, view, expected) in [(Role::Out, part_out, shape), (Role::Lse, part_lse, rows)] {
            if view.shape() != expected {
                let why = "every part has the shape of the whole";
                return Err(InvalidCall::Shape { role, shape: view.shape(), expected, why });
            }
        }
        sources.push((rows_of::<F>(Role::Out, part_out)?, host::<F>(Role::Lse, part_lse)?));
    }
    let mut lse = host_mut::<F>(Role::Lse, lse)?;
    let mut write_out = row_writer::<F>(Role::Out, out, dtype)?;
    // Sizes of an empty tensor say nothing about memory or time.
    if rows.contains(&0) {
        return Ok(());
    }
    let (mut merged, mut other) = ([F::ZERO; BLOCK], [F::ZERO; BLOCK]);
    for index in (0..batch).flat_map(|b| (0..length).flat_map(move |t| (0..heads).map(move |n| [b, t, n]))) {
        for first in (0..width).step_by(BLOCK) {
            let count = BLOCK.min(width - first);
            let (merged, other) = (&mut merged[..count], &mut other[..count]);
            merged.fill(F::ZERO);
            let mut merged_lse = F::NEG_INFINITY;
            for (part_out, part_lse) in &sources {
                part_out(&index, first, other);
                merge_row(merged, &mut merged_lse, other, part_lse.at(&index));
            }
            write_out(&index, first, merged);
        }
        let parts = sources.iter().map(|(_, part)| part.at(&index));
        lse.set(&index, parts.fold(F::NEG_INFINITY, |lse, part| merge_lse(lse, part).0));
    }
    Ok(())
}

fn host<'a, T: Scalar>(role: Role, view: &View<'a>) -> Result<HostView<'a, T>, InvalidCall> {
    view.host().ok_or_else(|| not_on_host::<T>(role, view.device(), view.desc().dtype()))
}

fn host_mut<'a, T: Scalar>(role: Role, view: ViewMut<'a>) -> Result<HostViewMut<'a, T>, InvalidCall> {
    let refused = not_on_host::<T>(role, view.device(), view.desc().dtype());
    view.host_mut().ok_or(refused)
}

fn not_on_host<T: Scalar>(role: Role, device: crate::Device, dtype: DType) -> InvalidCall {
    if device != crate::Device::Cpu {
        return InvalidCall::Device { role, device, expected: crate::Device::Cpu };
    }
    InvalidCall::DType { role, dtype, expected: T::DTYPE.name().to_owned() }
}

type ReadRow<'a, F> = Box<dyn Fn(&[usize], usize, &mut [F]) + 'a>;
type WriteRow<'a, F> = Box<dyn FnMut(&[usize], usize, &[F]) + 'a>;

/// A reader of rows of any float dtype, from a column on.
fn rows_of<'a, F: Accumulator>(role: Role, view: &View<'a>) -> Result<ReadRow<'a, F>, InvalidCall> {
    fn typed<'a, T: Scalar, F: Accumulator>(
        role: Role,
        view: &View<'a>,
    ) -> Result<ReadRow<'a, F>, InvalidCall> {
        let host = host::<T>(role, view)?;
        Ok(Box::new(move |index, first, to| {
            let row = host.row(index);
            for (column, to) in to.iter_mut().enumerate() {
                *to = F::from_f64(row.at(first + column).to_f64());
            }
        }))
    }
    match view.desc().dtype() {
        DType::F64 => typed::<f64, F>(role, view),
        DType::F32 => typed::<f32, F>(role, view),
        DType::F16 => typed::<half::f16, F>(role, view),
        DType::Bf16 => typed::<half::bf16, F>(role, view),
        dtype => Err(InvalidCall::DType { role, dtype, expected: "f64, f32, f16 or bf16".to_owned() }),
    }
}

/// A writer of rows of any float dtype, from a column on.
fn row_writer<'a, F: Accumulator>(
    role: Role,
    view: ViewMut<'a>,
    dtype: DType,
) -> Result<WriteRow<'a, F>, InvalidCall> {
    fn typed<'a, T: Scalar, F: Accumulator>(
        role: Role,
        view: ViewMut<'a>,
    ) -> Result<WriteRow<'a, F>, InvalidCall> {
        let mut host = host_mut::<T>(role, view)?;
        Ok(Box::new(move |index, first, from| {
            let mut row = host.row_mut(index);
            for (column, from) in from.iter().enumerate() {
                row.set(first + column, T::from_f64(from.to_f64()));
            }
        }))
    }
    match dtype {
        DType::F64 => typed::<f64, F>(role, view),
        DType::F32 => typed::<f32, F>(role, view),
        DType::F16 => typed::<half::f16, F>(role, view),
        DType::Bf16 => typed::<half::bf16, F>(role, view),
        dtype => Err(InvalidCall::DType { role, dtype, expected: "f64, f32, f16 or bf16".to_owned() }),
    }
}

#[cfg(test)]
mod tests;
