// Containment of the forward pass: outputs and their logsumexp.

extern "C" __global__ void __launch_bounds__(BLOCK, MANY) attention_contain_outputs(const Parameters p) {
    const Strip strip = strip_of_warp(p, blockIdx.x, p.query_length, p.query_heads);
    const long long b = strip.place.batch, n = strip.place.head;
    const int first = strip.first, end = strip.batch.queries;
    if (first >= end) return;
    const unsigned spoiled = spoiled_groups<VALUE>(p.out, b, n, first, end, p.value_head_dim, p.aligned & ALIGNED_OUT);
    for_each_row(spoiled, first, end, [&](int t) {
        if (is_finite_row(p.out, b, t, n, p.value_head_dim)) return;
        const Row row = row_of(p, strip.batch, b, n, t);
        real maximum, total;
        exact_softmax(p, row, b, n, row.low, row.high, maximum, total);
        real sums[VALUE / 32];
        if (total >= 0) {
            exact_output(p, row, b, n, row.low, row.high, maximum, 0, p.value_head_dim, sums);
        } else {
#pragma unroll
            for (int i = 0; i < VALUE / 32; ++i) sums[i] = total;
        }
        real logsumexp;
        const real scale = finish(p, n, false, maximum, total, logsumexp);
        store_row<VALUE>(at(p.out, b, t, n), p.out.stride[3], p.value_head_dim, sums, scale);
        if (threadIdx.x % 32 == 0) store_logsumexp(p, b, t, n, logsumexp);
    });
}
