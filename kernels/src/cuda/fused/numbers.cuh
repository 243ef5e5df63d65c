// Element types and arithmetic of the fused kernels. DTYPE is the code of the operands' dtype.
// Needs: common/dtypes.cuh, common/float8.cuh.

#define HALVES (DTYPE >= DTYPE_F16)

// Whether f32 operands are split into two tf32 parts and multiplied on tensor cores. SPLIT asks for it.
#ifndef SPLIT
#define SPLIT 0
#endif
#define SPLITS (DTYPE == DTYPE_F32 && SPLIT)
#define TENSOR_CORES (HALVES || SPLITS)

// Blocks that share the columns of values and outputs, VALUE columns each, where these are too many for one
// block.
#ifndef SLICES
#define SLICES 1
#endif

// Whether the bits of a sequence must not depend on the rest of the call: sums of keys are then cut at fixed
// keys (forward/splits.cuh), and numbers are added in an order that does not depend on the alignment of
// tensors.
#ifndef BATCH_INVARIANT
#define BATCH_INVARIANT 0
#endif

// How the rows of sequences lie in their tensors: dense; packed, where queries are, and keys are packed or
// dense; or with keys in pages, where queries are packed or dense.
#ifndef LAYOUT
#define LAYOUT 0
#endif
#define LAYOUT_DENSE 0
#define LAYOUT_PACKED 1
#define LAYOUT_PAGED 2

// The dtype of keys and values of 8 bits, DTYPE_F8E4M3 or DTYPE_F8E5M2; 0 where they have that of queries.
// They are widened to that on their way to shared memory. Of the forward pass.
#ifndef EIGHT_BIT
#define EIGHT_BIT 0
#endif

// Whether products read keys and values of 8 bits as they are in global memory, and widen them in registers
// (forward/byte_fragments.cuh): where one warp is a block, so that no other one would widen the same bytes.
// The host gives such blocks no tiles of widened keys and values (`Shape::reads_bytes`).
#define READS_BYTES \
    (EIGHT_BIT && HALVES && WARPS == 1 && HEAD % 64 == 0 && VALUE % 64 == 0 && HEAD <= 256 && VALUE <= 256)

// Whether products run on warpgroups (wgmma). WARPGROUPS says that tiles and threads are made for it.
#if HALVES && WARPGROUPS && defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define ON_WARPGROUPS 1
#else
#define ON_WARPGROUPS 0
#endif

// `element` is the dtype of operands, `real` that of logits, softmax and accumulators.
#if DTYPE == DTYPE_F64
typedef double element;
typedef double real;
#elif DTYPE == DTYPE_F32
typedef float element;
typedef float real;
#else
typedef unsigned short element;
typedef float real;
#endif

// What keys and values are in global memory.
#if EIGHT_BIT
typedef unsigned char cached;
#else
typedef element cached;
#endif

// The consumer threads, which compute. On warpgroups, producer threads follow them, which load operands.
constexpr int THREADS = 32 * WARPS;
constexpr int PRODUCER_THREADS = ON_WARPGROUPS ? 128 : 0;
// BLOCK is the number of threads per block that the host launches, and the bound that every kernel is
// compiled with: a kernel with a smaller bound does not start. A variant for warpgroups keeps it where it is
// compiled for another architecture.
static_assert(BLOCK == 32 * WARPS + (HALVES && WARPGROUPS ? 128 : 0), "threads that compute, and those that load");
// Blocks per multiprocessor, at least (`least_blocks` of the host): eight warps use all registers. As many
// blocks of one warp as shared memory of compute capability 9.0 has room for at head dimension 128. Of blocks
// that read bytes, as many as registers have room for without spills in the loop.
constexpr int MIN_BLOCKS = WARPS >= 8                           ? 1
                           : READS_BYTES && HEAD + VALUE <= 256 ? (ROWS == 8 ? 16 : 12)
                           : WARPS == 1 && HEAD + VALUE <= 256  ? 10
                                                                : 8 / WARPS;

#if BATCH_INVARIANT
// The keys of a split of a batch-invariant call, whose splits begin at multiples of it. Each split of a row
// costs an exchange of its sums with scratch, beside 2048 keys about 4 % of their time; and a sequence of
// 32768 keys with 8 key/value heads still has 128 blocks, one for each multiprocessor of a large device. A
// multiple of the keys of every tile.
constexpr int KEYS_PER_SPLIT = 2048;
#endif

// Programmatic dependent launch, from compute capability 9.0 on: nothing elsewhere, and in kernels that are
// launched without it. `launch_dependents` lets blocks of the next kernel of the stream start early once all
// blocks of this one have called it; what they may read is up to `wait_for_earlier_kernels`, which ends once
// the kernels before are done, and their writes visible.
__device__ inline void launch_dependents() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
__device__ inline void wait_for_earlier_kernels() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// A barrier for all consumer threads.
__device__ inline void consumer_sync() {
    if constexpr (PRODUCER_THREADS > 0)
        asm volatile("barrier.cta.sync 1, %0;" ::"n"(THREADS) : "memory");
    else
        __syncthreads();
}

// The same; returns whether `says` is true in any of them.
__device__ inline bool consumer_sync_or(bool says) {
    if constexpr (PRODUCER_THREADS == 0) return __syncthreads_or(says);
    int any;
    asm volatile(
        "{ .reg .pred says, any; setp.ne.b32 says, %1, 0; barrier.cta.red.or.pred any, 1, %2, says; selp.b32 %0, 1, 0, any; }"
        : "=r"(any)
        : "r"((int)says), "n"(THREADS)
        : "memory");
    return any != 0;
}

constexpr real LOG2_E = real(1.44269504088896340736);

__device__ inline real infinity() {
#if DTYPE == DTYPE_F64
    return __longlong_as_double(0x7ff0000000000000LL);
#else
    return __int_as_float(0x7f800000);
#endif
}

// False for NaN too.
__device__ inline bool is_finite(real x) { return fabs(x) < infinity(); }

// Two to the power of x, to 2 units in the last place, which the numerics class allows for.
__device__ inline float power_of_two(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ inline double power_of_two(double x) { return exp2(x); }

// Exponents of the backward pass are logits times this. Base two saves a multiplication per logit in half
// precision. In f32 it would round a logit before the logsumexp is subtracted, with an error that grows with
// the logit; there, and in f64, the difference comes first.
constexpr real UNIT = HALVES ? LOG2_E : real(1);

// e to the power of x / UNIT. Split products have errors of the size of the instruction's; other f32 kernels
// pay for an exponential to one unit in the last place.
__device__ inline real exponential(real x) {
#if HALVES
    return power_of_two(x);
#elif SPLITS
    return power_of_two(x * LOG2_E);
#else
    return exp(x);
#endif
}

// A difference that the compiler does not fuse with the product before it. Where x and y are rounded
// products, fused multiply-add would leave the rounding error of y, half a unit in its last place: for large
// numbers, more than an exponential bears.
__device__ inline float difference(float x, float y) { return __fsub_rn(x, y); }
__device__ inline double difference(double x, double y) { return __dsub_rn(x, y); }

// The smaller; NaN where x is NaN, other than with fmin. A single instruction in f32.
__device__ inline float at_most(float x, float most) {
    float y;
    asm("min.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(x), "f"(most));
    return y;
}
__device__ inline double at_most(double x, double most) { return x > most ? most : x; }

// Makes the compiler compute x here, once; short of registers, it would compute x again at each use.
__device__ inline float computed_here(float x) {
    asm volatile("" : "+f"(x));
    return x;
}
__device__ inline double computed_here(double x) {
    asm volatile("" : "+d"(x));
    return x;
}
__device__ inline unsigned computed_here(unsigned x) {
    asm volatile("" : "+r"(x));
    return x;
}

__device__ inline float rounded_product(float x, float y) { return __fmul_rn(x, y); }
__device__ inline double rounded_product(double x, double y) { return __dmul_rn(x, y); }
__device__ inline float rounded_sum(float x, float y) { return __fadd_rn(x, y); }
__device__ inline double rounded_sum(double x, double y) { return __dadd_rn(x, y); }

__device__ inline float logarithm(float x) { return logf(x); }
__device__ inline double logarithm(double x) { return log(x); }

// Computed from an exponential, so its error is absolute, as the numerics class counts it.
__device__ inline float hyperbolic_tangent(float x) {
    return 1.0f - __fdividef(2.0f, power_of_two(x * (2.0f * 1.44269504088896340736f)) + 1.0f);
}

__device__ inline double hyperbolic_tangent(double x) { return tanh(x); }

__device__ inline real widened(element x) {
#if DTYPE == DTYPE_F16
    return f16_to_float(x);
#elif DTYPE == DTYPE_BF16
    return bf16_to_float(x);
#else
    return x;
#endif
}

#if EIGHT_BIT
__device__ inline real widened(unsigned char x) { return byte_to_float<EIGHT_BIT>(x); }
#endif

__device__ inline element rounded(real x) {
#if DTYPE == DTYPE_F16
    return float_to_f16(x);
#elif DTYPE == DTYPE_BF16
    return float_to_bf16(x);
#else
    return x;
#endif
}

#if HALVES
// Two elements in one register, the first in the low half.
__device__ inline unsigned packed(float low, float high) {
    unsigned both;
#if DTYPE == DTYPE_F16
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
#else
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
#endif
    return both;
}
#endif

// The element at this index of a tensor of any dtype.
__device__ inline real load(const char *data, int dtype, long long index) { return load_as<real>(data, dtype, index); }

__device__ inline real sum_of_warp(real x) {
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) x += __shfl_xor_sync(~0u, x, distance);
    return x;
}
