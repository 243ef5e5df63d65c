// Products of tiles on tensor cores (mma.sync.m16n8k16) whose keys and values are the bytes that were copied:
// threads read them from shared memory as they are, and widen them in registers, so no wider tile is written
// and read back.
// Needs: fused/forward/widen.cuh, fused/fragments.cuh, fused/mma/sm80.cuh.
//
// A sum may be taken in any order as long as both operands have the same, and columns of a result may stand
// in any order as long as whoever reads them knows it. So a thread's elements are neighbours in memory:
//
// - Keys: of every 64 columns, a thread has 16 of each of its keys, four to a product of depth 16.
// - Values: a thread has 16 (or 8) neighbouring columns of the keys whose weights it has. Values are the left
//   operand, so that eight query rows are the width of a product: outputs are computed transposed, and
//   brought to the layout of fragments.cuh behind the last key (`transpose_outputs`).

#if READS_BYTES

static_assert(KEYS == 32, "a thread has the weights of eight neighbouring keys (key_at)");
static_assert(row_slots<ROWS>() == 1 || row_slots<ROWS>() == 2, "rows of one product");

// The low two, and the high two, of four bytes as elements in one register.
__device__ inline unsigned widened_low(unsigned four) { return pair_of_f16(f16_pair_of_bytes<EIGHT_BIT, false>(four)); }
__device__ inline unsigned widened_high(unsigned four) { return pair_of_f16(f16_pair_of_bytes<EIGHT_BIT, true>(four)); }

// Where a copy of this row and number of 16 bytes stands, but for `turn_of_copy` (place_of_copy).
template <int DEPTH>
__device__ constexpr int index_of_copy(int row, int piece) {
    return row / 2 * (2 * DEPTH / BYTES) + piece / 4 * 8 + row % 2 * 4 + piece % 4;
}

// Products of queries and keys. A product has 16 rows: with 8 query rows, every thread has two steps of its
// row as if one of them were of the row 8 below. Their products with keys of the other step are not used.
__device__ inline void multiply_keys(real (&products)[row_slots<ROWS>()][column_slots<KEYS>()], const element *queries,
                                     const Staged<HEAD> &keys) {
    constexpr int SLOTS = row_slots<ROWS>(), STRIDE = row_stride<HEAD>(), GROUPS = KEYS / 8;
    // With 16 rows, of both steps the same sums.
    real sums[3 - SLOTS][GROUPS][4] = {};
    const int quad = lane() / 4, place = lane() % 4;
    const element *const left = queries + quad * STRIDE + place * 16;
    // Each of four groups has eight keys, in the order of `key_at`: this thread has number `quad` of each.
    const uint4 *const right = keys.of + index_of_copy<HEAD>(quad / 2 * 8 + quad % 2, place);
#pragma unroll
    for (int part = 0; part < HEAD / 64; ++part) {
        unsigned words[GROUPS][4];
#pragma unroll
        for (int group = 0; group < GROUPS; ++group) {
            const uint4 bytes = right[index_of_copy<HEAD>(2 * group, 4 * part)];
            words[group][0] = bytes.x, words[group][1] = bytes.y, words[group][2] = bytes.z, words[group][3] = bytes.w;
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            uint4 rows[SLOTS];
#pragma unroll
            for (int r = 0; r < SLOTS; ++r)
                rows[r] = *reinterpret_cast<const uint4 *>(left + r * 8 * STRIDE + part * 64 + half * 8);
#pragma unroll
            for (int step = 0; step < 2; ++step)
#pragma unroll
                for (int group = 0; group < GROUPS; ++group) {
                    real(&sum)[4] = sums[SLOTS == 1 ? step : 0][group];
                    if constexpr (SLOTS == 1) {
                        const unsigned factors[4] = {rows[0].x, rows[0].y, rows[0].z, rows[0].w};
                        const unsigned low = words[group][2 * half], high = words[group][2 * half + 1];
                        mma_m16n8k16(sum[0], sum[1], sum[2], sum[3], factors,
                                     step == 0 ? widened_low(low) : widened_high(low),
                                     step == 0 ? widened_low(high) : widened_high(high));
                    } else {
                        const uint4 &top = rows[0], &bottom = rows[SLOTS - 1];
                        const unsigned factors[4] = {step == 0 ? top.x : top.z, step == 0 ? bottom.x : bottom.z,
                                                     step == 0 ? top.y : top.w, step == 0 ? bottom.y : bottom.w};
                        const unsigned word = words[group][2 * half + step];
                        mma_m16n8k16(sum[0], sum[1], sum[2], sum[3], factors, widened_low(word), widened_high(word));
                    }
                }
        }
    }
#pragma unroll
    for (int c = 0; c < column_slots<KEYS>(); ++c) {
        if constexpr (SLOTS == 1) {
            products[0][c] = sums[0][c / 2][c % 2] + sums[2 - SLOTS][c / 2][2 + c % 2];
        } else {
            products[0][c] = sums[0][c / 2][c % 2];
            products[SLOTS - 1][c] = sums[0][c / 2][2 + c % 2];
        }
    }
}

// Neighbouring columns of values that a thread has, and how often: eight threads have SPAN columns.
constexpr int RUN = VALUE % 128 == 0 ? 16 : 8, SPAN = 8 * RUN;

struct alignas(RUN) RunOfBytes {
    unsigned words[RUN / 4];
};

// sums += transposed weights * values. Slot `(span * RUN + column) / 2 * 4 + column % 2 * 2 + i` of a thread
// has the sum of its column `column` of a span, and of query row `lane() % 4 * 2 + i` of eight.
__device__ inline void multiply_values(real (&sums)[row_slots<ROWS>()][output_slots<VALUE>()],
                                       const real (&weights)[row_slots<ROWS>()][column_slots<KEYS>()],
                                       const Staged<VALUE> &values) {
    constexpr int SLOTS = row_slots<ROWS>();
    const int quad = lane() / 4, place = lane() % 4;
    // The keys of slots 0 to 7 (key_at) are rows 8 * place to 8 * place + 7, even and odd ones.
    const char *from[2];
#pragma unroll
    for (int odd = 0; odd < 2; ++odd)
        from[odd] =
            reinterpret_cast<const char *>(values.of + (index_of_copy<VALUE>(8 * place + odd, quad * RUN / BYTES) ^
                                                        turn_of_copy<true>(8 * place))) +
            quad * RUN % BYTES;
#pragma unroll
    for (int step = 0; step < KEYS / 16; ++step) {
        unsigned factors[SLOTS][2];
#pragma unroll
        for (int r = 0; r < SLOTS; ++r) {
            factors[r][0] = packed(weights[r][4 * step], weights[r][4 * step + 1]);
            factors[r][1] = packed(weights[r][4 * step + 2], weights[r][4 * step + 3]);
        }
#pragma unroll
        for (int span = 0; span < VALUE / SPAN; ++span) {
            RunOfBytes rows[4];
#pragma unroll
            for (int i = 0; i < 4; ++i)
                rows[i] = *reinterpret_cast<const RunOfBytes *>(
                    from[i % 2] + BYTES * index_of_copy<VALUE>(4 * step + i / 2 * 2, span * (SPAN / BYTES)));
#pragma unroll
            for (int column = 0; column < RUN; column += 2) {
                // Two columns of two neighbouring keys each.
                const unsigned picked = column % 4 == 0 ? 0x5140 : 0x7362;
                const unsigned first = __byte_perm(rows[0].words[column / 4], rows[1].words[column / 4], picked),
                               second = __byte_perm(rows[2].words[column / 4], rows[3].words[column / 4], picked);
                const unsigned left[4] = {widened_low(first), widened_high(first), widened_low(second),
                                          widened_high(second)};
                const int slot = (span * RUN + column) * 2;
#pragma unroll
                for (int r = 0; r < SLOTS; ++r)
                    mma_m16n8k16(sums[r][slot], sums[r][slot + 1], sums[r][slot + 2], sums[r][slot + 3], left,
                                 factors[r][0], factors[r][1]);
            }
        }
    }
}

// Multiplies transposed outputs by a factor of each row.
__device__ inline void rescale_transposed(real (&outputs)[row_slots<ROWS>()][output_slots<VALUE>()],
                                          const real (&scores_scale)[row_slots<ROWS>()]) {
#pragma unroll
    for (int r = 0; r < row_slots<ROWS>(); ++r) {
        // Row i of eight is that of lanes 4 * i to 4 * i + 3.
        const real even = __shfl_sync(~0u, scores_scale[r], lane() % 4 * 8),
                   odd = __shfl_sync(~0u, scores_scale[r], lane() % 4 * 8 + 4);
#pragma unroll
        for (int c = 0; c < output_slots<VALUE>(); ++c) outputs[r][c] *= c % 2 == 0 ? even : odd;
    }
}

// Brings transposed outputs to the layout of fragments.cuh, through memory that is not used any more.
__device__ inline void transpose_outputs(real (&outputs)[row_slots<ROWS>()][output_slots<VALUE>()], real *memory) {
    constexpr int STRIDE = VALUE + 4;
    static_assert(8 * STRIDE * sizeof(real) <= KEYS * (HEAD + VALUE), "there is as much behind the queries");
#pragma unroll
    for (int r = 0; r < row_slots<ROWS>(); ++r) {
        __syncwarp();
#pragma unroll
        for (int c = 0; c < output_slots<VALUE>(); ++c) {
            const int span = c / (2 * RUN), column = c / 4 * 2 % RUN + c / 2 % 2;
            memory[(lane() % 4 * 2 + c % 2) * STRIDE + span * SPAN + lane() / 4 * RUN + column] = outputs[r][c];
        }
        __syncwarp();
#pragma unroll
        for (int c = 0; c < output_slots<VALUE>(); ++c)
            outputs[r][c] = memory[lane() / 4 * STRIDE + output_column_at<VALUE>(c)];
    }
}

#endif
