//! Packed and paged sequences: what the builder takes.

use attention_core::Role;

use crate::{Attention, IntoNumbers, IntoView};

impl<'a> Attention<'a> {
    /// Queries, keys and values are packed: the sequences lie behind one another without padding, and
    /// sequence `b` has the rows `offsets[b] .. offsets[b + 1]` of each tensor. `cu_seq_q` and `cu_seq_k` of
    /// torch's `varlen_attn`, `cu_seqlens_q` and `cu_seqlens_k` of `flash_attn_varlen_func`, where both are
    /// the same; [`packed_queries`](Self::packed_queries) and [`packed_keys`](Self::packed_keys) take
    /// different ones.
    ///
    /// Every sequence means what it means alone: no row sees another sequence, and causal masking, windows,
    /// ALiBi, masks and biases count from the start of the sequence.
    ///
    /// # Shapes
    /// | tensor | shape |
    /// |---|---|
    /// | query | `[total, N, H]` |
    /// | key, value | `[total, K, H]`, `[total, K, Hv]` |
    /// | output and its gradient | `[total, N, Hv]` |
    /// | logsumexp and its gradient | `[total, N]` |
    /// | offsets | `[B + 1]`: a list of integers, or a tensor of i32, u32 or i64 |
    /// | mask, bias | 1 to 4 axes, right-aligned to `[B, N, T, S]`, each 1 or full; `T`, `S` of the longest sequence |
    ///
    /// In a call of [`Attention::bnth`] heads come first: `[N, total, H]`, `[N, total]`.
    ///
    /// # Semantics
    /// Offsets start at 0 and never fall; a sequence may be empty. Rows behind the last offset belong to no
    /// sequence: their output is 0, their logsumexp -inf, their gradient 0.
    /// [`key_value_lengths`](Self::key_value_lengths) may leave out the last keys of each sequence
    /// (`seqused_k`). Offsets in host memory are checked; those in device memory are read by kernels, which
    /// bring them into the rows of the tensor.
    ///
    /// # Errors
    /// Of the call: [`InvalidCall::StartOutOfRange`](crate::InvalidCall::StartOutOfRange) for offsets that do
    /// not start at 0, that fall, or that end behind the last row,
    /// [`InvalidCall::Shape`](crate::InvalidCall::Shape) for offsets of queries and keys that count different
    /// sequences.
    ///
    /// # Examples
    /// ```
    /// # #[cfg(feature = "cpu")] {
    /// use attention::Attention;
    ///
    /// // Sequences of 2, 0 and 3 tokens, 2 heads of 4, causal.
    /// let x = vec![0.5f32; 5 * 2 * 4];
    /// let x = (&x, [5, 2, 4]);
    /// let forward = Attention::new().packed([0, 2, 2, 5]).causal(true).forward_with_lse(x, x, x)?;
    /// assert_eq!(forward.out.shape(), [5, 2, 4].into());
    /// assert_eq!(forward.lse.shape(), [5, 2].into());
    /// # }
    /// # Ok::<(), attention::Error>(())
    /// ```
    pub fn packed(mut self, offsets: impl IntoNumbers<'a>) -> Self {
        if let Some(offsets) = self.unbroken(Role::QueryStarts, offsets.into_numbers()) {
            (self.options.query_starts, self.optional.query_starts) = offsets.into_offsets();
            self.options.key_value_starts = self.options.query_starts.clone();
            self.optional.key_value_starts = self.optional.query_starts;
        }
        self
    }

    /// Queries are packed, as for [`packed`](Self::packed), and keys lie as another method says: packed with
    /// offsets of their own ([`packed_keys`](Self::packed_keys)), in pages ([`paged`](Self::paged)), or dense
    /// with [`key_value_lengths`](Self::key_value_lengths), as in a cache. `cu_seqlens_q` of other
    /// libraries.
    pub fn packed_queries(mut self, offsets: impl IntoNumbers<'a>) -> Self {
        if let Some(offsets) = self.unbroken(Role::QueryStarts, offsets.into_numbers()) {
            (self.options.query_starts, self.optional.query_starts) = offsets.into_offsets();
        }
        self
    }

    /// Keys and values are packed, `[total, K, H]` and `[total, K, Hv]`, with offsets of their own: as many
    /// as [`packed_queries`](Self::packed_queries) has, which the call needs too. `cu_seqlens_k` of other
    /// libraries.
    ///
    /// # Examples
    /// ```
    /// # #[cfg(feature = "cpu")] {
    /// use attention::{Attention, QueryOffset};
    ///
    /// // Two sequences: 1 new token behind 3 cached keys, and 2 behind 4.
    /// let (query, key) = (vec![0.5f32; 3 * 2 * 4], vec![0.25f32; 10 * 2 * 4]);
    /// let key = (&key, [10, 2, 4]);
    /// let out = Attention::new()
    ///     .packed_queries([0, 1, 3])
    ///     .packed_keys([0, 4, 10])
    ///     .causal(true)
    ///     .query_offset(QueryOffset::BottomRight)
    ///     .forward((&query, [3, 2, 4]), key, key)?;
    /// assert_eq!(out.shape(), [3, 2, 4].into());
    /// # }
    /// # Ok::<(), attention::Error>(())
    /// ```
    pub fn packed_keys(mut self, offsets: impl IntoNumbers<'a>) -> Self {
        if let Some(offsets) = self.unbroken(Role::KeyValueStarts, offsets.into_numbers()) {
            (self.options.key_value_starts, self.optional.key_value_starts) = offsets.into_offsets();
        }
        self
    }

    /// Keys and values are in pages: key `j` of sequence `b` is slot `j % page_size` of page `table[b, j /
    /// page_size]`. `block_table` and `seqused_k` of other libraries. Forward only.
    ///
    /// # Shapes
    /// | tensor | shape |
    /// |---|---|
    /// | query | `[B, T, N, H]`, or `[total, N, H]` with [`packed_queries`](Self::packed_queries) |
    /// | key, value | `[pages, page_size, K, H]`, `[pages, page_size, K, Hv]`; page sizes from 1 |
    /// | table | `[B, most]`, i32, u32 or i64 |
    /// | lengths | `[B]`, how many keys each sequence has: a list of integers or a tensor |
    ///
    /// In a call of [`Attention::bnth`] pages have heads first too: `[pages, K, page_size, H]`.
    ///
    /// # Semantics
    /// Slots past a sequence's length and entries of the table that no key needs are never read: they may
    /// hold anything. Sequences may share pages. A cache that is filled page by page has one
    /// [plan](Self::plan): the longest sequence that the table has room for counts, whatever the lengths are
    /// ([`longest`](Self::longest) takes a smaller bound). [`kv_cache`](crate::kv_cache) has such a cache.
    ///
    /// # Errors
    /// Of the call: [`InvalidCall::UsedKeysOutOfRange`](crate::InvalidCall::UsedKeysOutOfRange) for a length
    /// above what the sequence's row of the table has room for,
    /// [`InvalidCall::NoSuchPage`](crate::InvalidCall::NoSuchPage) for an entry that a key needs and that is
    /// no page, [`InvalidCall::Shape`](crate::InvalidCall::Shape). Numbers in device memory are brought into
    /// their bounds by the kernels.
    ///
    /// # Examples
    /// ```
    /// # #[cfg(feature = "cpu")] {
    /// use attention::Attention;
    ///
    /// // Two sequences of 3 and 6 keys in pages of 4; both begin with page 2. 1 query row each, 4 heads on 2.
    /// let (query, pages) = (vec![0.5f32; 2 * 4 * 8], vec![0.25f32; 3 * 4 * 2 * 8]);
    /// let pages = (&pages, [3, 4, 2, 8]);
    /// let out = Attention::new()
    ///     .paged((&[2, -1, 2, 0], [2, 2]), [3, 6])
    ///     .forward((&query, [2, 1, 4, 8]), pages, pages)?;
    /// assert_eq!(out.shape(), [2, 1, 4, 8].into());
    /// # }
    /// # Ok::<(), attention::Error>(())
    /// ```
    pub fn paged(mut self, table: impl IntoView<'a>, lengths: impl IntoNumbers<'a>) -> Self {
        self.optional.block_table = self.unbroken(Role::BlockTable, table.into_view());
        self.key_value_lengths(lengths)
    }

    /// How many query rows and how many keys the longest sequence of a packed or paged call may have (`max_q`
    /// and `max_k`, `max_seqlen_q` and `max_seqlen_k` of other libraries); `None` for what the call says
    /// itself. Plans are made for these bounds, and a call with a longer sequence is refused.
    ///
    /// Without a bound it is the axis of a mask or bias if there is one. If not, it is, of packed rows whose
    /// offsets are in host memory, their longest sequence, rounded up to a power of two so that calls of
    /// similar offsets share a plan; of offsets in device memory, all rows of the tensor; of pages, what a
    /// row of the table has room for. A bound saves work and scratch memory where it is well below that, and
    /// makes one plan serve calls whose longest sequences differ.
    ///
    /// # Errors
    /// Of the call: [`InvalidCall::SequenceTooLong`](crate::InvalidCall::SequenceTooLong); a bound of queries
    /// that are not packed, or of keys that are neither packed nor paged, is refused.
    pub fn longest(mut self, queries: impl Into<Option<usize>>, keys: impl Into<Option<usize>>) -> Self {
        (self.options.longest_query, self.options.longest_key) = (queries.into(), keys.into());
        self
    }
}
