// What backward kernels share: the gradient of a logit from the probability that the given logsumexp makes
// (docs/semantics.md, "Gradients").

// The scratch that attention_prepare_gradients fills: the logsumexp times UNIT, and the row term. A row without a
// probability has a logsumexp of +inf, so that every exponential is 0.
__device__ inline long long state_of(const Parameters &p, long long b, long long n, long long t) {
    return (b * p.query_heads + n) * p.query_length + t;
}

struct Weights {
    // The probability after dropout, without dropout's factor.
    real kept;
    // The gradient of the logit, and of the scaled product behind it.
    real logit, product;
};

// From a logit less the logsumexp, both times UNIT, to its gradient; where it is `masked`, it is -inf. `incoming` is the product of
// d_out and value, `kept` the bit of dropout.
__device__ inline Weights weigh(const Parameters &p, bool masked, real exponent, real slope, bool kept, real incoming, real delta) {
    const real probability = exponential(exponent);
    const real change = (kept ? keep_scale(p) * incoming : real(0)) - delta;
    Weights weights;
    weights.kept = kept ? probability : real(0);
    // Selected, not multiplied: what is masked may be NaN.
    weights.logit = masked ? real(0) : probability * change;
    weights.product = weights.logit * slope;
    return weights;
}

// The same in slots r and c of a tile, from the product of query and key and as `tile_logit` has it.
template <class Check, class Terms>
__device__ inline Weights weigh(const Parameters &p, const Row &row, int key, real distance, const Terms &terms, int r, int c, bool kept,
                                real product, real incoming, real logsumexp, real delta) {
    if constexpr (HAS_TERMS) {
        real slope;
        const real x = tile_logit<Check>(p, row, key, distance, terms, r, c, product, slope);
        const bool masked = x == -infinity();
        // The logsumexp may be NaN.
        return weigh(p, masked, masked ? x : fma(x, UNIT, -logsumexp), slope, kept, incoming, delta);
    }
    const bool masked = !takes_part<Check>(p, row, key, terms, r, c);
    return weigh(p, masked, masked ? -infinity() : fma(product, (real)p.scale * UNIT, -logsumexp), 1, kept, incoming, delta);
}

// What the gradients of a row need: its logsumexp times UNIT, and its row term.
struct State {
    real logsumexp, delta;
};

// As attention_prepare_gradients left it.
struct PreparedState {
    __device__ inline State operator()(const Parameters &p, long long b, long long n, int t) const {
        const long long state = state_of(p, b, n, t);
        return State{p.first[state], p.second[state]};
    }
};

// The same for a single row and key, by a whole warp. False where the key takes no part.
__device__ inline bool weigh_exactly(const Parameters &p, const Row &row, const State &state, long long b, long long n, int key,
                                     Weights &weights) {
    real slope;
    const real x = exact_logit(p, row, b, n, key, slope);
    if (x == -infinity()) return false;
    const real incoming =
        dot(at(p.d_out, b, row.t, n), p.d_out.stride[3], at(p.value, b, key, n / p.group), p.value.stride[3], p.value_head_dim);
    const bool kept = !drops(p) || is_kept(p, row, key);
    weights = weigh(p, false, fma(x, UNIT, -state.logsumexp), slope, kept, incoming, state.delta);
    return true;
}

// The gradient of a query, but for the scale, by a warp.
template <class StateOf>
__device__ inline void exact_gradient_of_query(const Parameters &p, const Row &row, long long b, long long n, StateOf state_of_row,
                                               real (&sums)[HEAD / 32]) {
#pragma unroll
    for (int i = 0; i < HEAD / 32; ++i) sums[i] = 0;
    const State state = state_of_row(p, b, n, row.t);
    for (int key = row.low; key < row.high; ++key) {
        Weights weights;
        if (weigh_exactly(p, row, state, b, n, key, weights))
            add_row<HEAD>(sums, weights.product, at(p.key, b, key, n / p.group), p.key.stride[3], p.head_dim);
    }
}

// The gradients of a key, but for the scale, and of its value, but for dropout's factor, by a warp.
template <class StateOf>
__device__ inline void exact_gradients_of_key(const Parameters &p, const Batch &batch, long long b, long long key_head, int key,
                                              StateOf state_of_row, real (&keys)[HEAD / 32], real (&values)[VALUE / 32]) {
#pragma unroll
    for (int i = 0; i < HEAD / 32; ++i) keys[i] = 0;
#pragma unroll
    for (int i = 0; i < VALUE / 32; ++i) values[i] = 0;
    const int from = between(key - batch.high + 1, 0, batch.queries), to = between(key + 1 - batch.low, 0, batch.queries);
    for (long long n = key_head * p.group; n < (key_head + 1) * p.group; ++n) {
        for (int t = from; t < to; ++t) {
            const Row row = row_of(p, batch, b, n, t);
            Weights weights;
            if (!weigh_exactly(p, row, state_of_row(p, b, n, t), b, n, key, weights)) continue;
            add_row<HEAD>(keys, weights.product, at(p.query, b, t, n), p.query.stride[3], p.head_dim);
            if (weights.kept != 0) add_row<VALUE>(values, weights.kept, at(p.d_out, b, t, n), p.d_out.stride[3], p.value_head_dim);
        }
    }
}
