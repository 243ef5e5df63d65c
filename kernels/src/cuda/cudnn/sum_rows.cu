// The row maxima and row sums of far rows (far_rows.cuh), for the kernels that recompute cuDNN's gradients.
// One block per tile of query rows of a head; blocks without a far row return at once.
// attention_prepare_backward has set the numbers of the heads to 0.
// Needs: fused/backward/far_rows.cuh.

extern "C" __global__ void __launch_bounds__(BLOCK, MIN_BLOCKS)
    attention_sum_rows(const __grid_constant__ Parameters p) {
    static_assert(PRODUCER_THREADS == 0, "every thread loads and computes");
    extern __shared__ __align__(1024) unsigned char memory[];
    element *const query_tile = reinterpret_cast<element *>(memory);
    element *const key_tile = query_tile + tile_size<ROWS, HEAD>();
    constexpr int ROW_SLOTS = row_slots<ROWS>();

    const int row_tiles = (int)((p.query_length + ROWS - 1) / ROWS);
    const TileIndex place = tile_of_block(p, blockIdx.x, row_tiles, (unsigned)p.query_heads);
    const int first_t = place.tile * ROWS;
    const long long n = place.head, b = place.batch, key_head = (unsigned)place.head / (unsigned)p.group;
    const Sequence sequence = sequence_of(p, b);
    const int row_count = min(ROWS, sequence.queries - first_t);
    bool any_far = false;
    for (int row = threadIdx.x; row < row_count; row += BLOCK) {
        const real *const lse = reinterpret_cast<const real *>(p.lse.data);
        any_far |=
            is_far(lse[b * p.lse.stride[0] + (long long)(first_t + row) * p.lse.stride[1] + n * p.lse.stride[2]]);
    }
    if (!__syncthreads_or(any_far)) return;
    if (threadIdx.x == 0) far_heads(p)[b * p.query_heads + n] = 1;

    const int last_t = first_t + row_count - 1;
    const int from = first_key(sequence, first_t) / KEYS * KEYS, to = end_key(sequence, last_t);
    load_rows<ROWS, HEAD>(query_tile, p.query, b, n, first_t, sequence.queries, p.head_dim, p.aligned & ALIGNED_QUERY);

    Row rows[ROW_SLOTS];
    RowSums sums;
#pragma unroll
    for (int r = 0; r < ROW_SLOTS; ++r) {
        rows[r] = row_of(p, sequence, b, n, first_t + row_at<ROWS>(r));
        sums.row_max[r] = -infinity();
        sums.row_sum[r] = 0;
    }
    for (int first = from; first < to; first += KEYS) {
        load_rows<KEYS, HEAD, KeysAcross>(key_tile, p.key, b, key_head, first, sequence.keys, p.head_dim,
                                          p.aligned & ALIGNED_KEY);
        cp_async_commit();
        cp_async_wait<0>();
        __syncthreads();
        sum_tile(p, rows, first, query_tile, key_tile, sums.row_max, sums.row_sum);
        __syncthreads();
    }
    finish_far_rows(p, b, n, first_t, sums);
}
