// What the kernel for the gradient of queries does behind its main loop: stores the sums, and computes rows
// again that hold NaN or infinities of keys that they must not see.
// Needs: fused/backward/queries/consumer.cuh, fused/exact.cuh.

__device__ inline void store_gradients(const Parameters &p, const QueryTile &tile, const QueryRows &state,
                                       unsigned char *memory) {
    unsigned non_finite = 0;
#pragma unroll
    for (int r = 0; r < row_slots<ROWS>(); ++r) {
        bool finite = true;
#pragma unroll
        for (int c = 0; c < output_slots<HEAD>(); ++c) finite &= is_finite(state.sums[r][c]);
        if (!finite && tile.first_t + row_at<ROWS>(r) < tile.sequence.queries) non_finite |= 1u << r;
    }
    int *const is_computed_again = reinterpret_cast<int *>(memory);
    const bool any_again = mark_rows<ROWS>(p, non_finite, is_computed_again, [](int r) { return row_at<ROWS>(r); });
    const real scale = scale_of_sums(p);
#pragma unroll
    for (int r = 0; r < row_slots<ROWS>(); ++r) {
        const long long t = tile.first_t + row_at<ROWS>(r);
        if (t >= rows_of_queries(p, tile.sequence) || (any_again && is_computed_again[row_at<ROWS>(r)])) continue;
        const bool zero = t >= tile.sequence.queries;
        element *to_row = at(p.d_query, tile.b, query_row(tile.sequence, t), tile.n);
#pragma unroll
        for (int c = 0; c < output_slots<HEAD>(); c += NEIGHBOURS)
            store_pair(to_row, output_column_at<HEAD>(c), p.head_dim, p.d_query.stride[3], p.aligned & ALIGNED_D_QUERY,
                       zero ? real(0) : state.sums[r][c] * scale, zero ? real(0) : state.sums[r][c + 1] * scale);
    }
    if (!any_again) return;
    for (int local = threadIdx.x / 32; local < ROWS; local += WARPS) {
        if (!is_computed_again[local]) continue;
        const Row row = row_of(p, tile.sequence, tile.b, tile.n, tile.first_t + local);
        real again[HEAD / 32];
        exact_gradient_of_query(p, row, tile.b, tile.n, PreparedState(tile.sequence), again);
        store_row<HEAD>(at(p.d_query, tile.b, query_row(tile.sequence, row.t), tile.n), p.d_query.stride[3], p.head_dim,
                        again, scale);
    }
}
