// Loads of the forward kernel, from global to shared memory. On warpgroups (wgmma), producer threads of their
// own run them, two tiles of keys and values ahead of the consumers; elsewhere all threads do.
// Needs: fused/forward/pages.cuh, fused/forward/widen.cuh, fused/fragments.cuh, fused/pipeline.cuh.

// Tiles of keys, and of values, in shared memory.
constexpr int STAGES_OF_KEYS = ON_WARPGROUPS ? 2 : 1;
constexpr int KEY_TILE = tile_size<KEYS, HEAD>(), VALUE_TILE = tile_size<KEYS, VALUE>();

#if EIGHT_BIT
// Whether keys and values take turns in one tile, which leaves room for more blocks: of one warp, to which a
// barrier is nothing.
constexpr bool SHARES_TILE = WARPS == 1;
#endif

struct SharedTiles {
    element *query, *key, *value;
#if EIGHT_BIT
    // Behind the tiles.
    Staged<HEAD> *staged_key;
    Staged<VALUE> *staged_value;
#endif
    // Behind the tiles: mbarriers on warpgroups, elsewhere what gemm_rs exchanges between threads.
    real *workspace;
};

__device__ inline SharedTiles shared_tiles(unsigned char *memory) {
    SharedTiles shared;
    shared.query = reinterpret_cast<element *>(memory);
    shared.key = shared.query + tile_size<ROWS, HEAD>();
    shared.value = shared.key + STAGES_OF_KEYS * KEY_TILE;
#if EIGHT_BIT
    if constexpr (SHARES_TILE) shared.value = shared.key;
    element *const end =
        SHARES_TILE ? shared.key + max(KEY_TILE, VALUE_TILE) : shared.value + STAGES_OF_KEYS * VALUE_TILE;
    shared.staged_key = reinterpret_cast<Staged<HEAD> *>(end);
    shared.staged_value = reinterpret_cast<Staged<VALUE> *>(shared.staged_key + 1);
    shared.workspace = reinterpret_cast<real *>(shared.staged_value + 1);
#else
    shared.workspace = reinterpret_cast<real *>(shared.value + STAGES_OF_KEYS * VALUE_TILE);
#endif
    return shared;
}

__device__ inline void load_queries(const Parameters &p, const ForwardTile &tile, element *to) {
    if (p.pack_gqa == 1) {
        load_query_rows<ROWS, HEAD>(to, p.query, tile.sequence, tile.b, tile.first_head, tile.first_row,
                                    tile.sequence.queries, p.head_dim, p.aligned & ALIGNED_QUERY);
        return;
    }
    load_tile<ROWS, HEAD>(
        to,
        [&](int row) {
            const int t = tile.t_of(p, tile.first_row + row);
            return t < tile.sequence.queries
                       ? at(p.query, tile.b, query_row(tile.sequence, t), tile.head_of(p, tile.first_row + row))
                       : (const element *)nullptr;
        },
        p.head_dim, p.query.stride[3], p.aligned & ALIGNED_QUERY, p.query.data);
}

// Keys, and values, from `first` on, whose pages are given.
#if EIGHT_BIT

__device__ inline void stage_keys(const Parameters &p, const ForwardTile &tile, int first, const KeyPages &pages,
                                  const SharedTiles &shared) {
    stage_rows<HEAD>(p, *shared.staged_key, p.key, tile, pages, first, p.head_dim, p.aligned & ALIGNED_KEY, 0);
    cp_async_commit();
}

__device__ inline void stage_values(const Parameters &p, const ForwardTile &tile, int first, const KeyPages &pages,
                                    const SharedTiles &shared) {
    stage_rows<VALUE>(p, *shared.staged_value, p.value, tile, pages, first, tile.width, p.aligned & ALIGNED_VALUE,
                      tile.first_column);
    cp_async_commit();
}

#else

__device__ inline void load_keys(const Parameters &p, const ForwardTile &tile, int first, const KeyPages &pages,
                                 element *to) {
#if LAYOUT == LAYOUT_PAGED
    load_pages<HEAD>(p, to, p.key, pages, tile.b, tile.key_head, first, tile.sequence.keys, p.head_dim,
                     p.aligned & ALIGNED_KEY, 0);
#else
    load_key_rows<KEYS, HEAD, KeysAcross>(to, p.key, tile.sequence, tile.b, tile.key_head, first, tile.sequence.keys,
                                          p.head_dim, p.aligned & ALIGNED_KEY);
#endif
}

__device__ inline void load_values(const Parameters &p, const ForwardTile &tile, int first, const KeyPages &pages,
                                   element *to) {
#if LAYOUT == LAYOUT_PAGED
    load_pages<VALUE>(p, to, p.value, pages, tile.b, tile.key_head, first, tile.sequence.keys, tile.width,
                      p.aligned & ALIGNED_VALUE, tile.first_column);
#else
    load_key_rows<KEYS, VALUE, KeysAcross>(to, p.value, tile.sequence, tile.b, tile.key_head, first,
                                           tile.sequence.keys, tile.width, p.aligned & ALIGNED_VALUE,
                                           tile.first_column);
#endif
}

#endif

#if ON_WARPGROUPS

// For each of the two stages of keys and of values, an mbarrier on which consumers wait for the tile
// (`full`), and one on which producers wait for its last reader (`empty`).
struct ForwardPipeline {
    Mbarrier *query_full, *key_full, *key_empty, *value_full, *value_empty;
};

// Initialised by one thread, for all threads of the block, which meet here.
__device__ inline ForwardPipeline forward_pipeline(const SharedTiles &shared) {
    ForwardPipeline pipeline;
    pipeline.query_full = reinterpret_cast<Mbarrier *>(shared.workspace);
    pipeline.key_full = pipeline.query_full + 1;
    pipeline.key_empty = pipeline.key_full + 2;
    pipeline.value_full = pipeline.key_empty + 2;
    pipeline.value_empty = pipeline.value_full + 2;
    if (threadIdx.x == 0) {
        mbarrier_init(pipeline.query_full, LOADING_THREADS);
        for (int stage = 0; stage < 2; ++stage) {
            mbarrier_init(pipeline.key_full + stage, LOADING_THREADS);
            mbarrier_init(pipeline.value_full + stage, LOADING_THREADS);
            mbarrier_init(pipeline.key_empty + stage, WARPS);
            mbarrier_init(pipeline.value_empty + stage, WARPS);
        }
    }
    __syncthreads();
    return pipeline;
}

#if EIGHT_BIT

// All that a producer thread does: half of them load keys, the others queries and values. Bytes of the next
// tile are copied while those of this one wait for a stage.
__device__ inline void produce(const Parameters &p, const ForwardTile &tile, const SharedTiles &shared,
                               const ForwardPipeline &pipeline) {
    if (tile.from >= tile.to) return;
    const KeyPages pages = pages_of(p, tile, tile.from);
    if (threadIdx.x < THREADS + LOADING_THREADS) {
        stage_keys(p, tile, tile.from, pages, shared);
        for (int first = tile.from, step = 0; first < tile.to; first += KEYS, ++step) {
            const KeyPages next = pages_of(p, tile, first + KEYS);
            if (p.pack_gqa == 1) prefetch_mask_and_bias<ROWS, KEYS>(p, tile.b, tile.first_head, tile.first_row, first);
            cp_async_wait<0>();
            mbarrier_wait(pipeline.key_empty + step % 2, step / 2 - 1);
            widen_tile<HEAD>(*shared.staged_key, shared.key + step % 2 * KEY_TILE);
            mbarrier_arrive_after_copies(pipeline.key_full + step % 2);
            if (first + KEYS < tile.to) stage_keys(p, tile, first + KEYS, next, shared);
        }
    } else {
        load_queries(p, tile, shared.query);
        mbarrier_arrive_after_copies(pipeline.query_full);
        stage_values(p, tile, tile.from, pages, shared);
        for (int first = tile.from, step = 0; first < tile.to; first += KEYS, ++step) {
            const KeyPages next = pages_of(p, tile, first + KEYS);
            cp_async_wait<0>();
            mbarrier_wait(pipeline.value_empty + step % 2, step / 2 - 1);
            widen_tile<VALUE>(*shared.staged_value, shared.value + step % 2 * VALUE_TILE);
            mbarrier_arrive_after_copies(pipeline.value_full + step % 2);
            if (first + KEYS < tile.to) stage_values(p, tile, first + KEYS, next, shared);
        }
    }
}

#else

// All that a producer thread does: half of them load keys, the others queries and values.
__device__ inline void produce(const Parameters &p, const ForwardTile &tile, const SharedTiles &shared,
                               const ForwardPipeline &pipeline) {
    KeyPages pages = pages_of(p, tile, tile.from);
    if (threadIdx.x < THREADS + LOADING_THREADS) {
        for (int first = tile.from, step = 0; first < tile.to; first += KEYS, ++step) {
            const KeyPages next = pages_of(p, tile, first + KEYS);
            if (p.pack_gqa == 1) prefetch_mask_and_bias<ROWS, KEYS>(p, tile.b, tile.first_head, tile.first_row, first);
            mbarrier_wait(pipeline.key_empty + step % 2, step / 2 - 1);
            load_keys(p, tile, first, pages, shared.key + step % 2 * KEY_TILE);
            mbarrier_arrive_after_copies(pipeline.key_full + step % 2);
            pages = next;
        }
    } else if (tile.from < tile.to) {
        load_queries(p, tile, shared.query);
        mbarrier_arrive_after_copies(pipeline.query_full);
        for (int first = tile.from, step = 0; first < tile.to; first += KEYS, ++step) {
            const KeyPages next = pages_of(p, tile, first + KEYS);
            mbarrier_wait(pipeline.value_empty + step % 2, step / 2 - 1);
            load_values(p, tile, first, pages, shared.value + step % 2 * VALUE_TILE);
            mbarrier_arrive_after_copies(pipeline.value_full + step % 2);
            pages = next;
        }
    }
}

#endif

#endif
