//! Packed and paged sequences: what the builder takes.

use candle_core::Tensor;

use crate::{Attention, Numbers};

impl Attention {
    /// Queries, keys and values are packed: the sequences lie behind one another without padding, and
    /// sequence `b` has the rows `offsets[b] .. offsets[b + 1]` of each tensor. `cu_seqlens_q` and
    /// `cu_seqlens_k` of `flash_attn_varlen_func`, `seqlens_q` and `seqlens_k` of candle-flash-attn's
    /// `flash_attn_varlen`, `cu_seq_q` and `cu_seq_k` of torch's `varlen_attn`, where both are the same;
    /// [`packed_queries`](Self::packed_queries) and [`packed_keys`](Self::packed_keys) take different ones.
    ///
    /// Every sequence means what it means alone: no row sees another sequence, and causal masking, windows,
    /// ALiBi, masks, biases and dropout count from the start of the sequence. Gradients are those of each
    /// sequence alone, that of a bias or of sinks their sum.
    ///
    /// # Shapes
    /// | tensor | [`Attention::btnh`] | [`Attention::bnth`] |
    /// |---|---|---|
    /// | query | `[total, N, H]` | `[N, total, H]` |
    /// | key, value | `[total, K, H]`, `[total, K, Hv]` | `[K, total, H]`, `[K, total, Hv]` |
    /// | output | `[total, N, Hv]` | `[N, total, Hv]` |
    /// | logsumexp | `[total, N]` | `[N, total]` |
    /// | offsets | `[B + 1]` | the same |
    /// | mask, bias | 1 to 4 axes, right-aligned to `[B, N, T, S]`, each 1 or full; `T`, `S` of the longest sequence | the same |
    ///
    /// Offsets are a list of integers, or a tensor of u32, i32 or i64 ([`Numbers`]).
    ///
    /// # Semantics
    /// Offsets start at 0 and never fall; a sequence may be empty. Rows behind the last offset belong to no
    /// sequence: their output is 0, their logsumexp -inf, their gradient 0.
    /// [`key_value_lengths`](Self::key_value_lengths) may leave out the last keys of each sequence. Offsets
    /// in host memory are checked; those in device memory are read by kernels, which bring them into the rows
    /// of the tensor.
    ///
    /// # Examples
    /// ```
    /// use attention_candle::Attention;
    /// use candle_core::{Device, Tensor, Var};
    ///
    /// // Sequences of 2, 0 and 3 tokens; 4 heads on 2.
    /// let query = Var::randn(0f32, 1f32, (5, 4, 8), &Device::Cpu)?;
    /// let key = Var::randn(0f32, 1f32, (5, 2, 8), &Device::Cpu)?;
    /// let offsets = Tensor::new(&[0u32, 2, 2, 5], &Device::Cpu)?;
    /// let out = Attention::btnh().packed(&offsets).causal(true).forward(&query, &key, &key)?;
    /// assert_eq!(out.dims(), [5, 4, 8]);
    /// let gradients = out.sqr()?.sum_all()?.backward()?;
    /// assert_eq!(gradients.get(&key).unwrap().dims(), [5, 2, 8]);
    ///
    /// // The last sequence alone.
    /// let [query, key] = [query.narrow(0, 2, 3)?, key.narrow(0, 2, 3)?];
    /// let alone = Attention::btnh().causal(true).forward(&query, &key, &key)?;
    /// assert_eq!(out.narrow(0, 2, 3)?.to_vec3::<f32>()?, alone.to_vec3::<f32>()?);
    /// # Ok::<(), candle_core::Error>(())
    /// ```
    pub fn packed(mut self, offsets: impl Into<Numbers>) -> Self {
        let (list, tensor) = offsets.into().apart();
        self.numbers.query_starts.clone_from(&tensor);
        self.numbers.key_value_starts = tensor;
        self.with(|call| call.packed(list))
    }

    /// Queries are packed, as for [`packed`](Self::packed), and keys lie as another method says: packed with
    /// offsets of their own ([`packed_keys`](Self::packed_keys)), in pages ([`paged`](Self::paged)), or dense
    /// with [`key_value_lengths`](Self::key_value_lengths), as in a cache. `cu_seqlens_q` of other libraries.
    pub fn packed_queries(mut self, offsets: impl Into<Numbers>) -> Self {
        let (list, tensor) = offsets.into().apart();
        self.numbers.query_starts = tensor;
        self.with(|call| call.packed_queries(list))
    }

    /// Keys and values are packed, with offsets of their own: as many as
    /// [`packed_queries`](Self::packed_queries) has, which the call needs too. `cu_seqlens_k` of other
    /// libraries.
    ///
    /// # Examples
    /// ```
    /// use attention_candle::{Attention, QueryOffset};
    /// use candle_core::{DType, Device, Tensor};
    ///
    /// // Two sequences: 1 new token behind 3 cached keys, and 2 behind 4.
    /// let query = Tensor::randn(0f32, 1f32, (3, 4, 8), &Device::Cpu)?;
    /// let key = Tensor::randn(0f32, 1f32, (10, 2, 8), &Device::Cpu)?;
    /// let out = Attention::btnh()
    ///     .packed_queries([0, 1, 3])
    ///     .packed_keys([0, 4, 10])
    ///     .causal(true)
    ///     .query_offset(QueryOffset::BottomRight)
    ///     .forward(&query, &key, &key)?;
    /// assert_eq!(out.dims(), [3, 4, 8]);
    /// # Ok::<(), candle_core::Error>(())
    /// ```
    pub fn packed_keys(mut self, offsets: impl Into<Numbers>) -> Self {
        let (list, tensor) = offsets.into().apart();
        self.numbers.key_value_starts = tensor;
        self.with(|call| call.packed_keys(list))
    }

    /// Keys and values are in pages: key `j` of sequence `b` is slot `j % page_size` of page `table[b, j /
    /// page_size]`. `block_table` and `seqused_k` of other libraries. [`kv_cache`](crate::kv_cache) has a
    /// cache that makes them.
    ///
    /// Forward only, since sequences may share pages: a backward pass that reaches such a call is an error,
    /// as it is for whatever else cannot go backward.
    ///
    /// # Shapes
    /// | tensor | [`Attention::btnh`] | [`Attention::bnth`] |
    /// |---|---|---|
    /// | query | `[B, T, N, H]`, or `[total, N, H]` with [`packed_queries`](Self::packed_queries) | `[B, N, T, H]`, `[N, total, H]` |
    /// | key | `[pages, page_size, K, H]`, page sizes from 1 | `[pages, K, page_size, H]` |
    /// | value | `[pages, page_size, K, Hv]` | `[pages, K, page_size, Hv]` |
    /// | table | `[B, most]`, u32, i32 or i64 | the same |
    /// | lengths | `[B]`, how many keys each sequence has: a list of integers or a tensor ([`Numbers`]) | the same |
    ///
    /// # Semantics
    /// Slots past a sequence's length and entries of the table that no key needs are never read: they may
    /// hold anything. Numbers in host memory are checked; those in device memory are brought into their
    /// bounds by the kernels. A cache that is filled page by page has one plan: the longest sequence that the
    /// table has room for counts, whatever the lengths are ([`longest`](Self::longest) takes a smaller
    /// bound).
    ///
    /// # Examples
    /// ```
    /// use attention_candle::Attention;
    /// use candle_core::{Device, Tensor};
    ///
    /// // Two sequences of 3 and 6 keys in pages of 4; both begin with page 2. 1 query row each, 4 heads
    /// // on 2.
    /// let query = Tensor::randn(0f32, 1f32, (2, 1, 4, 8), &Device::Cpu)?;
    /// let pages = Tensor::randn(0f32, 1f32, (3, 4, 2, 8), &Device::Cpu)?;
    /// let table = Tensor::new(&[[2i64, -1], [2, 0]], &Device::Cpu)?;
    /// let out = Attention::btnh().paged(&table, [3, 6]).forward(&query, &pages, &pages)?;
    /// assert_eq!(out.dims(), [2, 1, 4, 8]);
    /// # Ok::<(), candle_core::Error>(())
    /// ```
    pub fn paged(mut self, table: &Tensor, lengths: impl Into<Numbers>) -> Self {
        self.numbers.block_table = Some(table.clone());
        self.key_value_lengths(lengths)
    }

    /// How many query rows and how many keys the longest sequence of a packed or paged call may have
    /// (`max_seqlen_q` and `max_seqlen_k` of other libraries); `None` for what the call says itself. Plans
    /// are made for these bounds, and a call with a longer sequence is refused. What a call says without
    /// them: [`attention::Attention::longest`].
    pub fn longest(self, queries: impl Into<Option<usize>>, keys: impl Into<Option<usize>>) -> Self {
        self.with(|call| call.longest(queries, keys))
    }
}
