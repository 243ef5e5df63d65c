// The main loop of the kernel for the gradients of keys and values. One loop serves warpgroups, which are fed
// by producer threads, and other architectures, where all threads load.
// Needs: fused/backward/keys/logit_gradients.cuh.

__device__ inline void consume(const Parameters &p, const KeyTile &tile, const SharedKeys &shared,
                               const RingPipeline &pipeline, KeySums &sums) {
    clear_sums(sums);
    if (tile.steps > 0) {
#if ON_WARPGROUPS
        mbarrier_wait(pipeline.once_full, 0);
#else
        load_keys(p, tile, shared);
        load_values(p, tile, shared);
        load_step(p, tile, shared, 0, tile.key_head * p.group, tile.from);
#endif
    }

    const DropoutWords dropout = dropout_words(p);
    FragmentA<ROWS> weights_fragment, gradients_fragment;
    long long n = tile.key_head * p.group;
    int t = tile.from;
    for (int step = 0; step < tile.steps; ++step) {
        const bool ends_head = t + ROWS >= tile.to;
        const long long next_n = ends_head ? n + 1 : n;
        const int next_t = ends_head ? tile.from : t + ROWS;
        const int stage = step % STAGES;
#if ON_WARPGROUPS
        mbarrier_wait(pipeline.full + stage, step / STAGES);
#else
        cp_async_wait<0>();
        __syncthreads();
        if (STAGES > 1 && step + 1 < tile.steps) load_step(p, tile, shared, step + 1, next_n, next_t);
#endif
        const element *query_tile = shared.queries + stage * QUERY_TILE,
                      *d_out_tile = shared.d_outs + stage * D_OUT_TILE;
        const real *numbers = shared.numbers + stage * NUMBERS;
        const int last_t = min(t + ROWS, tile.to) - 1;
        // Behind the last row a bias may hold anything, and behind the last key there is none.
        const bool whole = t + ROWS <= tile.to && tile.first + KEYS <= tile.end;
        const bool checked =
            !whole || first_key(tile.sequence, last_t) > tile.first || end_key(tile.sequence, t) < tile.end;
        const bool has_far = numbers[2 * ROWS] != 0;

        real weights[row_slots<KEYS>()][column_slots<ROWS>()], gradients[row_slots<KEYS>()][column_slots<ROWS>()];
        gemm_ss_async<KEYS, ROWS, HEAD, true>(weights, shared.key, query_tile);
        if constexpr (WANTS_KEYS) gemm_ss_async<KEYS, ROWS, VALUE>(gradients, shared.value, d_out_tile);
        KeyMaskBias<KEYS, ROWS> mask_bias;
        if constexpr (PACKS_MASK || PACKS_BIAS) mask_bias.read(p, tile.b, n, t, tile.first);
        warpgroup_wait<0>();
        warpgroup_fence_operand(weights);
        if constexpr (WANTS_KEYS) warpgroup_fence_operand(gradients);
        if (checked || has_far)
            logit_gradients<Checked, true>(p, dropout, tile, n, t, numbers, has_far, mask_bias, weights, gradients);
        else
            logit_gradients<Unchecked, false>(p, dropout, tile, n, t, numbers, has_far, mask_bias, weights, gradients);
        if constexpr (WANTS_VALUES)
            gemm_rs_async<KEYS, ROWS, VALUE>(sums.values, weights, weights_fragment, d_out_tile, shared.workspace);
        if constexpr (WANTS_KEYS)
            gemm_rs_async<KEYS, ROWS, HEAD>(sums.keys, gradients, gradients_fragment, query_tile, shared.workspace);
        warpgroup_wait<0>();
        warpgroup_fence_operand(sums.keys);
        warpgroup_fence_operand(sums.values);
#if ON_WARPGROUPS
        mbarrier_arrive(pipeline.empty + stage);
#else
        if (STAGES == 1 && step + 1 < tile.steps) {
            __syncthreads();
            load_step(p, tile, shared, step + 1, next_n, next_t);
        }
#endif
        n = next_n;
        t = next_t;
    }
}
