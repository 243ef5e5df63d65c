// The softmax of far rows (gradients.cuh) again, from the same products as the gradient of queries: their
// logsumexp is so large that its rounding would show. The kernel for that gradient does this first, in blocks
// with such a row.
// Needs: fused/online_softmax.cuh, fused/exact.cuh, fused/backward/gradients.cuh.

// Updates row max and row sum of a tile of queries by a tile of keys. Both tiles are in shared memory.
__device__ inline void sum_tile(const Parameters &p, const Row (&rows)[row_slots<ROWS>()], int first,
                                const element *query_tile, const element *key_tile, real (&row_max)[row_slots<ROWS>()],
                                real (&row_sum)[row_slots<ROWS>()]) {
    real scores[row_slots<ROWS>()][column_slots<KEYS>()], scores_scale[row_slots<ROWS>()];
    gemm_ss_async<ROWS, KEYS, HEAD>(scores, query_tile, key_tile);
    RowMaskBias<ROWS, KEYS> mask_bias;
    if constexpr (PACKS_MASK || PACKS_BIAS) mask_bias.read(p, rows, first);
    warpgroup_wait<0>();
    warpgroup_fence_operand(scores);
    finish_scores<Checked>(p, rows, first, mask_bias, scores);
    online_softmax<false>(scores, power_factor(p), row_max, row_sum, scores_scale, [] {});
}

// The states of a thread's far rows by slot; bit r of `far` is set where slot r has one.
struct FarStates {
    unsigned far;
    real scores[row_slots<ROWS>()], offsets[row_slots<ROWS>()];
};

// Row max and row sum of a thread's rows by slot.
struct RowSums {
    real row_max[row_slots<ROWS>()], row_sum[row_slots<ROWS>()];
};

// Stores the states of the far rows of the tile that begins at `first_t`, without the row term: a row's
// largest score and the offset of its row sum, where these agree with the given logsumexp to within rounding,
// else those of the logsumexp. The states of other rows stay.
//
// Not inlined, so that its code lies behind the kernel's: 20 KB that few calls run would lie between the
// kernel's first instructions and its loop, and short calls would wait for the instruction cache.
__device__ __noinline__ FarStates finish_far_rows(const Parameters &p, long long b, long long n, int first_t,
                                                  RowSums sums) {
    constexpr int ROW_SLOTS = row_slots<ROWS>();
    const Sequence sequence = sequence_of<true>(p, b);
    const int row_count = min(ROWS, sequence.queries - first_t);
    const auto logsumexp_of_slot = [&](int r) {
        const int row = row_at<ROWS>(r);
        if (row >= row_count) return -infinity();
        const real *const lse = reinterpret_cast<const real *>(p.lse.data);
        return lse[b * p.lse.stride[0] + (long long)query_row(sequence, first_t + row) * p.lse.stride[1] +
                   n * p.lse.stride[2]];
    };
    // Rows whose sums are not finite are summed from allowed keys alone: NaN of masked keys reaches them
    // through a bias of -inf or split products.
    unsigned again = 0;
#pragma unroll
    for (int r = 0; r < ROW_SLOTS; ++r) {
        sums.row_sum[r] = sum_of_row(sums.row_sum[r]);
        if (is_far(logsumexp_of_slot(r)) && !is_finite(sums.row_sum[r])) again |= 1u << r;
    }
    // Each row lies within one warp.
#pragma unroll 1
    for (int slot = 0; slot < ROW_SLOTS; ++slot) {
        for (unsigned lanes = __ballot_sync(~0u, leads_row() && (again >> slot & 1)); lanes != 0; lanes &= lanes - 1) {
            const int row = __shfl_sync(~0u, row_at<ROWS>(slot), __ffs(lanes) - 1);
            real maximum, total;
            const Row whole = row_of(p, sequence, b, n, first_t + row);
            exact_softmax(p, whole, b, n, whole.low, whole.high, maximum, total);
            // From the shift of its maximum to the maximum itself.
            const Shift shift = shift_of<HALVES>(maximum, power_factor(p));
            total *= change_of(shift, Shift{maximum, 0}, power_factor(p));
#pragma unroll
            for (int r = 0; r < ROW_SLOTS; ++r) {
                if (r != slot || row != row_at<ROWS>(r)) continue;
                sums.row_max[r] = maximum;
                sums.row_sum[r] = total;
            }
        }
    }
    FarStates states;
    states.far = 0;
#pragma unroll
    for (int r = 0; r < ROW_SLOTS; ++r) {
        const real logsumexp = logsumexp_of_slot(r);
        if (!is_far(logsumexp)) continue;
        State state = state_of_logsumexp(p, logsumexp, 0);
        state_of_sums(p, n, sums.row_max[r], sums.row_sum[r], logsumexp, state);
        if (leads_row()) {
            const long long place = scratch_row(p, sequence, b, n, first_t + row_at<ROWS>(r));
            scores_of_states(p)[place] = state.score;
            p.row_offsets[place] = state.offset;
        }
        states.far |= 1u << r;
        states.scores[r] = state.score;
        states.offsets[r] = state.offset;
    }
    return states;
}
