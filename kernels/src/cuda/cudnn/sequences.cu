// The lengths of a call, and the intervals and offsets that follow from them, as arrays of integers for
// cuDNN's graphs and the helper kernels. The call's lengths, starts and block tables may have other dtypes
// and strides; the kernels convert them and clamp them to the bounds of the tensors.
// Needs: fused/sequence.cuh.
//
// One thread per batch row, or per entry of a block table. One compiled variant for each layout serves all
// operands. Tested by the conformance suite of attention-cudnn.

// An array of what cuDNN calls ragged offsets, [B + 1]: where each sequence begins in a packed tensor, in
// elements, for rows that are `row` elements apart. Null if nothing reads it. The structs that kernels take
// have the layout of the structs of the same name on the host (arguments.rs of attention-cudnn).
struct RaggedOffsets {
    long long *to;
    long long row;
};

// The second argument of `attention_sequences`: the arrays that it writes.
struct SequenceArrays {
    // [B].
    int *query_lengths, *key_lengths;
    // The interval of rows that see a key by structure, and that of keys that any row sees, both [B, 2]
    // (first and end); and the offset that is added to a row to give its position, [B]. Null if nothing reads
    // them.
    int *rows, *keys, *offsets;
    // The first row of each sequence among packed rows, and the end of the last one, [B + 1]. Null if rows
    // are not packed.
    int *query_starts, *key_starts;
    // Those of tensors of query rows and of key rows.
    RaggedOffsets of_queries[6];
    RaggedOffsets of_keys[4];
};

static_assert(sizeof(SequenceArrays) == 216, "the host's layout");

#if LAYOUT != LAYOUT_DENSE

// Writes where sequence b begins, or, for b of the number of sequences, where the last one ends.
template <int COUNT>
__device__ inline void write_start(long long b, long long start, int *starts, const RaggedOffsets (&offsets)[COUNT]) {
    if (starts != nullptr) starts[b] = (int)start;
#pragma unroll
    for (int i = 0; i < COUNT; ++i)
        if (offsets[i].to != nullptr) offsets[i].to[b] = start * offsets[i].row;
}

#endif

extern "C" __global__ void __launch_bounds__(BLOCK)
    attention_sequences(const __grid_constant__ Parameters p, const __grid_constant__ SequenceArrays to) {
    const long long b = blockIdx.x * (long long)blockDim.x + threadIdx.x;
#if LAYOUT != LAYOUT_DENSE
    if (b <= p.batch) {
        if (packs_queries(p)) write_start(b, start_of(p.query_starts, p.query_rows, b), to.query_starts, to.of_queries);
        if (packs_keys(p)) write_start(b, start_of(p.key_value_starts, p.key_rows, b), to.key_starts, to.of_keys);
    }
#endif
    if (b >= p.batch) return;
    const Sequence sequence = sequence_of(p, b);
    const long long queries = sequence.queries, keys = sequence.keys;
    to.query_lengths[b] = sequence.queries;
    to.key_lengths[b] = sequence.keys;
    if (to.offsets != nullptr) to.offsets[b] = (int)sequence.offset;
    if (to.rows != nullptr) {
        // Row t sees a key where t + high > 0 and t + low < keys, since low < high.
        const long long first = max(0ll, 1 - sequence.high), end = min(queries, keys - sequence.low);
        const bool any = keys > 0 && first < end;
        to.rows[2 * b] = any ? (int)first : 0;
        to.rows[2 * b + 1] = any ? (int)end : 0;
    }
    if (to.keys != nullptr) {
        // From the first key of the first row to the last key of the last row.
        to.keys[2 * b] = queries > 0 ? first_key(sequence, 0) : 0;
        to.keys[2 * b + 1] = queries > 0 ? end_key(sequence, queries - 1) : 0;
    }
}

// Writes the block table, [B, `row`], with page 0 for entries that no key needs: they may hold anything, and
// cuDNN may read them.
extern "C" __global__ void __launch_bounds__(BLOCK)
    attention_block_table(const __grid_constant__ Parameters p, int *to, long long row) {
#if LAYOUT == LAYOUT_PAGED
    const long long count = p.batch * row, step = gridDim.x * (long long)blockDim.x;
    for (long long index = blockIdx.x * (long long)blockDim.x + threadIdx.x; index < count; index += step) {
        const long long b = index / row, key = index % row * p.page_size;
        to[index] = key < sequence_of(p, b).keys ? (int)page_of(p, b, (unsigned)key) : 0;
    }
#endif
}
