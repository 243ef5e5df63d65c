// The gradient of the bias: gradients of logits, summed over the axes along which the bias was broadcast. One
// block per tile of the result computes all tiles of logits that it sums, one after the other, and holds the
// sums in registers: no memory of the size of the logits, and a fixed order.
// Needs: fused/exact.cuh, fused/backward/gradients.cuh.

// Adds the gradients of a tile's logits, from products of queries and keys, and of d_out and values.
template <bool MAY_BE_FAR>
__device__ inline void add_gradients(const Parameters &p, const DropoutWords &dropout,
                                     const Row (&rows)[row_slots<ROWS>()], const Sequence &sequence, long long b, long long n,
                                     int first, const RowMaskBias<ROWS, KEYS> &mask_bias,
                                     const real (&products)[row_slots<ROWS>()][column_slots<KEYS>()],
                                     const real (&incoming)[row_slots<ROWS>()][column_slots<KEYS>()],
                                     real (&sums)[row_slots<ROWS>()][column_slots<KEYS>()]) {
#pragma unroll
    for (int r = 0; r < row_slots<ROWS>(); ++r) {
        const unsigned kept = drops(p) ? kept_of_row<KEYS>(p, dropout, rows[r], first) : ~0u;
        if (rows[r].t >= sequence.queries) continue;
        const State state = PreparedState(sequence)(p, b, n, rows[r].t);
        const real largest = largest_exponent(state);
        const real distance = distance_of(p, rows[r], first + key_at(0));
#pragma unroll
        for (int c = 0; c < column_slots<KEYS>(); ++c)
            // Exact: no row is computed again here, so what a bias of -inf masks must not become NaN.
            sums[r][c] +=
                weigh<Checked, MAY_BE_FAR, true>(p, rows[r], first + key_at(c), distance - key_offset(c), mask_bias, r,
                                                 c, kept >> c & 1, products[r][c], incoming[r][c], state, largest)
                    .logit;
    }
}

extern "C" __global__ void __launch_bounds__(BLOCK, MIN_BLOCKS)
    attention_gradient_of_bias(const __grid_constant__ Parameters p) {
    extern __shared__ __align__(1024) unsigned char memory[];
    element *const query_tile = reinterpret_cast<element *>(memory);
    element *const d_out_tile = query_tile + tile_size<ROWS, HEAD>();
    element *const key_tile = d_out_tile + tile_size<ROWS, VALUE>();
    element *const value_tile = key_tile + tile_size<KEYS, HEAD>();
    constexpr int ROW_SLOTS = row_slots<ROWS>(), KEY_SLOTS = column_slots<KEYS>();

    // An axis of size 1 is summed over, whether the bias is broadcast along it or the logits have size 1 too.
    const bool sums_batch = p.bias_size[0] == 1, sums_heads = p.bias_size[1] == 1;
    const bool sums_rows = p.bias_size[2] == 1, sums_keys = p.bias_size[3] == 1;
    const long long row_tiles = sums_rows ? 1 : (p.bias_size[2] + ROWS - 1) / ROWS;
    const long long key_tiles = sums_keys ? 1 : (p.bias_size[3] + KEYS - 1) / KEYS;
    long long index = blockIdx.x;
    const long long key_place = index % key_tiles * KEYS;
    index /= key_tiles;
    const long long row_place = index % row_tiles * ROWS;
    index /= row_tiles;
    const long long head_place = index % p.bias_size[1], batch_place = index / p.bias_size[1];

    const DropoutWords dropout = dropout_words(p);
    real sums[ROW_SLOTS][KEY_SLOTS];
#pragma unroll
    for (int r = 0; r < ROW_SLOTS; ++r)
#pragma unroll
        for (int c = 0; c < KEY_SLOTS; ++c) sums[r][c] = 0;

    const long long batch_end = sums_batch ? p.batch : batch_place + 1,
                    head_end = sums_heads ? p.query_heads : head_place + 1;
    const long long row_end = sums_rows ? p.query_length : row_place + 1,
                    key_end = sums_keys ? p.key_length : key_place + 1;
    for (long long b = batch_place; b < batch_end; ++b) {
        const Sequence sequence = sequence_of<true>(p, b);
        for (long long n = head_place; n < head_end; ++n) {
            for (long long first_t = row_place; first_t < row_end && first_t < sequence.queries; first_t += ROWS) {
                const long long last_t = min(first_t + ROWS, (long long)sequence.queries) - 1;
                const int from = first_key(sequence, first_t), to = end_key(sequence, last_t);
                bool staged = false;
                for (long long first = key_place; first < key_end && first < to; first += KEYS) {
                    if (first + KEYS <= from) continue;
                    __syncthreads();
                    if (!staged) {
                        load_query_rows<ROWS, HEAD>(query_tile, p.query, sequence, b, n, first_t, sequence.queries,
                                                    p.head_dim, p.aligned & ALIGNED_QUERY);
                        load_query_rows<ROWS, VALUE>(d_out_tile, p.d_out, sequence, b, n, first_t, sequence.queries,
                                                     p.value_head_dim, p.aligned & ALIGNED_D_OUT);
                        staged = true;
                    }
                    load_key_rows<KEYS, HEAD, KeysAcross>(key_tile, p.key, sequence, b, n / p.group, first,
                                                          sequence.keys, p.head_dim, p.aligned & ALIGNED_KEY);
                    load_key_rows<KEYS, VALUE, KeysAcross>(value_tile, p.value, sequence, b, n / p.group, first,
                                                           sequence.keys, p.value_head_dim, p.aligned & ALIGNED_VALUE);
                    cp_async_commit();
                    cp_async_wait<0>();
                    __syncthreads();
                    real weights[ROW_SLOTS][KEY_SLOTS], gradients[ROW_SLOTS][KEY_SLOTS];
                    gemm_ss<ROWS, KEYS, HEAD>(weights, query_tile, key_tile);
                    gemm_ss<ROWS, KEYS, VALUE>(gradients, d_out_tile, value_tile);
                    Row rows[ROW_SLOTS];
#pragma unroll
                    for (int r = 0; r < ROW_SLOTS; ++r) rows[r] = row_of(p, sequence, b, n, first_t + row_at<ROWS>(r));
                    RowMaskBias<ROWS, KEYS> mask_bias;
                    if constexpr (PACKS_MASK || PACKS_BIAS) mask_bias.read(p, rows, (int)first);
                    if (has_far_rows(p, b, n))
                        add_gradients<true>(p, dropout, rows, sequence, b, n, (int)first, mask_bias, weights,
                                            gradients, sums);
                    else
                        add_gradients<false>(p, dropout, rows, sequence, b, n, (int)first, mask_bias, weights,
                                             gradients, sums);
                }
            }
        }
    }

    const auto put = [&](long long t, long long key, real sum) {
        if (t >= p.bias_size[2] || key >= p.bias_size[3]) return;
        const long long *stride = p.d_bias.stride;
        store(p.d_bias.data, p.bias_dtype,
              batch_place * stride[0] + head_place * stride[1] + t * stride[2] + key * stride[3],
              sum * unbalance_of(p));
    };
    if (!sums_rows) {
#pragma unroll
        for (int r = 0; r < ROW_SLOTS; ++r) {
            const long long t = row_place + row_at<ROWS>(r);
            real of_row = 0;
#pragma unroll
            for (int c = 0; c < KEY_SLOTS; ++c) {
                if (sums_keys)
                    of_row += sums[r][c];
                else
                    put(t, key_place + key_at(c), sums[r][c]);
            }
            if (sums_keys) {
                of_row = sum_of_row(of_row);
                if (leads_row()) put(t, 0, of_row);
            }
        }
        return;
    }
    // Columns: first within a warp, then over the warps.
    __syncthreads();
    real *const parts = reinterpret_cast<real *>(memory);
#pragma unroll
    for (int c = 0; c < KEY_SLOTS; ++c) {
        real of_column = 0;
#pragma unroll
        for (int r = 0; r < ROW_SLOTS; ++r) of_column += sums[r][c];
        of_column = sum_of_column(of_column);
        if (leads_column()) parts[column_part() * KEYS + key_at(c)] = of_column;
    }
    __syncthreads();
    real total = 0;
    for (int key = threadIdx.x; key < KEYS; key += THREADS) {
        real of_column = 0;
        for (int part = 0; part < COLUMN_PARTS; ++part) of_column += parts[part * KEYS + key];
        if (sums_keys)
            total += of_column;
        else
            put(0, key_place + key, of_column);
    }
    if (!sums_keys) return;
    total = sum_of_warp(total);
    __syncthreads();
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = total;
    __syncthreads();
    if (threadIdx.x == 0) {
        real all = 0;
        for (int warp = 0; warp < WARPS; ++warp) all += parts[warp];
        put(0, 0, all);
    }
}
