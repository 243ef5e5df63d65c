// How the softmax of a row ends: its factor and its logsumexp.

// Of a maximum times UNIT and the sum of exponentials above it. In f32 rounded once, since nothing comes after it.
__device__ inline real logsumexp_of(real maximum, real sum) {
#if DTYPE == DTYPE_F32
    return (real)((double)maximum + log((double)sum));
#else
    return maximum / UNIT + logarithm(sum);
#endif
}

// What a row's sums are multiplied by, and its logsumexp. `maximum` is a logit times UNIT; without a key, `sum` is 0.
__device__ inline real finish(const Parameters &p, long long n, bool padded, real maximum, real sum, real &logsumexp) {
    logsumexp = -infinity();
    if (padded) return 0;
    const bool has_sink = p.sinks.data != nullptr;
    const real sink = has_sink ? load(p.sinks.data, p.sinks_dtype, n * p.sinks.stride[0]) : -infinity();
    if (sum == 0) {
        logsumexp = sink;
        return 0;
    }
    if (!has_sink) {
        logsumexp = logsumexp_of(maximum, sum);
        return keep_scale(p) / sum;
    }
    const real top = fmax(maximum, sink * UNIT);
    const real own = exponential(maximum - top);
    const real all = sum * own + exponential(sink * UNIT - top);
    logsumexp = logsumexp_of(top, all);
    return keep_scale(p) * own / all;
}

__device__ inline void store_logsumexp(const Parameters &p, long long b, long long t, long long n, real logsumexp) {
    if (p.lse.data)
        reinterpret_cast<real *>(p.lse.data)[b * p.lse.stride[0] + t * p.lse.stride[1] + n * p.lse.stride[2]] = logsumexp;
}
