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
    real maximum = -infinity();
    for (int part = 0; part < p.parts; ++part) maximum = fmax(maximum, states[2 * part * all_rows]);
    const real factor = power_factor(p);
    const Shift shift = shift_of<HALVES>(maximum == -infinity() ? real(0) : maximum, factor);
    real total = 0, sums[VALUE / 32];
#pragma unroll
    for (int i = 0; i < VALUE / 32; ++i) sums[i] = 0;
    for (int part = 0; part < p.parts; ++part) {
        const real weight = change_of(shift_of<HALVES>(states[2 * part * all_rows], factor), shift, factor);
        const real part_total = states[2 * part * all_rows + 1];
        if (part_total == 0) continue;
        total = fma(part_total, weight, total);
        const real *from = p.first + (part * all_rows + row) * p.value_head_dim + first_column;
#pragma unroll
        for (int i = 0; i < VALUE / 32; ++i) {
            const int column = 32 * i + threadIdx.x % 32;
            if (column < width) sums[i] = fma(from[column], weight, sums[i]);
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
