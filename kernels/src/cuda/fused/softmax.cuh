// The softmax of a row: what weights are relative to, and the logsumexp.
// Needs: fused/logits.cuh, fused/dropout.cuh.
//
// The row max is taken over scores: products of query and key where logits are products times a positive
// scale, else logits. A weight is `power((score - row max) * factor)`. The difference comes before the
// factor, so it is exact for scores near the row max, however large, and a change of base makes no score
// overflow.

// Exponents of the forward pass are logits times this: base two, where the instruction for powers of two is
// accurate enough. Split products have errors of its size; other f32 kernels pay for an exponential to one
// unit in the last place.
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

// What the weights of a row are relative to: a weight is `power((score - shift.score) * factor -
// shift.power)`.
struct Shift {
    real score, power;
};

// Below this, half-precision kernels save an operation per score: the row max is multiplied by the factor,
// which rounds it, and subtracted in the same fused multiply-add. All weights of a row are then off by the
// same factor, at most 2^(1/32), which cancels; above this, it would leave the range of weights.
constexpr real NEAR = 1 << 20;

// A function of the row max alone: who knows the row max knows what the sums are relative to. FUSES allows
// the saving above.
template <bool FUSES>
__device__ inline Shift shift_of(real maximum, real factor) {
    const real power = maximum * factor;
    if (FUSES && fabs(power) < NEAR) return Shift{0, power};
    return Shift{maximum, 0};
}

template <bool FUSES>
__device__ inline real exponent_of(real score, const Shift &shift, real factor) {
    const real moved = difference(score, shift.score);
    // Where `shift.score` is 0, both ways have the same bits.
    return FUSES ? fma(moved, factor, -shift.power) : moved * factor;
}

// The rescale of sums from one shift to a later one; 0 where the row max was -inf, since no key was seen. The
// later row max is finite.
__device__ inline real change_of(const Shift &from, const Shift &to, real factor) {
    return power(fma(difference(from.score, to.score), factor, from.power - to.power));
}

// Numbers of a row of partial outputs: of a batch-invariant call an even number, so that pairs are aligned.
__device__ inline int partial_width(const Parameters &p) {
    return BATCH_INVARIANT ? (p.value_head_dim + 1) / 2 * 2 : p.value_head_dim;
}

// The sums of two splits of a row's keys as one: relative to the larger row max, with the factors for sums of
// values of the earlier and the later split. Every operation is rounded by itself, none is fused by the
// compiler, so that every kernel that merges has the same bits. Neither split is empty.
struct MergedSplits {
    real row_max, row_sum, earlier, later;
};

__device__ inline real factor_of_split(real row_max, real largest, real factor) {
    const auto shift = [&](real maximum) {
        const real power = rounded_product(maximum, factor);
        return HALVES && fabs(power) < NEAR ? Shift{0, power} : Shift{maximum, 0};
    };
    const Shift from = shift(row_max), to = shift(largest);
    return power(fma(difference(from.score, to.score), factor, difference(from.power, to.power)));
}

__device__ inline MergedSplits merge_splits(real factor, real earlier_max, real earlier_sum, real later_max,
                                            real later_sum) {
    MergedSplits merged;
    merged.row_max = fmax(earlier_max, later_max);
    merged.earlier = factor_of_split(earlier_max, merged.row_max, factor);
    merged.later = factor_of_split(later_max, merged.row_max, factor);
    merged.row_sum = fma(earlier_sum, merged.earlier, rounded_product(later_sum, merged.later));
    return merged;
}

__device__ inline real merged_value(const MergedSplits &merged, real earlier, real later) {
    return fma(earlier, merged.earlier, rounded_product(later, merged.later));
}

// Natural logits whose differences of order one must not be lost, at any size: that of a sink and a row max.
typedef double precise;

// The natural logit that the sums of a row with this row max are relative to, unrounded: the row max, less
// the rounding of `shift_of` in base two.
__device__ inline precise reference_of(const Parameters &p, real maximum) {
    const real factor = power_factor(p),
               above = exponent_of<HALVES>(maximum, shift_of<HALVES>(maximum, factor), factor);
    return (precise)maximum * (precise)natural_factor(p) - (precise)(above / POWER_UNIT);
}

// The logsumexp from a logit and the sum of exponentials relative to it. f32 rounds once, at the end; half
// precision makes do with the f32 logarithm.
__device__ inline real logsumexp_of(precise reference, real sum) {
    return (real)(reference + (HALVES ? (precise)log(sum) : log((precise)sum)));
}

// The factor for the sums of values of a row, and its logsumexp where the call wants it. `maximum` is a
// score; `sum` is 0 for a row without keys.
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
