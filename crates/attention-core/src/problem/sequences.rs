//! Sequences that are packed or in pages: how their rows lie, and what a problem says of it.

use super::{Problem, Spec};
use crate::{InvalidCall, Pass, Role, RowLayout, TensorDesc};

/// What is wrong with a combination.
const NO_PACKED_KEYS: &str = "packed keys need packed queries";
const TWO_LAYOUTS: &str = "keys are packed (key/value starts) or in pages (block table), not both";
const NO_QUERY_LENGTHS: &str =
    "packed queries have no query lengths, their starts say how long a sequence is";
const NO_LENGTHS: &str = "keys in pages need key/value lengths";
const NO_LENGTHS_OF_DENSE: &str = "packed queries with dense keys need key/value lengths";
const OVERLAPS: &str = "rows of a block table may be one, with stride 0, and may not overlap otherwise";
const NO_GRADIENTS: &str = "keys in pages have no backward pass: sequences may share a page";
const NO_ROWS: &str = "a page has at least one row";
const NO_LONGEST_QUERY: &str =
    "only packed queries have a longest sequence, others have their tensor's length";
const NO_LONGEST_KEY: &str =
    "only packed or paged keys have a longest sequence, others have their tensor's length";

impl Spec {
    fn desc(&self, role: Role) -> Option<TensorDesc> {
        self.tensors[role as usize]
    }

    fn has(&self, role: Role) -> bool {
        self.desc(role).is_some()
    }

    /// `B`, as far as a problem that is not checked says.
    pub(super) fn batch(&self) -> usize {
        let size = |role: Role| self.desc(role).and_then(|desc| desc.shape().first().copied());
        let starts = size(Role::QueryStarts).or_else(|| size(Role::KeyValueStarts));
        match starts {
            Some(starts) => starts.saturating_sub(1),
            None => size(Role::BlockTable).or_else(|| size(Role::Query)).unwrap_or(0),
        }
    }

    /// Whether the rows of this tensor are packed.
    pub(super) fn packs(&self, role: Role) -> bool {
        use Role::{DKey, DLse, DOut, DQuery, DValue, Key, Lse, Out, Query, Value};
        match role {
            Query | Out | Lse | DOut | DLse | DQuery => self.has(Role::QueryStarts),
            Key | Value | DKey | DValue => self.has(Role::KeyValueStarts),
            _ => false,
        }
    }

    /// Gives a packed tensor the axis of size 1 in front that dense ones have their batch in. Its stride is 0
    /// whoever gave it, so that problems that do the same are equal.
    pub(super) fn with_batch_axis(&self, role: Role, desc: TensorDesc) -> TensorDesc {
        let rank = if matches!(role, Role::Lse | Role::DLse) { 3 } else { 4 };
        if !self.packs(role) {
            return desc;
        }
        let has_it = desc.rank() == rank && desc.shape()[0] == 1;
        let without = if has_it { desc.without_axis(0) } else { desc };
        if without.rank() + 1 == rank { without.with_leading_axis().unwrap_or(desc) } else { desc }
    }

    /// Which layouts there may be at once.
    pub(super) fn check_layouts(&self) -> Result<(), InvalidCall> {
        let refused = |what| Err(InvalidCall::Sequences { what });
        let (queries, packed) = (self.has(Role::QueryStarts), self.has(Role::KeyValueStarts));
        let paged = self.has(Role::BlockTable);
        match (queries, packed, paged) {
            (_, true, true) => return refused(TWO_LAYOUTS),
            (false, true, false) => return refused(NO_PACKED_KEYS),
            _ => {}
        }
        if queries && self.has(Role::QueryLengths) {
            return refused(NO_QUERY_LENGTHS);
        }
        if paged && !self.has(Role::KeyValueLengths) {
            return refused(NO_LENGTHS);
        }
        if queries && !packed && !paged && !self.has(Role::KeyValueLengths) {
            return refused(NO_LENGTHS_OF_DENSE);
        }
        // So that a table has no more entries than its memory.
        let table =
            self.desc(Role::BlockTable).filter(|table| table.strides().iter().all(|&stride| stride != 0));
        if table.is_some_and(|table| table.may_overlap_itself()) {
            return refused(OVERLAPS);
        }
        if paged && self.pass == Pass::Backward {
            return refused(NO_GRADIENTS);
        }
        if !queries && self.longest_query.is_some() {
            return refused(NO_LONGEST_QUERY);
        }
        if !packed && !paged && self.longest_key.is_some() {
            return refused(NO_LONGEST_KEY);
        }
        Ok(())
    }

    /// The `T` of a call whose query tensor has `rows` rows in its second axis.
    pub(super) fn bound_of_queries(&mut self, rows: usize) -> usize {
        if !self.has(Role::QueryStarts) {
            return rows;
        }
        let found = self.axis_of_logits(2).unwrap_or(rows);
        let longest = self.longest_query.unwrap_or(found);
        // What would be found again is not kept, so that problems that do the same are equal.
        self.longest_query = Some(longest).filter(|&longest| longest != found);
        longest
    }

    /// The `S` of a call whose key tensor has these two first axes.
    pub(super) fn bound_of_keys(&mut self, axes: [usize; 2]) -> Result<usize, InvalidCall> {
        let room = if self.has(Role::KeyValueStarts) {
            axes[1]
        } else if let Some(table) = self.desc(Role::BlockTable) {
            if axes[1] == 0 {
                return Err(InvalidCall::Sequences { what: NO_ROWS });
            }
            let most = table.shape().get(1).copied().unwrap_or(0);
            let shape = [most, axes[1]].into();
            most.checked_mul(axes[1]).ok_or(InvalidCall::Overflow { what: "keys of a sequence", shape })?
        } else {
            return Ok(axes[1]);
        };
        let found = self.axis_of_logits(3).unwrap_or(room);
        let longest = self.longest_key.unwrap_or(found);
        self.longest_key = Some(longest).filter(|&longest| longest != found);
        Ok(longest)
    }

    /// The size of this axis of `[B, N, T, S]` where a mask or bias has all of it.
    fn axis_of_logits(&self, axis: usize) -> Option<usize> {
        let size = |role: Role| {
            let desc = self.desc(role)?;
            let aligned = (axis + desc.rank()).checked_sub(4)?;
            desc.shape().get(aligned).copied().filter(|&size| size != 1)
        };
        size(Role::Mask).or_else(|| size(Role::Bias))
    }
}

impl Problem {
    /// How the rows of queries lie, and those of outputs and their gradients: dense or packed.
    pub fn query_layout(&self) -> RowLayout {
        if self.has(Role::QueryStarts) { RowLayout::Packed } else { RowLayout::Dense }
    }

    /// How the rows of keys and values lie, and those of their gradients.
    pub fn key_layout(&self) -> RowLayout {
        if self.has(Role::KeyValueStarts) {
            return RowLayout::Packed;
        }
        if !self.has(Role::BlockTable) {
            return RowLayout::Dense;
        }
        let key = self.tensor(Role::Key);
        RowLayout::Paged { page_size: key.map_or(1, |key| key.shape()[1]) }
    }

    /// Whether the rows of this tensor are packed, so that a call may give it without the axis of size 1 that
    /// [`tensor`](Self::tensor) has in front.
    pub(crate) fn packs(&self, role: Role) -> bool {
        self.spec.packs(role)
    }
}
