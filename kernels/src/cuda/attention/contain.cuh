// Containment after a fused attention of another library, which multiplies what a row must not see with zero: zero times NaN is
// NaN. A row of a result that holds something that is not finite is computed once more, from what takes part alone.
//
// What is not finite reaches all rows of a tile of that library: those that see it, and by products with zero those that do not. So
// of GROUP rows that are in one tile only the first and the last are looked at. The same holds of keys and the rows that see them.
//
// Halves, with every option; any compute capability from 8.0. ROWS groups to a block, one warp to a row that is computed again.
// Tested by the conformance suite of attention-cudnn.

#ifndef GROUP
#define GROUP 1
#endif

static_assert(HALVES, "results are told apart by their bits");

__device__ inline bool is_finite(const uint4 &of) {
    // The highest exponent, and what makes it one more: the sign's place.
    constexpr unsigned HIGHEST = DTYPE == DTYPE_F16 ? 0x7c007c00u : 0x7f807f80u, ONE = DTYPE == DTYPE_F16 ? 0x04000400u : 0x00800080u;
    const unsigned any = ((of.x & HIGHEST) + ONE) | ((of.y & HIGHEST) + ONE) | ((of.z & HIGHEST) + ONE) | ((of.w & HIGHEST) + ONE);
    return (any & 0x80008000u) == 0;
}

constexpr int GROUPS_OF_WARP = ROWS / WARPS;

// Which of a warp's groups hold something that is not finite in the row of a result's head that `row_of_group` says, where that is
// before `end`.
template <int DEPTH, class RowOfGroup>
__device__ inline unsigned spoiled_in(const Tensor &tensor, long long b, long long head, int end, int width, bool aligned,
                                      RowOfGroup row_of_group) {
    constexpr int LANES = lanes_of_row<DEPTH>(), AT_ONCE = 32 / LANES, DEEP = GROUPS_OF_WARP / AT_ONCE;
    const int lane = threadIdx.x % 32;
    bool finite[DEEP];
    // All reads are under way before any is looked at by others.
#pragma unroll
    for (int i = 0; i < DEEP; ++i) {
        const int row = row_of_group(i * AT_ONCE + lane / LANES);
        const element *const from = at(tensor, b, row, head);
        finite[i] = true;
        if (aligned) {
#pragma unroll
            for (int part = 0; part < (DEPTH + LANES * CHUNK - 1) / (LANES * CHUNK); ++part) {
                const int column = (part * LANES + lane % LANES) * CHUNK;
                if (row < end && column < width) finite[i] &= is_finite(*reinterpret_cast<const uint4 *>(from + column));
            }
        } else if (row < end) {
            for (int column = lane % LANES; column < width; column += LANES)
                finite[i] &= is_finite(widened(from[column * tensor.stride[3]]));
        }
    }
    unsigned spoiled = 0;
#pragma unroll
    for (int i = 0; i < DEEP; ++i) {
        const unsigned votes = __ballot_sync(~0u, !finite[i]);
#pragma unroll
        for (int own = 0; own < AT_ONCE; ++own)
            if (votes >> (own * LANES) & (LANES == 32 ? ~0u : (1u << LANES) - 1)) spoiled |= 1u << (i * AT_ONCE + own);
    }
    return spoiled;
}

// The same of the first and the last row of each group, which begin with row `first`.
template <int DEPTH>
__device__ inline unsigned spoiled_groups(const Tensor &tensor, long long b, long long head, int first, int end, int width, bool aligned) {
    unsigned spoiled = spoiled_in<DEPTH>(tensor, b, head, end, width, aligned, [=](int group) { return first + group * GROUP; });
    if constexpr (GROUP > 1) {
        spoiled |= spoiled_in<DEPTH>(tensor, b, head, end, width, aligned, [=](int group) {
            const int row = first + group * GROUP;
            return row < end ? min(row + GROUP, end) - 1 : end;
        });
    }
    return spoiled;
}

// Whether a row of a result's head is finite, for the whole warp.
__device__ inline bool is_finite_row(const Tensor &tensor, long long b, long long position, long long head, int width) {
    const element *const from = at(tensor, b, position, head);
    bool finite = true;
    for (int column = threadIdx.x % 32; column < width; column += 32) finite &= is_finite(widened(from[column * tensor.stride[3]]));
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

// Writes a row of a result by a warp.
template <int DEPTH>
__device__ inline void store_row(const Tensor &tensor, long long b, long long position, long long head, int width,
                                 const real (&sums)[DEPTH / 32], real scale) {
#pragma unroll
    for (int i = 0; i < DEPTH / 32; ++i) {
        const int column = 32 * i + threadIdx.x % 32;
        if (column < width) at(tensor, b, position, head)[column * tensor.stride[3]] = rounded(sums[i] * scale);
    }
}

// The rows of a block's head, and where those of a warp begin.
struct Strip {
    Place place;
    Batch batch;
    int first;
};

__device__ inline Strip strip_of_warp(const Parameters &p, long long rows, long long heads) {
    Strip strip;
    constexpr int EACH = ROWS * GROUP;
    strip.place = place_of_block(p, blockIdx.x, (unsigned)((rows + EACH - 1) / EACH), (unsigned)heads);
    strip.batch = batch_row(p, strip.place.batch);
    strip.first = strip.place.tile * EACH + threadIdx.x / 32 * GROUPS_OF_WARP * GROUP;
    return strip;
}

// Blocks that a multiprocessor has room for at least: few registers, since what needs more is rare.
constexpr int MANY = 4;
