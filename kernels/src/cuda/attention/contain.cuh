// Containment after a fused attention of another library, which multiplies what a row must not see with zero: zero times NaN is
// NaN. A row of a result that holds something that is not finite is computed once more, from what takes part alone.
//
// Halves, with every option; any compute capability from 8.0. A pass over each result, at the speed of memory where all is finite;
// one warp to a row that is not. ROWS rows to a block. Tested by the conformance suite of attention-cudnn.

static_assert(HALVES, "results are told apart by their bits");

__device__ inline bool is_finite(const uint4 &of) {
    // The highest exponent, and what makes it one more: the sign's place.
    constexpr unsigned HIGHEST = DTYPE == DTYPE_F16 ? 0x7c007c00u : 0x7f807f80u, ONE = DTYPE == DTYPE_F16 ? 0x04000400u : 0x00800080u;
    const unsigned any = ((of.x & HIGHEST) + ONE) | ((of.y & HIGHEST) + ONE) | ((of.z & HIGHEST) + ONE) | ((of.w & HIGHEST) + ONE);
    return (any & 0x80008000u) == 0;
}

constexpr int ROWS_OF_WARP = ROWS / WARPS;

// Bits of the rows `first`, `first + 1`, .. before `end` of a result's head that hold something that is not finite; by a warp.
template <int DEPTH>
__device__ inline unsigned spoiled_rows(const Tensor &tensor, long long b, long long head, int first, int end, int width, bool aligned) {
    constexpr int LANES = lanes_of_row<DEPTH>(), AT_ONCE = 32 / LANES, DEEP = ROWS_OF_WARP / AT_ONCE;
    const int lane = threadIdx.x % 32;
    bool finite[DEEP];
    // All reads are under way before any is looked at by others.
#pragma unroll
    for (int i = 0; i < DEEP; ++i) {
        const int row = first + i * AT_ONCE + lane / LANES;
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

// The next of the rows, which is taken from them.
__device__ inline int take_row(unsigned &rows) {
    const int row = __ffs((int)rows) - 1;
    rows &= rows - 1;
    return row;
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
    strip.place = place_of_block(p, blockIdx.x, (unsigned)((rows + ROWS - 1) / ROWS), (unsigned)heads);
    strip.batch = batch_row(p, strip.place.batch);
    strip.first = strip.place.tile * ROWS + threadIdx.x / 32 * ROWS_OF_WARP;
    return strip;
}
