// The softmax of the rows of a tile, carried along from tile to tile.

// From the products of a tile to its scores (softmax.cuh).
template <class Check>
__device__ inline void finish_scores(const Parameters &p, const Row (&rows)[row_slots<ROWS>()], int first,
                                     const RowTerms<ROWS, KEYS> &terms, real (&scores)[row_slots<ROWS>()][column_slots<KEYS>()]) {
#pragma unroll
    for (int r = 0; r < row_slots<ROWS>(); ++r) {
        const real distance = distance_of(p, rows[r], first + key_at(0));
#pragma unroll
        for (int c = 0; c < column_slots<KEYS>(); ++c) {
            const int key = first + key_at(c);
            real slope;
            if constexpr (HAS_TERMS)
                scores[r][c] = tile_logit<Check, false>(p, rows[r], key, distance - key_offset(c), terms, r, c, scores[r][c], slope);
            else if (!takes_part<Check>(p, rows[r], key, terms, r, c))
                scores[r][c] = -infinity();
        }
    }
}

// Scores to weights, and their sums to those of earlier tiles. IS_NEAR says that all shifts are in exponents.
template <bool FUSES, bool IS_NEAR>
__device__ inline void weigh_scores(real (&scores)[row_slots<ROWS>()][column_slots<KEYS>()], real factor,
                                    const Shift (&shifts)[row_slots<ROWS>()], real (&totals)[row_slots<ROWS>()],
                                    const real (&shrink)[row_slots<ROWS>()]) {
#pragma unroll
    for (int r = 0; r < row_slots<ROWS>(); ++r) {
        real even = 0, odd = 0;
#pragma unroll
        for (int c = 0; c < column_slots<KEYS>(); ++c) {
            const real score = scores[r][c];
            scores[r][c] = power(IS_NEAR ? fma(score, factor, -shifts[r].power) : exponent_of<FUSES>(score, shifts[r], factor));
            (c % 2 ? odd : even) += scores[r][c];
        }
        totals[r] = fma(totals[r], shrink[r], even + odd);
    }
}

// The softmax carried along by a tile: scores become weights, `shrink` what earlier sums are to be multiplied by. False where
// that is 1 for the whole warp.
template <bool FUSES>
__device__ inline bool carry_softmax(real (&scores)[row_slots<ROWS>()][column_slots<KEYS>()], real factor, real (&maxima)[row_slots<ROWS>()],
                                     real (&totals)[row_slots<ROWS>()], real (&shrink)[row_slots<ROWS>()]) {
    constexpr int ROW_SLOTS = row_slots<ROWS>(), KEY_SLOTS = column_slots<KEYS>();
    Shift shifts[ROW_SLOTS];
    bool rescales = false, is_far = false;
#pragma unroll
    for (int r = 0; r < ROW_SLOTS; ++r) {
        // Two chains each, of the maximum and of the sum, since one waits for itself.
        real maximum = scores[r][0], other = scores[r][KEY_SLOTS > 1 ? 1 : 0];
#pragma unroll
        for (int c = 2; c < KEY_SLOTS; ++c) (c % 2 ? other : maximum) = fmax(c % 2 ? other : maximum, scores[r][c]);
        maximum = fmax(maxima[r], maximum_of_row(fmax(maximum, other)));
        // Less infinity is NaN where everything so far is masked.
        shifts[r] = shift_of<FUSES>(maximum == -infinity() ? real(0) : maximum, factor);
        shrink[r] = change_of(shift_of<FUSES>(maxima[r], factor), shifts[r], factor);
        rescales |= shrink[r] != 1;
        is_far |= shifts[r].score != 0;
        maxima[r] = maximum;
    }
    if (FUSES && !__any_sync(~0u, is_far))
        weigh_scores<FUSES, true>(scores, factor, shifts, totals, shrink);
    else
        weigh_scores<FUSES, false>(scores, factor, shifts, totals, shrink);
    return __any_sync(~0u, rescales);
}
