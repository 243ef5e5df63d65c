// The accumulator layout of mma.sync.m16n8k* and wgmma: which rows and columns of a HEIGHT x WIDTH tile each
// thread holds, what of the mask, the bias and dropout it reads for them, and reductions along rows and
// columns. mma/fma.cuh has the same for products without tensor cores.
// Needs: fused/logits.cuh, fused/dropout.cuh, fused/shared_tiles.cuh.
//
// Each warp holds HEIGHT / WARPS whole rows, each thread `row_slots` rows and `column_slots` columns of them.
// The left operand of the next product has the same layout, where the order of summation is chosen for it, so
// accumulators are multiplied without leaving registers.

#if TENSOR_CORES

template <int HEIGHT>
__device__ constexpr int row_slots() {
    return HEIGHT / WARPS / 8;
}

template <int WIDTH>
__device__ constexpr int column_slots() {
    return WIDTH / 4;
}

template <int WIDTH>
__device__ constexpr int output_slots() {
    return WIDTH / 4;
}

__device__ inline int lane() { return threadIdx.x % 32; }

template <int HEIGHT>
__device__ inline int row_at(int slot) {
    return threadIdx.x / 32 * (HEIGHT / WARPS) + slot / 2 * 16 + slot % 2 * 8 + lane() / 4;
}

__device__ inline int column_at(int slot) { return slot / 2 * 8 + lane() % 4 * 2 + slot % 2; }

__device__ constexpr int column_offset(int slot) { return slot / 2 * 8 + slot % 2; }

// Tiles hold keys in an order in which those of a thread are consecutive, so that it reads its mask and bias
// in wide loads. As columns, a thread has eight consecutive keys of 32; as rows, two of 16.
__device__ inline int key_at(int slot) { return slot / 8 * 32 + lane() % 4 * 8 + slot % 8; }
__device__ constexpr int key_offset(int slot) { return slot / 8 * 32 + slot % 8; }

template <int HEIGHT>
__device__ inline int key_row_at(int slot) {
    static_assert(row_slots<HEIGHT>() == 2, "16 rows to a warp");
    return threadIdx.x / 32 * 16 + lane() / 4 * 2 + slot;
}

// The row of a tile that holds a key, where keys are the columns of a product (across) or its rows (down).
struct KeysAcross {
    static __device__ constexpr int of(int key) { return (key & ~30) | (key & 6) << 2 | (key >> 2 & 6); }
};
struct KeysDown {
    static __device__ constexpr int of(int key) { return (key & ~15) | (key >> 1 & 7) | (key & 1) << 3; }
};

// Outputs of split products are permuted so that a thread reads four neighbouring columns of the right
// operand at once.
template <int WIDTH>
__device__ inline int output_column_at(int slot) {
    if constexpr (SPLITS) return slot / 8 * 32 + (lane() % 4 * 2 + slot / 4 % 2) * 4 + slot % 4;
    return column_at(slot);
}

// Slots 2 * i and 2 * i + 1 are neighbouring columns.
constexpr int NEIGHBOURS = 2;

// Whether the thread writes what is one number per row.
__device__ inline bool leads_row() { return lane() % 4 == 0; }

// Over the threads that share a row.
__device__ inline float sum_of_row(float x) {
    x += __shfl_xor_sync(~0u, x, 1);
    return x + __shfl_xor_sync(~0u, x, 2);
}

__device__ inline float maximum_of_row(float x) {
    x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
    return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}

// Over the threads of a warp that share columns.
__device__ inline float sum_of_column(float x) {
    x += __shfl_xor_sync(~0u, x, 4);
    x += __shfl_xor_sync(~0u, x, 8);
    return x + __shfl_xor_sync(~0u, x, 16);
}

constexpr int COLUMN_PARTS = WARPS;
__device__ inline int column_part() { return threadIdx.x / 32; }
__device__ inline bool leads_column() { return lane() / 4 == 0; }

// Bit c says whether the key in slot c of a tile that begins with key `first` is kept in the row.
template <int WIDTH>
__device__ inline unsigned kept_of_row(const Parameters &p, const DropoutWords &dropout, const Row &row, int first) {
    unsigned kept = 0;
#pragma unroll
    for (int i = 0; i < WIDTH / 32; ++i)
        kept |= kept_of_block(p, dropout, row.batch_head, (unsigned)row.t, (unsigned)(first + key_at(8 * i)) / 8)
                << (8 * i);
    return kept;
}

// The same where columns are query rows from `first_t` on and the thread's rows are keys. Four threads whose
// keys are drawn together each draw for one query row.
template <int HEIGHT, int WIDTH>
__device__ inline void kept_of_keys(const Parameters &p, const DropoutWords &dropout, unsigned batch_head, int first_t,
                                    int first, unsigned (&kept)[row_slots<HEIGHT>()]) {
    const unsigned key = (unsigned)(first + key_row_at<HEIGHT>(0));
    kept[0] = kept[1] = 0;
#pragma unroll
    for (int i = 0; i < column_slots<WIDTH>(); i += 4) {
        const int own = first_t + column_at(i + lane() / 4 % 4);
        const unsigned drawn = kept_of_block(p, dropout, batch_head, (unsigned)own, key / 8);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const unsigned both = __shfl_sync(~0u, drawn, lane() / 16 * 16 + j * 4 + lane() % 4) >> key % 8;
            kept[0] |= (both & 1) << (i + j);
            kept[1] |= (both >> 1 & 1) << (i + j);
        }
    }
}

// The mask and the bias of a tile in registers, several keys to a register.
__device__ inline real half_of(unsigned both, int index) {
    const unsigned short half = (unsigned short)(both >> (16 * index));
    return BIAS_DTYPE == DTYPE_F16 ? f16_to_float(half) : bf16_to_float(half);
}

__device__ inline bool byte_of(unsigned four, int index) { return (four & 0xffu << (8 * index)) != 0; }

// Rows are rows of a product, and columns are keys.
template <int HEIGHT, int WIDTH>
struct RowMaskBias {
    static constexpr int ROWS_OF_THREAD = row_slots<HEIGHT>(), KEYS_OF_THREAD = column_slots<WIDTH>();
    unsigned mask[ROWS_OF_THREAD][PACKS_MASK ? KEYS_OF_THREAD / 4 : 1],
        bias[ROWS_OF_THREAD][PACKS_BIAS ? KEYS_OF_THREAD / 2 : 1];

    __device__ inline bool visible(int r, int c) const { return !PACKS_MASK || byte_of(mask[r][c / 4], c % 4); }
    __device__ inline real added(int r, int c) const { return PACKS_BIAS ? half_of(bias[r][c / 2], c % 2) : real(0); }

    // For keys from `first` on. What is read past the last key is not used.
    __device__ inline void read(const Parameters &p, const Row (&rows)[ROWS_OF_THREAD], int first) {
        const int last = (int)p.key_length - 1;
        // Without branches between them, all loads are in flight at once.
        if constexpr (PACKS_MASK) {
            if (p.aligned & ALIGNED_MASK) {
#pragma unroll
                for (int r = 0; r < ROWS_OF_THREAD; ++r)
#pragma unroll
                    for (int c = 0; c < KEYS_OF_THREAD; c += 8) {
                        const uint2 eight = __ldg(reinterpret_cast<const uint2 *>(p.mask.data + rows[r].mask +
                                                                                  min(first + key_at(c), last - 7)));
                        mask[r][c / 4] = eight.x;
                        mask[r][c / 4 + 1] = eight.y;
                    }
            } else {
#pragma unroll
                for (int r = 0; r < ROWS_OF_THREAD; ++r)
#pragma unroll
                    for (int c = 0; c < KEYS_OF_THREAD; ++c) {
                        const unsigned one =
                            (unsigned char)
                                p.mask.data[rows[r].mask + min(first + key_at(c), last) * key_stride(p.mask)];
                        mask[r][c / 4] = c % 4 ? mask[r][c / 4] | one << (8 * (c % 4)) : one;
                    }
            }
        }
        if constexpr (PACKS_BIAS) {
            if (p.aligned & ALIGNED_BIAS) {
#pragma unroll
                for (int r = 0; r < ROWS_OF_THREAD; ++r)
#pragma unroll
                    for (int c = 0; c < KEYS_OF_THREAD; c += 8) {
                        const uint4 eight = __ldg(reinterpret_cast<const uint4 *>(
                            p.bias.data + 2 * (rows[r].bias + min(first + key_at(c), last - 7))));
                        bias[r][c / 2] = eight.x;
                        bias[r][c / 2 + 1] = eight.y;
                        bias[r][c / 2 + 2] = eight.z;
                        bias[r][c / 2 + 3] = eight.w;
                    }
            } else {
                const unsigned short *const from = reinterpret_cast<const unsigned short *>(p.bias.data);
#pragma unroll
                for (int r = 0; r < ROWS_OF_THREAD; ++r)
#pragma unroll
                    for (int c = 0; c < KEYS_OF_THREAD; ++c) {
                        const unsigned one = from[rows[r].bias + min(first + key_at(c), last) * key_stride(p.bias)];
                        bias[r][c / 2] = c % 2 ? bias[r][c / 2] | one << 16 : one;
                    }
            }
        }
    }
};

// Rows of a product are keys, and columns are query rows.
template <int HEIGHT, int WIDTH>
struct KeyMaskBias {
    static constexpr int ROWS_OF_THREAD = column_slots<WIDTH>();
    unsigned mask[PACKS_MASK ? ROWS_OF_THREAD / 2 : 1], bias[PACKS_BIAS ? ROWS_OF_THREAD : 1];

    __device__ inline bool visible(int r, int c) const { return !PACKS_MASK || byte_of(mask[c / 2], c % 2 * 2 + r); }
    __device__ inline real added(int r, int c) const { return PACKS_BIAS ? half_of(bias[c], r) : real(0); }

    // For query rows of a head from `first_t` on and keys from `first` on. What is read past the last of them
    // is not used.
    __device__ inline void read(const Parameters &p, long long b, long long n, int first_t, int first) {
        const int key = first + key_row_at<HEIGHT>(0), last = (int)p.key_length - 1;
        const int t = first_t + column_at(0), last_t = (int)p.query_length - 1;
        const bool inside = first_t + WIDTH <= p.query_length;
        const auto head = [&](const Tensor &tensor) { return b * tensor.stride[0] + n * tensor.stride[1]; };
        const auto slow = [&](const Tensor &tensor, int c, int i) {
            return head(tensor) + min(t + column_offset(c), last_t) * tensor.stride[2] +
                   min(key + i, last) * key_stride(tensor);
        };
        // Without branches between them, all loads are in flight at once.
        if constexpr (PACKS_MASK) {
            if (inside && (p.aligned & ALIGNED_MASK)) {
                const char *const from = p.mask.data + head(p.mask) + t * p.mask.stride[2] + min(key, last - 1);
                unsigned short both[ROWS_OF_THREAD];
#pragma unroll
                for (int c = 0; c < ROWS_OF_THREAD; ++c)
                    both[c] =
                        __ldg(reinterpret_cast<const unsigned short *>(from + column_offset(c) * p.mask.stride[2]));
#pragma unroll
                for (int c = 0; c < ROWS_OF_THREAD; c += 2) mask[c / 2] = both[c] | (unsigned)both[c + 1] << 16;
            } else {
#pragma unroll
                for (int c = 0; c < ROWS_OF_THREAD; ++c) {
                    const unsigned both = (unsigned char)p.mask.data[slow(p.mask, c, 0)] |
                                          (unsigned)(unsigned char)p.mask.data[slow(p.mask, c, 1)] << 8;
                    mask[c / 2] = c % 2 ? mask[c / 2] | both << 16 : both;
                }
            }
        }
        if constexpr (PACKS_BIAS) {
            if (inside && (p.aligned & ALIGNED_BIAS)) {
                const char *const from = p.bias.data + 2 * (head(p.bias) + t * p.bias.stride[2] + min(key, last - 1));
#pragma unroll
                for (int c = 0; c < ROWS_OF_THREAD; ++c)
                    bias[c] = __ldg(reinterpret_cast<const unsigned *>(from + 2 * column_offset(c) * p.bias.stride[2]));
            } else {
                const unsigned short *const from = reinterpret_cast<const unsigned short *>(p.bias.data);
#pragma unroll
                for (int c = 0; c < ROWS_OF_THREAD; ++c)
                    bias[c] = from[slow(p.bias, c, 0)] | (unsigned)from[slow(p.bias, c, 1)] << 16;
            }
        }
    }
};

#endif
