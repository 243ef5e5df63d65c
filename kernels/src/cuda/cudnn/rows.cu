// Rows that see no key, keys that no row sees, and the logsumexp in cuDNN's layout. cuDNN multiplies values
// at masked positions by 0, and 0 times NaN is NaN, so rows and keys that take part in nothing are replaced
// by zeros before.
// Needs: nothing.
//
// One thread per row and head, or per eight elements in the copy. Any dtype of two bytes (outputs are only
// ever set to zeros), f32 logsumexp, any compute capability. Tested by the conformance suite of
// attention-cudnn.

// The row of a thread: batch row, head, position; `inside` is false past the last one.
struct RowOf {
    long long batch, head, position;
    bool inside;
};

__device__ inline RowOf row_of(long long batch, long long positions, long long heads) {
    const long long index = blockIdx.x * (long long)blockDim.x + threadIdx.x;
    RowOf row;
    // Heads change fastest: neighbouring threads write neighbouring elements of a logsumexp [B, T, N].
    row.head = index % heads;
    row.position = index / heads % positions;
    row.batch = index / heads / positions;
    row.inside = row.batch < batch;
    return row;
}

// `intervals` holds, for each batch row, the first row that sees a key by structure and the end of those that
// do; `flags` [B, N or 1, T] is null, or zero for rows that a mask or a bias leaves nothing.
__device__ inline bool sees(const int *intervals, const unsigned char *flags, long long flag_heads, const RowOf &row,
                            long long positions) {
    const bool inside = row.position >= intervals[2 * row.batch] && row.position < intervals[2 * row.batch + 1];
    const long long head = flag_heads == 1 ? 0 : row.head;
    return inside && (flags == nullptr || flags[(row.batch * flag_heads + head) * positions + row.position] != 0);
}

// The value of a row that sees nothing.
__device__ inline float minus_infinity() { return __int_as_float(0xff800000); }

// `sinks` and `lengths` (of queries) are null where there are none.
extern "C" __global__ void __launch_bounds__(BLOCK)
    attention_finish_forward(unsigned short *out, long long out_batch, long long out_position, long long out_head,
                             float *lse, long long lse_batch, long long lse_position, long long lse_head, float *stats,
                             const int *intervals, const unsigned char *flags, long long flag_heads, const float *sinks,
                             const int *lengths, long long batch, long long positions, long long heads,
                             long long width) {
    const RowOf row = row_of(batch, positions, heads);
    if (!row.inside) return;
    const bool seen = sees(intervals, flags, flag_heads, row, positions);
    if (lse != nullptr) {
        const bool padded = lengths != nullptr && row.position >= lengths[row.batch];
        const float nothing = sinks == nullptr || padded ? minus_infinity() : sinks[row.head];
        lse[row.batch * lse_batch + row.position * lse_position + row.head * lse_head] =
            seen ? stats[(row.batch * heads + row.head) * positions + row.position] : nothing;
    }
    if (!seen) {
        // Whoever looks at the rows' own numbers later is told too.
        stats[(row.batch * heads + row.head) * positions + row.position] = minus_infinity();
        unsigned short *to = out + row.batch * out_batch + row.position * out_position + row.head * out_head;
        for (long long column = 0; column < width; ++column) to[column] = 0;
    }
}

extern "C" __global__ void __launch_bounds__(BLOCK)
    attention_prepare_backward(const float *lse, long long lse_batch, long long lse_position, long long lse_head,
                               float *stats, float *far_heads, const int *intervals, const unsigned char *flags,
                               long long flag_heads, long long batch, long long positions, long long heads) {
    const RowOf row = row_of(batch, positions, heads);
    if (!row.inside) return;
    // What attention_sum_rows sets, a number for each batch row and head; null where that does not run.
    if (far_heads != nullptr && row.position == 0) far_heads[row.batch * heads + row.head] = 0.0f;
    const float value = lse[row.batch * lse_batch + row.position * lse_position + row.head * lse_head];
    // Less infinity, every logit has probability 0.
    const bool seen = sees(intervals, flags, flag_heads, row, positions) && value != minus_infinity();
    stats[(row.batch * heads + row.head) * positions + row.position] = seen ? value : __int_as_float(0x7f800000);
}

// Copies rows [B, T, N, H] without gaps; those that take no part become zero: outside the interval of their
// batch row, or where `flags` [B, N or 1, ...] is zero, or where `stats` [B, N, T] says that a row sees
// nothing, as `attention_prepare_backward` writes it. Each of the three is null where it says nothing.
//
// Rows begin at multiples of 16 bytes; `parts` of them make a row. A thread moves one part; threadIdx.y
// counts rows.
extern "C" __global__ void __launch_bounds__(BLOCK)
    attention_clean_rows(const unsigned short *from, long long from_batch, long long from_position, long long from_head,
                         uint4 *to, const int *intervals, const unsigned char *flags, long long flag_heads,
                         long long flag_row, const float *stats, long long batch, long long positions, long long heads,
                         long long parts) {
    const long long count = batch * positions * heads;
    const long long step = gridDim.x * (long long)blockDim.y;
    for (long long index = blockIdx.x * (long long)blockDim.y + threadIdx.y; index < count; index += step) {
        const long long head = index % heads;
        const long long position = index / heads % positions;
        const long long b = index / heads / positions;
        const bool inside = intervals == nullptr || (position >= intervals[2 * b] && position < intervals[2 * b + 1]);
        const long long flag_head = flag_heads == 1 ? 0 : head;
        const bool seen =
            (flags == nullptr || flags[(b * flag_heads + flag_head) * flag_row + position] != 0) &&
            (stats == nullptr || stats[(b * heads + head) * positions + position] != __int_as_float(0x7f800000));
        const uint4 *row =
            reinterpret_cast<const uint4 *>(from + b * from_batch + position * from_position + head * from_head);
        for (long long part = threadIdx.x; part < parts; part += blockDim.x) {
            to[index * parts + part] = inside && seen ? row[part] : make_uint4(0, 0, 0, 0);
        }
    }
}
