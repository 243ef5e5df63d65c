// Shared memory and barriers of the kernel for all three gradients.
// Needs: fused/backward/keys/producer.cuh, fused/backward/one_pass/turns.cuh.

#if ON_WARPGROUPS

static_assert(WARPS == 8 && KEYS == 128, "two consumer warpgroups, 64 keys each");
static_assert(ROWS == 64 || ROWS == 128 && HEAD == 64, "a warpgroup's part of the gradient of queries");

// Gradients of logits of a tile, keys by query rows: a warpgroup stores those of the next tile while the other
// one still multiplies this one. And a tile's part of the gradient of queries, on its way to the sum in global
// memory. Of both, two take turns.
constexpr int LOGIT_TILE = tile_size<KEYS, ROWS>();
constexpr int QUERY_SUMS = ROWS * HEAD;

// Which consumer warpgroup has which part of the gradient of queries: 64 rows each, or half of the columns.
constexpr int ROWS_OF_PART = 64, COLUMNS_OF_PART = ROWS == 128 ? HEAD : HEAD / 2;

struct SharedOnePass {
    SharedKeys operands;
    element *logits;
    real *query_sums;
};

// Barriers, beside those of the ring. Consumers fill `query_sums`, and the writer empties it. Consumers that
// have the last turn wait for `last_turn` until they may read the sum of the turns before, and say with
// `last_turn_seen` that they have waited: a wait tells a phase from the one before and behind it alone, so that
// the writer must not end one that consumers have not waited for.
struct OnePassPipeline {
    RingPipeline ring;
    Mbarrier *sums_full, *sums_empty, *last_turn, *last_turn_seen;
    // Gradients of logits, of two tiles: stored by both warpgroups, and multiplied by both.
    Mbarrier *logits_full, *logits_empty;
};

// Producer warps: one loads keys and queries, one values and d_out, one writes sums; one has nothing to do.
constexpr int WRITER = 2, LOADING_WARPS = 2;
__device__ inline int producer_warp() { return __shfl_sync(~0u, (threadIdx.x - THREADS) / 32, 0); }

__device__ inline SharedOnePass shared_one_pass(unsigned char *memory) {
    SharedOnePass shared;
    SharedKeys &operands = shared.operands = shared_keys(memory);
    // Between the operands, which are aligned to what products ask for, and the numbers behind them.
    shared.logits = reinterpret_cast<element *>(operands.numbers);
    shared.query_sums = reinterpret_cast<real *>(shared.logits + 2 * LOGIT_TILE);
    operands.numbers = shared.query_sums + 2 * QUERY_SUMS;
    operands.workspace = operands.numbers + STAGES * NUMBERS;
    return shared;
}

// For all threads of the block, which meet here; `ticket` is set to that of the block.
__device__ inline OnePassPipeline one_pass_pipeline(const Parameters &p, real *memory, unsigned &ticket) {
    OnePassPipeline pipeline;
    pipeline.ring.once_full = reinterpret_cast<Mbarrier *>(memory);
    pipeline.ring.full = pipeline.ring.once_full + 1;
    pipeline.ring.empty = pipeline.ring.full + STAGES;
    pipeline.sums_full = pipeline.ring.empty + STAGES;
    pipeline.sums_empty = pipeline.sums_full + 2;
    pipeline.last_turn = pipeline.sums_empty + 2;
    pipeline.last_turn_seen = pipeline.last_turn + 1;
    pipeline.logits_full = pipeline.last_turn_seen + 1;
    pipeline.logits_empty = pipeline.logits_full + 2;
    unsigned *const shared_ticket = reinterpret_cast<unsigned *>(pipeline.logits_empty + 2);
    if (threadIdx.x == 0) {
        *shared_ticket = atomicAdd(next_ticket(p), 1u);
        mbarrier_init(pipeline.ring.once_full, LOADING_WARPS * LOADING_THREADS);
        for (int stage = 0; stage < STAGES; ++stage) {
            mbarrier_init(pipeline.ring.full + stage, LOADING_WARPS * LOADING_THREADS);
            mbarrier_init(pipeline.ring.empty + stage, WARPS);
        }
        mbarrier_init(pipeline.last_turn, 1);
        mbarrier_init(pipeline.last_turn_seen, WARPS);
        for (int tile = 0; tile < 2; ++tile) {
            mbarrier_init(pipeline.sums_full + tile, WARPS);
            mbarrier_init(pipeline.sums_empty + tile, 1);
            mbarrier_init(pipeline.logits_full + tile, WARPS);
            mbarrier_init(pipeline.logits_empty + tile, WARPS);
        }
    }
    __syncthreads();
    ticket = *shared_ticket;
    return pipeline;
}

#endif
