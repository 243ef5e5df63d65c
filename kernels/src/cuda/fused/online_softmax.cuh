// The online softmax: row max and row sum, updated tile by tile.
// Needs: fused/softmax.cuh, fused/fragments.cuh, fused/mma/fma.cuh.

// From the products of a tile to its scores (softmax.cuh).
template <class Check>
__device__ inline void finish_scores(const Parameters &p, const Row (&rows)[row_slots<ROWS>()], int first,
                                     const RowMaskBias<ROWS, KEYS> &mask_bias,
                                     real (&scores)[row_slots<ROWS>()][column_slots<KEYS>()]) {
#pragma unroll
    for (int r = 0; r < row_slots<ROWS>(); ++r) {
        const real distance = distance_of(p, rows[r], first + key_at(0));
#pragma unroll
        for (int c = 0; c < column_slots<KEYS>(); ++c) {
            const int key = first + key_at(c);
            real slope;
            if constexpr (NEEDS_LOGITS)
                scores[r][c] = tile_logit<Check, false>(p, rows[r], key, distance - key_offset(c), mask_bias, r, c,
                                                        scores[r][c], slope);
            else if (!takes_part<Check>(p, rows[r], key, mask_bias, r, c))
                scores[r][c] = -infinity();
        }
    }
}

// One step: scores become weights relative to the new row max, and `scores_scale` is what sums of earlier
// tiles are to be multiplied by. Returns false where that is 1 for every row of the warp.
//
// Row by row, with the check for a far row (`shift_of`) before the row's exponentials: the instructions for
// the maximum of one row then fill the gaps between the exponentials of the row before, which wait for the
// unit that computes them. A check of all rows at once would put every maximum before the first exponential.
// `before_last` is called before the exponentials of the last row: what follows the softmax, and may only
// begin behind it, then fills gaps as well.
template <bool FUSES, class BeforeLast>
__device__ inline bool online_softmax(real (&scores)[row_slots<ROWS>()][column_slots<KEYS>()], real factor,
                                      real (&row_max)[row_slots<ROWS>()], real (&row_sum)[row_slots<ROWS>()],
                                      real (&scores_scale)[row_slots<ROWS>()], BeforeLast before_last) {
    constexpr int KEY_SLOTS = column_slots<KEYS>(), CHAINS = KEY_SLOTS >= 16 ? 4 : KEY_SLOTS >= 2 ? 2 : 1;
    // Half of what would do, for the rounding of the quotient: the branch below is right for rows that are
    // not far, too.
    const real near = NEAR / 2 / factor;
    bool rescales = false;
#pragma unroll
    for (int r = 0; r < row_slots<ROWS>(); ++r) {
        real(&row)[KEY_SLOTS] = scores[r];
        // Several dependency chains for the maximum, and two for the sum.
        real tops[CHAINS];
#pragma unroll
        for (int c = 0; c < CHAINS; ++c) tops[c] = row[c];
#pragma unroll
        for (int c = CHAINS; c < KEY_SLOTS; ++c) tops[c % CHAINS] = fmax(tops[c % CHAINS], row[c]);
#pragma unroll
        for (int c = 1; c < CHAINS; ++c) tops[0] = fmax(tops[0], tops[c]);
        real top = maximum_of_row(fmax(row_max[r], tops[0]));
        // What is subtracted from the scores of a far row, 0 for others; and the exponent that earlier sums
        // are relative to. From here on, scores are relative to `moved`.
        real moved = 0, before = row_max[r] * factor;
        const bool is_far = top != -infinity() && !(fabs(top) < near);
        if (!FUSES || __builtin_expect(__any_sync(~0u, is_far), 0)) {
            const Shift earlier = shift_of<FUSES>(row_max[r], factor);
            // -inf less -inf would be NaN where all keys so far are masked.
            moved = shift_of<FUSES>(top == -infinity() ? real(0) : top, factor).score;
            before = fma(difference(earlier.score, moved), factor, earlier.power);
            top = moved != 0 ? real(0) : top;
#pragma unroll
            for (int c = 0; c < KEY_SLOTS; ++c) row[c] = difference(row[c], moved);
        }
        if (r == row_slots<ROWS>() - 1) before_last();
        const real base = top == -infinity() ? real(0) : top * factor;
        scores_scale[r] = power(before - base);
        rescales |= scores_scale[r] != 1;
        row_max[r] = top + moved;
        real even = 0, odd = 0;
#pragma unroll
        for (int c = 0; c < KEY_SLOTS; ++c) {
            // `exponent_of`, of which the difference is taken above.
            row[c] = power(FUSES ? fma(row[c], factor, -base) : row[c] * factor);
            (c % 2 ? odd : even) += row[c];
        }
        row_sum[r] = fma(row_sum[r], scores_scale[r], even + odd);
    }
    return __any_sync(~0u, rescales);
}
