// Loads of the kernel for the gradients of keys and values: keys and values once, tiles of queries and d_out
// in a ring of STAGES. On warpgroups, half of the producer threads load keys and queries, the others values
// and d_out; elsewhere all threads load.
// Needs: fused/backward/keys/scheduler.cuh, fused/backward/gradients.cuh, fused/pipeline.cuh.

// Numbers that a tile of queries comes with: offset and row term per row, whether the head has far rows, and
// 12 or 24 bytes that keep the next ones aligned.
constexpr int NUMBERS = 2 * ROWS + 4;

constexpr int QUERY_TILE = tile_size<ROWS, HEAD>(), D_OUT_TILE = tile_size<ROWS, VALUE>();

struct SharedKeys {
    element *key, *value, *queries, *d_outs;
    // NUMBERS per stage.
    real *numbers;
    // Behind all: mbarriers on warpgroups, elsewhere what gemm_rs exchanges between threads.
    real *workspace;
};

__device__ inline SharedKeys shared_keys(unsigned char *memory) {
    SharedKeys shared;
    shared.key = reinterpret_cast<element *>(memory);
    shared.value = shared.key + tile_size<KEYS, HEAD>();
    shared.queries = shared.value + tile_size<KEYS, VALUE>();
    shared.d_outs = shared.queries + STAGES * QUERY_TILE;
    shared.numbers = reinterpret_cast<real *>(shared.d_outs + STAGES * D_OUT_TILE);
    shared.workspace = shared.numbers + STAGES * NUMBERS;
    return shared;
}

__device__ inline void load_keys(const Parameters &p, const KeyTile &tile, const SharedKeys &shared) {
    load_key_rows<KEYS, HEAD, KeysDown>(shared.key, p.key, tile.sequence, tile.b, tile.key_head, tile.first, tile.end,
                                        p.head_dim, p.aligned & ALIGNED_KEY);
}

__device__ inline void load_values(const Parameters &p, const KeyTile &tile, const SharedKeys &shared) {
    load_key_rows<KEYS, VALUE, KeysDown>(shared.value, p.value, tile.sequence, tile.b, tile.key_head, tile.first,
                                         tile.end, p.value_head_dim, p.aligned & ALIGNED_VALUE);
}

__device__ inline void load_queries(const Parameters &p, const KeyTile &tile, const SharedKeys &shared, int stage,
                                    long long n, int t) {
    load_query_rows<ROWS, HEAD>(shared.queries + stage * QUERY_TILE, p.query, tile.sequence, tile.b, n, t, tile.to,
                                p.head_dim, p.aligned & ALIGNED_QUERY);
}

// With the numbers of the rows.
__device__ inline void load_d_out(const Parameters &p, const KeyTile &tile, const SharedKeys &shared, int stage,
                                  long long n, int t) {
    load_query_rows<ROWS, VALUE>(shared.d_outs + stage * D_OUT_TILE, p.d_out, tile.sequence, tile.b, n, t, tile.to,
                                 p.value_head_dim, p.aligned & ALIGNED_D_OUT);
    real *const numbers = shared.numbers + stage * NUMBERS;
    const long long place = scratch_row(p, tile.sequence, tile.b, n, t);
    if (loading_thread() == 0) cp_async_number(numbers + 2 * ROWS, far_heads(p) + tile.b * p.query_heads + n);
    for (int row = loading_thread(); row < ROWS; row += LOADING_THREADS) {
        if (t + row < tile.to) {
            cp_async_number(numbers + row, p.row_offsets + place + row);
            cp_async_number(numbers + ROWS + row, p.row_deltas + place + row);
        } else {
            numbers[row] = -infinity();
            numbers[ROWS + row] = 0;
        }
    }
}

// Queries and d_out of a step of the loop, by all threads.
__device__ inline void load_step(const Parameters &p, const KeyTile &tile, const SharedKeys &shared, int step,
                                 long long n, int t) {
    load_queries(p, tile, shared, step % STAGES, n, t);
    load_d_out(p, tile, shared, step % STAGES, n, t);
    cp_async_commit();
}

#if ON_WARPGROUPS

// All that a producer thread does that has keys and queries, or else values and d_out.
__device__ inline void load_operands(const Parameters &p, const KeyTile &tile, const SharedKeys &shared,
                                     const RingPipeline &pipeline, bool has_queries) {
    if (has_queries)
        load_keys(p, tile, shared);
    else
        load_values(p, tile, shared);
    mbarrier_arrive_after_copies(pipeline.once_full);
    int step = 0;
    for (long long n = tile.key_head * p.group; n < (tile.key_head + 1) * p.group; ++n) {
        for (int t = tile.from; t < tile.to; t += ROWS, ++step) {
            const int stage = step % STAGES;
            if (has_queries) prefetch_mask_and_bias<ROWS, KEYS>(p, tile.b, n, t, tile.first);
            mbarrier_wait(pipeline.empty + stage, step / STAGES - 1);
            if (has_queries)
                load_queries(p, tile, shared, stage, n, t);
            else
                load_d_out(p, tile, shared, stage, n, t);
            mbarrier_arrive_after_copies(pipeline.full + stage);
        }
    }
}

__device__ inline void produce(const Parameters &p, const KeyTile &tile, const SharedKeys &shared,
                               const RingPipeline &pipeline) {
    const bool has_queries = threadIdx.x < THREADS + LOADING_THREADS;
    if (tile.steps == 0) return;
    load_operands(p, tile, shared, pipeline, has_queries);
}

#endif
