// Products of tiles of f32 on tensor cores (mma.sync.m16n8k8 of tf32, from compute capability 8.0). Each
// operand is the sum of two parts of 11 bits; of their four products the three that count are added in f32
// (Markidis et al. 2018, arXiv 1803.04014). The error is of the order of f32's rounding. An infinity is no
// sum of two parts: the epilogue looks for results that are not finite, and computes their rows again.
// Needs: fused/shared_tiles.cuh, fused/fragments.cuh.

#if SPLITS

struct Parts {
    unsigned high, low;
};

__device__ inline Parts parts_of(float x) {
    Parts parts;
    // To the nearest of 11 bits. `cvt.rna.tf32.f32` does the same in four instructions, two of which are for
    // numbers that are not finite.
    parts.high = __float_as_uint(x) + 0x1000u & 0xffffe000u;
    // Exact; the instruction ignores the bits past the 11th.
    parts.low = __float_as_uint(x - __uint_as_float(parts.high));
    return parts;
}

__device__ inline void mma_m16n8k8_tf32(float &c0, float &c1, float &c2, float &c3, unsigned a0, unsigned a1,
                                        unsigned a2, unsigned a3, unsigned b0, unsigned b1) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c0), "+f"(c1), "+f"(c2), "+f"(c3)
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// The left operand, 16 rows by 8 columns: of the thread, rows `lane / 4` and `lane / 4 + 8`, two columns
// each.
struct Left {
    Parts of[4];
};

// Adds the product with two rows of a column of the right operand, small products first. The order of the two
// small ones is reversed in a TRANSPOSED product, so that it has the same bits as the product that is not.
template <bool TRANSPOSED>
__device__ inline void mma_split(float &c0, float &c1, float &c2, float &c3, const Left &a, const Parts &b0,
                                 const Parts &b1) {
    if constexpr (!TRANSPOSED)
        mma_m16n8k8_tf32(c0, c1, c2, c3, a.of[0].low, a.of[1].low, a.of[2].low, a.of[3].low, b0.high, b1.high);
    mma_m16n8k8_tf32(c0, c1, c2, c3, a.of[0].high, a.of[1].high, a.of[2].high, a.of[3].high, b0.low, b1.low);
    if constexpr (TRANSPOSED)
        mma_m16n8k8_tf32(c0, c1, c2, c3, a.of[0].low, a.of[1].low, a.of[2].low, a.of[3].low, b0.high, b1.high);
    mma_m16n8k8_tf32(c0, c1, c2, c3, a.of[0].high, a.of[1].high, a.of[2].high, a.of[3].high, b0.high, b1.high);
}

// sums = a * b^T, of tiles HEIGHT x DEPTH and WIDTH x DEPTH. A thread reads four neighbouring terms of a row:
// two for each of two products of eight, in whichever order, as long as both factors have the same.
template <int HEIGHT, int WIDTH, int DEPTH, bool TRANSPOSED = false>
__device__ inline void gemm_ss(real (&sums)[row_slots<HEIGHT>()][column_slots<WIDTH>()], const element *a,
                               const element *b) {
    constexpr int BLOCKS = row_slots<HEIGHT>() / 2;
#pragma unroll
    for (int r = 0; r < row_slots<HEIGHT>(); ++r)
#pragma unroll
        for (int c = 0; c < column_slots<WIDTH>(); ++c) sums[r][c] = 0;
    const int own = lane() / 4;
    const element *const left = a + (threadIdx.x / 32 * (HEIGHT / WARPS) + own) * DEPTH, *const right = b + own * DEPTH;
#pragma unroll 2
    for (int k = 0; k < DEPTH; k += 16) {
        // Rows that are a multiple of 8 apart are turned alike.
        const int place = k + lane() % 4 * 4 ^ turn_of_row(own);
        Left factors[BLOCKS][2];
#pragma unroll
        for (int i = 0; i < BLOCKS; ++i) {
            const Chunk upper = chunk_at(left + i * 16 * DEPTH + place),
                        lower = chunk_at(left + (i * 16 + 8) * DEPTH + place);
#pragma unroll
            for (int half = 0; half < 2; ++half)
#pragma unroll
                for (int term = 0; term < 2; ++term) {
                    factors[i][half].of[2 * term] = parts_of(upper.of[2 * half + term]);
                    factors[i][half].of[2 * term + 1] = parts_of(lower.of[2 * half + term]);
                }
        }
#pragma unroll
        for (int j = 0; j < WIDTH / 8; ++j) {
            const Chunk column = chunk_at(right + j * 8 * DEPTH + place);
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const Parts first = parts_of(column.of[2 * half]), second = parts_of(column.of[2 * half + 1]);
#pragma unroll
                for (int i = 0; i < BLOCKS; ++i)
                    mma_split<TRANSPOSED>(sums[2 * i][2 * j], sums[2 * i][2 * j + 1], sums[2 * i + 1][2 * j],
                                          sums[2 * i + 1][2 * j + 1], factors[i][half], first, second);
            }
        }
    }
}

// sums += weights * b, of tiles HEIGHT x WIDTH and WIDTH x DEPTH.
template <int HEIGHT, int WIDTH, int DEPTH>
__device__ inline void gemm_rs(real (&sums)[row_slots<HEIGHT>()][output_slots<DEPTH>()],
                               const real (&weights)[row_slots<HEIGHT>()][column_slots<WIDTH>()], const element *b,
                               real *) {
    constexpr int BLOCKS = row_slots<HEIGHT>() / 2;
    // Two rows that follow each other, four columns of each.
    const int row = lane() % 4 * 2, column = lane() / 4 * 4;
    const element *const even = b + row * DEPTH + (column ^ turn_of_row(row));
    const element *const odd = b + (row + 1) * DEPTH + (column ^ turn_of_row(row + 1));
#pragma unroll
    for (int k = 0; k < WIDTH / 8; ++k) {
        Left factors[BLOCKS];
#pragma unroll
        for (int i = 0; i < BLOCKS; ++i)
#pragma unroll
            for (int slot = 0; slot < 4; ++slot)
                factors[i].of[slot] = parts_of(weights[2 * i + slot % 2][2 * k + slot / 2]);
#pragma unroll
        for (int group = 0; group < DEPTH / 32; ++group) {
            const Chunk first = chunk_at(even + k * 8 * DEPTH + group * 32),
                        second = chunk_at(odd + k * 8 * DEPTH + group * 32);
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                const Parts upper = parts_of(first.of[j]), lower = parts_of(second.of[j]);
                const int low = group * 8 + j, high = low + 4;
#pragma unroll
                for (int i = 0; i < BLOCKS; ++i)
                    mma_split<false>(sums[2 * i][low], sums[2 * i][high], sums[2 * i + 1][low], sums[2 * i + 1][high],
                                     factors[i], upper, lower);
            }
        }
    }
}

#endif
