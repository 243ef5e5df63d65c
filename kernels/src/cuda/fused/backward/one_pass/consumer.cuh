// The main loop of the kernel for all three gradients.
// Needs: fused/backward/one_pass/producer.cuh, fused/backward/one_pass/weights.cuh.

#if ON_WARPGROUPS

// Stores gradients of logits, as the operand of a product has them, for the product that the other warpgroup
// has a part of too: keys by query rows, 16 keys to a warp.
__device__ inline void store_logit_gradients(element *tile, const FragmentA<ROWS> &gradients) {
    const int row = threadIdx.x / 32 * 16 + lane() % 16, column = lane() / 16 * 8;
#pragma unroll
    for (int k = 0; k < ROWS / 16; ++k) {
        const unsigned to = shared_address(tile + place_of<KEYS, ROWS>(row, 16 * k + column));
        asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(to),
                     "r"(gradients.of[k][0]), "r"(gradients.of[k][1]), "r"(gradients.of[k][2]), "r"(gradients.of[k][3])
                     : "memory");
    }
}

typedef real QueryPart[2][COLUMNS_OF_PART / 4];

// Begins the warpgroup's part of the gradient of the tile's queries: gradients of logits by keys.
__device__ inline void multiply_queries_async(QueryPart &sums, const element *logits, const element *key) {
    const int part = threadIdx.x / 128;
    const unsigned left = ROWS == 128 ? part * KEYS * PANEL_BYTES : 0,
                   right = ROWS == 128   ? 0
                           : HEAD == 128 ? part * KEYS * PANEL_BYTES
                                         : part * COLUMNS_OF_PART * (int)sizeof(element);
    gemm_transposed_async<KEYS, COLUMNS_OF_PART>(sums, smem_descriptor(logits, left, KEYS * PANEL_BYTES),
                                                 smem_descriptor(key, right, KEYS * PANEL_BYTES));
}

// Where a thread's four numbers of index i are among those of a tile in scratch: as threads hold them, so that
// a warp writes and reads 512 bytes at once.
__device__ inline int place_of_sums(int i) { return (i * THREADS + threadIdx.x) * 4; }

__device__ inline void leave_sums(real *tile, const QueryPart &sums) {
#pragma unroll
    for (int i = 0; i < COLUMNS_OF_PART / 8; ++i)
        *reinterpret_cast<float4 *>(tile + place_of_sums(i)) =
            make_float4(sums[0][2 * i], sums[0][2 * i + 1], sums[1][2 * i], sums[1][2 * i + 1]);
}

// Adds the sum of the turns before, which other blocks have left in L2.
__device__ inline void add_sums(const real *from, QueryPart &sums) {
    float4 before[COLUMNS_OF_PART / 8];
#pragma unroll
    for (int i = 0; i < COLUMNS_OF_PART / 8; ++i)
        before[i] = __ldcg(reinterpret_cast<const float4 *>(from + place_of_sums(i)));
#pragma unroll
    for (int i = 0; i < COLUMNS_OF_PART / 8; ++i) {
        sums[0][2 * i] += before[i].x, sums[0][2 * i + 1] += before[i].y;
        sums[1][2 * i] += before[i].z, sums[1][2 * i + 1] += before[i].w;
    }
}

// The gradient of query rows from `t` on, from the sum of all turns. Rows that are not finite may have to be
// computed again (finish.cu).
__device__ inline void store_queries(const Parameters &p, const KeyTile &tile, long long n, int t, long long slot,
                                     const QueryPart &sums) {
    const int part = threadIdx.x / 128;
    const real scale = scale_of_sums(p);
    bool finite = true;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        const int row = t + (ROWS == 128 ? part * ROWS_OF_PART : 0) + threadIdx.x / 32 % 4 * 16 + r * 8 + lane() / 4;
        if (row >= tile.sequence.queries) continue;
        element *const to_row = at(p.d_query, tile.b, query_row(tile.sequence, row), n);
#pragma unroll
        for (int c = 0; c < COLUMNS_OF_PART / 4; c += NEIGHBOURS) {
            finite &= is_finite(sums[r][c]) && is_finite(sums[r][c + 1]);
            store_pair(to_row, (ROWS == 128 ? 0 : part * COLUMNS_OF_PART) + column_at(c), p.head_dim,
                       p.d_query.stride[3], p.aligned & ALIGNED_D_QUERY, sums[r][c] * scale, sums[r][c + 1] * scale);
        }
    }
    if (!finite) non_finite_tiles(p)[slot] = 1;
}

// What a consumer has brought away of its tiles of query rows: the next one, and how many went to shared memory
// and had the last turn.
struct BroughtAway {
    long long n;
    int t, writes, last_turns;
    // Whether sums are left in shared memory that the writer has not been told of.
    bool is_left;
};

// Tells the writer of sums that are left. Behind `fence_shared`, which costs hundreds of cycles, so that one
// serves these and the gradients of logits.
__device__ inline void hand_over(const OnePassPipeline &pipeline, BroughtAway &brought) {
    if (!brought.is_left) return;
    mbarrier_arrive_per_warp(pipeline.sums_full + brought.writes % 2);
    ++brought.writes;
    brought.is_left = false;
}

// Brings a tile's part of the gradient of queries to its sum: to shared memory for the writer, or in the last
// turn, with the sum of the turns before, to the gradient.
__device__ inline void bring_away(const Parameters &p, const KeyTile &tile, const TurnsOfTile &turns,
                                  const SharedOnePass &shared, const OnePassPipeline &pipeline, BroughtAway &brought,
                                  QueryPart &sums) {
    const int t = brought.t;
    if (turns.is_last(t)) {
        const long long slot = query_slot(p, tile.sequence, tile.b, brought.n, t);
        if (!turns.is_first(t)) {
            mbarrier_wait(pipeline.last_turn, brought.last_turns++);
            mbarrier_arrive_per_warp(pipeline.last_turn_seen);
            add_sums(p.query_sums + slot * QUERY_SUMS, sums);
        }
        store_queries(p, tile, brought.n, t, slot, sums);
    } else {
        const int place = brought.writes % 2;
        mbarrier_wait(pipeline.sums_empty + place, brought.writes / 2 - 1);
        leave_sums(shared.query_sums + place * QUERY_SUMS, sums);
        brought.is_left = true;
    }
    brought.t = t + ROWS;
    if (brought.t >= tile.to) {
        brought.t = tile.from;
        ++brought.n;
    }
}

__device__ inline void consume(const Parameters &p, const KeyTile &tile, const SharedOnePass &shared,
                               const OnePassPipeline &pipeline, KeySums &sums) {
    clear_sums(sums);
    if (tile.steps == 0) return;
    const SharedKeys &operands = shared.operands;
    const DropoutWords dropout = dropout_words(p);
    FragmentA<ROWS> weights_fragment, gradients_fragment;
    long long n = tile.key_head * p.group;
    int t = tile.from;
    BroughtAway brought{n, t, 0, 0, false};
    const TurnsOfTile turns(tile);
    mbarrier_wait(pipeline.ring.once_full, 0);
    for (int step = 0; step < tile.steps; ++step) {
        const int stage = step % STAGES, last = (step - 1) % 2;
        const element *const query_tile = operands.queries + stage * QUERY_TILE, *const d_out_tile = operands.d_outs +
                                                                                                     stage * D_OUT_TILE;
        const real *const numbers = operands.numbers + stage * NUMBERS;
        // Behind the last row a bias may hold anything, and behind the last key there is none.
        const bool checked = !turns.sees_all(t);
        real weights[2][column_slots<ROWS>()], gradients[2][column_slots<ROWS>()];
        mbarrier_wait(pipeline.ring.full + stage, step / STAGES);
        const bool has_far = numbers[2 * ROWS] != 0;
        // The part of the queries of the tile before, for which the other warpgroup has had a whole step: so
        // neither waits for the other, and one multiplies while the other has its exponentials. It is brought
        // away beside the first product of this tile.
        if (step > 0) {
            QueryPart query_sums;
            mbarrier_wait(pipeline.logits_full + last, (step - 1) / 2);
            multiply_queries_async(query_sums, shared.logits + last * LOGIT_TILE, operands.key);
            gemm_ss_async<KEYS, ROWS, HEAD, true, true>(weights, operands.key, query_tile);
            warpgroup_wait<1>();
            warpgroup_fence_operand(query_sums);
            mbarrier_arrive_per_warp(pipeline.logits_empty + last);
            bring_away(p, tile, turns, shared, pipeline, brought, query_sums);
        } else {
            gemm_ss_async<KEYS, ROWS, HEAD, true, true>(weights, operands.key, query_tile);
        }
        gemm_ss_async<KEYS, ROWS, VALUE, false, true>(gradients, operands.value, d_out_tile);
        KeyMaskBias<KEYS, ROWS> mask_bias;
        if constexpr (PACKS_MASK || PACKS_BIAS) mask_bias.read(p, tile.b, n, t, tile.first);
        if (IN_TWO_STEPS && !checked && !has_far) {
            warpgroup_wait<1>();
            warpgroup_fence_operand(weights);
            probabilities(p, numbers, weights);
            warpgroup_wait<0>();
            warpgroup_fence_operand(gradients);
            gradients_of_products(p, numbers, weights, gradients);
        } else {
            warpgroup_wait<0>();
            warpgroup_fence_operand(weights);
            warpgroup_fence_operand(gradients);
            if (checked || has_far)
                logit_gradients<Checked, true>(p, dropout, tile, n, t, numbers, has_far, mask_bias, weights, gradients);
            else
                logit_gradients<Unchecked, false>(p, dropout, tile, n, t, numbers, has_far, mask_bias, weights,
                                                  gradients);
        }
        gemm_rs_async<KEYS, ROWS, VALUE>(sums.values, weights, weights_fragment, d_out_tile, operands.workspace);
        pack<ROWS>(gradients_fragment, gradients);
        mbarrier_wait(pipeline.logits_empty + step % 2, step / 2 - 1);
        store_logit_gradients(shared.logits + step % 2 * LOGIT_TILE, gradients_fragment);
        fence_shared();
        mbarrier_arrive_per_warp(pipeline.logits_full + step % 2);
        hand_over(pipeline, brought);
        gemm_rs_async<ROWS, HEAD>(sums.keys, gradients_fragment, query_tile);
        warpgroup_wait<0>();
        warpgroup_fence_operand(sums.keys);
        warpgroup_fence_operand(sums.values);
        mbarrier_arrive_per_warp(pipeline.ring.empty + stage);
        t += ROWS;
        if (t >= tile.to) {
            t = tile.from;
            ++n;
        }
    }
    const int last = tile.steps - 1;
    QueryPart query_sums;
    mbarrier_wait(pipeline.logits_full + last % 2, last / 2);
    multiply_queries_async(query_sums, shared.logits + last % 2 * LOGIT_TILE, operands.key);
    warpgroup_wait<0>();
    warpgroup_fence_operand(query_sums);
    bring_away(p, tile, turns, shared, pipeline, brought, query_sums);
    fence_shared();
    hand_over(pipeline, brought);
}

#endif
