//! Slots: the tensors and numbers of a graph and of the scratch, named by what they mean.

use attention_core::Role;

/// The meaning of a tensor of a graph or of an array in the scratch: memory, or a number that each call
/// gives.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Slot {
    Query,
    Key,
    Value,
    Out,
    /// The logsumexp of each row, in f32.
    Stats,
    DOut,
    DQuery,
    DKey,
    DValue,
    /// The row sums `<d_out, out>`, in f32; multiplied with [`KeepShare`](Self::KeepShare) if cuDNN's own
    /// generator drops.
    Delta,
    /// The sum of the gradient of the query, in f32.
    DQuerySum,
    /// The query length of each batch row, as an integer of 32 bits.
    QueryLengths,
    /// The key length of each batch row, as an integer of 32 bits.
    KeyLengths,
    /// The interval of rows that see a key by structure, of each batch row: the first and the end.
    RowIntervals,
    /// The interval of keys that any row sees by structure, of each batch row: the first and the end.
    KeyIntervals,
    /// The offset of each batch row, which is added to a row to give its position.
    QueryOffsets,
    /// The first row of each sequence among packed query rows, and the end of the last one.
    QueryStarts,
    /// The same of packed keys.
    KeyStarts,
    /// Where each sequence begins, in elements, in tensors of packed rows that are this far apart.
    RaggedOffsets {
        side: Side,
        row: i64,
    },
    /// The block table, as integers of 32 bits.
    BlockTable,
    Scale,
    /// The bias: the caller's, or the one that a kernel has made of mask, bias and slopes.
    Bias,
    /// The flags of rows that see a key by mask and bias.
    SeenRows,
    /// The flags of keys that any row sees by mask and bias.
    SeenKeys,
    /// The row maxima and sums that [`FarRows`](crate::far::FarRows) writes.
    States,
    /// The numbers of the call that [`NumberStore`](attention_cuda::NumberStore) writes.
    StoredNumbers,
    /// The slopes of ALiBi, in f32.
    Slopes,
    /// The sinks, in f32.
    Sinks,
    /// The keep mask of dropout: 1 for probabilities that are kept, else 0, in the operands' dtype.
    Kept,
    /// The number that kept probabilities are multiplied by.
    KeepScale,
    /// The inverse of that.
    KeepShare,
    /// The seed of cuDNN's own generator.
    Seed,
    /// The offset of cuDNN's own generator.
    Offset,
    /// Negative infinity.
    MinusInfinity,
    One,
    /// The shift of the diagonal, which is added to the index of a row.
    RowShift,
    /// The key length of a call without lengths.
    KeyLength,
    /// The query length of a call without lengths.
    QueryLength,
    /// The number of keys beyond its position that a row sees.
    Right,
    /// The number of keys before its position that a row sees, plus one, minus the shift of the diagonal; a
    /// float.
    Left,
    /// The same without the shift, as an integer.
    LeftInteger,
}

/// The side of a call that a packed tensor is on: its rows are query rows or keys.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Side {
    Queries,
    Keys,
}

impl Side {
    /// The side of the tensor of this role.
    pub(crate) fn of(role: Role) -> Self {
        match role {
            Role::Key | Role::Value | Role::DKey | Role::DValue => Self::Keys,
            _ => Self::Queries,
        }
    }
}

impl Slot {
    /// The slot of an operand that may be copied to scratch; `None` for other roles.
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

    /// The role of the call's tensor that the slot stands for if it is not in the scratch.
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
