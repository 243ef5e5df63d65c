// From products of queries and keys to logits.
// Needs: fused/row.cuh.

// The logit of a key from its product with the query: scale, softcap, ALiBi and bias applied, -inf where the
// key is masked. `slope` is set to the derivative by the scaled product; `distance` is the row's position
// less the key. Which operations are fused is fixed here, so that every kernel computes the same logit from
// the same product.
//
// A bias of -inf masks. Where the product is NaN or +inf, its sum with -inf is NaN; only EXACT tells that
// apart. Kernels without it find a row sum that is NaN in the epilogue, and compute that row or key again.
template <bool EXACT>
__device__ inline real logit_of(const Parameters &p, const Row &row, bool visible, real distance, real bias,
                                real product, real &slope) {
    constexpr bool HAS_SOFTCAP = (FEATURES & FEATURE_SOFTCAP) != 0, HAS_ALIBI = (FEATURES & FEATURE_ALIBI) != 0;
    constexpr bool HAS_BIAS = (FEATURES & FEATURE_BIAS) != 0;
    slope = 1;
    real x;
    if constexpr (HAS_BIAS && !HAS_SOFTCAP && !HAS_ALIBI) {
        x = fma(product, logit_scale(p, row), bias);
    } else {
        x = rounded_product(product, logit_scale(p, row));
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

// The row's position less the key, where the call has ALiBi; else 0.
__device__ inline real distance_of(const Parameters &p, const Row &row, int key) {
    if constexpr ((FEATURES & FEATURE_ALIBI) == 0) return 0;
    if constexpr (IS_SINGLE_OPTION) return row.place - (real)key;
    return p.slopes.data ? (real)(row.position - key) : real(0);
}

// The same, with the mask and the bias of the key read from memory. Unchecked, the key is one that every row
// of the tile sees. Without branches, so that loads for many keys are in flight at once.
template <class Check, bool EXACT>
__device__ inline real logit(const Parameters &p, const Row &row, int key, real product, real &slope) {
    bool visible = true;
    int place = key;
    if constexpr (Check::value) {
        visible = key >= row.low && key < row.high;
        // Key 0 exists wherever there is a tile.
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

// Whether the mask or the bias is read key by key.
constexpr bool READS_SINGLY =
    ((FEATURES & FEATURE_MASK) != 0 && !PACKS_MASK) || ((FEATURES & FEATURE_BIAS) != 0 && !PACKS_BIAS);

// The logit in slots r and c of a tile, with the mask and the bias that were read for the tile
// (fragments.cuh). `distance` is that of row and key, which is cheaper to carry from slot to slot than to
// compute.
template <class Check, bool EXACT, class MaskBias>
__device__ inline real tile_logit(const Parameters &p, const Row &row, int key, real distance,
                                  const MaskBias &mask_bias, int r, int c, real product, real &slope) {
    if constexpr (READS_SINGLY) {
        return logit<Check, EXACT>(p, row, key, product, slope);
    } else {
        bool visible = !Check::value || (key >= row.low && key < row.high);
        real bias = 0;
        if constexpr (PACKS_MASK || PACKS_BIAS) {
            visible &= mask_bias.visible(r, c);
            bias = mask_bias.added(r, c);
        }
        return logit_of<EXACT>(p, row, visible, distance, bias, product, slope);
    }
}

// Whether the row sees the key in slots r and c, for kernels whose logits are scaled products.
template <class Check, class MaskBias>
__device__ inline bool takes_part(const Parameters &p, const Row &row, int key, const MaskBias &mask_bias, int r,
                                  int c) {
    bool visible = !Check::value || (key >= row.low && key < row.high);
    if constexpr (PACKS_MASK)
        visible &= mask_bias.visible(r, c);
    else if constexpr ((FEATURES & FEATURE_MASK) != 0)
        // Key 0 exists wherever there is a tile.
        visible &= p.mask.data[row.mask + (visible ? key : 0) * key_stride(p.mask)] != 0;
    return visible;
}
