// What the forward kernel does behind its main loop: stores outputs and logsumexps, or partial ones where
// keys are split, and computes rows again that hold NaN or infinities of keys that they must not see.
// Needs: fused/forward/consumer.cuh, fused/exact.cuh.

// Bit r says that the row in slot r has to be computed again: its sums of values are NaN or infinite, and its
// softmax is not, so they may come from masked keys, whose weights are 0. Split products make NaN of
// infinities, in the softmax too, and so does a bias of -inf beside an infinite product.
__device__ inline unsigned non_finite_rows(const ForwardTile &tile, ForwardRows &state) {
    constexpr bool LOOKS_AT_SOFTMAX = SPLITS || (FEATURES & FEATURE_BIAS) != 0;
    unsigned non_finite = 0;
#pragma unroll
    for (int r = 0; r < row_slots<ROWS>(); ++r) {
        state.row_sum[r] = sum_of_row(state.row_sum[r]);
        bool finite = true;
#pragma unroll
        for (int c = 0; c < output_slots<VALUE>(); ++c) finite &= is_finite(state.outputs[r][c]);
        const bool has_softmax = is_finite(state.row_sum[r]);
        const bool suspect =
            LOOKS_AT_SOFTMAX ? !finite || !has_softmax : !finite && has_softmax && state.row_sum[r] > 0;
        if (suspect && tile.is_stored(row_at<ROWS>(r))) non_finite |= 1u << r;
    }
    return non_finite;
}

// Slots whose row any thread of the row found.
__device__ inline unsigned in_threads_of_row(unsigned found) {
    unsigned by_any = 0;
#pragma unroll
    for (int r = 0; r < row_slots<ROWS>(); ++r)
        if (maximum_of_row(found >> r & 1 ? real(1) : real(0)) != 0) by_any |= 1u << r;
    return by_any;
}

// Calls `each` with the slot, the thread that leads it and the row of the tile, for the rows of the warp
// whose threads have their slot in `slots`. By the warp.
template <class Each>
__device__ inline void for_rows_of_warp(unsigned slots, Each each) {
#pragma unroll 1
    for (int slot = 0; slot < row_slots<ROWS>(); ++slot) {
        const unsigned own = leads_row() && (slots >> slot & 1) ? 1u << threadIdx.x % 32 : 0;
        for (unsigned lanes = __reduce_or_sync(~0u, own); lanes != 0; lanes &= lanes - 1) {
            const int leader = __ffs(lanes) - 1;
            each(slot, leader, __shfl_sync(~0u, row_at<ROWS>(slot), leader));
        }
    }
}

// Where the results of a split of a row are, in the order of rows.
__device__ inline long long partial_row(const Parameters &p, const ForwardTile &tile, long long n, long long t) {
    const long long all_rows = count_of_rows(p);
    return tile.split * all_rows + scratch_row(p, tile.sequence, tile.b, n, t);
}

// Whether this slice of columns stores row max and row sum of a split, and where. A batch-invariant call has
// those of every slice: a row that one slice computes again has a row max of its own there.
__device__ inline bool stores_state(const ForwardTile &tile) { return BATCH_INVARIANT || tile.slice == 0; }
__device__ inline real *partial_state(const Parameters &p, const ForwardTile &tile, long long slot) {
    return p.partial_state + 2 * (BATCH_INVARIANT ? slot * SLICES + tile.slice : slot);
}

// Stores the rows of the thread, but for those in slots that `is_computed_again` names.
template <class InSlot>
__device__ inline void store_rows(const Parameters &p, const ForwardTile &tile, const ForwardRows &state,
                                  InSlot is_computed_again) {
#if EIGHT_BIT
    const real value_scale = value_scale_of(p, tile.b, tile.key_head);
#endif
#pragma unroll
    for (int r = 0; r < row_slots<ROWS>(); ++r) {
        if (!tile.is_stored(row_at<ROWS>(r))) continue;
        const int row = tile.first_row + row_at<ROWS>(r);
        const long long n = tile.head_of(p, row), t = tile.t_of(p, row);
        const bool empty = state.row_sum[r] == 0;
        const bool again = is_computed_again(r);
        if (p.splits > 1) {
            const long long slot = partial_row(p, tile, n, t);
            if (stores_state(tile) && leads_row() && !again) {
                partial_state(p, tile, slot)[0] = state.row_max[r];
                partial_state(p, tile, slot)[1] = state.row_sum[r];
            }
            if (again) continue;
#pragma unroll
            for (int c = 0; c < output_slots<VALUE>(); ++c) {
                const int column = output_column_at<VALUE>(c);
                if (column < tile.width)
                    p.partial_out[slot * partial_width(p) + tile.first_column + column] =
                        empty ? real(0) : state.outputs[r][c];
            }
            continue;
        }
        real logsumexp;
        const real scale = finish(p, n, t >= tile.sequence.queries, state.row_max[r], state.row_sum[r], logsumexp);
        if (tile.slice == 0 && leads_row() && !again)
            store_logsumexp(p, tile.b, query_row(tile.sequence, t), n, logsumexp);
        if (again) continue;
        const bool zero = empty || t >= tile.sequence.queries;
        element *to_row = at(p.out, tile.b, query_row(tile.sequence, t), n) + tile.first_column * p.out.stride[3];
#if ON_WARPGROUPS && !EIGHT_BIT
        // Whole rows without a check for each pair, which would be as long as the sums of some tiles of keys.
        if ((p.aligned & ALIGNED_OUT) && tile.width == VALUE) {
            const real factor = zero ? real(0) : scale;
#pragma unroll
            for (int c = 0; c < output_slots<VALUE>(); c += 2) {
                const unsigned pair = packed(state.outputs[r][c] * factor, state.outputs[r][c + 1] * factor);
                *reinterpret_cast<unsigned *>(to_row + column_at(0) + column_offset(c)) = zero ? 0 : pair;
            }
            continue;
        }
#endif
#pragma unroll
        for (int c = 0; c < output_slots<VALUE>(); c += NEIGHBOURS) {
            const int column = output_column_at<VALUE>(c);
#if EIGHT_BIT
            const real low = zero ? real(0) : with_value_scale(state.outputs[r][c] * scale, value_scale),
                       high = zero ? real(0) : with_value_scale(state.outputs[r][c + 1] * scale, value_scale);
#else
            const real low = zero ? real(0) : state.outputs[r][c] * scale,
                       high = zero ? real(0) : state.outputs[r][c + 1] * scale;
#endif
            store_pair(to_row, column, tile.width, p.out.stride[3], p.aligned & ALIGNED_OUT, low, high);
        }
    }
}

// Computes a row of the tile from its allowed keys alone, and stores it. By a warp. The softmax too: products
// are summed in another order here, and weights are relative to the row max of the same products.
__device__ inline void store_exact_row(const Parameters &p, const ForwardTile &tile, int local_row) {
    const long long n = tile.head_of(p, tile.first_row + local_row), t = tile.t_of(p, tile.first_row + local_row);
    Row whole = row_of(p, tile.sequence, tile.b, n, t);
#if EIGHT_BIT
    whole.logit_scale = logit_scale_of(p, tile.b, tile.key_head);
#endif
    real maximum, total, sums[VALUE / 32];
    exact_softmax(p, whole, tile.b, n, tile.from, tile.to, maximum, total);
    exact_output(p, whole, tile.b, n, tile.from, tile.to, maximum, tile.first_column, tile.width, sums);
    const long long slot = partial_row(p, tile, n, t), place = query_row(tile.sequence, t);
    real logsumexp;
    const real scale = p.splits > 1 ? real(1) : finish(p, n, t >= tile.sequence.queries, maximum, total, logsumexp);
    if (stores_state(tile) && threadIdx.x % 32 == 0) {
        if (p.splits > 1) {
            partial_state(p, tile, slot)[0] = maximum;
            partial_state(p, tile, slot)[1] = total;
        } else if (!BATCH_INVARIANT || tile.slice == 0) {
            store_logsumexp(p, tile.b, place, n, logsumexp);
        }
    }
    if (p.splits == 1) {
#if EIGHT_BIT
        const real value_scale = value_scale_of(p, tile.b, tile.key_head);
#pragma unroll
        for (int i = 0; i < VALUE / 32; ++i) sums[i] = with_value_scale(sums[i] * scale, value_scale);
        store_row<VALUE>(at(p.out, tile.b, place, n) + tile.first_column * p.out.stride[3], p.out.stride[3], tile.width,
                         sums, real(1));
        return;
#endif
        store_row<VALUE>(at(p.out, tile.b, place, n) + tile.first_column * p.out.stride[3], p.out.stride[3], tile.width,
                         sums, scale);
        return;
    }
#pragma unroll
    for (int i = 0; i < VALUE / 32; ++i) {
        const int column = 32 * i + threadIdx.x % 32;
        if (column < tile.width) p.partial_out[slot * partial_width(p) + tile.first_column + column] = sums[i];
    }
}

#if BATCH_INVARIANT
// In splits.cuh.
__device__ inline bool spans_splits(const Parameters &p, const ForwardTile &tile);
__device__ inline void take_merged(const Parameters &p, const ForwardTile &tile, ForwardRows &state);
#endif

__device__ inline void finish_tile(const Parameters &p, const ForwardTile &tile, ForwardRows &state,
                                   unsigned char *memory) {
#if BATCH_INVARIANT
    if (spans_splits(p, tile)) {
        end_split(p, tile, state, tile.to);
        take_merged(p, tile, state);
        store_rows(p, tile, state, [](int) { return false; });
        return;
    }
#endif
#if ON_WARPGROUPS
    // A row has threads of one warp, and other warps may be at another tile.
    const unsigned found = non_finite_rows(tile, state), again = p.hides_keys ? in_threads_of_row(found) : 0;
    store_rows(p, tile, state, [=](int r) { return (again >> r & 1) != 0; });
    if (__builtin_expect(__any_sync(~0u, again != 0), 0))
        for_rows_of_warp(again, [&](int, int, int local_row) { store_exact_row(p, tile, local_row); });
#else
    int *const flags = reinterpret_cast<int *>(memory);
    const bool any_again =
        mark_rows<ROWS>(p, non_finite_rows(tile, state), flags, [](int r) { return row_at<ROWS>(r); });
    // Threads of another warp may have found a row.
    store_rows(p, tile, state, [=](int r) { return any_again && flags[row_at<ROWS>(r)]; });
    if (!any_again) return;
    for (int local_row = threadIdx.x / 32; local_row < ROWS; local_row += WARPS)
        if (flags[local_row]) store_exact_row(p, tile, local_row);
#endif
}
