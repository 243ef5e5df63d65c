// The gradient of queries. One block to a tile of query rows of a head, which goes over the keys that they see. STAGES says how
// many tiles of keys there is room for.

// From products of queries and keys, and of d_out and values, to the gradients of the products, in the place of the second.
template <class Check>
__device__ inline void weigh_tile(const Parameters &p, const Row (&rows)[row_slots<ROWS>()], const real (&logsumexps)[row_slots<ROWS>()],
                                  const real (&deltas)[row_slots<ROWS>()], int first, const RowTerms<ROWS, KEYS> &terms,
                                  const real (&products)[row_slots<ROWS>()][column_slots<KEYS>()],
                                  real (&gradients)[row_slots<ROWS>()][column_slots<KEYS>()]) {
#pragma unroll
    for (int r = 0; r < row_slots<ROWS>(); ++r) {
        const unsigned kept = drops(p) ? kept_of_row<KEYS>(p, rows[r], first) : ~0u;
        const real distance = distance_of(p, rows[r], first + key_at(0));
#pragma unroll
        for (int c = 0; c < column_slots<KEYS>(); ++c)
            gradients[r][c] = weigh<Check>(p, rows[r], first + key_at(c), distance - key_offset(c), terms, r, c, kept >> c & 1,
                                           products[r][c], gradients[r][c], logsumexps[r], deltas[r])
                                  .product;
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT) attention_gradient_of_queries(const Parameters p) {
    extern __shared__ __align__(1024) unsigned char memory[];
    constexpr int KEY_TILE = tile_size<KEYS, HEAD>(), VALUE_TILE = tile_size<KEYS, VALUE>();
    element *const query_tile = reinterpret_cast<element *>(memory);
    element *const d_out_tile = query_tile + tile_size<ROWS, HEAD>();
    element *const key_tiles = d_out_tile + tile_size<ROWS, VALUE>();
    element *const value_tiles = key_tiles + STAGES * KEY_TILE;
    real *const room = reinterpret_cast<real *>(value_tiles + STAGES * VALUE_TILE);
    constexpr int ROW_SLOTS = row_slots<ROWS>(), KEY_SLOTS = column_slots<KEYS>(), OUT_SLOTS = output_slots<HEAD>();

    const long long row_tiles = (p.query_length + ROWS - 1) / ROWS;
    long long index = blockIdx.x;
    const long long first_t = (row_tiles - 1 - index % row_tiles) * ROWS;
    index /= row_tiles;
    const long long n = index % p.query_heads, b = index / p.query_heads, key_head = n / p.group;
    const Batch batch = batch_row(p, b);

    Row rows[ROW_SLOTS];
    real logsumexps[ROW_SLOTS], deltas[ROW_SLOTS];
#pragma unroll
    for (int r = 0; r < ROW_SLOTS; ++r) {
        const long long t = first_t + row_at<ROWS>(r);
        rows[r] = row_of(p, batch, b, n, t);
        const bool there = t < batch.queries;
        logsumexps[r] = there ? p.first[state_of(p, b, n, t)] : infinity();
        deltas[r] = there ? p.second[state_of(p, b, n, t)] : real(0);
    }
    int from = 0, to = 0, all_from = 0, all_to = 0;
    if (first_t < batch.queries) {
        const long long last_t = min(first_t + ROWS, (long long)batch.queries) - 1;
        from = first_key(batch, first_t) / KEYS * KEYS;
        to = end_key(batch, last_t);
        all_from = first_key(batch, last_t);
        all_to = end_key(batch, first_t);
    }

    const auto stage_step = [&](int first) {
        const int slot = STAGES > 1 ? (first - from) / KEYS % STAGES : 0;
        stage_rows<KEYS, HEAD, KeysAcross>(key_tiles + slot * KEY_TILE, p.key, b, key_head, first, batch.keys, p.head_dim, p.aligned & ALIGNED_KEY);
        stage_rows<KEYS, VALUE, KeysAcross>(value_tiles + slot * VALUE_TILE, p.value, b, key_head, first, batch.keys, p.value_head_dim,
                                p.aligned & ALIGNED_VALUE);
        close_copies();
    };
    real sums[ROW_SLOTS][OUT_SLOTS];
#pragma unroll
    for (int r = 0; r < ROW_SLOTS; ++r)
#pragma unroll
        for (int c = 0; c < OUT_SLOTS; ++c) sums[r][c] = 0;
    if (from < to) {
        stage_rows<ROWS, HEAD>(query_tile, p.query, b, n, first_t, batch.queries, p.head_dim, p.aligned & ALIGNED_QUERY);
        stage_rows<ROWS, VALUE>(d_out_tile, p.d_out, b, n, first_t, batch.queries, p.value_head_dim, p.aligned & ALIGNED_D_OUT);
        stage_step(from);
    }
    // With a third slot, what is added to the sums may still be read when the next tile but one is loaded.
    constexpr bool DEFERS = STAGES > 2;
    Factors<KEYS> factors;
    for (int first = from; first < to; first += KEYS) {
        await_copies<0>();
        __syncthreads();
        if (STAGES > 1 && first + KEYS < to) stage_step(first + KEYS);
        const int slot = (first - from) / KEYS % STAGES;
        const element *key_tile = key_tiles + slot * KEY_TILE;
        const bool checked = first < all_from || first + KEYS > all_to;
        real weights[ROW_SLOTS][KEY_SLOTS], gradients[ROW_SLOTS][KEY_SLOTS];
        begin_products<ROWS, KEYS, HEAD>(weights, query_tile, key_tile);
        begin_products<ROWS, KEYS, VALUE>(gradients, d_out_tile, value_tiles + slot * VALUE_TILE);
        RowTerms<ROWS, KEYS> terms;
        if constexpr (PACKS_MASK || PACKS_BIAS) terms.read(p, rows, first);
        await_products<0>();
        hold(weights);
        hold(gradients);
        if (checked)
            weigh_tile<Checked>(p, rows, logsumexps, deltas, first, terms, weights, gradients);
        else
            weigh_tile<Unchecked>(p, rows, logsumexps, deltas, first, terms, weights, gradients);
        begin_weighted<ROWS, KEYS, HEAD>(sums, gradients, factors, key_tile, room);
        if constexpr (!DEFERS) await_products<0>();
        if (STAGES == 1 && first + KEYS < to) {
            __syncthreads();
            stage_step(first + KEYS);
        }
    }
    await_products<0>();
    hold(sums);

    unsigned spoiled = 0;
#pragma unroll
    for (int r = 0; r < ROW_SLOTS; ++r) {
        bool finite = true;
#pragma unroll
        for (int c = 0; c < OUT_SLOTS; ++c) finite &= is_finite(sums[r][c]);
        if (!finite && first_t + row_at<ROWS>(r) < batch.queries) spoiled |= 1u << r;
    }
    int *const row_spoiled = reinterpret_cast<int *>(memory);
    bool any_spoiled = false;
    if (p.contains) {
        any_spoiled = __syncthreads_or(spoiled != 0);
        if (any_spoiled) {
            for (int row = threadIdx.x; row < ROWS; row += THREADS) row_spoiled[row] = 0;
            __syncthreads();
#pragma unroll
            for (int r = 0; r < ROW_SLOTS; ++r)
                if (spoiled >> r & 1) row_spoiled[row_at<ROWS>(r)] = 1;
            __syncthreads();
        }
    }
    const real scale = (real)p.scale;
#pragma unroll
    for (int r = 0; r < ROW_SLOTS; ++r) {
        const long long t = first_t + row_at<ROWS>(r);
        if (t >= p.query_length || (any_spoiled && row_spoiled[row_at<ROWS>(r)])) continue;
        const bool zero = t >= batch.queries;
        element *to_row = at(p.d_query, b, t, n);
#pragma unroll
        for (int c = 0; c < OUT_SLOTS; c += NEIGHBOURS)
            store_pair(to_row, output_column_at<HEAD>(c), p.head_dim, p.d_query.stride[3], p.aligned & ALIGNED_D_QUERY,
                       zero ? real(0) : sums[r][c] * scale, zero ? real(0) : sums[r][c + 1] * scale);
    }
    if (!any_spoiled) return;
    for (int local = threadIdx.x / 32; local < ROWS; local += WARPS) {
        if (!row_spoiled[local]) continue;
        const Row row = row_of(p, batch, b, n, first_t + local);
        real again[HEAD / 32];
#pragma unroll
        for (int i = 0; i < HEAD / 32; ++i) again[i] = 0;
        for (int key = row.low; key < row.high; ++key) {
            Weights weights;
            if (weigh_exactly(p, row, b, n, key, weights))
                add_row<HEAD>(again, weights.product, at(p.key, b, key, key_head), p.key.stride[3], p.head_dim);
        }
#pragma unroll
        for (int i = 0; i < HEAD / 32; ++i) {
            const int column = 32 * i + threadIdx.x % 32;
            if (column < p.head_dim) at(p.d_query, b, row.t, n)[column * p.d_query.stride[3]] = rounded(again[i] * scale);
        }
    }
}
