// The lengths of a call and what follows from them, as arrays of integers, for cuDNN's graphs and the helper
// kernels: lengths may be of other dtypes and strides, and are brought into their bounds.
// Needs: fused/parameters.cuh.
//
// One thread per batch row. Compiled once, whatever the operands are. Tested by the conformance suite of
// attention-cudnn.

// The second argument of `attention_sequences`: arrays that are written. The layout is that of the struct of
// the same name on the host (attention-cudnn).
struct SequenceArrays {
    // [B].
    int *query_lengths, *key_lengths;
    // The first row that sees a key by structure and the end of those that do, and the first key that any row
    // sees and the end of those, [B, 2]; and what is added to a row to give its position, [B]. Null where not
    // wanted.
    int *rows, *keys, *offsets;
};

static_assert(sizeof(SequenceArrays) == 40, "the host's layout");

extern "C" __global__ void __launch_bounds__(BLOCK)
    attention_sequences(const __grid_constant__ Parameters p, const SequenceArrays to) {
    const long long b = blockIdx.x * (long long)blockDim.x + threadIdx.x;
    if (b >= p.batch) return;
    const SequenceRows sequence = sequence_of(p, b);
    const long long queries = sequence.queries, keys = sequence.keys;
    to.query_lengths[b] = sequence.queries;
    to.key_lengths[b] = sequence.keys;
    if (to.offsets != nullptr) to.offsets[b] = (int)sequence.offset;
    if (to.rows != nullptr) {
        // Row t sees a key where t + high > 0 and t + low < keys, since low < high.
        const long long first = max(0ll, 1 - sequence.high), end = min(queries, keys - sequence.low);
        const bool any = keys > 0 && first < end;
        to.rows[2 * b] = any ? (int)first : 0;
        to.rows[2 * b + 1] = any ? (int)end : 0;
    }
    if (to.keys != nullptr) {
        // From the first key of the first row to the last of the last.
        to.keys[2 * b] = queries > 0 ? first_key(sequence, 0) : 0;
        to.keys[2 * b + 1] = queries > 0 ? end_key(sequence, queries - 1) : 0;
    }
}
