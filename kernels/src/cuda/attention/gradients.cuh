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

// The same for a single row and key, by a whole warp. False where the key takes no part.
__device__ inline bool weigh_exactly(const Parameters &p, const Row &row, long long b, long long n, int key, Weights &weights) {
    real slope;
    const real product = dot(at(p.query, b, row.t, n), p.query.stride[3], at(p.key, b, key, n / p.group), p.key.stride[3], p.head_dim);
    const real x = logit<Checked>(p, row, key, product, slope);
    if (x == -infinity()) return false;
    const real incoming =
        dot(at(p.d_out, b, row.t, n), p.d_out.stride[3], at(p.value, b, key, n / p.group), p.value.stride[3], p.value_head_dim);
    const long long state = state_of(p, b, n, row.t);
    const bool kept = !drops(p) || is_kept(p, row, key);
    weights = weigh(p, false, fma(x, UNIT, -p.first[state]), slope, kept, incoming, p.second[state]);
    return true;
}
