//! How the rows of sequences lie in tensors.

/// How the rows of sequences lie in the tensors of one side of a call: queries, or keys and values.
///
/// | queries | keys and values | |
/// |---|---|---|
/// | dense | dense, paged | served |
/// | packed | packed, paged, dense with lengths | served |
/// | dense | packed | refused |
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum RowLayout {
    /// `[B, length, heads, dim]`: as many rows for each sequence; the last ones may be padding.
    Dense,
    /// `[total, heads, dim]`: one sequence behind the other. [`Problem::tensor`](crate::Problem::tensor) has
    /// `[1, total, heads, dim]`.
    Packed,
    /// `[pages, page size, heads, dim]`, in the order of a block table.
    Paged {
        /// How many rows a page has, at least 1.
        page_size: usize,
    },
}
