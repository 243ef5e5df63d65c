// Attention forward with split keys, second kernel: combines the partial results of a row that the first
// kernel left in scratch. One warp per row and 32 of its columns.
// Needs: fused/softmax.cuh, fused/exact.cuh.

// A row's columns are shared by warps, one column to a thread: parts of many splits are loaded at once then.
constexpr int COLUMNS = 1, GROUPS = VALUE / 32, PIECES = SLICES * GROUPS;
// Splits whose partial outputs a warp loads at once: one for each thread, which reads its row max and row sum.
constexpr int BATCH = 32;

extern "C" __global__ void __launch_bounds__(BLOCK, MIN_BLOCKS) attention_merge(const __grid_constant__ Parameters p) {
    const long long all_rows = count_of_rows(p);
    const long long index = blockIdx.x * (long long)WARPS + threadIdx.x / 32, row = index / PIECES;
    const int piece = (int)(index % PIECES), slice = piece / GROUPS;
    const int first_column = slice * VALUE + piece % GROUPS * 32 * COLUMNS,
              width = min(32 * COLUMNS, p.value_head_dim - first_column);
    long long t = row % p.query_length, n = row / p.query_length % p.query_heads,
              b = row / p.query_length / p.query_heads;
    wait_for_earlier_kernels();
    if (row >= all_rows || width <= 0) return;
#if LAYOUT != LAYOUT_DENSE
    if (packs_queries(p)) {
        n = row / p.query_rows;
        b = sequence_of_query_row(p, row - n * p.query_rows);
    }
#endif
    const Sequence sequence = sequence_of(p, b);
#if LAYOUT != LAYOUT_DENSE
    if (packs_queries(p)) t = row - n * p.query_rows - sequence.first_query;
#endif
    const long long place = query_row(sequence, t);
#if BATCH_INVARIANT
    const real *states = p.partial_state + 2 * (row * SLICES + slice);
#else
    const real *states = p.partial_state + 2 * row;
#endif
    const int lane = threadIdx.x % 32;
    real parts[BATCH][COLUMNS];
    const auto read_batch = [&](int first) {
        const long long step = all_rows * partial_width(p);
        const real *from = p.partial_out + first * step + row * partial_width(p) + first_column + lane;
#pragma unroll
        for (int i = 0; i < BATCH; ++i) {
            // Behind the last split zeros; so is its row sum below.
#pragma unroll
            for (int j = 0; j < COLUMNS; ++j)
                parts[i][j] = first + i < p.splits && 32 * j + lane < width ? from[32 * j] : real(0);
            from += step;
        }
    };
    read_batch(0);
#if BATCH_INVARIANT
    // One after the other, as a block merges them that goes over several (splits.cuh).
    real maximum = -infinity(), total = 0, sums[COLUMNS];
#pragma unroll
    for (int i = 0; i < COLUMNS; ++i) sums[i] = 0;
    const real factor = power_factor(p);
    const long long stride = 2 * all_rows * SLICES;
    for (int first = 0; first < p.splits; first += BATCH) {
        if (first > 0) read_batch(first);
        const int own = min(first + lane, p.splits - 1);
        const real own_max = states[own * stride];
        const real own_total = first + lane < p.splits ? states[own * stride + 1] : real(0);
#pragma unroll
        for (int i = 0; i < BATCH; ++i) {
            const real part_max = __shfl_sync(~0u, own_max, i), part_total = __shfl_sync(~0u, own_total, i);
            if (part_total == 0) continue;
            const bool is_first = total == 0;
            MergedSplits merged{part_max, part_total, 0, 1};
            if (!is_first) merged = merge_splits(factor, maximum, total, part_max, part_total);
            maximum = merged.row_max;
            total = merged.row_sum;
#pragma unroll
            for (int j = 0; j < COLUMNS; ++j)
                sums[j] = is_first ? parts[i][j] : merged_value(merged, sums[j], parts[i][j]);
        }
    }
#else
    // Each lane reads the row max of splits of its own, at the latency of one load; sums keep the order of
    // the splits.
    real maximum = -infinity();
    for (int part = lane; part < p.splits; part += 32) maximum = fmax(maximum, states[2 * part * all_rows]);
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2)
        maximum = fmax(maximum, __shfl_xor_sync(~0u, maximum, distance));
    const real factor = power_factor(p);
    const Shift shift = shift_of<HALVES>(maximum == -infinity() ? real(0) : maximum, factor);
    real total = 0, sums[COLUMNS];
#pragma unroll
    for (int i = 0; i < COLUMNS; ++i) sums[i] = 0;
    for (int first = 0; first < p.splits; first += BATCH) {
        if (first > 0) read_batch(first);
        const int own = min(first + lane, p.splits - 1);
        const real own_weight = change_of(shift_of<HALVES>(states[2 * own * all_rows], factor), shift, factor);
        const real own_total = first + lane < p.splits ? states[2 * own * all_rows + 1] : real(0);
#pragma unroll
        for (int i = 0; i < BATCH; ++i) {
            const real weight = __shfl_sync(~0u, own_weight, i), part_total = __shfl_sync(~0u, own_total, i);
            // A split without a key has zeros, and its weight may be NaN.
            const bool is_empty = part_total == 0;
            total = is_empty ? total : fma(part_total, weight, total);
#pragma unroll
            for (int j = 0; j < COLUMNS; ++j) sums[j] = is_empty ? sums[j] : fma(parts[i][j], weight, sums[j]);
        }
    }
#endif
    real logsumexp;
    const bool padded = t >= sequence.queries;
    const real scale = finish(p, n, padded, maximum, total, logsumexp);
    if (piece == 0 && lane == 0) store_logsumexp(p, b, place, n, logsumexp);
    if (padded || total == 0) {
#pragma unroll
        for (int i = 0; i < COLUMNS; ++i) sums[i] = 0;
    }
#if EIGHT_BIT
    if (!padded && total != 0) {
        const real value_scale = value_scale_of(p, b, (unsigned)n / (unsigned)p.group);
#pragma unroll
        for (int i = 0; i < COLUMNS; ++i) sums[i] = with_value_scale(sums[i] * scale, value_scale);
    }
    store_row<32 * COLUMNS>(at(p.out, b, place, n) + first_column * p.out.stride[3], p.out.stride[3], width, sums, real(1));
#else
    store_row<32 * COLUMNS>(at(p.out, b, place, n) + first_column * p.out.stride[3], p.out.stride[3], width, sums, scale);
#endif
}
