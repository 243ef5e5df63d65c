// The pipeline between producer and consumer warps of kernels on warpgroups: mbarriers, prefetch, and
// registers.
// Needs: fused/row.cuh, fused/shared_tiles.cuh.

#if ON_WARPGROUPS

// A barrier in shared memory. A phase ends with `count` arrivals, and the next one begins.
typedef unsigned long long Mbarrier;

__device__ inline void mbarrier_init(Mbarrier *barrier, int count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(count) : "memory");
}

__device__ inline void mbarrier_arrive(Mbarrier *barrier) {
    asm volatile("{ .reg .b64 phase; mbarrier.arrive.shared::cta.b64 phase, [%0]; }" ::"r"(shared_address(barrier))
                 : "memory");
}

// One arrival for all threads of the warp, behind what they did before. The first thread arrives under a
// predicate, not in a branch: in a branch, NVRTC 13.0 computes the mbarrier's address in a register per
// thread, and in the forward kernel at head dimension 64 it reuses the register of a scaled row max, so all
// exponents of that row come before the first exponential, which begins about 30 cycles later.
__device__ inline void mbarrier_arrive_per_warp(Mbarrier *barrier) {
    __syncwarp();
    asm volatile(
        "{ .reg .pred is_first; .reg .b64 phase; setp.eq.u32 is_first, %1, 0; @is_first mbarrier.arrive.shared::cta.b64 phase, [%0]; }" ::
            "r"(shared_address(barrier)),
        "r"(threadIdx.x % 32)
        : "memory");
}

// Waits for the end of phase `phase`, counted from 0. Phase -1 has ended: a producer's first wait for an
// empty stage passes.
__device__ inline void mbarrier_wait(Mbarrier *barrier, int phase) {
    asm volatile(
        "{ .reg .pred passed; WAIT: mbarrier.try_wait.parity.shared::cta.b64 passed, [%0], %1; @passed bra.uni DONE; bra.uni WAIT; DONE: }" ::
            "r"(shared_address(barrier)),
        "r"(phase & 1)
        : "memory");
}

// Waits for this thread's copies (cp.async), then arrives.
__device__ inline void mbarrier_arrive_after_copies(Mbarrier *barrier) {
    cp_async_commit();
    cp_async_wait<0>();
    mbarrier_arrive(barrier);
}

// Ping-pong: warpgroups of consumers issue their products in turn, so that one has its softmax while the
// tensor cores have the other's products. Each waits for its turn, issues, and passes the turn on.
constexpr int WARPGROUPS_OF_CONSUMERS = WARPS / 4;
__device__ inline int consumer_warpgroup() { return __shfl_sync(~0u, threadIdx.x / 128, 0); }
__device__ inline void wait_for_turn(int warpgroup) {
    asm volatile("barrier.cta.sync %0, 256;" ::"r"(2 + warpgroup) : "memory");
}
__device__ inline void pass_turn(int warpgroup) {
    const int next = warpgroup + 1 == WARPGROUPS_OF_CONSUMERS ? 0 : warpgroup + 1;
    asm volatile("barrier.cta.arrive %0, 256;" ::"r"(2 + next) : "memory");
}

// Prefetches the mask and the bias of a tile into L2. Called by the producer threads of a tile.
template <int HEIGHT, int WIDTH>
__device__ inline void prefetch_mask_and_bias(const Parameters &p, long long b, long long n, int first_t, int first) {
    const auto prefetch = [&](const Tensor &tensor, int size) {
        constexpr int LINE = 128;
        const int lines = WIDTH * size / LINE;
        const char *const head = tensor.data + size * (b * tensor.stride[0] + n * tensor.stride[1]);
        for (int i = loading_thread(); i < HEIGHT * lines; i += LOADING_THREADS) {
            const int t = min(first_t + i / lines, (int)p.query_length - 1);
            const int key = min(first + i % lines * (LINE / size), (int)p.key_length - 1);
            asm volatile(
                "prefetch.global.L2 [%0];" ::"l"(__cvta_generic_to_global(head + size * (t * tensor.stride[2] + key))));
        }
    };
    if constexpr (PACKS_MASK && TERM_STRIDE == 1) prefetch(p.mask, 1);
    if constexpr (PACKS_BIAS && TERM_STRIDE == 1) prefetch(p.bias, 2);
}

// Registers per thread: producers give up theirs (setmaxnreg), consumers take them.
constexpr int PRODUCER_REGISTERS = WARPS == 8 ? 40 : 32, CONSUMER_REGISTERS = WARPS == 8 ? 232 : 160;
static_assert(WARPS == 8 || WARPS == 12,
              "the registers of a multiprocessor for two or three consumer warpgroups and one of producers");

__device__ inline void warpgroup_reg_dealloc() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(PRODUCER_REGISTERS));
}
__device__ inline void warpgroup_reg_alloc() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(CONSUMER_REGISTERS));
}

// The mbarriers of a kernel that loads some operands once and streams others through a ring of STAGES: one on
// which consumers wait for the former, and for each stage one on which they wait for its tiles (`full`), and
// one on which producers wait for the tiles' last reader (`empty`).
struct RingPipeline {
    Mbarrier *once_full, *full, *empty;
};

// In shared memory from `memory` on, with this many arrivals of consumers to empty a stage. Initialised by
// one thread, for all threads of the block, which meet here.
__device__ inline RingPipeline ring_pipeline(real *memory, int consumer_arrivals) {
    RingPipeline pipeline;
    pipeline.once_full = reinterpret_cast<Mbarrier *>(memory);
    pipeline.full = pipeline.once_full + 1;
    pipeline.empty = pipeline.full + STAGES;
    if (threadIdx.x == 0) {
        mbarrier_init(pipeline.once_full, PRODUCER_THREADS);
        for (int stage = 0; stage < STAGES; ++stage) {
            mbarrier_init(pipeline.full + stage, PRODUCER_THREADS);
            mbarrier_init(pipeline.empty + stage, consumer_arrivals);
        }
    }
    __syncthreads();
    return pipeline;
}

#else

// All threads load and compute, and meet at barriers of the block.
struct RingPipeline {};

#endif
