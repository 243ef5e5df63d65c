// What the kernel for the gradients of keys and values does behind its main loop: stores the sums, and
// computes keys again that hold NaN or infinities of query rows that do not see them.
// Needs: fused/backward/keys/logit_gradients.cuh, fused/exact.cuh.

__device__ inline void store_gradients(const Parameters &p, const KeyTile &tile, const KeySums &sums,
                                       unsigned char *memory) {
    unsigned non_finite = 0;
#pragma unroll
    for (int r = 0; r < row_slots<KEYS>(); ++r) {
        bool finite = true;
#pragma unroll
        for (int c = 0; c < output_slots<HEAD>(); ++c) finite &= is_finite(sums.keys[r][c]);
#pragma unroll
        for (int c = 0; c < output_slots<VALUE>(); ++c) finite &= is_finite(sums.values[r][c]);
        if (!finite && tile.first + key_row_at<KEYS>(r) < tile.end) non_finite |= 1u << r;
    }
    int *const is_computed_again = reinterpret_cast<int *>(memory);
    const bool any_again = mark_rows<KEYS>(p, non_finite, is_computed_again, [](int r) { return key_row_at<KEYS>(r); });
    const real scale = scale_of_sums(p);
#pragma unroll
    for (int r = 0; r < row_slots<KEYS>(); ++r) {
        const int local = key_row_at<KEYS>(r), key = tile.first + local;
        if (key >= rows_of_keys(p, tile.sequence) || (any_again && is_computed_again[local])) continue;
        const bool zero = key >= tile.end;
        if (WANTS_KEYS && p.d_key.data) {
            element *to_row = at(p.d_key, tile.b, key_row(tile.sequence, key), tile.key_head);
#pragma unroll
            for (int c = 0; c < output_slots<HEAD>(); c += NEIGHBOURS)
                store_pair(to_row, output_column_at<HEAD>(c), p.head_dim, p.d_key.stride[3], p.aligned & ALIGNED_D_KEY,
                           zero ? real(0) : sums.keys[r][c] * scale, zero ? real(0) : sums.keys[r][c + 1] * scale);
        }
        if (WANTS_VALUES && p.d_value.data) {
            element *to_row = at(p.d_value, tile.b, key_row(tile.sequence, key), tile.key_head);
#pragma unroll
            for (int c = 0; c < output_slots<VALUE>(); c += NEIGHBOURS)
                store_pair(to_row, output_column_at<VALUE>(c), p.value_head_dim, p.d_value.stride[3],
                           p.aligned & ALIGNED_D_VALUE, zero ? real(0) : sums.values[r][c] * keep_scale(p),
                           zero ? real(0) : sums.values[r][c + 1] * keep_scale(p));
        }
    }
    if (!any_again) return;
    for (int local = threadIdx.x / 32; local < KEYS; local += WARPS) {
        if (!is_computed_again[local]) continue;
        const int key = tile.first + local;
        real key_sums[HEAD / 32], value_sums[VALUE / 32];
        exact_gradients_of_key(p, tile.sequence, tile.b, tile.key_head, key, PreparedState(tile.sequence), key_sums,
                               value_sums);
        const long long place = key_row(tile.sequence, key);
        if (WANTS_KEYS && p.d_key.data)
            store_row<HEAD>(at(p.d_key, tile.b, place, tile.key_head), p.d_key.stride[3], p.head_dim, key_sums, scale);
        if (WANTS_VALUES && p.d_value.data)
            store_row<VALUE>(at(p.d_value, tile.b, place, tile.key_head), p.d_value.stride[3], p.value_head_dim,
                             value_sums, keep_scale(p));
    }
}
