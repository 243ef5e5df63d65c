// Inputs of cuDNN's fused attention in the form that it takes: mask, bias and ALiBi as one bias tensor, small
// vectors as f32, dropout as a keep mask of ones and zeros. And the gradient of the sinks, from the results
// of the backward pass.
// Needs: common/dtypes.cuh, common/integers.cuh, common/philox.cuh, cudnn/strides.cuh, cudnn/intervals.cuh.
//
// Compute capability 8.0 and later. Tested by the conformance suite of attention-cudnn.

// The strides of the axes batch, head, row and key, in elements: 0 along axes of size 1.
struct LogitStrides {
    long long of[4];
};

__device__ inline long long offset(const LogitStrides &strides, const long long *index) {
    return index[0] * strides.of[0] + index[1] * strides.of[1] + index[2] * strides.of[2] + index[3] * strides.of[3];
}

// The bias that `attention_make_bias` writes.
struct MadeBias {
    void *to;
    // The shape. Each of the first three is the size of the logits' axis or 1; `row` is the row stride.
    long long batch, heads, positions, keys, row;
    // The bias of masked logits, and the minimum that the bias of all others is raised to.
    float masked, least;
};

// The tensors that the bias is computed from; null if the call has none.
struct BiasSources {
    const unsigned char *mask;
    LogitStrides mask_strides;
    const void *bias;
    LogitStrides bias_strides;
    const float *slopes;
    long long slopes_batch;
};

// Which rows see which keys by structure: row t of batch row b, if it is in its interval of `rows`, sees the
// keys from `t + offset - left` to `t + offset + right`, both included, that are in its interval of `keys`.
struct Structure {
    Intervals rows, keys;
    // The offset of each batch row; null if `offset` is that of all of them.
    const int *offsets;
    long long offset, left, right;
};

__device__ inline long long offset_of(const Structure &structure, long long b) {
    return structure.offsets == nullptr ? structure.offset : structure.offsets[b];
}

// Flags of rows that see any key and of keys that any row sees: bytes that the host sets to zero before.
// `rows` is [B, N, T] and `keys` is [B, K, row], both with one head if the bias has one.
struct Seen {
    unsigned char *rows, *keys;
};

// The argument of `attention_make_bias`. The structs that kernels take have the layout of the structs of the
// same name on the host (arguments.rs of attention-cudnn).
struct MakeBias {
    MadeBias made;
    BiasSources sources;
    Structure structure;
    Seen seen;
    // The dtype of the bias that is written, DTYPE_F32 or DTYPE_BF16, and that of the call's bias.
    int made_dtype, bias_dtype;
    long long batch, heads, group, positions;
};

static_assert(sizeof(MakeBias) == 272, "the host's layout");

// Consecutive keys per thread: 16 bytes of halves, the width of one load. And rows per block (`STRIP` of
// launch.rs): their flags for those keys, a byte per row, fit into four registers.
constexpr int OWN = 8, STRIP = 16;

// Loads `OWN` elements that are `stride` apart, the first of which is `from[start]`; 0 for those past
// `count`.
__device__ inline void load_own(float *to, const void *from, int element, long long start, long long stride,
                                int count) {
    const char *at = static_cast<const char *>(from) + start * (element == DTYPE_F64   ? 8
                                                                : element == DTYPE_F32 ? 4
                                                                                       : 2);
    const bool aligned = (reinterpret_cast<unsigned long long>(at) & 15) == 0;
    if (stride == 1 && count == OWN && aligned && element != DTYPE_F64) {
        if (element == DTYPE_F32) {
            const float4 low = *reinterpret_cast<const float4 *>(at), high = *reinterpret_cast<const float4 *>(at + 16);
            to[0] = low.x, to[1] = low.y, to[2] = low.z, to[3] = low.w;
            to[4] = high.x, to[5] = high.y, to[6] = high.z, to[7] = high.w;
            return;
        }
        const uint4 words = *reinterpret_cast<const uint4 *>(at);
        const unsigned int pairs[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
        for (int own = 0; own < OWN; ++own) {
            const unsigned short bits = (unsigned short)(pairs[own / 2] >> (own % 2 * 16));
            to[own] = element == DTYPE_F16 ? f16_to_float(bits) : bf16_to_float(bits);
        }
        return;
    }
#pragma unroll
    for (int own = 0; own < OWN; ++own)
        to[own] = own < count ? load_as<float>(from, element, start + own * stride) : 0.0f;
}

// One bit for each of `OWN` bytes of a mask, which is 1 if the byte is not zero; 0 for bytes past `count`.
__device__ inline unsigned int load_own_mask(const unsigned char *from, long long stride, int count) {
    unsigned int bits = 0;
    if (stride == 1 && count == OWN && (reinterpret_cast<unsigned long long>(from) & 7) == 0) {
        const uint2 words = *reinterpret_cast<const uint2 *>(from);
#pragma unroll
        for (int own = 0; own < OWN; ++own) {
            const unsigned int byte = (own < 4 ? words.x : words.y) >> (own % 4 * 8) & 0xFFu;
            bits |= (unsigned int)(byte != 0) << own;
        }
        return bits;
    }
#pragma unroll
    for (int own = 0; own < OWN; ++own) {
        if (own < count) bits |= (unsigned int)(from[own * stride] != 0) << own;
    }
    return bits;
}

__device__ inline void store_own(void *to, long long start, int element, const float *values) {
    if (element == DTYPE_F32) {
        float4 *at = reinterpret_cast<float4 *>(static_cast<float *>(to) + start);
        at[0] = make_float4(values[0], values[1], values[2], values[3]);
        at[1] = make_float4(values[4], values[5], values[6], values[7]);
        return;
    }
    unsigned int pairs[4];
#pragma unroll
    for (int pair = 0; pair < 4; ++pair) {
        pairs[pair] = float_to_bf16(values[2 * pair]) | (unsigned int)float_to_bf16(values[2 * pair + 1]) << 16;
    }
    *reinterpret_cast<uint4 *>(static_cast<unsigned short *>(to) + start) =
        make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
}

// The bits of those of the `OWN` keys from `key` on that are in [first, end).
__device__ inline unsigned int own_between(long long key, long long first, long long end) {
    const int low = (int)min(max(first - key, 0ll), (long long)OWN);
    const int high = (int)min(max(end - key, 0ll), (long long)OWN);
    return (1u << high) - 1u & ~((1u << low) - 1u);
}

// Writes the bias `to[b, n, t, j] = mask ? bias - slope * |t + offset - j| : masked`, with zeros between the
// keys and the end of a row.
//
// cuDNN computes NaN from infinities, so masked logits get the finite bias `masked`, and all others a bias of
// at least `least`, which is far above it.
//
// The kernel also sets the flags of rows that see a key and of keys that a row sees. One block per `STRIP`
// rows of a batch row and head of the bias (blockIdx.x), for every position even if the bias has one row for
// all of them. `OWN` keys per thread (blockIdx.y).
extern "C" __global__ void __launch_bounds__(BLOCK) attention_make_bias(const MakeBias p) {
    const MadeBias made = p.made;
    const BiasSources sources = p.sources;
    const Structure structure = p.structure;
    const Seen seen = p.seen;
    const int made_dtype = p.made_dtype, bias_dtype = p.bias_dtype;
    const long long batch = p.batch, heads = p.heads, group = p.group, positions = p.positions;
    const long long strips = (positions + STRIP - 1) / STRIP;
    const long long first_row = blockIdx.x % strips * STRIP;
    const long long n = blockIdx.x / strips % made.heads;
    const long long b = blockIdx.x / strips / made.heads;
    const long long key = (blockIdx.y * (long long)blockDim.x + threadIdx.x) * OWN;
    const int count = (int)min(max(made.keys - key, 0ll), (long long)OWN);
    // The keys that mask and bias leave visible: a byte per row, with a bit per key.
    unsigned int alive[STRIP / 4] = {};
#pragma unroll
    for (int row = 0; row < STRIP; ++row) {
        const long long t = first_row + row, own_row = made.positions == 1 ? 0 : t;
        if (t >= positions || key >= made.row) continue;
        unsigned int bits = (1u << count) - 1u;
        if (sources.mask != nullptr) {
            const long long index[4] = {b, n, own_row, key};
            bits &=
                load_own_mask(sources.mask + offset(sources.mask_strides, index), sources.mask_strides.of[3], count);
        }
        float values[OWN] = {};
        if (sources.bias != nullptr) {
            const long long index[4] = {b, n, own_row, key};
            const long long start = offset(sources.bias_strides, index);
            load_own(values, sources.bias, bias_dtype, start, sources.bias_strides.of[3], count);
        }
        if (sources.slopes != nullptr) {
            const float slope = sources.slopes[b * sources.slopes_batch + n];
            const long long distance = t + offset_of(structure, b) - key;
#pragma unroll
            for (int own = 0; own < OWN; ++own) values[own] -= slope * fabsf((float)(distance - own));
        }
#pragma unroll
        for (int own = 0; own < OWN; ++own) {
            // NaN stays NaN.
            if (values[own] == __int_as_float(0xff800000)) bits &= ~(1u << own);
            const float value = values[own] < made.least ? made.least : values[own];
            values[own] = own >= count ? 0.0f : bits >> own & 1u ? value : made.masked;
        }
        alive[row / 4] |= bits << (row % 4 * 8);
        if (made.positions > 1 || t == 0) {
            const long long start = ((b * made.heads + n) * made.positions + own_row) * made.row + key;
            store_own(made.to, start, made_dtype, values);
        }
    }
    // The batch rows and key/value heads that read these rows of the bias.
    const long long first_batch = made.batch == 1 ? 0 : b, end_batch = made.batch == 1 ? batch : b + 1;
    const long long key_heads = made.heads == 1 ? 1 : heads / group;
    for (long long at = first_batch; at < end_batch; ++at) {
        const Interval rows = interval_of(structure.rows, at), keys = interval_of(structure.keys, at);
        const long long offset = offset_of(structure, at);
        unsigned int any = 0;
#pragma unroll
        for (int row = 0; row < STRIP; ++row) {
            const long long t = first_row + row, position = t + offset;
            const long long first = max((long long)keys.first, position - structure.left);
            const long long end = min((long long)keys.end, position + structure.right + 1);
            unsigned int bits = alive[row / 4] >> (row % 4 * 8) & own_between(key, first, end);
            if (!contains(rows, t)) bits = 0;
            any |= bits;
            // Other blocks may write the same value at the same time.
            if (__any_sync(0xFFFFFFFFu, bits != 0) && threadIdx.x % 32 == 0) {
                seen.rows[(at * made.heads + n) * positions + t] = 1;
            }
        }
        if (any == 0) continue;
        unsigned int *flags =
            reinterpret_cast<unsigned int *>(seen.keys + (at * key_heads + n / (heads / key_heads)) * made.row + key);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const unsigned int four = any >> (half * 4) & 0xFu;
            const unsigned int bytes = four & 1u | (four & 2u) << 7 | (four & 4u) << 14 | (four & 8u) << 21;
            // Earlier blocks have mostly set the bits already, so most blocks need no atomic operation.
            if ((flags[half] & bytes) != bytes) atomicOr(flags + half, bytes);
        }
    }
}

// The argument of `attention_to_floats`.
struct ToFloats {
    float *to;
    const void *from;
    long long rows, columns, row_stride, column_stride;
    int dtype;
};

static_assert(sizeof(ToFloats) == 56, "the host's layout");

// Converts a matrix to f32 without gaps: slopes or sinks, at most some thousand numbers.
extern "C" __global__ void __launch_bounds__(BLOCK) attention_to_floats(const ToFloats p) {
    const long long index = blockIdx.x * (long long)blockDim.x + threadIdx.x;
    if (index >= p.rows * p.columns) return;
    const long long at = index / p.columns * p.row_stride + index % p.columns * p.column_stride;
    p.to[index] = load_as<float>(p.from, p.dtype, at);
}

// The argument of `attention_keep_mask`.
struct KeepMask {
    uint4 *to;
    // The mask has [rows, positions] rows of `blocks` times eight keys, with one of `rows` per batch row and
    // head.
    long long rows, positions, blocks;
    // The seed and the offset of the stream, if they are in device memory; else `key` and `stream_offset`
    // have them.
    Integers seed, offset;
    // The bits of 1 in the dtype of the mask, f16 or bf16.
    unsigned one;
    // A probability is dropped if its 16 random bits are below `threshold`.
    unsigned threshold, key[2], stream_offset;
};

static_assert(sizeof(KeepMask) == 104, "the host's layout");

// Writes the keep mask: 1 if a probability is kept, else 0. Eight keys per thread, blockDim.y rows per block.
extern "C" __global__ void __launch_bounds__(BLOCK) attention_keep_mask(const KeepMask p) {
    const long long at = blockIdx.x * (long long)blockDim.y + threadIdx.y;
    if (at >= p.rows * p.positions) return;
    const unsigned int position = (unsigned int)(at % p.positions), row = (unsigned int)(at / p.positions);
    unsigned int key[2] = {p.key[0], p.key[1]};
    if (p.seed.data != nullptr) {
        const unsigned long long seed = (unsigned long long)integer_at(p.seed, 0);
        key[0] = (unsigned int)seed;
        key[1] = (unsigned int)(seed >> 32);
    }
    const unsigned int stream_offset =
        p.offset.data != nullptr ? (unsigned int)integer_at(p.offset, 0) : p.stream_offset;
    for (long long block = threadIdx.x; block < p.blocks; block += blockDim.x) {
        const uint4 counter = make_uint4((unsigned int)block, position, row, stream_offset);
        const uint4 words = philox4x32_10(counter, key[0], key[1]);
        const auto pair = [&](unsigned int word) {
            return ((word & 0xFFFFu) >= p.threshold ? p.one : 0u) | ((word >> 16) >= p.threshold ? p.one << 16 : 0u);
        };
        p.to[at * p.blocks + block] = make_uint4(pair(words.x), pair(words.y), pair(words.z), pair(words.w));
    }
}

// The argument of `attention_sink_gradient`.
struct SinkGradient {
    void *to;
    long long to_stride;
    // The sinks, [N], and the row sums `<d_out, out>`, [B, N, T], without gaps.
    const float *sinks, *delta;
    // The logsumexp that the caller gives.
    const float *lse;
    RowStrides lse_strides;
    // The rows that see a key by structure: the others have no gradient.
    Intervals rows;
    // Written by attention_sum_rows for far rows, those whose logsumexp is `far` or more: the largest logit,
    // and minus the binary logarithm of the row sum relative to it.
    const float *scores, *offsets;
    long long batch, heads, positions;
    float far;
    int dtype;
};

static_assert(sizeof(SinkGradient) == 128, "the host's layout");

// Computes `d_sinks[n] = - sum over b and t of exp(sink[n] - lse) * delta`, without the rows that see no key.
// One block per head, which always adds in the same order.
extern "C" __global__ void __launch_bounds__(SUMMING_BLOCK) attention_sink_gradient(const SinkGradient p) {
    const long long head = blockIdx.x;
    const double sink = p.sinks[head];
    double sum = 0.0;
    for (long long at = threadIdx.x; at < p.batch * p.positions; at += blockDim.x) {
        const long long b = at / p.positions, t = at % p.positions;
        if (!contains(interval_of(p.rows, b), t)) continue;
        const float value = p.lse[row_offset(p.lse_strides, b, t, head)];
        // A row whose logsumexp is -inf has a sink of -inf.
        if (value == __int_as_float(0xff800000) || sink == -(double)__int_as_float(0x7f800000)) continue;
        const long long row = (b * p.heads + head) * p.positions + t;
        double exponent = sink - (double)value;
        if (fabsf(value) >= p.far && fabsf(value) < __int_as_float(0x7f800000)) {
            const double above = sink - (double)p.scores[row];
            // A sink so far above the largest logit has a probability of 1. The difference cannot be computed
            // here, because the offset has too few significant digits left.
            exponent = above > 2.0 * p.far ? 0.0 : above + (double)p.offsets[row] * 0.6931471805599453;
        }
        sum += exp(exponent > 0.0 ? 0.0 : exponent) * (double)p.delta[row];
    }
    __shared__ double sums[SUMMING_BLOCK];
    sums[threadIdx.x] = sum;
    __syncthreads();
    for (unsigned int half = blockDim.x / 2; half > 0; half /= 2) {
        if (threadIdx.x < half) sums[threadIdx.x] += sums[threadIdx.x + half];
        __syncthreads();
    }
    if (threadIdx.x == 0) store(p.to, p.dtype, head * p.to_stride, -sums[0]);
}
