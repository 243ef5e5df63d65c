// Products of tiles on warpgroups (wgmma, which compute capability 9.0 alone has), for f16 and bf16 with sums in f32.
//
// A warpgroup is four warps, which have 64 rows of a product. Its sums are spread over threads as spread.cuh has it, 16
// rows to a warp, so a kernel does with them what it does there. Factors are tiles in shared memory as in staging.cuh, or weights
// in registers on the left. A product runs beside what its threads do next: between `begin_...` and the `await_products` after
// it, sums are nobody's.

#if ON_WARPGROUPS

static_assert(WARPS % 4 == 0, "whole warpgroups");

// Where a matrix is: `panels` is the distance of panels in bytes, for a factor whose rows are summed over.
__device__ inline unsigned long long smem_descriptor(const element *tile, unsigned offset, unsigned panels) {
    const unsigned address = __shfl_sync(~0u, shared_address(tile) + offset, 0);
    // The pattern of 128 bytes, and 1024 bytes from eight rows to the next.
    return 1ull << 62 | 64ull << 32 | (unsigned long long)(panels / 16) << 16 | (address & 0x3ffff) / 16;
}

__device__ inline void warpgroup_arrive() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void warpgroup_commit_batch() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Keeps what follows from being computed before this.
template <int COUNT>
__device__ inline void warpgroup_fence_operand(real (&sums)[2][COUNT]) {
#pragma unroll
    for (int r = 0; r < 2; ++r)
#pragma unroll
        for (int c = 0; c < COUNT; ++c) asm volatile("" : "+f"(sums[r][c])::"memory");
}

// Waits until at most this many of the groups of products closed last are under way.
template <int GROUPS>
__device__ inline void warpgroup_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(GROUPS) : "memory");
}

// A barrier in shared memory, which `count` arrivals pass from one phase to the next.
typedef unsigned long long Mbarrier;

__device__ inline void mbarrier_init(Mbarrier *gate, int count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(gate)), "r"(count) : "memory");
}

__device__ inline void mbarrier_arrive(Mbarrier *gate) {
    asm volatile("{ .reg .b64 phase; mbarrier.arrive.shared::cta.b64 phase, [%0]; }" ::"r"(shared_address(gate))
                 : "memory");
}

// One arrival for the warp.
__device__ inline void mbarrier_arrive_per_warp(Mbarrier *gate) {
    __syncwarp();
    if (threadIdx.x % 32 == 0) mbarrier_arrive(gate);
}

// Waits for the end of the phase of this number, counted from 0. One before the first has ended.
__device__ inline void mbarrier_wait(Mbarrier *gate, int phase) {
    asm volatile(
        "{ .reg .pred passed; WAIT: mbarrier.try_wait.parity.shared::cta.b64 passed, [%0], %1; @passed bra.uni DONE; bra.uni WAIT; DONE: }" ::
            "r"(shared_address(gate)),
        "r"(phase & 1)
        : "memory");
}

// Says that what this thread copied is there, as soon as it is.
__device__ inline void mbarrier_arrive_after_copies(Mbarrier *gate) {
    cp_async_commit();
    cp_async_wait<0>();
    mbarrier_arrive(gate);
}

// Has the mask and the bias of a tile on their way from memory, as far as a cache that all share, before those that compute ask for
// them. By the stagers of a tile.
template <int HEIGHT, int WIDTH>
__device__ inline void prefetch_mask_and_bias(const Parameters &p, long long b, long long n, int first_t, int first) {
    const auto announce = [&](const Tensor &tensor, int size) {
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
    if constexpr (PACKS_MASK && TERM_STRIDE == 1) announce(p.mask, 1);
    if constexpr (PACKS_BIAS && TERM_STRIDE == 1) announce(p.bias, 2);
}

// Registers of a thread, of which loaders leave theirs to those that compute.
constexpr int PRODUCER_REGISTERS = WARPS == 8 ? 40 : 32, CONSUMER_REGISTERS = WARPS == 8 ? 232 : 160;
static_assert(WARPS == 8 || WARPS == 12,
              "as many registers as there are for two or three warpgroups beside the producers");

__device__ inline void warpgroup_reg_dealloc() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(PRODUCER_REGISTERS));
}
__device__ inline void warpgroup_reg_alloc() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(CONSUMER_REGISTERS));
}

#if DTYPE == DTYPE_F16
#define WGMMA_TYPES "f32.f16.f16"
#else
#define WGMMA_TYPES "f32.bf16.bf16"
#endif
#define ACCUMULATORS_8(i)                                                                               \
    "+f"(sums[0][FIRST + 2 * (i)]), "+f"(sums[0][FIRST + 2 * (i) + 1]), "+f"(sums[1][FIRST + 2 * (i)]), \
        "+f"(sums[1][FIRST + 2 * (i) + 1])
#define ACCUMULATORS_32(i) ACCUMULATORS_8(i), ACCUMULATORS_8(i + 1), ACCUMULATORS_8(i + 2), ACCUMULATORS_8(i + 3)
#define REGISTERS_32                                                         \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define REGISTERS_64                                                                   \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "           \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
    "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
    "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"

// The 16 columns of a from `left` on times those of b from `right` on, to sums WIDTH wide. Unless it `adds`, sums start there.
template <int WIDTH, int FIRST, int SLOTS>
__device__ inline void wgmma_ss(real (&sums)[2][SLOTS], unsigned long long left, unsigned long long right, int adds) {
    static_assert(WIDTH == 64 || WIDTH == 128, "as wide as there is an instruction for here");
    if constexpr (WIDTH == 64)
        asm volatile("{ .reg .pred adds; setp.ne.b32 adds, %34, 0; wgmma.mma_async.sync.aligned.m64n64k16." WGMMA_TYPES
                     " {" REGISTERS_32 "}, %32, %33, adds, 1, 1, 0, 0; }"
                     : ACCUMULATORS_32(0), ACCUMULATORS_32(4)
                     : "l"(left), "l"(right), "r"(adds));
    else
        asm volatile("{ .reg .pred adds; setp.ne.b32 adds, %66, 0; wgmma.mma_async.sync.aligned.m64n128k16." WGMMA_TYPES
                     " {" REGISTERS_64 "}, %64, %65, adds, 1, 1, 0, 0; }"
                     : ACCUMULATORS_32(0), ACCUMULATORS_32(4), ACCUMULATORS_32(8), ACCUMULATORS_32(12)
                     : "l"(left), "l"(right), "r"(adds));
}

// Weights of 16 columns times the 16 rows of b from `right` on, added to sums.
template <int WIDTH, int FIRST, int SLOTS>
__device__ inline void wgmma_rs(real (&sums)[2][SLOTS], const unsigned (&left)[4], unsigned long long right) {
    static_assert(WIDTH == 64 || WIDTH == 128, "as wide as there is an instruction for here");
    if constexpr (WIDTH == 64)
        asm volatile("wgmma.mma_async.sync.aligned.m64n64k16." WGMMA_TYPES " {" REGISTERS_32
                     "}, {%32, %33, %34, %35}, %36, 1, 1, 1, 1;"
                     : ACCUMULATORS_32(0), ACCUMULATORS_32(4)
                     : "r"(left[0]), "r"(left[1]), "r"(left[2]), "r"(left[3]), "l"(right));
    else
        asm volatile("wgmma.mma_async.sync.aligned.m64n128k16." WGMMA_TYPES " {" REGISTERS_64
                     "}, {%64, %65, %66, %67}, %68, 1, 1, 1, 1;"
                     : ACCUMULATORS_32(0), ACCUMULATORS_32(4), ACCUMULATORS_32(8), ACCUMULATORS_32(12)
                     : "r"(left[0]), "r"(left[1]), "r"(left[2]), "r"(left[3]), "l"(right));
}

// Begins sums = a * b^T, of tiles HEIGHT x DEPTH and WIDTH x DEPTH. TRANSPOSED as split.cuh has it.
template <int HEIGHT, int WIDTH, int DEPTH, bool TRANSPOSED = false>
__device__ inline void gemm_ss_async(real (&sums)[2][column_slots<WIDTH>()], const element *a, const element *b) {
    static_assert(HEIGHT == WARPS * 16 && DEPTH % 64 == 0, "64 rows to a warpgroup, whole panels");
    const unsigned long long left = smem_descriptor(a, threadIdx.x / 128 * 64 * PANEL_BYTES, 16),
                             right = smem_descriptor(b, 0, 16);
    warpgroup_fence_operand(sums);
    warpgroup_arrive();
#pragma unroll
    for (int k = 0; k < DEPTH / 16; ++k) {
        const int within = k % 4 * 32;
        wgmma_ss<WIDTH, 0>(sums, left + (k / 4 * HEIGHT * PANEL_BYTES + within) / 16,
                           right + (k / 4 * WIDTH * PANEL_BYTES + within) / 16, k > 0);
    }
    warpgroup_commit_batch();
}

// Weights as the factor on the left, rounded to the operands' dtype.
template <int WIDTH>
struct FragmentA {
    unsigned of[WIDTH / 16][4];
};

template <int WIDTH>
__device__ inline void pack(FragmentA<WIDTH> &factors, const real (&weights)[2][column_slots<WIDTH>()]) {
#pragma unroll
    for (int k = 0; k < WIDTH / 16; ++k)
#pragma unroll
        for (int i = 0; i < 4; ++i)
            factors.of[k][i] = packed(weights[i % 2][4 * k + i / 2 * 2], weights[i % 2][4 * k + i / 2 * 2 + 1]);
}

template <int WIDTH>
__device__ inline void warpgroup_fence_operand(FragmentA<WIDTH> &factors) {
#pragma unroll
    for (int k = 0; k < WIDTH / 16; ++k)
#pragma unroll
        for (int i = 0; i < 4; ++i) asm volatile("" : "+r"(factors.of[k][i])::"memory");
}

// Begins sums += weights * b, of tiles HEIGHT x WIDTH and WIDTH x DEPTH.
template <int WIDTH, int DEPTH>
__device__ inline void gemm_rs_async(real (&sums)[2][output_slots<DEPTH>()], FragmentA<WIDTH> &weights,
                                     const element *b) {
    const unsigned long long right = smem_descriptor(b, 0, WIDTH * PANEL_BYTES);
    warpgroup_fence_operand(sums);
    warpgroup_fence_operand(weights);
    warpgroup_arrive();
#pragma unroll
    for (int k = 0; k < WIDTH / 16; ++k) {
        const unsigned long long rows = right + k * 16 * PANEL_BYTES / 16;
        if constexpr (DEPTH == 64) {
            wgmma_rs<64, 0>(sums, weights.of[k], rows);
        } else {
            constexpr int PANEL = WIDTH * PANEL_BYTES / 16;
            wgmma_rs<128, 0>(sums, weights.of[k], rows);
            if constexpr (DEPTH == 192) wgmma_rs<64, 32>(sums, weights.of[k], rows + 2 * PANEL);
            if constexpr (DEPTH == 256) wgmma_rs<128, 32>(sums, weights.of[k], rows + 2 * PANEL);
        }
    }
    warpgroup_commit_batch();
}

// The same from weights, which are in `factors` until it is done.
template <int HEIGHT, int WIDTH, int DEPTH>
__device__ inline void gemm_rs_async(real (&sums)[2][output_slots<DEPTH>()],
                                     const real (&weights)[2][column_slots<WIDTH>()], FragmentA<WIDTH> &factors,
                                     const element *b, real *) {
    pack<WIDTH>(factors, weights);
    gemm_rs_async<WIDTH, DEPTH>(sums, factors, b);
}

#else

// Elsewhere, products are done as soon as they have begun.

template <int WIDTH>
struct FragmentA {};

template <class Sums>
__device__ inline void warpgroup_fence_operand(Sums &) {}

template <int GROUPS>
__device__ inline void warpgroup_wait() {}

template <int HEIGHT, int WIDTH, int DEPTH, bool TRANSPOSED = false>
__device__ inline void gemm_ss_async(real (&sums)[row_slots<HEIGHT>()][column_slots<WIDTH>()], const element *a,
                                     const element *b) {
    gemm_ss<HEIGHT, WIDTH, DEPTH, TRANSPOSED>(sums, a, b);
}

template <int HEIGHT, int WIDTH, int DEPTH>
__device__ inline void gemm_rs_async(real (&sums)[row_slots<HEIGHT>()][output_slots<DEPTH>()],
                                     const real (&weights)[row_slots<HEIGHT>()][column_slots<WIDTH>()],
                                     FragmentA<WIDTH> &, const element *b, real *workspace) {
    gemm_rs<HEIGHT, WIDTH, DEPTH>(sums, weights, b, workspace);
}

#endif
