// What a call passes to every kernel. The layout is that of `Parameters` on the host (attention-cuda).
// Needs: common/dtypes.cuh, common/integers.cuh, fused/numbers.cuh.

// A strided tensor: the address of the element at index 0, and strides in elements. Axes are those of the
// tensor's shape, but for slopes, [B, N], whose first stride may be 0.
struct Tensor {
    char *data;
    long long stride[4];
};

// Where the rows of one sequence are, and which keys a row sees.
struct SequenceRows {
    // Query row t stands at t + offset.
    long long offset;
    // Row t sees the keys from t + low to before t + high that exist.
    long long low;
    long long high;
    // The numbers of query rows and of keys that exist.
    int queries;
    int keys;
};

// The rows and keys of a sequence that are real.
struct RowLengths {
    int queries, keys;
};

struct Parameters {
    Tensor query, key, value, mask, bias, slopes, sinks, out, lse, d_out, d_lse, d_query, d_key, d_value, d_bias,
        d_sinks;
    // What the call has in device memory.
    Integers query_lengths, key_value_lengths, query_offsets, dropout_seed, dropout_offset;
    // That of every batch row, unless `rows_vary`: then sequence_of makes each from the numbers below.
    SequenceRows uniform_sequence;
    // The offset of rows without `query_offsets`, and the bounds of these.
    long long query_offset, least_offset, most_offset;
    // A row sees the keys from `keys_before` before its position to before `keys_after` behind it; the largest
    // number stands for no bound, and reaches as far.
    unsigned long long keys_before, keys_after;
    // Scratch. Forward with split keys: partial outputs [split, B, N, T, Hv], and row max and row sum [split,
    // B, N, T, 2]. Backward: what gradients.cuh has of each row, offsets in the first and row terms, scores
    // and far heads in the second. Behind cuDNN's forward pass: its logsumexp, as offsets.
    union {
        real *partial_out;
        real *row_offsets;
    };
    union {
        real *partial_state;
        real *row_deltas;
    };
    long long batch, query_length, key_length, query_heads, key_heads;
    long long bias_size[4];
    double scale;
    double softcap;
    double keep_scale;
    // A power of two that gradients of logits carry until their products are summed, and one over it
    // (balance_of).
    float balance, unbalance;
    int head_dim, value_head_dim;
    // Query heads that share a key/value head.
    int group;
    // Query heads whose rows share a tile (pack GQA).
    int pack_gqa;
    // Splits of the keys (split-KV).
    int splits;
    // A bit for each tensor above, in order: rows begin at multiples of 16 bytes, elements are neighbours.
    int aligned;
    int bias_dtype, slopes_dtype, sinks_dtype;
    // Whether a row may see some keys of a tile and not others, so that products with masked keys have to be
    // looked at for NaN.
    int hides_keys;
    // The threshold of dropout, and the words of its stream where these are not in device memory.
    unsigned drop_threshold, drop_key[2], drop_offset;
    // Number of heads, or batch rows where `swizzles_batch`, whose tiles are scheduled round-robin, so that
    // they share reads of a mask or bias in L2. Divides the number of heads (batch rows).
    int swizzle, swizzles_batch;
    // Whether batch rows differ, or may differ.
    int rows_vary;
    // Whether `lengths` has those of each batch row, which are then at most 64.
    int has_lengths;
    // Whether the last row of each sequence is at its last key, in the place of an offset.
    int is_bottom_right;
    int padding;
    RowLengths lengths[64];
};

static_assert(sizeof(Tensor) == 40 && sizeof(SequenceRows) == 32 && sizeof(RowLengths) == 8 &&
                  sizeof(Parameters) == 1544,
              "the host's layout");

// Bits of `aligned`.
#define ALIGNED_QUERY (1 << 0)
#define ALIGNED_KEY (1 << 1)
#define ALIGNED_VALUE (1 << 2)
#define ALIGNED_MASK (1 << 3)
#define ALIGNED_BIAS (1 << 4)
#define ALIGNED_OUT (1 << 7)
#define ALIGNED_D_OUT (1 << 9)
#define ALIGNED_D_QUERY (1 << 11)
#define ALIGNED_D_KEY (1 << 12)
#define ALIGNED_D_VALUE (1 << 13)

// Bits of FEATURES: the options that a kernel is compiled for. The generic kernel has all of them, and tests
// at run time, but for FEATURE_LOGITS, which is known when it is compiled.
#define FEATURE_MASK 1
#define FEATURE_BIAS 2
#define FEATURE_ALIBI 4
#define FEATURE_SOFTCAP 8
#define FEATURE_DROPOUT 16
// Logits must be complete before the row max, because more than a positive scale and a mask is applied to
// products.
#define FEATURE_LOGITS 32

constexpr bool NEEDS_LOGITS = (FEATURES & FEATURE_LOGITS) != 0;
constexpr bool HAS_DROPOUT = (FEATURES & FEATURE_DROPOUT) != 0;

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

// The numbers of query rows and of keys of batch row b, from the lengths of a call whose rows vary.
__device__ inline int query_rows_of_numbers(const Parameters &p, long long b) {
    if (p.query_lengths.data) return between(integer_at(p.query_lengths, b), 0, p.query_length);
    return p.has_lengths ? p.lengths[b].queries : (int)p.query_length;
}
__device__ inline int keys_of_numbers(const Parameters &p, long long b) {
    if (p.key_value_lengths.data) return between(integer_at(p.key_value_lengths, b), 0, p.key_length);
    return p.has_lengths ? p.lengths[b].keys : (int)p.key_length;
}

// The rows of batch row b, from the numbers of a call whose rows vary. Those in device memory are brought into
// their bounds, so whatever they are, no memory is touched that is not the call's.
__device__ inline void sequence_of_numbers(const Parameters &p, long long b, SequenceRows &sequence) {
    const RowLengths lengths{query_rows_of_numbers(p, b), keys_of_numbers(p, b)};
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
__device__ __noinline__ void sequence_of_numbers_called(const Parameters &p, long long b, SequenceRows &sequence) {
    sequence_of_numbers(p, b, sequence);
}

// The only reader of lengths and offsets. Kernels whose loops have all registers differ in which way leaves the
// loop those of a call without such numbers: most of them call it (`attention_gradient_of_keys` would spill),
// and INLINE is for those that would spill around a call. So that the parameters are not copied for the call,
// kernels take them as a grid constant.
template <bool INLINE = false>
__device__ inline SequenceRows sequence_of(const Parameters &p, long long b) {
    if (__builtin_expect(p.rows_vary, 0)) {
        SequenceRows sequence;
        if constexpr (INLINE)
            sequence_of_numbers(p, b, sequence);
        else
            sequence_of_numbers_called(p, b, sequence);
        return sequence;
    }
    return p.uniform_sequence;
}

// The number of query rows of batch row b alone, in less code.
__device__ inline int query_rows_of(const Parameters &p, long long b) {
    return __builtin_expect(p.rows_vary, 0) ? query_rows_of_numbers(p, b) : p.uniform_sequence.queries;
}

// The first key that row t sees, and the end of those that it sees. Neither falls from row to row.
__device__ inline int first_key(const SequenceRows &sequence, long long t) {
    return between(t + sequence.low, 0, sequence.keys);
}
__device__ inline int end_key(const SequenceRows &sequence, long long t) {
    return between(t + sequence.high, 0, sequence.keys);
}

__device__ inline element *at(const Tensor &tensor, long long b, long long position, long long head) {
    return reinterpret_cast<element *>(tensor.data) + b * tensor.stride[0] + position * tensor.stride[1] +
           head * tensor.stride[2];
}

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
