// What the kernels that sum over query rows have in common: the sums of keys and values, and the way from
// products to gradients of logits.
// Needs: fused/backward/keys/producer.cuh, fused/mma/sm90.cuh.

constexpr bool WANTS_KEYS = (WANTED & 1) != 0, WANTS_VALUES = (WANTED & 2) != 0;

// The sums of a consumer thread's keys.
struct KeySums {
    real keys[row_slots<KEYS>()][output_slots<HEAD>()], values[row_slots<KEYS>()][output_slots<VALUE>()];
};

__device__ inline void clear_sums(KeySums &sums) {
#pragma unroll
    for (int r = 0; r < row_slots<KEYS>(); ++r) {
#pragma unroll
        for (int c = 0; c < output_slots<HEAD>(); ++c) sums.keys[r][c] = 0;
#pragma unroll
        for (int c = 0; c < output_slots<VALUE>(); ++c) sums.values[r][c] = 0;
    }
}

// From products of keys and queries, and of values and d_out, to probabilities after dropout and the
// gradients of the first products, in their places, for query rows from `t` on of head n. `numbers` holds the
// offset and the row term of each query row; scores are read where the head has far rows, by the checked
// version, as for the gradient of queries.
template <class Check, bool MAY_BE_FAR>
__device__ inline void logit_gradients(const Parameters &p, const DropoutWords &dropout, const KeyTile &tile,
                                       long long n, int t, const real *numbers, bool has_far,
                                       const KeyMaskBias<KEYS, ROWS> &mask_bias,
                                       real (&weights)[row_slots<KEYS>()][column_slots<ROWS>()],
                                       real (&gradients)[row_slots<KEYS>()][column_slots<ROWS>()]) {
    unsigned kept[row_slots<KEYS>()];
    if (drops(p)) kept_of_keys<KEYS, ROWS>(p, dropout, (unsigned)(tile.b * p.query_heads + n), t, tile.first, kept);
    real distances[row_slots<KEYS>()];
    const Row first_row = row_of(p, tile.sequence, tile.b, n, t + column_at(0), false);
    const real *const scores =
        MAY_BE_FAR ? scores_of_states(p) + scratch_row(p, tile.sequence, tile.b, n, t + column_at(0)) : nullptr;
    const int rows_left = MAY_BE_FAR && has_far ? tile.sequence.queries - t - column_at(0) : 0;
#pragma unroll
    for (int r = 0; r < row_slots<KEYS>(); ++r)
        distances[r] = distance_of(p, first_row, tile.first + key_row_at<KEYS>(r));
#pragma unroll
    for (int c = 0; c < column_slots<ROWS>(); ++c) {
        const int column = column_at(c);
        Row row = first_row;
        if (READS_SINGLY || Check::value) row = row_of(p, tile.sequence, tile.b, n, t + column, Check::value);
        const bool has_score = MAY_BE_FAR && column_offset(c) < rows_left;
        const State own{has_score ? scores[column_offset(c)] : real(0), numbers[column], numbers[ROWS + column]};
        const real largest = MAY_BE_FAR ? computed_here(largest_exponent(own)) : infinity();
#pragma unroll
        for (int r = 0; r < row_slots<KEYS>(); ++r) {
            const Weights of = weigh<Check, MAY_BE_FAR, false>(
                p, row, tile.first + key_row_at<KEYS>(r), distances[r] + column_offset(c), mask_bias, r, c,
                !drops(p) || kept[r] >> c & 1, weights[r][c], WANTS_KEYS ? gradients[r][c] : real(0), own, largest);
            weights[r][c] = of.kept;
            gradients[r][c] = of.product;
        }
    }
}
