//! The tensors of a call, by what they are for.

/// What a tensor is in a call: every message, layout table and call check names tensors by role.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(rename_all = "snake_case"))]
#[non_exhaustive]
pub enum Role {
    /// `[B, T, N, H]`.
    Query,
    /// `[B, S, K, H]`.
    Key,
    /// `[B, S, K, Hv]`.
    Value,
    /// Boolean, broadcastable to `[B, N, T, S]`; `true` takes part.
    Mask,
    /// Any float dtype, broadcastable to `[B, N, T, S]`; added to the scaled and soft-capped logits.
    Bias,
    /// `[N]` or `[B, N]`, any float dtype.
    AlibiSlopes,
    /// `[N]`, any float dtype.
    Sinks,
    /// `[B, T, N, Hv]`: written by forward, read by backward.
    Out,
    /// `[B, T, N]`, f32 (f64 for f64 operands): written by forward, read by backward.
    Lse,
    /// `[B, T, N, Hv]`: the incoming gradient of the output.
    DOut,
    /// `[B, T, N]`: the incoming gradient of the logsumexp.
    DLse,
    /// The gradient of the query.
    DQuery,
    /// The gradient of the key.
    DKey,
    /// The gradient of the value.
    DValue,
    /// The gradient of the bias.
    DBias,
    /// The gradient of the sinks.
    DSinks,
    /// `[B]`, an integer dtype, as the four that follow: numbers of a call, see
    /// [`CallData`](crate::CallData). How many query rows are real.
    QueryLengths,
    /// `[B]`: how many keys are real.
    KeyValueLengths,
    /// `[B]`: what is added to `t` to give a row's position.
    QueryOffsets,
    /// `[1]`: the seed of the dropout.
    DropoutSeed,
    /// `[1]`: the offset of the dropout.
    DropoutOffset,
    /// `[B + 1]`, rising from 0: the row of a packed query `[total, N, H]` at which each sequence starts, and
    /// the one behind the last sequence (`cu_seqlens_q` of other libraries).
    QueryStarts,
    /// `[B + 1]`: the same for packed keys and values (`cu_seqlens_k`).
    KeyValueStarts,
    /// `[B, most pages of a sequence]`: where the keys and values of each sequence are among the pages.
    BlockTable,
    /// f32, `[1]`, `[K]` or `[B, K]`: what numbers of an 8-bit key are multiplied by to give what they stand
    /// for.
    KeyScales,
    /// The same of the value.
    ValueScales,
}

impl Role {
    /// How many roles there are.
    pub(crate) const COUNT: usize = Self::ALL.len() + Self::SCALES.len();

    /// Every role but [`Role::SCALES`], in declaration order. Those come behind, and backends that do not
    /// serve 8-bit keys keep arrays of this length.
    pub const ALL: [Role; 24] = [
        Role::Query,
        Role::Key,
        Role::Value,
        Role::Mask,
        Role::Bias,
        Role::AlibiSlopes,
        Role::Sinks,
        Role::Out,
        Role::Lse,
        Role::DOut,
        Role::DLse,
        Role::DQuery,
        Role::DKey,
        Role::DValue,
        Role::DBias,
        Role::DSinks,
        Role::QueryLengths,
        Role::KeyValueLengths,
        Role::QueryOffsets,
        Role::DropoutSeed,
        Role::DropoutOffset,
        Role::QueryStarts,
        Role::KeyValueStarts,
        Role::BlockTable,
    ];

    /// The numbers of a call. They, [`Role::SEQUENCES`] and [`Role::SCALES`] are the only tensors that may be
    /// in host memory where the others are on a device.
    pub const DATA: [Role; 5] = [
        Role::QueryLengths,
        Role::KeyValueLengths,
        Role::QueryOffsets,
        Role::DropoutSeed,
        Role::DropoutOffset,
    ];

    /// Where the rows of packed and paged sequences are: integers as well.
    pub const SEQUENCES: [Role; 3] = [Role::QueryStarts, Role::KeyValueStarts, Role::BlockTable];

    /// The scales of 8-bit keys and values: floats, which may be in host memory as the others.
    pub const SCALES: [Role; 2] = [Role::KeyScales, Role::ValueScales];

    /// Every role, in declaration order.
    pub(crate) fn every() -> impl Iterator<Item = Role> + Clone {
        Self::ALL.into_iter().chain(Self::SCALES)
    }

    /// Whether this is one of [`Role::DATA`], of [`Role::SEQUENCES`] or of [`Role::SCALES`].
    pub const fn is_data(self) -> bool {
        self as usize >= Role::QueryLengths as usize
    }

    /// The name used in messages.
    pub const fn name(self) -> &'static str {
        match self {
            Role::Query => "query",
            Role::Key => "key",
            Role::Value => "value",
            Role::Mask => "mask",
            Role::Bias => "bias",
            Role::AlibiSlopes => "ALiBi slopes",
            Role::Sinks => "sinks",
            Role::Out => "out",
            Role::Lse => "lse",
            Role::DOut => "d_out",
            Role::DLse => "d_lse",
            Role::DQuery => "dq",
            Role::DKey => "dk",
            Role::DValue => "dv",
            Role::DBias => "dbias",
            Role::DSinks => "dsinks",
            Role::QueryLengths => "query lengths",
            Role::KeyValueLengths => "key/value lengths",
            Role::QueryOffsets => "query offsets",
            Role::DropoutSeed => "dropout seed",
            Role::DropoutOffset => "dropout offset",
            Role::QueryStarts => "query starts",
            Role::KeyValueStarts => "key/value starts",
            Role::BlockTable => "block table",
            Role::KeyScales => "key scales",
            Role::ValueScales => "value scales",
        }
    }
}

impl std::fmt::Display for Role {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(self.name())
    }
}
