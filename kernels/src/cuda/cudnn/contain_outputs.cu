// Isolation of NaN after the forward pass: outputs and their logsumexp.
// Needs: cudnn/contain.cuh.
//
// The kernel also recomputes rows with a large logsumexp: their logits are so large that cuDNN's exponents
// have no significant digits left, and cuDNN got -1e29 instead of any smaller bias. `row_offsets` has cuDNN's
// own logsumexp, [B, N, T], which is -inf for a row that sees no key; it is null if no logsumexp can be
// large, as none of packed rows can.

// The logsumexp from which a row counts as large. cuDNN rounds logits in base two before it subtracts the row
// max, to half a unit in the last place of the larger of the two, which differs from key to key. Below 1024,
// the error of a weight is at most 2^-14, less than that of rounding the weight.
constexpr real LARGE = 1024;

// The bits of a warp's rows that have a large logsumexp; every group is one row (GROUP == 1).
__device__ inline unsigned large_rows(const Parameters &p, long long b, long long n, int first, int end) {
    static_assert(GROUPS_OF_WARP <= 32, "a lane to a row");
    const int t = first + threadIdx.x % 32;
    const real x = t < end ? p.row_offsets[(b * p.query_heads + n) * p.query_length + t] : real(0);
    return __ballot_sync(~0u, fabs(x) >= LARGE && is_finite(x)) & ((1u << GROUPS_OF_WARP) - 1);
}

extern "C" __global__ void __launch_bounds__(BLOCK, MANY)
    attention_contain_outputs(const __grid_constant__ Parameters p) {
    const Strip strip = strip_of_queries(p, blockIdx.x);
    const long long b = strip.batch, n = strip.head;
    const int first = strip.first, end = strip.sequence.queries;
    if (first >= end) return;
    const unsigned non_finite = non_finite_groups<VALUE>(p.out, b, query_row(strip.sequence, 0), n, first, end,
                                                         p.value_head_dim, p.aligned & ALIGNED_OUT);
    const unsigned large = GROUP == 1 && p.row_offsets ? large_rows(p, b, n, first, end) : 0;
    for_each_row(non_finite | large, first, end, [&](int t) {
        const long long place = query_row(strip.sequence, t);
        if (!(large >> (t - first) & 1) && is_finite_row(p.out, b, place, n, p.value_head_dim)) return;
        const Row row = row_of(p, strip.sequence, b, n, t);
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
        store_row<VALUE>(at(p.out, b, place, n), p.out.stride[3], p.value_head_dim, sums, scale);
        if (threadIdx.x % 32 == 0) store_logsumexp(p, b, place, n, logsumexp);
    });
}
