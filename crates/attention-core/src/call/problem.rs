//! The problem of a call, with the numbers that the call gives.

use std::ops::{Deref, Range};

use super::described::expect_as_described;
use super::key_scale;
use crate::data::{BlockTable, Integers, Scales, distinct};
use crate::{
    Alignment, CallData, DType, DropoutStream, InvalidCall, OffsetRange, Problem, QueryOffset, Role,
    RowLayout, RowPlaces, SequenceRows, View,
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
    query_starts: Option<Integers<'c>>,
    key_value_starts: Option<Integers<'c>>,
    block_table: Option<BlockTable<'c>>,
    key_scales: Option<Scales<'c>>,
    value_scales: Option<Scales<'c>>,
    /// What a sequence has where no number of the call says less.
    most_queries: usize,
    most_keys: usize,
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
    /// another rate of dropout; a scale of 8-bit keys or values that is not finite.
    pub fn new(problem: &'c Problem, data: &CallData<'c>) -> Result<Self, InvalidCall> {
        for (role, view) in data.views() {
            expect_as_described(problem, role, view.map(|view| (view.desc_ref(), view.device())))?;
        }
        let scale = scale(problem, data.scale)?;
        softcap(problem, data.softcap)?;
        let dims = problem.dims();
        let query_starts = starts(problem, Role::Query, data.query_starts)?;
        let key_value_starts = starts(problem, Role::Key, data.key_value_starts)?;
        let [most_queries, most_keys] = most_rows(problem);
        let query_lengths = data.query_lengths.and_then(Integers::of);
        let key_value_lengths = data.key_value_lengths.and_then(Integers::of);
        lengths(data.query_lengths, "query", query_lengths, dims.query_length)?;
        match (problem.key_layout(), data.key_value_lengths.zip(key_value_lengths)) {
            (RowLayout::Dense, _) => {
                lengths(data.key_value_lengths, "key/value", key_value_lengths, dims.key_length)?;
            }
            (_, Some(given)) => {
                used_keys(problem, given, data.key_value_starts.zip(key_value_starts), most_keys)?;
            }
            (_, None) => {}
        }
        let block_table = data.block_table.and_then(BlockTable::of);
        pages(problem, data, block_table, key_value_lengths)?;
        let query_offsets = data.query_offsets.and_then(Integers::of);
        offsets(problem, data, query_offsets)?;
        let dropout = dropout(problem, data)?;
        let key_scales = scales(Role::KeyScales, data.key_scales)?;
        let value_scales = scales(Role::ValueScales, data.value_scales)?;
        let (softcap, query_offset) = (data.softcap, data.query_offset);
        Ok(Self {
            problem,
            scale,
            softcap,
            query_offset,
            query_lengths,
            key_value_lengths,
            query_offsets,
            query_starts,
            key_value_starts,
            block_table,
            key_scales,
            value_scales,
            most_queries,
            most_keys,
            dropout,
        })
    }

    /// A call of this problem with full lengths, no offset where one is announced, and the default scale:
    /// what no call has more rows and keys than. Where rows are packed or in pages, it has no
    /// [places](Self::query_places) for them.
    pub fn at_bounds(problem: &'c Problem) -> Self {
        let bottom_right = problem.alignment() == Alignment::BottomRight;
        let query_offset = if bottom_right { QueryOffset::BottomRight } else { QueryOffset::TOP_LEFT };
        let [most_queries, most_keys] = most_rows(problem);
        Self {
            problem,
            scale: problem.default_scale(),
            softcap: problem.has_softcap().then_some(1.0),
            query_offset,
            query_lengths: None,
            key_value_lengths: None,
            query_offsets: None,
            query_starts: None,
            key_value_starts: None,
            block_table: None,
            key_scales: None,
            value_scales: None,
            most_queries,
            most_keys,
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
        let magnitude = match self.problem.dtype().accumulator() {
            DType::F64 => self.scale.abs(),
            // What is 0 in f32 leaves logits and their gradients alone.
            _ => f64::from(self.scale.abs() as f32),
        };
        // Asked of every call, so without a logarithm for the scales of most.
        if magnitude == 0.0 || (256f64.recip()..=16_777_216.0).contains(&magnitude) {
            return (1.0, self.scale);
        }
        let before = (magnitude.log2() / 2.0).floor().exp2();
        (before, self.scale / before)
    }

    /// The scale of the call with that of 8-bit keys ([`key_scale`](Self::key_scale)), as two factors: the
    /// first, a power of two so that nothing is rounded, for queries, and the second, which is finite, for
    /// their products with the numbers that the keys hold.
    ///
    /// Numbers of 8 bits are not far from 1, and the keys that they stand for may be. With the power of two
    /// of their scale at the query, products are as large as those of the keys themselves, to within a factor
    /// of 2, so that none overflows or underflows that a call with wider keys would not lose as well.
    ///
    /// # Panics
    /// As [`key_scale`](Self::key_scale).
    pub fn scale_of_products(&self, batch: usize, key_head: usize) -> (f64, f64) {
        key_scale::split(self.scale, self.key_scale(batch, key_head))
    }

    /// What the numbers of 8-bit keys of a key/value head of sequence `batch` are multiplied by. 1 where the
    /// call has no scales, and where they are in device memory, which the host does not know.
    ///
    /// # Panics
    /// Where scales differ by head or sequence, and there is no such one.
    pub fn key_scale(&self, batch: usize, key_head: usize) -> f32 {
        self.key_scales.map_or(1.0, |scales| scales.at(batch, key_head))
    }

    /// The same of values.
    ///
    /// # Panics
    /// As [`key_scale`](Self::key_scale).
    pub fn value_scale(&self, batch: usize, key_head: usize) -> f32 {
        self.value_scales.map_or(1.0, |scales| scales.at(batch, key_head))
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
        if let Some(starts) = self.query_starts {
            return between(starts, batch);
        }
        length(self.query_lengths, batch, self.most_queries)
    }

    /// How many keys of batch row `batch` are real.
    ///
    /// # Panics
    /// As [`sequence`](Self::sequence).
    #[inline]
    pub fn key_value_len(&self, batch: usize) -> usize {
        match (self.key_value_lengths, self.key_value_starts) {
            (None, Some(starts)) => between(starts, batch),
            (lengths, _) => length(lengths, batch, self.most_keys),
        }
    }

    /// Where the query rows of sequence `batch` are in the tensors of queries and outputs.
    ///
    /// # Panics
    /// As [`sequence`](Self::sequence), and where queries are packed and this call does not say how
    /// ([`at_bounds`](Self::at_bounds), starts in device memory).
    #[inline]
    pub fn query_places(&self, batch: usize) -> RowPlaces<'c> {
        match self.problem.query_layout() {
            RowLayout::Packed => packed(self.query_starts, batch),
            _ => RowPlaces::contiguous(batch, 0..self.problem.dims().query_length),
        }
    }

    /// Where the keys of sequence `batch` are in the tensors of keys and values.
    ///
    /// # Panics
    /// As [`query_places`](Self::query_places).
    #[inline]
    pub fn key_places(&self, batch: usize) -> RowPlaces<'c> {
        match self.problem.key_layout() {
            RowLayout::Packed => packed(self.key_value_starts, batch),
            RowLayout::Paged { page_size } => {
                let table = self.block_table.unwrap_or_else(|| panic!("{}", NOT_KNOWN));
                RowPlaces::paged(table.sequence(batch), page_size, self.key_value_len(batch))
            }
            RowLayout::Dense => RowPlaces::contiguous(batch, 0..self.problem.dims().key_length),
        }
    }

    /// Which sequence and which of its rows is at these two first indices of the tensors of queries and
    /// outputs: the inverse of [`query_places`](Self::query_places), `None` for padding and for rows that
    /// belong to no sequence. Takes as many steps as the logarithm of the number of sequences.
    ///
    /// # Panics
    /// As [`query_places`](Self::query_places).
    ///
    /// # Examples
    /// ```
    /// use attention_core::{CallData, CallProblem, Inputs, View};
    ///
    /// let (tokens, starts, keys) = ([0.5f32; 5 * 8], [0i32, 2, 2, 4], [0i32, 1, 2, 3]);
    /// let x = View::from_slice(&tokens, [5, 1, 8])?;
    /// let data = CallData {
    ///     query_starts: Some(View::from_slice(&starts, [4])?),
    ///     key_value_starts: Some(View::from_slice(&keys, [4])?),
    ///     ..CallData::default()
    /// };
    /// let problem = Inputs { data, ..Inputs::new(x, x, x) }.problem().build()?;
    /// let call = CallProblem::new(&problem, &data)?;
    /// // Sequence 1 is empty, and row 4 is behind the last.
    /// assert_eq!([1, 2, 4].map(|row| call.query_at([0, row])), [Some((0, 1)), Some((2, 0)), None]);
    /// # Ok::<(), attention_core::InvalidCall>(())
    /// ```
    pub fn query_at(&self, [outer, inner]: [usize; 2]) -> Option<(usize, usize)> {
        if self.problem.query_layout() != RowLayout::Packed {
            return (inner < self.query_len(outer)).then_some((outer, inner));
        }
        let starts = self.query_starts.unwrap_or_else(|| panic!("{}", NOT_KNOWN));
        // The first start behind the row is that of the sequence after the row's: starts never fall, so it
        // is none of an empty sequence before.
        let (mut low, mut high) = (1, self.problem.dims().batch + 1);
        while low < high {
            let middle = low + (high - low) / 2;
            if starts.at(middle) as usize <= inner { low = middle + 1 } else { high = middle }
        }
        let batch = low - 1;
        (batch < self.problem.dims().batch).then(|| (batch, inner - starts.at(batch) as usize))
    }

    /// The sequences of `batches` that have query rows, in order. Passes over any number of empty packed
    /// sequences in as many steps as the logarithm of their number.
    ///
    /// # Panics
    /// As [`sequence`](Self::sequence).
    pub fn sequences_with_queries(
        &self,
        batches: Range<usize>,
    ) -> impl Iterator<Item = usize> + Clone + use<'_, 'c> {
        // Where no sequence can have rows, there may be any number of them.
        let (call, mut next) = (self, if self.most_queries == 0 { batches.end } else { batches.start });
        std::iter::from_fn(move || {
            while next < batches.end && call.query_len(next) == 0 {
                next = match call.query_starts {
                    // The row behind an empty sequence is the first of the next one that has any.
                    Some(starts) => call.query_at([0, starts.at(next) as usize])?.0,
                    None => next + 1,
                };
            }
            next += 1;
            (next <= batches.end).then(|| next - 1)
        })
    }

    /// The rows of packed queries that belong to no sequence: those behind the last. Their outputs and
    /// gradients are 0 and their LSE is -inf. Empty for dense queries.
    ///
    /// # Panics
    /// Where queries are packed and this call does not say how.
    pub fn query_rows_of_no_sequence(&self) -> Range<usize> {
        self.rows_of_no_sequence(self.problem.query_layout(), Role::Query, self.query_starts)
    }

    /// The same of packed keys and values.
    ///
    /// # Panics
    /// As there.
    pub fn keys_of_no_sequence(&self) -> Range<usize> {
        self.rows_of_no_sequence(self.problem.key_layout(), Role::Key, self.key_value_starts)
    }

    fn rows_of_no_sequence(
        &self,
        layout: RowLayout,
        role: Role,
        starts: Option<Integers<'_>>,
    ) -> Range<usize> {
        if layout != RowLayout::Packed {
            return 0..0;
        }
        let rows = size(self.problem, role, 1);
        let starts = starts.unwrap_or_else(|| panic!("{}", NOT_KNOWN));
        starts.at(self.problem.dims().batch) as usize..rows
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

/// How many query rows and keys a sequence has at most: a longest one that masks have room for may be more
/// than the tensors hold.
fn most_rows(problem: &Problem) -> [usize; 2] {
    let dims = problem.dims();
    let queries = match problem.query_layout() {
        RowLayout::Dense => dims.query_length,
        _ => dims.query_length.min(size(problem, Role::Query, 1)),
    };
    let keys = match problem.key_layout() {
        RowLayout::Dense => dims.key_length,
        RowLayout::Packed => dims.key_length.min(size(problem, Role::Key, 1)),
        RowLayout::Paged { .. } => dims.key_length.min(rows_of_table(problem)),
    };
    [queries, keys]
}

/// How many keys a row of the block table has room for; 0 where keys are not in pages.
fn rows_of_table(problem: &Problem) -> usize {
    match problem.key_layout() {
        // The problem checked that the product does not overflow.
        RowLayout::Paged { page_size } => size(problem, Role::BlockTable, 1) * page_size,
        _ => 0,
    }
}

/// The size of an axis of a tensor, 0 where the problem has no such tensor.
fn size(problem: &Problem, role: Role, axis: usize) -> usize {
    problem.tensor(role).map_or(0, |desc| desc.shape()[axis])
}

const NOT_KNOWN: &str = "where rows are is a number of the call that the host does not have";

/// How many rows sequence `batch` has; checked to be a number of rows.
#[inline]
fn between(starts: Integers<'_>, batch: usize) -> usize {
    (starts.at(batch + 1) - starts.at(batch)) as usize
}

/// Checked to be rows of the tensor.
#[inline]
fn packed<'c>(starts: Option<Integers<'c>>, batch: usize) -> RowPlaces<'c> {
    let starts = starts.unwrap_or_else(|| panic!("{}", NOT_KNOWN));
    RowPlaces::contiguous(0, starts.at(batch) as usize..starts.at(batch + 1) as usize)
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

/// The starts of packed sequences, checked where the host knows them.
fn starts<'c>(
    problem: &Problem,
    role: Role,
    view: Option<View<'c>>,
) -> Result<Option<Integers<'c>>, InvalidCall> {
    let Some((view, starts)) = view.and_then(|view| Some((view, Integers::of(view)?))) else {
        return Ok(None);
    };
    let dims = problem.dims();
    let (which, rows_are, longest) = match role {
        Role::Query => ("query", "query rows", dims.query_length),
        _ => ("key/value", "keys", dims.key_length),
    };
    let rows = size(problem, role, 1) as i64;
    let (mut least, mut most) = (0, 0);
    for index in 0..distinct(view) {
        let start = starts.at(index);
        if !(least..=most).contains(&start) {
            return Err(InvalidCall::StartOutOfRange { which, index, start, least, most });
        }
        if usize::try_from(start - least).is_ok_and(|length| length > longest) {
            let (batch, length) = (index - 1, start - least);
            return Err(InvalidCall::SequenceTooLong { which: rows_are, batch, length, longest });
        }
        (least, most) = (start, rows);
    }
    Ok(Some(starts))
}

/// The lengths of packed or paged keys: each sequence has its own room.
fn used_keys(
    problem: &Problem,
    (view, lengths): (View<'_>, Integers<'_>),
    starts: Option<(View<'_>, Integers<'_>)>,
    most: usize,
) -> Result<(), InvalidCall> {
    // Where starts repeat one number, all sequences are empty.
    let sequences = starts.map_or(0, |(view, _)| distinct(view).saturating_sub(1)).max(distinct(view));
    for batch in 0..sequences {
        let length = lengths.at(batch);
        let room = starts.map_or(most, |(_, starts)| between(starts, batch));
        if usize::try_from(length).is_ok_and(|length| length <= room) {
            continue;
        }
        // The table has room, and the bound of the problem is less.
        let (longest, in_table) = (problem.dims().key_length, rows_of_table(problem));
        if usize::try_from(length).is_ok_and(|length| length <= in_table) {
            return Err(InvalidCall::SequenceTooLong { which: "keys", batch, length, longest });
        }
        return Err(InvalidCall::UsedKeysOutOfRange { batch, length, room });
    }
    Ok(())
}

/// The entries of a block table that sequences need, checked where the host knows them and how many are
/// needed.
fn pages(
    problem: &Problem,
    data: &CallData<'_>,
    table: Option<BlockTable<'_>>,
    lengths: Option<Integers<'_>>,
) -> Result<(), InvalidCall> {
    let RowLayout::Paged { page_size } = problem.key_layout() else { return Ok(()) };
    let (Some(view), Some(table)) = (data.block_table, table) else { return Ok(()) };
    let pages = size(problem, Role::Key, 0);
    // Where only the device knows the lengths, it clamps the entries too.
    let Some((given, lengths)) = data.key_value_lengths.zip(lengths) else { return Ok(()) };
    let [rows, columns] = [0, 1].map(|axis| view.desc().strides()[axis] != 0);
    // Numbers that are repeated are looked at once, so that the cost does not exceed the memory they are in.
    let check = |batch: usize| {
        let needed = (lengths.at(batch) as usize).div_ceil(page_size);
        let entries = table.sequence(batch);
        (0..if columns { needed } else { needed.min(1) }).try_for_each(|index| {
            let page = entries.at(index);
            let is_page = usize::try_from(page).is_ok_and(|page| page < pages);
            is_page.then_some(()).ok_or(InvalidCall::NoSuchPage { batch, index, page, pages })
        })
    };
    if rows {
        return (0..problem.dims().batch).try_for_each(check);
    }
    (0..distinct(given)).max_by_key(|&batch| lengths.at(batch)).map_or(Ok(()), check)
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

/// The scales of 8-bit keys or values, checked where the host knows them.
fn scales<'c>(role: Role, view: Option<View<'c>>) -> Result<Option<Scales<'c>>, InvalidCall> {
    let Some(scales) = view.and_then(Scales::of) else { return Ok(None) };
    match scales.not_finite() {
        None => Ok(Some(scales)),
        Some((index, value)) => Err(InvalidCall::ScaleNotFinite { role, index, value }),
    }
}

fn other(what: &'static str, given: impl ToString, planned: impl ToString) -> InvalidCall {
    InvalidCall::OtherData { what, given: given.to_string(), planned: planned.to_string() }
}

#[cfg(test)]
mod tests;
