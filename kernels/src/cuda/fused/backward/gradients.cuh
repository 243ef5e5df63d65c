// What backward kernels share: the gradient of a logit, from the probability that the given logsumexp makes
// (docs/semantics.md, "Gradients").
// Needs: fused/softmax.cuh, fused/exact.cuh.

// What the gradients of a row need. A probability is `exponential((score - state.score) * factor +
// state.offset)`. As a rule `state.score` is 0 and the offset is minus the logsumexp, times UNIT; -inf for a
// row without a probability.
//
// A far row is one whose logsumexp is so large that its rounding would show. Its `score` is its row max, not
// 0, and its offset comes from its row sum. Its exponents are capped at 0, whatever a score is rounded to.
//
// The row term `delta` and gradients of logits carry the factor `balance_of`.
struct State {
    real score, offset, delta;
};

// A very large or very small scale is applied in two steps, to the gradients of logits and to their sums of
// products with queries or keys: the product of a gradient of 1e-30 and a key of 1e-19 would underflow before a
// scale of 1e38 brings it back, and that of a gradient and a query of 1e37 would overflow before one of 1e-37
// does. 1 for other scales, and in f16, where gradients of logits have no such range.
__device__ inline real balance_of(const Parameters &p) { return DTYPE == DTYPE_F16 ? real(1) : (real)p.balance; }
__device__ inline real unbalance_of(const Parameters &p) { return DTYPE == DTYPE_F16 ? real(1) : (real)p.unbalance; }

// The rest of the scale, for the sums.
__device__ inline real scale_of_sums(const Parameters &p) { return (real)(p.scale * (double)unbalance_of(p)); }

// The logsumexp above which a row is far. Below it, rounding the logsumexp changes a probability by at most
// 2^-17 in f32, the size of the error of its logits, and by 2^-14 in half precision, which rounds
// probabilities to 2^-12 at best.
constexpr real FAR = HALVES ? 1024 : 128;

__device__ inline bool is_far(real logsumexp) { return fabs(logsumexp) >= FAR && fabs(logsumexp) < infinity(); }

// From differences of scores to exponents.
__device__ inline real gradient_factor(const Parameters &p) { return natural_factor(p) * UNIT; }

// The state from the given logsumexp alone. The score of a far row is not 0, which would say that it is not
// far.
__device__ inline State state_of_logsumexp(const Parameters &p, real logsumexp, real delta) {
    if (is_far(logsumexp)) return State{logsumexp / natural_factor(p), 0, delta};
    return State{0, logsumexp == -infinity() ? -infinity() : -logsumexp * UNIT, delta};
}

// The state from the row's own row max and row sum, where these agree with the given logsumexp to eight units
// in its last place: the forward pass may have summed products in another order. Where the keys at hand are
// only some of the row's, they do not agree, and the state stays: the given logsumexp stands for the other
// keys too.
__device__ inline void state_of_sums(const Parameters &p, long long n, real maximum, real total, real logsumexp,
                                     State &state) {
    if (!(total > 0) || !is_finite(total)) return;
    const precise reference = (precise)maximum * (precise)natural_factor(p);
    precise own = reference + log((precise)total), offset = -log((precise)total);
    if (p.sinks.data) {
        const precise sink = load(p.sinks.data, p.sinks_dtype, n * p.sinks.stride[0]);
        const precise top = fmax(reference, sink);
        const precise all = total * exp(reference - top) + exp(sink - top);
        own = top + log(all);
        offset = reference - top - log(all);
    }
    constexpr precise EPSILON = DTYPE == DTYPE_F64 ? precise(2.220446049250313e-16) : precise(1.1920928955078125e-7);
    const precise magnitude = fmax(fabs(own), fabs((precise)logsumexp));
    if (!(fabs(own - (precise)logsumexp) <= 8 * EPSILON * magnitude)) return;
    state.score = maximum;
    // Not -inf, which stands for a row without a probability.
    state.offset = (real)fmax(offset * (precise)UNIT, precise(-1e30));
}

// The scratch that attention_prepare_gradients fills, a number per row (`scratch_row`) each: offsets in
// `row_offsets`; row terms in `row_deltas`, scores behind those, and behind them a number per sequence and head,
// [B, N], that is not 0 where it has a far row.
__device__ inline real *scores_of_states(const Parameters &p) { return p.row_deltas + count_of_rows(p); }
__device__ inline real *far_heads(const Parameters &p) { return p.row_deltas + 2 * count_of_rows(p); }
__device__ inline bool has_far_rows(const Parameters &p, long long b, long long n) {
    return far_heads(p)[b * p.query_heads + n] != 0;
}

// The cap on the exponents of a row in the loops over tiles. A far row whose row max is 0 needs none: its
// logsumexp is that of its sink, so its exponents are far below 0.
__device__ inline real largest_exponent(const State &state) { return state.score != 0 ? real(0) : infinity(); }

// The exponent of a probability, capped at `largest`; NaN stays. A row that is not far has the same bits with
// and without MAY_BE_FAR, so its bits do not depend on the rows that share its tile.
template <bool MAY_BE_FAR>
__device__ inline real exponent_in(const Parameters &p, real score, const State &state, real largest) {
    const real factor = gradient_factor(p);
    if constexpr (!MAY_BE_FAR) return fma(score, factor, state.offset);
    const real exponent = fma(difference(score, state.score), factor, state.offset);
    return at_most(exponent, largest);
}

struct Weights {
    // The probability after dropout, without the factor of dropout.
    real kept;
    // The gradient of the logit, and of the scaled product behind it, balanced.
    real logit, product;
};

// From the exponent of a probability, -inf where `masked`, to the gradient of its logit. `incoming` is the
// product of d_out and value, `kept` the bit of dropout.
__device__ inline Weights weigh(const Parameters &p, bool masked, real exponent, real slope, bool kept, real incoming,
                                real delta) {
    const real probability = exponential(exponent);
    const real change = (kept ? keep_scale(p) * balance_of(p) * incoming : real(0)) - delta;
    Weights weights;
    weights.kept = kept ? probability : real(0);
    // Selected, not multiplied: masked operands may be NaN.
    weights.logit = masked ? real(0) : probability * change;
    weights.product = weights.logit * slope;
    return weights;
}

// The same in slots r and c of a tile, from the product of query and key and as `tile_logit` has it.
template <class Check, bool MAY_BE_FAR, bool EXACT, class MaskBias>
__device__ inline Weights weigh(const Parameters &p, const Row &row, int key, real distance, const MaskBias &mask_bias,
                                int r, int c, bool kept, real product, real incoming, const State &state,
                                real largest) {
    real slope = 1, score = product;
    bool masked;
    if constexpr (NEEDS_LOGITS) {
        score = tile_logit<Check, EXACT>(p, row, key, distance, mask_bias, r, c, product, slope);
        masked = score == -infinity();
    } else {
        masked = !takes_part<Check>(p, row, key, mask_bias, r, c);
    }
    // Not from the state, which may be NaN.
    return weigh(p, masked, masked ? -infinity() : exponent_in<MAY_BE_FAR>(p, score, state, largest), slope, kept,
                 incoming, state.delta);
}

// As attention_prepare_gradients left it.
struct PreparedState {
#if LAYOUT != LAYOUT_DENSE
    // Whose rows they are.
    Sequence sequence;
#endif
    __device__ inline explicit PreparedState(const Sequence &of) {
#if LAYOUT != LAYOUT_DENSE
        sequence = of;
#endif
    }
    __device__ inline State operator()(const Parameters &p, long long b, long long n, int t) const {
        const long long state = scratch_row(p, sequence, b, n, t);
        return State{scores_of_states(p)[state], p.row_offsets[state], p.row_deltas[state]};
    }
};

// The same for a single row and key, by a whole warp. Returns false where the key is masked. The product is
// summed in another order than the logsumexp was, so exponents are capped at 0 in every row.
__device__ inline bool weigh_exactly(const Parameters &p, const DropoutWords &dropout, const Row &row,
                                     const State &state, long long b, long long n, int key, Weights &weights) {
    real slope;
    const real score = exact_score(p, row, b, n, key, slope);
    if (score == -infinity()) return false;
    const real incoming = dot(at_query(p.d_out, row, b, n), p.d_out.stride[3],
                              at_key(p, p.value, row, b, key, n / p.group), p.value.stride[3], p.value_head_dim);
    const bool kept = !drops(p) || is_kept(p, dropout, row, key);
    weights = weigh(p, false, exponent_in<true>(p, score, state, real(0)), slope, kept, incoming, state.delta);
    return true;
}

// The gradient of a query, but for `scale_of_sums`, by a warp.
template <class StateOf>
__device__ inline void exact_gradient_of_query(const Parameters &p, const Row &row, long long b, long long n,
                                               StateOf state_of_row, real (&sums)[HEAD / 32]) {
#pragma unroll
    for (int i = 0; i < HEAD / 32; ++i) sums[i] = 0;
    const State state = state_of_row(p, b, n, row.t);
    const DropoutWords dropout = dropout_words(p);
    for (int key = row.low; key < row.high; ++key) {
        Weights weights;
        if (weigh_exactly(p, dropout, row, state, b, n, key, weights))
            add_row<HEAD>(sums, weights.product, at_key(p, p.key, row, b, key, n / p.group), p.key.stride[3],
                          p.head_dim);
    }
}

// The gradients of a key, but for `scale_of_sums`, and of its value, but for dropout's factor, by a warp.
template <class StateOf>
__device__ inline void exact_gradients_of_key(const Parameters &p, const Sequence &sequence, long long b,
                                              long long key_head, int key, StateOf state_of_row,
                                              real (&keys)[HEAD / 32], real (&values)[VALUE / 32]) {
#pragma unroll
    for (int i = 0; i < HEAD / 32; ++i) keys[i] = 0;
#pragma unroll
    for (int i = 0; i < VALUE / 32; ++i) values[i] = 0;
    const int from = between(key - sequence.high + 1, 0, sequence.queries),
              to = between(key + 1 - sequence.low, 0, sequence.queries);
    const DropoutWords dropout = dropout_words(p);
    for (long long n = key_head * p.group; n < (key_head + 1) * p.group; ++n) {
        for (int t = from; t < to; ++t) {
            const Row row = row_of(p, sequence, b, n, t);
            Weights weights;
            if (!weigh_exactly(p, dropout, row, state_of_row(p, b, n, t), b, n, key, weights)) continue;
            add_row<HEAD>(keys, weights.product, at_query(p.query, row, b, n), p.query.stride[3], p.head_dim);
            if (weights.kept != 0)
                add_row<VALUE>(values, weights.kept, at_query(p.d_out, row, b, n), p.d_out.stride[3], p.value_head_dim);
        }
    }
}
