//! How the rows of sequences lie in the tensors of a case.

use serde::{Deserialize, Serialize};

/// How the rows of sequences lie in the tensors of a case.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sequences {
    /// Packed queries, with so many rows behind the last sequence; `None` for dense ones.
    pub query_tail: Option<usize>,
    /// Keys and values.
    pub keys: KeyRows,
}

/// How the rows of keys and values lie.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum KeyRows {
    /// Batch rows, of which lengths say how many keys are real.
    Dense,
    /// One sequence behind the other.
    Packed {
        /// Rows behind the last sequence.
        tail: usize,
        /// Rows of each sequence that its length leaves out; `None` where calls give no lengths.
        unused: Option<Vec<usize>>,
    },
    /// In pages of a block table.
    Paged {
        /// Rows of a page.
        page_size: usize,
        /// Pages that no sequence has.
        spare: usize,
        /// How many of its first pages each sequence shares with the others, as far as it has so many.
        shared: usize,
        /// Whether pages are in the order in which sequences have them.
        in_order: bool,
    },
}

impl Sequences {
    /// Packed queries and keys, with a few rows of no sequence behind both.
    pub const PACKED: Self = Self { query_tail: Some(3), keys: KeyRows::Packed { tail: 2, unused: None } };

    /// Dense queries, and keys in pages of this size in no order, two of them spare.
    pub const fn paged(page_size: usize) -> Self {
        let keys = KeyRows::Paged { page_size, spare: 2, shared: 0, in_order: false };
        Self { query_tail: None, keys }
    }

    /// Whether backward calls have these layouts.
    pub fn have_gradients(&self) -> bool {
        !matches!(self.keys, KeyRows::Paged { .. })
    }

    /// Adds rows that belong to no sequence.
    pub(crate) fn add_rows_of_no_sequence(&mut self, queries: usize, keys: usize) {
        self.query_tail = self.query_tail.map(|tail| tail + queries);
        match &mut self.keys {
            KeyRows::Packed { tail, .. } => *tail += keys,
            KeyRows::Paged { page_size, spare, .. } => *spare += keys.div_ceil(*page_size),
            KeyRows::Dense => {}
        }
    }

    /// Without rows of no sequence, and pages in order.
    pub(crate) fn put_in_order(&mut self) {
        self.query_tail = self.query_tail.map(|_| 0);
        match &mut self.keys {
            KeyRows::Packed { tail, .. } => *tail = 0,
            KeyRows::Paged { spare, shared, in_order, .. } => (*spare, *shared, *in_order) = (0, 0, true),
            KeyRows::Dense => {}
        }
    }

    /// Brings unused rows into what is left of `longest` keys by those that are used.
    pub(crate) fn fit(&mut self, used: &[usize], longest: usize) {
        if let KeyRows::Packed { unused: Some(unused), .. } = &mut self.keys {
            unused.truncate(used.len());
            unused.iter_mut().zip(used).for_each(|(unused, used)| *unused = (*unused).min(longest - used));
        }
    }

    /// Whether queries are packed, and which layout keys have.
    pub(crate) fn kind(&self) -> (bool, std::mem::Discriminant<KeyRows>) {
        (self.query_tail.is_some(), std::mem::discriminant(&self.keys))
    }

    /// Whether one row of the keys may be a key of several sequences.
    pub(crate) fn share_keys(&self) -> bool {
        matches!(self.keys, KeyRows::Paged { shared: 1.., .. })
    }
}
