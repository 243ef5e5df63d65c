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
template <bool FUSES>
__device__ inline bool online_softmax(real (&scores)[row_slots<ROWS>()][column_slots<KEYS>()], real factor,
                                      real (&row_max)[row_slots<ROWS>()], real (&row_sum)[row_slots<ROWS>()],
                                      real (&scores_scale)[row_slots<ROWS>()]) {
    constexpr int ROW_SLOTS = row_slots<ROWS>(), KEY_SLOTS = column_slots<KEYS>();
    // Per row: the largest of the thread's scores and the row max so far; what is subtracted from the scores
    // of a far row, 0 for others; and the exponent that earlier sums are relative to.
    real tops[ROW_SLOTS], moved[ROW_SLOTS], before[ROW_SLOTS];
    // Half of what would do, for the rounding of the quotient: the branch below is right for rows that are
    // not far, too.
    const real near = NEAR / 2 / factor;
    bool is_far = false;
#pragma unroll
    for (int r = 0; r < ROW_SLOTS; ++r) {
        // Two dependency chains for the maximum, and two for the sum.
        real maximum = scores[r][0], other = scores[r][KEY_SLOTS > 1 ? 1 : 0];
#pragma unroll
        for (int c = 2; c < KEY_SLOTS; ++c) (c % 2 ? other : maximum) = fmax(c % 2 ? other : maximum, scores[r][c]);
        tops[r] = fmax(row_max[r], fmax(maximum, other));
        moved[r] = 0;
        before[r] = row_max[r] * factor;
        // The row max is that of one of its threads: where no thread finds a far row, no row has a shift.
        is_far |= tops[r] != -infinity() && !(fabs(tops[r]) < near);
    }
    // Rare, and before threads exchange their maxima, so that the code below has no branch and the compiler
    // can overlap exponentials with dropout and with waits for products. From here on, scores are relative to
    // `moved` (`shift_of`).
    if (!FUSES || __builtin_expect(__any_sync(~0u, is_far), 0)) {
#pragma unroll
        for (int r = 0; r < ROW_SLOTS; ++r) {
            const real maximum = maximum_of_row(tops[r]);
            const Shift earlier = shift_of<FUSES>(row_max[r], factor);
            // -inf less -inf would be NaN where all keys so far are masked.
            moved[r] = shift_of<FUSES>(maximum == -infinity() ? real(0) : maximum, factor).score;
            before[r] = fma(difference(earlier.score, moved[r]), factor, earlier.power);
            tops[r] = moved[r] != 0 ? real(0) : maximum;
#pragma unroll
            for (int c = 0; c < KEY_SLOTS; ++c) scores[r][c] = difference(scores[r][c], moved[r]);
        }
    }
    bool rescales = false;
#pragma unroll
    for (int r = 0; r < ROW_SLOTS; ++r) {
        const real maximum = FUSES ? maximum_of_row(tops[r]) : tops[r];
        const real base = maximum == -infinity() ? real(0) : maximum * factor;
        scores_scale[r] = power(before[r] - base);
        rescales |= scores_scale[r] != 1;
        row_max[r] = maximum + moved[r];
        real even = 0, odd = 0;
#pragma unroll
        for (int c = 0; c < KEY_SLOTS; ++c) {
            // `exponent_of`, of which the difference is taken above.
            scores[r][c] = power(FUSES ? fma(scores[r][c], factor, -base) : scores[r][c] * factor);
            (c % 2 ? odd : even) += scores[r][c];
        }
        row_sum[r] = fma(row_sum[r], scores_scale[r], even + odd);
    }
    return __any_sync(~0u, rescales);
}
