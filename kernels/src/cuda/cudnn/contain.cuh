// Isolation of NaN behind cuDNN, which multiplies masked values by 0, and 0 times NaN is NaN: a row of a
// result that is not finite is computed again, from allowed keys alone.
// Needs: fused/exact.cuh.
//
// NaN or infinities reach all rows of one of cuDNN's tiles: those that see the key, and through products with
// 0 those that do not. So of GROUP rows of one tile only the first and the last are looked at. The same holds
// for keys and the rows that see them.
//
// f16 and bf16, every option, compute capability 8.0 and later. ROWS groups per block, one warp per row that
// is computed again. Tested by the conformance suite of attention-cudnn.

#ifndef GROUP
#define GROUP 1
#endif

static_assert(HALVES, "results are told apart by their bits");

__device__ inline bool is_finite(const uint4 &of) {
    // The largest exponent, and what carries from it into the place of the sign.
    constexpr unsigned HIGHEST = DTYPE == DTYPE_F16 ? 0x7c007c00u : 0x7f807f80u,
                       ONE = DTYPE == DTYPE_F16 ? 0x04000400u : 0x00800080u;
    const unsigned any =
        ((of.x & HIGHEST) + ONE) | ((of.y & HIGHEST) + ONE) | ((of.z & HIGHEST) + ONE) | ((of.w & HIGHEST) + ONE);
    return (any & 0x80008000u) == 0;
}

constexpr int GROUPS_OF_WARP = ROWS / WARPS;

// Which of a warp's groups, the first of which begins with row `first`, hold something that is not finite in
// the rows of a result's head that are looked at. `first` is before `end`; groups from there on read the last
// row, and may be among them.
template <int DEPTH>
__device__ inline unsigned non_finite_groups(const Tensor &tensor, long long b, long long head, int first, int end,
                                             int width, bool aligned) {
    constexpr int LANES = lanes_of_row<DEPTH>(), AT_ONCE = 32 / LANES, DEEP = GROUPS_OF_WARP / AT_ONCE;
    constexpr int PARTS = (DEPTH + LANES * CHUNK - 1) / (LANES * CHUNK), LOOKS = GROUP > 1 ? 2 : 1;
    // As many chunks are in flight at once as registers allow.
    constexpr int LOOKS_AT_ONCE = LOOKS * DEEP * PARTS <= 8 ? LOOKS : 1;
    const int lane = threadIdx.x % 32;
    const element *const rows = at(tensor, b, 0, head);
    const auto row_of_look = [&](int i, int look) {
        const int row = first + (i * AT_ONCE + lane / LANES) * GROUP + look * (GROUP - 1);
        return rows + min(row, end - 1) * tensor.stride[1];
    };
    bool finite[DEEP];
#pragma unroll
    for (int i = 0; i < DEEP; ++i) finite[i] = true;
    if (aligned) {
#pragma unroll LOOKS_AT_ONCE
        for (int look = 0; look < LOOKS; ++look) {
            uint4 chunks[DEEP][PARTS];
            // No load waits for another: past the end, the last chunk is read again.
#pragma unroll
            for (int i = 0; i < DEEP; ++i)
#pragma unroll
                for (int part = 0; part < PARTS; ++part) {
                    const int column = min((part * LANES + lane % LANES) * CHUNK, width - CHUNK);
                    chunks[i][part] = *reinterpret_cast<const uint4 *>(row_of_look(i, look) + column);
                }
#pragma unroll
            for (int i = 0; i < DEEP; ++i)
#pragma unroll
                for (int part = 0; part < PARTS; ++part) finite[i] &= is_finite(chunks[i][part]);
        }
    } else {
#pragma unroll 1
        for (int look = 0; look < LOOKS; ++look)
#pragma unroll
            for (int i = 0; i < DEEP; ++i) {
                const element *const from = row_of_look(i, look);
#pragma unroll 1
                for (int column = lane % LANES; column < width; column += LANES)
                    finite[i] &= is_finite(widened(from[column * tensor.stride[3]]));
            }
    }
    unsigned non_finite = 0;
#pragma unroll
    for (int i = 0; i < DEEP; ++i) {
        const unsigned votes = __ballot_sync(~0u, !finite[i]);
#pragma unroll
        for (int own = 0; own < AT_ONCE; ++own)
            if (votes >> (own * LANES) & (LANES == 32 ? ~0u : (1u << LANES) - 1))
                non_finite |= 1u << (i * AT_ONCE + own);
    }
    return non_finite;
}

// Whether a row of a result's head is finite, for the whole warp.
__device__ inline bool is_finite_row(const Tensor &tensor, long long b, long long position, long long head, int width) {
    const element *const from = at(tensor, b, position, head);
    bool finite = true;
    for (int column = threadIdx.x % 32; column < width; column += 32)
        finite &= is_finite(widened(from[column * tensor.stride[3]]));
    return __all_sync(~0u, finite);
}

// Calls `again` with the rows of these groups, those before `end`.
template <class Again>
__device__ inline void for_each_row(unsigned groups, int first, int end, Again again) {
    while (groups != 0) {
        const int row = first + (__ffs((int)groups) - 1) * GROUP;
        groups &= groups - 1;
        for (int own = row; own < min(row + GROUP, end); ++own) again(own);
    }
}

// The rows of a block's head, and where those of a warp begin.
struct Strip {
    TileIndex place;
    SequenceRows sequence;
    int first;
};

constexpr int ROWS_OF_BLOCK = ROWS * GROUP;

__device__ inline unsigned strips_of_head(long long rows) {
    return (unsigned)((rows + ROWS_OF_BLOCK - 1) / ROWS_OF_BLOCK);
}

__device__ inline Strip strip_of_warp(const Parameters &p, unsigned block, long long rows, long long heads) {
    Strip strip;
    strip.place = tile_of_block(p, block, strips_of_head(rows), (unsigned)heads);
    strip.sequence = sequence_of(p, strip.place.batch);
    strip.first = strip.place.tile * ROWS_OF_BLOCK + threadIdx.x / 32 * GROUPS_OF_WARP * GROUP;
    return strip;
}

// Blocks per multiprocessor, at least: few registers, since code that needs more is rarely run.
constexpr int MANY = 4;
