// The gradients of keys and values. One block to a tile of keys of a key/value head: it goes over the query
// rows of all heads of the group, so that both gradients are summed in registers, in a fixed order, and
// rounded once.
// Needs: fused/backward/keys/epilogue.cuh.
//
// Logits are computed transposed, keys by queries, so that probabilities and gradients of logits are the left
// operands of the products that follow, without leaving registers. WANTED is 1 for the gradient of keys, 2
// for that of values, 3 for both; STAGES is the number of tiles of queries, and of d_out, in shared memory.

extern "C" __global__ void __launch_bounds__(BLOCK, MIN_BLOCKS)
    attention_gradient_of_keys(const __grid_constant__ Parameters p) {
    extern __shared__ __align__(1024) unsigned char memory[];
    const SharedKeys shared = shared_keys(memory);
    const KeyTile tile = key_tile(p, blockIdx.x);
#if LAYOUT == LAYOUT_PACKED
    if (tile.b < 0) return;
#endif
    KeySums sums;
#if ON_WARPGROUPS
    // Each consumer thread arrives: each reads the rows' numbers itself.
    const RingPipeline pipeline = ring_pipeline(shared.workspace, THREADS);
    if (threadIdx.x >= THREADS) {
        warpgroup_reg_dealloc();
        produce(p, tile, shared, pipeline);
        return;
    }
    warpgroup_reg_alloc();
#else
    const RingPipeline pipeline{};
#endif
    consume(p, tile, shared, pipeline, sums);
    store_gradients(p, tile, sums, memory);
}
