// What the kernel for all three gradients leaves of the gradient of queries: zeros for rows that no key is
// seen by, and rows that hold NaN or infinities of keys that they must not see, computed again. A warp to a
// tile of query rows.
// Needs: fused/backward/one_pass/turns.cuh, fused/exact.cuh.

// Rows from `t` on of a sequence and head, ROWS of them at most.
__device__ inline void finish_rows(const Parameters &p, const Sequence &sequence, long long b, long long n, int first,
                                   bool non_finite) {
    const bool is_empty = has_no_turn(sequence, first);
    const int end = (int)min((long long)first + ROWS, (long long)rows_of_queries(p, sequence));
    for (int t = first; t < end; ++t) {
        real sums[HEAD / 32];
        element *const to = at(p.d_query, b, query_row(sequence, t), n);
        // Positive zeros, whatever the sign of the scale.
        const bool is_zero = is_empty || t >= sequence.queries;
        if (is_zero) {
#pragma unroll
            for (int i = 0; i < HEAD / 32; ++i) sums[i] = 0;
        } else {
            if (!non_finite || !p.hides_keys) continue;
            bool finite = true;
            for (int i = threadIdx.x % 32; i < p.head_dim; i += 32)
                finite &= is_finite(widened(to[i * p.d_query.stride[3]]));
            if (__all_sync(~0u, finite)) continue;
            const Row row = row_of(p, sequence, b, n, t);
            exact_gradient_of_query(p, row, b, n, PreparedState(sequence), sums);
        }
        store_row<HEAD>(to, p.d_query.stride[3], p.head_dim, sums, is_zero ? real(1) : scale_of_sums(p));
    }
}

extern "C" __global__ void __launch_bounds__(BLOCK) attention_finish_queries(const __grid_constant__ Parameters p) {
    const long long slot = blockIdx.x * (long long)WARPS + threadIdx.x / 32;
    if (slot >= p.query_tiles) return;
    const bool non_finite = non_finite_tiles(p)[slot] != 0;
    const long long slots = query_slots(p);
#if LAYOUT == LAYOUT_DENSE
    const long long head = slot / slots, b = head / p.query_heads, n = head % p.query_heads;
    const int tile = (int)(slot % slots);
#else
    const long long n = slot / slots;
    const auto first = [&](int b) { return first_slot(p.query_starts, p.query_rows, ROWS, 1, b); };
    const int b = last_that_begins(p, slot % slots, first);
    const int tile = (int)(slot % slots) - first(b);
#endif
    const Sequence sequence = sequence_of(p, b);
    // Slots that no tile has, and, where starts in device memory fall, some in front of a sequence.
    if (tile < 0 || tile >= (rows_of_queries(p, sequence) + ROWS - 1) / ROWS) return;
    finish_rows(p, sequence, b, n, tile * ROWS, non_finite);
}
