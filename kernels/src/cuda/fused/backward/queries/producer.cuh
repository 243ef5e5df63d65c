// Loads of the kernel for the gradient of queries: rows of queries and d_out once, tiles of keys and values
// in a ring of STAGES. On warpgroups, half of the producer threads load queries and keys, the others d_out
// and values; elsewhere all threads load.
// Needs: fused/backward/queries/scheduler.cuh, fused/pipeline.cuh.

// Whether consumers keep what they know of their rows in registers. On warpgroups, beside a bias or a mask,
// there are none to spare: what is read of those for a tile would be stored again, and waited for before the
// products are there.
constexpr bool KEEPS_ROWS = !ON_WARPGROUPS || !(PACKS_MASK || PACKS_BIAS);

// What shared memory has of a row that consumers do not keep: the keys in reach, and where its bias or mask
// begins.
struct Reach {
    int low, high;
    long long mask_bias;
};

// Numbers of a block on warpgroups: whether the tile has a far row, for the producers; 12 bytes that keep the
// next ones aligned; the score of each row; and of rows that consumers do not keep, the offset and row term,
// and the reach. No more than needed: shared memory that is not set aside is cache.
constexpr int NUMBERS =
    !ON_WARPGROUPS ? 0 : 4 + ROWS + (KEEPS_ROWS ? 0 : 2 * ROWS + ROWS * (int)(sizeof(Reach) / sizeof(real)));

constexpr int KEY_TILE = tile_size<KEYS, HEAD>(), VALUE_TILE = tile_size<KEYS, VALUE>();

struct SharedQueries {
    element *query, *d_out, *keys, *values;
    // On warpgroups: whether the tile has a far row, and per row its score, offset, row term and reach.
    real *has_far, *scores, *offsets, *deltas;
    Reach *reach;
    // Behind all: mbarriers on warpgroups, elsewhere what gemm_rs exchanges between threads.
    real *workspace;
};

__device__ inline SharedQueries shared_queries(unsigned char *memory) {
    SharedQueries shared;
    shared.query = reinterpret_cast<element *>(memory);
    shared.d_out = shared.query + tile_size<ROWS, HEAD>();
    shared.keys = shared.d_out + tile_size<ROWS, VALUE>();
    shared.values = shared.keys + STAGES * KEY_TILE;
    shared.has_far = reinterpret_cast<real *>(shared.values + STAGES * VALUE_TILE);
    shared.scores = shared.has_far + 4;
    shared.offsets = shared.scores + ROWS;
    shared.deltas = shared.offsets + ROWS;
    shared.reach = reinterpret_cast<Reach *>(shared.deltas + ROWS);
    shared.workspace = shared.has_far + NUMBERS;
    return shared;
}

__device__ inline void load_queries(const Parameters &p, const QueryTile &tile, const SharedQueries &shared) {
    load_query_rows<ROWS, HEAD>(shared.query, p.query, tile.sequence, tile.b, tile.n, tile.first_t,
                                tile.sequence.queries, p.head_dim, p.aligned & ALIGNED_QUERY);
}

// With the numbers of the rows, on warpgroups.
__device__ inline void load_d_out(const Parameters &p, const QueryTile &tile, const SharedQueries &shared) {
    load_query_rows<ROWS, VALUE>(shared.d_out, p.d_out, tile.sequence, tile.b, tile.n, tile.first_t,
                                 tile.sequence.queries, p.value_head_dim, p.aligned & ALIGNED_D_OUT);
#if ON_WARPGROUPS
    const long long place = scratch_row(p, tile.sequence, tile.b, tile.n, tile.first_t);
    for (int row = loading_thread(); row < ROWS; row += LOADING_THREADS) {
        const bool there = tile.first_t + row < tile.sequence.queries;
        const auto load_number = [&](real *to, const real *from, real otherwise) {
            if (there)
                cp_async_number(to + row, from + row);
            else
                to[row] = otherwise;
        };
        load_number(shared.scores, scores_of_tile(p, tile), 0);
        if (KEEPS_ROWS) continue;
        load_number(shared.offsets, p.row_offsets + place, -infinity());
        load_number(shared.deltas, p.row_deltas + place, 0);
    }
#endif
}

__device__ inline void load_keys(const Parameters &p, const QueryTile &tile, const SharedQueries &shared, int stage,
                                 int first) {
    load_key_rows<KEYS, HEAD, KeysAcross>(shared.keys + stage * KEY_TILE, p.key, tile.sequence, tile.b, tile.key_head,
                                          first, tile.sequence.keys, p.head_dim, p.aligned & ALIGNED_KEY);
}

__device__ inline void load_values(const Parameters &p, const QueryTile &tile, const SharedQueries &shared, int stage,
                                   int first) {
    load_key_rows<KEYS, VALUE, KeysAcross>(shared.values + stage * VALUE_TILE, p.value, tile.sequence, tile.b,
                                           tile.key_head, first, tile.sequence.keys, p.value_head_dim,
                                           p.aligned & ALIGNED_VALUE);
}

// Keys and values of a step of the loop, by all threads.
__device__ inline void load_step(const Parameters &p, const QueryTile &tile, const SharedQueries &shared, int step,
                                 int first) {
    load_keys(p, tile, shared, step % STAGES, first);
    load_values(p, tile, shared, step % STAGES, first);
    cp_async_commit();
}

#if ON_WARPGROUPS

// All that a producer thread does. Keys and values are loaded once more where consumers find far rows and the
// gradient is wanted; the first round is loaded in any case, so producers need not wait to know. Consumers
// set `has_far` before they release the first tile, so that it is known once they have released the last one.
__device__ inline void produce(const Parameters &p, const QueryTile &tile, const SharedQueries &shared,
                               const RingPipeline &pipeline, bool wants_gradient) {
    const bool has_keys = threadIdx.x < THREADS + LOADING_THREADS;
    if (tile.from >= tile.to) return;
    if (has_keys)
        load_queries(p, tile, shared);
    else
        load_d_out(p, tile, shared);
    mbarrier_arrive_after_copies(pipeline.once_full);
    int step = 0;
#pragma unroll 1
    for (bool again = true; again;) {
        const int start = step;
        for (int first = tile.from; first < tile.to; first += KEYS, ++step) {
            const int stage = step % STAGES;
            if (has_keys) prefetch_mask_and_bias<ROWS, KEYS>(p, tile.b, tile.n, tile.first_t, first);
            mbarrier_wait(pipeline.empty + stage, step / STAGES - 1);
            if (has_keys)
                load_keys(p, tile, shared, stage, first);
            else
                load_values(p, tile, shared, stage, first);
            mbarrier_arrive_after_copies(pipeline.full + stage);
        }
        mbarrier_wait(pipeline.empty + (step - 1) % STAGES, (step - 1) / STAGES);
        again = start == 0 && wants_gradient && *shared.has_far != 0;
    }
}

#endif
