// Attention forward, second kernel, where the keys are cut into parts: joins the parts of a row, which the first kernel left in
// scratch. One warp to a row and slice of its columns.

extern "C" __global__ void __launch_bounds__(BLOCK, RESIDENT) attention_merge(const Parameters p) {
    const long long all_rows = p.batch * p.query_heads * p.query_length;
    const long long index = blockIdx.x * (long long)WARPS + threadIdx.x / 32, row = index / SLICES;
    if (row >= all_rows) return;
    const int slice = (int)(index % SLICES), first_column = slice * VALUE, width = min(VALUE, p.value_head_dim - first_column);
    const long long t = row % p.query_length, n = row / p.query_length % p.query_heads, b = row / p.query_length / p.query_heads;
    const Batch batch = batch_row(p, b);
    const real *states = p.second + 2 * row;
    // Each lane looks at parts of its own, which costs the latency of one load; sums keep the order of the parts.
    const int lane = threadIdx.x % 32;
    real maximum = -infinity();
    for (int part = lane; part < p.parts; part += 32) maximum = fmax(maximum, states[2 * part * all_rows]);
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) maximum = fmax(maximum, __shfl_xor_sync(~0u, maximum, distance));
    const real factor = power_factor(p);
    const Shift shift = shift_of<HALVES>(maximum == -infinity() ? real(0) : maximum, factor);
    real total = 0, sums[VALUE / 32];
#pragma unroll
    for (int i = 0; i < VALUE / 32; ++i) sums[i] = 0;
    for (int first = 0; first < p.parts; first += 32) {
        const int own = min(first + lane, p.parts - 1);
        const real own_weight = change_of(shift_of<HALVES>(states[2 * own * all_rows], factor), shift, factor);
        const real own_total = states[2 * own * all_rows + 1];
        const int count = min(32, p.parts - first);
#pragma unroll 4
        for (int i = 0; i < count; ++i) {
            const real weight = __shfl_sync(~0u, own_weight, i), part_total = __shfl_sync(~0u, own_total, i);
            // A part without a key has zeros, and its weight may be NaN.
            const bool is_empty = part_total == 0;
            total = is_empty ? total : fma(part_total, weight, total);
            const real *from = p.first + ((first + i) * all_rows + row) * p.value_head_dim + first_column;
#pragma unroll
            for (int j = 0; j < VALUE / 32; ++j) {
                const int column = 32 * j + lane;
                if (column < width) sums[j] = is_empty ? sums[j] : fma(from[column], weight, sums[j]);
            }
        }
    }
    real logsumexp;
    const bool padded = t >= batch.queries;
    const real scale = finish(p, n, padded, maximum, total, logsumexp);
    if (slice == 0 && threadIdx.x % 32 == 0) store_logsumexp(p, b, t, n, logsumexp);
    if (padded || total == 0) {
#pragma unroll
        for (int i = 0; i < VALUE / 32; ++i) sums[i] = 0;
    }
    store_row<VALUE>(at(p.out, b, t, n) + first_column * p.out.stride[3], p.out.stride[3], width, sums, scale);
}
