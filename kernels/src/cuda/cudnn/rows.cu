// Kernels for rows that see no key, keys that no row sees, and the logsumexp in cuDNN's layout. cuDNN
// multiplies values at masked positions by 0, and 0 times NaN is NaN, so a kernel here copies the operands
// with zeros in such rows and keys before cuDNN's plan runs.
// Needs: cudnn/strides.cuh, cudnn/intervals.cuh.
//
// One thread per row and head or, in the copy, per eight elements. Any dtype of two bytes (the only number
// that the kernels write to outputs is zero), f32 logsumexp, any compute capability. Tested by the
// conformance suite of attention-cudnn.

// Where sequences begin among packed rows, and the last one ends, [B + 1]; null if rows are dense. The
// tensors of packed rows have one batch row, [1, total, N, H], and their positions count rows of all
// sequences.
struct Starts {
    const int *of;
};

// The sequence of a packed row: the last one that begins at the row or before it, or `batch` for a row behind
// the last sequence.
__device__ inline long long sequence_of_row(const Starts &starts, long long batch, long long row) {
    long long low = 0, high = batch;
    while (low < high) {
        const long long middle = low + (high - low + 1) / 2;
        if (starts.of[middle] <= row)
            low = middle;
        else
            high = middle - 1;
    }
    return low;
}

// The row of a thread: batch row (sequence), head, and position in the sequence; `inside` is false past the
// last one.
struct RowOf {
    long long batch, head, position;
    // Where it is in tensors: batch row and position.
    long long tensor_batch, tensor_position;
    // Its place in cuDNN's logsumexp, [B, N, T], or [total, N] if rows are packed.
    long long stats;
    bool inside;
};

// The row of a thread among `positions` positions of `batch` batch rows, or, if rows are packed, among
// `positions` rows of `batch` sequences.
__device__ inline RowOf row_of(long long batch, long long positions, long long heads, const Starts &starts) {
    const long long index = blockIdx.x * (long long)blockDim.x + threadIdx.x;
    RowOf row;
    // Heads change fastest: neighbouring threads write neighbouring elements of a logsumexp [B, T, N].
    row.head = index % heads;
    row.tensor_position = index / heads % positions;
    row.tensor_batch = index / heads / positions;
    if (starts.of == nullptr) {
        row.batch = row.tensor_batch;
        row.position = row.tensor_position;
        row.stats = (row.batch * heads + row.head) * positions + row.position;
        row.inside = row.batch < batch;
    } else {
        row.inside = row.tensor_batch == 0;
        row.batch = row.inside ? sequence_of_row(starts, batch, row.tensor_position) : batch;
        row.position = row.inside ? row.tensor_position - starts.of[row.batch] : 0;
        row.stats = index;
    }
    return row;
}

// The rows that see at least one key.
struct SeeingRows {
    // The rows that see a key by structure.
    Intervals intervals;
    // [B, N or 1, T], zero for rows that see no key because of mask or bias; null if there is neither, as
    // always if rows are packed.
    const unsigned char *flags;
    long long flag_heads;
};

__device__ inline bool sees(const SeeingRows &of, const RowOf &row, long long batch, long long positions) {
    // Packed rows behind the last sequence belong to none.
    if (row.batch >= batch || !contains(interval_of(of.intervals, row.batch), row.position)) return false;
    const long long head = of.flag_heads == 1 ? 0 : row.head;
    return of.flags == nullptr || of.flags[(row.batch * of.flag_heads + head) * positions + row.position] != 0;
}

// The logsumexp of a row that sees no key.
__device__ inline float minus_infinity() { return __int_as_float(0xff800000); }

// The argument of `attention_finish_forward`. The structs that kernels take have the layout of the structs of
// the same name on the host (arguments.rs of attention-cudnn).
struct FinishForward {
    unsigned short *out;
    RowStrides out_strides;
    // The caller's logsumexp; null if the call does not ask for it.
    float *lse;
    RowStrides lse_strides;
    // cuDNN's logsumexp, [B, N, T], or [total, N] if rows are packed.
    float *stats;
    SeeingRows seeing;
    // The sinks, [N], and the query lengths, [B]; null if there are none.
    const float *sinks;
    const int *lengths;
    Starts starts;
    long long batch, positions, heads, width;
};

static_assert(sizeof(FinishForward) == 160, "the host's layout");

// Copies the logsumexp to the caller's tensor, and writes the results of rows that see no key: an output of
// zeros, and the sink or -inf as logsumexp.
extern "C" __global__ void __launch_bounds__(BLOCK) attention_finish_forward(const FinishForward p) {
    const RowOf row = row_of(p.batch, p.positions, p.heads, p.starts);
    if (!row.inside) return;
    const bool seen = sees(p.seeing, row, p.batch, p.positions);
    if (p.lse != nullptr) {
        const bool exists =
            row.batch < p.batch && (p.lengths == nullptr || row.position < p.lengths[row.batch]);
        const float nothing = p.sinks == nullptr || !exists ? minus_infinity() : p.sinks[row.head];
        p.lse[row_offset(p.lse_strides, row.tensor_batch, row.tensor_position, row.head)] =
            seen ? p.stats[row.stats] : nothing;
    }
    if (!seen) {
        // attention_contain_outputs reads it.
        p.stats[row.stats] = minus_infinity();
        unsigned short *to = p.out + row_offset(p.out_strides, row.tensor_batch, row.tensor_position, row.head);
        for (long long column = 0; column < p.width; ++column) to[column] = 0;
    }
}

// The argument of `attention_prepare_backward`.
struct PrepareBackward {
    const float *lse;
    RowStrides lse_strides;
    // The logsumexp that cuDNN reads, [B, N, T], or [total, N] if rows are packed.
    float *stats;
    // One number per batch row and head, which attention_sum_rows sets; null if that does not run, as always
    // if rows are packed.
    float *far_heads;
    SeeingRows seeing;
    Starts starts;
    long long batch, positions, heads;
};

static_assert(sizeof(PrepareBackward) == 112, "the host's layout");

// Copies the logsumexp from the caller's tensor to cuDNN's layout, with +inf for rows that see no key.
extern "C" __global__ void __launch_bounds__(BLOCK) attention_prepare_backward(const PrepareBackward p) {
    const RowOf row = row_of(p.batch, p.positions, p.heads, p.starts);
    if (!row.inside) return;
    if (p.far_heads != nullptr && row.position == 0) p.far_heads[row.batch * p.heads + row.head] = 0.0f;
    const float value = p.lse[row_offset(p.lse_strides, row.tensor_batch, row.tensor_position, row.head)];
    // With a logsumexp of +inf, every logit has probability exp(x - inf) = 0.
    const bool seen = sees(p.seeing, row, p.batch, p.positions) && value != minus_infinity();
    p.stats[row.stats] = seen ? value : __int_as_float(0x7f800000);
}

// The argument of `attention_clean_rows`.
struct CleanRows {
    const unsigned short *from;
    RowStrides from_strides;
    uint4 *to;
    // The rows that are copied are those in `intervals` that neither `flags` nor `stats` exclude.
    Intervals intervals;
    // [B, `flag_heads`, `flag_row`], zero for rows that are not copied; null if there are none.
    const unsigned char *flags;
    long long flag_heads, flag_row;
    // [B, N, T], as `attention_prepare_backward` writes it: +inf for a row that sees no key; null if it
    // excludes no row.
    const float *stats;
    long long batch, positions, heads;
    // Vectors of 16 bytes per row.
    long long vectors;
};

static_assert(sizeof(CleanRows) == 120, "the host's layout");

// Copies the rows of a tensor [B, T, N, H] without gaps, with zeros in place of the rows that are excluded.
//
// Rows begin at multiples of 16 bytes. A thread copies one vector of a row; threadIdx.y counts rows.
extern "C" __global__ void __launch_bounds__(BLOCK) attention_clean_rows(const CleanRows p) {
    const long long count = p.batch * p.positions * p.heads;
    const long long step = gridDim.x * (long long)blockDim.y;
    for (long long index = blockIdx.x * (long long)blockDim.y + threadIdx.y; index < count; index += step) {
        const long long head = index % p.heads;
        const long long position = index / p.heads % p.positions;
        const long long b = index / p.heads / p.positions;
        const bool inside = contains(interval_of(p.intervals, b), position);
        const long long flag_head = p.flag_heads == 1 ? 0 : head;
        const bool seen =
            (p.flags == nullptr || p.flags[(b * p.flag_heads + flag_head) * p.flag_row + position] != 0) &&
            (p.stats == nullptr ||
             p.stats[(b * p.heads + head) * p.positions + position] != __int_as_float(0x7f800000));
        const uint4 *row = reinterpret_cast<const uint4 *>(p.from + row_offset(p.from_strides, b, position, head));
        for (long long at = threadIdx.x; at < p.vectors; at += blockDim.x) {
            p.to[index * p.vectors + at] = inside && seen ? row[at] : make_uint4(0, 0, 0, 0);
        }
    }
}

// The argument of `attention_clear_gradients`.
struct ClearGradients {
    uint4 *to;
    // In elements of two bytes; multiples of 8.
    RowStrides to_strides;
    // The key lengths, [B].
    const int *key_lengths;
    long long batch, positions, heads;
    // Vectors of 16 bytes per row.
    long long vectors;
};

static_assert(sizeof(ClearGradients) == 72, "the host's layout");

// Writes zeros to a gradient [B, T, N, H] in batch rows without keys.
//
// Rows begin at multiples of 16 bytes. A thread writes one vector of a row; threadIdx.y counts rows, and
// blockIdx.y batch rows.
extern "C" __global__ void __launch_bounds__(BLOCK) attention_clear_gradients(const ClearGradients p) {
    const long long count = p.positions * p.heads, step = gridDim.x * (long long)blockDim.y;
    for (long long b = blockIdx.y; b < p.batch; b += gridDim.y) {
        if (p.key_lengths[b] != 0) continue;
        for (long long index = blockIdx.x * (long long)blockDim.y + threadIdx.y; index < count; index += step) {
            const long long start = row_offset(p.to_strides, b, index / p.heads, index % p.heads);
            uint4 *row = reinterpret_cast<uint4 *>(reinterpret_cast<unsigned short *>(p.to) + start);
            for (long long at = threadIdx.x; at < p.vectors; at += blockDim.x) row[at] = make_uint4(0, 0, 0, 0);
        }
    }
}

// The argument of `attention_clear_packed`.
struct ClearPacked {
    uint4 *to;
    // In elements of two bytes; multiples of 8.
    RowStrides to_strides;
    // The rows of each sequence that keep what they have.
    Intervals intervals;
    Starts starts;
    long long batch, positions, heads;
    // Vectors of 16 bytes per row.
    long long vectors;
};

static_assert(sizeof(ClearPacked) == 88, "the host's layout");

// Writes zeros to the rows of a packed gradient [total, N, H] that are in no sequence or outside the interval
// of theirs.
//
// Rows begin at multiples of 16 bytes. A thread writes one vector of a row; threadIdx.y counts rows.
extern "C" __global__ void __launch_bounds__(BLOCK) attention_clear_packed(const ClearPacked p) {
    const long long count = p.positions * p.heads, step = gridDim.x * (long long)blockDim.y;
    for (long long index = blockIdx.x * (long long)blockDim.y + threadIdx.y; index < count; index += step) {
        const long long place = index / p.heads, b = sequence_of_row(p.starts, p.batch, place);
        if (b < p.batch && contains(interval_of(p.intervals, b), place - p.starts.of[b])) continue;
        uint4 *row = reinterpret_cast<uint4 *>(reinterpret_cast<unsigned short *>(p.to) +
                                               row_offset(p.to_strides, 0, place, index % p.heads));
        for (long long at = threadIdx.x; at < p.vectors; at += blockDim.x) row[at] = make_uint4(0, 0, 0, 0);
    }
}
