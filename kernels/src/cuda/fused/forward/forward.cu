// Attention forward: one pass over the keys for a tile of query rows, with the softmax carried along (Dao, FlashAttention-2,
// arXiv 2307.08691, algorithm 1; Rabe and Staats, arXiv 2112.05682).
//
// Any dtype, head dimensions up to HEAD and SLICES * VALUE, any strides; compute capability 8.0 for halves. ROWS query rows and KEYS
// keys to a tile. Rows of several query heads can share a tile (`pack`), and the keys can be cut into parts that a second
// kernel merges: so that few queries keep the device busy. On warpgroups, threads of their own load keys and values, two tiles ahead.

// Tiles of keys, and of values, that there is room for.
constexpr int SLOTS = ON_WARPGROUPS ? 2 : 1;

struct Shared {
    element *query, *key, *value;
    real *room;
};

__device__ inline Shared shared_tiles(unsigned char *memory) {
    Shared tiles;
    tiles.query = reinterpret_cast<element *>(memory);
    tiles.key = tiles.query + tile_size<ROWS, HEAD>();
    tiles.value = tiles.key + SLOTS * tile_size<KEYS, HEAD>();
    tiles.room = reinterpret_cast<real *>(tiles.value + SLOTS * tile_size<KEYS, VALUE>());
    return tiles;
}

__device__ inline void drop_weights(const Parameters &p, const Row (&rows)[row_slots<ROWS>()], int first,
                                    real (&weights)[row_slots<ROWS>()][column_slots<KEYS>()]) {
    if (!drops(p)) return;
#pragma unroll
    for (int r = 0; r < row_slots<ROWS>(); ++r) {
        const unsigned kept = kept_of_row<KEYS>(p, rows[r], first);
#pragma unroll
        for (int c = 0; c < column_slots<KEYS>(); ++c)
            if (!(kept >> c & 1)) weights[r][c] = 0;
    }
}

extern "C" __global__ void __launch_bounds__(BLOCK, RESIDENT) attention_forward(const Parameters p) {
    extern __shared__ __align__(1024) unsigned char memory[];
    const Shared tiles = shared_tiles(memory);
    constexpr int ROW_SLOTS = row_slots<ROWS>(), KEY_SLOTS = column_slots<KEYS>(), OUT_SLOTS = output_slots<VALUE>();

    // The last tile of a head comes first: where masking is causal, it takes longest.
    const int rows_of_head = (int)(p.query_length * p.pack);
    const int row_tiles = (rows_of_head + ROWS - 1) / ROWS;
    const int part = (int)(blockIdx.x % (unsigned)p.parts), slice = (int)(blockIdx.x / (unsigned)p.parts % SLICES);
    const Place place =
        place_of_block(p, blockIdx.x / (unsigned)p.parts / SLICES, row_tiles, (unsigned)p.query_heads / (unsigned)p.pack);
    // The columns of values and outputs that are this block's.
    const int first_column = slice * VALUE, width = SLICES == 1 ? p.value_head_dim : min(VALUE, p.value_head_dim - first_column);
    const int first_row = (row_tiles - 1 - place.tile) * ROWS;
    const long long first_head = (long long)place.head * p.pack, b = place.batch;
    const long long key_head = (unsigned)first_head / (unsigned)p.group;
    // Rows of a tile are the heads of a position, then those of the next one.
    const auto t_of = [&](int row) { return p.pack == 1 ? row : (int)((unsigned)row / (unsigned)p.pack); };
    const auto head_of = [&](int row) { return p.pack == 1 ? first_head : first_head + (unsigned)row % (unsigned)p.pack; };
    const Batch batch = batch_row(p, b);

    // The keys that any row of the tile sees, and those that all of them see.
    const int first_t = t_of(first_row), last_t = min(t_of(first_row + ROWS - 1), batch.queries - 1);
    int from = 0, to = 0, all_from = 0, all_to = 0;
    if (first_t <= last_t) {
        from = first_key(batch, first_t) / KEYS * KEYS;
        to = end_key(batch, last_t);
        all_from = first_key(batch, last_t);
        all_to = end_key(batch, first_t);
    }
    if (p.parts > 1 && from < to) {
        const int key_tiles = (to - from + KEYS - 1) / KEYS;
        const int each = (key_tiles + p.parts - 1) / p.parts;
        from = (int)min((long long)to, from + (long long)part * each * KEYS);
        to = (int)min((long long)to, from + (long long)each * KEYS);
    }

    const auto stage_queries = [&] {
        if (p.pack == 1) {
            stage_rows<ROWS, HEAD>(tiles.query, p.query, b, first_head, first_row, batch.queries, p.head_dim, p.aligned & ALIGNED_QUERY);
            return;
        }
        stage<ROWS, HEAD>(
            tiles.query,
            [&](int row) {
                const int t = t_of(first_row + row);
                return t < batch.queries ? at(p.query, b, t, head_of(first_row + row)) : (const element *)nullptr;
            },
            p.head_dim, p.query.stride[3], p.aligned & ALIGNED_QUERY, p.query.data);
    };
    const auto stage_keys = [&](int first, element *tile) {
        stage_rows<KEYS, HEAD, KeysAcross>(tile, p.key, b, key_head, first, batch.keys, p.head_dim, p.aligned & ALIGNED_KEY);
    };
    const auto stage_values = [&](int first, element *tile) {
        stage_rows<KEYS, VALUE, KeysAcross>(tile, p.value, b, key_head, first, batch.keys, width,
                                             p.aligned & ALIGNED_VALUE, first_column);
    };

#if ON_WARPGROUPS
    constexpr int KEY_TILE = tile_size<KEYS, HEAD>(), VALUE_TILE = tile_size<KEYS, VALUE>();
    Gate *const queries_there = reinterpret_cast<Gate *>(tiles.room);
    Gate *const keys_there = queries_there + 1, *const keys_done = keys_there + 2;
    Gate *const values_there = keys_done + 2, *const values_done = values_there + 2;
    if (threadIdx.x == 0) {
        open_gate(queries_there, STAGERS);
        for (int slot = 0; slot < 2; ++slot) {
            open_gate(keys_there + slot, STAGERS);
            open_gate(values_there + slot, STAGERS);
            open_gate(keys_done + slot, WARPS);
            open_gate(values_done + slot, WARPS);
        }
    }
    __syncthreads();
    if (threadIdx.x >= THREADS) {
        // Half of the loaders have the keys, the others the queries and the values.
        give_registers();
        if (threadIdx.x < THREADS + STAGERS) {
            for (int first = from, step = 0; first < to; first += KEYS, ++step) {
                if (p.pack == 1) announce_terms<ROWS, KEYS>(p, b, first_head, first_row, first);
                pass(keys_done + step % 2, step / 2 - 1);
                stage_keys(first, tiles.key + step % 2 * KEY_TILE);
                deliver(keys_there + step % 2);
            }
        } else if (from < to) {
            stage_queries();
            deliver(queries_there);
            for (int first = from, step = 0; first < to; first += KEYS, ++step) {
                pass(values_done + step % 2, step / 2 - 1);
                stage_values(first, tiles.value + step % 2 * VALUE_TILE);
                deliver(values_there + step % 2);
            }
        }
        return;
    }
    take_registers();
#endif

    Row rows[ROW_SLOTS];
#pragma unroll
    for (int r = 0; r < ROW_SLOTS; ++r) {
        const int row = first_row + row_at<ROWS>(r);
        rows[r] = row_of(p, batch, b, head_of(row), t_of(row));
    }

    real maxima[ROW_SLOTS], totals[ROW_SLOTS], outputs[ROW_SLOTS][OUT_SLOTS];
#pragma unroll
    for (int r = 0; r < ROW_SLOTS; ++r) {
        maxima[r] = -infinity();
        totals[r] = 0;
#pragma unroll
        for (int c = 0; c < OUT_SLOTS; ++c) outputs[r][c] = 0;
    }

    const real factor = power_factor(p);
    RowTerms<ROWS, KEYS> terms;
    const auto read_terms = [&](int first) {
        if constexpr (PACKS_MASK || PACKS_BIAS) terms.read(p, rows, first);
    };
    const auto soften = [&](int first, real(&logits)[ROW_SLOTS][KEY_SLOTS], real(&shrink)[ROW_SLOTS]) {
        if (first < all_from || first + KEYS > all_to)
            finish_scores<Checked>(p, rows, first, terms, logits);
        else
            finish_scores<Unchecked>(p, rows, first, terms, logits);
        const bool rescales = carry_softmax<HALVES>(logits, factor, maxima, totals, shrink);
        drop_weights(p, rows, first, logits);
        return rescales;
    };
    const auto rescale = [&](const real(&shrink)[ROW_SLOTS]) {
#pragma unroll
        for (int r = 0; r < ROW_SLOTS; ++r)
#pragma unroll
            for (int c = 0; c < OUT_SLOTS; ++c) outputs[r][c] *= shrink[r];
    };

#if ON_WARPGROUPS
    if (from < to) {
        // The product of a tile's weights and values runs beside the softmax of the next one.
        real logits[ROW_SLOTS][KEY_SLOTS], shrink[ROW_SLOTS];
        Factors<KEYS> weights;
        pass(queries_there, 0);
        pass(keys_there, 0);
        begin_products<ROWS, KEYS, HEAD>(logits, tiles.query, tiles.key);
        read_terms(from);
        await_products<0>();
        hold(logits);
        arrive_as_warp(keys_done);
        soften(from, logits, shrink);
        pack<KEYS>(weights, logits);
        int step = 1;
        for (int first = from + KEYS; first < to; first += KEYS, ++step) {
            const int slot = step % 2, last = slot ^ 1;
            pass(keys_there + slot, step / 2);
            begin_products<ROWS, KEYS, HEAD>(logits, tiles.query, tiles.key + slot * KEY_TILE);
            pass(values_there + last, (step - 1) / 2);
            begin_weighted<KEYS, VALUE>(outputs, weights, tiles.value + last * VALUE_TILE);
            read_terms(first);
            await_products<1>();
            hold(logits);
            arrive_as_warp(keys_done + slot);
            const bool rescales = soften(first, logits, shrink);
            await_products<0>();
            hold(outputs);
            arrive_as_warp(values_done + last);
            if (rescales) rescale(shrink);
            pack<KEYS>(weights, logits);
        }
        const int last = (step - 1) % 2;
        pass(values_there + last, (step - 1) / 2);
        begin_weighted<KEYS, VALUE>(outputs, weights, tiles.value + last * VALUE_TILE);
        await_products<0>();
        hold(outputs);
    }
#else
    if (from < to) {
        stage_queries();
        stage_keys(from, tiles.key);
        close_copies();
    }
    for (int first = from; first < to; first += KEYS) {
        await_copies<0>();
        __syncthreads();
        stage_values(first, tiles.value);
        close_copies();
        real logits[ROW_SLOTS][KEY_SLOTS], shrink[ROW_SLOTS];
        read_terms(first);
        products<ROWS, KEYS, HEAD>(logits, tiles.query, tiles.key);
        await_copies<0>();
        __syncthreads();
        if (first + KEYS < to) {
            stage_keys(first + KEYS, tiles.key);
            close_copies();
        }
        if (soften(first, logits, shrink)) rescale(shrink);
        add_weighted<ROWS, KEYS, VALUE>(outputs, logits, tiles.value, tiles.room);
    }
#endif

    // A row whose sums are NaN or infinite, and whose softmax is not, may hold what it must not see. Split products make NaN of
    // infinities, in the softmax too, and so does a bias of -inf of what it masks.
    constexpr bool LOOKS_AT_SOFTMAX = SPLITS || (FEATURES & FEATURE_BIAS) != 0;
    const auto is_stored = [&](int r) { return first_row + row_at<ROWS>(r) < rows_of_head; };
    unsigned spoiled = 0;
#pragma unroll
    for (int r = 0; r < ROW_SLOTS; ++r) {
        totals[r] = sum_of_row(totals[r]);
        bool finite = true;
#pragma unroll
        for (int c = 0; c < OUT_SLOTS; ++c) finite &= is_finite(outputs[r][c]);
        const bool has_softmax = is_finite(totals[r]);
        if ((LOOKS_AT_SOFTMAX ? !finite || !has_softmax : !finite && has_softmax && totals[r] > 0) && is_stored(r)) spoiled |= 1u << r;
    }
    int *row_spoiled = reinterpret_cast<int *>(memory);
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

    const long long all_rows = p.batch * p.query_heads * p.query_length;
#pragma unroll
    for (int r = 0; r < ROW_SLOTS; ++r) {
        if (!is_stored(r)) continue;
        const int row = first_row + row_at<ROWS>(r);
        const long long n = head_of(row), t = t_of(row);
        const bool empty = totals[r] == 0;
        // Another warp may have seen it.
        const bool again = any_spoiled && row_spoiled[row_at<ROWS>(r)];
        if (p.parts > 1) {
            const long long slot = part * all_rows + (b * p.query_heads + n) * p.query_length + t;
            if (slice == 0 && leads_row() && !again) {
                p.second[2 * slot] = maxima[r];
                p.second[2 * slot + 1] = totals[r];
            }
            if (again) continue;
#pragma unroll
            for (int c = 0; c < OUT_SLOTS; ++c) {
                const int column = output_column_at<VALUE>(c);
                if (column < width) p.first[slot * p.value_head_dim + first_column + column] = empty ? real(0) : outputs[r][c];
            }
            continue;
        }
        real logsumexp;
        const real scale = finish(p, n, t >= batch.queries, maxima[r], totals[r], logsumexp);
        if (slice == 0 && leads_row() && !again) store_logsumexp(p, b, t, n, logsumexp);
        if (again) continue;
        const bool zero = empty || t >= batch.queries;
        element *to_row = at(p.out, b, t, n) + first_column * p.out.stride[3];
#pragma unroll
        for (int c = 0; c < OUT_SLOTS; c += NEIGHBOURS) {
            const int column = output_column_at<VALUE>(c);
            const real low = zero ? real(0) : outputs[r][c] * scale, high = zero ? real(0) : outputs[r][c + 1] * scale;
            store_pair(to_row, column, width, p.out.stride[3], p.aligned & ALIGNED_OUT, low, high);
        }
    }
    if (!any_spoiled) return;

    for (int local = threadIdx.x / 32; local < ROWS; local += WARPS) {
        if (!row_spoiled[local]) continue;
        const long long n = head_of(first_row + local), t = t_of(first_row + local);
        const Row whole = row_of(p, batch, b, n, t);
        // The softmax too: its products are summed in another order here, and weights are relative to the largest of the same.
        real maximum, total, sums[VALUE / 32];
        exact_softmax(p, whole, b, n, from, to, maximum, total);
        exact_output(p, whole, b, n, from, to, maximum, first_column, width, sums);
        const long long slot = part * all_rows + (b * p.query_heads + n) * p.query_length + t;
        real logsumexp;
        const real scale = p.parts > 1 ? real(1) : finish(p, n, t >= batch.queries, maximum, total, logsumexp);
        if (slice == 0 && threadIdx.x % 32 == 0) {
            if (p.parts > 1) {
                p.second[2 * slot] = maximum;
                p.second[2 * slot + 1] = total;
            } else {
                store_logsumexp(p, b, t, n, logsumexp);
            }
        }
        if (p.parts == 1) {
            store_row<VALUE>(at(p.out, b, t, n) + first_column * p.out.stride[3], p.out.stride[3], width, sums, scale);
            continue;
        }
#pragma unroll
        for (int i = 0; i < VALUE / 32; ++i) {
            const int column = 32 * i + threadIdx.x % 32;
            if (column < width) p.first[slot * p.value_head_dim + first_column + column] = sums[i];
        }
    }
}
