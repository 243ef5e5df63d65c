// What happens to the product of a query and a key before the softmax, and to a probability after it.

// What the terms of a logit need to know of a query row.
struct Row {
    long long position;
    // The same where kernels for ALiBi alone run: the host has others for positions that no f32 holds.
    real place;
    // The keys in reach; none for a padded row.
    int low, high;
    int t;
    unsigned batch_head;
    real slope;
    // Of key 0.
    long long mask, bias;
};

// The row t of a batch row and head. Rows behind the last are as padded ones. Nobody asks for the keys in reach where nothing is
// `checked`.
__device__ inline Row row_of(const Parameters &p, const Batch &batch, long long b, long long n, long long t,
                             bool checked = true) {
    Row row;
    row.t = (int)t;
    row.batch_head = (unsigned)(b * p.query_heads + n);
    const bool padded = t >= batch.queries;
    row.low = row.high = 0;
    if (checked && !padded) {
        row.low = first_key(batch, t);
        row.high = end_key(batch, t);
    }
    row.position = t + batch.offset;
    row.place = (real)row.position;
    row.slope = 0;
    if constexpr ((FEATURES & FEATURE_ALIBI) != 0) {
        if (p.slopes.data && !padded)
            row.slope = load(p.slopes.data, p.slopes_dtype, b * p.slopes.stride[0] + n * p.slopes.stride[1]);
    }
    // Unchecked tiles read for rows behind the last too.
    const long long inside = min(t, p.query_length - 1);
    row.mask = b * p.mask.stride[0] + n * p.mask.stride[1] + inside * p.mask.stride[2];
    row.bias = b * p.bias.stride[0] + n * p.bias.stride[1] + inside * p.bias.stride[2];
    return row;
}

// The stride of the mask or bias from key to key, which is part of the instruction where the kernel is compiled for it.
__device__ inline long long key_stride(const Tensor &tensor) {
    constexpr int known = TERM_STRIDE;
    return known >= 0 ? known : tensor.stride[3];
}

// Kernels for one option have it; those for all of them look.
constexpr bool IS_SINGLE_OPTION =
    FEATURES != (FEATURE_MASK | FEATURE_BIAS | FEATURE_ALIBI | FEATURE_SOFTCAP | FEATURE_DROPOUT | FEATURE_LOGITS);

// Whether tiles are compared with the structure, as a type.
struct Checked {
    static constexpr bool value = true;
};
struct Unchecked {
    static constexpr bool value = false;
};

// Whether the mask and the bias of a tile are read together, into registers, before its products are there.
constexpr bool PACKS_MASK = HALVES && IS_SINGLE_OPTION && (FEATURES & FEATURE_MASK) != 0;
constexpr bool PACKS_BIAS = HALVES && IS_SINGLE_OPTION && (FEATURES & FEATURE_BIAS) != 0 &&
                            (BIAS_DTYPE == DTYPE_F16 || BIAS_DTYPE == DTYPE_BF16);

// The logit of a key from its product with the query and what there is to it: -inf where it takes no part. `slope` is the
// derivative by the scaled product, `distance` that of the row from the key. Which operations are fused is said here, so that every
// kernel has the same logit of the same product.
//
// A bias of -inf masks. Where the product is NaN or +inf too, the sum is NaN: only with EXACT that is told apart. Kernels that do not pay
// for it find a sum that is NaN in the end, and compute its row or key once more.
template <bool EXACT>
__device__ inline real logit_of(const Parameters &p, const Row &row, bool visible, real distance, real bias,
                                real product, real &slope) {
    constexpr bool HAS_SOFTCAP = (FEATURES & FEATURE_SOFTCAP) != 0, HAS_ALIBI = (FEATURES & FEATURE_ALIBI) != 0;
    constexpr bool HAS_BIAS = (FEATURES & FEATURE_BIAS) != 0;
    slope = 1;
    real x;
    if constexpr (HAS_BIAS && !HAS_SOFTCAP && !HAS_ALIBI) {
        x = fma(product, (real)p.scale, bias);
    } else {
        x = rounded_product(product, (real)p.scale);
        if constexpr (HAS_SOFTCAP) {
            if (IS_SINGLE_OPTION || p.softcap > 0) {
                const real cap = (real)p.softcap, inverse = 1 / cap;
                const real y = hyperbolic_tangent(x * inverse);
                slope = (1 - y) * (1 + y);
                x = rounded_product(cap, y);
            }
        }
        if constexpr (HAS_ALIBI) x = fma(-row.slope, fabs(distance), x);
        if constexpr (HAS_BIAS) x = rounded_sum(x, bias);
    }
    if constexpr (EXACT && HAS_BIAS) visible &= bias != -infinity();
    return visible ? x : -infinity();
}

// Where there is ALiBi, the distance of a row from a key.
__device__ inline real distance_of(const Parameters &p, const Row &row, int key) {
    if constexpr ((FEATURES & FEATURE_ALIBI) == 0) return 0;
    if constexpr (IS_SINGLE_OPTION) return row.place - (real)key;
    return p.slopes.data ? (real)(row.position - key) : real(0);
}

// The same with what is read for one key. Unchecked, the key is one that every row of the tile has in reach. Without branches, so
// that what is read for many keys is under way at once.
template <class Check, bool EXACT>
__device__ inline real logit(const Parameters &p, const Row &row, int key, real product, real &slope) {
    bool visible = true;
    int place = key;
    if constexpr (Check::value) {
        visible = key >= row.low && key < row.high;
        // There is a key 0 wherever there is a tile.
        place = visible ? key : 0;
    }
    if constexpr ((FEATURES & FEATURE_MASK) != 0) {
        if (IS_SINGLE_OPTION || p.mask.data) visible &= p.mask.data[row.mask + place * key_stride(p.mask)] != 0;
    }
    real bias = 0;
    if constexpr ((FEATURES & FEATURE_BIAS) != 0) {
        constexpr int known = BIAS_DTYPE;
        if (IS_SINGLE_OPTION || p.bias.data) {
            const int dtype = known == DTYPE_ANY ? p.bias_dtype : known;
            bias = load(p.bias.data, dtype, row.bias + place * key_stride(p.bias));
        }
    }
    return logit_of<EXACT>(p, row, visible, distance_of(p, row, key), bias, product, slope);
}

// Bit i says whether key 8 * block + i of the row is kept.
__device__ inline unsigned kept_of_block(const Parameters &p, unsigned batch_head, unsigned t, unsigned block) {
    const uint4 words = philox4x32_10(make_uint4(block, t, batch_head, p.drop_offset), p.drop_key[0], p.drop_key[1]);
    const unsigned word[4] = {words.x, words.y, words.z, words.w};
    unsigned kept = 0;
#pragma unroll
    for (int lane = 0; lane < 8; ++lane) {
        const unsigned drawn = lane % 2 ? word[lane / 2] >> 16 : word[lane / 2] & 0xffff;
        kept |= (drawn >= p.drop_threshold ? 1u : 0u) << lane;
    }
    return kept;
}

__device__ inline bool is_kept(const Parameters &p, const Row &row, int key) {
    return kept_of_block(p, row.batch_head, (unsigned)row.t, (unsigned)key / 8) >> (key % 8) & 1;
}

__device__ inline bool drops(const Parameters &p) { return HAS_DROPOUT && p.drop_threshold > 0; }

// What kept probabilities are multiplied by.
__device__ inline real keep_scale(const Parameters &p) { return HAS_DROPOUT ? (real)p.keep_scale : real(1); }
