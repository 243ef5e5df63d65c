// The main loop of the forward kernel: products of queries and keys, online softmax, weighted sums of values,
// over the keys of the tile. One version on warpgroups, fed by producer threads, and one for all other
// architectures.
// Needs: fused/forward/producer.cuh, fused/online_softmax.cuh, fused/mma/sm90.cuh.

// What a consumer thread keeps of its rows over the keys: row max and row sum of the softmax, and the sums of
// values.
struct ForwardRows {
    Row rows[row_slots<ROWS>()];
    real row_max[row_slots<ROWS>()], row_sum[row_slots<ROWS>()], outputs[row_slots<ROWS>()][output_slots<VALUE>()];
    DropoutWords dropout;
#if BATCH_INVARIANT
    // Row max and row sum over the splits that this block has merged; the sums of values are in scratch.
    real merged_max[row_slots<ROWS>()], merged_sum[row_slots<ROWS>()];
#endif
};

#if BATCH_INVARIANT
// Ends a split before key `end`, where a block goes over more than one (splits.cuh).
__device__ inline void end_split(const Parameters &p, const ForwardTile &tile, ForwardRows &state, int end);
#endif

// Sets the sums to those of no key.
__device__ inline void clear_sums(ForwardRows &state) {
#pragma unroll
    for (int r = 0; r < row_slots<ROWS>(); ++r) {
        state.row_max[r] = -infinity();
        state.row_sum[r] = 0;
#pragma unroll
        for (int c = 0; c < output_slots<VALUE>(); ++c) state.outputs[r][c] = 0;
    }
}

__device__ inline void begin_rows(const Parameters &p, const ForwardTile &tile, ForwardRows &state) {
    state.dropout = dropout_words(p);
#pragma unroll
    for (int r = 0; r < row_slots<ROWS>(); ++r) {
        const int row = tile.first_row + row_at<ROWS>(r);
        state.rows[r] = row_of(p, tile.sequence, tile.b, tile.head_of(p, row), tile.t_of(p, row));
    }
#if EIGHT_BIT
    const real scale = logit_scale_of(p, tile.b, tile.key_head);
#pragma unroll
    for (int r = 0; r < row_slots<ROWS>(); ++r) state.rows[r].logit_scale = scale;
#endif
    clear_sums(state);
#if BATCH_INVARIANT
#pragma unroll
    for (int r = 0; r < row_slots<ROWS>(); ++r) state.merged_max[r] = -infinity(), state.merged_sum[r] = 0;
#endif
}

// Sets the weights of dropped keys to 0, behind the row sums, which count them.
__device__ inline void apply_dropout(const Parameters &p, const ForwardRows &state, int first,
                                     real (&weights)[row_slots<ROWS>()][column_slots<KEYS>()]) {
    if (!drops(p)) return;
#pragma unroll
    for (int r = 0; r < row_slots<ROWS>(); ++r) {
        const unsigned kept = kept_of_row<KEYS>(p, state.dropout, state.rows[r], first);
#pragma unroll
        for (int c = 0; c < column_slots<KEYS>(); ++c)
            if (!(kept >> c & 1)) weights[r][c] = 0;
    }
}

__device__ inline void read_mask_and_bias(const Parameters &p, const ForwardRows &state, int first,
                                          RowMaskBias<ROWS, KEYS> &mask_bias) {
    if constexpr (PACKS_MASK || PACKS_BIAS) mask_bias.read(p, state.rows, first);
}

// From the products of a tile of keys to weights, in their place. Whether sums of values so far have to be
// multiplied by `scores_scale`. `before_last` as in online_softmax.
template <class BeforeLast>
__device__ inline bool softmax_step(const Parameters &p, const ForwardTile &tile, ForwardRows &state, real factor,
                                    int first, const RowMaskBias<ROWS, KEYS> &mask_bias,
                                    real (&logits)[row_slots<ROWS>()][column_slots<KEYS>()],
                                    real (&scores_scale)[row_slots<ROWS>()], BeforeLast before_last) {
    if (first < tile.all_from || first + KEYS > tile.all_to)
        finish_scores<Checked>(p, state.rows, first, mask_bias, logits);
    else
        finish_scores<Unchecked>(p, state.rows, first, mask_bias, logits);
    const bool rescales =
        online_softmax<HALVES>(logits, factor, state.row_max, state.row_sum, scores_scale, before_last);
    apply_dropout(p, state, first, logits);
    return rescales;
}

__device__ inline void rescale(ForwardRows &state, const real (&scores_scale)[row_slots<ROWS>()]) {
#pragma unroll
    for (int r = 0; r < row_slots<ROWS>(); ++r)
#pragma unroll
        for (int c = 0; c < output_slots<VALUE>(); ++c) state.outputs[r][c] *= scores_scale[r];
}

#if ON_WARPGROUPS

// What a consumer has behind it of its block: tiles that had keys, and tiles of keys.
struct ConsumedTiles {
    int queries, steps;
};

// The product of a tile's weights and values runs beside the softmax of the next one, and, where warpgroups
// take turns, beside that of another warpgroup.
__device__ inline void consume(const Parameters &p, const ForwardTile &tile, const SharedTiles &shared,
                               const ForwardPipeline &pipeline, ForwardRows &state, ConsumedTiles &consumed) {
    const real factor = power_factor(p);
    const int warpgroup = consumer_warpgroup();
    RowMaskBias<ROWS, KEYS> mask_bias;
    real logits[row_slots<ROWS>()][column_slots<KEYS>()], scores_scale[row_slots<ROWS>()];
    FragmentA<KEYS> weights;
    const int from = tile.from, to = tile.to;
    int step = consumed.steps;
    mbarrier_wait(pipeline.query_full, consumed.queries);
    mbarrier_wait(pipeline.key_full + step % 2, step / 2);
    wait_for_turn(warpgroup);
    gemm_ss_async<ROWS, KEYS, HEAD>(logits, shared.query, shared.key + step % 2 * KEY_TILE);
    pass_turn(warpgroup);
    read_mask_and_bias(p, state, from, mask_bias);
    warpgroup_wait<0>();
    warpgroup_fence_operand(logits);
    mbarrier_arrive_per_warp(pipeline.key_empty + step % 2);
    if (from + KEYS >= to) mbarrier_arrive_per_warp(pipeline.query_empty);
    softmax_step(p, tile, state, factor, from, mask_bias, logits, scores_scale, [] {});
    pack<KEYS>(weights, logits);
    ++step;
    for (int first = from + KEYS; first < to; first += KEYS, ++step) {
        const int stage = step % 2, last = stage ^ 1;
        mbarrier_wait(pipeline.key_full + stage, step / 2);
        mbarrier_wait(pipeline.value_full + last, (step - 1) / 2);
        wait_for_turn(warpgroup);
        gemm_ss_async<ROWS, KEYS, HEAD>(logits, shared.query, shared.key + stage * KEY_TILE);
        gemm_rs_async<KEYS, VALUE>(state.outputs, weights, shared.value + last * VALUE_TILE);
        pass_turn(warpgroup);
        read_mask_and_bias(p, state, first, mask_bias);
        warpgroup_wait<1>();
        warpgroup_fence_operand(logits);
        mbarrier_arrive_per_warp(pipeline.key_empty + stage);
        if (first + KEYS >= to) mbarrier_arrive_per_warp(pipeline.query_empty);
#if BATCH_INVARIANT
        if (first % KEYS_PER_SPLIT == 0) {
            warpgroup_wait<0>();
            warpgroup_fence_operand(state.outputs);
            end_split(p, tile, state, first);
        }
#endif
        const bool rescales = softmax_step(p, tile, state, factor, first, mask_bias, logits, scores_scale, [&] {
            // The product of the last tile's weights has ended by now, and their registers are free.
            warpgroup_wait<0>();
            warpgroup_fence_operand(state.outputs);
            warpgroup_fence_operand(weights);
            mbarrier_arrive_per_warp(pipeline.value_empty + last);
        });
        pack<KEYS>(weights, logits);
        if (rescales) rescale(state, scores_scale);
    }
    const int last = (step - 1) % 2;
    mbarrier_wait(pipeline.value_full + last, (step - 1) / 2);
    gemm_rs_async<KEYS, VALUE>(state.outputs, weights, shared.value + last * VALUE_TILE);
    warpgroup_wait<0>();
    warpgroup_fence_operand(state.outputs);
    mbarrier_arrive_per_warp(pipeline.value_empty + last);
    consumed.steps = step;
    ++consumed.queries;
}

#elif READS_BYTES

// A warp alone, which loads and computes. The keys of the next tile are copied once those of this one are
// multiplied, and values likewise.
__device__ inline void consume(const Parameters &p, const ForwardTile &tile, const SharedTiles &shared,
                               ForwardRows &state) {
    const real factor = power_factor(p);
    RowMaskBias<ROWS, KEYS> mask_bias;
    load_queries(p, tile, shared.query);
    const PageStep step = page_step(p);
    KeyPages pages = pages_of(p, tile, tile.from);
    stage_keys(p, tile, tile.from, pages, shared);
    stage_values(p, tile, tile.from, pages, shared);
    pages = next_pages(p, tile, step, pages, tile.from + KEYS);
    for (int first = tile.from; first < tile.to; first += KEYS) {
        // Every step begins as many copies, so that waits count them: those past the last key are of zeros.
        const KeyPages next = next_pages(p, tile, step, pages, first + 2 * KEYS);
        cp_async_wait<1>();
        __syncwarp();
        real logits[row_slots<ROWS>()][column_slots<KEYS>()], scores_scale[row_slots<ROWS>()];
        read_mask_and_bias(p, state, first, mask_bias);
        multiply_keys(logits, shared.query, *shared.staged_key);
        __syncwarp();
        stage_keys(p, tile, first + KEYS, pages, shared);
        if (softmax_step(p, tile, state, factor, first, mask_bias, logits, scores_scale, [] {}))
            rescale_transposed(state.outputs, scores_scale);
        cp_async_wait<1>();
        __syncwarp();
        multiply_values(state.outputs, logits, *shared.staged_value);
        __syncwarp();
        stage_values(p, tile, first + KEYS, pages, shared);
        pages = next;
    }
    cp_async_wait<0>();
    transpose_outputs(state.outputs, reinterpret_cast<real *>(shared.staged_key));
}

#elif EIGHT_BIT

// All threads load and widen. The bytes of the next tile are copied while this one is computed: keys once
// these are widened, and values likewise.
__device__ inline void consume(const Parameters &p, const ForwardTile &tile, const SharedTiles &shared,
                               ForwardRows &state) {
    const real factor = power_factor(p);
    RowMaskBias<ROWS, KEYS> mask_bias;
    load_queries(p, tile, shared.query);
    KeyPages pages = pages_of(p, tile, tile.from);
    stage_keys(p, tile, tile.from, pages, shared);
    stage_values(p, tile, tile.from, pages, shared);
    pages = pages_of(p, tile, tile.from + KEYS);
    for (int first = tile.from; first < tile.to; first += KEYS) {
        // Every step begins as many copies, so that waits count them: those past the last key are of zeros.
        const KeyPages next = pages_of(p, tile, first + 2 * KEYS);
        cp_async_wait<1>();
        widen_tile<HEAD>(*shared.staged_key, shared.key);
        stage_keys(p, tile, first + KEYS, pages, shared);
        const auto widen_values = [&] {
            cp_async_wait<1>();
            widen_tile<VALUE>(*shared.staged_value, shared.value);
            stage_values(p, tile, first + KEYS, pages, shared);
        };
        if constexpr (!SHARES_TILE) widen_values();
        __syncthreads();
        real logits[row_slots<ROWS>()][column_slots<KEYS>()], scores_scale[row_slots<ROWS>()];
        read_mask_and_bias(p, state, first, mask_bias);
        gemm_ss<ROWS, KEYS, HEAD>(logits, shared.query, shared.key);
        if constexpr (SHARES_TILE) {
            __syncthreads();
            widen_values();
        }
        if (softmax_step(p, tile, state, factor, first, mask_bias, logits, scores_scale, [] {}))
            rescale(state, scores_scale);
        if constexpr (SHARES_TILE) __syncthreads();
        gemm_rs<ROWS, KEYS, VALUE>(state.outputs, logits, shared.value, shared.workspace);
        __syncthreads();
        pages = next;
    }
    cp_async_wait<0>();
}

#elif WARPS == 1

#define LOADS_ALONE 1

// A warp alone, which loads and computes. The keys of the next tile are copied once those of this one are
// multiplied, and values likewise: as a rule both are under way, and so few threads have as many bytes under
// way as there is room for.

// Begins the copies of the first tile, and of the queries, which take longer to find than to copy. Returns
// the pages of the second tile.
__device__ inline KeyPages begin_loads(const Parameters &p, const ForwardTile &tile, const SharedTiles &shared) {
    const KeyPages pages = pages_of(p, tile, tile.from);
    load_keys(p, tile, tile.from, pages, shared.key);
    load_values(p, tile, tile.from, pages, shared.value);
    load_queries(p, tile, shared.query);
    cp_async_commit();
    return pages_of(p, tile, tile.from + KEYS);
}

__device__ inline void consume(const Parameters &p, const ForwardTile &tile, const SharedTiles &shared,
                               ForwardRows &state, KeyPages pages) {
    const real factor = power_factor(p);
    RowMaskBias<ROWS, KEYS> mask_bias;
    cp_async_wait<0>();
    for (int first = tile.from; first < tile.to; first += KEYS) {
        // Groups of copies end in the order in which they begin, and every step begins two, the last one
        // without a copy.
        const bool has_next = first + KEYS < tile.to;
        const KeyPages next = pages_of(p, tile, first + 2 * KEYS);
        cp_async_wait<1>();
        __syncwarp();
        real logits[row_slots<ROWS>()][column_slots<KEYS>()], scores_scale[row_slots<ROWS>()];
        read_mask_and_bias(p, state, first, mask_bias);
        gemm_ss<ROWS, KEYS, HEAD>(logits, shared.query, shared.key);
        __syncwarp();
        if (has_next) load_keys(p, tile, first + KEYS, pages, shared.key);
        cp_async_commit();
        if (softmax_step(p, tile, state, factor, first, mask_bias, logits, scores_scale, [] {}))
            rescale(state, scores_scale);
        cp_async_wait<1>();
        __syncwarp();
        gemm_rs<ROWS, KEYS, VALUE>(state.outputs, logits, shared.value, shared.workspace);
        __syncwarp();
        if (has_next) load_values(p, tile, first + KEYS, pages, shared.value);
        cp_async_commit();
        pages = next;
    }
    cp_async_wait<0>();
}

#else

// All threads load the values of a tile beside its logits, and the next keys beside its weighted sums.
__device__ inline void consume(const Parameters &p, const ForwardTile &tile, const SharedTiles &shared,
                               ForwardRows &state) {
    const real factor = power_factor(p);
    RowMaskBias<ROWS, KEYS> mask_bias;
    load_queries(p, tile, shared.query);
    KeyPages pages = pages_of(p, tile, tile.from);
    load_keys(p, tile, tile.from, pages, shared.key);
    cp_async_commit();
    for (int first = tile.from; first < tile.to; first += KEYS) {
        cp_async_wait<0>();
        __syncthreads();
        load_values(p, tile, first, pages, shared.value);
        cp_async_commit();
        pages = pages_of(p, tile, first + KEYS);
        real logits[row_slots<ROWS>()][column_slots<KEYS>()], scores_scale[row_slots<ROWS>()];
        read_mask_and_bias(p, state, first, mask_bias);
        gemm_ss<ROWS, KEYS, HEAD>(logits, shared.query, shared.key);
        cp_async_wait<0>();
        __syncthreads();
        if (first + KEYS < tile.to) {
            load_keys(p, tile, first + KEYS, pages, shared.key);
            cp_async_commit();
        }
#if BATCH_INVARIANT
        if (first > tile.from && first % KEYS_PER_SPLIT == 0) end_split(p, tile, state, first);
#endif
        if (softmax_step(p, tile, state, factor, first, mask_bias, logits, scores_scale, [] {}))
            rescale(state, scores_scale);
        gemm_rs<ROWS, KEYS, VALUE>(state.outputs, logits, shared.value, shared.workspace);
    }
}

#endif
