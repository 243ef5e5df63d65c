// Loads of the forward kernel, from global to shared memory. On warpgroups (wgmma), producer threads of their
// own run them, two tiles of keys and values ahead of the consumers, and on to the block's next tile of query
// rows while consumers finish one; elsewhere all threads do.
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
    element *const end = READS_BYTES   ? shared.key
                         : SHARES_TILE ? shared.key + max(KEY_TILE, VALUE_TILE)
                                       : shared.value + STAGES_OF_KEYS * VALUE_TILE;
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
    stage_rows<HEAD, false>(p, *shared.staged_key, p.key, tile, pages, first, p.head_dim, p.aligned & ALIGNED_KEY, 0);
    cp_async_commit();
}

__device__ inline void stage_values(const Parameters &p, const ForwardTile &tile, int first, const KeyPages &pages,
                                    const SharedTiles &shared) {
    stage_rows<VALUE, READS_BYTES>(p, *shared.staged_value, p.value, tile, pages, first, tile.width,
                                   p.aligned & ALIGNED_VALUE, tile.first_column);
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
    load_key_rows<KEYS, VALUE, KeysAcross>(to, p.value, tile.sequence, tile.b, tile.key_head, first, tile.sequence.keys,
                                           tile.width, p.aligned & ALIGNED_VALUE, tile.first_column);
#endif
}

#endif

#if ON_WARPGROUPS

// For tiles of queries, and for each of the two stages of keys and of values, an mbarrier on which consumers
// wait for the tile (`full`), and one on which producers wait for its last reader (`empty`). And the same for
// what a producer says of the tiles of the block: where their rows are, and which keys they see.
struct ForwardPipeline {
    Mbarrier *query_full, *query_empty, *key_full, *key_empty, *value_full, *value_empty, *tile_full, *tile_empty;
    ForwardTile *tile;
};

// Initialised by one thread, for all threads of the block, which meet here.
__device__ inline ForwardPipeline forward_pipeline(const SharedTiles &shared) {
    ForwardPipeline pipeline;
    pipeline.query_full = reinterpret_cast<Mbarrier *>(shared.workspace);
    pipeline.query_empty = pipeline.query_full + 1;
    pipeline.key_full = pipeline.query_empty + 1;
    pipeline.key_empty = pipeline.key_full + 2;
    pipeline.value_full = pipeline.key_empty + 2;
    pipeline.value_empty = pipeline.value_full + 2;
    pipeline.tile_full = pipeline.value_empty + 2;
    pipeline.tile_empty = pipeline.tile_full + 2;
    pipeline.tile = reinterpret_cast<ForwardTile *>(pipeline.tile_empty + 2);
    static_assert(14 * sizeof(Mbarrier) + 2 * sizeof(ForwardTile) <= 512, "what the host sets aside");
    if (threadIdx.x == 0) {
        mbarrier_init(pipeline.query_full, LOADING_THREADS);
        mbarrier_init(pipeline.query_empty, WARPS);
        for (int stage = 0; stage < 2; ++stage) {
            mbarrier_init(pipeline.key_full + stage, LOADING_THREADS);
            mbarrier_init(pipeline.value_full + stage, LOADING_THREADS);
            mbarrier_init(pipeline.key_empty + stage, WARPS);
            mbarrier_init(pipeline.value_empty + stage, WARPS);
            mbarrier_init(pipeline.tile_full + stage, 1);
            mbarrier_init(pipeline.tile_empty + stage, WARPS);
        }
    }
    __syncthreads();
    return pipeline;
}

// Says to consumers what the block's next tile is. By one producer thread.
__device__ inline void publish_tile(const ForwardPipeline &pipeline, int count, const ForwardTile &tile) {
    mbarrier_wait(pipeline.tile_empty + count % 2, count / 2 - 1);
    pipeline.tile[count % 2] = tile;
    mbarrier_arrive(pipeline.tile_full + count % 2);
}

// The same tile, for a consumer thread, in shared memory: what the main loop does not read takes no register
// there.
__device__ inline const ForwardTile &published_tile(const ForwardPipeline &pipeline, int count) {
    mbarrier_wait(pipeline.tile_full + count % 2, count / 2);
    return pipeline.tile[count % 2];
}
__device__ inline void release_tile(const ForwardPipeline &pipeline, int count) {
    mbarrier_arrive_per_warp(pipeline.tile_empty + count % 2);
}

#if EIGHT_BIT

// Half of the producers load keys, the others queries and values, and widen them: bytes of the next tile are
// copied while those of this one wait for a stage.
constexpr int WARPS_OF_LOADERS = 2;

// `copy` begins the copies of the tile of keys or values behind a key, and `widen` writes those that have
// landed to a stage.
template <class Copy, class Widen>
__device__ inline void produce_tiles(const Parameters &p, const ForwardTile &tile, int, int step, Mbarrier *full,
                                     Mbarrier *empty, Copy copy, Widen widen) {
    copy(tile.from, pages_of(p, tile, tile.from), 0);
    for (int first = tile.from; first < tile.to; first += KEYS, ++step) {
        const KeyPages next = pages_of(p, tile, first + KEYS);
        cp_async_wait<0>();
        mbarrier_wait(empty + step % 2, step / 2 - 1);
        widen(step % 2);
        mbarrier_arrive_after_copies(full + step % 2);
        if (first + KEYS < tile.to) copy(first + KEYS, next, 0);
    }
}

#else

// Two producer warps load keys and two values, and one of each pair every other tile of these: the copies of
// two tiles are under way at once, while each warp waits for its own, fences them, and arrives.
constexpr int WARPS_OF_LOADERS = 1;

// `copy` begins the copies of the tile of keys or values behind a key, to a stage. `loader` is the stage that
// this warp fills.
template <class Copy, class Widen>
__device__ inline void produce_tiles(const Parameters &p, const ForwardTile &tile, int loader, int step, Mbarrier *full,
                                     Mbarrier *empty, Copy copy, Widen) {
    const int skipped = (loader ^ step) & 1;
    step += skipped;
    KeyPages pages = pages_of(p, tile, tile.from + skipped * KEYS);
    for (int first = tile.from + skipped * KEYS; first < tile.to; first += 2 * KEYS, step += 2) {
        const KeyPages next = pages_of(p, tile, first + 2 * KEYS);
        mbarrier_wait(empty + loader, step / 2 - 1);
        copy(first, pages, loader);
        mbarrier_arrive_after_copies(full + loader);
        pages = next;
    }
}

#endif

static_assert(LOADING_THREADS == 32 * WARPS_OF_LOADERS, "LOADERS");

// All that a producer thread does, over the tiles of the block.
__device__ inline void produce(const Parameters &p, const SharedTiles &shared, const ForwardPipeline &pipeline) {
    // Tiles of keys of the block's earlier tiles; and those of its earlier tiles that had any.
    int step = 0, queries = 0;
    const int warp = __shfl_sync(~0u, (threadIdx.x - THREADS) / 32, 0);
    // Queries are always loaded by the same warps, each of which waits for all ends of `query_empty` in order: a
    // wait tells an end from the last but one only.
    const bool loads_keys = warp < 2;
    const int loader = warp % 2;
    for (TilesOfBlock tiles(p); tiles.has_tile(p); tiles.advance(p)) {
        const ForwardTile tile = forward_tile(p, tiles.index);
#if LAYOUT != LAYOUT_DENSE
        if (threadIdx.x == THREADS) publish_tile(pipeline, tiles.count, tile);
        __syncwarp();
        // The schedule of packed rows has no tile from here on.
        if (tile.b < 0) break;
#endif
        if (tile.from >= tile.to) continue;
        if (loads_keys) {
            produce_tiles(
                p, tile, loader, step, pipeline.key_full, pipeline.key_empty,
                [&](int first, const KeyPages &pages, int stage) {
                    if (p.pack_gqa == 1)
                        prefetch_mask_and_bias<ROWS, KEYS>(p, tile.b, tile.first_head, tile.first_row, first);
#if EIGHT_BIT
                    stage_keys(p, tile, first, pages, shared);
#else
                    load_keys(p, tile, first, pages, shared.key + stage * KEY_TILE);
#endif
                },
                [&](int stage) {
#if EIGHT_BIT
                    widen_tile<HEAD>(*shared.staged_key, shared.key + stage * KEY_TILE);
#endif
                });
        } else {
            if (EIGHT_BIT || loader == 1) {
                mbarrier_wait(pipeline.query_empty, queries - 1);
                load_queries(p, tile, shared.query);
                mbarrier_arrive_after_copies(pipeline.query_full);
            }
            produce_tiles(
                p, tile, loader, step, pipeline.value_full, pipeline.value_empty,
                [&](int first, const KeyPages &pages, int stage) {
#if EIGHT_BIT
                    stage_values(p, tile, first, pages, shared);
#else
                    load_values(p, tile, first, pages, shared.value + stage * VALUE_TILE);
#endif
                },
                [&](int stage) {
#if EIGHT_BIT
                    widen_tile<VALUE>(*shared.staged_value, shared.value + stage * VALUE_TILE);
#endif
                });
        }
        ++queries;
        step += (tile.to - tile.from + KEYS - 1) / KEYS;
    }
}

#endif
