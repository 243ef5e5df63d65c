//! The order of the axes that callers have.

use attention_core::{DType, Dims, InvalidCall, Role, Strides, TensorDesc, View, ViewMut};

/// The order of the axes of query, key, value and output, of the logsumexp, and of all their gradients.
///
/// Either order is a view of the same memory: nothing is copied, whatever the strides. Masks and biases are
/// `[B, N, T, S]` in both.
///
/// # Examples
/// ```
/// # #[cfg(feature = "cpu")] {
/// use attention::Attention;
///
/// // 2 heads of 5 tokens, stored [B, N, T, H].
/// let x = vec![0.5f32; 2 * 5 * 4];
/// let x = (&x, [1, 2, 5, 4]);
/// let forward = Attention::bnth().causal(true).forward_with_lse(x, x, x)?;
/// assert_eq!(forward.out.shape(), [1, 2, 5, 4].into());
/// assert_eq!(forward.lse.shape(), [1, 2, 5].into());
/// # }
/// # Ok::<(), attention::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub enum AxisOrder {
    /// The sequence before heads, `[B, T, N, H]`, as it comes out of a projection and a reshape; `[T, N, H]`
    /// without a batch axis.
    #[default]
    Btnh,
    /// Heads before the sequence, `[B, N, T, H]`, as torch's `scaled_dot_product_attention` and models in
    /// candle have it; `[N, T, H]` without a batch axis.
    Bnth,
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
    /// `None` for tensors without such axes.
    pub(crate) fn of(role: Role) -> Option<Self> {
        match role {
            Role::Query | Role::Key | Role::Value | Role::Out => Some(Self::Operand),
            Role::DOut | Role::DQuery | Role::DKey | Role::DValue => Some(Self::Operand),
            Role::Lse | Role::DLse => Some(Self::Rows),
            _ => None,
        }
    }

    /// The axes in the order of the core from those of a [`AxisOrder::Bnth`] caller, and the other way round:
    /// a swap either way. `None` for a number of axes that no call accepts.
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
    /// The other order.
    pub(crate) fn other(self) -> Self {
        match self {
            Self::Btnh => Self::Bnth,
            Self::Bnth => Self::Btnh,
        }
    }

    /// The method of [`Attention`](crate::Attention) that starts a call of this order.
    pub(crate) fn method(self) -> &'static str {
        match self {
            Self::Btnh => "btnh",
            Self::Bnth => "bnth",
        }
    }

    /// The axes of operands without a batch axis.
    pub(crate) fn without_batch(self) -> &'static str {
        match self {
            Self::Btnh => "[T, N, H]",
            Self::Bnth => "[N, T, H]",
        }
    }

    fn swap(self, kind: Kind, rank: usize) -> Option<&'static [usize]> {
        kind.swap(rank).filter(|_| self == Self::Bnth)
    }

    /// A tensor of the caller's as the core has it, or the other way round.
    pub(crate) fn read(self, kind: Kind, view: View<'_>) -> Result<View<'_>, InvalidCall> {
        // A wrong number of axes is refused later, with the shape.
        self.swap(kind, view.shape().rank()).map_or(Ok(view), |swap| view.permute(swap))
    }

    /// As [`read`](Self::read), for a tensor that is written.
    pub(crate) fn written(self, kind: Kind, view: ViewMut<'_>) -> Result<ViewMut<'_>, InvalidCall> {
        match self.swap(kind, view.shape().rank()) {
            Some(swap) => view.permute(swap),
            None => Ok(view),
        }
    }

    /// A shape of the core's as the caller has it, or the other way round.
    pub(crate) fn shape(self, kind: Kind, mut shape: Dims) -> Dims {
        if let Some(swap) = self.swap(kind, shape.rank()) {
            let from = shape;
            swap.iter().enumerate().for_each(|(to, &axis)| shape[to] = from[axis]);
        }
        shape
    }

    /// A description of the core's as the caller has it, or the other way round.
    pub(crate) fn desc(self, kind: Kind, desc: TensorDesc) -> TensorDesc {
        let Some(swap) = self.swap(kind, desc.rank()) else { return desc };
        let mut strides: Strides = desc.strides();
        swap.iter().enumerate().for_each(|(to, &axis)| strides[to] = desc.strides()[axis]);
        TensorDesc::strided(desc.dtype(), self.shape(kind, desc.shape()), strides)
            .expect("as many strides as axes")
    }

    /// A tensor of a shape of the core's that is contiguous in the order of the caller's axes.
    pub(crate) fn contiguous(self, kind: Kind, dtype: DType, shape: impl Into<Dims>) -> TensorDesc {
        self.desc(kind, TensorDesc::contiguous(dtype, self.shape(kind, shape.into())))
    }

    /// An error of the core's with shapes as the caller has them.
    pub(crate) fn told(self, error: InvalidCall) -> InvalidCall {
        if self == Self::Btnh {
            return error;
        }
        let shape = |role, shape| Kind::of(role).map_or(shape, |kind| self.shape(kind, shape));
        let desc = |role, desc| Kind::of(role).map_or(desc, |kind| self.desc(kind, desc));
        match error {
            InvalidCall::Rank { role, rank, shape: given, expected } => {
                InvalidCall::Rank { role, rank, shape: shape(role, given), expected }
            }
            InvalidCall::Shape { role, shape: given, expected, why } => InvalidCall::Shape {
                role,
                shape: shape(role, given),
                expected: shape(role, expected),
                why: heads_first(why),
            },
            InvalidCall::ZeroHeadDim { role, shape: given } => {
                InvalidCall::ZeroHeadDim { role, shape: shape(role, given) }
            }
            InvalidCall::NotAsInProblem { role, given, expected } => {
                InvalidCall::NotAsInProblem { role, given: desc(role, given), expected: desc(role, expected) }
            }
            InvalidCall::Overflow { what, shape: given } => {
                let role = Role::ALL.into_iter().find(|role| role.name() == what);
                InvalidCall::Overflow { what, shape: role.map_or(given, |role| shape(role, given)) }
            }
            other => other,
        }
    }
}

/// What the core says of the axes of a shape, for heads before the sequence.
fn heads_first(why: &'static str) -> &'static str {
    match why {
        "[B, S, K, H]; B and H of the query" => "[B, K, S, H]; B and H of the query",
        "[B, S, K, Hv]; B, S and K of the key" => "[B, K, S, Hv]; B, S and K of the key",
        "[B, T, N, Hv]" => "[B, N, T, Hv]",
        "[B, T, N]" => "[B, N, T]",
        "[B, T, N, H]; B of the block table" => "[B, N, T, H]; B of the block table",
        "[B, S, K, H]; B of the starts, H of the query" => "[B, K, S, H]; B of the starts, H of the query",
        "[1, total, K, H]; H of the query" => "[1, K, total, H]; H of the query",
        "[1, total, K, Hv]; total and K of the key" => "[1, K, total, Hv]; total and K of the key",
        "[pages, page size, K, H]; H of the query" => "[pages, K, page size, H]; H of the query",
        "[pages, page size, K, Hv]; pages, page size and K of the key" => {
            "[pages, K, page size, Hv]; pages, page size and K of the key"
        }
        "[1, total, N, Hv]" => "[1, N, total, Hv]",
        "[1, total, N]" => "[1, N, total]",
        other => other,
    }
}

impl std::fmt::Display for AxisOrder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(match self {
            AxisOrder::Btnh => "[B, T, N, H]",
            AxisOrder::Bnth => "[B, N, T, H]",
        })
    }
}
