//! How the rows of a problem's sequences lie in its tensors: dense, packed or in pages.

use attention_core::{Problem, Role, RowLayout};
use attention_kernels::Layout;

use crate::slot::Side;

/// How the rows of queries, and those of keys and values, lie in a plan's tensors.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub(crate) struct Places {
    /// Whether queries are packed, with outputs, the logsumexp, and their gradients.
    pub(crate) packed_queries: bool,
    /// Whether keys and values are packed, with their gradients.
    pub(crate) packed_keys: bool,
    /// The pages that keys and values are in.
    pub(crate) pages: Option<Pages>,
}

/// The pages of keys and values.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Pages {
    pub(crate) count: i64,
    /// How many keys a page has.
    pub(crate) size: i64,
    /// How many entries of the block table each sequence has in the copy that cuDNN reads: enough for the
    /// longest sequence.
    pub(crate) most: i64,
}

impl Places {
    pub(crate) fn of(problem: &Problem) -> Self {
        let pages = match problem.key_layout() {
            RowLayout::Paged { page_size } => Some(Pages {
                count: problem.tensor(Role::Key).map_or(0, |key| key.shape()[0] as i64),
                size: page_size as i64,
                most: problem.dims().key_length.div_ceil(page_size.max(1)) as i64,
            }),
            _ => None,
        };
        Self {
            packed_queries: problem.query_layout() == RowLayout::Packed,
            packed_keys: problem.key_layout() == RowLayout::Packed,
            pages,
        }
    }

    pub(crate) fn is_dense(self) -> bool {
        self == Self::default()
    }

    /// Whether tensors of this side are packed.
    pub(crate) fn packs(self, side: Side) -> bool {
        match side {
            Side::Queries => self.packed_queries,
            Side::Keys => self.packed_keys,
        }
    }

    /// The layout that kernels which take a call's `Parameters` are compiled for.
    pub(crate) fn layout(self) -> Layout {
        match self {
            Self { pages: Some(_), .. } => Layout::Paged,
            Self { packed_queries: true, .. } => Layout::Packed,
            _ => Layout::Dense,
        }
    }
}

/// The number of rows that the tensors of query rows have, of all batch rows or sequences together; `None` on
/// overflow.
pub(crate) fn query_rows(problem: &Problem) -> Option<usize> {
    let dims = problem.dims();
    rows(problem, Role::Query, problem.query_layout(), dims.batch.checked_mul(dims.query_length))
}

/// As [`query_rows`], of keys that are not in pages.
pub(crate) fn key_rows(problem: &Problem) -> Option<usize> {
    let dims = problem.dims();
    rows(problem, Role::Key, problem.key_layout(), dims.batch.checked_mul(dims.key_length))
}

fn rows(problem: &Problem, role: Role, layout: RowLayout, dense: Option<usize>) -> Option<usize> {
    match layout {
        RowLayout::Packed => problem.tensor(role).map(|desc| desc.shape()[1]),
        _ => dense,
    }
}
