// The gradients of keys and values. One block to a tile of keys and a key/value head: it goes over the query rows of all
// heads of the group, so that both gradients are summed in registers, in a fixed order, and rounded once.
//
// Logits are computed transposed, keys by queries, so that probabilities and gradients of logits are the factors on the left
// of the products that follow, without leaving registers. WANTED is 1 for the gradient of keys, 2 for that of values, 3 for both;
// STAGES says how many tiles of queries there is room for.

// Numbers that a tile of queries comes with: offset and row term of each row, whether the head has far rows, and 12 or 24 bytes that
// keep the next ones aligned.
constexpr int STATES = 2 * ROWS + 4;

constexpr bool WANTS_KEYS = (WANTED & 1) != 0, WANTS_VALUES = (WANTED & 2) != 0;

// From products of keys and queries, and of values and d_out, to probabilities after dropout and the gradients of the first
// products, in their places. `state` holds the offset and the row term of each query row; scores are read where the head has far rows.
// As in backward_queries.cu, the checked version has those too.
template <class Check, bool MAY_BE_FAR>
__device__ inline void weigh_tile(const Parameters &p, const Batch &batch, long long b, long long n, int t, int first, const real *state,
                                  bool has_far, const KeyTerms<KEYS, ROWS> &terms,
                                  real (&weights)[row_slots<KEYS>()][column_slots<ROWS>()],
                                  real (&gradients)[row_slots<KEYS>()][column_slots<ROWS>()]) {
    unsigned kept[row_slots<KEYS>()];
    if (drops(p)) kept_of_keys<KEYS, ROWS>(p, (unsigned)(b * p.query_heads + n), t, first, kept);
    real distances[row_slots<KEYS>()];
    const Row first_row = row_of(p, batch, b, n, t + column_at(0), false);
    const real *const scores = MAY_BE_FAR ? scores_of_states(p) + state_of(p, b, n, t + column_at(0)) : nullptr;
    const int rows_left = MAY_BE_FAR && has_far ? batch.queries - t - column_at(0) : 0;
#pragma unroll
    for (int r = 0; r < row_slots<KEYS>(); ++r) distances[r] = distance_of(p, first_row, first + key_row_at<KEYS>(r));
#pragma unroll
    for (int c = 0; c < column_slots<ROWS>(); ++c) {
        const int column = column_at(c);
        Row row = first_row;
        if (READS_SINGLY || Check::value) row = row_of(p, batch, b, n, t + column, Check::value);
        const bool has_score = MAY_BE_FAR && column_offset(c) < rows_left;
        const State own{has_score ? scores[column_offset(c)] : real(0), state[column], state[ROWS + column]};
        const real largest = MAY_BE_FAR ? computed_here(largest_exponent(own)) : infinity();
#pragma unroll
        for (int r = 0; r < row_slots<KEYS>(); ++r) {
            const Weights of =
                weigh<Check, MAY_BE_FAR, false>(p, row, first + key_row_at<KEYS>(r), distances[r] + column_offset(c), terms, r, c,
                                                !drops(p) || kept[r] >> c & 1, weights[r][c], WANTS_KEYS ? gradients[r][c] : real(0),
                                                own, largest);
            weights[r][c] = of.kept;
            gradients[r][c] = of.product;
        }
    }
}

extern "C" __global__ void __launch_bounds__(BLOCK, RESIDENT) attention_gradient_of_keys(const Parameters p) {
    extern __shared__ __align__(1024) unsigned char memory[];
    constexpr int QUERY_TILE = tile_size<ROWS, HEAD>(), D_OUT_TILE = tile_size<ROWS, VALUE>();
    element *const key_tile = reinterpret_cast<element *>(memory);
    element *const value_tile = key_tile + tile_size<KEYS, HEAD>();
    element *const query_tiles = value_tile + tile_size<KEYS, VALUE>();
    element *const d_out_tiles = query_tiles + STAGES * QUERY_TILE;
    real *const states = reinterpret_cast<real *>(d_out_tiles + STAGES * D_OUT_TILE);
    real *const room = states + STAGES * STATES;
    constexpr int KEY_SLOTS = row_slots<KEYS>(), ROW_SLOTS = column_slots<ROWS>();

    const Place place = place_of_block(p, blockIdx.x, (unsigned)((p.key_length + KEYS - 1) / KEYS), (unsigned)p.key_heads);
    const int first = place.tile * KEYS;
    const long long key_head = place.head, b = place.batch;
    const Batch batch = batch_row(p, b);
    const int end = min(first + KEYS, batch.keys);

    // The rows that any key of the tile is seen by.
    int from = 0, to = 0;
    if (first < end) {
        from = between(first - batch.high + 1, 0, batch.queries);
        to = between(end - batch.low, 0, batch.queries);
    }
    const int row_tiles = from < to ? (to - from + ROWS - 1) / ROWS : 0;
    const int steps = row_tiles * p.group;

    const auto stage_keys = [&] {
        stage_rows<KEYS, HEAD, KeysDown>(key_tile, p.key, b, key_head, first, end, p.head_dim, p.aligned & ALIGNED_KEY);
    };
    const auto stage_values = [&] {
        stage_rows<KEYS, VALUE, KeysDown>(value_tile, p.value, b, key_head, first, end, p.value_head_dim, p.aligned & ALIGNED_VALUE);
    };
    const auto stage_queries = [&](int slot, long long n, int t) {
        stage_rows<ROWS, HEAD>(query_tiles + slot * QUERY_TILE, p.query, b, n, t, to, p.head_dim, p.aligned & ALIGNED_QUERY);
    };
    const auto stage_d_out = [&](int slot, long long n, int t) {
        stage_rows<ROWS, VALUE>(d_out_tiles + slot * D_OUT_TILE, p.d_out, b, n, t, to, p.value_head_dim, p.aligned & ALIGNED_D_OUT);
        real *state = states + slot * STATES;
        const long long place = state_of(p, b, n, t);
        if (stager() == 0) copy_number(state + 2 * ROWS, far_heads(p) + b * p.query_heads + n);
        for (int row = stager(); row < ROWS; row += STAGERS) {
            if (t + row < to) {
                copy_number(state + row, p.first + place + row);
                copy_number(state + ROWS + row, p.second + place + row);
            } else {
                state[row] = -infinity();
                state[ROWS + row] = 0;
            }
        }
    };
    const auto stage_step = [&](int step, long long n, int t) {
        stage_queries(step % STAGES, n, t);
        stage_d_out(step % STAGES, n, t);
        close_copies();
    };

#if ON_WARPGROUPS
    Gate *const keys_there = reinterpret_cast<Gate *>(room);
    Gate *const there = keys_there + 1, *const done = there + STAGES;
    if (threadIdx.x == 0) {
        open_gate(keys_there, LOADERS);
        for (int slot = 0; slot < STAGES; ++slot) {
            open_gate(there + slot, LOADERS);
            // Threads read the rows' numbers themselves, so each says that it is done.
            open_gate(done + slot, THREADS);
        }
    }
    __syncthreads();
    if (threadIdx.x >= THREADS) {
        // Half of the loaders have keys and queries, the others values and d_out.
        give_registers();
        const bool has_queries = threadIdx.x < THREADS + STAGERS;
        if (steps == 0) return;
        if (has_queries)
            stage_keys();
        else
            stage_values();
        deliver(keys_there);
        int step = 0;
        for (long long n = key_head * p.group; n < (key_head + 1) * p.group; ++n) {
            for (int t = from; t < to; t += ROWS, ++step) {
                const int slot = step % STAGES;
                if (has_queries) announce_terms<ROWS, KEYS>(p, b, n, t, first);
                pass(done + slot, step / STAGES - 1);
                if (has_queries)
                    stage_queries(slot, n, t);
                else
                    stage_d_out(slot, n, t);
                deliver(there + slot);
            }
        }
        return;
    }
    take_registers();
#endif

    real keys[KEY_SLOTS][output_slots<HEAD>()], values[KEY_SLOTS][output_slots<VALUE>()];
#pragma unroll
    for (int r = 0; r < KEY_SLOTS; ++r) {
#pragma unroll
        for (int c = 0; c < output_slots<HEAD>(); ++c) keys[r][c] = 0;
#pragma unroll
        for (int c = 0; c < output_slots<VALUE>(); ++c) values[r][c] = 0;
    }
    if (steps > 0) {
#if ON_WARPGROUPS
        pass(keys_there, 0);
#else
        stage_keys();
        stage_values();
        stage_step(0, key_head * p.group, from);
#endif
    }

    Factors<ROWS> factors, changes;
    long long n = key_head * p.group;
    int t = from;
    for (int step = 0; step < steps; ++step) {
        const bool ends_head = t + ROWS >= to;
        const long long next_n = ends_head ? n + 1 : n;
        const int next_t = ends_head ? from : t + ROWS;
        const int slot = step % STAGES;
#if ON_WARPGROUPS
        pass(there + slot, step / STAGES);
#else
        await_copies<0>();
        __syncthreads();
        if (STAGES > 1 && step + 1 < steps) stage_step(step + 1, next_n, next_t);
#endif
        const element *query_tile = query_tiles + slot * QUERY_TILE, *d_out_tile = d_out_tiles + slot * D_OUT_TILE;
        const real *state = states + slot * STATES;
        const int last_t = min(t + ROWS, to) - 1;
        // Behind the last row a bias may hold anything, and behind the last key there is none.
        const bool whole = t + ROWS <= to && first + KEYS <= end;
        const bool checked = !whole || first_key(batch, last_t) > first || end_key(batch, t) < end;
        const bool has_far = state[2 * ROWS] != 0;

        real weights[KEY_SLOTS][ROW_SLOTS], gradients[KEY_SLOTS][ROW_SLOTS];
        begin_products<KEYS, ROWS, HEAD, true>(weights, key_tile, query_tile);
        if constexpr (WANTS_KEYS) begin_products<KEYS, ROWS, VALUE>(gradients, value_tile, d_out_tile);
        KeyTerms<KEYS, ROWS> terms;
        if constexpr (PACKS_MASK || PACKS_BIAS) terms.read(p, b, n, t, first);
        await_products<0>();
        hold(weights);
        if constexpr (WANTS_KEYS) hold(gradients);
        if (checked || has_far)
            weigh_tile<Checked, true>(p, batch, b, n, t, first, state, has_far, terms, weights, gradients);
        else
            weigh_tile<Unchecked, false>(p, batch, b, n, t, first, state, has_far, terms, weights, gradients);
        if constexpr (WANTS_VALUES) begin_weighted<KEYS, ROWS, VALUE>(values, weights, factors, d_out_tile, room);
        if constexpr (WANTS_KEYS) begin_weighted<KEYS, ROWS, HEAD>(keys, gradients, changes, query_tile, room);
        await_products<0>();
        hold(keys);
        hold(values);
#if ON_WARPGROUPS
        arrive(done + slot);
#else
        if (STAGES == 1 && step + 1 < steps) {
            __syncthreads();
            stage_step(step + 1, next_n, next_t);
        }
#endif
        n = next_n;
        t = next_t;
    }

    // As in the forward pass: what is not finite may come from what takes no part.
    unsigned spoiled = 0;
#pragma unroll
    for (int r = 0; r < KEY_SLOTS; ++r) {
        bool finite = true;
#pragma unroll
        for (int c = 0; c < output_slots<HEAD>(); ++c) finite &= is_finite(keys[r][c]);
#pragma unroll
        for (int c = 0; c < output_slots<VALUE>(); ++c) finite &= is_finite(values[r][c]);
        if (!finite && first + key_row_at<KEYS>(r) < end) spoiled |= 1u << r;
    }
    int *const key_spoiled = reinterpret_cast<int *>(memory);
    bool any_spoiled = false;
    if (p.contains) {
        any_spoiled = meet_or(spoiled != 0);
        if (any_spoiled) {
            for (int key = threadIdx.x; key < KEYS; key += THREADS) key_spoiled[key] = 0;
            meet();
#pragma unroll
            for (int r = 0; r < KEY_SLOTS; ++r)
                if (spoiled >> r & 1) key_spoiled[key_row_at<KEYS>(r)] = 1;
            meet();
        }
    }
    const real scale = scale_of_sums(p);
#pragma unroll
    for (int r = 0; r < KEY_SLOTS; ++r) {
        const int local = key_row_at<KEYS>(r), key = first + local;
        if (key >= p.key_length || (any_spoiled && key_spoiled[local])) continue;
        const bool zero = key >= end;
        if (WANTS_KEYS && p.d_key.data) {
            element *to_row = at(p.d_key, b, key, key_head);
#pragma unroll
            for (int c = 0; c < output_slots<HEAD>(); c += NEIGHBOURS)
                store_pair(to_row, output_column_at<HEAD>(c), p.head_dim, p.d_key.stride[3], p.aligned & ALIGNED_D_KEY,
                           zero ? real(0) : keys[r][c] * scale, zero ? real(0) : keys[r][c + 1] * scale);
        }
        if (WANTS_VALUES && p.d_value.data) {
            element *to_row = at(p.d_value, b, key, key_head);
#pragma unroll
            for (int c = 0; c < output_slots<VALUE>(); c += NEIGHBOURS)
                store_pair(to_row, output_column_at<VALUE>(c), p.value_head_dim, p.d_value.stride[3], p.aligned & ALIGNED_D_VALUE,
                           zero ? real(0) : values[r][c] * keep_scale(p), zero ? real(0) : values[r][c + 1] * keep_scale(p));
        }
    }
    if (!any_spoiled) return;
    for (int local = threadIdx.x / 32; local < KEYS; local += WARPS) {
        if (!key_spoiled[local]) continue;
        const int key = first + local;
        real key_sums[HEAD / 32], value_sums[VALUE / 32];
        exact_gradients_of_key(p, batch, b, key_head, key, PreparedState(), key_sums, value_sums);
        if (WANTS_KEYS && p.d_key.data)
            store_row<HEAD>(at(p.d_key, b, key, key_head), p.d_key.stride[3], p.head_dim, key_sums, scale);
        if (WANTS_VALUES && p.d_value.data)
            store_row<VALUE>(at(p.d_value, b, key, key_head), p.d_value.stride[3], p.value_head_dim, value_sums, keep_scale(p));
    }
}
