// Products of tiles on warpgroups (wgmma, compute capability 9.0 only), for f16 and bf16 with accumulators in
// f32.
// Needs: fused/shared_tiles.cuh, fused/fragments.cuh, fused/mma/sm80.cuh, fused/mma/tf32_split.cuh,
// fused/mma/fma.cuh.
//
// A warpgroup is four warps, which compute 64 rows of a product. Accumulators lie as fragments.cuh says, 16
// rows per warp. Operands are tiles in shared memory (shared_tiles.cuh); the left one may be in registers.
// Products are asynchronous: accumulators must not be touched between `gemm_..._async` and the
// `warpgroup_wait` after it.

#if ON_WARPGROUPS

static_assert(WARPS % 4 == 0, "whole warpgroups");

// The descriptor of a matrix in shared memory: 128-byte swizzle, 1024 bytes from eight rows to the next,
// `panels` bytes from panel to panel where the product sums over rows.
__device__ inline unsigned long long smem_descriptor(const element *tile, unsigned offset, unsigned panels) {
    const unsigned address = __shfl_sync(~0u, shared_address(tile) + offset, 0);
    return 1ull << 62 | 64ull << 32 | (unsigned long long)(panels / 16) << 16 | (address & 0x3ffff) / 16;
}

__device__ inline void warpgroup_arrive() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void warpgroup_commit_batch() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Keeps the compiler from moving accesses of these registers across this point.
template <int COUNT>
__device__ inline void warpgroup_fence_operand(real (&sums)[2][COUNT]) {
#pragma unroll
    for (int r = 0; r < 2; ++r)
#pragma unroll
        for (int c = 0; c < COUNT; ++c) asm volatile("" : "+f"(sums[r][c])::"memory");
}

// Waits until at most this many of the batches that were committed last are in flight.
template <int GROUPS>
__device__ inline void warpgroup_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(GROUPS) : "memory");
}

#if DTYPE == DTYPE_F16
#define WGMMA_TYPES "f32.f16.f16"
#else
#define WGMMA_TYPES "f32.bf16.bf16"
#endif
#define ACCUMULATORS_8(i) \
    "+f"(sums[0][2 * (i)]), "+f"(sums[0][2 * (i) + 1]), "+f"(sums[1][2 * (i)]), "+f"(sums[1][2 * (i) + 1])
#define RESULTS_8(i) \
    "=f"(sums[0][2 * (i)]), "=f"(sums[0][2 * (i) + 1]), "=f"(sums[1][2 * (i)]), "=f"(sums[1][2 * (i) + 1])
#define RESULTS_32(i) RESULTS_8(i), RESULTS_8(i + 1), RESULTS_8(i + 2), RESULTS_8(i + 3)
#define RESULTS_OF_32 RESULTS_32(0)
#define RESULTS_OF_64 RESULTS_32(0), RESULTS_32(4)
#define RESULTS_OF_128 RESULTS_32(0), RESULTS_32(4), RESULTS_32(8), RESULTS_32(12)
#define ACCUMULATORS_32(i) ACCUMULATORS_8(i), ACCUMULATORS_8(i + 1), ACCUMULATORS_8(i + 2), ACCUMULATORS_8(i + 3)
#define ACCUMULATORS_64(i) ACCUMULATORS_32(i), ACCUMULATORS_32(i + 4)
#define ACCUMULATORS_128(i) ACCUMULATORS_64(i), ACCUMULATORS_64(i + 8)
#define REGISTERS_FROM_0 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define REGISTERS_FROM_16 "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define REGISTERS_FROM_32 "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define REGISTERS_FROM_48 "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define REGISTERS_FROM_64 "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79"
#define REGISTERS_FROM_80 "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define REGISTERS_FROM_96 "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111"
#define REGISTERS_FROM_112 \
    "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define REGISTERS_OF_32 REGISTERS_FROM_0
#define REGISTERS_OF_64 REGISTERS_FROM_0 ", " REGISTERS_FROM_16
#define REGISTERS_OF_128 REGISTERS_FROM_0 ", " REGISTERS_FROM_16 ", " REGISTERS_FROM_32 ", " REGISTERS_FROM_48
#define REGISTERS_OF_192                                                                                         \
    REGISTERS_FROM_0 ", " REGISTERS_FROM_16 ", " REGISTERS_FROM_32 ", " REGISTERS_FROM_48 ", " REGISTERS_FROM_64 \
                     ", " REGISTERS_FROM_80
#define REGISTERS_OF_256                                                                                         \
    REGISTERS_FROM_0 ", " REGISTERS_FROM_16 ", " REGISTERS_FROM_32 ", " REGISTERS_FROM_48 ", " REGISTERS_FROM_64 \
                     ", " REGISTERS_FROM_80 ", " REGISTERS_FROM_96 ", " REGISTERS_FROM_112
#define ACCUMULATORS_OF_32 ACCUMULATORS_32(0)
#define ACCUMULATORS_OF_64 ACCUMULATORS_64(0)
#define ACCUMULATORS_OF_128 ACCUMULATORS_128(0)
#define ACCUMULATORS_OF_192 ACCUMULATORS_128(0), ACCUMULATORS_64(16)
#define ACCUMULATORS_OF_256 ACCUMULATORS_128(0), ACCUMULATORS_128(16)

// One instruction: 16 columns of a (from `left` on) by those of b (from `right` on), WIDTH columns of
// accumulators; or 16 rows of each where both are TRANSPOSED. Overwrites them where `adds` is 0.
template <int WIDTH, bool TRANSPOSED = false, int SLOTS>
__device__ inline void wgmma_ss(real (&sums)[2][SLOTS], unsigned long long left, unsigned long long right, int adds) {
    static_assert(TRANSPOSED ? WIDTH == 32 || WIDTH == 64 : WIDTH == 64 || WIDTH == 128,
                  "the widths of the instructions below");
#define WGMMA_SS(WIDTH, LEFT, RIGHT, ADDS, TRANSPOSED)                                                            \
    asm volatile("{ .reg .pred adds; setp.ne.b32 adds, %" ADDS ", 0; wgmma.mma_async.sync.aligned.m64n" #WIDTH    \
                 "k16." WGMMA_TYPES " {" REGISTERS_OF_##WIDTH "}, %" LEFT ", %" RIGHT ", adds, 1, 1, " TRANSPOSED \
                                                              "; }"                                               \
                 : ACCUMULATORS_OF_##WIDTH                                                                        \
                 : "l"(left), "l"(right), "r"(adds))
    if constexpr (TRANSPOSED && WIDTH == 32)
        WGMMA_SS(32, "16", "17", "18", "1, 1");
    else if constexpr (TRANSPOSED)
        WGMMA_SS(64, "32", "33", "34", "1, 1");
    else if constexpr (WIDTH == 64)
        WGMMA_SS(64, "32", "33", "34", "0, 0");
    else
        WGMMA_SS(128, "64", "65", "66", "0, 0");
}

// The same, which begins new sums: the registers have no value before. A product that begins behind others
// must not have one: an instruction that gives them a value between the others and the wait for them makes the
// compiler wait for each product.
template <int WIDTH, bool TRANSPOSED = false, int SLOTS>
__device__ inline void wgmma_ss_first(real (&sums)[2][SLOTS], unsigned long long left, unsigned long long right) {
#define WGMMA_SS_FIRST(WIDTH, LEFT, RIGHT, TRANSPOSED)                                                            \
    asm volatile("{ .reg .pred adds; setp.ne.b32 adds, 0, 0; wgmma.mma_async.sync.aligned.m64n" #WIDTH            \
                 "k16." WGMMA_TYPES " {" REGISTERS_OF_##WIDTH "}, %" LEFT ", %" RIGHT ", adds, 1, 1, " TRANSPOSED \
                                                              "; }"                                               \
                 : RESULTS_OF_##WIDTH                                                                             \
                 : "l"(left), "l"(right))
    if constexpr (TRANSPOSED && WIDTH == 32)
        WGMMA_SS_FIRST(32, "16", "17", "1, 1");
    else if constexpr (TRANSPOSED)
        WGMMA_SS_FIRST(64, "32", "33", "1, 1");
    else if constexpr (WIDTH == 64)
        WGMMA_SS_FIRST(64, "32", "33", "0, 0");
    else
        WGMMA_SS_FIRST(128, "64", "65", "0, 0");
}

// One instruction: 16 columns of the operand in registers by 16 rows of b from `right` on, added.
template <int WIDTH, int SLOTS>
__device__ inline void wgmma_rs(real (&sums)[2][SLOTS], const unsigned (&left)[4], unsigned long long right) {
    static_assert(WIDTH == 64 || WIDTH == 128 || WIDTH == 192 || WIDTH == 256, "an instruction's width");
#define WGMMA_RS(WIDTH, LEFT_0, LEFT_1, LEFT_2, LEFT_3, RIGHT)                                           \
    asm volatile("wgmma.mma_async.sync.aligned.m64n" #WIDTH "k16." WGMMA_TYPES " {" REGISTERS_OF_##WIDTH \
                 "}, {%" LEFT_0 ", %" LEFT_1 ", %" LEFT_2 ", %" LEFT_3 "}, %" RIGHT ", 1, 1, 1, 1;"      \
                 : ACCUMULATORS_OF_##WIDTH                                                               \
                 : "r"(left[0]), "r"(left[1]), "r"(left[2]), "r"(left[3]), "l"(right))
    if constexpr (WIDTH == 64)
        WGMMA_RS(64, "32", "33", "34", "35", "36");
    else if constexpr (WIDTH == 128)
        WGMMA_RS(128, "64", "65", "66", "67", "68");
    else if constexpr (WIDTH == 192)
        WGMMA_RS(192, "96", "97", "98", "99", "100");
    else if constexpr (WIDTH == 256)
        WGMMA_RS(256, "128", "129", "130", "131", "132");
}

// Begins sums = a^T * b, of tiles of HEIGHT rows, of which a warpgroup multiplies 64 columns of a and WIDTH
// columns of b from these descriptors on.
template <int HEIGHT, int WIDTH>
__device__ inline void gemm_transposed_async(real (&sums)[2][column_slots<WIDTH>()], unsigned long long left,
                                             unsigned long long right) {
    warpgroup_arrive();
    wgmma_ss_first<WIDTH, true>(sums, left, right);
#pragma unroll
    for (int k = 1; k < HEIGHT / 16; ++k) {
        const int rows = k * 16 * PANEL_BYTES / 16;
        wgmma_ss<WIDTH, true>(sums, left + rows, right + rows, 1);
    }
    warpgroup_commit_batch();
}

// Begins sums = a * b^T, of tiles HEIGHT x DEPTH and WIDTH x DEPTH. TRANSPOSED matters to mma/tf32_split.cuh
// alone. BEHIND says that other products are under way.
template <int HEIGHT, int WIDTH, int DEPTH, bool TRANSPOSED = false, bool BEHIND = false>
__device__ inline void gemm_ss_async(real (&sums)[2][column_slots<WIDTH>()], const element *a, const element *b) {
    static_assert(HEIGHT == WARPS * 16 && DEPTH % 64 == 0, "64 rows to a warpgroup, whole panels");
    const unsigned long long left = smem_descriptor(a, threadIdx.x / 128 * 64 * PANEL_BYTES, 16),
                             right = smem_descriptor(b, 0, 16);
    if constexpr (!BEHIND) warpgroup_fence_operand(sums);
    warpgroup_arrive();
    if constexpr (BEHIND) wgmma_ss_first<WIDTH>(sums, left, right);
#pragma unroll
    for (int k = BEHIND ? 1 : 0; k < DEPTH / 16; ++k) {
        const int within = k % 4 * 32;
        wgmma_ss<WIDTH>(sums, left + (k / 4 * HEIGHT * PANEL_BYTES + within) / 16,
                        right + (k / 4 * WIDTH * PANEL_BYTES + within) / 16, k > 0);
    }
    warpgroup_commit_batch();
}

// The left operand in registers, rounded to the operands' dtype.
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
        wgmma_rs<DEPTH>(sums, weights.of[k], rows);
    }
    warpgroup_commit_batch();
}

// The same from weights, which stay in `factors` until it is done.
template <int HEIGHT, int WIDTH, int DEPTH>
__device__ inline void gemm_rs_async(real (&sums)[2][output_slots<DEPTH>()],
                                     const real (&weights)[2][column_slots<WIDTH>()], FragmentA<WIDTH> &factors,
                                     const element *b, real *) {
    pack<WIDTH>(factors, weights);
    gemm_rs_async<WIDTH, DEPTH>(sums, factors, b);
}

#else

// Elsewhere products are synchronous.

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
