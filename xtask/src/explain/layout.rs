//! Where the rows of a call without data are: dense, packed or in pages.

use attention_core::{CallData, Dimensions, InvalidCall, View};

/// What is packed.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Packed {
    /// Queries, and keys where they are not in pages.
    All,
    /// Queries alone.
    Queries,
}

/// Where rows are: the first two axes of the tensors, and the numbers that say it, of sequences that are all
/// as long as the longest.
pub(super) struct Rows {
    pub(super) queries: [usize; 2],
    pub(super) keys: [usize; 2],
    query_starts: Option<Vec<i32>>,
    key_starts: Option<Vec<i32>>,
    table: Option<Table>,
}

/// A block table and, where the call gives none, the lengths.
struct Table {
    shape: [usize; 2],
    entries: Vec<i32>,
    lengths: Vec<i32>,
}

impl Rows {
    pub(super) fn new(
        dims: &Dimensions,
        packed: Option<Packed>,
        page_size: Option<usize>,
        key_lengths: &[usize],
    ) -> Result<Self, InvalidCall> {
        let (batch, queries, keys) = (dims.batch, dims.query_length, dims.key_length);
        let mut rows = Self {
            queries: [batch, queries],
            keys: [batch, keys],
            query_starts: None,
            key_starts: None,
            table: None,
        };
        if packed.is_some() {
            rows.query_starts = Some(starts(batch, queries)?);
            rows.queries = [1, batch * queries];
        }
        if let Some(page_size) = page_size {
            let most = keys.div_ceil(page_size);
            let entries = range(batch, most)?;
            rows.keys = [batch * most, page_size];
            let full = number(keys).ok_or(overflow([batch, keys]))?;
            let lengths = if key_lengths.is_empty() { vec![full; batch] } else { Vec::new() };
            rows.table = Some(Table { shape: [batch, most], entries, lengths });
        } else if packed == Some(Packed::All) {
            rows.key_starts = Some(starts(batch, keys)?);
            rows.keys = [1, batch * keys];
        }
        Ok(rows)
    }

    /// The numbers of a call with where its rows are.
    pub(super) fn place<'a>(&'a self, data: CallData<'a>) -> Result<CallData<'a>, InvalidCall> {
        let list = |numbers: &'a [i32]| View::from_slice(numbers, [numbers.len()]);
        let starts = |starts: &'a Option<Vec<i32>>| starts.as_deref().map(list).transpose();
        let table = self.table.as_ref();
        let lengths = table.filter(|table| !table.lengths.is_empty()).map(|table| list(&table.lengths));
        Ok(CallData {
            query_starts: starts(&self.query_starts)?,
            key_value_starts: starts(&self.key_starts)?,
            block_table: table.map(|table| View::from_slice(&table.entries, table.shape)).transpose()?,
            key_value_lengths: data.key_value_lengths.or(lengths.transpose()?),
            ..data
        })
    }

    /// How long the longest sequence may be, where queries or keys are sequences of their own.
    pub(super) fn longest(&self, dims: &Dimensions) -> (Option<usize>, Option<usize>) {
        (
            self.query_starts.is_some().then_some(dims.query_length),
            (self.key_starts.is_some() || self.table.is_some()).then_some(dims.key_length),
        )
    }
}

fn overflow(shape: [usize; 2]) -> InvalidCall {
    InvalidCall::Overflow { what: "starts or pages of 32 bits", shape: shape.into() }
}

fn number(number: usize) -> Option<i32> {
    i32::try_from(number).ok()
}

/// Of sequences of `length` rows each.
fn starts(batch: usize, length: usize) -> Result<Vec<i32>, InvalidCall> {
    let rows = batch.checked_mul(length).and_then(number);
    rows.ok_or(overflow([batch, length]))?;
    (0..=batch).map(|start| number(start * length).ok_or(overflow([batch, length]))).collect()
}

/// Each page once.
fn range(batch: usize, most: usize) -> Result<Vec<i32>, InvalidCall> {
    let pages = batch.checked_mul(most).and_then(number).ok_or(overflow([batch, most]))?;
    Ok((0..pages).collect())
}
