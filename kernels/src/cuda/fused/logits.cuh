// The logits of a tile.

// Where the mask and the bias are read key by key.
constexpr bool READS_SINGLY =
    ((FEATURES & FEATURE_MASK) != 0 && !PACKS_MASK) || ((FEATURES & FEATURE_BIAS) != 0 && !PACKS_BIAS);

// The logit in slots r and c of a tile from its product, with what was read for the tile. Where there is ALiBi alone, `distance` is
// that of row and key, which is cheaper to carry from slot to slot than to compute.
template <class Check, bool EXACT, class Terms>
__device__ inline real tile_logit(const Parameters &p, const Row &row, int key, real distance, const Terms &terms,
                                  int r, int c, real product, real &slope) {
    if constexpr (READS_SINGLY) {
        return logit<Check, EXACT>(p, row, key, product, slope);
    } else {
        bool visible = !Check::value || (key >= row.low && key < row.high);
        real bias = 0;
        if constexpr (PACKS_MASK || PACKS_BIAS) {
            visible &= terms.visible(r, c);
            bias = terms.added(r, c);
        }
        return logit_of<EXACT>(p, row, visible, distance, bias, product, slope);
    }
}

// Where logits are products, whether the key in slots r and c takes part.
template <class Check, class Terms>
__device__ inline bool takes_part(const Parameters &p, const Row &row, int key, const Terms &terms, int r, int c) {
    bool visible = !Check::value || (key >= row.low && key < row.high);
    if constexpr (PACKS_MASK)
        visible &= terms.visible(r, c);
    else if constexpr ((FEATURES & FEATURE_MASK) != 0)
        // There is a key 0 wherever there is a tile.
        visible &= p.mask.data[row.mask + (visible ? key : 0) * key_stride(p.mask)] != 0;
    return visible;
}
