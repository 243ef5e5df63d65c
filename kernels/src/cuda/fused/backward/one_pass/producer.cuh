// What the producer warps of the kernel for all three gradients do: two load operands, one writes a tile's
// part of the gradient of queries to its sum in global memory.
// Needs: fused/backward/one_pass/shared.cuh.

#if ON_WARPGROUPS

// Waits until as many blocks have added to the sum, and makes what they wrote visible to this thread, also to
// its bulk copies.
__device__ inline void wait_for_blocks(const unsigned *done, int before) {
    unsigned count;
    do
        asm volatile("ld.acquire.gpu.global.u32 %0, [%1];"
                     : "=r"(count)
                     : "l"(__cvta_generic_to_global(done))
                     : "memory");
    while ((int)count < before);
    asm volatile("fence.proxy.async.global;" ::: "memory");
}

// Stores a tile's sums, or adds them to those in global memory, by one instruction; returns when the tile in
// shared memory may be written again.
__device__ inline void begin_bulk_write(real *to, const real *from, bool adds) {
    constexpr unsigned BYTES = QUERY_SUMS * sizeof(real);
    const unsigned long long global = __cvta_generic_to_global(to);
    if (adds)
        asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(global),
                     "r"(shared_address(from)), "r"(BYTES)
                     : "memory");
    else
        asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(global),
                     "r"(shared_address(from)), "r"(BYTES)
                     : "memory");
    asm volatile("cp.async.bulk.commit_group;" ::: "memory");
    asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
}

// Waits until the write is done, and says so to the blocks behind.
__device__ inline void end_bulk_write(unsigned *done) {
    asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
    asm volatile("fence.proxy.async.global;" ::: "memory");
    asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(__cvta_generic_to_global(done)) : "memory");
}

// By one thread. Turns other than the last write what consumers left in shared memory. In the last turn the
// consumers themselves have the sum, and add that of the turns before.
__device__ inline void write_sums(const Parameters &p, const KeyTile &tile, const SharedOnePass &shared,
                                  const OnePassPipeline &pipeline) {
    int writes = 0, last_turns = 0;
    for (long long n = tile.key_head * p.group; n < (tile.key_head + 1) * p.group; ++n) {
        for (int t = tile.from; t < tile.to; t += ROWS) {
            const QueryTurn turn = query_turn(p, tile, n, t);
            unsigned *const done = blocks_done(p) + turn.slot;
            if (turn.is_last) {
                if (turn.before == 0) continue;
                wait_for_blocks(done, turn.before);
                mbarrier_wait(pipeline.last_turn_seen, last_turns++ - 1);
                mbarrier_arrive(pipeline.last_turn);
                continue;
            }
            const int place = writes % 2;
            if (turn.before > 0) wait_for_blocks(done, turn.before);
            mbarrier_wait(pipeline.sums_full + place, writes / 2);
            begin_bulk_write(p.query_sums + turn.slot * QUERY_SUMS, shared.query_sums + place * QUERY_SUMS,
                             turn.before > 0);
            mbarrier_arrive(pipeline.sums_empty + place);
            end_bulk_write(done);
            ++writes;
        }
    }
}

__device__ inline void produce(const Parameters &p, const KeyTile &tile, const SharedOnePass &shared,
                               const OnePassPipeline &pipeline) {
    const int warp = producer_warp();
    if (tile.steps == 0) return;
    if (warp < LOADING_WARPS)
        load_operands(p, tile, shared.operands, pipeline.ring, warp == 0);
    else if (warp == WRITER && threadIdx.x % 32 == 0)
        write_sums(p, tile, shared, pipeline);
}

#endif
