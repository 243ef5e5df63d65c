// The softmax of a row: how it is carried along, and how it ends.
//
// A score is what the maximum of a row is taken of: the product of query and key where there is nothing else to a logit, else the
// logit. Maxima are kept as scores, and a weight is `power((score - maximum) * factor)`: the difference comes before the factor, so
// that it is exact for scores near the maximum however large they are, and no score leaves the numbers that there are by a change of
// base.

// What exponents of the forward pass are in: base two, where the instruction for it is good enough. Split products have errors of the
// size of the instruction's; what is to be as exact as f32 can be pays for one unit in the last place.
constexpr real POWER_UNIT = TENSOR_CORES ? LOG2_E : real(1);

__device__ inline real power(real x) {
#if TENSOR_CORES
    return power_of_two(x);
#else
    return exp(x);
#endif
}

// From scores to natural logits.
__device__ inline real natural_factor(const Parameters &p) { return NEEDS_LOGITS ? real(1) : (real)p.scale; }

// From differences of scores to exponents.
__device__ inline real power_factor(const Parameters &p) { return natural_factor(p) * POWER_UNIT; }

// What a row's weights are relative to: a weight is `power((score - shift.score) * factor - shift.power)`.
struct Shift {
    real score, power;
};

// Below this, halves save an operation a score: the maximum goes to base two, where it is rounded, and is subtracted in the operation
// that multiplies. Weights are then off by what was rounded, all alike, at most half a unit in the last place of this: 1/32. That
// cancels, but for larger numbers it would leave the range of weights.
constexpr real NEAR = 1 << 20;

// From a row's maximum, and nothing else: whoever has the maximum knows what its sums are relative to. FUSES allows the saving.
template <bool FUSES>
__device__ inline Shift shift_of(real maximum, real factor) {
    const real power = maximum * factor;
    if (FUSES && fabs(power) < NEAR) return Shift{0, power};
    return Shift{maximum, 0};
}

template <bool FUSES>
__device__ inline real exponent_of(real score, const Shift &shift, real factor) {
    const real moved = difference(score, shift.score);
    // Where nothing was moved, this is the operation that saves one: the same bits by either way.
    return FUSES ? fma(moved, factor, -shift.power) : moved * factor;
}

// What sums relative to one shift are multiplied by to be relative to a later one. 0 for those of a row that has seen nothing, whose
// maximum is -inf; that of the later one is finite.
__device__ inline real change_of(const Shift &from, const Shift &to, real factor) {
    return power(fma(difference(from.score, to.score), factor, from.power - to.power));
}

// Natural logits beside which a difference of order one must not be lost: that of a sink and a row's maximum, at any size of both.
typedef double precise;

// The natural logit that sums with this maximum are relative to, not rounded yet: the maximum, less what weights are relative to instead
// where that was rounded in base two.
__device__ inline precise reference_of(const Parameters &p, real maximum) {
    const real factor = power_factor(p),
               above = exponent_of<HALVES>(maximum, shift_of<HALVES>(maximum, factor), factor);
    return (precise)maximum * (precise)natural_factor(p) - (precise)(above / POWER_UNIT);
}

// Of a logit and the sum of exponentials above it. In f32 rounded once, since nothing comes after it; halves do with the f32 logarithm.
__device__ inline real logsumexp_of(precise reference, real sum) {
    return (real)(reference + (HALVES ? (precise)log(sum) : log((precise)sum)));
}

// What a row's sums are multiplied by, and its logsumexp, if anyone wants it: it takes longer. `maximum` is a score; without a key, `sum`
// is 0.
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
        if (p.lse.data) logsumexp = logsumexp_of(reference_of(p, maximum), sum);
        return keep_scale(p) / sum;
    }
    const precise reference = reference_of(p, maximum);
    const precise top = fmax(reference, (precise)sink);
    const real own = exp((real)(reference - top));
    const real all = sum * own + exp((real)((precise)sink - top));
    logsumexp = logsumexp_of(top, all);
    return keep_scale(p) * own / all;
}

__device__ inline void store_logsumexp(const Parameters &p, long long b, long long t, long long n, real logsumexp) {
    if (p.lse.data)
        reinterpret_cast<real *>(p.lse.data)[b * p.lse.stride[0] + t * p.lse.stride[1] + n * p.lse.stride[2]] =
            logsumexp;
}
