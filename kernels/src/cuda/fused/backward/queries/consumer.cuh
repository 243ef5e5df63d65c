// The main loop of the kernel for the gradient of queries, and the sums of far rows before it. One loop
// serves warpgroups, which are fed by producer threads, and other architectures, where all threads load.
// Needs: fused/backward/queries/producer.cuh, fused/backward/far_rows.cuh, fused/mma/sm90.cuh.

// What a consumer thread keeps of its rows over the keys.
struct QueryRows {
    Row rows[row_slots<ROWS>()];
    real offsets[row_slots<ROWS>()], deltas[row_slots<ROWS>()];
    real sums[row_slots<ROWS>()][output_slots<HEAD>()];
    DropoutWords dropout;
    // Tiles of keys so far; on warpgroups over both rounds.
    int step;
};

__device__ inline void begin_rows(const Parameters &p, const QueryTile &tile, const SharedQueries &shared,
                                  QueryRows &state) {
    state.dropout = dropout_words(p);
#pragma unroll
    for (int r = 0; r < row_slots<ROWS>(); ++r) {
        const long long t = tile.first_t + row_at<ROWS>(r);
        state.rows[r] = row_of(p, tile.sequence, tile.b, tile.n, t);
        const bool there = KEEPS_ROWS && t < tile.sequence.queries;
        state.offsets[r] = there ? p.row_offsets[scratch_row(p, tile.sequence, tile.b, tile.n, t)] : -infinity();
        state.deltas[r] = there ? p.row_deltas[scratch_row(p, tile.sequence, tile.b, tile.n, t)] : real(0);
    }
#if ON_WARPGROUPS
    if constexpr (!KEEPS_ROWS) {
        for (int row = threadIdx.x; row < ROWS; row += THREADS) {
            const Row whole = row_of(p, tile.sequence, tile.b, tile.n, tile.first_t + row);
            shared.reach[row] = Reach{whole.low, whole.high, PACKS_BIAS ? whole.bias : whole.mask};
        }
        consumer_sync();
    }
#endif
    state.step = 0;
}

// Sets in `again` what is known of the thread's rows: where their bias or mask begins, or the keys in reach.
__device__ inline void read_rows(const SharedQueries &shared, const QueryRows &state, Row (&again)[row_slots<ROWS>()],
                                 bool reach) {
#pragma unroll
    for (int r = 0; r < row_slots<ROWS>(); ++r) {
        if (KEEPS_ROWS) again[r] = state.rows[r];
#if ON_WARPGROUPS
        const Reach &here = shared.reach[row_at<ROWS>(r)];
        if (!KEEPS_ROWS && reach) again[r].low = here.low, again[r].high = here.high;
        if (!KEEPS_ROWS && !reach) again[r].bias = again[r].mask = here.mask_bias;
#endif
    }
}

// The state of the row in slot r, with its score where it may be far.
__device__ inline State state_of_slot(const Parameters &p, const QueryTile &tile, const SharedQueries &shared,
                                      const QueryRows &state, int r, bool may_be_far) {
    const int row = row_at<ROWS>(r);
#if ON_WARPGROUPS
    const real score = may_be_far ? shared.scores[row] : real(0);
    if (!KEEPS_ROWS) return State{score, shared.offsets[row], shared.deltas[row]};
    return State{score, state.offsets[r], state.deltas[r]};
#else
    const bool has_score = may_be_far && state.offsets[r] > -infinity();
    return State{has_score ? scores_of_tile(p, tile)[row] : real(0), state.offsets[r], state.deltas[r]};
#endif
}

// From products of queries and keys, and of d_out and values, to the gradients of the products, in the place
// of the second.
//
// Tiles with far rows take the checked version, not a third one, which would make the loop over tiles longer
// for all calls: short calls wait for instructions to be fetched.
template <class Check, bool MAY_BE_FAR>
__device__ inline void logit_gradients(const Parameters &p, const QueryTile &tile, const SharedQueries &shared,
                                       const QueryRows &state, const Row (&rows)[row_slots<ROWS>()], bool is_far_tile,
                                       int first, const RowMaskBias<ROWS, KEYS> &mask_bias,
                                       const real (&products)[row_slots<ROWS>()][column_slots<KEYS>()],
                                       real (&gradients)[row_slots<ROWS>()][column_slots<KEYS>()]) {
#pragma unroll
    for (int r = 0; r < row_slots<ROWS>(); ++r) {
        const unsigned kept = drops(p) ? kept_of_row<KEYS>(p, state.dropout, rows[r], first) : ~0u;
        const real distance = distance_of(p, rows[r], first + key_at(0));
        const State of_row = state_of_slot(p, tile, shared, state, r, MAY_BE_FAR && is_far_tile);
        const real largest = MAY_BE_FAR ? computed_here(largest_exponent(of_row)) : infinity();
#pragma unroll
        for (int c = 0; c < column_slots<KEYS>(); ++c)
            gradients[r][c] =
                weigh<Check, MAY_BE_FAR, false>(p, rows[r], first + key_at(c), distance - key_offset(c), mask_bias, r,
                                                c, kept >> c & 1, products[r][c], gradients[r][c], of_row, largest)
                    .product;
    }
}

// The softmax of the tile's far rows once more, from the products that the gradients are made of
// (far_rows.cuh): a round over the keys of its own. States of far rows are replaced here and in scratch, for
// the kernels behind this one.
__device__ inline void sum_far_rows(const Parameters &p, const QueryTile &tile, const SharedQueries &shared,
                                    const RingPipeline &pipeline, QueryRows &state) {
#if ON_WARPGROUPS
    // Scores change below, once every warp has looked at them.
    consumer_sync();
    if (threadIdx.x % 32 == 0) *shared.has_far = 1;
#endif
    if (threadIdx.x == 0) far_heads(p)[tile.b * p.query_heads + tile.n] = 1;
    RowSums sums;
#pragma unroll
    for (int r = 0; r < row_slots<ROWS>(); ++r) {
        sums.row_max[r] = -infinity();
        sums.row_sum[r] = 0;
    }
#pragma unroll 1
    for (int first = tile.from; first < tile.to; first += KEYS) {
#if ON_WARPGROUPS
        const int stage = state.step % STAGES;
        mbarrier_wait(pipeline.full + stage, state.step / STAGES);
        sum_tile(p, state.rows, first, shared.query, shared.keys + stage * KEY_TILE, sums.row_max, sums.row_sum);
        mbarrier_arrive_per_warp(pipeline.empty + stage);
        ++state.step;
#else
        if (first > tile.from) {
            __syncthreads();
            load_keys(p, tile, shared, 0, first);
            cp_async_commit();
        }
        cp_async_wait<0>();
        __syncthreads();
        sum_tile(p, state.rows, first, shared.query, shared.keys, sums.row_max, sums.row_sum);
#endif
    }
    const FarStates states = finish_far_rows(p, tile.b, tile.n, tile.first_t, sums);
#pragma unroll
    for (int r = 0; r < row_slots<ROWS>(); ++r) {
        if (!(states.far >> r & 1)) continue;
        state.offsets[r] = states.offsets[r];
#if ON_WARPGROUPS
        shared.scores[row_at<ROWS>(r)] = states.scores[r];
        if (!KEEPS_ROWS) shared.offsets[row_at<ROWS>(r)] = states.offsets[r];
#endif
    }
}

// The first loads, or the wait for those of the producers, and whether the tile has a far row.
__device__ inline bool begin_tile(const Parameters &p, const QueryTile &tile, const SharedQueries &shared,
                                  const RingPipeline &pipeline) {
    bool any_far = false;
#if ON_WARPGROUPS
    if (tile.from < tile.to) {
        mbarrier_wait(pipeline.once_full, 0);
        // Each warp looks at all rows.
        for (int row = threadIdx.x % 32; row < ROWS; row += 32) any_far |= shared.scores[row] != 0;
    }
    return __any_sync(~0u, any_far);
#else
    for (int row = threadIdx.x; row < ROWS; row += THREADS) any_far |= is_far_row(p, tile, row);
    if (tile.from < tile.to) {
        load_queries(p, tile, shared);
        load_d_out(p, tile, shared);
        load_step(p, tile, shared, 0, tile.from);
    }
    return __syncthreads_or(any_far);
#endif
}

__device__ inline void consume(const Parameters &p, const QueryTile &tile, const SharedQueries &shared,
                               const RingPipeline &pipeline, bool is_far_tile, QueryRows &state) {
#pragma unroll
    for (int r = 0; r < row_slots<ROWS>(); ++r)
#pragma unroll
        for (int c = 0; c < output_slots<HEAD>(); ++c) state.sums[r][c] = 0;
    FragmentA<KEYS> fragment;
    for (int first = tile.from; first < tile.to; first += KEYS, ++state.step) {
        const int stage = state.step % STAGES;
#if ON_WARPGROUPS
        mbarrier_wait(pipeline.full + stage, state.step / STAGES);
#else
        cp_async_wait<0>();
        __syncthreads();
        if (STAGES > 1 && first + KEYS < tile.to) load_step(p, tile, shared, state.step + 1, first + KEYS);
#endif
        const element *key_tile = shared.keys + stage * KEY_TILE;
        const bool checked = first < tile.all_from || first + KEYS > tile.all_to;
        real products[row_slots<ROWS>()][column_slots<KEYS>()], gradients[row_slots<ROWS>()][column_slots<KEYS>()];
        gemm_ss_async<ROWS, KEYS, HEAD>(products, shared.query, key_tile);
        gemm_ss_async<ROWS, KEYS, VALUE>(gradients, shared.d_out, shared.values + stage * VALUE_TILE);
        RowMaskBias<ROWS, KEYS> mask_bias;
        Row rows[row_slots<ROWS>()];
        read_rows(shared, state, rows, false);
        if constexpr (PACKS_MASK || PACKS_BIAS) mask_bias.read(p, rows, first);
        warpgroup_wait<0>();
        warpgroup_fence_operand(products);
        warpgroup_fence_operand(gradients);
        read_rows(shared, state, rows, true);
        if (checked || is_far_tile)
            logit_gradients<Checked, true>(p, tile, shared, state, rows, is_far_tile, first, mask_bias, products,
                                           gradients);
        else
            logit_gradients<Unchecked, false>(p, tile, shared, state, rows, is_far_tile, first, mask_bias, products,
                                              gradients);
        gemm_rs_async<ROWS, KEYS, HEAD>(state.sums, gradients, fragment, key_tile, shared.workspace);
        warpgroup_wait<0>();
        warpgroup_fence_operand(state.sums);
#if ON_WARPGROUPS
        mbarrier_arrive_per_warp(pipeline.empty + stage);
#else
        if (STAGES == 1 && first + KEYS < tile.to) {
            __syncthreads();
            load_step(p, tile, shared, state.step + 1, first + KEYS);
        }
#endif
    }
}
