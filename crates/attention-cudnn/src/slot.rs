//! The tensors and numbers of a graph, by what they mean.

use attention_core::Role;

/// What a tensor of a graph stands for: memory or a number that each call gives.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Slot {
    Query,
    Key,
    Value,
    Out,
    Stats,
    DOut,
    DQuery,
    DKey,
    DValue,
    /// `<d_out, out>` of each row, in f32; times [`KeepShare`](Self::KeepShare) where cuDNN's own generator
    /// drops.
    Delta,
    /// The gradient of the query while it is summed up, in f32.
    DQuerySum,
    /// The lengths of each batch row, as integers of 32 bits.
    QueryLengths,
    KeyLengths,
    /// Which rows see a key by structure, and which keys any row sees, of each batch row: the first and the
    /// end.
    RowIntervals,
    KeyIntervals,
    /// What is added to a row of each batch row to give its position.
    QueryOffsets,
    Scale,
    /// What is added to the logits: the caller's bias, or what a kernel made of mask and bias.
    Bias,
    /// Which rows see a key and which keys are seen, where a mask or a bias decides.
    SeenRows,
    SeenKeys,
    /// What [`FarRows`](crate::far::FarRows) leaves.
    States,
    /// What [`NumberStore`](attention_cuda::NumberStore) puts there.
    StoredNumbers,
    /// Slopes of ALiBi, in f32.
    Slopes,
    /// Sinks, in f32.
    Sinks,
    /// 1 where a probability is kept and 0 where it is dropped, in the operands' dtype.
    Kept,
    /// What kept probabilities are multiplied by.
    KeepScale,
    /// One over that.
    KeepShare,
    /// Seed and offset of cuDNN's own generator.
    Seed,
    Offset,
    /// Negative infinity.
    Nothing,
    One,
    /// How far the diagonal is moved: added to the index of a row.
    RowShift,
    /// Key and query lengths of a call without lengths.
    KeyLength,
    QueryLength,
    /// How far beyond its position a row sees.
    Right,
    /// How far behind its position a row sees, and one, less the shift of the diagonal: a float.
    Left,
    /// The same without the shift: an integer.
    LeftInteger,
}

impl Slot {
    /// The slot of an operand that may be copied.
    pub(crate) fn of(role: Role) -> Option<Self> {
        Some(match role {
            Role::Query => Self::Query,
            Role::Key => Self::Key,
            Role::Value => Self::Value,
            Role::Out => Self::Out,
            Role::DOut => Self::DOut,
            _ => return None,
        })
    }

    /// The tensor of the call that is behind it, where it is not in the scratch.
    pub(crate) fn role(self) -> Option<Role> {
        Some(match self {
            Self::Query => Role::Query,
            Self::Key => Role::Key,
            Self::Value => Role::Value,
            Self::Out => Role::Out,
            Self::Stats => Role::Lse,
            Self::DOut => Role::DOut,
            Self::DQuery => Role::DQuery,
            Self::DKey => Role::DKey,
            Self::DValue => Role::DValue,
            Self::Bias => Role::Bias,
            Self::Slopes => Role::AlibiSlopes,
            Self::Sinks => Role::Sinks,
            _ => return None,
        })
    }
}
