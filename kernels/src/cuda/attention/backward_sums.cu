// The softmax of far rows (gradients.cuh) once more, from the products that the gradients are made of: their logsumexp is so large that
// its rounding would be seen. One block to a tile of query rows of a head. Blocks without a far row end at once.
//
// It leaves the states of far rows but for the row term: a row's largest score and the offset of its sum, where they give the logsumexp
// that was given but for rounding, else what that says. Those of other rows, and the heads' numbers, are there before.

extern "C" __global__ void __launch_bounds__(BLOCK, RESIDENT) attention_sum_rows(const Parameters p) {
    extern __shared__ __align__(1024) unsigned char memory[];
    element *const query_tile = reinterpret_cast<element *>(memory);
    element *const key_tile = query_tile + tile_size<ROWS, HEAD>();
    constexpr int ROW_SLOTS = row_slots<ROWS>(), KEY_SLOTS = column_slots<KEYS>();

    const int row_tiles = (int)((p.query_length + ROWS - 1) / ROWS);
    const Place place = place_of_block(p, blockIdx.x, row_tiles, (unsigned)p.query_heads);
    const int first_t = place.tile * ROWS;
    const long long n = place.head, b = place.batch, key_head = (unsigned)place.head / (unsigned)p.group;
    const Batch batch = batch_row(p, b);
    const int row_count = min(ROWS, batch.queries - first_t);
    const auto logsumexp_of_row = [&](int row) {
        const real *const lse = reinterpret_cast<const real *>(p.lse.data);
        return lse[b * p.lse.stride[0] + (long long)(first_t + row) * p.lse.stride[1] + n * p.lse.stride[2]];
    };
    bool any_far = false;
    for (int row = threadIdx.x; row < row_count; row += BLOCK) any_far |= is_far(logsumexp_of_row(row));
    if (!__syncthreads_or(any_far)) return;
    if (threadIdx.x == 0) far_heads(p)[b * p.query_heads + n] = 1;

    const int last_t = first_t + row_count - 1;
    const int from = first_key(batch, first_t) / KEYS * KEYS, to = end_key(batch, last_t);
    // On warpgroups, half of the loaders load.
    const bool stages = LOADERS == 0 || (threadIdx.x >= THREADS && threadIdx.x < THREADS + STAGERS), computes = threadIdx.x < THREADS;
    if (stages)
        stage_rows<ROWS, HEAD>(query_tile, p.query, b, n, first_t, batch.queries, p.head_dim, p.aligned & ALIGNED_QUERY);

    Row rows[ROW_SLOTS];
    real maxima[ROW_SLOTS], totals[ROW_SLOTS];
#pragma unroll
    for (int r = 0; r < ROW_SLOTS; ++r) {
        rows[r] = row_of(p, batch, b, n, first_t + (computes ? row_at<ROWS>(r) : 0));
        maxima[r] = -infinity();
        totals[r] = 0;
    }
    const real factor = power_factor(p);
    for (int first = from; first < to; first += KEYS) {
        if (stages) {
            stage_rows<KEYS, HEAD, KeysAcross>(key_tile, p.key, b, key_head, first, batch.keys, p.head_dim, p.aligned & ALIGNED_KEY);
            close_copies();
            await_copies<0>();
        }
        __syncthreads();
        if (computes) {
            real scores[ROW_SLOTS][KEY_SLOTS], shrink[ROW_SLOTS];
            begin_products<ROWS, KEYS, HEAD>(scores, query_tile, key_tile);
            RowTerms<ROWS, KEYS> terms;
            if constexpr (PACKS_MASK || PACKS_BIAS) terms.read(p, rows, first);
            await_products<0>();
            hold(scores);
            finish_scores<Checked>(p, rows, first, terms, scores);
            carry_softmax<false>(scores, factor, maxima, totals, shrink);
        }
        __syncthreads();
    }

    // Whether a row is to be summed by itself: what it must not see may be NaN, and reach it by way of a bias of -inf or split products.
    int *const again = reinterpret_cast<int *>(memory);
    const auto put = [&](int row, real maximum, real total) {
        const real logsumexp = logsumexp_of_row(row);
        State state = state_of_logsumexp(p, logsumexp, 0);
        state_of_sums(p, n, maximum, total, logsumexp, state);
        const long long place = state_of(p, b, n, first_t + row);
        scores_of_states(p)[place] = state.score;
        p.first[place] = state.offset;
    };
    if (computes) {
#pragma unroll
        for (int r = 0; r < ROW_SLOTS; ++r) {
            const int row = row_at<ROWS>(r);
            totals[r] = sum_of_row(totals[r]);
            if (!leads_row()) continue;
            const bool far = row < row_count && is_far(logsumexp_of_row(row));
            again[row] = far && !is_finite(totals[r]);
            if (far && !again[row]) put(row, maxima[r], totals[r]);
        }
    }
    __syncthreads();
    for (int row = threadIdx.x / 32; row < row_count; row += BLOCK / 32) {
        if (!again[row]) continue;
        real maximum, total;
        const Row whole = row_of(p, batch, b, n, first_t + row);
        exact_softmax(p, whole, b, n, whole.low, whole.high, maximum, total);
        // Its sum is relative to what the maximum says; here it is to be relative to the maximum.
        const Shift shift = shift_of<HALVES>(maximum, factor);
        total *= change_of(shift, Shift{maximum, 0}, factor);
        if (threadIdx.x % 32 == 0) put(row, maximum, total);
    }
}
