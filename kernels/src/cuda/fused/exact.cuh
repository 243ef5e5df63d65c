// Single rows and keys computed again by a warp, from allowed keys alone.
// Needs: fused/softmax.cuh, fused/fragments.cuh, fused/mma/fma.cuh.
//
// A product of tiles multiplies values at masked positions by weights of 0, and 0 times NaN is NaN: a result
// that is not finite may come from memory that must not matter. That is rare, and its row is computed again.

// Collects in `flags` the rows of a tile that any consumer thread found: bit r of `found` stands for the row
// `row_of_slot(r)`. All consumer threads call this together. Returns whether any row was found; in a call
// without masked keys, none is.
template <int HEIGHT, class RowOfSlot>
__device__ inline bool mark_rows(const Parameters &p, unsigned found, int *flags, RowOfSlot row_of_slot) {
    if (!p.hides_keys || !consumer_sync_or(found != 0)) return false;
    for (int row = threadIdx.x; row < HEIGHT; row += THREADS) flags[row] = 0;
    consumer_sync();
#pragma unroll
    for (int r = 0; r < row_slots<HEIGHT>(); ++r)
        if (found >> r & 1) flags[row_of_slot(r)] = 1;
    consumer_sync();
    return true;
}

// A number that all threads of a warp have, in a register that they share: what branches on it keeps the warp
// together, and the compiler knows that it does. Threads that may be apart, in the loop of a kernel over its
// tiles, would have every address of a product brought from their registers to that of the warp.
__device__ inline int of_warp(int x) { return __reduce_max_sync(~0u, x); }

__device__ inline real dot(const element *a, long long a_stride, const cached *b, long long b_stride, int width) {
    real sum = 0;
    for (int from = 0; from < width; from += 32) {
        const int i = from + threadIdx.x % 32;
        if (i < width) sum = fma(widened(a[i * a_stride]), widened(b[i * b_stride]), sum);
    }
    return sum_of_warp(sum);
}

// sums[i] += factor * row[32 * i + lane]
template <int DEPTH>
__device__ inline void add_row(real (&sums)[DEPTH / 32], real factor, const cached *row, long long stride, int width) {
#pragma unroll
    for (int i = 0; i < DEPTH / 32; ++i) {
        const int column = 32 * i + threadIdx.x % 32;
        if (column < width) sums[i] = fma(factor, widened(row[column * stride]), sums[i]);
    }
}

// row[32 * i + lane] = factor * sums[i]
template <int DEPTH>
__device__ inline void store_row(element *row, long long stride, int width, const real (&sums)[DEPTH / 32],
                                 real factor) {
#pragma unroll
    for (int i = 0; i < DEPTH / 32; ++i) {
        const int column = 32 * i + threadIdx.x % 32;
        if (column < width) row[column * stride] = rounded(sums[i] * factor);
    }
}

// Threads per row that is read in chunks: one chunk for each thread, within a warp.
template <int DEPTH>
__device__ constexpr int lanes_of_row() {
    return DEPTH / CHUNK >= 32 ? 32 : DEPTH / CHUNK >= 16 ? 16 : DEPTH / CHUNK >= 8 ? 8 : 4;
}

// The score of a key and a row (softmax.cuh), by the whole warp.
__device__ inline real exact_score(const Parameters &p, const Row &row, long long b, long long n, int key,
                                   real &slope) {
    const real product = dot(at_query(p.query, row, b, n), p.query.stride[3],
                             at_key(p, p.key, row, b, key, n / p.group), p.key.stride[3], p.head_dim);
    if constexpr (NEEDS_LOGITS) return logit<Checked, true>(p, row, key, product, slope);
    slope = 1;
    bool visible = key >= row.low && key < row.high;
    if constexpr ((FEATURES & FEATURE_MASK) != 0)
        visible = visible && p.mask.data[row.mask + key * key_stride(p.mask)] != 0;
    return visible ? product : -infinity();
}

// Row max and row sum over the keys from `first` to before `end` that a row sees.
__device__ inline void exact_softmax(const Parameters &p, const Row &row, long long b, long long n, int first, int end,
                                     real &maximum, real &total) {
    const real factor = power_factor(p);
    maximum = -infinity();
    total = 0;
    const int to = of_warp(min(end, row.high));
    for (int key = of_warp(max(first, row.low)); key < to; ++key) {
        real slope;
        const real score = exact_score(p, row, b, n, key, slope);
        const real top = fmax(maximum, score);
        const Shift shift = shift_of<HALVES>(top, factor);
        const real sum = fma(total, change_of(shift_of<HALVES>(maximum, factor), shift, factor),
                             power(exponent_of<HALVES>(score, shift, factor)));
        const bool takes_part = score != -infinity();
        if (takes_part) total = sum;
        if (takes_part) maximum = top;
        // NaN stays NaN.
        if (__any_sync(~0u, !(total >= 0))) break;
    }
}

// The sum of values by weights relative to `maximum`, over the keys from `first` to before `end` that row
// sees: `width` columns from `first_column` on.
__device__ inline void exact_output(const Parameters &p, const Row &row, long long b, long long n, int first, int end,
                                    real maximum, int first_column, int width, real (&sums)[VALUE / 32]) {
    const real factor = power_factor(p);
    const Shift shift = shift_of<HALVES>(maximum, factor);
    const DropoutWords dropout = dropout_words(p);
#pragma unroll
    for (int i = 0; i < VALUE / 32; ++i) sums[i] = 0;
    const int to = of_warp(min(end, row.high));
    for (int key = of_warp(max(first, row.low)); key < to; ++key) {
        real slope;
        const real score = exact_score(p, row, b, n, key, slope);
        if (__any_sync(~0u, score == -infinity() || (drops(p) && !is_kept(p, dropout, row, key)))) continue;
        const cached *const value = at_key(p, p.value, row, b, key, n / p.group) + first_column * p.value.stride[3];
        add_row<VALUE>(sums, power(exponent_of<HALVES>(score, shift, factor)), value, p.value.stride[3], width);
    }
}
