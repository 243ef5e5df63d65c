// Products of tiles by fused multiply-add, for f64, and for f32 that is not split, with a layout of
// accumulators of its own: sixteen threads share a row, and a thread's rows are consecutive.
// Needs: fused/logits.cuh, fused/dropout.cuh, fused/shared_tiles.cuh.

#if !TENSOR_CORES

template <int HEIGHT>
__device__ constexpr int row_slots() {
    return HEIGHT * 16 / THREADS;
}

template <int WIDTH>
__device__ constexpr int column_slots() {
    return WIDTH / 16;
}

template <int WIDTH>
__device__ constexpr int output_slots() {
    return WIDTH / 16;
}

template <int HEIGHT>
__device__ inline int row_at(int slot) {
    return threadIdx.x / 16 * row_slots<HEIGHT>() + slot;
}

__device__ inline int column_at(int slot) { return threadIdx.x % 16 + slot * 16; }

__device__ constexpr int column_offset(int slot) { return slot * 16; }

// Tiles hold keys in their own order.
__device__ inline int key_at(int slot) { return column_at(slot); }
__device__ constexpr int key_offset(int slot) { return column_offset(slot); }

template <int HEIGHT>
__device__ inline int key_row_at(int slot) {
    return row_at<HEIGHT>(slot);
}

struct KeysAcross {
    static __device__ constexpr int of(int key) { return key; }
};
typedef KeysAcross KeysDown;

// Mask and bias are read key by key (logits.cuh).
struct NoTerms {
    template <class... Any>
    __device__ inline void read(Any...) {}
};
template <int HEIGHT, int WIDTH>
struct RowMaskBias : NoTerms {};
template <int HEIGHT, int WIDTH>
struct KeyMaskBias : NoTerms {};

constexpr int NEIGHBOURS = 2;

// Outputs are wider than tiles of logits: a thread loads several neighbouring columns at once.
template <int WIDTH>
__device__ inline int output_column_at(int slot) {
    constexpr int RUN = WIDTH % 64 == 0 ? 4 : NEIGHBOURS;
    return slot / RUN * (16 * RUN) + threadIdx.x % 16 * RUN + slot % RUN;
}

__device__ inline bool leads_row() { return threadIdx.x % 16 == 0; }

__device__ inline real sum_of_row(real x) {
#pragma unroll
    for (int distance = 8; distance > 0; distance /= 2) x += __shfl_xor_sync(~0u, x, distance);
    return x;
}

__device__ inline real maximum_of_row(real x) {
#pragma unroll
    for (int distance = 8; distance > 0; distance /= 2) x = fmax(x, __shfl_xor_sync(~0u, x, distance));
    return x;
}

__device__ inline real sum_of_column(real x) { return x + __shfl_xor_sync(~0u, x, 16); }

constexpr int COLUMN_PARTS = WARPS;
__device__ inline int column_part() { return threadIdx.x / 32; }
__device__ inline bool leads_column() { return threadIdx.x % 32 < 16; }

template <int WIDTH>
__device__ inline unsigned kept_of_row(const Parameters &p, const DropoutWords &dropout, const Row &row, int first) {
    unsigned kept = 0;
#pragma unroll
    for (int c = 0; c < column_slots<WIDTH>(); ++c)
        kept |= (is_kept(p, dropout, row, first + column_at(c)) ? 1u : 0u) << c;
    return kept;
}

template <int HEIGHT, int WIDTH>
__device__ inline void kept_of_keys(const Parameters &p, const DropoutWords &dropout, unsigned batch_head, int first_t,
                                    int first, unsigned (&kept)[row_slots<HEIGHT>()]) {
#pragma unroll
    for (int r = 0; r < row_slots<HEIGHT>(); ++r) {
        const unsigned key = (unsigned)(first + key_row_at<HEIGHT>(r));
        kept[r] = 0;
#pragma unroll
        for (int c = 0; c < column_slots<WIDTH>(); ++c)
            kept[r] |=
                (kept_of_block(p, dropout, batch_head, (unsigned)(first_t + column_at(c)), key / 8) >> (key % 8) & 1)
                << c;
    }
}

template <int HEIGHT, int WIDTH, int DEPTH, bool TRANSPOSED = false>
__device__ inline void gemm_ss(real (&sums)[row_slots<HEIGHT>()][column_slots<WIDTH>()], const element *a,
                               const element *b) {
    constexpr int STRIDE = row_stride<DEPTH>();
    constexpr int ROWS_OF_THREAD = row_slots<HEIGHT>(), COLUMNS_OF_THREAD = column_slots<WIDTH>();
#pragma unroll
    for (int r = 0; r < ROWS_OF_THREAD; ++r)
#pragma unroll
        for (int c = 0; c < COLUMNS_OF_THREAD; ++c) sums[r][c] = 0;
    const element *left = a + row_at<HEIGHT>(0) * STRIDE;
    const element *right = b + column_at(0) * STRIDE;
#pragma unroll 4
    for (int k = 0; k < DEPTH; k += CHUNK) {
        Chunk rows[ROWS_OF_THREAD], columns[COLUMNS_OF_THREAD];
#pragma unroll
        for (int r = 0; r < ROWS_OF_THREAD; ++r) rows[r] = chunk_at(left + r * STRIDE + k);
#pragma unroll
        for (int c = 0; c < COLUMNS_OF_THREAD; ++c) columns[c] = chunk_at(right + c * 16 * STRIDE + k);
#pragma unroll
        for (int i = 0; i < CHUNK; ++i)
#pragma unroll
            for (int r = 0; r < ROWS_OF_THREAD; ++r)
#pragma unroll
                for (int c = 0; c < COLUMNS_OF_THREAD; ++c)
                    sums[r][c] = fma(rows[r].of[i], columns[c].of[i], sums[r][c]);
    }
}

// Weights are exchanged through `workspace`, HEIGHT rows of WIDTH and a chunk, between the threads of a row,
// which are in one warp.
template <int HEIGHT, int WIDTH, int DEPTH>
__device__ inline void gemm_rs(real (&sums)[row_slots<HEIGHT>()][output_slots<DEPTH>()],
                               const real (&weights)[row_slots<HEIGHT>()][column_slots<WIDTH>()], const element *b,
                               real *workspace) {
    constexpr int STRIDE = row_stride<DEPTH>(), WORKSPACE_STRIDE = row_stride<WIDTH>();
    constexpr int ROWS_OF_THREAD = row_slots<HEIGHT>(), OUTPUTS = output_slots<DEPTH>();
    real *own = workspace + row_at<HEIGHT>(0) * WORKSPACE_STRIDE;
    __syncwarp();
#pragma unroll
    for (int r = 0; r < ROWS_OF_THREAD; ++r)
#pragma unroll
        for (int c = 0; c < column_slots<WIDTH>(); ++c) own[r * WORKSPACE_STRIDE + column_at(c)] = weights[r][c];
    __syncwarp();
#pragma unroll 2
    for (int k = 0; k < WIDTH; k += CHUNK) {
        Chunk factors[ROWS_OF_THREAD];
#pragma unroll
        for (int r = 0; r < ROWS_OF_THREAD; ++r) factors[r] = chunk_at(own + r * WORKSPACE_STRIDE + k);
#pragma unroll
        for (int i = 0; i < CHUNK; ++i) {
            real row[OUTPUTS];
#pragma unroll
            for (int c = 0; c < OUTPUTS; ++c) row[c] = b[(k + i) * STRIDE + output_column_at<DEPTH>(c)];
#pragma unroll
            for (int r = 0; r < ROWS_OF_THREAD; ++r)
#pragma unroll
                for (int c = 0; c < OUTPUTS; ++c) sums[r][c] = fma(factors[r].of[i], row[c], sums[r][c]);
        }
    }
}

#endif
