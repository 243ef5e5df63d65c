//! The order of the axes that callers have.

use attention::{InvalidCall, View, ViewMut};

/// The order of the axes of query, key, value and output.
///
/// Both orders are views of the same memory to this crate: nothing is copied for either, whatever the strides.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum AxisOrder {
    /// Heads before the sequence, `[B, N, T, H]`, as models in candle have it after `transpose(1, 2)`; `[N, T, H]`
    /// without a batch axis.
    Bnth,
    /// The sequence before heads, `[B, T, N, H]`, as it comes out of a projection and `reshape`; `[T, N, H]` without a
    /// batch axis.
    Btnh,
}

/// A tensor with two axes that the orders swap.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Kind {
    /// Query, key, value, output, and their gradients.
    Operand,
    /// The logsumexp and its gradient, which have no last axis.
    Rows,
}

impl Kind {
    /// The axes in the order of the library's from the caller's, and the other way round: a swap either way.
    /// `None` where a tensor has a number of axes that no call accepts.
    fn swap(self, rank: usize) -> Option<&'static [usize]> {
        match (self, rank) {
            (Kind::Operand, 4) => Some(&[0, 2, 1, 3]),
            (Kind::Operand, 3) => Some(&[1, 0, 2]),
            (Kind::Rows, 3) => Some(&[0, 2, 1]),
            (Kind::Rows, 2) => Some(&[1, 0]),
            _ => None,
        }
    }
}

impl AxisOrder {
    /// A tensor of the caller's as the library has it.
    pub(crate) fn read(self, kind: Kind, view: View<'_>) -> Result<View<'_>, InvalidCall> {
        match (self, kind.swap(view.shape().rank())) {
            (AxisOrder::Bnth, Some(swap)) => view.permute(swap),
            // A wrong number of axes is refused by the library, with the shape.
            _ => Ok(view),
        }
    }

    /// Memory of the caller's as the library has it.
    pub(crate) fn written(self, kind: Kind, view: ViewMut<'_>) -> Result<ViewMut<'_>, InvalidCall> {
        match (self, kind.swap(view.shape().rank())) {
            (AxisOrder::Bnth, Some(swap)) => view.permute(swap),
            _ => Ok(view),
        }
    }

    /// A shape of the library's as the caller has it.
    pub(crate) fn returned(self, kind: Kind, shape: &[usize]) -> Vec<usize> {
        match (self, kind.swap(shape.len())) {
            (AxisOrder::Bnth, Some(swap)) => swap.iter().map(|&axis| shape[axis]).collect(),
            _ => shape.to_vec(),
        }
    }
}

impl std::fmt::Display for AxisOrder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(match self {
            AxisOrder::Bnth => "[B, N, T, H]",
            AxisOrder::Btnh => "[B, T, N, H]",
        })
    }
}
