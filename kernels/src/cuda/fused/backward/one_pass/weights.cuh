// From products to probabilities and gradients of logits in two steps, for tiles of which every row sees every
// key in a call without options: probabilities while the products of values and d_out are still computed.
// Needs: fused/backward/keys/logit_gradients.cuh.

#if ON_WARPGROUPS

// Measured on an H200: tiles of 128 query rows at head dimension 64 gain 2 to 5 %, those of 64 rows at 128 lose
// as much.
constexpr bool IN_TWO_STEPS = ROWS == 128;
static_assert(!IN_TWO_STEPS || FEATURES == 0, "the host gives tiles of 128 rows to calls without options");

// From products of keys and queries to probabilities, in their places. `numbers` as in `logit_gradients`.
__device__ inline void probabilities(const Parameters &p, const real *numbers,
                                     real (&weights)[2][column_slots<ROWS>()]) {
#pragma unroll
    for (int c = 0; c < column_slots<ROWS>(); ++c) {
        const State state{0, numbers[column_at(c)], 0};
#pragma unroll
        for (int r = 0; r < 2; ++r)
            weights[r][c] = exponential(exponent_in<false>(p, weights[r][c], state, infinity()));
    }
}

// From probabilities, and products of values and d_out, to the gradients of the first products, in the place
// of the second.
__device__ inline void gradients_of_products(const Parameters &p, const real *numbers,
                                             const real (&weights)[2][column_slots<ROWS>()],
                                             real (&gradients)[2][column_slots<ROWS>()]) {
#pragma unroll
    for (int c = 0; c < column_slots<ROWS>(); ++c) {
        const real delta = numbers[ROWS + column_at(c)];
#pragma unroll
        for (int r = 0; r < 2; ++r) gradients[r][c] = weights[r][c] * (balance_of(p) * gradients[r][c] - delta);
    }
}

#endif
