// A query row of a head: its position, the keys in reach, and where its mask and bias begin.
// Needs: common/dtypes.cuh, fused/numbers.cuh, fused/parameters.cuh, fused/sequence.cuh.

struct Row {
    long long position;
    // The position as a real, for kernels specialised for ALiBi alone. The host launches others where an f32
    // does not hold it.
    real place;
    // The keys that causal masking, window and lengths let it see, from `low` to before `high`; none for a
    // padded row.
    int low, high;
    int t;
    unsigned batch_head;
    real slope;
    // Indices of the elements for key 0.
    long long mask, bias;
#if LAYOUT != LAYOUT_DENSE
    // The sequence's first query row and key among the rows of their tensors.
    int first_query, first_key;
#endif
#if EIGHT_BIT
    // What products are multiplied by to give logits, where these are not left to the softmax
    // (`logit_scale_of`).
    real logit_scale;
#endif
};

// What products of the row are multiplied by. A macro, as the others below.
#if EIGHT_BIT
#define logit_scale(p, row) (row).logit_scale
#else
#define logit_scale(p, row) (real)(p).scale
#endif

#if EIGHT_BIT

// The largest finite number.
#if DTYPE == DTYPE_F64
constexpr real MOST_REAL = 1.7976931348623157e308;
#else
constexpr real MOST_REAL = 3.40282347e38f;
#endif

// The scale of a key/value head of a sequence, which may be that of packed rows behind the last one.
__device__ inline float scale_at(const Parameters &p, const Scales &scales, float of_all, long long b, long long head) {
    if (scales.data == nullptr || b >= p.batch) return of_all;
    return __ldg(scales.data + b * scales.batch_stride + head * scales.head_stride);
}

// The scale of the call times that of the keys, rounded once. Finite where that of the keys is: a product of
// 0 stays 0.
__device__ inline real logit_scale_of(const Parameters &p, long long b, long long key_head) {
    const float of_keys = scale_at(p, p.key_scales, p.key_scale, b, key_head);
    const real scale = (real)(p.scale * (double)of_keys);
    if (is_finite(scale) || !(fabsf(of_keys) < __int_as_float(0x7f800000))) return scale;
    return scale > 0 ? MOST_REAL : -MOST_REAL;
}

// What rows of the output are multiplied by once they are normalised, when no sum overflows that the values
// do not.
__device__ inline real value_scale_of(const Parameters &p, long long b, long long key_head) {
    return scale_at(p, p.value_scales, p.value_scale, b, key_head);
}

// A zero is positive, whatever the sign of the scale.
__device__ inline real with_value_scale(real x, real scale) { return x * scale + real(0); }

#endif

// Row t of a batch row and head. Rows past the end are treated as padding. `low` and `high` are not read
// where `checked` is false.
__device__ inline Row row_of(const Parameters &p, const Sequence &sequence, long long b, long long n, long long t,
                             bool checked = true) {
    Row row;
    row.t = (int)t;
#if LAYOUT != LAYOUT_DENSE
    row.first_query = sequence.first_query;
    row.first_key = sequence.first_key;
#endif
    row.batch_head = (unsigned)(b * p.query_heads + n);
    const bool padded = t >= sequence.queries;
    row.low = row.high = 0;
    if (checked && !padded) {
        row.low = first_key(sequence, t);
        row.high = end_key(sequence, t);
    }
    row.position = t + sequence.offset;
    row.place = (real)row.position;
    row.slope = 0;
    if constexpr ((FEATURES & FEATURE_ALIBI) != 0) {
        if (p.slopes.data && !padded)
            row.slope = load(p.slopes.data, p.slopes_dtype, b * p.slopes.stride[0] + n * p.slopes.stride[1]);
    }
    // Unchecked tiles read mask and bias for rows past the end, too.
    const long long inside = min(t, p.query_length - 1);
    row.mask = b * p.mask.stride[0] + n * p.mask.stride[1] + inside * p.mask.stride[2];
    row.bias = b * p.bias.stride[0] + n * p.bias.stride[1] + inside * p.bias.stride[2];
    return row;
}

// The row itself, in a tensor of query rows, and a key that it sees, in the tensor of keys or values. Macros
// for dense rows, as those of sequence.cuh.
#if LAYOUT == LAYOUT_DENSE
#define at_query(tensor, row, b, head) at(tensor, b, (row).t, head)
#define at_key(p, tensor, row, b, key, head) cached_at(tensor, b, key, head)
#else
__device__ inline element *at_query(const Tensor &tensor, const Row &row, long long b, long long head) {
    return at(tensor, b, row.first_query + (long long)row.t, head);
}
__device__ inline const cached *at_key(const Parameters &p, const Tensor &tensor, const Row &row, long long b, int key,
                                       long long head) {
#if LAYOUT == LAYOUT_PAGED
    return cached_at(tensor, page_of(p, b, (unsigned)key), (unsigned)key % (unsigned)p.page_size, head);
#else
    return cached_at(tensor, b, row.first_key + (long long)key, head);
#endif
}
#endif

// The stride of the mask or bias from key to key: a constant of the instruction where the kernel is compiled
// for one stride.
__device__ inline long long key_stride(const Tensor &tensor) {
    constexpr int known = TERM_STRIDE;
    return known >= 0 ? known : tensor.stride[3];
}

// A kernel specialised for one option assumes that the call has it; the generic kernel, which has all, tests
// at run time.
constexpr bool IS_SINGLE_OPTION =
    FEATURES != (FEATURE_MASK | FEATURE_BIAS | FEATURE_ALIBI | FEATURE_SOFTCAP | FEATURE_DROPOUT | FEATURE_LOGITS);

// Whether a tile has keys that some of its rows do not see, so that each logit is compared with its row's
// reach; as a type.
struct Checked {
    static constexpr bool value = true;
};
struct Unchecked {
    static constexpr bool value = false;
};

// Whether the mask, or the bias, of a tile is read into registers while its products are computed, several
// keys to a register.
constexpr bool PACKS_MASK = HALVES && IS_SINGLE_OPTION && (FEATURES & FEATURE_MASK) != 0;
constexpr bool PACKS_BIAS = HALVES && IS_SINGLE_OPTION && (FEATURES & FEATURE_BIAS) != 0 &&
                            (BIAS_DTYPE == DTYPE_F16 || BIAS_DTYPE == DTYPE_BF16);
