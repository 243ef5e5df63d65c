// Attention forward: one pass over the keys for a tile of query rows, with an online softmax (Dao,
// FlashAttention-2, arXiv 2307.08691, algorithm 1; Rabe and Staats, arXiv 2112.05682).
// Needs: fused/forward/epilogue.cuh, fused/forward/splits.cuh.
//
// Any dtype, head dimensions up to HEAD and SLICES * VALUE, any strides; compute capability 8.0 for halves.
// ROWS query rows and KEYS keys to a tile. So that few queries keep the device busy, rows of several query
// heads can share a tile (pack GQA), and keys can be split over blocks whose partial results a second kernel
// combines (split-KV, combine.cu).

extern "C" __global__ void __launch_bounds__(BLOCK, MIN_BLOCKS)
    attention_forward(const __grid_constant__ Parameters p) {
    extern __shared__ __align__(1024) unsigned char memory[];
    // The kernel that merges may be made ready: it waits for this one's results.
    if (p.splits > 1) launch_dependents();
    const SharedTiles shared = shared_tiles(memory);
#if ON_WARPGROUPS
    const ForwardPipeline pipeline = forward_pipeline(shared);
    if (threadIdx.x >= THREADS) {
        warpgroup_reg_dealloc();
        produce(p, shared, pipeline);
        return;
    }
    warpgroup_reg_alloc();
    // The first turn is that of the first warpgroup.
    if (consumer_warpgroup() == WARPGROUPS_OF_CONSUMERS - 1) pass_turn(WARPGROUPS_OF_CONSUMERS - 1);
    ConsumedTiles consumed{0, 0};
    for (TilesOfBlock tiles(p); tiles.has_tile(p); tiles.advance(p)) {
#if LAYOUT == LAYOUT_DENSE
        const ForwardTile tile = forward_tile(p, tiles.index);
#else
        const ForwardTile &tile = published_tile(pipeline, tiles.count);
        if (tile.b < 0) break;
#endif
        ForwardRows state;
        begin_rows(p, tile, state);
        if (tile.from < tile.to) consume(p, tile, shared, pipeline, state, consumed);
        finish_tile(p, tile, state, memory);
#if LAYOUT != LAYOUT_DENSE
        release_tile(pipeline, tiles.count);
#endif
    }
#else
    const ForwardTile tile = forward_tile(p, index_of_block(p, blockIdx.x));
    if (LAYOUT == LAYOUT_PACKED && tile.b < 0) return;
    ForwardRows state;
#if LOADS_ALONE
    KeyPages pages;
    if (tile.from < tile.to) pages = begin_loads(p, tile, shared);
    begin_rows(p, tile, state);
    if (tile.from < tile.to) consume(p, tile, shared, state, pages);
#else
    begin_rows(p, tile, state);
    if (tile.from < tile.to) consume(p, tile, shared, state);
#endif
    finish_tile(p, tile, state, memory);
#endif
}
