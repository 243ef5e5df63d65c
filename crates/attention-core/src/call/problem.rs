//! The problem of a call, with the numbers that the call gives.

use std::ops::{Deref, Range};

use super::described::expect_as_described;
use crate::data::{Integers, distinct};
use crate::{
    Alignment, CallData, DType, DropoutStream, InvalidCall, OffsetRange, Problem, QueryOffset, SequenceRows,
    View,
};

/// A problem with the numbers of one call: lengths, offsets, scale, softcap and dropout, checked against it.
///
/// What is in device memory is not known here: where lengths are, the host has their bounds (`T` and `S`),
/// and whoever launches kernels gives them the tensors of [`CallData`].
#[derive(Clone, Copy, Debug)]
pub struct CallProblem<'c> {
    problem: &'c Problem,
    scale: f64,
    softcap: Option<f64>,
    query_offset: QueryOffset,
    query_lengths: Option<Integers<'c>>,
    key_value_lengths: Option<Integers<'c>>,
    query_offsets: Option<Integers<'c>>,
    dropout: Option<DropoutStream>,
}

impl Deref for CallProblem<'_> {
    type Target = Problem;

    fn deref(&self) -> &Problem {
        self.problem
    }
}

impl<'c> CallProblem<'c> {
    /// Checks the numbers of a call against its problem.
    ///
    /// # Errors
    /// [`InvalidCall`]: a tensor of numbers that is missing, unexpected, elsewhere or of another layout; a
    /// number that the problem does not announce, or announces and the call has not; lengths above the
    /// tensor's; a scale or a softcap that is not finite; an offset out of the range that was planned for;
    /// another rate of dropout.
    pub fn new(problem: &'c Problem, data: &CallData<'c>) -> Result<Self, InvalidCall> {
        for (role, view) in data.views() {
            expect_as_described(problem, role, view.map(|view| (view.desc_ref(), view.device())))?;
        }
        let scale = scale(problem, data.scale)?;
        softcap(problem, data.softcap)?;
        let dims = problem.dims();
        let query_lengths = data.query_lengths.and_then(Integers::of);
        let key_value_lengths = data.key_value_lengths.and_then(Integers::of);
        lengths(data.query_lengths, "query", query_lengths, dims.query_length)?;
        lengths(data.key_value_lengths, "key/value", key_value_lengths, dims.key_length)?;
        let query_offsets = data.query_offsets.and_then(Integers::of);
        offsets(problem, data, query_offsets)?;
        let dropout = dropout(problem, data)?;
        let (softcap, query_offset) = (data.softcap, data.query_offset);
        Ok(Self {
            problem,
            scale,
            softcap,
            query_offset,
            query_lengths,
            key_value_lengths,
            query_offsets,
            dropout,
        })
    }

    /// A call of this problem with full lengths, no offset where one is announced, and the default scale:
    /// what no call has more rows and keys than.
    pub fn at_bounds(problem: &'c Problem) -> Self {
        let bottom_right = problem.alignment() == Alignment::BottomRight;
        let query_offset = if bottom_right { QueryOffset::BottomRight } else { QueryOffset::TOP_LEFT };
        Self {
            problem,
            scale: problem.default_scale(),
            softcap: problem.has_softcap().then_some(1.0),
            query_offset,
            query_lengths: None,
            key_value_lengths: None,
            query_offsets: None,
            dropout: problem.dropout_at(0, 0).and_then(|dropout| dropout.stream().ok()),
        }
    }

    /// The problem alone.
    pub fn problem(&self) -> &'c Problem {
        self.problem
    }

    /// Whether the host knows query lengths of this call, which may differ from batch row to batch row.
    pub fn has_query_lengths(&self) -> bool {
        self.query_lengths.is_some()
    }

    /// Whether the host knows lengths of this call, of queries or of keys.
    pub fn has_lengths(&self) -> bool {
        self.query_lengths.is_some() || self.key_value_lengths.is_some()
    }

    /// What the products of query and key are multiplied by: as given, or `1 / sqrt(H)`.
    pub fn scale(&self) -> f64 {
        self.scale
    }

    /// The scale as two factors, for gradients of queries and keys: the first, a power of two so that nothing
    /// is rounded, for the gradients of products before they are summed, and the second for the sums. The
    /// first is 1 for a scale from 2^-8 to 2^24.
    ///
    /// A scale of 1e38 has operands of 1e-19, whose products with small gradients would underflow; one of
    /// 1e-37 has operands of up to 1e37, whose products with gradients would overflow.
    pub fn scale_of_gradients(&self) -> (f64, f64) {
        let magnitude = self.scale.abs();
        // Asked of every call, so without a logarithm for the scales of most.
        if magnitude == 0.0 || (256f64.recip()..=16_777_216.0).contains(&magnitude) {
            return (1.0, self.scale);
        }
        let before = (magnitude.log2() / 2.0).floor().exp2();
        (before, self.scale / before)
    }

    /// The softcap `c` of `c * tanh(x / c)`.
    pub fn softcap(&self) -> Option<f64> {
        self.softcap
    }

    /// The keep bits of the dropout. Where seed or offset are in device memory, the problem's threshold is
    /// right and the bits are not.
    pub fn dropout_stream(&self) -> Option<DropoutStream> {
        self.dropout
    }

    /// The rows of batch row `batch`.
    ///
    /// # Panics
    /// Where lengths or offsets were given and `batch` is not below `B`.
    #[inline]
    pub fn sequence(&self, batch: usize) -> SequenceRows {
        SequenceRows {
            queries: self.query_len(batch),
            keys: self.key_value_len(batch),
            offset: self.offset(batch),
            window: self.problem.window(),
            causal: self.problem.causal(),
        }
    }

    /// How many query rows of batch row `batch` are real.
    ///
    /// # Panics
    /// As [`sequence`](Self::sequence).
    #[inline]
    pub fn query_len(&self, batch: usize) -> usize {
        length(self.query_lengths, batch, self.problem.dims().query_length)
    }

    /// How many keys of batch row `batch` are real.
    ///
    /// # Panics
    /// As [`sequence`](Self::sequence).
    #[inline]
    pub fn key_value_len(&self, batch: usize) -> usize {
        length(self.key_value_lengths, batch, self.problem.dims().key_length)
    }

    /// What is added to `t` to give the position of a query row of batch row `batch`.
    ///
    /// # Panics
    /// As [`sequence`](Self::sequence).
    #[inline]
    pub fn offset(&self, batch: usize) -> i64 {
        match (self.query_offsets, self.query_offset) {
            (Some(offsets), _) => offsets.at(batch),
            (None, QueryOffset::Fixed(offset)) => offset,
            // Lengths are at most isize::MAX, so the difference does not overflow.
            (None, QueryOffset::BottomRight) => {
                self.key_value_len(batch) as i64 - self.query_len(batch) as i64
            }
        }
    }

    /// [`SequenceRows::position`] of a row of batch row `batch`.
    ///
    /// # Panics
    /// As [`sequence`](Self::sequence).
    pub fn position(&self, batch: usize, t: usize) -> i64 {
        self.sequence(batch).position(t)
    }

    /// [`SequenceRows::key_range`] of a row of batch row `batch`.
    ///
    /// # Panics
    /// As [`sequence`](Self::sequence).
    #[inline]
    pub fn key_range(&self, batch: usize, t: usize) -> Range<usize> {
        self.sequence(batch).key_range(t)
    }

    /// [`SequenceRows::key_range_of_rows`] of batch row `batch`.
    ///
    /// # Panics
    /// As [`sequence`](Self::sequence).
    pub fn key_range_of_rows(&self, batch: usize, rows: Range<usize>) -> Range<usize> {
        self.sequence(batch).key_range_of_rows(rows)
    }
}

/// Checked to be between 0 and `full`, or all of `full` where no lengths are known.
#[inline]
fn length(lengths: Option<Integers<'_>>, batch: usize, full: usize) -> usize {
    lengths.map_or(full, |lengths| lengths.at(batch) as usize)
}

/// Whether a number is finite in the precision of the logits.
fn is_finite(value: f64, accumulator: DType) -> bool {
    match accumulator {
        DType::F64 => value.is_finite(),
        _ => (value as f32).is_finite(),
    }
}

fn scale(problem: &Problem, given: Option<f64>) -> Result<f64, InvalidCall> {
    let value = given.unwrap_or_else(|| problem.default_scale());
    let dtype = problem.dtype().accumulator();
    if !is_finite(value, dtype) {
        return Err(InvalidCall::NotFinite { what: "scale", value, dtype });
    }
    let ordinary = Problem::ordinary_scales(dtype);
    if !problem.any_scale() && !ordinary.contains(&value) {
        return Err(InvalidCall::NotOrdinaryScale { value, least: *ordinary.start(), most: *ordinary.end() });
    }
    Ok(value)
}

fn softcap(problem: &Problem, given: Option<f64>) -> Result<(), InvalidCall> {
    let dtype = problem.dtype().accumulator();
    let Some(value) = given.filter(|_| problem.has_softcap()) else {
        let said = |has: bool| if has { "given" } else { "not given" };
        if given.is_some() == problem.has_softcap() {
            return Ok(());
        }
        return Err(other("softcap", said(given.is_some()), said(problem.has_softcap())));
    };
    // A softcap that vanishes in the precision of the logits would divide by zero.
    let positive = match dtype {
        DType::F64 => value > 0.0,
        _ => value as f32 > 0.0,
    };
    match (is_finite(value, dtype), positive) {
        (false, _) => Err(InvalidCall::NotFinite { what: "softcap", value, dtype }),
        (true, false) => Err(InvalidCall::SoftcapNotPositive { value }),
        (true, true) => Ok(()),
    }
}

fn lengths(
    view: Option<View<'_>>,
    which: &'static str,
    lengths: Option<Integers<'_>>,
    max: usize,
) -> Result<(), InvalidCall> {
    let (Some(view), Some(lengths)) = (view, lengths) else { return Ok(()) };
    for batch in 0..distinct(view) {
        let length = lengths.at(batch);
        if usize::try_from(length).is_ok_and(|length| length <= max) {
            continue;
        }
        return Err(InvalidCall::LengthOutOfRange { which, batch, length, max });
    }
    Ok(())
}

fn offsets(problem: &Problem, data: &CallData<'_>, offsets: Option<Integers<'_>>) -> Result<(), InvalidCall> {
    let in_range = |range: OffsetRange, offset: i64| match range.most() {
        Some(most) if offset.unsigned_abs() > most.unsigned_abs() => {
            Err(InvalidCall::OffsetOutOfRange { offset, most })
        }
        _ => Ok(()),
    };
    match (problem.alignment(), data.query_offset) {
        (Alignment::Offsets(range), _) => {
            let (Some(view), Some(offsets)) = (data.query_offsets, offsets) else { return Ok(()) };
            (0..distinct(view)).try_for_each(|batch| in_range(range, offsets.at(batch)))
        }
        (Alignment::Offset(range), QueryOffset::Fixed(offset)) => in_range(range, offset),
        (Alignment::TopLeft, QueryOffset::TOP_LEFT) | (Alignment::BottomRight, QueryOffset::BottomRight) => {
            Ok(())
        }
        (planned, given) => Err(other("query offset", given, planned)),
    }
}

fn dropout(problem: &Problem, data: &CallData<'_>) -> Result<Option<DropoutStream>, InvalidCall> {
    let rate = |rate: Option<f64>| rate.map_or_else(|| "none".to_owned(), |rate| rate.to_string());
    let (given, planned) = (data.dropout.map(|dropout| dropout.rate), problem.dropout_rate());
    if given.map(f64::to_bits) != planned.map(f64::to_bits) {
        return Err(other("dropout rate", rate(given), rate(planned)));
    }
    let Some(mut dropout) = data.dropout else { return Ok(None) };
    let number = |view: Option<View<'_>>| view.and_then(Integers::of).map(|numbers| numbers.at(0));
    if let Some(seed) = number(data.dropout_seed) {
        dropout.seed = seed.cast_unsigned();
    }
    if let Some(offset) = number(data.dropout_offset) {
        dropout.offset = offset as u32;
    }
    dropout.stream().map(Some)
}

fn other(what: &'static str, given: impl ToString, planned: impl ToString) -> InvalidCall {
    InvalidCall::OtherData { what, given: given.to_string(), planned: planned.to_string() }
}

#[cfg(test)]
mod tests;
