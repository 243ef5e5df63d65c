// The gradient of queries. One block to a tile of query rows of a head, which goes over the keys that they
// see. STAGES is the number of tiles of keys, and of values, in shared memory.
// Needs: fused/backward/queries/epilogue.cuh.
//
// Where the tile has a far row (gradients.cuh), the block goes over the keys twice, first for the sums of
// such rows. It leaves those in scratch for the kernels behind it, and marks its head. Where the gradient is
// not wanted, that is all that it does.

extern "C" __global__ void __launch_bounds__(BLOCK, MIN_BLOCKS)
    attention_gradient_of_queries(const __grid_constant__ Parameters p) {
    extern __shared__ __align__(1024) unsigned char memory[];
    const SharedQueries shared = shared_queries(memory);
    const QueryTile tile = query_tile_of_block(p);
#if LAYOUT == LAYOUT_PACKED
    if (tile.b < 0) return;
#endif
    const bool wants_gradient = p.d_query.data != nullptr;
    if (!wants_gradient) {
        bool any_far = false;
        for (int row = threadIdx.x; row < ROWS; row += BLOCK) any_far |= is_far_row(p, tile, row);
        if (!__syncthreads_or(any_far)) return;
    }
    QueryRows state;
#if ON_WARPGROUPS
    if (threadIdx.x == 0) *shared.has_far = 0;
    const RingPipeline pipeline = ring_pipeline(shared.workspace, WARPS);
    if (threadIdx.x >= THREADS) {
        warpgroup_reg_dealloc();
        produce(p, tile, shared, pipeline, wants_gradient);
        return;
    }
    warpgroup_reg_alloc();
#else
    const RingPipeline pipeline{};
#endif
    begin_rows(p, tile, shared, state);
    const bool is_far_tile = begin_tile(p, tile, shared, pipeline);
    if (__builtin_expect(is_far_tile, 0)) {
        sum_far_rows(p, tile, shared, pipeline, state);
        if (!wants_gradient) return;
        // The rows are the warp's own.
        __syncwarp();
#if !ON_WARPGROUPS
        __syncthreads();
        if (tile.from < tile.to) load_step(p, tile, shared, 0, tile.from);
#endif
    }
    consume(p, tile, shared, pipeline, is_far_tile, state);
    store_gradients(p, tile, state, memory);
}
