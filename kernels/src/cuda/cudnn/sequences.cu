// The lengths of a call, and the intervals and offsets that follow from them, as arrays of 32-bit integers
// for cuDNN's graphs and the helper kernels. The call's lengths may have other dtypes and strides; the kernel
// converts them and clamps them to the lengths of the tensors.
// Needs: fused/sequence.cuh.
//
// One thread per batch row. One compiled variant serves all operands. Tested by the conformance suite of
// attention-cudnn.

// The second argument of `attention_sequences`: the arrays that it writes. The layout is that of the struct
// of the same name on the host (arguments.rs of attention-cudnn).
struct SequenceArrays {
    // [B].
    int *query_lengths, *key_lengths;
    // The interval of rows that see a key by structure, and that of keys that any row sees, both [B, 2]
    // (first and end); and the offset that is added to a row to give its position, [B]. Null if nothing reads
    // them.
    int *rows, *keys, *offsets;
};

static_assert(sizeof(SequenceArrays) == 40, "the host's layout");

extern "C" __global__ void __launch_bounds__(BLOCK)
    attention_sequences(const __grid_constant__ Parameters p, const SequenceArrays to) {
    const long long b = blockIdx.x * (long long)blockDim.x + threadIdx.x;
    if (b >= p.batch) return;
    const Sequence sequence = sequence_of(p, b);
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
        // From the first key of the first row to the last key of the last row.
        to.keys[2 * b] = queries > 0 ? first_key(sequence, 0) : 0;
        to.keys[2 * b + 1] = queries > 0 ? end_key(sequence, queries - 1) : 0;
    }
}
