// The first kernel of the backward pass: offset, row term and score per query row. And the gradient of the
// sinks, a sum over rows.
// Needs: fused/exact.cuh, fused/backward/gradients.cuh.

// Threads per row.
constexpr int WIDE = lanes_of_row<VALUE>();

// Six blocks of eight warps per multiprocessor, so 40 registers per thread: the kernel is bound by memory
// latency, and more warps hide more of it than with the 56 registers that the compiler takes otherwise. Eight
// blocks were not measured.
constexpr int PREPARING_BLOCKS = 6;

extern "C" __global__ void __launch_bounds__(BLOCK, PREPARING_BLOCKS)
    attention_prepare_gradients(const __grid_constant__ Parameters p) {
    const long long thread = blockIdx.x * (long long)THREADS + threadIdx.x, row = thread / WIDE;
    // Fewer than rows, or as many.
    if (p.query_turns != nullptr)
        for (long long i = thread; i < 2 * p.query_tiles + 1; i += (long long)gridDim.x * THREADS) p.query_turns[i] = 0;
    const int within = threadIdx.x % WIDE;
    const bool inside = row < count_of_rows(p);
#if LAYOUT == LAYOUT_DENSE
    // Rows of a head are consecutive.
    const unsigned head = inside ? (unsigned)(row / p.query_length) : 0;
    const long long t = inside ? row - head * p.query_length : 0, n = head % (unsigned)p.query_heads,
                    b = head / (unsigned)p.query_heads;
    const bool padded = !inside || t >= query_rows_of(p, b);
    const long long &place = t;
#else
    // Rows of all sequences of a head are consecutive, and `place` is a row of tensors.
    const long long n = inside ? row / p.query_rows : 0, place = inside ? row - n * p.query_rows : 0;
    const long long b = sequence_of_query_row(p, place), head = b * p.query_heads + n;
    const Sequence sequence = sequence_of(p, b);
    const long long t = place - sequence.first_query;
    const bool padded = !inside || t >= sequence.queries;
#endif
    real delta = 0;
    if (!padded) {
        const element *const d_out = at(p.d_out, b, place, n), *const out = at(p.out, b, place, n);
        if ((p.aligned & ALIGNED_OUT) && (p.aligned & ALIGNED_D_OUT)) {
#pragma unroll 1
            for (int column = within * CHUNK; column < p.value_head_dim; column += WIDE * CHUNK) {
                const Chunk of_d_out = chunk_at(d_out + column), of_out = chunk_at(out + column);
#pragma unroll
                for (int i = 0; i < CHUNK; ++i) delta = fma(widened(of_d_out.of[i]), widened(of_out.of[i]), delta);
            }
        } else {
            const auto add = [&](int i) {
                delta = fma(widened(d_out[i * p.d_out.stride[3]]), widened(out[i * p.out.stride[3]]), delta);
            };
#if BATCH_INVARIANT
            // In the order of aligned rows.
            for (int column = within * CHUNK; column < p.value_head_dim; column += WIDE * CHUNK)
                for (int i = column; i < min(column + CHUNK, p.value_head_dim); ++i) add(i);
#else
            for (int i = within; i < p.value_head_dim; i += WIDE) add(i);
#endif
        }
    }
#pragma unroll
    for (int distance = WIDE / 2; distance > 0; distance /= 2) delta += __shfl_xor_sync(~0u, delta, distance);
    if (!inside || within > 0) return;
    real logsumexp = -infinity();
    if (!padded) {
        const auto of_row = [&](const Tensor &tensor) {
            const long long index = b * tensor.stride[0] + place * tensor.stride[1] + n * tensor.stride[2];
            return reinterpret_cast<const real *>(tensor.data)[index];
        };
        logsumexp = of_row(p.lse);
        if (p.d_lse.data) delta -= of_row(p.d_lse);
    }
    const State state = state_of_logsumexp(p, logsumexp, balance_of(p) * delta);
    p.row_offsets[row] = state.offset;
    p.row_deltas[row] = state.delta;
    scores_of_states(p)[row] = state.score;
    // Set again by the block that sums a far row (far_rows.cuh).
    // Rows behind the last sequence are of no head.
    if (t == 0 && (LAYOUT == LAYOUT_DENSE || b < p.batch)) far_heads(p)[head] = 0;
}

// One block per head, which adds up its rows in a fixed order.
extern "C" __global__ void __launch_bounds__(BLOCK, MIN_BLOCKS)
    attention_gradient_of_sinks(const __grid_constant__ Parameters p) {
    __shared__ real sums[WARPS];
    const long long n = blockIdx.x;
    const real sink = load(p.sinks.data, p.sinks_dtype, n * p.sinks.stride[0]);
    real sum = 0;
#if LAYOUT == LAYOUT_DENSE
    for (long long row = threadIdx.x; row < p.batch * p.query_length; row += THREADS) {
        const State state = PreparedState(Sequence())(p, row / p.query_length, n, (int)(row % p.query_length));
#else
    for (long long row = threadIdx.x; row < p.query_rows; row += THREADS) {
        // As of a sequence that begins with the first row.
        const State state = PreparedState(Sequence())(p, 0, n, (int)row);
#endif
        // A row or a sink without a probability adds nothing, even beside NaN.
        if (state.offset == -infinity() || sink == -infinity()) continue;
        const precise above = (precise)sink - (precise)state.score * (precise)natural_factor(p);
        // A sink so far above the largest score has a probability of 1, and the offset has lost the rest of
        // the difference.
        const real exponent = above > 2 * FAR ? real(0) : (real)(above * (precise)UNIT + (precise)state.offset);
        sum = fma(exponential(exponent > 0 ? real(0) : exponent), state.delta, sum);
    }
    sum = sum_of_warp(sum);
    if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = sum;
    __syncthreads();
    if (threadIdx.x > 0) return;
    real all = 0;
    for (int warp = 0; warp < WARPS; ++warp) all += sums[warp];
    store(p.d_sinks.data, p.sinks_dtype, n * p.d_sinks.stride[0], -all * unbalance_of(p));
}
