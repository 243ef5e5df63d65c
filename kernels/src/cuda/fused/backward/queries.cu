// The gradient of queries. One block to a tile of query rows of a head, which goes over the keys that they see. STAGES says how
// many tiles of keys there is room for.
//
// Where the tile has a far row (gradients.cuh), the block goes over the keys twice, first for the sums of such rows. It leaves those for
// the kernels behind it, and says so for its head. That is all there is to do where nobody wants the gradient.

// Whether threads keep what they know of their rows in registers. On warpgroups, beside a bias or a mask, there are none to spare: what is
// read of those for a tile would be stored again, and waited for before the products are there.
constexpr bool KEEPS_ROWS = !ON_WARPGROUPS || !(PACKS_MASK || PACKS_BIAS);

// What is kept in shared memory of a row then: the keys in reach, and where its bias or mask begins.
struct Reach {
    int low, high;
    long long terms;
};

// Numbers of a block on warpgroups: whether the tile has a far row, for the loaders; 12 bytes that keep the next ones aligned;
// the score of each row; and of rows that threads do not keep, the offset and row term, and the reach. No more than needed:
// shared memory that is not set aside is cache.
constexpr int NUMBERS = !ON_WARPGROUPS ? 0 : 4 + ROWS + (KEEPS_ROWS ? 0 : 2 * ROWS + ROWS * (int)(sizeof(Reach) / sizeof(real)));

// From products of queries and keys, and of d_out and values, to the gradients of the products, in the place of the second.
// `state_of_slot` gives the state of a row of the thread, with a score where the tile has far rows.
//
// Tiles with far rows are weighed by the checked version, not by a third one, which would make the loop over tiles longer for all calls:
// short calls wait for instructions to be fetched.
template <class Check, bool MAY_BE_FAR, class StateOf>
__device__ inline void weigh_tile(const Parameters &p, const Row (&rows)[row_slots<ROWS>()], StateOf state_of_slot, bool is_far_tile,
                                  int first, const RowTerms<ROWS, KEYS> &terms, const real (&products)[row_slots<ROWS>()][column_slots<KEYS>()],
                                  real (&gradients)[row_slots<ROWS>()][column_slots<KEYS>()]) {
#pragma unroll
    for (int r = 0; r < row_slots<ROWS>(); ++r) {
        const unsigned kept = drops(p) ? kept_of_row<KEYS>(p, rows[r], first) : ~0u;
        const real distance = distance_of(p, rows[r], first + key_at(0));
        const State state = state_of_slot(r, MAY_BE_FAR && is_far_tile);
        const real largest = MAY_BE_FAR ? computed_here(largest_exponent(state)) : infinity();
#pragma unroll
        for (int c = 0; c < column_slots<KEYS>(); ++c)
            gradients[r][c] = weigh<Check, MAY_BE_FAR, false>(p, rows[r], first + key_at(c), distance - key_offset(c), terms, r, c,
                                                              kept >> c & 1, products[r][c], gradients[r][c], state, largest)
                                  .product;
    }
}

extern "C" __global__ void __launch_bounds__(BLOCK, RESIDENT) attention_gradient_of_queries(const __grid_constant__ Parameters p) {
    extern __shared__ __align__(1024) unsigned char memory[];
    constexpr int KEY_TILE = tile_size<KEYS, HEAD>(), VALUE_TILE = tile_size<KEYS, VALUE>();
    element *const query_tile = reinterpret_cast<element *>(memory);
    element *const d_out_tile = query_tile + tile_size<ROWS, HEAD>();
    element *const key_tiles = d_out_tile + tile_size<ROWS, VALUE>();
    element *const value_tiles = key_tiles + STAGES * KEY_TILE;
    real *const far = reinterpret_cast<real *>(value_tiles + STAGES * VALUE_TILE);
    real *const room = far + NUMBERS;
    constexpr int ROW_SLOTS = row_slots<ROWS>(), KEY_SLOTS = column_slots<KEYS>(), OUT_SLOTS = output_slots<HEAD>();

    const int row_tiles = (int)((p.query_length + ROWS - 1) / ROWS);
    const Place place = place_of_block(p, blockIdx.x, row_tiles, (unsigned)p.query_heads);
    const int first_t = (row_tiles - 1 - place.tile) * ROWS;
    const long long n = place.head, b = place.batch, key_head = (unsigned)place.head / (unsigned)p.group;
    const Batch batch = batch_row(p, b);
    const real *const scores = scores_of_states(p) + state_of(p, b, n, first_t);
    // attention_prepare_gradients gives a score to far rows alone.
    const auto is_far_row = [&](int row) { return first_t + row < batch.queries && scores[row] != 0; };
    const bool wants_gradient = p.d_query.data != nullptr;
    if (!wants_gradient) {
        bool any_far = false;
        for (int row = threadIdx.x; row < ROWS; row += BLOCK) any_far |= is_far_row(row);
        if (!__syncthreads_or(any_far)) return;
    }

    int from = 0, to = 0, all_from = 0, all_to = 0;
    if (first_t < batch.queries) {
        const int last_t = min(first_t + ROWS, batch.queries) - 1;
        from = first_key(batch, first_t) / KEYS * KEYS;
        to = end_key(batch, last_t);
        all_from = first_key(batch, last_t);
        all_to = end_key(batch, first_t);
    }

#if ON_WARPGROUPS
    real *const scores_here = far + 4, *const offsets_here = scores_here + ROWS, *const deltas_here = offsets_here + ROWS;
    Reach *const reach_here = reinterpret_cast<Reach *>(deltas_here + ROWS);
#endif
    const auto stage_queries = [&] {
        stage_rows<ROWS, HEAD>(query_tile, p.query, b, n, first_t, batch.queries, p.head_dim, p.aligned & ALIGNED_QUERY);
    };
    const auto stage_d_out = [&] {
        stage_rows<ROWS, VALUE>(d_out_tile, p.d_out, b, n, first_t, batch.queries, p.value_head_dim, p.aligned & ALIGNED_D_OUT);
#if ON_WARPGROUPS
        const long long place = state_of(p, b, n, first_t);
        for (int row = stager(); row < ROWS; row += STAGERS) {
            const bool there = first_t + row < batch.queries;
            const auto stage = [&](real *to, const real *from, real otherwise) {
                if (there)
                    copy_number(to + row, from + row);
                else
                    to[row] = otherwise;
            };
            stage(scores_here, scores, 0);
            if (KEEPS_ROWS) continue;
            stage(offsets_here, p.first + place, -infinity());
            stage(deltas_here, p.second + place, 0);
        }
#endif
    };
    const auto stage_keys = [&](int slot, int first) {
        stage_rows<KEYS, HEAD, KeysAcross>(key_tiles + slot * KEY_TILE, p.key, b, key_head, first, batch.keys, p.head_dim,
                                           p.aligned & ALIGNED_KEY);
    };
    const auto stage_values = [&](int slot, int first) {
        stage_rows<KEYS, VALUE, KeysAcross>(value_tiles + slot * VALUE_TILE, p.value, b, key_head, first, batch.keys, p.value_head_dim,
                                            p.aligned & ALIGNED_VALUE);
    };
    const auto stage_step = [&](int step, int first) {
        stage_keys(step % STAGES, first);
        stage_values(step % STAGES, first);
        close_copies();
    };

#if ON_WARPGROUPS
    Gate *const queries_there = reinterpret_cast<Gate *>(room);
    Gate *const there = queries_there + 1, *const done = there + STAGES;
    if (threadIdx.x == 0) {
        *far = 0;
        open_gate(queries_there, LOADERS);
        for (int slot = 0; slot < STAGES; ++slot) {
            open_gate(there + slot, LOADERS);
            open_gate(done + slot, WARPS);
        }
    }
    __syncthreads();
    if (threadIdx.x >= THREADS) {
        // Half of the loaders have queries and keys, the others d_out and values.
        give_registers();
        const bool has_keys = threadIdx.x < THREADS + STAGERS;
        if (from >= to) return;
        if (has_keys)
            stage_queries();
        else
            stage_d_out();
        deliver(queries_there);
        int step = 0;
        const auto load_keys = [&] {
            for (int first = from; first < to; first += KEYS, ++step) {
                const int slot = step % STAGES;
                if (has_keys) announce_terms<ROWS, KEYS>(p, b, n, first_t, first);
                pass(done + slot, step / STAGES - 1);
                if (has_keys)
                    stage_keys(slot, first);
                else
                    stage_values(slot, first);
                deliver(there + slot);
            }
        };
        // The first round of keys is loaded whether rows are far or not, so loaders need not wait to know. The threads that compute set
        // `far` before they are done with the first tile, so that it is known once they are done with the last one.
#pragma unroll 1
        for (bool again = true; again;) {
            const int start = step;
            load_keys();
            pass(done + (step - 1) % STAGES, (step - 1) / STAGES);
            again = start == 0 && wants_gradient && *far != 0;
        }
        return;
    }
    take_registers();
#endif

    Row rows[ROW_SLOTS];
    real offsets[ROW_SLOTS], deltas[ROW_SLOTS];
#pragma unroll
    for (int r = 0; r < ROW_SLOTS; ++r) {
        const long long t = first_t + row_at<ROWS>(r);
        rows[r] = row_of(p, batch, b, n, t);
        const bool there = KEEPS_ROWS && t < batch.queries;
        offsets[r] = there ? p.first[state_of(p, b, n, t)] : -infinity();
        deltas[r] = there ? p.second[state_of(p, b, n, t)] : real(0);
    }
    bool any_far = false;
#if ON_WARPGROUPS
    if constexpr (!KEEPS_ROWS) {
        for (int row = threadIdx.x; row < ROWS; row += THREADS) {
            const Row whole = row_of(p, batch, b, n, first_t + row);
            reach_here[row] = Reach{whole.low, whole.high, PACKS_BIAS ? whole.bias : whole.mask};
        }
        meet();
    }
#else
    for (int row = threadIdx.x; row < ROWS; row += THREADS) any_far |= is_far_row(row);
#endif
    // Rows again, with what is asked for: where their bias or mask begins, or the keys in reach.
    const auto refresh = [&](Row(&again)[ROW_SLOTS], bool reach) {
#pragma unroll
        for (int r = 0; r < ROW_SLOTS; ++r) {
            if (KEEPS_ROWS) again[r] = rows[r];
#if ON_WARPGROUPS
            const Reach &here = reach_here[row_at<ROWS>(r)];
            if (!KEEPS_ROWS && reach) again[r].low = here.low, again[r].high = here.high;
            if (!KEEPS_ROWS && !reach) again[r].bias = again[r].mask = here.terms;
#endif
        }
    };
    const auto state_of_slot = [&](int r, bool may_be_far) {
#if ON_WARPGROUPS
        const int row = row_at<ROWS>(r);
        if (!KEEPS_ROWS) return State{may_be_far ? scores_here[row] : real(0), offsets_here[row], deltas_here[row]};
        return State{may_be_far ? scores_here[row] : real(0), offsets[r], deltas[r]};
#else
        return State{may_be_far && offsets[r] > -infinity() ? scores[row_at<ROWS>(r)] : real(0), offsets[r], deltas[r]};
#endif
    };
    if (from < to) {
#if ON_WARPGROUPS
        pass(queries_there, 0);
        // Each warp looks at all rows.
        for (int row = threadIdx.x % 32; row < ROWS; row += 32) any_far |= scores_here[row] != 0;
#else
        stage_queries();
        stage_d_out();
        stage_step(0, from);
#endif
    }
#if ON_WARPGROUPS
    const bool is_far_tile = __any_sync(~0u, any_far);
#else
    const bool is_far_tile = __syncthreads_or(any_far);
#endif
    int step = 0;
    if (__builtin_expect(is_far_tile, 0)) {
#if ON_WARPGROUPS
        // Scores change below, once every warp has looked at them.
        meet();
        if (threadIdx.x % 32 == 0) *far = 1;
#endif
        if (threadIdx.x == 0) far_heads(p)[b * p.query_heads + n] = 1;
        RowSums far_sums;
#pragma unroll
        for (int r = 0; r < ROW_SLOTS; ++r) {
            far_sums.maxima[r] = -infinity();
            far_sums.totals[r] = 0;
        }
#pragma unroll 1
        for (int first = from; first < to; first += KEYS) {
#if ON_WARPGROUPS
            const int slot = step % STAGES;
            pass(there + slot, step / STAGES);
            sum_tile(p, rows, first, query_tile, key_tiles + slot * KEY_TILE, far_sums.maxima, far_sums.totals);
            arrive_as_warp(done + slot);
            ++step;
#else
            if (first > from) {
                __syncthreads();
                stage_keys(0, first);
                close_copies();
            }
            await_copies<0>();
            __syncthreads();
            sum_tile(p, rows, first, query_tile, key_tiles, far_sums.maxima, far_sums.totals);
#endif
        }
        const FarStates states = finish_far_rows(p, b, n, first_t, far_sums);
#pragma unroll
        for (int r = 0; r < ROW_SLOTS; ++r) {
            if (!(states.far >> r & 1)) continue;
            offsets[r] = states.offsets[r];
#if ON_WARPGROUPS
            scores_here[row_at<ROWS>(r)] = states.scores[r];
            if (!KEEPS_ROWS) offsets_here[row_at<ROWS>(r)] = states.offsets[r];
#endif
        }
        if (!wants_gradient) return;
        // The rows are the warp's own.
        __syncwarp();
#if !ON_WARPGROUPS
        __syncthreads();
        if (from < to) stage_step(0, from);
#endif
    }
    real sums[ROW_SLOTS][OUT_SLOTS];
#pragma unroll
    for (int r = 0; r < ROW_SLOTS; ++r)
#pragma unroll
        for (int c = 0; c < OUT_SLOTS; ++c) sums[r][c] = 0;
    Factors<KEYS> factors;
    for (int first = from; first < to; first += KEYS, ++step) {
        const int slot = step % STAGES;
#if ON_WARPGROUPS
        pass(there + slot, step / STAGES);
#else
        await_copies<0>();
        __syncthreads();
        if (STAGES > 1 && first + KEYS < to) stage_step(step + 1, first + KEYS);
#endif
        const element *key_tile = key_tiles + slot * KEY_TILE;
        const bool checked = first < all_from || first + KEYS > all_to;
        real weights[ROW_SLOTS][KEY_SLOTS], gradients[ROW_SLOTS][KEY_SLOTS];
        begin_products<ROWS, KEYS, HEAD>(weights, query_tile, key_tile);
        begin_products<ROWS, KEYS, VALUE>(gradients, d_out_tile, value_tiles + slot * VALUE_TILE);
        RowTerms<ROWS, KEYS> terms;
        Row known[ROW_SLOTS];
        refresh(known, false);
        if constexpr (PACKS_MASK || PACKS_BIAS) terms.read(p, known, first);
        await_products<0>();
        hold(weights);
        hold(gradients);
        refresh(known, true);
        if (checked || is_far_tile)
            weigh_tile<Checked, true>(p, known, state_of_slot, is_far_tile, first, terms, weights, gradients);
        else
            weigh_tile<Unchecked, false>(p, known, state_of_slot, is_far_tile, first, terms, weights, gradients);
        begin_weighted<ROWS, KEYS, HEAD>(sums, gradients, factors, key_tile, room);
        await_products<0>();
        hold(sums);
#if ON_WARPGROUPS
        arrive_as_warp(done + slot);
#else
        if (STAGES == 1 && first + KEYS < to) {
            __syncthreads();
            stage_step(step + 1, first + KEYS);
        }
#endif
    }

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
        any_spoiled = meet_or(spoiled != 0);
        if (any_spoiled) {
            for (int row = threadIdx.x; row < ROWS; row += THREADS) row_spoiled[row] = 0;
            meet();
#pragma unroll
            for (int r = 0; r < ROW_SLOTS; ++r)
                if (spoiled >> r & 1) row_spoiled[row_at<ROWS>(r)] = 1;
            meet();
        }
    }
    const real scale = scale_of_sums(p);
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
        exact_gradient_of_query(p, row, b, n, PreparedState(), again);
        store_row<HEAD>(at(p.d_query, b, row.t, n), p.d_query.stride[3], p.head_dim, again, scale);
    }
}
