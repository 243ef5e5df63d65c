//! The logits of a tile: which query rows and keys its products are of.

use crate::scratch::extent;
use crate::terms::QueryRow;

/// Which logits the products in a tile are, and where they lie in it.
#[derive(Clone, Copy)]
pub(crate) struct TileShape<'t> {
    /// The query row of each row of the tile.
    pub(crate) rows: &'t [QueryRow],
    /// The key of the first column.
    pub(crate) first_key: usize,
    /// Columns to look at: whole pairs of vectors. Those behind the last key are masked by the rows' ranges.
    pub(crate) columns: usize,
    /// The distance between rows.
    pub(crate) stride: usize,
    /// Whether products are masked, or something is added to them; without it they are logits.
    pub(crate) apply: bool,
}

impl TileShape<'_> {
    /// Elements from the first of the tile to the last column of its last row.
    #[inline(always)]
    pub(crate) fn extent(&self) -> usize {
        extent(self.rows.len(), self.stride, self.columns)
    }
}
