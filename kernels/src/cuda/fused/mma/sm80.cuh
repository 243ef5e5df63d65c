// Products of tiles on tensor cores (mma.sync.m16n8k16, from compute capability 8.0), for f16 and bf16 with
// accumulators in f32.
// Needs: fused/shared_tiles.cuh, fused/fragments.cuh.

#if HALVES

// Four 8 x 8 matrices from shared memory. Each lane gives the address of a row and an offset in elements,
// which is part of the instruction where it is constant.
__device__ inline void ldmatrix_x4(unsigned (&to)[4], unsigned row, int offset) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(row + offset * 2));
}

__device__ inline void ldmatrix_x4_trans(unsigned (&to)[4], unsigned row, int offset) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(row + offset * 2));
}

__device__ inline void mma_m16n8k16(float &c0, float &c1, float &c2, float &c3, const unsigned (&a)[4], unsigned b0,
                                    unsigned b1) {
#if DTYPE == DTYPE_F16
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
#else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
#endif
        : "+f"(c0), "+f"(c1), "+f"(c2), "+f"(c3)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

#if !ON_WARPGROUPS

// sums = a * b^T, of tiles HEIGHT x DEPTH and WIDTH x DEPTH.
template <int HEIGHT, int WIDTH, int DEPTH, bool TRANSPOSED = false>
__device__ inline void gemm_ss(real (&sums)[row_slots<HEIGHT>()][column_slots<WIDTH>()], const element *a,
                               const element *b) {
    constexpr int STRIDE = row_stride<DEPTH>();
    constexpr int BLOCKS = row_slots<HEIGHT>() / 2;
#pragma unroll
    for (int r = 0; r < row_slots<HEIGHT>(); ++r)
#pragma unroll
        for (int c = 0; c < column_slots<WIDTH>(); ++c) sums[r][c] = 0;
    const unsigned left =
        shared_address(a + (threadIdx.x / 32 * (HEIGHT / WARPS) + lane() % 16) * STRIDE + lane() / 16 * 8);
    const unsigned right = shared_address(b + (lane() % 8 + lane() / 16 * 8) * STRIDE + lane() / 8 % 2 * 8);
    // The operands of the next step are loaded before this step is computed.
    constexpr int PAIRS = WIDTH / 16, STEPS = DEPTH / 16 * PAIRS;
    unsigned factors[2][BLOCKS][4], columns[2][4];
#pragma unroll
    for (int i = 0; i < BLOCKS; ++i) ldmatrix_x4(factors[0][i], left, i * 16 * STRIDE);
    ldmatrix_x4(columns[0], right, 0);
#pragma unroll
    for (int step = 0; step < STEPS; ++step) {
        const int k = step / PAIRS, j = step % PAIRS, next = step + 1;
        if (next < STEPS) {
            ldmatrix_x4(columns[next % 2], right, next % PAIRS * 16 * STRIDE + next / PAIRS * 16);
            if (next % PAIRS == 0) {
#pragma unroll
                for (int i = 0; i < BLOCKS; ++i)
                    ldmatrix_x4(factors[next / PAIRS % 2][i], left, i * 16 * STRIDE + next / PAIRS * 16);
            }
        }
        const unsigned (&column)[4] = columns[step % 2];
#pragma unroll
        for (int i = 0; i < BLOCKS; ++i) {
            mma_m16n8k16(sums[2 * i][4 * j], sums[2 * i][4 * j + 1], sums[2 * i + 1][4 * j], sums[2 * i + 1][4 * j + 1],
                         factors[k % 2][i], column[0], column[1]);
            mma_m16n8k16(sums[2 * i][4 * j + 2], sums[2 * i][4 * j + 3], sums[2 * i + 1][4 * j + 2],
                         sums[2 * i + 1][4 * j + 3], factors[k % 2][i], column[2], column[3]);
        }
    }
}

// sums += weights * b, of tiles HEIGHT x WIDTH, rounded to the operands' dtype, and WIDTH x DEPTH.
template <int HEIGHT, int WIDTH, int DEPTH>
__device__ inline void gemm_rs(real (&sums)[row_slots<HEIGHT>()][output_slots<DEPTH>()],
                               const real (&weights)[row_slots<HEIGHT>()][column_slots<WIDTH>()], const element *b,
                               real *) {
    constexpr int STRIDE = row_stride<DEPTH>();
    constexpr int BLOCKS = row_slots<HEIGHT>() / 2;
    const unsigned right = shared_address(b + (lane() % 16) * STRIDE + lane() / 16 * 8);
    constexpr int PAIRS = DEPTH / 16, STEPS = WIDTH / 16 * PAIRS;
    unsigned columns[2][4], factors[BLOCKS][4];
    ldmatrix_x4_trans(columns[0], right, 0);
#pragma unroll
    for (int step = 0; step < STEPS; ++step) {
        const int k = step / PAIRS, j = step % PAIRS, next = step + 1;
        if (next < STEPS) ldmatrix_x4_trans(columns[next % 2], right, next / PAIRS * 16 * STRIDE + next % PAIRS * 16);
        if (j == 0) {
#pragma unroll
            for (int i = 0; i < BLOCKS; ++i) {
                factors[i][0] = packed(weights[2 * i][4 * k], weights[2 * i][4 * k + 1]);
                factors[i][1] = packed(weights[2 * i + 1][4 * k], weights[2 * i + 1][4 * k + 1]);
                factors[i][2] = packed(weights[2 * i][4 * k + 2], weights[2 * i][4 * k + 3]);
                factors[i][3] = packed(weights[2 * i + 1][4 * k + 2], weights[2 * i + 1][4 * k + 3]);
            }
        }
        const unsigned (&column)[4] = columns[step % 2];
#pragma unroll
        for (int i = 0; i < BLOCKS; ++i) {
            mma_m16n8k16(sums[2 * i][4 * j], sums[2 * i][4 * j + 1], sums[2 * i + 1][4 * j], sums[2 * i + 1][4 * j + 1],
                         factors[i], column[0], column[1]);
            mma_m16n8k16(sums[2 * i][4 * j + 2], sums[2 * i][4 * j + 3], sums[2 * i + 1][4 * j + 2],
                         sums[2 * i + 1][4 * j + 3], factors[i], column[2], column[3]);
        }
    }
}

#endif

#endif
