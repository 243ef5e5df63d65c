// Isolation of NaN after the backward pass: gradients of queries, keys and values, each null if the call does
// not ask for it.
// Needs: cudnn/contain.cuh, fused/backward/gradients.cuh.
//
// The kernel also recomputes far rows (gradients.cuh) and the keys that they may see, because cuDNN takes the
// given logsumexp as exact. attention_sum_rows has then written the states of those rows; if it does not run,
// `row_deltas` is null.

// The state of a row, computed by a warp from the results of the forward pass.
struct ComputedState {
#if LAYOUT != LAYOUT_DENSE
    // Whose rows they are.
    Sequence sequence;
#endif
    __device__ inline explicit ComputedState(const Sequence &of) {
#if LAYOUT != LAYOUT_DENSE
        sequence = of;
#endif
    }
    __device__ inline State operator()(const Parameters &p, long long b, long long n, int t) const {
        const long long row = query_row(sequence, t);
        const auto of_row = [&](const Tensor &tensor) {
            return reinterpret_cast<const real *>(
                tensor.data)[b * tensor.stride[0] + row * tensor.stride[1] + n * tensor.stride[2]];
        };
        const real logsumexp = of_row(p.lse);
        const real delta =
            dot(at(p.d_out, b, row, n), p.d_out.stride[3], at(p.out, b, row, n), p.out.stride[3], p.value_head_dim);
        State state =
            state_of_logsumexp(p, logsumexp, balance_of(p) * (p.d_lse.data ? delta - of_row(p.d_lse) : delta));
        if (p.row_deltas && is_far(logsumexp)) {
            const long long place = dense_row(p, b, n, t);
            state.score = scores_of_states(p)[place];
            state.offset = p.row_offsets[place];
        }
        return state;
    }
};

// Whether the row's logsumexp makes it a far row.
__device__ inline bool is_far_row(const Parameters &p, long long b, long long n, int t) {
    return is_far(
        reinterpret_cast<const real *>(p.lse.data)[b * p.lse.stride[0] + t * p.lse.stride[1] + n * p.lse.stride[2]]);
}

// The bits of all groups of a warp.
constexpr unsigned ALL_GROUPS = (1u << GROUPS_OF_WARP) - 1;

__device__ inline void isolate_gradient_of_queries(const Parameters &p, unsigned block) {
    const Strip strip = strip_of_queries(p, block);
    const long long b = strip.batch, n = strip.head;
    const int first = strip.first, end = strip.sequence.queries;
    if (first >= end) return;
    const bool has_far = p.row_deltas && has_far_rows(p, b, n);
    const unsigned non_finite = has_far
                                    ? ALL_GROUPS
                                    : non_finite_groups<HEAD>(p.d_query, b, query_row(strip.sequence, 0), n, first, end,
                                                              p.head_dim, p.aligned & ALIGNED_D_QUERY);
    for_each_row(non_finite, first, end, [&](int t) {
        const long long place = query_row(strip.sequence, t);
        if (is_finite_row(p.d_query, b, place, n, p.head_dim) && !(has_far && is_far_row(p, b, n, t))) return;
        real sums[HEAD / 32];
        exact_gradient_of_query(p, row_of(p, strip.sequence, b, n, t), b, n, ComputedState(strip.sequence), sums);
        store_row<HEAD>(at(p.d_query, b, place, n), p.d_query.stride[3], p.head_dim, sums, scale_of_sums(p));
    });
}

__device__ inline void isolate_gradients_of_keys(const Parameters &p, unsigned block) {
    const Strip strip = strip_of_keys(p, block);
    const long long b = strip.batch, head = strip.head;
    const int first = strip.first, end = strip.sequence.keys;
    if (first >= end) return;
    bool has_far = false;
    for (long long n = head * p.group; p.row_deltas && n < (head + 1) * p.group; ++n) has_far |= has_far_rows(p, b, n);
    unsigned non_finite = has_far ? ALL_GROUPS : 0;
    const long long origin = key_row(strip.sequence, 0);
    if (p.d_key.data && !has_far)
        non_finite |=
            non_finite_groups<HEAD>(p.d_key, b, origin, head, first, end, p.head_dim, p.aligned & ALIGNED_D_KEY);
    if (p.d_value.data && !has_far)
        non_finite |= non_finite_groups<VALUE>(p.d_value, b, origin, head, first, end, p.value_head_dim,
                                               p.aligned & ALIGNED_D_VALUE);
    for_each_row(non_finite, first, end, [&](int key) {
        const long long place = key_row(strip.sequence, key);
        const bool finite = (!p.d_key.data || is_finite_row(p.d_key, b, place, head, p.head_dim)) &&
                            (!p.d_value.data || is_finite_row(p.d_value, b, place, head, p.value_head_dim));
        if (finite && !has_far) return;
        real keys[HEAD / 32], values[VALUE / 32];
        exact_gradients_of_key(p, strip.sequence, b, head, key, ComputedState(strip.sequence), keys, values);
        if (p.d_key.data)
            store_row<HEAD>(at(p.d_key, b, place, head), p.d_key.stride[3], p.head_dim, keys, scale_of_sums(p));
        if (p.d_value.data)
            store_row<VALUE>(at(p.d_value, b, place, head), p.d_value.stride[3], p.value_head_dim, values,
                             keep_scale(p));
    });
}

// The blocks that check the gradient of queries.
__device__ inline unsigned blocks_of_queries(const Parameters &p) {
#if LAYOUT == LAYOUT_DENSE
    return strips_of_head(p.query_length) * (unsigned)(p.query_heads * p.batch);
#else
    // Every layout but the dense one packs queries in backward.
    return count_of_slots(p, p.query_rows, ROWS_OF_BLOCK, 1) * (unsigned)p.query_heads;
#endif
}

// The first blocks check the gradient of queries, if the call asks for it, and the others those of keys and
// values.
extern "C" __global__ void __launch_bounds__(BLOCK, MANY)
    attention_contain_gradients(const __grid_constant__ Parameters p) {
    const unsigned of_queries = p.d_query.data ? blocks_of_queries(p) : 0;
    if (blockIdx.x < of_queries)
        isolate_gradient_of_queries(p, blockIdx.x);
    else
        isolate_gradients_of_keys(p, blockIdx.x - of_queries);
}
