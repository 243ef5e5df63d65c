// What backward needs of each query row before anything else, and the gradient of the sinks, which is a sum over rows.

// One warp to a row.
extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT) attention_prepare_gradients(const Parameters p) {
    const long long row = blockIdx.x * (long long)WARPS + threadIdx.x / 32;
    if (row >= p.batch * p.query_heads * p.query_length) return;
    const long long t = row % p.query_length, n = row / p.query_length % p.query_heads, b = row / p.query_length / p.query_heads;
    const bool padded = t >= batch_row(p, b).queries;
    real delta = 0, logsumexp = -infinity();
    if (!padded) {
        delta = dot(at(p.d_out, b, t, n), p.d_out.stride[3], at(p.out, b, t, n), p.out.stride[3], p.value_head_dim);
        const auto of_row = [&](const Tensor &tensor) {
            const long long place = b * tensor.stride[0] + t * tensor.stride[1] + n * tensor.stride[2];
            return reinterpret_cast<const real *>(tensor.data)[place];
        };
        logsumexp = of_row(p.lse);
        if (p.d_lse.data) delta -= of_row(p.d_lse);
    }
    if (threadIdx.x % 32 == 0) {
        p.first[row] = logsumexp == -infinity() ? infinity() : logsumexp * LOG2_E;
        p.second[row] = delta;
    }
}

// One block to a head, which adds up its rows in a fixed order.
extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT) attention_gradient_of_sinks(const Parameters p) {
    __shared__ real sums[WARPS];
    const long long n = blockIdx.x;
    const real sink = load(p.sinks.data, p.sinks_dtype, n * p.sinks.stride[0]) * LOG2_E;
    real sum = 0;
    for (long long row = threadIdx.x; row < p.batch * p.query_length; row += THREADS) {
        const long long state = state_of(p, row / p.query_length, n, row % p.query_length);
        const real logsumexp = p.first[state];
        if (logsumexp == infinity() || sink == -infinity()) continue;
        sum = fma(power_of_two(sink - logsumexp), p.second[state], sum);
    }
    sum = sum_of_warp(sum);
    if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = sum;
    __syncthreads();
    if (threadIdx.x > 0) return;
    real all = 0;
    for (int warp = 0; warp < WARPS; ++warp) all += sums[warp];
    store(p.d_sinks.data, p.sinks_dtype, n * p.d_sinks.stride[0], -all);
}
