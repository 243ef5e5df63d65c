// The rows of a sequence: how many there are, which keys each of them sees, and where they are in their
// tensors, whatever the layout is. And which tile of which sequence a block works on.
// Needs: fused/parameters.cuh.

__device__ inline int between(long long x, long long low, long long high) {
    return (int)(x < low ? low : x > high ? high : x);
}

// Sums and differences of an offset and a number of keys, exact up to this. Positions are this far from
// anything at most, so that no later sum with a row overflows.
constexpr long long MOST_REACH = 1ll << 40;

// The distance, at most MOST_REACH.
__device__ inline long long reach_of(unsigned long long distance) {
    return (long long)min(distance, (unsigned long long)MOST_REACH);
}

// offset + keys, and offset - keys, of any numbers of 64 bits.
__device__ inline long long offset_plus(long long offset, unsigned long long keys) {
    const unsigned long long sum = (unsigned long long)offset + keys;
    if (offset >= 0) return reach_of(sum < keys ? ~0ull : sum);
    const unsigned long long below = 0ull - (unsigned long long)offset;
    return keys >= below ? reach_of(sum) : -reach_of(below - keys);
}
__device__ inline long long offset_minus(long long offset, unsigned long long keys) {
    const unsigned long long difference = (unsigned long long)offset - keys;
    if (offset >= 0) return (unsigned long long)offset >= keys ? reach_of(difference) : -reach_of(0ull - difference);
    const unsigned long long below = 0ull - (unsigned long long)offset, sum = below + keys;
    return -reach_of(sum < keys ? ~0ull : sum);
}

#if LAYOUT == LAYOUT_DENSE

typedef SequenceRows Sequence;

__device__ inline void place_rows(const Parameters &, long long, RowLengths &, Sequence &) {}

#else

// With where its rows are.
struct Sequence : SequenceRows {
    // Its first query row and key among the rows of their tensors; 0 where these are dense or in pages.
    int first_query, first_key;
    // The rows that tensors of queries and keys have for it. Those that do not exist (`queries`, `keys`) are
    // padding, for which results are written too.
    int query_rows, key_rows;
};

// Where sequence b of packed rows starts, and where the last one ends for b of the number of sequences.
__device__ inline int start_of(const Integers &starts, long long rows, long long b) {
    return between(integer_at(starts, b), 0, rows);
}

// The first row of sequence b, and the number of its rows: none where starts in device memory fall.
__device__ inline void place_packed(const Integers &starts, long long rows, long long b, int &first, int &count) {
    const TwoIntegers at = integers_at(starts, b);
    first = between(at.first, 0, rows);
    count = max(between(at.second, 0, rows) - first, 0);
}

__device__ inline bool packs_queries(const Parameters &p) {
    return LAYOUT == LAYOUT_PACKED || p.query_starts.data != nullptr;
}
__device__ inline bool packs_keys(const Parameters &p) {
    return LAYOUT == LAYOUT_PACKED && p.key_value_starts.data != nullptr;
}

// Sets where the rows of sequence b are, and takes from its lengths what it has no rows for.
__device__ inline void place_rows(const Parameters &p, long long b, RowLengths &lengths, Sequence &sequence) {
    sequence.first_query = sequence.first_key = 0;
    sequence.query_rows = (int)p.query_length;
    sequence.key_rows = (int)p.key_length;
    if (packs_queries(p)) {
        place_packed(p.query_starts, p.query_rows, b, sequence.first_query, sequence.query_rows);
        lengths.queries = min(lengths.queries, sequence.query_rows);
    }
    if (packs_keys(p)) {
        // Of queries on their own keys, the starts are most often the same tensor.
        if (p.key_value_starts.data == p.query_starts.data && p.key_rows == p.query_rows &&
            p.key_value_starts.stride == p.query_starts.stride && p.key_value_starts.dtype == p.query_starts.dtype) {
            sequence.first_key = sequence.first_query;
            sequence.key_rows = sequence.query_rows;
        } else {
            place_packed(p.key_value_starts, p.key_rows, b, sequence.first_key, sequence.key_rows);
        }
        lengths.keys = min(lengths.keys, sequence.key_rows);
    }
    if (LAYOUT == LAYOUT_PAGED) lengths.keys = (int)min((long long)lengths.keys, p.most_keys);
}

// The packed rows behind the last sequence, as a sequence whose number is that of sequences: all padding.
__device__ inline void place_rows_of_no_sequence(const Parameters &p, Sequence &sequence) {
    sequence.offset = sequence.low = sequence.high = 0;
    sequence.queries = sequence.keys = 0;
    sequence.first_query = sequence.first_key = sequence.query_rows = sequence.key_rows = 0;
    if (packs_queries(p)) {
        sequence.first_query = start_of(p.query_starts, p.query_rows, p.batch);
        sequence.query_rows = (int)p.query_rows - sequence.first_query;
    }
    if (packs_keys(p)) {
        sequence.first_key = start_of(p.key_value_starts, p.key_rows, p.batch);
        sequence.key_rows = (int)p.key_rows - sequence.first_key;
    }
}

#endif

// The numbers of query rows and of keys of batch row b, from the lengths of a call whose rows vary.
__device__ inline int query_rows_of_numbers(const Parameters &p, long long b) {
    if (p.query_lengths.data) return between(integer_at(p.query_lengths, b), 0, p.query_length);
    return p.has_lengths ? p.lengths[b].queries : (int)p.query_length;
}
__device__ inline int keys_of_numbers(const Parameters &p, long long b) {
    if (p.key_value_lengths.data) return between(integer_at(p.key_value_lengths, b), 0, p.key_length);
    return p.has_lengths ? p.lengths[b].keys : (int)p.key_length;
}

// The rows of batch row b, from the numbers of a call whose rows vary. Those in device memory are brought
// into their bounds, so whatever they are, no memory is touched that is not the call's.
__device__ inline void sequence_of_numbers(const Parameters &p, long long b, Sequence &sequence) {
    RowLengths lengths{query_rows_of_numbers(p, b), keys_of_numbers(p, b)};
    place_rows(p, b, lengths, sequence);
#if LAYOUT != LAYOUT_DENSE
    if (!p.query_offsets.data && !p.is_bottom_right) {
        sequence.queries = lengths.queries;
        sequence.keys = lengths.keys;
        sequence.offset = p.uniform_sequence.offset;
        sequence.low = p.uniform_sequence.low;
        sequence.high = p.uniform_sequence.high;
        return;
    }
#endif
    long long offset = p.query_offset;
    if (p.query_offsets.data) offset = max(min(integer_at(p.query_offsets, b), p.most_offset), p.least_offset);
    if (p.is_bottom_right) offset = (long long)lengths.keys - lengths.queries;
    sequence.low = offset_minus(offset, p.keys_before);
    sequence.high = offset_plus(offset, p.keys_after);
    // A sum with a row or a key does not overflow.
    sequence.offset = max(min(offset, 1ll << 60), -(1ll << 60));
    sequence.queries = lengths.queries;
    sequence.keys = lengths.keys;
}

// The same behind the kernel's code, with the result in memory.
__device__ __noinline__ void sequence_of_numbers_called(const Parameters &p, long long b, Sequence &sequence) {
    sequence_of_numbers(p, b, sequence);
}

// The only reader of lengths and offsets. Kernels of dense rows whose loops have all registers differ in
// which way leaves the loop those of a call without such numbers: most of them call it
// (`attention_gradient_of_keys` would spill), and INLINE is for those that would spill around a call. So that
// the parameters are not copied for the call, kernels take them as a grid constant. Other kernels always need
// the numbers, and have them where they stand: a function that is called reads parameters as memory, one load
// behind the other.
template <bool INLINE = false>
__device__ inline Sequence sequence_of(const Parameters &p, long long b) {
#if LAYOUT == LAYOUT_DENSE
    if (__builtin_expect(p.rows_vary, 0)) {
        Sequence sequence;
        if constexpr (INLINE)
            sequence_of_numbers(p, b, sequence);
        else
            sequence_of_numbers_called(p, b, sequence);
        return sequence;
    }
    return p.uniform_sequence;
#else
    Sequence sequence;
    if (b >= p.batch)
        place_rows_of_no_sequence(p, sequence);
    else
        sequence_of_numbers(p, b, sequence);
    return sequence;
#endif
}

#if LAYOUT == LAYOUT_DENSE

// The number of query rows of batch row b alone, in less code.
__device__ inline int query_rows_of(const Parameters &p, long long b) {
    return __builtin_expect(p.rows_vary, 0) ? query_rows_of_numbers(p, b) : p.uniform_sequence.queries;
}

#endif

// The first key that row t sees, and the end of those that it sees. Neither falls from row to row.
__device__ inline int first_key(const SequenceRows &sequence, long long t) {
    return between(t + sequence.low, 0, sequence.keys);
}
__device__ inline int end_key(const SequenceRows &sequence, long long t) {
    return between(t + sequence.high, 0, sequence.keys);
}

// Rows of all heads of which scratch has numbers, [B, N, T] where rows are dense, and the place of one.
__device__ inline long long count_of_dense_rows(const Parameters &p) {
    return p.batch * p.query_heads * p.query_length;
}
__device__ inline long long dense_row(const Parameters &p, long long b, long long n, long long t) {
    return (b * p.query_heads + n) * p.query_length + t;
}

#if LAYOUT == LAYOUT_DENSE

// Macros, so that a kernel of dense rows is compiled to what it would be without other layouts: functions
// that return an argument change the order of its instructions.
#define query_row(sequence, t) (t)
#define key_row(sequence, key) (key)
#define rows_of_queries(p, sequence) (p).query_length
#define rows_of_keys(p, sequence) (p).key_length
#define count_of_rows(p) count_of_dense_rows(p)
#define scratch_row(p, sequence, b, n, t) dense_row(p, b, n, t)

#else

// The row of a tensor of packed or dense rows that holds row t, or a key, of a sequence.
__device__ inline long long query_row(const Sequence &sequence, long long t) { return sequence.first_query + t; }
__device__ inline long long key_row(const Sequence &sequence, long long key) { return sequence.first_key + key; }

// The rows that results are written for.
__device__ inline long long rows_of_queries(const Parameters &, const Sequence &sequence) {
    return sequence.query_rows;
}
__device__ inline long long rows_of_keys(const Parameters &, const Sequence &sequence) { return sequence.key_rows; }

// The same of scratch, [N, rows] where queries are packed.
__device__ inline long long count_of_rows(const Parameters &p) {
    return packs_queries(p) ? p.query_heads * p.query_rows : count_of_dense_rows(p);
}
__device__ inline long long scratch_row(const Parameters &p, const Sequence &sequence, long long b, long long n,
                                        long long t) {
    return packs_queries(p) ? n * p.query_rows + query_row(sequence, t) : dense_row(p, b, n, t);
}

#endif

__device__ inline element *at(const Tensor &tensor, long long b, long long position, long long head) {
    return reinterpret_cast<element *>(tensor.data) + b * tensor.stride[0] + position * tensor.stride[1] +
           head * tensor.stride[2];
}

// The same of keys and values.
#if EIGHT_BIT
__device__ inline const cached *cached_at(const Tensor &tensor, long long b, long long position, long long head) {
    return reinterpret_cast<const cached *>(tensor.data) + b * tensor.stride[0] + position * tensor.stride[1] +
           head * tensor.stride[2];
}
#else
#define cached_at(tensor, b, position, head) at(tensor, b, position, head)
#endif

#if LAYOUT == LAYOUT_PAGED

#if READS_BYTES

// An entry of the table as it is stored, in 32 bits or in 64.
struct TableEntry {
    unsigned low, high;
};

// That of a page of sequence b. Nothing is computed from what is loaded.
__device__ inline TableEntry entry_of(const Parameters &p, long long b, unsigned index) {
    const bool is_wide = p.block_table.dtype == DTYPE_I64;
    const long long place = b * p.block_table_row + (long long)index * p.block_table.stride;
    const unsigned *const from = static_cast<const unsigned *>(p.block_table.data) + (is_wide ? 2 * place : place);
    return TableEntry{__ldg(from), is_wide ? __ldg(from + 1) : 0};
}

// The page, as `page_of` has it.
__device__ inline int page_of_entry(const Parameters &p, const TableEntry &entry) {
    const bool is_signed = p.block_table.dtype == DTYPE_I32, is_wide = p.block_table.dtype == DTYPE_I64;
    const int high = is_wide ? (int)entry.high : is_signed ? (int)entry.low >> 31 : 0;
    const long long page = (long long)((unsigned long long)(unsigned)high << 32 | entry.low);
    return (int)max(min(page, p.pages - 1), 0ll);
}

#endif

// The page of a key of sequence b that exists, and of the keys beside it. There is a page where a key exists.
__device__ inline long long page_of(const Parameters &p, long long b, unsigned key) {
    const long long index = key / (unsigned)p.page_size;
    const long long page = integer_behind(p.block_table, b * p.block_table_row + index * p.block_table.stride);
    return max(min(page, p.pages - 1), 0ll);
}

#endif

// The tile that a block works on, in the order of the grid.
struct TileIndex {
    int tile, head, batch;
};

// Tiles of a head follow each other, those of heads (batch rows) that share a mask or bias in turn.
__device__ inline TileIndex tile_of_block(const Parameters &p, unsigned index, unsigned tiles, unsigned heads) {
    const unsigned swizzle = (unsigned)p.swizzle, turn = index % swizzle;
    index /= swizzle;
    const int tile = (int)(index % tiles);
    index /= tiles;
    const unsigned groups = (p.swizzles_batch ? (unsigned)p.batch : heads) / swizzle;
    const int inner = (int)(index % groups * swizzle + turn), outer = (int)(index / groups);
    return p.swizzles_batch ? TileIndex{tile, outer, inner} : TileIndex{tile, inner, outer};
}

#if LAYOUT != LAYOUT_DENSE

// Tiles of packed rows, of kernels that have no schedule of them (schedule.cuh): of queries on keys in pages,
// and before and behind cuDNN's. A grid has slots for them: those of sequence b begin with slot `start *
// heads / HEIGHT + b`, where `heads` rows of a tile share a position. The next sequence begins behind its
// tiles, since the quotient of a sum is at least the sum of quotients; so a start says where the slots are,
// and blocks find their sequence by asking for 32 at a time, without a list. Slots that no tile has are
// behind those of their sequence. The host sees to it that rows of all heads of a tile, and slots, are fewer
// than 2^31.
__device__ inline int first_slot(const Integers &starts, long long rows, int height, int heads, int b) {
    return (int)((unsigned)start_of(starts, rows, b) * (unsigned)heads / (unsigned)height) + b;
}

// Slots of all sequences, and of the rows behind the last one.
__device__ inline unsigned count_of_slots(const Parameters &p, long long rows, int height, int heads) {
    return (unsigned)(rows * heads / height + p.batch + 1);
}

// The last sequence that begins at or before this slot, at most the number of sequences, which stands for the
// rows behind the last one. With a height of 1 and without the slot of each sequence before it: of this row.
// By whole warps, all threads with the same place: each asks for another sequence, so that 32 times as many
// sequences take one load more.
template <class FirstOf>
__device__ inline int last_that_begins(const Parameters &p, long long place, FirstOf first_of) {
    int low = 0, high = (int)p.batch;
    while (low < high) {
        const int span = high - low, step = (span + 31) / 32;
        const auto asked = [&](int lane) { return min((lane + 1) * step, span); };
        const unsigned begins = __ballot_sync(~0u, first_of(low + asked(threadIdx.x % 32)) <= place);
        // Of how many in turn, from the first on: 32 without an end.
        const int count = begins == ~0u ? 32 : __ffs(~begins) - 1;
        if (count < 32) high = low + asked(count) - 1;
        if (count > 0) low += asked(count - 1);
    }
    return low;
}

// The sequence of a row of packed queries. By whole warps, whose rows are mostly of one sequence.
__device__ inline int sequence_of_query_row(const Parameters &p, long long row) {
    const auto first_of = [&](int b) { return start_of(p.query_starts, p.query_rows, b); };
    const long long row_of_warp = __shfl_sync(~0u, row, 0);
    int low = last_that_begins(p, row_of_warp, first_of);
    if (row == row_of_warp) return low;
    // As a rule no sequence begins in between.
    int high = row < row_of_warp ? low : (int)p.batch;
    if (row < row_of_warp)
        low = 0;
    else if (low < high && first_of(low + 1) > row)
        return low;
    while (low < high) {
        const int middle = low + (high - low + 1) / 2;
        if (first_of(middle) <= row)
            low = middle;
        else
            high = middle - 1;
    }
    return low;
}

// A sequence, and which of its tiles; -1 for none.
struct SequenceTile {
    int batch, tile, head;
};

__device__ inline SequenceTile tile_of_packed(const Parameters &p, const Integers &starts, long long rows, int height,
                                              int heads_of_tile, unsigned index, unsigned heads) {
    const TileIndex place = tile_of_block(p, index, count_of_slots(p, rows, height, heads_of_tile), heads);
    const auto first = [&](int b) { return first_slot(starts, rows, height, heads_of_tile, b); };
    const int b = last_that_begins(p, place.tile, first);
    return SequenceTile{b, max(place.tile - first(b), -1), place.head};
}

// The first row of a tile, where a sequence has `rows` rows: behind them for a tile that it does not have.
__device__ inline int first_of_tile(int tile, int rows, int height, bool last_tile_first) {
    const int tiles = (rows + height - 1) / height;
    if (tile < 0 || tile >= tiles) return tiles * height;
    return (last_tile_first ? tiles - 1 - tile : tile) * height;
}

// A tile of query rows, `heads_of_tile` of a position, and its sequence.
__device__ inline SequenceTile query_tile_of(const Parameters &p, int height, int heads_of_tile, unsigned index,
                                             unsigned heads) {
    if (packs_queries(p)) return tile_of_packed(p, p.query_starts, p.query_rows, height, heads_of_tile, index, heads);
    const unsigned tiles = (unsigned)((p.query_length * heads_of_tile + height - 1) / height);
    const TileIndex place = tile_of_block(p, index, tiles, heads);
    return SequenceTile{place.batch, place.tile, place.head};
}

// A tile of keys, and its sequence.
__device__ inline SequenceTile key_tile_of(const Parameters &p, int height, unsigned index, unsigned heads) {
    if (packs_keys(p)) return tile_of_packed(p, p.key_value_starts, p.key_rows, height, 1, index, heads);
    const TileIndex place = tile_of_block(p, index, (unsigned)((p.key_length + height - 1) / height), heads);
    return SequenceTile{place.batch, place.tile, place.head};
}

#endif
