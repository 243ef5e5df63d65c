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

// The scales of 8-bit keys or values: the address of that of the first head of the first sequence, or null
// where all heads have one that the host knows; and strides from sequence to sequence and from head to head.
struct Scales {
    const float *data;
    long long batch_stride, head_stride;
};

// In schedule.cuh.
struct ScheduledTile;

struct Parameters {
    Tensor query, key, value, mask, bias, slopes, sinks, out, lse, d_out, d_lse, d_query, d_key, d_value, d_bias,
        d_sinks;
    // What the call has in device memory.
    Integers query_lengths, key_value_lengths, query_offsets, dropout_seed, dropout_offset;
    // That of every batch row, unless `rows_vary`: then sequence_of makes each from the numbers below. Of
    // packed rows and pages, `offset`, `low` and `high` are those of every sequence, unless these have
    // `query_offsets` or are `is_bottom_right`.
    SequenceRows uniform_sequence;
    // The offset of rows without `query_offsets`, and the bounds of these.
    long long query_offset, least_offset, most_offset;
    // A row sees the keys from `keys_before` before its position to before `keys_after` behind it; the
    // largest number stands for no bound, and reaches as far.
    unsigned long long keys_before, keys_after;
    // Scratch. Forward with split keys: partial outputs [split, B, N, T, Hv], and row max and row sum [split,
    // B, N, T, 2], of a batch-invariant call [split, B, N, T, slice, 2], with Hv rounded up to an even
    // number. Backward: what gradients.cuh has of each row, offsets in the first and row terms, scores and
    // far heads in the second. Behind cuDNN's forward pass: its logsumexp, as offsets.
    union {
        real *partial_out;
        real *row_offsets;
    };
    union {
        real *partial_state;
        real *row_deltas;
    };
    // Scratch of the kernel for all three gradients (backward/one_pass): sums of the gradient of queries, as
    // many numbers for each tile of query rows as it has; what blocks tell each other of these tiles
    // (turns.cuh); and how many tiles there are.
    real *query_sums;
    unsigned *query_turns;
    long long query_tiles;
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
    // Tiles of the forward kernel, all splits and slices of them, where its blocks go over several.
    int forward_tiles;
    RowLengths lengths[64];
// Last, and behind what kernels of dense rows take of the host's struct.
#if LAYOUT != LAYOUT_DENSE || EIGHT_BIT
    // Where each sequence starts among packed queries and keys, and the last one ends, [B + 1]; null where
    // they are not packed.
    Integers query_starts, key_value_starts;
    // The pages of a sequence, [B, most pages], and the stride from sequence to sequence.
    Integers block_table;
    long long block_table_row;
    // Rows of the tensors of packed queries and keys, all sequences together.
    long long query_rows, key_rows;
    // Pages, rows of a page, and keys that a sequence's part of the table holds, 0 where there are no pages.
    long long pages, page_size, most_keys;
    // In scratch, where the tiles of packed rows are listed for the next kernel that has such tiles.
    ScheduledTile *schedule;
#endif
// And behind what kernels of wider keys take.
#if EIGHT_BIT
    Scales key_scales, value_scales;
    // Where the scales of all heads are one that the host knows: 1 without any.
    float key_scale, value_scale;
#endif
};

static_assert(sizeof(Tensor) == 40 && sizeof(SequenceRows) == 32 && sizeof(RowLengths) == 8 && sizeof(Scales) == 24 &&
                  sizeof(Parameters) == (EIGHT_BIT                ? 1752
                                         : LAYOUT == LAYOUT_DENSE ? 1568
                                                                  : 1696),
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
