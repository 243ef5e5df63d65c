// Splits of a batch-invariant call. They begin at fixed keys of the sequence, multiples of KEYS_PER_SPLIT, so
// the sums of a row are the same parts, merged in the same order, whether each part has a block of its own
// (few rows, merged by combine.cu) or one block goes over all of them (many rows, merged here): a call needs
// as little scratch and as many blocks as it wants, and bits do not depend on which way it takes.
// Needs: fused/forward/epilogue.cuh, fused/forward/consumer.cuh, fused/exact.cuh.
//
// A block that goes over several splits keeps the merged row max and row sum of its rows in registers, and
// their merged sums of values in scratch, the partial outputs of split 0. A thread reads there what it wrote
// itself, but for rows that the warp computes again.

#if BATCH_INVARIANT

static_assert(KEYS_PER_SPLIT % KEYS == 0, "a split begins with a tile");

// Two neighbouring numbers of partial outputs.
struct alignas(2 * sizeof(real)) NumberPair {
    real low, high;
};

// Whether this block has to merge splits: it has keys of more than one.
__device__ inline bool spans_splits(const Parameters &p, const ForwardTile &tile) {
    return p.splits == 1 && tile.from < tile.to && tile.from / KEYS_PER_SPLIT != (tile.to - 1) / KEYS_PER_SPLIT;
}

// The merged sums of values of a row of the tile, from the slice's first column on.
__device__ inline real *merged_outputs(const Parameters &p, const ForwardTile &tile, int local_row) {
    const int row = tile.first_row + local_row;
    const long long slot = partial_row(p, tile, tile.head_of(p, row), tile.t_of(p, row));
    return p.partial_out + slot * partial_width(p) + tile.first_column;
}

__device__ inline NumberPair *pair_at(real *outputs, int column) {
    return reinterpret_cast<NumberPair *>(outputs + column);
}

// Merges the rows of the warp that `again` has, computed from their allowed keys of the split alone. By the
// warp.
__device__ inline void merge_exact_rows(const Parameters &p, const ForwardTile &tile, ForwardRows &state,
                                        unsigned again, int from, int end) {
    const real factor = power_factor(p);
    __syncwarp();
    for_rows_of_warp(again, [&](int slot, int leader, int local_row) {
        const int index = tile.first_row + local_row;
        const long long n = tile.head_of(p, index);
        const Row row = row_of(p, tile.sequence, tile.b, n, tile.t_of(p, index));
        real row_max, row_sum, sums[VALUE / 32];
        exact_softmax(p, row, tile.b, n, from, end, row_max, row_sum);
        exact_output(p, row, tile.b, n, from, end, row_max, tile.first_column, tile.width, sums);
        real merged_max = 0, merged_sum = 0;
#pragma unroll
        for (int r = 0; r < row_slots<ROWS>(); ++r)
            if (r == slot) merged_max = state.merged_max[r], merged_sum = state.merged_sum[r];
        const real earlier_max = __shfl_sync(~0u, merged_max, leader),
                   earlier_sum = __shfl_sync(~0u, merged_sum, leader);
        if (row_sum == 0) return;
        MergedSplits merged{row_max, row_sum, 0, 1};
        if (earlier_sum != 0) merged = merge_splits(factor, earlier_max, earlier_sum, row_max, row_sum);
        real *const outputs = merged_outputs(p, tile, local_row);
#pragma unroll
        for (int i = 0; i < VALUE / 32; ++i) {
            const int column = 32 * i + threadIdx.x % 32;
            if (column < tile.width)
                outputs[column] = earlier_sum == 0 ? sums[i] : merged_value(merged, outputs[column], sums[i]);
        }
#pragma unroll
        for (int r = 0; r < row_slots<ROWS>(); ++r) {
            if (r != slot || row_at<ROWS>(r) != local_row) continue;
            state.merged_max[r] = merged.row_max;
            state.merged_sum[r] = merged.row_sum;
        }
    });
    __syncwarp();
}

// Merges the sums of the split that ends before key `end` with those of earlier ones, and begins anew.
__device__ inline void end_split(const Parameters &p, const ForwardTile &tile, ForwardRows &state, int end) {
    const int from = max(tile.from, (end - 1) / KEYS_PER_SPLIT * KEYS_PER_SPLIT);
    const real factor = power_factor(p);
    // As the epilogue does where a split has a block of its own.
    const unsigned again = in_threads_of_row(non_finite_rows(tile, state));
#pragma unroll
    for (int r = 0; r < row_slots<ROWS>(); ++r) {
        // A split without a key leaves what there is.
        if (!tile.is_stored(row_at<ROWS>(r)) || (again >> r & 1) || state.row_sum[r] == 0) continue;
        real *const outputs = merged_outputs(p, tile, row_at<ROWS>(r));
        const bool is_first = state.merged_sum[r] == 0;
        MergedSplits merged{state.row_max[r], state.row_sum[r], 0, 1};
        if (!is_first)
            merged = merge_splits(factor, state.merged_max[r], state.merged_sum[r], state.row_max[r], state.row_sum[r]);
#pragma unroll
        for (int c = 0; c < output_slots<VALUE>(); c += NEIGHBOURS) {
            const int column = output_column_at<VALUE>(c);
            if (column >= tile.width) continue;
            NumberPair pair{state.outputs[r][c], state.outputs[r][c + 1]};
            if (!is_first) {
                const NumberPair earlier = *pair_at(outputs, column);
                pair.low = merged_value(merged, earlier.low, pair.low);
                pair.high = merged_value(merged, earlier.high, pair.high);
            }
            *pair_at(outputs, column) = pair;
        }
        state.merged_max[r] = merged.row_max;
        state.merged_sum[r] = merged.row_sum;
    }
    if (__builtin_expect(__any_sync(~0u, again != 0), 0)) merge_exact_rows(p, tile, state, again, from, end);
    clear_sums(state);
}

// Behind the last split: the sums of all of them as those of the rows.
__device__ inline void take_merged(const Parameters &p, const ForwardTile &tile, ForwardRows &state) {
#pragma unroll
    for (int r = 0; r < row_slots<ROWS>(); ++r) {
        if (!tile.is_stored(row_at<ROWS>(r)) || state.merged_sum[r] == 0) continue;
        real *const outputs = merged_outputs(p, tile, row_at<ROWS>(r));
#pragma unroll
        for (int c = 0; c < output_slots<VALUE>(); c += NEIGHBOURS) {
            const int column = output_column_at<VALUE>(c);
            if (column >= tile.width) continue;
            const NumberPair pair = *pair_at(outputs, column);
            state.outputs[r][c] = pair.low;
            state.outputs[r][c + 1] = pair.high;
        }
        state.row_max[r] = state.merged_max[r];
        state.row_sum[r] = state.merged_sum[r];
    }
}

#endif
