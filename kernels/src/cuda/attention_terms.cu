// What is added to logits or multiplies probabilities, brought to the one form that a fused attention of another library
// takes: mask and bias as one tensor, small vectors as f32, and dropout as a tensor of ones and zeros. And the gradient
// of the sinks, which needs nothing but what a backward pass computes anyhow.
//
// Compute capability 8.0 and later. Tested by the conformance suite of attention-cudnn.

// Element types, numbered as `attention_cudnn` numbers them.
enum Element { F64 = 0, F32 = 1, F16 = 2, BF16 = 3 };

__device__ inline float float_of_half(unsigned short bits) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
}

// Rounds to nearest, ties to even; infinities stay, and what is too large becomes one.
__device__ inline unsigned short half_of_float(float value) {
    unsigned short bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
}

__device__ inline unsigned short bf16_of_float(float value) {
    unsigned short bits;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
}

__device__ inline float load(const void *from, long long index, int element) {
    switch (element) {
    case F64: return (float)static_cast<const double *>(from)[index];
    case F32: return static_cast<const float *>(from)[index];
    case F16: return float_of_half(static_cast<const unsigned short *>(from)[index]);
    default: return __int_as_float((int)static_cast<const unsigned short *>(from)[index] << 16);
    }
}

__device__ inline void store(void *to, long long index, int element, double value) {
    switch (element) {
    case F64: static_cast<double *>(to)[index] = value; break;
    case F32: static_cast<float *>(to)[index] = (float)value; break;
    case F16: static_cast<unsigned short *>(to)[index] = half_of_float((float)value); break;
    default: static_cast<unsigned short *>(to)[index] = bf16_of_float((float)value); break;
    }
}

// Four strides, by value: 0 along axes of size 1.
struct Strides {
    long long of[4];
};

__device__ inline long long offset(const Strides &strides, const long long *index) {
    return index[0] * strides.of[0] + index[1] * strides.of[1] + index[2] * strides.of[2] + index[3] * strides.of[3];
}

// What `attention_make_bias` writes, and how it lies.
struct MadeBias {
    void *to;
    // F32 or BF16.
    int element;
    // Full or 1, but for the keys, which are always there; rows of `row` elements.
    long long batch, heads, positions, keys, row;
    // What stands for a logit that takes no part, and the least that others count as.
    float masked, least;
};

// What it is made of; null where there is none.
struct Terms {
    const unsigned char *mask;
    Strides mask_strides;
    const void *bias;
    int bias_element;
    Strides bias_strides;
    const float *slopes;
    long long slopes_batch;
};

// Which rows see which keys by structure: row t of batch row b, if it is in its interval of `rows`, sees the keys from
// `t + positions[b] - left` to `t + positions[b] + right`, both included, that are in its interval of `keys`.
struct Structure {
    const int *rows, *keys, *positions;
    long long left, right;
};

// `to[b, n, t, j] = mask ? bias - slope * |t + position - j| : masked`; what is behind a row's keys is zero. What lies where
// the mask is false does not matter: it is not read.
//
// The libraries that this is for compute NaN from infinities, so a logit that takes no part is the finite `masked`, and
// other values are at least `least`, which is far above it.
//
// Beside it, which rows and keys take part at all: `seen_rows` [B, N, T] and `seen_keys` [B, K, S], bytes; the latter are zero
// before. One block a row of the bias, for every position even where the bias has one row for all of them.
extern "C" __global__ void attention_make_bias(
    MadeBias made, Terms terms, Structure structure, unsigned char *seen_rows, unsigned char *seen_keys,
    long long batch, long long heads, long long group, long long positions) {
    const long long t = blockIdx.x % positions;
    const long long n = blockIdx.x / positions % made.heads;
    const long long b = blockIdx.x / positions / made.heads;
    // The batch rows and heads that this row stands for.
    const long long first_batch = made.batch == 1 ? 0 : b, end_batch = made.batch == 1 ? batch : b + 1;
    const long long first_head = made.heads == 1 ? 0 : n, end_head = made.heads == 1 ? heads : n + 1;
    const long long key_heads = heads / group;
    const long long own = made.positions == 1 ? 0 : t;
    const bool writes = made.positions > 1 || t == 0;
    const long long start = ((b * made.heads + n) * made.positions + own) * made.row;
    const auto alive = [&](long long key, float *value) {
        const long long index[4] = {b, n, own, key};
        *value = 0.0f;
        const bool seen = terms.mask == nullptr || terms.mask[offset(terms.mask_strides, index)] != 0;
        if (!seen) return false;
        if (terms.bias != nullptr) *value = load(terms.bias, offset(terms.bias_strides, index), terms.bias_element);
        if (terms.slopes != nullptr) {
            const long long distance = t + structure.positions[b] - key;
            const float slope = terms.slopes[b * terms.slopes_batch + n];
            *value -= slope * (float)(distance < 0 ? -distance : distance);
        }
        // Not a number stays what it is.
        return !(*value == __int_as_float(0xff800000));
    };
    if (writes) {
        for (long long key = threadIdx.x; key < made.row; key += blockDim.x) {
            float value = 0.0f;
            if (key < made.keys && !alive(key, &value)) value = made.masked;
            else if (value < made.least) value = made.least;
            store(made.to, start + key, made.element, value);
        }
    }
    for (long long at = first_batch; at < end_batch; ++at) {
        const long long position = t + structure.positions[at];
        long long first = max((long long)structure.keys[2 * at], position - structure.left);
        long long end = min((long long)structure.keys[2 * at + 1], position + structure.right + 1);
        if (t < structure.rows[2 * at] || t >= structure.rows[2 * at + 1]) end = first;
        bool any = false;
        for (long long key = first + threadIdx.x; key < end; key += blockDim.x) {
            float value;
            if (!alive(key, &value)) continue;
            any = true;
            // Others may write the same at the same time.
            for (long long head = first_head / group; head * group < end_head; ++head) {
                seen_keys[(at * key_heads + head) * made.keys + key] = 1;
            }
        }
        any = __syncthreads_or(any);
        for (long long head = first_head + threadIdx.x; head < end_head; head += blockDim.x) {
            seen_rows[(at * heads + head) * positions + t] = any ? 1 : 0;
        }
    }
}

// A matrix of at most a few thousand numbers, as f32 without gaps.
extern "C" __global__ void attention_to_floats(
    float *to, const void *from, int element, long long rows, long long columns,
    long long row_stride, long long column_stride) {
    const long long index = blockIdx.x * (long long)blockDim.x + threadIdx.x;
    if (index >= rows * columns) return;
    const long long at = index / columns * row_stride + index % columns * column_stride;
    to[index] = load(from, at, element);
}

// Philox4x32 with 10 rounds, as docs/semantics.md, "Dropout".
__device__ inline uint4 philox(uint4 counter, uint2 key) {
#pragma unroll
    for (int round = 0; round < 10; ++round) {
        if (round > 0) {
            key.x += 0x9E3779B9u;
            key.y += 0xBB67AE85u;
        }
        const unsigned int low0 = 0xD2511F53u * counter.x, high0 = __umulhi(0xD2511F53u, counter.x);
        const unsigned int low1 = 0xCD9E8D57u * counter.z, high1 = __umulhi(0xCD9E8D57u, counter.z);
        counter = make_uint4(high1 ^ counter.y ^ key.x, low1, high0 ^ counter.w ^ key.y, low0);
    }
    return counter;
}

// 1 where a probability is kept, else 0, in a dtype of two bytes whose 1 is `one`: `[rows, positions]` rows of
// `blocks` times eight keys. One thread eight keys.
extern "C" __global__ void attention_keep_mask(
    uint4 *to, unsigned int one, long long rows, long long positions, long long blocks,
    unsigned int threshold, unsigned int key0, unsigned int key1, unsigned int stream_offset) {
    const long long count = rows * positions * blocks;
    const long long step = gridDim.x * (long long)blockDim.x;
    for (long long at = blockIdx.x * (long long)blockDim.x + threadIdx.x; at < count; at += step) {
        const uint4 counter = make_uint4(
            (unsigned int)(at % blocks), (unsigned int)(at / blocks % positions),
            (unsigned int)(at / blocks / positions), stream_offset);
        const uint4 words = philox(counter, make_uint2(key0, key1));
        const auto pair = [&](unsigned int word) {
            return ((word & 0xFFFFu) >= threshold ? one : 0u) | ((word >> 16) >= threshold ? one << 16 : 0u);
        };
        to[at] = make_uint4(pair(words.x), pair(words.y), pair(words.z), pair(words.w));
    }
}

// `d_sinks[n] = - sum over b and t of exp(sink[n] - lse) * delta`. One block a head, always the same order.
//
// `delta` is [B, N, T] without gaps; `lse` is the caller's. Rows behind a query length take no part;
// `lengths` is null where there are none.
extern "C" __global__ void attention_sink_gradient(
    void *to, int element, long long to_stride, const float *sinks, const float *delta,
    const float *lse, long long lse_batch, long long lse_position, long long lse_head,
    const int *lengths, long long batch, long long heads, long long positions) {
    const long long head = blockIdx.x;
    const double sink = sinks[head];
    double sum = 0.0;
    for (long long at = threadIdx.x; at < batch * positions; at += blockDim.x) {
        const long long b = at / positions, t = at % positions;
        if (lengths != nullptr && t >= lengths[b]) continue;
        const float value = lse[b * lse_batch + t * lse_position + head * lse_head];
        // A row without a logsumexp has no sink: its own is -inf.
        if (value == __int_as_float(0xff800000)) continue;
        sum += exp(sink - (double)value) * (double)delta[(b * heads + head) * positions + t];
    }
    __shared__ double sums[256];
    sums[threadIdx.x] = sum;
    __syncthreads();
    for (unsigned int half = blockDim.x / 2; half > 0; half /= 2) {
        if (threadIdx.x < half) sums[threadIdx.x] += sums[threadIdx.x + half];
        __syncthreads();
    }
    if (threadIdx.x == 0) store(to, head * to_stride, element, -sums[0]);
}
