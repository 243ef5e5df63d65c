// All three gradients, of queries, keys and values, from five products a tile. One block to a tile of keys of
// a key/value head: it goes over the query rows of all heads of the group, as the kernel for the gradients of
// keys and values does, and adds its part of the gradient of queries to a sum in global memory, in its turn
// (turns.cuh). For warpgroups, and head dimensions up to 128.
// Needs: fused/backward/one_pass/consumer.cuh, fused/backward/keys/epilogue.cuh.
//
// Logits are computed transposed, keys by queries, so that probabilities and gradients of logits are operands
// of the gradients of values and keys without leaving registers. For the gradient of queries, the gradients of
// logits go through shared memory, since they are summed over the keys of both consumer warpgroups.

extern "C" __global__ void __launch_bounds__(BLOCK, MIN_BLOCKS)
    attention_gradients(const __grid_constant__ Parameters p) {
#if ON_WARPGROUPS
    extern __shared__ __align__(1024) unsigned char memory[];
    const SharedOnePass shared = shared_one_pass(memory);
    unsigned ticket;
    const OnePassPipeline pipeline = one_pass_pipeline(p, shared.operands.workspace, ticket);
    const KeyTile tile = key_tile<true>(p, ticket);
#if LAYOUT == LAYOUT_PACKED
    if (tile.b < 0) return;
#endif
    if (threadIdx.x >= THREADS) {
        warpgroup_reg_dealloc();
        produce(p, tile, shared, pipeline);
        return;
    }
    warpgroup_reg_alloc();
    KeySums sums;
    consume(p, tile, shared, pipeline, sums);
    store_gradients(p, tile, sums, memory);
#endif
}
